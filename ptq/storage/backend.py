"""What does a store ask of the place where its bytes lie?

A backend keeps named byte strings: complete or absent, listed by prefix, created or replaced only if nobody else was
faster. A local folder is here, a bucket in `s3_bucket.py`. What the names and the bytes mean is `store.py`'s business.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ptq.errors import ArtifactError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*(/[A-Za-z0-9._=-]+)*")


@dataclass(frozen=True, slots=True)
class Entry:
    """A kept name: its size, and when it was written (seconds since the epoch)."""

    name: str
    size_bytes: int
    modified_at: float


class Backend(Protocol):
    """A place for named byte strings. Names are relative, with `/` between parts; see `require_name`.

    Every method raises ArtifactError where the place cannot be reached, read or written.
    """

    @property
    def uri(self) -> str:
        """The URI of the whole place, without a slash at the end."""
        ...

    @property
    def has_conditions(self) -> bool:
        """Whether `create` and `replace` are atomic against other writers; some S3-compatible servers ignore them."""
        ...

    def local_path(self, name: str) -> Path | None:
        """Returns the file that holds `name`, whether or not it exists; None where bytes must be fetched first."""
        ...

    def entry(self, name: str) -> Entry | None:
        """Returns what is kept under `name`, None if nothing is."""
        ...

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yields what is kept under names that begin with `prefix`, in the order of the names."""
        ...

    def read(self, name: str) -> tuple[bytes, str]:
        """Returns the bytes and a tag that changes with them; FileNotFoundError if nothing is kept under `name`."""
        ...

    def fetch(self, name: str, target: Path) -> str:
        """Writes the bytes to the file `target` and returns their SHA-256; FileNotFoundError as `read`."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Keeps `data`, in place of what was there."""
        ...

    def write_file(self, name: str, path: Path) -> None:
        """Keeps the bytes of the file at `path`, in place of what was there."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Keeps `data` if nothing is kept under `name` yet; returns whether it did."""
        ...

    def replace(self, name: str, data: bytes, *, tag: str) -> bool:
        """Keeps `data` if what is kept still has `tag`; returns whether it did."""
        ...

    def move(self, name: str, target: str) -> None:
        """Keeps the bytes under another name; nothing happens where they are gone."""
        ...

    def delete(self, name: str) -> None:
        """Forgets `name`; nothing happens where it is gone."""
        ...

    def unfinished(self, *, before: float, delete: bool) -> list[Entry]:
        """Returns what writers began before a moment and never ended, and forgets it if `delete`.

        Args:
            before: seconds since the epoch.
            delete: whether to forget what is returned.
        """
        ...


def require_name(name: str) -> str:
    """Returns `name` if it stays inside a store.

    Raises:
        ArtifactError: it has other characters than letters, digits and `._=-/`, or a part that is `.` or `..`.
    """
    if not _NAME.fullmatch(name) or any(part in (".", "..") for part in name.split("/")):
        raise ArtifactError(
            f"The name {name[:120]!r} cannot be kept in a store. Expected parts of letters, digits, '.', '_', '=' and "
            "'-' with '/' between them, none of them '.' or '..'. Something outside the pipeline has written it."
        )
    return name

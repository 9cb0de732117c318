"""What did the pipeline find?

Small frozen values that stages hand to each other: numbers, names and references to stored objects. Tensors,
tables and models never travel in them, nor do counts per class: each element of a record costs microseconds at every
stage that takes it. Every record is JSON after `to_jsonable`, and comes back with
`record_from_json`.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

Record = TypeVar("Record")
# Called by whatever takes long, with how much is done and how much there is.
Progress = Callable[[int, int], None]


def to_jsonable(value: Any) -> Any:
    """Returns `value` (a record, a config section, or a collection of them) as plain JSON types."""
    return to_jsonable_python(value)


def record_from_json(kind: type[Record], value: Any) -> Record:
    """Returns the record of type `kind` whose `to_jsonable` form is `value`; pydantic's error if it does not fit."""
    return TypeAdapter(kind).validate_python(value)


def digest(value: Any) -> str:
    """Returns the SHA-256, in hexadecimal, of the canonical JSON form of `value`.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(to_jsonable(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ArtifactRef:
    """A stored object: the name a person would give the file, the SHA-256 of its bytes, and its size."""

    name: str
    sha256: str
    size_bytes: int

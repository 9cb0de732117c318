"""How does a store keep its bytes in an S3-compatible bucket?

Requests that fail and servers that are away are the business of `s3_client.py`; whether bytes are the right ones is
decided in `store.py`, by their SHA-256.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore import exceptions as faults

from ptq.errors import ArtifactError
from ptq.storage import s3_client
from ptq.storage.backend import Entry, require_name
from ptq.uris import parse_store_uri, s3_uri, without_secrets

MEBIBYTE = 2**20
# Up to here one request is faster than parts, which a server has to put together.
MULTIPART_BYTES = 128 * MEBIBYTE
_PART_BYTES = 16 * MEBIBYTE
_PARTS_AT_ONCE = 4
_REFUSED = ("412", "PreconditionFailed", "409", "ConditionalRequestConflict")
_UNKNOWN = ("501", "NotImplemented", "405", "MethodNotAllowed")
_PROBE = "inputs/probe"

Result = TypeVar("Result")


class S3Bucket:
    """A backend in a bucket, under a prefix.

    Args:
        uri: `s3://bucket/prefix`, with `?addressing=path` for a server that does not know buckets as host names.
        patience_s: seconds for which a server that is away is asked again.

    Raises:
        UsageError: the URI is not of this form.
    """

    def __init__(self, uri: str, *, patience_s: float = s3_client.PATIENCE_S) -> None:
        self.bucket, self._prefix, addressing = parse_store_uri(uri)
        if self._prefix:
            require_name(self._prefix.rstrip("/"))
        self._client = s3_client.new_client(addressing)
        self._patience_s = patience_s
        self._honours_conditions: bool | None = None

    @property
    def uri(self) -> str:
        """The bucket and prefix as an s3:// URI."""
        return s3_uri(self.bucket, self._prefix).rstrip("/")

    @property
    def has_conditions(self) -> bool:
        """Whether the server honours conditions; asked once, by two puts that it has to refuse."""
        if self._honours_conditions is None:
            self.write(_PROBE, b"ptq")
            try:
                self._honours_conditions = not (
                    self._put_if(_PROBE, b"ptq", IfNoneMatch="*")
                    or self._put_if(_PROBE, b"ptq", IfMatch=f'"{"0" * 32}"')
                )
            except _UnknownRequest:
                self._honours_conditions = False
        return self._honours_conditions

    def local_path(self, name: str) -> None:
        """Returns None: bytes must be fetched."""
        require_name(name)

    def entry(self, name: str) -> Entry | None:
        """Returns what is kept under `name`; see `Backend`."""
        found = self._repeated("look up", name, lambda: s3_client.head_of(self._client, self.bucket, self._key(name)))
        return None if found is None else Entry(name, int(found["ContentLength"]), found["LastModified"].timestamp())

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yields what is kept under a prefix; see `Backend`."""
        start = f"{self._prefix}{prefix}"
        ask = partial(self._repeated, "list", prefix)
        for item in s3_client.objects_under(self._client, self.bucket, start, ask=ask):
            name = str(item["Key"]).removeprefix(self._prefix)
            yield Entry(name, int(item["Size"]), item["LastModified"].timestamp())

    def read(self, name: str) -> tuple[bytes, str]:
        """Returns bytes and tag; see `Backend`."""

        def attempt() -> tuple[bytes, str]:
            answer = s3_client.open_object(self._client, **self._where(name))
            return s3_client.body_of(answer), str(answer["ETag"])

        return self._repeated("read", name, attempt)

    def fetch(self, name: str, target: Path) -> str:
        """Streams the object to a file and digests it on the way; see `Backend`."""

        def attempt() -> str:
            return s3_client.save_body(s3_client.open_object(self._client, **self._where(name)), target)

        return self._repeated("read", name, attempt)

    def write(self, name: str, data: bytes) -> None:
        """Puts an object; see `Backend`."""
        self._put(name, data)

    def write_file(self, name: str, path: Path) -> None:
        """Puts a file, in parts above `MULTIPART_BYTES`; see `Backend`."""
        where = self._where(name)
        config = TransferConfig(
            multipart_threshold=MULTIPART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE
        )

        def attempt() -> None:
            # The client's own `upload_file` hides what went wrong in an exception without it.
            with create_transfer_manager(self._client, config) as manager:
                manager.upload(str(path), where["Bucket"], where["Key"]).result()

        self._repeated("write", name, attempt)

    def create(self, name: str, data: bytes) -> bool:
        """Puts an object on the condition that there is none; see `Backend`.

        A server that ignores the condition is asked first, which another writer may use.
        """
        if not self.has_conditions and self.entry(name) is not None:
            return False
        return self._put_if(name, data, IfNoneMatch="*")

    def replace(self, name: str, data: bytes, *, tag: str) -> bool:
        """Puts an object on the condition that its tag is still the same; see `Backend`."""
        return self._put_if(name, data, IfMatch=tag)

    def move(self, name: str, target: str) -> None:
        """Copies on the server and deletes; see `Backend`."""

        def attempt() -> None:
            with _nothing_where(*s3_client.MISSING):
                self._client.copy_object(**self._where(target), CopySource=self._where(name))

        self._repeated("move", name, attempt)
        self.delete(name)

    def delete(self, name: str) -> None:
        """Deletes an object; see `Backend`."""
        self._repeated("delete", name, lambda: self._client.delete_object(**self._where(name)))

    def unfinished(self, *, before: float, delete: bool) -> list[Entry]:
        """The uploads in parts that were neither completed nor aborted, of unknown size; see `Backend`.

        A server that cannot list them has none.
        """
        try:
            uploads = self._repeated("list uploads of", "objects/", self._uploads)
        except _UnknownRequest:
            return []
        found = [upload for upload in uploads if upload["Initiated"].timestamp() < before]
        for upload in found if delete else ():
            self._repeated("abort", "objects/", partial(self._abort, upload))
        return [
            Entry(str(upload["Key"]).removeprefix(self._prefix), 0, upload["Initiated"].timestamp()) for upload in found
        ]

    def _uploads(self) -> list[dict[str, Any]]:
        # Only objects are uploaded in parts, and others may share the bucket.
        where = {"Bucket": self.bucket, "Prefix": f"{self._prefix}objects/"}
        with _nothing_where("NoSuchUpload"):  # so rclone says that there is none
            pages = self._client.get_paginator("list_multipart_uploads").paginate(**where)
            return [upload for page in pages for upload in page.get("Uploads", ())]
        return []

    def _abort(self, upload: dict[str, Any]) -> None:
        with _nothing_where("NoSuchUpload"):  # it has ended since
            self._client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def _key(self, name: str) -> str:
        return self._prefix + require_name(name)

    def _where(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._key(name)}

    def _put(self, name: str, data: bytes, **conditions: str) -> None:
        where = self._where(name)
        self._repeated("write", name, lambda: self._client.put_object(**where, Body=data, **conditions))

    def _put_if(self, name: str, data: bytes, **conditions: str) -> bool:
        try:
            self._put(name, data, **conditions)
        except _Refused:
            # Perhaps by our own first attempt, whose answer was lost.
            with contextlib.suppress(FileNotFoundError):
                return name != _PROBE and self.read(name)[0] == data
            return False
        return True

    def _repeated(self, doing: str, name: str, attempt: Callable[[], Result]) -> Result:
        """Returns what `attempt` returns, made again as in `repeated`; botocore's exceptions become ArtifactError."""
        try:
            return s3_client.repeated(attempt, patience_s=self._patience_s)
        except s3_client.REQUEST_ERRORS as error:
            code = s3_client.code_of(error)
            kind = _Refused if code in _REFUSED else _UnknownRequest if code in _UNKNOWN else ArtifactError
            raise kind(self._explained(doing, name, error)) from error

    def _explained(self, doing: str, name: str, error: Exception) -> str:
        if isinstance(error, faults.NoCredentialsError | faults.PartialCredentialsError):
            return (
                f"There are no credentials for {self.uri}. Expected them where boto3 looks: the variables "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the machine's role."
            )
        said = without_secrets(" ".join(str(error).split())[:300])
        endpoint = without_secrets(self._client.meta.endpoint_url)
        waited = s3_client.waited_for(error, self._patience_s)
        return (
            f"Cannot {doing} {self.uri}/{name} at {endpoint}{waited}: {said}. Expected a "
            "server that answers and a bucket that may be read and written. Check AWS_ENDPOINT_URL_S3, the bucket and "
            "the permissions; a run that is started again goes on where this one stopped."
        )


class _Refused(ArtifactError):
    """A condition did not hold."""


class _UnknownRequest(ArtifactError):
    """The server does not know what it was asked for."""


@contextlib.contextmanager
def _nothing_where(*codes: str) -> Iterator[None]:
    """Lets nothing happen where the server refuses with one of these codes."""
    try:
        yield
    except faults.ClientError as error:
        if s3_client.code_of(error) not in codes:
            raise


_bucket_lock = threading.Lock()


def bucket_at(uri: str) -> S3Bucket:
    """Returns the bucket of `uri`, the same for a process and its settings: a client takes long to make.

    Raises:
        UsageError: the URI is not of this form.
    """
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    with _bucket_lock:
        return _bucket_of_process(uri, os.getpid(), hash(settings))


@lru_cache(maxsize=8)
def _bucket_of_process(uri: str, _process: int, _settings: int) -> S3Bucket:
    return S3Bucket(uri)

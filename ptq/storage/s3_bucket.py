"""How does a store keep its bytes in an S3-compatible bucket?

The only importer of boto3. The endpoint comes from `AWS_ENDPOINT_URL_S3` and the credentials from boto3's own chain,
nowhere else. A request that fails on the way is repeated by botocore within seconds; a server that is away for longer
is waited for here, and a body that ends early or is changed on the way is asked for again. Whether bytes are the right
ones is decided in `store.py`, by their SHA-256.
"""

import base64
import contextlib
import hashlib
import io
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import boto3
from botocore import exceptions as faults
from botocore.parsers import ResponseParserError

from ptq.errors import ArtifactError
from ptq.storage.backend import Entry, require_name
from ptq.storage.s3_client import (
    BROKEN_BODY,
    PATIENCE_S,
    code,
    new_client,
    repeated,
    require_length,
    slow_bodies,
    waited_for,
)
from ptq.uris import parse_store_uri, s3_uri, without_secrets

MEBIBYTE = 2**20
# Up to here one request is faster than parts, which a server has to put together.
MULTIPART_BYTES = 128 * MEBIBYTE
_PART_BYTES = 16 * MEBIBYTE
_PARTS_AT_ONCE = 4
_CHUNK_BYTES = MEBIBYTE
_MD5 = re.compile(r"^[0-9a-f]{32}$")
_MISSING = ("404", "NoSuchKey", "NotFound")
_REFUSED = ("412", "PreconditionFailed", "409", "ConditionalRequestConflict")
_UNKNOWN = ("501", "NotImplemented", "405", "MethodNotAllowed")
_PROBE = "inputs/probe"

Result = TypeVar("Result")


class S3Bucket:
    """A backend in a bucket, under a prefix.

    Args:
        uri: `s3://bucket/prefix`, with `?addressing=path` for a server that does not know buckets as host names.
        client: an S3 client of boto3's in place of a new one.
        patience_s: seconds for which a server that is away is asked again.

    Raises:
        UsageError: the URI is not of this form.
    """

    def __init__(self, uri: str, *, client: Any = None, patience_s: float = PATIENCE_S) -> None:
        self.bucket, self._prefix, addressing = parse_store_uri(uri)
        if self._prefix:
            require_name(self._prefix.rstrip("/"))
        self._client = client or new_client(addressing)
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
        where = {"Bucket": self.bucket, "Key": self._key(name)}

        def attempt() -> dict[str, Any] | None:
            try:
                return dict(self._client.head_object(**where))
            except faults.ClientError as error:
                if code(error) in _MISSING:
                    return None
                raise

        found = self._repeated("look up", name, attempt)
        return None if found is None else Entry(name, int(found["ContentLength"]), found["LastModified"].timestamp())

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yields what is kept under a prefix; see `Backend`."""
        where = {"Bucket": self.bucket, "Prefix": f"{self._prefix}{prefix}"}
        while True:
            page = self._repeated("list", prefix, lambda: self._client.list_objects_v2(**where))
            for item in page.get("Contents", []):
                name = str(item["Key"]).removeprefix(self._prefix)
                yield Entry(name, int(item["Size"]), item["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            where["ContinuationToken"] = page["NextContinuationToken"]

    def read(self, name: str) -> tuple[bytes, str]:
        """Returns bytes and tag; see `Backend`."""

        def attempt() -> tuple[bytes, str]:
            response = self._open(name)
            with slow_bodies():
                data = response["Body"].read()
            require_length(len(data), response)
            return data, str(response["ETag"])

        return self._repeated("read", name, attempt)

    def fetch(self, name: str, target: Path) -> str:
        """Streams the object to a file and digests it on the way; see `Backend`."""

        def attempt() -> str:
            response = self._open(name)
            with target.open("wb") as stream, _Digest() as digest, slow_bodies():
                for chunk in response["Body"].iter_chunks(_CHUNK_BYTES):
                    digest.update(chunk)
                    stream.write(chunk)
                require_length(stream.tell(), response)
            return digest.hexdigest

        return self._repeated("read", name, attempt)

    def write(self, name: str, data: bytes, *, sha256: str = "") -> None:
        """Puts an object; see `Backend`."""
        self._put(name, data, sha256=sha256)

    def write_file(self, name: str, path: Path, *, sha256: str) -> None:
        """Puts a file, in parts above `MULTIPART_BYTES`; see `Backend`."""
        size = path.stat().st_size
        if size <= _CHUNK_BYTES:
            self._put(name, path.read_bytes(), sha256=sha256)
            return
        if size <= MULTIPART_BYTES:
            self._repeated("write", name, lambda: self._put_file(name, path, sha256))
            return
        self._repeated("write", name, lambda: self._put_parts(name, path, size))
        kept = self.entry(name)
        if kept is None or kept.size_bytes != size:
            raise ArtifactError(
                f"{self.uri}/{name} has {kept.size_bytes if kept else 0} bytes after an upload of {size}. Expected all "
                "of them. Run again; if it comes back, the server loses parts."
            )

    def _put_file(self, name: str, path: Path, sha256: str) -> None:
        """One put, with the SHA-256 that is known already; the tag is compared as in `_put`."""
        with path.open("rb") as stream, path.open("rb") as digested, ThreadPoolExecutor(1) as threads:
            # Its own thread and its own reads: beside the transfer it costs little.
            md5 = threads.submit(hashlib.file_digest, digested, _md5)
            response = self._client.put_object(
                Bucket=self.bucket, Key=self._key(name), Body=_LargeBlocks(stream), ChecksumSHA256=_base64(sha256)
            )
        _require_arrived(response, md5.result().hexdigest())

    def _put_parts(self, name: str, path: Path, size: int) -> None:
        """One multipart upload, each part with its MD5; what was sent of it is forgotten if a part fails."""
        where = {"Bucket": self.bucket, "Key": self._key(name)}
        where["UploadId"] = self._client.create_multipart_upload(**where)["UploadId"]
        try:
            with path.open("rb") as stream, ThreadPoolExecutor(_PARTS_AT_ONCE) as threads:
                parts = list(
                    threads.map(
                        lambda number: self._put_part(where, number, stream.fileno()),
                        range(1, -(-size // _PART_BYTES) + 1),
                    )
                )
            self._client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
        except BaseException:
            with contextlib.suppress(faults.ClientError, faults.BotoCoreError, ResponseParserError):
                self._client.abort_multipart_upload(**where)
            raise

    def _put_part(self, where: dict[str, str], number: int, file: int) -> dict[str, Any]:
        data = os.pread(file, _PART_BYTES, (number - 1) * _PART_BYTES)
        md5 = _md5(data)
        response = self._client.upload_part(
            **where, PartNumber=number, Body=data, ContentMD5=base64.b64encode(md5.digest()).decode()
        )
        _require_arrived(response, md5.hexdigest())
        return {"PartNumber": number, "ETag": response["ETag"]}

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
        source = {"Bucket": self.bucket, "Key": self._key(name)}
        where = {"Bucket": self.bucket, "Key": self._key(target)}

        def attempt() -> None:
            with _nothing_where_missing():
                self._client.copy_object(**where, CopySource=source)

        self._repeated("move", name, attempt)
        self.delete(name)

    def delete(self, name: str) -> None:
        """Deletes an object; see `Backend`."""
        where = {"Bucket": self.bucket, "Key": self._key(name)}
        self._repeated("delete", name, lambda: self._client.delete_object(**where))

    def unfinished(self, *, before: float, delete: bool) -> list[Entry]:
        """The uploads in parts that were neither completed nor aborted, of unknown size; see `Backend`.

        A server that cannot list them has none.
        """
        found = [upload for upload in self._uploads() if upload["Initiated"].timestamp() < before]
        for upload in found if delete else ():
            where = {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            self._repeated("abort", "objects/", partial(self._abort, where))
        return [
            Entry(str(upload["Key"]).removeprefix(self._prefix), 0, upload["Initiated"].timestamp()) for upload in found
        ]

    def _uploads(self) -> list[dict[str, Any]]:
        # Only objects are uploaded in parts, and others may share the bucket.
        where = {"Bucket": self.bucket, "Prefix": f"{self._prefix}objects/"}
        found: list[dict[str, Any]] = []
        while True:
            try:
                page = self._repeated("list uploads of", "objects/", partial(self._uploads_page, where))
            except _UnknownRequest:
                return []
            found += page.get("Uploads", [])
            if not page.get("IsTruncated"):
                return found
            where |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _uploads_page(self, where: dict[str, str]) -> dict[str, Any]:
        try:
            return dict(self._client.list_multipart_uploads(**where))
        except faults.ClientError as error:
            if code(error) == "NoSuchUpload":  # so rclone says that there is none
                return {}
            raise

    def _abort(self, where: dict[str, str]) -> None:
        try:
            self._client.abort_multipart_upload(**where)
        except faults.ClientError as error:
            if code(error) != "NoSuchUpload":  # it has ended since
                raise

    def _key(self, name: str) -> str:
        return self._prefix + require_name(name)

    def _open(self, name: str) -> dict[str, Any]:
        try:
            return dict(self._client.get_object(Bucket=self.bucket, Key=self._key(name)))
        except faults.ClientError as error:
            if code(error) in _MISSING:
                raise FileNotFoundError(f"{self.uri}/{name}") from error
            raise

    def _put(self, name: str, data: bytes, *, sha256: str = "", **conditions: str) -> None:
        """Puts bytes with their SHA-256, and compares the tag where it is the MD5 of what arrived.

        Servers that do not know the SHA-256 know the MD5. Only small bytes, which are records and not yet verified
        by their name, are sent with both, so that no wrong record is ever there; the MD5 of a large object is
        computed while it is sent.
        """
        where = {"Bucket": self.bucket, "Key": self._key(name)}
        checksum = _base64(sha256 or hashlib.sha256(data).hexdigest())
        checked = dict(conditions)
        if len(data) <= _CHUNK_BYTES:
            checked["ContentMD5"] = _base64(_md5(data).hexdigest())

        def attempt() -> None:
            with ThreadPoolExecutor(1) as threads:
                md5 = threads.submit(_md5, data)
                response = self._client.put_object(**where, Body=data, ChecksumSHA256=checksum, **checked)
            _require_arrived(response, md5.result().hexdigest())

        self._repeated("write", name, attempt)

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
            return repeated(attempt, patience_s=self._patience_s)
        except faults.ClientError as error:
            if code(error) in _REFUSED:
                raise _Refused(name) from error
            if code(error) in _UNKNOWN:
                raise _UnknownRequest(str(self._error(doing, name, error))) from error
            raise self._error(doing, name, error) from error
        except (*BROKEN_BODY, faults.BotoCoreError, boto3.exceptions.Boto3Error) as error:
            raise self._error(doing, name, error) from error

    def _error(self, doing: str, name: str, error: Exception) -> ArtifactError:
        if isinstance(error, faults.NoCredentialsError | faults.PartialCredentialsError):
            return ArtifactError(
                f"There are no credentials for {self.uri}. Expected them where boto3 looks: the variables "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or the machine's role."
            )
        said = without_secrets(" ".join(str(error).split())[:300])
        endpoint = without_secrets(self._client.meta.endpoint_url)
        return ArtifactError(
            f"Cannot {doing} {self.uri}/{name} at {endpoint}{waited_for(error, self._patience_s)}: {said}. Expected a "
            "server that answers and a bucket that may be read and written. Check AWS_ENDPOINT_URL_S3, the bucket and "
            "the permissions; a run that is started again goes on where this one stopped."
        )


class _Refused(ArtifactError):
    """A condition did not hold."""


class _UnknownRequest(ArtifactError):
    """The server does not know what it was asked for."""


@contextlib.contextmanager
def _nothing_where_missing() -> Iterator[None]:
    """Lets nothing happen where the object is gone."""
    try:
        yield
    except faults.ClientError as error:
        if code(error) not in _MISSING:
            raise


class _LargeBlocks(io.RawIOBase):
    """A file that is read in blocks of its own size: the HTTP client asks for 16 KiB, each of which costs a send.

    What a read returns is overwritten by the next.
    """

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream.raw
        self._block = memoryview(bytearray(_CHUNK_BYTES))

    def read(self, size: int = -1, /) -> Any:
        return self._block[: self._stream.readinto(self._block)]

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


class _Digest:
    """A SHA-256 in a thread of its own, so that it costs no time beside a transfer."""

    def __init__(self) -> None:
        self.hexdigest = ""
        self._chunks: queue.Queue[bytes | None] = queue.Queue(maxsize=8)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "_Digest":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._chunks.put(None)
        self._thread.join()

    def update(self, chunk: bytes) -> None:
        self._chunks.put(chunk)

    def _run(self) -> None:
        digest = hashlib.sha256()
        while (chunk := self._chunks.get()) is not None:
            digest.update(chunk)
        self.hexdigest = digest.hexdigest()


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


def _base64(hexdigest: str) -> str:
    """A digest as S3 takes it."""
    return base64.b64encode(bytes.fromhex(hexdigest)).decode()


def _md5(data: bytes = b"") -> "hashlib._Hash":
    return hashlib.md5(data, usedforsecurity=False)


def _require_arrived(response: dict[str, Any], md5: str) -> None:
    """Raises ConnectionError where the answer's tag is an MD5, and another one than that of the bytes sent."""
    arrived = str(response.get("ETag", "")).strip('"')
    is_md5 = _MD5.match(arrived) and "aws:kms" not in str(response.get("ServerSideEncryption", ""))
    if is_md5 and arrived != md5:
        raise ConnectionError("the bytes were changed on their way to the server")

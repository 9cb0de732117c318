"""How are objects read that others keep in S3: checkpoints, images, manifests?

Reads only, and takes any key. Endpoint and credentials are those of `s3_bucket.py`, which keeps the store. An ETag
tells here whether an object was touched, never what is in it.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from botocore import exceptions as faults
from botocore.parsers import ResponseParserError

from ptq.errors import ArtifactError
from ptq.storage.s3_client import PATIENCE_S, new_client, repeated, slow_bodies, waited_for
from ptq.uris import s3_uri, split_uri

_CHUNK_BYTES = 2**20
_MISSING = ("404", "NoSuchKey", "NotFound", "NoSuchVersion")
_DENIED = ("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")
# What is no fault of botocore's own kind, where a body breaks.
_BROKEN_BODY = (ResponseParserError, ConnectionError, TimeoutError)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class RemoteObject:
    """An object as its bucket describes it; `state` is another one after every write."""

    bucket: str
    key: str
    size_bytes: int
    etag: str
    state: str
    version: str = ""

    @property
    def uri(self) -> str:
        """The object's s3:// URI."""
        return s3_uri(self.bucket, self.key)


class RemoteObjects:
    """Objects of any bucket that the credentials may read.

    Every method raises ArtifactError where the server cannot be reached or refuses.

    Args:
        patience_s: seconds for which a server that is away is asked again.
    """

    def __init__(self, *, patience_s: float = PATIENCE_S) -> None:
        self._client = new_client("auto")
        self._patience_s = patience_s

    def find(self, uri: str) -> RemoteObject | None:
        """Returns what is at `uri`, None if nothing is."""
        bucket, key = split_uri(uri)

        def attempt() -> dict[str, Any] | None:
            try:
                return dict(self._client.head_object(Bucket=bucket, Key=key))
            except faults.ClientError as error:
                if _code(error) in _MISSING:
                    return None
                raise

        found = self._repeated(uri, attempt)
        if found is None:
            return None
        version = str(found.get("VersionId") or "")
        return RemoteObject(
            bucket, key, int(found["ContentLength"]), str(found["ETag"]),
            f"{found['ETag']} {found['LastModified'].timestamp():.0f} {version}", version,
        )  # fmt: skip

    def listed(self, uri: str) -> list[RemoteObject]:
        """Returns what is under an s3:// URI, which is taken as a prefix, ordered by key."""
        bucket, prefix = split_uri(uri)
        where = {"Bucket": bucket, "Prefix": prefix}
        found: list[RemoteObject] = []
        while True:
            page = self._repeated(uri, lambda: self._client.list_objects_v2(**where))
            for item in page.get("Contents", []):
                state = f"{item['ETag']} {item['LastModified'].timestamp():.3f}"
                found.append(RemoteObject(bucket, str(item["Key"]), int(item["Size"]), str(item["ETag"]), state))
            if not page.get("IsTruncated"):
                return sorted(found, key=lambda each: each.key)
            where["ContinuationToken"] = page["NextContinuationToken"]

    def read(self, uri: str) -> bytes:
        """Returns the bytes at `uri`; FileNotFoundError if nothing is there."""
        bucket, key = split_uri(uri)

        def attempt() -> bytes:
            response = self._open(Bucket=bucket, Key=key)
            with slow_bodies():
                data = bytes(response["Body"].read())
            _require_length(len(data), response)
            return data

        return self._repeated(uri, attempt)

    def fetch(self, found: RemoteObject, target: Path) -> str:
        """Streams an object to the file `target` and returns its SHA-256; FileNotFoundError if it is gone."""
        version = {"VersionId": found.version} if found.version else {}

        def attempt() -> str:
            response = self._open(Bucket=found.bucket, Key=found.key, IfMatch=found.etag, **version)
            digest = hashlib.sha256()
            with target.open("wb") as stream, slow_bodies():
                for chunk in response["Body"].iter_chunks(_CHUNK_BYTES):
                    digest.update(chunk)
                    stream.write(chunk)
                _require_length(stream.tell(), response)
            return digest.hexdigest()

        return self._repeated(found.uri, attempt)

    def _open(self, **which: str) -> dict[str, Any]:
        try:
            return dict(self._client.get_object(**which))
        except faults.ClientError as error:
            uri = s3_uri(which["Bucket"], which["Key"])
            if _code(error) in _MISSING:
                raise FileNotFoundError(uri) from error
            if _code(error) in ("412", "PreconditionFailed"):
                raise ArtifactError(f"{uri} changed while it was read. Run again once nothing writes to it.") from error
            raise

    def _repeated(self, uri: str, attempt: Callable[[], Result]) -> Result:
        """Returns what `attempt` returns, made again as in `repeated`; botocore's exceptions become ArtifactError."""
        try:
            return repeated(attempt, patience_s=self._patience_s)
        except (*_BROKEN_BODY, faults.BotoCoreError, faults.ClientError) as error:
            raise self._error(uri, error) from error

    def _error(self, uri: str, error: Exception) -> ArtifactError:
        code = _code(error) if isinstance(error, faults.ClientError) else ""
        if code == "NoSuchBucket":
            bucket = split_uri(uri)[0]
            return ArtifactError(
                f"{uri} cannot be read: there is no bucket {bucket} at {self._client.meta.endpoint_url}. Correct the "
                "URI, or AWS_ENDPOINT_URL_S3."
            )
        if code in _DENIED or isinstance(error, faults.NoCredentialsError | faults.PartialCredentialsError):
            return ArtifactError(
                f"{uri} may not be read at {self._client.meta.endpoint_url} ({code or 'no credentials'}). Expected "
                "credentials, where boto3 looks for them, that may list the bucket and get its objects."
            )
        said = " ".join(str(error).split())[:300]
        return ArtifactError(
            f"Cannot read {uri} at {self._client.meta.endpoint_url}{waited_for(error, self._patience_s)}: {said}. "
            "Expected a server that answers. Check AWS_ENDPOINT_URL_S3 and the network; a run that is started again "
            "goes on where this one stopped."
        )


def _code(error: faults.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _require_length(found: int, response: dict[str, Any]) -> None:
    if found != int(response["ContentLength"]):
        raise ConnectionError(f"the body ended after {found} of {response['ContentLength']} bytes")

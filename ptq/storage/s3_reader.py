"""How are objects read that others keep in S3: checkpoints, images, manifests?

Reads only, and takes any key. Endpoint and credentials are those of `s3_bucket.py`, which keeps the store. An ETag
tells here whether an object was touched, never what is in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from botocore import exceptions as faults

from ptq.errors import ArtifactError
from ptq.storage import s3_client
from ptq.uris import s3_uri, split_uri

_DENIED = ("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")

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

    def __init__(self, *, patience_s: float = s3_client.PATIENCE_S) -> None:
        self._client = s3_client.new_client("auto")
        self._patience_s = patience_s

    def find(self, uri: str) -> RemoteObject | None:
        """Returns what is at `uri`, None if nothing is."""
        bucket, key = split_uri(uri)
        found = self._repeated(uri, lambda: s3_client.head_of(self._client, bucket, key))
        if found is None:
            return None
        version = str(found.get("VersionId") or "")
        return RemoteObject(
            bucket,
            key,
            int(found["ContentLength"]),
            str(found["ETag"]),
            f"{found['ETag']} {found['LastModified'].timestamp():.0f} {version}",
            version,
        )

    def listed(self, uri: str) -> list[RemoteObject]:
        """Returns what is under an s3:// URI, which is taken as a prefix, ordered by key."""
        bucket, prefix = split_uri(uri)
        found = [
            RemoteObject(
                bucket,
                str(item["Key"]),
                int(item["Size"]),
                str(item["ETag"]),
                f"{item['ETag']} {item['LastModified'].timestamp():.3f}",
            )
            for item in s3_client.objects_under(self._client, bucket, prefix, ask=partial(self._repeated, uri))
        ]
        return sorted(found, key=lambda each: each.key)

    def read(self, uri: str) -> bytes:
        """Returns the bytes at `uri`; FileNotFoundError if nothing is there."""
        bucket, key = split_uri(uri)
        return self._repeated(uri, lambda: s3_client.body_of(self._open(Bucket=bucket, Key=key)))

    def fetch(self, found: RemoteObject, target: Path) -> str:
        """Streams an object to the file `target` and returns its SHA-256; FileNotFoundError if it is gone."""
        which = {"Bucket": found.bucket, "Key": found.key, "IfMatch": found.etag}
        which |= {"VersionId": found.version} if found.version else {}
        return self._repeated(found.uri, lambda: s3_client.save_body(self._open(**which), target))

    def _open(self, **which: str) -> dict[str, Any]:
        try:
            return s3_client.open_object(self._client, **which)
        except faults.ClientError as error:
            if s3_client.code_of(error) in ("412", "PreconditionFailed"):
                uri = s3_uri(which["Bucket"], which["Key"])
                raise ArtifactError(f"{uri} changed while it was read. Run again once nothing writes to it.") from error
            raise

    def _repeated(self, uri: str, attempt: Callable[[], Result]) -> Result:
        """Returns what `attempt` returns, made again as in `repeated`; botocore's exceptions become ArtifactError."""
        try:
            return s3_client.repeated(attempt, patience_s=self._patience_s)
        except s3_client.REQUEST_ERRORS as error:
            raise self._error(uri, error) from error

    def _error(self, uri: str, error: Exception) -> ArtifactError:
        code = s3_client.code_of(error)
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
        said, waited = " ".join(str(error).split())[:300], s3_client.waited_for(error, self._patience_s)
        return ArtifactError(
            f"Cannot read {uri} at {self._client.meta.endpoint_url}{waited}: {said}. "
            "Expected a server that answers. Check AWS_ENDPOINT_URL_S3 and the network; a run that is started again "
            "goes on where this one stopped."
        )

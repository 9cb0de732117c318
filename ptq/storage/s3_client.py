"""How are requests made to an S3-compatible server that may be away, and bodies read that may break on the way?

The only importer of boto3. The endpoint comes from `AWS_ENDPOINT_URL_S3` and the credentials from boto3's own chain,
nowhere else. botocore repeats a request that fails within seconds; here a server that is away for longer is waited for,
and a body that ends early or is changed on the way is asked for again. Everything raises botocore's exceptions.
"""

import base64
import hashlib
import logging
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import boto3
import botocore.session
from botocore import exceptions as faults
from botocore.config import Config
from botocore.loaders import create_loader
from botocore.parsers import ResponseParserError

from ptq.errors import ArtifactError

# A server that starts again, or a network that does, is away for some tens of seconds. What is away for longer is
# down, and somebody should hear of it.
PATIENCE_S = 60.0
_LONGEST_WAIT_S = 5.0
# Attempts at a request in botocore. More would not help: they share a quota, which 16 requests at once use up within
# half a second, and so the long waits are made here.
_REQUEST_ATTEMPTS = 4
_BODY_ATTEMPTS = 5
_CHUNK_BYTES = 2**20
MISSING = ("404", "NoSuchKey", "NotFound", "NoSuchVersion")
# What a server says of bytes that were changed on their way to it, or of an upload that it forgot because of them.
_CHANGED = (
    "BadDigest",
    "IncompleteBody",
    "XAmzContentSHA256Mismatch",
    "InvalidPart",
    "MalformedXML",
    "NoSuchUpload",
    "RequestTimeout",
)
# What is raised where no server is there, or none that answers.
_AWAY = (
    faults.EndpointConnectionError,
    faults.ConnectTimeoutError,
    faults.ProxyConnectionError,
    faults.ConnectionClosedError,
    faults.ReadTimeoutError,
)
# What a server answers that starts or has too much to do, or a proxy whose server is away.
_AWAY_STATUS = (500, 502, 503, 504)
# What a connection that breaks within a body raises; an answer in XML that ends early cannot be parsed.
_BROKEN_BODY = (faults.IncompleteReadError, faults.ResponseStreamingError, ResponseParserError, TimeoutError)
# All that a request may raise.
REQUEST_ERRORS = (*_BROKEN_BODY, faults.BotoCoreError, faults.ClientError)

# The descriptions of S3, which take 0.2 s to read: a process has several clients, and reads them once.
_DESCRIPTIONS = create_loader()

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def new_client(addressing: str) -> Any:
    """Returns an S3 client that repeats failed requests and adapts its rate to a server that asks for it."""
    config = Config(
        retries={"mode": "adaptive", "total_max_attempts": _REQUEST_ATTEMPTS},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=16,
        # The MD5 is among the signed headers; without TLS botocore would digest the body once more.
        s3={"addressing_style": addressing, "payload_signing_enabled": False},
        # Servers that do not know the newer checksums are not bothered with them; see `_add_md5`.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    session = botocore.session.get_session()
    session.register_component("data_loader", _DESCRIPTIONS)
    try:
        client = boto3.Session(botocore_session=session).client("s3", config=config)
    except faults.BotoCoreError as error:
        raise ArtifactError(
            f"boto3 cannot make an S3 client: {error}. Expected a region and valid settings; set AWS_DEFAULT_REGION, "
            "for a server of your own to us-east-1."
        ) from error
    client.meta.events.register("before-call.s3", _add_md5)
    return client


def _add_md5(params: dict[str, Any], **_event: Any) -> None:
    """Adds the MD5 of a request's body, bytes or a file: of all checksums the one that every server compares."""
    body = params["body"]
    if body:
        data = body if isinstance(body, bytes) else body.read()
        params["headers"]["Content-MD5"] = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        if data is not body:
            body.seek(0)


def repeated(attempt: Callable[[], Result], *, patience_s: float) -> Result:
    """Returns what `attempt` returns, made again where a body broke on the way or the server was away.

    Args:
        attempt: what may be done twice. botocore has repeated its requests by the time that it raises.
        patience_s: seconds since the first attempt, after which a server that is away is not asked again.

    Raises:
        Exception: what the last attempt raised.
    """
    started = time.monotonic()
    broken = waits = 0
    while True:
        try:
            return attempt()
        except Exception as error:
            left_s = started + patience_s - time.monotonic()
            if is_away(error) and left_s > 0:
                limit_s = min(left_s, _LONGEST_WAIT_S)
                if not waits:
                    logger.warning("The S3 server is away (%s); waiting up to %.0f s.", type(error).__name__, left_s)
            elif _is_broken(error) and broken < _BODY_ATTEMPTS - 1:
                broken += 1
                limit_s = _LONGEST_WAIT_S
            else:
                raise
        waits += 1
        # Spread, so that many clients do not come back at once.
        time.sleep(min(limit_s, random.uniform(0.1, 0.3) * 2**waits))


def is_away(error: Exception) -> bool:
    """Whether an exception says that no server is there, or none that can answer at the moment."""
    if isinstance(error, faults.ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in _AWAY_STATUS
    return isinstance(error, _AWAY)


def _is_broken(error: Exception) -> bool:
    """Whether bytes were lost or changed on their way, in either direction."""
    return isinstance(error, _BROKEN_BODY) or code_of(error) in _CHANGED


def code_of(error: Exception) -> str:
    """Returns the code of a server's refusal, empty for another exception."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, faults.ClientError) else ""


def waited_for(error: Exception, patience_s: float) -> str:
    """What an error's message says of the time for which the server was waited for."""
    return f" within {patience_s:g} s" if is_away(error) else ""


def head_of(client: Any, bucket: str, key: str) -> dict[str, Any] | None:
    """Returns what the server says of an object without its bytes, None if there is none."""
    try:
        return dict(client.head_object(Bucket=bucket, Key=key))
    except faults.ClientError as error:
        if code_of(error) in MISSING:
            return None
        raise


def objects_under(client: Any, bucket: str, prefix: str, *, ask: Callable[[Any], Any]) -> Iterator[dict[str, Any]]:
    """Yields what the server says of every object whose key begins with `prefix`, in the order of the keys.

    `ask` makes the request for a page, again where it has to: boto3's paginator ends with the first that fails.
    """
    where = {"Bucket": bucket, "Prefix": prefix}
    while True:
        page = ask(lambda: client.list_objects_v2(**where))
        yield from page.get("Contents", ())
        if not page.get("IsTruncated"):
            return
        where["ContinuationToken"] = page["NextContinuationToken"]


def open_object(client: Any, **which: str) -> dict[str, Any]:
    """Returns the answer to a get, whose body is not read yet; FileNotFoundError if there is no such object."""
    try:
        return dict(client.get_object(**which))
    except faults.ClientError as error:
        if code_of(error) in MISSING:
            raise FileNotFoundError(f"s3://{which['Bucket']}/{which['Key']}") from error
        raise


def body_of(answer: dict[str, Any]) -> bytes:
    """Returns the whole body of an answer."""
    try:
        return bytes(answer["Body"].read())
    except faults.ReadTimeoutError as error:
        # A body that stops is asked for again; only a request that is not answered is waited for by the clock.
        raise TimeoutError(str(error)) from error


def save_body(answer: dict[str, Any], target: Path) -> str:
    """Writes the body of an answer to a file, and returns its SHA-256."""
    digest = hashlib.sha256()
    try:
        with target.open("wb") as stream:
            for chunk in answer["Body"].iter_chunks(_CHUNK_BYTES):
                digest.update(chunk)
                stream.write(chunk)
    except faults.ReadTimeoutError as error:
        raise TimeoutError(str(error)) from error  # as in `body_of`
    return digest.hexdigest()

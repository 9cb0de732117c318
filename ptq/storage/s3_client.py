"""How does a client talk to an S3-compatible server that may be slow, away or wrong?"""

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import boto3
from botocore import exceptions as faults
from botocore.config import Config
from botocore.parsers import ResponseParserError

from ptq.errors import ArtifactError

# Attempts at a request in botocore, whose waits share a quota of retries. Its waits after a connection that failed
# begin at 50 ms, so that ten attempts are over within 13 s: the long waits are made here.
_REQUEST_ATTEMPTS = 4
_BODY_ATTEMPTS = 5
# A server that starts again, or a network that does, is away for some tens of seconds. What is away for longer is
# down, and somebody should hear of it.
PATIENCE_S = 60.0
_LONGEST_WAIT_S = 5.0
# What a server says of bytes that were changed on their way to it, or of an upload that it forgot because of them.
_CHANGED = (
    "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "InvalidPart", "MalformedXML", "NoSuchUpload",
    "RequestTimeout",
)  # fmt: skip
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
# What a connection that breaks within a body raises.
BROKEN_BODY = (
    faults.IncompleteReadError,
    faults.ResponseStreamingError,
    # An answer in XML that ends early: botocore does not compare its length.
    ResponseParserError,
    ConnectionError,
    TimeoutError,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


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
    return isinstance(error, BROKEN_BODY) or (isinstance(error, faults.ClientError) and code(error) in _CHANGED)


def waited_for(error: Exception, patience_s: float) -> str:
    """What an error's message says of the time for which the server was waited for."""
    return f" within {patience_s:g} s" if is_away(error) else ""


@contextlib.contextmanager
def slow_bodies() -> Iterator[None]:
    """Tells a body that does not come from a request that is not answered: the latter is waited for by the clock."""
    try:
        yield
    except faults.ReadTimeoutError as error:
        raise TimeoutError(str(error)) from error


def new_client(addressing: str) -> Any:
    """Returns an S3 client that repeats failed requests and adapts its rate to a server that asks for it."""
    config = Config(
        retries={"mode": "adaptive", "total_max_attempts": _REQUEST_ATTEMPTS},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=16,
        # The body's own checksum is among the signed headers; without TLS botocore would digest the body once more.
        s3={"addressing_style": addressing, "payload_signing_enabled": False},
        # Every put carries a checksum; servers that do not know the newer ones are not bothered with them.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        return boto3.Session().client("s3", config=config)
    except faults.BotoCoreError as error:
        raise ArtifactError(
            f"boto3 cannot make an S3 client: {error}. Expected a region and valid settings; set AWS_DEFAULT_REGION, "
            "for a server of your own to us-east-1."
        ) from error


def code(error: faults.ClientError) -> str:
    """Returns S3's code of an error, empty where it has none."""
    return str(error.response.get("Error", {}).get("Code", ""))


def require_length(found: int, response: dict[str, Any]) -> None:
    """Raises ConnectionError where a body is shorter or longer than the response announced."""
    if found != int(response["ContentLength"]):
        raise ConnectionError(f"the body ended after {found} of {response['ContentLength']} bytes")

"""Which objects were created, by what a bucket says?

Reads the JSON that AWS S3, MinIO and EventBridge send. Sends and fetches nothing.
Formats: "Event message structure" and "EventBridge event message structure" in the Amazon S3 user guide.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote_plus

from ptq.errors import UsageError
from ptq.uris import s3_uri


def created_objects(body: bytes) -> tuple[str, ...]:
    """Returns the s3:// URIs of the objects that a notification says were created, each once, in its order.

    Deletions and tests of the connection give none. A version that the notification names is left out: what is read
    later is the object as it is then.

    Args:
        body: the body of the request, JSON in UTF-8.

    Raises:
        UsageError: it is no notification of a bucket.

    >>> created_objects(b'{"Records": [{"eventName": "ObjectCreated:Put", '
    ...     b'"s3": {"bucket": {"name": "models"}, "object": {"key": "in/x+ray/a%2Bb.pth"}}}]}')
    ('s3://models/in/x ray/a+b.pth',)
    """
    return tuple(dict.fromkeys(_created(_parsed(body))))


def _created(content: Any) -> Iterator[str]:
    if not isinstance(content, Mapping):
        raise _malformed(f"is a {type(content).__name__}, not an object")
    if content.get("Event") == "s3:TestEvent":
        return
    if "detail-type" in content:
        if content["detail-type"] == "Object Created":
            # Keys in EventBridge's messages are plain.
            yield _uri(content.get("detail"), decode=False)
    elif isinstance(content.get("Records"), list):
        for record in content["Records"]:
            # AWS writes ObjectCreated:Put, MinIO s3:ObjectCreated:Put.
            name = _field(record, "eventName", str)
            if name.removeprefix("s3:").startswith("ObjectCreated:"):
                yield _uri(_field(record, "s3", Mapping), decode=True)
    else:
        raise _malformed(f"has the fields {', '.join(sorted(map(str, content))[:8]) or 'none'}")


def _uri(place: Any, *, decode: bool) -> str:
    bucket = _field(_field(place, "bucket", Mapping), "name", str)
    key = _field(_field(place, "object", Mapping), "key", str)
    try:
        key = unquote_plus(key, errors="strict") if decode else key
        (bucket + key).encode()
    except UnicodeError as error:
        raise _malformed(f"names the key {key[:80]!r}, which is no UTF-8") from error
    if not bucket or not key or "/" in bucket:
        raise _malformed(f"names the bucket {bucket[:80]!r} and the key {key[:80]!r}")
    return s3_uri(bucket, key)


def _field(content: Any, name: str, kind: type) -> Any:
    value = content.get(name) if isinstance(content, Mapping) else None
    if not isinstance(value, kind):
        raise _malformed(f"has no {name} where there has to be one")
    return value


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"is no JSON: {body[:80]!r}") from error


def _malformed(found: str) -> UsageError:
    return UsageError(
        f"The notification {found}. Expected what AWS S3 or MinIO send of a bucket's events (Records), or an event of "
        'EventBridge (detail-type "Object Created"). Check what the bucket is set up to send here.'
    )

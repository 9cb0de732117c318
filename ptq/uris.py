"""What does the URI of a store, or of an object in S3, name?

The one place that knows how they are written. Nothing here asks a server or a disk.
"""

import re
from pathlib import Path
from typing import TypeGuard
from urllib.parse import parse_qs, unquote, urlparse

from ptq.errors import UsageError

_S3 = "s3"
_SCHEME = f"{_S3}://"


def is_remote(path: object) -> TypeGuard[str]:
    """Whether a path is an s3:// URI.

    >>> is_remote("s3://images/train"), is_remote("/data/train")
    (True, False)
    """
    return isinstance(path, str) and path.startswith(_SCHEME)


def s3_uri(bucket: str, key: str) -> str:
    """Returns the URI of a key, or of a prefix, in a bucket.

    >>> s3_uri("images", "x ray/train/")
    's3://images/x ray/train/'
    """
    return f"{_SCHEME}{bucket}/{key}"


def split_uri(uri: str) -> tuple[str, str]:
    """Returns bucket and key of an s3:// URI; the key as it stands, which may be empty.

    Raises:
        UsageError: the URI has no bucket, or holds credentials or options.

    >>> split_uri("s3://images/x ray/train/")
    ('images', 'x ray/train/')
    """
    bucket, _, key = uri.removeprefix(_SCHEME).partition("/")
    if not is_remote(uri) or not bucket or "@" in bucket or "?" in bucket or "?addressing=" in key:
        shown = uri if "@" not in bucket else f"s3://...@{bucket.rpartition('@')[2]}/{key}"
        raise UsageError(
            f"{shown!r} names no input in S3; expected s3://bucket/key without options. The endpoint comes from "
            "AWS_ENDPOINT_URL_S3, the credentials from boto3's own chain."
        )
    return bucket, key


def folder_of_uri(uri: str) -> Path | None:
    """Returns the folder that a store's URI names, None where its scheme is another one than file.

    Raises:
        UsageError: a file:// URI has a query or a fragment.
    """
    if "://" not in uri:
        return Path(uri).expanduser().absolute()
    parsed = urlparse(uri)
    if parsed.scheme != "file":
        return None
    if parsed.fragment or parsed.query:
        raise UsageError(
            f"output.store is {uri!r}; write # and ? in a file:// URI as %23 and %3F, or give a plain path."
        )
    return Path(unquote(parsed.netloc + parsed.path)).expanduser().absolute()


def parse_store_uri(uri: str) -> tuple[str, str, str]:
    """Returns bucket, prefix (empty, or with a slash at the end) and addressing style of a store's s3:// URI.

    Raises:
        UsageError: the URI is not of this form.

    >>> parse_store_uri("s3://models/ptq?addressing=path")
    ('models', 'ptq/', 'path')
    """
    parsed = urlparse(uri)
    options = parse_qs(parsed.query, keep_blank_values=True)
    addressing = options.pop("addressing", ["auto"])[-1]
    if parsed.scheme != _S3 or not parsed.hostname or "@" in parsed.netloc or options or parsed.fragment:
        raise UsageError(
            f"output.store is {without_secrets(uri)!r}; expected s3://bucket/prefix, with ?addressing=path for a "
            "server that does not know buckets as host names. Credentials come from boto3's own chain."
        )
    if addressing not in ("auto", "path", "virtual"):
        raise UsageError(f"addressing is {addressing!r} in {uri}; expected auto, path or virtual.")
    prefix = parsed.path.strip("/")
    return parsed.netloc, f"{prefix}/" if prefix else "", addressing


def without_secrets(uri: str) -> str:
    """Returns a URI without the name and password that may stand before its host.

    >>> without_secrets("https://user:secret@host/models")
    'https://...@host/models'
    """
    return re.sub(r"//[^/@]*@", "//...@", uri)

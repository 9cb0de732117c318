"""How is a record written down so that damage shows, and which objects does it name?"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ptq.records.base import ArtifactRef, digest


def document_of(body: Mapping[str, Any]) -> bytes:
    """Returns JSON with the digest of what it says."""
    return json.dumps({**body, "digest": digest(body)}, indent=1, sort_keys=True).encode()


def body_of(data: bytes) -> dict[str, Any] | None:
    """Returns what a document says, None where its digest is another one."""
    try:
        content = json.loads(data)
        body = {field: value for field, value in content.items() if field != "digest"}
        return body if content.get("digest") == digest(body) else None
    except (ValueError, AttributeError, RecursionError):
        return None


def artifact_refs(value: Any) -> Iterator[ArtifactRef]:
    """Yields every object reference inside the JSON form of a record."""
    if isinstance(value, Mapping):
        if set(value) == {"name", "sha256", "size_bytes"}:
            yield ArtifactRef(**value)
        else:
            for item in value.values():
                yield from artifact_refs(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from artifact_refs(item)

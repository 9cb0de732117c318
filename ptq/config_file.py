"""How does what a person wrote become a config, and what is said where it cannot?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ptq.errors import UsageError

_Config = TypeVar("_Config", bound=BaseModel)


def config_from_mapping(kind: type[_Config], content: Mapping[str, Any], *, source: str) -> _Config:
    """Returns the config of that kind.

    Args:
        kind: `PtqConfig`, or a part of it.
        content: its fields, with sections as mappings.
        source: where the content is from; the message begins with it.

    Raises:
        UsageError: a field is wrong, missing or unknown; one clause for each of the first three.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UsageError(_description(error, kind, source)) from error


def _description(error: ValidationError, kind: type[BaseModel], source: str) -> str:
    """One clause per wrong field: where, what was found, what is allowed."""
    parts = []
    for item in error.errors()[:3]:
        field = ".".join(str(step) for step in item["loc"]) or "config"
        if item["type"] == "extra_forbidden":
            parts.append(f"{field} is not a known key, expected one of {', '.join(_keys(kind, item['loc'][:-1]))}")
        elif item["type"] == "missing":
            parts.append(f"{field} is missing")
        else:
            parts.append(f"{field} is {item['input']!r}: {item['msg']}".replace("Value error, ", ""))
    more = len(error.errors()) - len(parts)
    tail = f" ({more} more)" if more > 0 else ""
    return f"{source} cannot be used: {'; '.join(parts)}{tail}. ptq/config.py lists every field with its bounds."


def _keys(kind: Any, sections: tuple[int | str, ...]) -> list[str]:
    for section in sections:
        kind = kind.model_fields[section].annotation
    return list(kind.model_fields)


def load_yaml(path: Path) -> dict:
    """Returns the mapping in a YAML file.

    Raises:
        UsageError: the file is absent, is not YAML, or holds something else than a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"Config file {path} is not UTF-8 text: {error.reason}. Give a YAML file.") from error
    except OSError as error:
        raise UsageError(f"Config file {path} cannot be read: {error.strerror}. Give an existing YAML file.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"Config file {path} is not valid YAML: {error}.") from error
    if not isinstance(content, dict):
        raise UsageError(
            f"Config file {path} holds a {type(content).__name__}; expected a mapping with the sections "
            "model, data, ..."
        )
    return content

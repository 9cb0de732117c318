"""How does text or a picture become part of a page that needs nothing else?

What the report of a run and the page of nights share: the HTML templates, tiles, and pictures as addresses. What a page
says is not known here.
"""

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Tile:
    """One headline figure."""

    label: str
    value: str
    detail: str
    alarming: bool = False


def page_of(template: str, **values: Any) -> str:
    """Returns a page by the template of this name; a value that it uses and is not given is an error."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    )
    environment.tests["sha256"] = lambda text: _SHA256.fullmatch(text) is not None
    return environment.get_template(template).render(values).strip() + "\n"


def data_uri(png: bytes) -> str:
    """Returns a picture as an address that needs no file."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"

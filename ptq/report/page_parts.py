"""How does text or a picture become part of a page that needs nothing else?

What the report and the history share: the HTML templates, pictures as addresses, and text in Markdown. What a page says
is not known here.
"""

import base64
import re
from pathlib import Path

import jinja2

_SHA256 = re.compile(r"[0-9a-f]{64}")


def page_template(name: str) -> jinja2.Template:
    """Returns a template that lies beside this file; a name that it uses and is not given is an error."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["sha256"] = lambda text: _SHA256.fullmatch(text) is not None
    return environment.from_string((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))


def data_uri(png: bytes) -> str:
    """Returns a picture as an address that needs no file."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"

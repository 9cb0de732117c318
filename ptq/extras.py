"""What has to be installed for a part of the project that not everybody needs?

The optional dependencies of `pyproject.toml` are named for what they serve. An import of one of their libraries stands
inside `extra`, so that its absence ends in an error that says what to install.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from ptq.errors import UsageError

Extra = Literal["dask", "server", "demo", "tensorrt", "timm", "hf"]


@contextmanager
def extra(name: Extra, *, needed_by: str) -> Iterator[None]:
    """Says what to install where a module that is imported inside is absent.

    Args:
        name: which of the optional dependencies brings the module.
        needed_by: what a person asked for, the subject of the message's first sentence.

    Raises:
        UsageError: a module is absent.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{needed_by} needs the module {error.name}, which is not installed. Expected the optional dependencies "
            f"`{name}`: install them with `pip install '.[{name}]'`."
        ) from error

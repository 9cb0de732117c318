"""How does a message name several things, or tell another library's error, in one line?"""

from collections.abc import Sequence


def first_names(names: Sequence[str], limit: int = 3) -> str:
    """Returns the first names and how many more there are.

    >>> first_names(["conv1", "relu", "fc"]), first_names(["conv1", "relu", "fc"], limit=1)
    ('conv1, relu, fc', 'conv1 and 2 more')
    """
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more:,} more" if more > 0 else "")


def first_line(error: Exception) -> str:
    """Returns the first sentence of an error's message, cut to its first line and without its full stop.

    An error without a message is told by its kind.

    >>> first_line(ValueError("The file is cut off. See the log.")), first_line(KeyError())
    ('The file is cut off', 'KeyError')
    """
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.split(". ")[0][:200].rstrip(".")


def engine_text(name: str, version: str, device: str, isa: str = "") -> str:
    """Returns which engine ran, and on what.

    >>> engine_text("openvino", "2026.4.1", "AMD EPYC", "avx2")
    'openvino 2026.4.1 on AMD EPYC (avx2)'
    """
    return f"{name} {version} on {device}{f' ({isa})' if isa else ''}"

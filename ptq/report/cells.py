"""How does a fact become the cell of a table?

Finished tables, which the page, Markdown and the terminal share, and how numbers are written in them.
"""

import re
from dataclasses import dataclass
from typing import get_args

from ptq.config import Precision

# In the order in which tables and pictures show them.
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_NUMBER = re.compile(r"[-+]?[\d,]+(\.\d+)?( \*| B| kB| MB)?|n/a|ref\.|")


@dataclass(frozen=True, slots=True)
class Table:
    """A table of finished text. `alarming` and `emphasized` are indices of rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    alarming: tuple[int, ...] = ()
    emphasized: tuple[int, ...] = ()

    def is_numeric(self, column: int) -> bool:
        """Returns whether every cell of the column is a number, so that it is set flush right."""
        return bool(self.rows) and all(_NUMBER.fullmatch(row[column]) for row in self.rows)


def fixed(value: float | None, digits: int, *, sign: bool = False) -> str:
    """A number with a fixed count of decimals, never "-0.00"; "n/a" for None.

    >>> fixed(-0.001, 2), fixed(0.16, 2, sign=True), fixed(None, 1)
    ('0.00', '+0.16', 'n/a')
    """
    if value is None:
        return "n/a"
    rounded = round(value, digits) + 0.0
    return f"{rounded:+,.{digits}f}" if sign and rounded else f"{rounded:,.{digits}f}"


def with_unit(value: float | None, digits: int, unit: str) -> str:
    """Returns a number with its unit, "n/a" for None."""
    return "n/a" if value is None else f"{fixed(value, digits)} {unit}"


def percent_pair(fp32: float | None, int8: float | None) -> tuple[str, str, str]:
    """Two percentages and their difference, which only exists where both do."""
    change = None if fp32 is None or int8 is None else int8 - fp32
    return fixed(fp32, 2), fixed(int8, 2), fixed(change, 2, sign=True)


def percent_change(value: float, reference: float) -> str:
    """How far `value` is above `reference`, in percent.

    >>> percent_change(3.0, 4.0), percent_change(5.0, 4.0)
    ('-25.0', '+25.0')
    """
    return fixed(100 * (value / reference - 1), 1, sign=True)


def interval_text(bounds: tuple[float, float]) -> str:
    """Both ends of an interval; a narrow one gets a second decimal.

    >>> interval_text((-0.9, 1.2)), interval_text((-0.06, 0.21))
    ('-0.9 to 1.2', '-0.06 to 0.21')
    """
    digits = 1 if bounds[1] - bounds[0] >= 1 else 2
    return f"{fixed(bounds[0], digits)} to {fixed(bounds[1], digits)}"


def probability(value: float) -> str:
    """A p-value.

    >>> probability(1.0), probability(0.0042), probability(1e-9)
    ('p = 1.00', 'p = 0.004', 'p < 0.001')
    """
    if value < 0.001:
        return "p < 0.001"
    return f"p = {value:.2f}" if value >= 0.01 else f"p = {value:.3f}"


def ratio_text(value: float) -> str:
    """Returns a ratio with two significant digits around 1 to 10."""
    return f"{value:.1f}" if value >= 2 else f"{value:.2f}"


def drop_phrase(drop_pp: float) -> str:
    """Returns a drop in percentage points as words."""
    amount = fixed(abs(drop_pp), 2)
    if amount == "0.00":
        return "the same as FP32"
    return f"{amount} pp {'below' if drop_pp > 0 else 'above'} FP32"


def signed_count(value: int) -> str:
    """Returns a count with its sign, 0 without."""
    return f"{value:+,}" if value else "0"


def size_text(size_bytes: int) -> str:
    """A size in decimal units.

    >>> size_text(512), size_text(97_800_000)
    ('512 B', '97.8 MB')
    """
    if size_bytes < 1000:
        return f"{size_bytes} B"
    return f"{size_bytes / 1000:,.1f} kB" if size_bytes < 1_000_000 else f"{size_bytes / 1_000_000:,.1f} MB"

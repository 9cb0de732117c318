"""Checks the array shapes that signatures state, in every test and doctest; a run of the program does not."""

import inspect

import jaxtyping
import numba

# The rooms whose business is arrays. Elsewhere a signature is checked by mypy alone.
CHECKED = ["ptq.numerics", "ptq.calibration", "ptq.evaluation.evaluate", "ptq.evaluation.sensitivity"]

_njit = numba.njit


def _njit_unchecked(*arguments, **options):
    """Numba compiles a function itself, not what checks its arguments around it."""
    compile_ = _njit(*arguments, **options)
    return lambda function: compile_(inspect.unwrap(function))


numba.njit = _njit_unchecked
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

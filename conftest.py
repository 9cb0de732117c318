"""Checks the array shapes that signatures state, in every test: a run of the program checks nothing."""

import inspect

import jaxtyping
import numba

# The room whose business is arrays. Elsewhere mypy alone checks signatures.
CHECKED = ["ptq.numerics"]

_njit = numba.njit


def _njit_unchecked(*arguments, **options):
    """Numba compiles a function itself, not what checks its arguments around it."""
    compile_ = _njit(*arguments, **options)
    return lambda function: compile_(inspect.unwrap(function))


numba.njit = _njit_unchecked
jaxtyping.install_import_hook(CHECKED, "shapes.checked")

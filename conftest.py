"""Checks the array shapes that signatures state, where PTQ_CHECK_SHAPES is set: `make test` sets it for `ptq.numerics`.

Not for every test: the check of each call costs time, and refuses an int for a float and protocols elsewhere.
"""

import inspect
import os

# The room whose business is arrays. Elsewhere mypy alone checks signatures.
CHECKED = ["ptq.numerics"]

if os.environ.get("PTQ_CHECK_SHAPES"):
    import jaxtyping
    import numba

    _njit = numba.njit

    def _njit_unchecked(*arguments, **options):
        """Numba compiles a function itself, not what checks its arguments around it."""
        compile_ = _njit(*arguments, **options)
        return lambda function: compile_(inspect.unwrap(function))

    numba.njit = _njit_unchecked
    jaxtyping.install_import_hook(CHECKED, "shapes.checked")

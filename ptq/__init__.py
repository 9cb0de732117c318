"""The core: how an INT8 model is computed, measured and judged. Nothing here knows about Prefect.

Shape letters used throughout: `n` images, `c` channels, `h` height, `w` width, `k` classes.
"""

from ptq import provenance  # noqa: F401 - the sources are read before any other module is imported

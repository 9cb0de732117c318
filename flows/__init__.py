"""What happens, in which order: the flows and the command line."""

from ptq import provenance  # noqa: F401 - the sources are read before any module of this package is imported

"""One stage each, as Prefect tasks: inputs in, one core call, outputs stored."""

from ptq import provenance  # noqa: F401 - the sources are read before any module of this package is imported

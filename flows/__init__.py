"""What happens, in which order: the flows and the command line."""

import tasks  # noqa: F401 - the sources are read before any module of this package is imported

"""Which failures can a caller tell apart?

One base class and as many children as somebody would treat differently. None has a constructor of its
own: an exception whose constructor takes other arguments than one message does not survive pickling
between processes.
"""


class PtqError(Exception):
    """A failure whose message says what was found, what was expected and what to do."""


class UsageError(PtqError):
    """The configuration or the command line asks for something that does not exist (exit code 2)."""


class ManifestError(PtqError):
    """The images or their labels cannot be used as given."""


class CheckpointError(PtqError):
    """The checkpoint cannot be read or does not fit the model."""


class CalibrationError(PtqError):
    """Activation statistics cannot be collected, or no amax can be chosen from them."""


class ExportError(PtqError):
    """The model cannot be traced, quantized or written as ONNX."""


class EngineBuildError(PtqError):
    """An inference engine is absent, or refuses the graph."""


class ArtifactError(PtqError):
    """An object of the store is missing, damaged or cannot be written."""

"""What may a stage see of the run that it belongs to?

A run has one context; a stage names what it uses of it and is handed a view with nothing else, so that a setting which
a stage reads is always part of its key.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import reduce
from typing import Any

from ptq.config import Decoding, Dialect, Normalization, Precision, PtqConfig, StoppingRule
from ptq.engines.isa import adds_in_16_bits
from ptq.numerics.saturation import Runtime, runtimes_of
from ptq.records.graph import EngineIdentity
from ptq.storage.store import Store, open_store

# Where artifacts lie and what the run is called: seen by every stage, and no input of any.
_ALWAYS = frozenset({"store", "store_uri", "run_id"})


@dataclass(frozen=True, slots=True)
class StageContext:
    """Where a run keeps its artifacts: all that a stage sees which takes its settings as arguments."""

    store_uri: str
    run_id: str

    @property
    def store(self) -> Store:
        """The store of the run."""
        return open_store(self.store_uri)


@dataclass(frozen=True, slots=True)
class RunContext(StageContext):
    """Settings and engine of a run of `quantize_model`.

    Args:
        config: of the run.
        identity: the engine that this machine has, under the name that `auto` stands for.
        precisions: what the engine really runs on this machine.
        selection_split: the split on which the best candidate is chosen: the test split where the data has no other.
    """

    config: PtqConfig
    identity: EngineIdentity
    precisions: tuple[Precision, ...]
    selection_split: str = ""

    @property
    def dialects(self) -> tuple[Dialect, ...]:
        """The dialects to write, the evaluated one first."""
        return self.config.quantization.dialects_for(self.identity.name)

    @property
    def dialect(self) -> Dialect:
        """The dialect of the graphs that are evaluated."""
        return self.dialects[0]

    @property
    def whole_operators(self) -> bool:
        """Whether the plan has the quantizers that the operators of ONNX Runtime need besides."""
        return "onnxruntime" in self.dialects

    @property
    def limits_pair_sums(self) -> bool:
        """Whether weights keep sums of two products within 16 bits, as processors without VNNI need it."""
        if self.identity.name == "tensorrt":
            return False
        return self.config.engine.isa == "portable" or adds_in_16_bits(self.identity.isa)

    @property
    def cpu_runtimes(self) -> tuple[Runtime, ...]:
        """The runtimes for whose kernels weights keep within 16 bits: the engine's own, and those of the dialects."""
        own: Runtime = "onnxruntime" if self.identity.name == "onnxruntime" else "openvino"
        return tuple(dict.fromkeys((own, *runtimes_of(self.dialects))))

    @property
    def evaluates_isas(self) -> bool:
        """Whether the model is evaluated under instruction sets of its own, which OpenVINO alone has."""
        return self.identity.name == "openvino" and bool(self.config.gate.isas)

    @property
    def normalization(self) -> Normalization:
        """What makes the network's input of pixels."""
        return self.config.data.preprocessing.normalization

    @property
    def decoding(self) -> Decoding:
        """What makes pixels of a file."""
        return self.config.data.preprocessing.decoding

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one image."""
        preprocessing = self.config.data.preprocessing
        return preprocessing.channels, preprocessing.crop, preprocessing.crop

    @property
    def evaluated_splits(self) -> tuple[str, ...]:
        """The splits on which candidates are evaluated, each once."""
        return tuple(dict.fromkeys((self.selection_split, self.config.data.test_split)))

    @property
    def stopping_rule(self) -> StoppingRule | None:
        """When a draw has enough images; None where all of them are used."""
        return self.config.calibration.stopping_rule(self.dialect)

    @property
    def device(self) -> str:
        """The torch device that observes activations; empty for OpenVINO on the CPU."""
        return "cuda" if self.identity.name == "tensorrt" else ""

    @property
    def threads(self) -> int:
        """CPU threads; 0 for all cores."""
        return self.config.engine.threads


def value_of(run: StageContext, path: str) -> Any:
    """Returns what a dotted path names, such as `config.calibration.bins`."""
    return reduce(getattr, path.split("."), run)


class ContextView:
    """A run as one stage sees it: what the stage declares, and nothing else.

    >>> ContextView(StageContext("store", "run-1"), {"run_id"}, stage="decide").run_id
    'run-1'
    """

    __slots__ = ("_declared", "_path", "_stage", "_value")

    def __init__(self, value: Any, declared: Collection[str], *, stage: str, path: str = "") -> None:
        self._value, self._declared, self._stage, self._path = value, declared, stage, path

    def __getattr__(self, name: str) -> Any:
        path = f"{self._path}{name}"
        if path in self._declared or (not self._path and name in _ALWAYS):
            return getattr(self._value, name)
        if any(each.startswith(f"{path}.") for each in self._declared):
            return ContextView(getattr(self._value, name), self._declared, stage=self._stage, path=f"{path}.")
        raise AttributeError(
            f"Stage {self._stage} reads {path} of its run, which is not part of its key. It declares "
            f"{', '.join(sorted(self._declared)) or 'nothing'}; add {path} to uses=(...) of its @stage."
        )

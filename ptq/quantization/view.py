"""What do the rules of placement and equalization see of a network?

Operations and the tensors between them, in the words of the rules, whether the network is a `torch.fx` graph
(`torch_view`) or an ONNX graph (`onnx_view`). Parameters and sizes are no tensors here. A view decides nothing, and
whoever made it carries out what was decided.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

# What placement makes of an operation. A cut leaves pixels or channels out, or puts zeros around them.
Kind = Literal[
    "convolution",
    "linear",
    "quantized_pool",
    "max_pool",
    "add",
    "multiply",
    "concat",
    "permutation",
    "reshape",
    "cut",
    "other",
]


@dataclass(frozen=True, slots=True)
class Passage:
    """What becomes of a factor per channel where it meets an operation.

    Behind "kept" and "clipped" the channels are those of the input, behind "padded" with `padding` channels of zeros
    before and behind them, behind "repeated" each becomes a run of them. Behind "added" and "joined" they are those of
    several inputs, one by one or side by side. A "weighted" layer takes the factor up, and no factor may meet "mixed".
    `limit` is the number at which "clipped" channels are clipped, in activation units.
    """

    how: Literal["kept", "clipped", "padded", "repeated", "added", "joined", "weighted", "mixed"]
    limit: float = float("inf")
    padding: tuple[int, int] = (0, 0)


MIXED = Passage("mixed")


@dataclass(eq=False, slots=True)
class Tensor:
    """What an operation writes. `never_negative` is proved from the operations before it; `shape` may be unknown."""

    name: str
    never_negative: bool = False
    shape: tuple[int | None, ...] | None = None
    producer: "Operation | None" = None
    readers: "list[Operation]" = field(default_factory=list)
    is_output: bool = False

    @property
    def is_private(self) -> bool:
        """Whether one operation alone reads the tensor, and it is no output of the network."""
        return len(self.readers) == 1 and not self.is_output

    @property
    def channels(self) -> int | None:
        """How many channels the tensor has, None where it is no image, no vector, or of unknown shape."""
        return self.shape[1] if self.shape is not None and len(self.shape) in (2, 4) else None


@dataclass(eq=False, slots=True)
class Operation:
    """One step of the network.

    Attributes:
        name: what a plan calls it where it reads a quantized tensor.
        kind: what it is to placement.
        inputs: the tensors it reads that depend on the image.
        outputs: what it writes; the first is its result.
        layer: the layer whose weights it uses, empty for none.
        channels: what becomes of a factor per channel of its inputs.
    """

    name: str
    kind: Kind
    inputs: list[Tensor]
    outputs: list[Tensor]
    layer: str = ""
    channels: Passage = MIXED


@dataclass(frozen=True, slots=True)
class WeightedLayer:
    """A layer with weights that can be quantized.

    `axis` is the output-channel axis of the weight. Where `scalable`, factors of its `inputs` channels and of its
    output channels can go into its weights, group by group.
    """

    axis: int
    inputs: int = 0
    groups: int = 1
    scalable: bool = False


@dataclass
class GraphView:
    """A network as operations in the order in which they run.

    Attributes:
        layers: the layers that can be quantized, by name, in the order of the network.
        float_layers: layers that no quantizer can reach.
        warnings: what a person should know of these.
        is_traced: whether the operations are known; if not, there are layers alone.
        shares_dense_blocks: whether all that a dense block concatenates may share one quantizer.
    """

    layers: Mapping[str, WeightedLayer]
    float_layers: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    is_traced: bool = True
    shares_dense_blocks: bool = True
    operations: list[Operation] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(self, operation: Operation) -> None:
        """Appends an operation whose inputs were written by those before it."""
        self.operations.append(operation)
        for tensor in operation.inputs:
            tensor.readers.append(operation)
        for tensor in operation.outputs:
            tensor.producer = operation
            self.tensors[tensor.name] = tensor

    def of_kind(self, *kinds: Kind) -> Iterator[Operation]:
        """Yields the operations of these kinds, in order."""
        return (operation for operation in self.operations if operation.kind in kinds)


def reach(tensor: Tensor) -> set[Tensor]:
    """Returns the tensor and every tensor that it is computed from."""
    found, pending = {tensor}, [tensor]
    while pending:
        producer = pending.pop().producer
        for source in producer.inputs if producer is not None else ():
            if source not in found:
                found.add(source)
                pending.append(source)
    return found

"""How are activations read while OpenVINO runs a graph?"""

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptq.engines.base import ActivationReader, Float32Array, Observe
from ptq.engines.openvino import DEVICE, cause, openvino
from ptq.errors import EngineBuildError

opset = openvino.opset13


# Tensors handed over in one call, in bytes: few calls, and yet the tensors are in the cache.
_HANDED_OVER_BYTES = 2**21


def open_activation_readers(observed: Path, *, workers: int) -> list[ActivationReader]:
    """Returns one reader of activations per worker; together they use one thread each.

    The tensors are handed over while the graph runs, from where its layers wrote them. As outputs, all of them would
    be kept to the end, copied, and brought from OpenVINO's layout of channels behind pixels to that of the file.

    Args:
        observed: FP32 graph of batch 1 whose outputs are the logits and the observed tensors.
        workers: number of readers that will be called at the same time, at least 1.

    Raises:
        EngineBuildError: OpenVINO refuses the graph.
    """
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": workers, "NUM_STREAMS": workers}
    try:
        model = core.read_model(observed)
        readers = [_ActivationReader(number) for number in range(workers)]
        nodes = _observe_outputs_(model, readers)
        compiled = core.compile_model(model, DEVICE, settings)
    except RuntimeError as error:
        raise EngineBuildError(
            f"OpenVINO cannot build the calibration graph {observed.name}: {cause(error)}. Expected an FP32 graph; "
            "check it with `ptq validate`."
        ) from error
    requests = _Requests([compiled.create_infer_request() for _ in readers])
    weakref.finalize(requests, _cut_off_, nodes).atexit = False
    for reader in readers:
        reader.open_(requests)
    return list(readers)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class _Requests:
    """The requests of one compiled graph, one per reader; they go with the last reader."""

    by_number: list[openvino.InferRequest]


class _ActivationReader:
    """Runs one image at a time; the graph calls it back with tensors."""

    def __init__(self, number: int) -> None:
        self._number = np.array([number], dtype=np.int32)
        self._observe: Observe | None = None
        self._error: BaseException | None = None

    def open_(self, requests: _Requests) -> None:
        """Gives the reader its own request, which tells the graph by a number who asked."""
        self._requests = requests
        self._request = requests.by_number[int(self._number[0])]
        self._request.set_input_tensor(1, openvino.Tensor(self._number, shared_memory=True))

    def __call__(self, image: Float32Array) -> list[Float32Array]:
        """Returns copies of the observed tensors; see `StreamingReader`."""
        found: dict[int, Float32Array] = {}
        self.stream(image, lambda index, tensor: found.update({index: tensor.copy()}))
        return [found[index] for index in range(len(found))]

    def stream(self, image: Float32Array, observe: Observe) -> None:
        """Hands the observed tensors to `observe`; see `StreamingReader`."""
        self._observe, self._error = observe, None
        self._request.set_input_tensor(0, openvino.Tensor(image, shared_memory=True))
        self._request.infer()
        self._observe = None
        if self._error is not None:
            raise self._error

    def take(self, index: int, tensor: Float32Array) -> None:
        """Hands a tensor over. An error waits for the end of the run: OpenVINO would turn it into its own."""
        if self._error is None and self._observe is not None:
            try:
                self._observe(index, tensor)
            except BaseException as error:
                self._error = error


class _Observation(openvino.Op):
    """A node that hands its inputs to the reader whose number is its last input; its output means nothing.

    OpenVINO never frees a node written in Python: node and object own each other. So that neither the readers nor the
    weights above the node stay with it, it does not own the readers, and `_cut_off_` takes its inputs away.
    """

    def __init__(
        self,
        inputs: Sequence[Any],
        readers: Sequence["weakref.ref[_ActivationReader]"],
        tensors: Sequence[tuple[int, bool]],
        nodes: list[openvino.Op],
    ) -> None:
        super().__init__(self)
        self._readers = readers
        self._tensors = tensors
        self.set_arguments(inputs)
        self.constructor_validate_and_infer_types()
        self._nodes = nodes
        nodes.append(self)

    def validate_and_infer_types(self) -> None:
        self.set_output_type(0, openvino.Type.i32, openvino.PartialShape([1]))

    def clone_with_new_inputs(self, new_inputs: Sequence[Any]) -> "_Observation":
        return _Observation(new_inputs, self._readers, self._tensors, self._nodes)

    def has_evaluate(self) -> bool:
        return True

    def evaluate(self, outputs: Sequence[openvino.Tensor], inputs: Sequence[openvino.Tensor]) -> bool:
        reader = self._readers[int(inputs[-1].data[0])]()
        assert reader is not None, "a reader lives while its request runs"
        for (index, is_channels_last), tensor in zip(self._tensors, inputs, strict=False):
            values = tensor.data
            reader.take(index, values.transpose(0, 3, 1, 2) if is_channels_last else values)
        return True


def _observe_outputs_(model: openvino.Model, readers: Sequence[_ActivationReader]) -> list[openvino.Op]:
    """Replaces the outputs behind the logits by nodes that hand their tensors to the readers.

    Returns the nodes; the copies that OpenVINO makes of them are added to the list.
    """
    nodes: list[openvino.Op] = []
    references = [weakref.ref(reader) for reader in readers]
    number = opset.parameter([1], openvino.Type.i32, name="reader")
    model.add_parameters([number])
    results = [output.get_node() for output in model.outputs[1:]]
    inputs: list[Any] = []
    tensors: list[tuple[int, bool]] = []
    size_bytes = 0
    for index, result in enumerate(results):
        tensor = result.input_value(0)
        is_image_like = len(tensor.get_shape()) == 4
        if is_image_like:
            # Convolutions write channels behind pixels, so that this transposition moves nothing.
            tensor = opset.transpose(tensor, np.array([0, 2, 3, 1], dtype=np.int64)).output(0)
        inputs.append(tensor)
        tensors.append((index, is_image_like))
        size_bytes += 4 * math.prod(tensor.get_shape())
        if size_bytes >= _HANDED_OVER_BYTES or index == len(results) - 1:
            node = _Observation([*inputs, number.output(0)], references, tensors, nodes)
            model.add_results([opset.result(node.output(0))])
            inputs, tensors, size_bytes = [], [], 0
    for result in results:
        model.remove_result(result)
    model.validate_nodes_and_infer_types()
    return nodes


def _cut_off_(nodes: Sequence[openvino.Op]) -> None:
    """Takes the graph above the nodes away from them, once nothing runs them any more."""
    for node in nodes:
        for value in node.inputs():
            value.replace_source_output(opset.parameter([1], openvino.Type.f32).output(0))

"""How does a placement plan become a fake-quantized PyTorch model?

Carries a plan out with pytorch-quantization 2.1.3: its quantized modules hold the weight quantizers, one
`TensorQuantizer` per tensor holds an activation's. The library's own calibrators are not used: its MSE needs
CUDA, its entropy minutes, and its histograms depend on the order of the images. The only importer of
pytorch_quantization.
"""

import copy
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import fx, nn

from ptq.config import Dialect, WeightMethod
from ptq.dialect import is_unsigned
from ptq.errors import CalibrationError
from ptq.numerics.amax import amax_from_weight
from ptq.records.plan import PlacementPlan, QuantizerSpec

# The import hands the root logger over to absl: its handler comes, those that write to the console go.
_root_handlers = list(logging.getLogger().handlers)
with warnings.catch_warnings():
    # The library was written for an older Python and an older torch: invalid escapes and renamed functions.
    warnings.simplefilter("ignore")
    from absl import logging as absl_logging
    from pytorch_quantization import nn as quant_nn
    from pytorch_quantization.nn.modules.tensor_quantizer import TensorQuantizer
    from pytorch_quantization.tensor_quant import QuantDescriptor

logging.getLogger().handlers[:] = _root_handlers

# It warns for every quantizer on every export; what matters is checked and logged by the callers.
absl_logging.set_verbosity(absl_logging.ERROR)

_QUANTIZED = {
    nn.Conv2d: quant_nn.QuantConv2d,
    nn.ConvTranspose2d: quant_nn.QuantConvTranspose2d,
    nn.Linear: quant_nn.QuantLinear,
}
QUANTIZER_PREFIX = "activation_quantizer"


def quantizer_module_name(spec_index: int, tensor_index: int) -> str:
    """Returns the module name of an activation quantizer; the exported node carries it."""
    return f"{QUANTIZER_PREFIX}_{spec_index}_{tensor_index}"


def weight_amax(module: nn.Module, plan: PlacementPlan, *, method: WeightMethod = "max") -> dict[str, torch.Tensor]:
    """Returns the amax per output channel of every quantized layer, as float32 (channels,), by quantizer name.

    See `amax.amax_from_weight` for the methods.
    """
    table = {}
    for spec in plan.weights:
        weight = module.get_submodule(spec.readers[0]).weight
        assert isinstance(weight, torch.Tensor)
        channels = weight.detach().transpose(0, spec.axis or 0).flatten(1)
        table[spec.name] = torch.from_numpy(amax_from_weight(channels.float().numpy(), method=method))
    return table


def fake_quant_from_folded(
    folded: nn.Module,
    plan: PlacementPlan,
    *,
    dialect: Dialect,
    activation_amax: Mapping[str, float],
    weight_amax: Mapping[str, torch.Tensor],
) -> nn.Module:
    """Returns a fake-quantized copy of a folded model, with every amax set.

    Args:
        folded: the model of `folding.fold_model`; it is not changed.
        plan: its placement plan.
        dialect: `tensorrt` for int8 throughout, `cpu` for uint8 where a tensor is never negative.
        activation_amax: amax by activation quantizer name, in activation units, positive.
        weight_amax: amax by weight quantizer name, float32 (channels,).

    Raises:
        CalibrationError: a quantizer has no amax, or one that is not finite and positive.
    """
    _check_amax(plan, activation_amax)
    model = copy.deepcopy(folded)
    replace_modules_(model, plan, weight_amax)
    for index, spec in enumerate(plan.activations):
        amax = torch.tensor(float(activation_amax[spec.name]), dtype=torch.float32)
        if plan.traced:
            assert isinstance(model, fx.GraphModule)
            _insert_activation_quantizer_(model, spec, index, amax, dialect)
        else:
            layer = model.get_submodule(spec.name)
            layer._input_quantizer = _tensor_quantizer(amax, axis=None, unsigned=is_unsigned(spec, dialect))
    if isinstance(model, fx.GraphModule):
        model.graph.lint()
        model.recompile()
    return model.eval()


def replace_modules_(model: nn.Module, plan: PlacementPlan, weight_amax: Mapping[str, torch.Tensor]) -> None:
    """Replaces every layer of the plan by pytorch-quantization's, with the amax of its weights set."""
    for spec in plan.weights:
        _replace_layer_(model, spec, weight_amax[spec.name], traced=plan.traced)


def _check_amax(plan: PlacementPlan, activation_amax: Mapping[str, float]) -> None:
    for spec in plan.activations:
        amax = activation_amax.get(spec.name)
        if amax is None or not 0 < amax < float("inf"):
            raise CalibrationError(
                f"Quantizer {spec.name} has amax {amax}; expected a finite positive number. Calibrate the model first: "
                "the amax table must name every activation quantizer of the plan."
            )


def _tensor_quantizer(amax: torch.Tensor, *, axis: int | None, unsigned: bool) -> TensorQuantizer:
    quantizer = TensorQuantizer(QuantDescriptor(num_bits=8, axis=axis, unsigned=unsigned, narrow_range=False))
    quantizer.register_buffer("_amax", amax)
    return quantizer


def _replace_layer_(model: nn.Module, spec: QuantizerSpec, amax: torch.Tensor, *, traced: bool) -> None:
    name = spec.readers[0]
    layer = model.get_submodule(name)
    axis = weight_axis(layer)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    # The subclass adds two quantizers to the layer and changes nothing else of its state, so the layer itself is
    # turned into one, as the library's own monkey-patching would have built it.
    quantized = copy.copy(layer)
    quantized.__class__ = _QUANTIZED[type(layer)]
    quantized._modules = dict(layer._modules)
    quantized._weight_quantizer = _tensor_quantizer(amax.reshape(shape), axis=axis, unsigned=False)
    quantized._input_quantizer = TensorQuantizer(QuantDescriptor(num_bits=8))
    if traced:
        quantized._input_quantizer.disable()  # its input is quantized once, at the tensor, for all readers
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, quantized)


def _insert_activation_quantizer_(
    model: fx.GraphModule, spec: QuantizerSpec, index: int, amax: torch.Tensor, dialect: Dialect
) -> None:
    nodes = {node.name: node for node in model.graph.nodes}
    readers = [nodes[name] for name in spec.readers]
    for position, tensor_name in enumerate(spec.tensors):
        tensor = nodes[tensor_name]
        name = quantizer_module_name(index, position)
        model.add_submodule(name, _tensor_quantizer(amax.clone(), axis=None, unsigned=is_unsigned(spec, dialect)))
        with model.graph.inserting_after(tensor):
            quantized = model.graph.call_module(name, (tensor,))
        for reader in readers:
            reader.replace_input_with(tensor, quantized)


@contextmanager
def exportable_fake_quant() -> Iterator[None]:
    """Makes quantizers use torch's own fake quantization, which the ONNX exporter writes as Q/DQ pairs."""
    before = TensorQuantizer.use_fb_fake_quant
    TensorQuantizer.use_fb_fake_quant = True
    try:
        yield
    finally:
        TensorQuantizer.use_fb_fake_quant = before


def enabled_quantizers(model: nn.Module) -> list[str]:
    """Returns the names of the quantizers of a fake-quantized model that are not disabled."""
    return [
        name for name, module in model.named_modules() if isinstance(module, TensorQuantizer) and not module._disabled
    ]


def _quantizer_modules(model: nn.Module, plan: PlacementPlan) -> dict[str, list[TensorQuantizer]]:
    """The modules of every quantizer of the plan, by its name."""
    found = {spec.name: [model.get_submodule(spec.readers[0])._weight_quantizer] for spec in plan.weights}
    for index, spec in enumerate(plan.activations):
        if plan.traced:
            names = [quantizer_module_name(index, position) for position in range(len(spec.tensors))]
            found[spec.name] = [model.get_submodule(name) for name in names]
        else:
            found[spec.name] = [model.get_submodule(spec.name)._input_quantizer]
    return found


def activate_(model: nn.Module, plan: PlacementPlan, names: Collection[str]) -> None:
    """Turns on the quantizers of a fake-quantized model that are named, and off all others."""
    for name, modules in _quantizer_modules(model, plan).items():
        for module in modules:
            module._disabled = name not in names


def set_activation_amax_(model: nn.Module, plan: PlacementPlan, activation_amax: Mapping[str, float]) -> None:
    """Gives the activation quantizers of a fake-quantized model other amax.

    Raises:
        CalibrationError: a quantizer has no amax, or one that is not finite and positive.
    """
    _check_amax(plan, activation_amax)
    modules = _quantizer_modules(model, plan)
    for spec in plan.activations:
        for module in modules[spec.name]:
            module._amax.fill_(activation_amax[spec.name])


def weight_axis(layer: nn.Module) -> int:
    """Returns the output-channel axis of a layer's weight: 1 for ConvTranspose, 0 for Conv and Linear."""
    return 1 if isinstance(layer, nn.ConvTranspose2d) else 0

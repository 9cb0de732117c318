import hashlib

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import Untraceable, small_resnet
from onnx import numpy_helper

from ptq.dialect import amax_bound, observed_names
from ptq.errors import ExportError
from ptq.graph.candidate import write_candidate
from ptq.graph.names import observed_output
from ptq.graph.summary import summarize_onnx
from ptq.networks.export import HalfPrecision, export_onnx, export_qdq_template
from ptq.networks.fake_quant import (
    enabled_quantizers,
    exportable_fake_quant,
    fake_quant_from_folded,
    quantizer_module_name,
    weight_amax,
)
from ptq.networks.folding import fold_model
from ptq.networks.observed import observed_from_folded
from ptq.quantization.rules import place_quantizers
from ptq.quantization.torch_view import view_of

SHAPE = (3, 16, 16)
IMAGES = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Prepared:
    """A folded model with a plan and amax by maximum, and its template on disk."""

    def __init__(self, model, directory):
        self.folded = fold_model(model)
        self.plan = place_quantizers(
            view_of(self.folded.module, traced=self.folded.traced), residuals=True, pools=True, commuting_pools=True,
            first_layer=True, last_layer=True, skip_layers=(),
        )  # fmt: skip
        with torch.inference_mode():
            outputs = observed_from_folded(self.folded.module, self.plan)(IMAGES)
        self.amax = {
            name: float(value.abs().max()) for name, value in zip(observed_names(self.plan), outputs[1:], strict=True)
        }
        self.template = directory / "template.onnx"
        ones = dict.fromkeys(self.amax, 1.0)
        export_qdq_template(self.fake_quant("tensorrt", ones), self.template, plan=self.plan, input_shape=SHAPE)

    def fake_quant(self, dialect, amax=None):
        return fake_quant_from_folded(
            self.folded.module, self.plan, dialect=dialect, activation_amax=amax or self.amax,
            weight_amax=weight_amax(self.folded.module, self.plan),
        )  # fmt: skip

    def candidate(self, dialect, path, **metadata):
        write_candidate(
            self.template, path, plan=self.plan, dialect=dialect, activation_amax=self.amax, metadata=metadata
        )
        return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return Prepared(small_resnet(), tmp_path_factory.mktemp("resnet"))


def run_onnx(path, images=IMAGES, names=None):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(names, {"images": images.numpy()})


def initializers(path):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("dialect", ["cpu", "tensorrt"])
def test_a_candidate_gives_the_logits_of_the_fake_quantized_model(prepared, tmp_path, dialect):
    (found,) = run_onnx(prepared.candidate(dialect, tmp_path / "a.onnx"))
    with torch.inference_mode(), exportable_fake_quant():
        expected = prepared.fake_quant(dialect)(IMAGES).numpy()
    cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    # Summation order moves single values across a rounding edge; see DESIGN section 6.
    assert cosine.min() > 0.999


def test_the_cpu_dialect_uses_uint8_only_where_a_tensor_is_never_negative(prepared, tmp_path):
    values = initializers(prepared.candidate("cpu", tmp_path / "a.onnx"))
    for spec in prepared.plan.activations:
        kind, bound = (np.uint8, 255) if spec.never_negative else (np.int8, 127)
        assert values[f"{spec.name}.zero_point"].dtype == kind
        assert values[f"{spec.name}.scale"] == np.float32(prepared.amax[spec.name] / bound)
    assert {spec.never_negative for spec in prepared.plan.activations} == {True, False}


def test_the_tensorrt_dialect_uses_int8_throughout(prepared, tmp_path):
    values = initializers(prepared.candidate("tensorrt", tmp_path / "a.onnx"))
    kinds = {value.dtype for name, value in values.items() if name.endswith("zero_point")}
    assert kinds == {np.dtype(np.int8)}


def test_weights_stay_float_behind_a_per_channel_scale(prepared, tmp_path):
    values = initializers(prepared.candidate("tensorrt", tmp_path / "a.onnx"))
    for spec in prepared.plan.weights:
        weight = values[spec.name]
        assert weight.dtype == np.float32
        expected = np.abs(weight).reshape(len(weight), -1).max(1) / np.float32(127)
        assert values[f"{spec.name}.scale"].tolist() == expected.astype(np.float32).tolist()


def test_same_arguments_give_the_same_bytes(prepared, tmp_path):
    digests = set()
    for name in ("a.onnx", "b.onnx"):
        path = prepared.candidate("cpu", tmp_path / name, method="max")
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_metadata_is_written_with_a_prefix(prepared, tmp_path):
    summary = summarize_onnx(prepared.candidate("cpu", tmp_path / "a.onnx", method="mse", trial="3"))
    assert summary.metadata == {"ptq.method": "mse", "ptq.trial": "3", "ptq.dialect": "cpu"}
    assert summary.input_shape == (None, *SHAPE)
    assert summary.quantize_nodes == len(prepared.plan.quantizers)


def test_the_graph_keeps_no_constants_behind_casts(prepared):
    kinds = {node.op_type for node in onnx.load(prepared.template).graph.node}
    assert kinds == {"QuantizeLinear", "DequantizeLinear", "Conv", "Relu", "MaxPool", "Add", "GlobalAveragePool",
                     "Flatten", "Gemm"}  # fmt: skip


def test_observed_tensors_are_outputs_beside_the_logits(prepared, tmp_path):
    names = observed_names(prepared.plan)
    model = observed_from_folded(prepared.folded.module, prepared.plan)
    export_onnx(model, tmp_path / "o.onnx", input_shape=SHAPE, batch_size=1, observed=names)
    found = run_onnx(tmp_path / "o.onnx", IMAGES[:1], [observed_output(name) for name in names])
    with torch.inference_mode():
        expected = model(IMAGES[:1])[1:]
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(left, right.numpy(), rtol=1e-4, atol=1e-5)


def test_a_static_batch_is_written_when_asked(prepared, tmp_path):
    export_onnx(prepared.folded.module, tmp_path / "f.onnx", input_shape=SHAPE, batch_size=4)
    assert summarize_onnx(tmp_path / "f.onnx").input_shape == (4, *SHAPE)


def test_half_precision_keeps_float_input_and_output(prepared, tmp_path):
    model = HalfPrecision(fold_model(small_resnet()).module)
    export_onnx(model, tmp_path / "h.onnx", input_shape=SHAPE)
    (found,) = run_onnx(tmp_path / "h.onnx")
    with torch.inference_mode():
        expected = prepared.folded.module(IMAGES).numpy()
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_an_untraceable_model_is_quantized_layer_by_layer(tmp_path):
    prepared = Prepared(Untraceable(), tmp_path)
    assert sorted(enabled_quantizers(prepared.fake_quant("cpu"))) == [
        "conv._input_quantizer", "conv._weight_quantizer", "fc._input_quantizer", "fc._weight_quantizer",
    ]  # fmt: skip
    (found,) = run_onnx(prepared.candidate("cpu", tmp_path / "a.onnx"))
    with torch.inference_mode(), exportable_fake_quant():
        expected = prepared.fake_quant("cpu")(IMAGES).numpy()
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02)


def test_a_missing_file_is_no_model(tmp_path):
    with pytest.raises(ExportError, match=r"none\.onnx does not exist"):
        summarize_onnx(tmp_path / "none.onnx")


def test_rubbish_is_no_model(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"rubbish")
    with pytest.raises(ExportError, match="is not an ONNX model"):
        summarize_onnx(tmp_path / "a.onnx")


def test_a_template_of_another_plan_is_refused(prepared, tmp_path):
    export_onnx(prepared.folded.module, tmp_path / "f.onnx", input_shape=SHAPE)
    with pytest.raises(ExportError, match=r"has no initializer x\.scale; export the template again"):
        write_candidate(tmp_path / "f.onnx", tmp_path / "g.onnx", plan=prepared.plan, dialect="cpu",
                        activation_amax=prepared.amax, metadata={})  # fmt: skip


def codes_in_onnx(path, prepared, dialect):
    """The integer codes of every activation quantizer as ONNX Runtime computes them, by quantizer name."""
    model = onnx.load(path)
    outputs = {}
    for node in model.graph.node:
        for name in observed_names(prepared.plan):
            if node.op_type == "QuantizeLinear" and node.input[1] == f"{name}.scale":
                outputs[name] = node.output[0]
    for output in outputs.values():
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(output))
    onnx.save(model, path)
    return dict(zip(outputs, run_onnx(path, names=list(outputs.values())), strict=True))


@pytest.mark.parametrize("dialect", ["cpu", "tensorrt"])
def test_every_quantizer_gives_the_codes_of_pytorch_within_one_step(prepared, tmp_path, dialect):
    found = codes_in_onnx(prepared.candidate(dialect, tmp_path / "a.onnx"), prepared, dialect)
    model = prepared.fake_quant(dialect)
    values = {}
    for index, spec in enumerate(prepared.plan.activations):
        module = model.get_submodule(quantizer_module_name(index, 0))
        module.register_forward_hook(lambda _, __, out, name=spec.name: values.__setitem__(name, out.numpy()))
    with torch.inference_mode(), exportable_fake_quant():
        model(IMAGES)
    assert set(found) == set(values)
    for spec in prepared.plan.activations:
        scale = prepared.amax[spec.name] / amax_bound(spec, dialect)
        difference = np.abs(np.round(values[spec.name] / scale) - found[spec.name])
        # Float sums in another order put a value on the other side of a rounding edge now and then.
        assert difference.max() <= 1
        assert np.mean(difference > 0) < 0.01


def test_an_operator_that_onnx_lacks_is_named_and_no_graph_is_printed(tmp_path, capfd):
    class Spectrum(torch.nn.Module):
        def forward(self, x):
            return torch.fft.fft2(x).real.mean((2, 3))

    with pytest.raises(ExportError, match=r"aten::fft_fft2"):
        export_onnx(Spectrum().eval(), tmp_path / "s.onnx", input_shape=SHAPE)
    assert "graph(" not in "".join(capfd.readouterr())

"""Candidates of small networks, calibrated on random images with method `max`."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ptq.dialect import observed_names
from ptq.graph.against_plan import Decisions
from ptq.graph.candidate import write_candidate
from ptq.graph.pair_sums import limit_pair_sums
from ptq.networks.export import export_onnx, export_qdq_template
from ptq.networks.fake_quant import fake_quant_from_folded, weight_amax
from ptq.networks.folding import fold_model
from ptq.networks.observed import observed_from_folded
from ptq.quantization.rules import place_quantizers
from ptq.quantization.torch_view import view_of
from ptq.records.plan import PlacementPlan
from tests.support.networks import PLACEMENT

METADATA = {"checkpoint_sha256": "0" * 64, "method": "max", "trial": "0"}


@dataclass(frozen=True)
class Calibrated:
    """A network's plan and amax, its template with weights that no CPU saturates, and its FP32 graph."""

    plan: PlacementPlan
    amax: dict
    template: Path
    fp32: Path
    classes: int

    def write(self, dialect, biases=None):
        """The candidate of a dialect."""
        path = self.template.with_name(f"{dialect}.onnx")
        write_candidate(
            self.template, path, plan=self.plan, dialect=dialect, activation_amax=self.amax, metadata=METADATA,
            biases=biases,
        )  # fmt: skip
        return path

    def decided(self, dialect, biases=None):
        """What that candidate is written from."""
        return Decisions(plan=self.plan, dialect=dialect, amax=self.amax, biases=biases or {})


def calibrated(model, directory, images, **options):
    """A network calibrated on images (n, c, h, w), its quantizers placed with `options` beside the usual ones."""
    shape = tuple(images.shape[1:])
    folded = fold_model(model, input_shape=shape)
    view = view_of(folded.module, traced=folded.traced)
    plan = place_quantizers(view, **{**PLACEMENT, "whole_operators": True, **options})
    with torch.inference_mode():
        logits, *tensors = observed_from_folded(folded.module, plan)(images)
    amax = {name: float(seen.abs().max()) + 1e-3 for name, seen in zip(observed_names(plan), tensors, strict=True)}
    fake_quant = fake_quant_from_folded(
        folded.module, plan, dialect="tensorrt", activation_amax=amax, weight_amax=weight_amax(folded.module, plan)
    )
    native, template, fp32 = (directory / f"{name}.onnx" for name in ("native", "template", "fp32"))
    export_qdq_template(fake_quant, native, plan=plan, input_shape=shape)
    limit_pair_sums(native, template, plan=plan, runtimes=("openvino", "onnxruntime"))
    export_onnx(folded.module, fp32, input_shape=shape)
    return Calibrated(plan, amax, template, fp32, logits.shape[1])

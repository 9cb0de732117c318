"""What a run might have found, to report on, and how a browser would see the page."""

import dataclasses
from html.parser import HTMLParser

import polars as pl

from ptq.evaluation.predictions import class_metrics
from ptq.records.base import ArtifactRef
from ptq.records.benchmark import BenchmarkRecord, Measurement
from ptq.records.calibration import CalibrationDraws, LayerLength, TrialLength
from ptq.records.data import DataRecord, PreparedImages, SplitCount
from ptq.records.evaluation import (
    EvaluationRecord,
    FlippedImage,
    MethodSpread,
    PairedComparison,
    Selection,
    SplitMetrics,
)
from ptq.records.graph import EngineIdentity, EngineRecord, GraphChecks, GraphFinding, Int8Share
from ptq.records.parity import Likeness, ParityRecord, Parting
from ptq.records.plan import Coverage, LayerInFloat, ModelRecord, PlacementPlan, QuantizerSpec
from ptq.records.verdict import Verdict
from ptq.report.inputs import ReportInputs

# 624 images: FP32 is right on 530 (84.94 %), the chosen candidate on 529 (84.78 %).
FP32_CONFUSION = ((150, 84), (10, 380))
INT8_CONFUSION = ((148, 86), (9, 381))
ENGINE = EngineIdentity(name="openvino", version="2026.4.0", device="a server CPU", threads=2)
HOSTILE = "<script>alert('x')</script>"


def reference(name):
    return ArtifactRef(name=name, sha256=(name.encode().hex() + "0" * 64)[:64], size_bytes=97_800_000)


def metrics(confusion, *, split, loss=0.4, sqnr_db=None, agreement_percent=None):
    images = sum(map(sum, confusion))
    return SplitMetrics(
        split=split,
        images=images,
        top1_percent=100 * sum(confusion[i][i] for i in range(len(confusion))) / images,
        top5_percent=99.5,
        loss=loss,
        sqnr_db=sqnr_db,
        agreement_percent=agreement_percent,
    )


def by_class(confusion):
    cells = ((i, j) for i, row in enumerate(confusion) for j, count in enumerate(row) for _ in range(count))
    table = pl.DataFrame(list(cells), schema=["label", "prediction"], orient="row")
    return class_metrics(table, num_classes=len(confusion))


def evaluation(name, trial, method, confusion, **numbers):
    return EvaluationRecord(
        candidate=name,
        trial=trial,
        method=method,
        splits=(
            metrics(((8, 0), (0, 8)), split="val", **numbers),
            metrics(confusion, split="test", **numbers),
        ),
        predictions=reference("predictions.parquet"),
        logits=reference("logits.npz"),
    )


def measurement(precision, batch_size, median_ms):
    return Measurement(
        precision=precision,
        batch_size=batch_size,
        samples_ms=(median_ms, median_ms * 1.1, median_ms * 0.9),
        median_ms=median_ms,
        mean_ms=median_ms * 1.01,
        p90_ms=median_ms * 1.1,
        p95_ms=median_ms * 1.2,
        p99_ms=median_ms * 1.3,
        throughput_images_per_s=1000 * batch_size / median_ms,
        rounds_median_ms=(median_ms,),
    )


def benchmark(*measurements):
    measured = measurements or (
        measurement("fp32", 1, 12.0),
        measurement("bf16", 1, 5.0),
        measurement("int8", 1, 3.0),
        measurement("fp32", 32, 400.0),
        measurement("bf16", 32, 100.0),
        measurement("int8", 32, 80.0),
    )
    return BenchmarkRecord(
        engine=ENGINE, machine="a server CPU", clock_mhz=2600.0, measurements=measured, warnings=("The clock moved.",)
    )


def engine(precision, batch_size, *, float_layers=()):
    return EngineRecord(
        engine=ENGINE,
        precision=precision,
        batch_size=batch_size,
        onnx_sha256="e" * 64,
        blob=reference(f"{precision}-{batch_size}.blob"),
        int8=Int8Share(
            layers=54, int8_input_percent=98.1, int8_output_percent=96.3, reformats=7, float_layers=float_layers
        ),
        build_s=1.25,
    )


def parity(parting=None):
    """64 images; the engine loses 12.7 dB where there is a parting, and nothing where there is none."""
    engine_db = 19.7 if parting is None else 7.0
    return ParityRecord(
        images=64,
        engine=Likeness(sqnr_db=engine_db, agreement_percent=95.3),
        file=Likeness(sqnr_db=19.7, agreement_percent=95.3),
        engine_to_file=Likeness(sqnr_db=60.0 if parting is None else 7.3, agreement_percent=100.0),
        parting=parting,
    )


def placement_plan():
    def quantizer(name, kind, never_negative):
        return QuantizerSpec(
            name=name, kind=kind, observed=name, axis=None, never_negative=never_negative, readers=("conv1",)
        )

    return PlacementPlan(
        quantizers=(quantizer("x", "activation", False), quantizer("relu", "activation", True))
        + (quantizer("conv1", "weight", False),),
        quantized_layers=("conv1",),
        float_layers=("head.scale",),
        residual_adds=16,
        quantized_residual_adds=15,
        traced=True,
        warnings=("One residual add is left in float.",),
    )


def selection(*, flipped_images=None, **changes):
    images = flipped_images or (
        FlippedImage(path="PNEUMONIA/one.jpeg", label=1, fp32_prediction=0, int8_prediction=1),
        FlippedImage(path="NORMAL/two.jpeg", label=0, fp32_prediction=0, int8_prediction=1),
    )
    comparison = PairedComparison(
        images=624,
        drop_pp=0.16,
        drop_interval_pp=(-0.9, 1.2),
        mcnemar_p=1.0,
        fp32_only_correct=2,
        int8_only_correct=1,
        flipped=len(images),
    )
    record = Selection(
        candidate="entropy-2",
        trial=2,
        method="entropy",
        table=reference("amax.json"),
        selection_split="val",
        test_split="test",
        reason="entropy-2 has the best top-1 on val of 3 candidates, 100.00 %.",
        comparison=comparison,
        flipped_images=images,
        spreads=(MethodSpread("max", 79.0, 78.5, 79.5, 0.71), MethodSpread("entropy", 84.5, 84.2, 84.78, 0.29)),
        sampling_std_pp=0.28,
        spread_sentence="Over 3 draws entropy's top-1 varies by 0.29 pp.",
    )
    return dataclasses.replace(record, **changes)


def candidate_row(name, trial, method, top1_percent, same_as=""):
    return {
        "id": name,
        "trial": trial,
        "method": method,
        "top1_percent": top1_percent,
        "drop_pp": 84.94 - top1_percent,
        "loss": 0.41,
        "same_as": same_as,
    }


def verdict(*, accepted=True, reasons=("The top-1 drop is 0.16 pp.",), **changes):
    content = {
        "schema": 1,
        "run_id": "run-7",
        "model": "resnet50",
        "checkpoint_sha256": "c" * 64,
        "config_sha256": "d" * 64,
        "engine": {"name": "openvino", "version": "2026.4.0", "device": "a server CPU"},
        "fp32": {"top1_percent": 84.94, "n_images": 624, "loss": 0.4},
        "candidates": [
            candidate_row("max-0", 0, "max", 79.01),
            candidate_row("entropy-0", 0, "entropy", 84.29),
            candidate_row("max-2", 2, "max", 79.01, same_as="max-0"),
            candidate_row("entropy-2", 2, "entropy", 84.78),
        ],
        "best": {
            "id": "entropy-2",
            "method": "entropy",
            "trial": 2,
            "top1_percent": 84.78,
            "drop_pp": 0.16,
            "drop_interval_pp": (-0.9, 1.2),
            "mcnemar_p": 1.0,
            "flipped_images": 2,
        },
        "benchmark": [],
        "int8": {"conv_int8_input_percent": 98.1, "conv_int8_output_percent": 96.3, "reformats": 7},
        "graph_checks": {"errors": 0, "warnings": 1},
        "gate": {"accepted": accepted, "reasons": reasons},
        "files": {"model_int8.onnx": {"uri": "file:///store/a", "sha256": "f" * 64, "size_bytes": 97_800_000}},
        "versions": {"torch": "2.13.0", "openvino": "2026.4.0"},
        "stage_seconds": {"prepare": 30.0, "calibrate": 90.0},
    }
    return Verdict.model_validate(content | changes)


def make_inputs(**changes):
    finding = GraphFinding(
        check="float-island", severity="warning", node="add_3", message="add_3 runs in float.", remedy="Quantize it."
    )
    note = GraphFinding(check="opset", severity="info", node="", message="Opset 17.", remedy="None needed.")
    fields = {
        "verdict": verdict(),
        "baseline": evaluation("fp32", None, None, FP32_CONFUSION),
        "fp32_by_class": by_class(FP32_CONFUSION),
        "int8_by_class": by_class(INT8_CONFUSION),
        "candidates": (
            evaluation("max-0", 0, "max", ((114, 120), (11, 379)), loss=0.5, sqnr_db=12.0, agreement_percent=92.3),
            evaluation("entropy-0", 0, "entropy", ((146, 88), (10, 380)), sqnr_db=21.0, agreement_percent=98.0),
            evaluation("entropy-2", 2, "entropy", INT8_CONFUSION, loss=0.41, sqnr_db=22.5, agreement_percent=99.68),
        ),
        "selection": selection(),
        "benchmark": benchmark(),
        "parity": parity(),
        "checks": (
            GraphChecks(graph="model_int8.onnx", checks_run=("opset", "float-island"), findings=(finding, note)),
        ),
        "engines": (engine("fp32", 1), engine("int8", 1), engine("int8", 32, float_layers=("fc",))),
        "plan": placement_plan(),
        "model": ModelRecord(
            name="resnet50",
            checkpoint_sha256="c" * 64,
            weights=reference("weights"),
            fp32_onnx=reference("fp32.onnx"),
            observed_onnx=reference("observed.onnx"),
            plan=reference("plan"),
            input_shape=(3, 224, 224),
            num_classes=2,
            class_names=("NORMAL", "PNEUMONIA"),
            warnings=(),
            coverage=Coverage(
                layers=54,
                int8_layers=53,
                macs=4_087_000_000,
                int8_macs=4_086_000_000,
                chosen_macs=0,
                batchnorms=0,
                in_float=(LayerInFloat("fc", 1_000_000, "its weight is computed from other parameters"),),
            ),
        ),
        "data": DataRecord(
            table=ArtifactRef(name="images.parquet", sha256="a" * 64, size_bytes=1),
            root="s3://images/chest",
            class_names=("NORMAL", "PNEUMONIA"),
            has_named_classes=True,
            splits=(SplitCount("train", 1_000, (400, 600)), SplitCount("test", 624, (234, 390))),
            duplicates_across_splits=0,
        ),
        "draws": CalibrationDraws(
            prepared=PreparedImages(reference("pixels"), reference("labels"), 5, reference("digests")),
            indices=((0, 1, 2), (1, 2, 3), (2, 3, 4)),
            warnings=("Class PNEUMONIA is never drawn.",),
        ),
        "config_yaml": "model:\n  name: resnet50\n",
        "machine": {"cores": "2"},
        "warnings": ("Half of the images are grey.",),
    }
    return ReportInputs(**(fields | changes))


def many_classes(count):
    """Inputs with `count` classes of ten images; INT8 loses one image of class 3 and two of class 7, to class 0."""
    right = [[10 if i == j else 0 for j in range(count)] for i in range(count)]
    fp32 = tuple(map(tuple, right))
    right[3][3], right[3][0] = 9, 1
    right[7][7], right[7][0] = 8, 2
    names = tuple(f"class number {i}" for i in range(count))
    inputs = make_inputs()
    return make_inputs(
        baseline=evaluation("fp32", None, None, fp32),
        fp32_by_class=by_class(fp32),
        int8_by_class=by_class(right),
        candidates=tuple(
            evaluation(item.candidate, item.trial, item.method, tuple(map(tuple, right)), sqnr_db=20.0)
            for item in inputs.candidates
        ),
        model=dataclasses.replace(inputs.model, num_classes=count, class_names=names),
        data=dataclasses.replace(inputs.data, class_names=names),
    )


class Page(HTMLParser):
    """What a browser would see: every tag and attribute, and the rows of each table by its caption."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.tables = [], [], {}
        self.rows, self.row, self.caption, self.is_in_caption = [], [], "", False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag == "caption":
            self.rows, self.caption, self.is_in_caption = [], "", True
        elif tag == "tr":
            self.row = []
            self.rows.append((dict(attributes).get("class", ""), self.row))
        elif tag in {"td", "th"}:
            self.row.append("")

    def handle_endtag(self, tag):
        if tag == "caption":
            self.is_in_caption = False
        elif tag == "table":
            self.tables[self.caption], self.row = self.rows, []

    def handle_data(self, data):
        if self.is_in_caption:
            self.caption += data
        elif self.row:
            self.row[-1] += data.strip()

    def table(self, caption):
        """The rows below the heads of the one table whose caption starts so."""
        (rows,) = [rows for title, rows in self.tables.items() if title.startswith(caption)]
        return [cells for _, cells in rows[1:]]

    def alarming(self, caption):
        (rows,) = [rows for title, rows in self.tables.items() if title.startswith(caption)]
        return [cells for kind, cells in rows if kind == "bad"]


def adaptive_inputs():
    layers = (LayerLength("conv1", 32, 0.5), LayerLength("relu", None, 7.25))
    lengths = (
        TrialLength(64, layers),
        TrialLength(32, (layers[0], LayerLength("relu", 32, 1.0))),
        TrialLength(64, (LayerLength("conv1", 64, 1.5), LayerLength("relu", None, None))),
    )
    return make_inputs(draws=dataclasses.replace(make_inputs().draws, lengths=lengths))


def hostile_inputs():
    """Every text that a person or a file name can bring in is markup."""
    inputs = make_inputs()
    finding = GraphFinding(check=HOSTILE, severity="error", node=HOSTILE, message=HOSTILE, remedy=HOSTILE)
    return make_inputs(
        verdict=verdict(
            accepted=False,
            reasons=(HOSTILE,),
            model=HOSTILE,
            run_id=HOSTILE,
            versions={HOSTILE: HOSTILE},
            stage_seconds={HOSTILE: 1.0},
        ),
        selection=selection(
            flipped_images=(FlippedImage(HOSTILE, label=0, fp32_prediction=0, int8_prediction=1),),
            reason=HOSTILE,
            spread_sentence=HOSTILE,
        ),
        parity=parity(Parting(HOSTILE, "saturation", HOSTILE)),
        checks=(GraphChecks(graph=HOSTILE, checks_run=("axis",), findings=(finding,)),),
        engines=(engine("int8", 1, float_layers=(HOSTILE,)),),
        benchmark=benchmark(measurement("fp32", 1, 1.0), measurement("int8", 1, 2.0)),
        plan=dataclasses.replace(inputs.plan, float_layers=(HOSTILE,) * 9, warnings=(HOSTILE,)),
        model=dataclasses.replace(inputs.model, name=HOSTILE, class_names=(HOSTILE, '"><img src=x>')),
        data=dataclasses.replace(inputs.data, root=HOSTILE),
        config_yaml=f"name: {HOSTILE}",
        machine={HOSTILE: HOSTILE},
        warnings=(HOSTILE,),
    )

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import polars as pl
import pytest
from PIL import Image

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
from ptq.records.plan import ModelRecord, PlacementPlan, QuantizerSpec
from ptq.records.verdict import Verdict
from ptq.report.cells import Table
from ptq.report.charts import box_plot_png, boxplot_png
from ptq.report.html import html_report
from ptq.report.inputs import ReportInputs, verdict_sentence
from ptq.report.markdown import markdown_report
from ptq.report.run_tables import benchmark_table, results_table, terminal_tables

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


@pytest.fixture(scope="module")
def html():
    return html_report(make_inputs())


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_verdict_says_accuracy_uncertainty_and_speed_in_one_sentence():
    assert verdict_sentence(make_inputs()) == (
        "Accepted: INT8 (entropy, trial 2) reaches 84.8 % top-1 on 624 test images, 0.16 pp below FP32 "
        "(95 % interval -0.9 to 1.2 pp, McNemar p = 1.00), and is 4.0 times as fast at batch 1."
    )


def test_a_rejected_model_names_the_first_reason_before_its_numbers():
    reasons = ("The top-1 drop is 0.16 pp; at most 0.10 pp is accepted.", "INT8 runs at 4.00 times FP32.")
    sentence = verdict_sentence(make_inputs(verdict=verdict(accepted=False, reasons=reasons)))
    assert sentence.startswith(
        "Rejected: The top-1 drop is 0.16 pp; at most 0.10 pp is accepted. INT8 (entropy, trial 2) reaches 84.8 %"
    )


def test_a_model_that_gains_accuracy_is_above_fp32():
    best = verdict().best.model_copy(update={"drop_pp": -0.32, "drop_interval_pp": (-0.5, -0.1), "mcnemar_p": 0.0004})
    sentence = verdict_sentence(make_inputs(verdict=verdict().model_copy(update={"best": best})))
    assert "0.32 pp above FP32 (95 % interval -0.50 to -0.10 pp, McNemar p < 0.001)" in sentence


def test_a_model_without_any_drop_is_the_same_as_fp32():
    best = verdict().best.model_copy(update={"drop_pp": 0.0})
    sentence = verdict_sentence(make_inputs(verdict=verdict().model_copy(update={"best": best})))
    assert "images, the same as FP32 (" in sentence


def test_a_slower_model_is_said_to_take_longer():
    record = benchmark(measurement("fp32", 8, 4.0), measurement("int8", 8, 5.0))
    assert verdict_sentence(make_inputs(benchmark=record)).endswith(", and takes 1.25 times as long at batch 8.")


def test_without_a_measurement_the_sentence_says_nothing_of_speed():
    record = benchmark(measurement("int8", 1, 5.0))
    assert verdict_sentence(make_inputs(benchmark=record)).endswith("McNemar p = 1.00).")


def test_the_accepted_banner_is_green_and_the_rejected_one_red(html):
    rejected = html_report(make_inputs(verdict=verdict(accepted=False)))
    assert '<section class="verdict" ' in html
    assert '<section class="verdict rejected" ' in rejected
    assert "<title>Rejected: INT8 quantization of resnet50</title>" in rejected


def test_fp32_and_int8_stand_side_by_side_with_their_change(page):
    assert page.table("FP32 and INT8 on 624 test images") == [
        ["Top-1, %", "84.94", "84.78", "-0.16"],
        ["Top-5, %", "99.50", "99.50", "0.00"],
        ["Loss", "0.4000", "0.4100", "+0.0100"],
    ]


def test_the_comparison_lists_interval_test_agreement_noise_and_changes(page):
    assert page.table("INT8 against FP32, image by image") == [
        ["Accuracy drop", "0.16 pp"],
        ["95 % interval of the drop", "-0.9 to 1.2 pp"],
        ["McNemar test, exact, two-sided", "p = 1.00"],
        ["Correct only in FP32 / only in INT8", "2 / 1"],
        ["Predictions changed", "2 of 624"],
        ["Top-1 agreement with FP32", "99.68 %"],
        ["SQNR of the logits", "22.5 dB"],
    ]


def test_every_method_and_trial_has_a_cell_and_the_chosen_one_a_star(page):
    assert page.table("Top-1 in percent on test") == [["0", "79.01", "84.29"], ["2", "79.01", "84.78 *"]]


def test_a_method_missing_from_one_trial_leaves_its_cell_open():
    rows = verdict().candidates[1:]
    inputs = make_inputs(verdict=verdict().model_copy(update={"candidates": rows}))
    assert Page(html_report(inputs)).table("Top-1 in percent on test")[0] == ["0", "n/a", "84.29"]


def test_shared_amax_tables_are_counted_below_the_trials(html):
    assert "1 of 4 candidates have the amax table of another" in html


def test_the_spread_over_the_draws_is_told_in_a_sentence_and_a_table(html, page):
    assert "Over 3 draws entropy&#39;s top-1 varies by 0.29 pp." in html
    assert page.table("Top-1 of each method over the calibration draws")[1] == [
        "entropy",
        "84.50",
        "84.20",
        "84.78",
        "0.29",
    ]


def test_a_confusion_matrix_is_drawn_for_fp32_and_int8(page):
    assert page.table("Confusion matrix: FP32") == [["NORMAL", "150", "84"], ["PNEUMONIA", "10", "380"]]
    assert page.table("Confusion matrix: INT8") == [["NORMAL", "148", "86"], ["PNEUMONIA", "9", "381"]]


def test_recall_and_precision_are_listed_per_class(page):
    # 150/234, 148/234, 150/160, 148/157 and 380/390, 381/390, 380/464, 381/467.
    assert page.table("Recall and precision per class") == [
        ["NORMAL", "234", "64.10", "63.25", "-0.85", "93.75", "94.27", "+0.52"],
        ["PNEUMONIA", "390", "97.44", "97.69", "+0.26", "81.90", "81.58", "-0.31"],
    ]


def test_a_class_without_images_has_no_recall_and_no_change():
    inputs = make_inputs(
        baseline=evaluation("fp32", None, None, ((0, 0), (4, 6))),
        fp32_by_class=by_class(((0, 0), (4, 6))),
        candidates=tuple(
            evaluation(item.candidate, item.trial, item.method, ((0, 0), (0, 10))) for item in make_inputs().candidates
        ),
        int8_by_class=by_class(((0, 0), (0, 10))),
    )
    found = Page(html_report(inputs))
    assert found.table("Recall and precision per class")[0] == [
        "NORMAL",
        "0",
        "n/a",
        "n/a",
        "n/a",
        "0.00",
        "n/a",
        "n/a",
    ]
    assert ["Top-1 agreement with FP32", "n/a"] in found.table("INT8 against FP32")


def test_latency_and_throughput_changes_are_percent_of_fp32(page):
    # Batch 1: 3 ms of 12 ms is -75 %, 333.3 of 83.3 images/s is +300 %.
    rows = page.table("Latency and throughput")
    assert rows[0] == ["FP32", "1", "12.00", "12.12", "13.20", "14.40", "15.60", "83.3", "ref.", "ref."]
    assert rows[1][-2:] == ["-58.3", "+140.0"]
    assert rows[2] == ["INT8", "1", "3.00", "3.03", "3.30", "3.60", "3.90", "333.3", "-75.0", "+300.0"]
    assert [row[:2] for row in rows[3:]] == [["FP32", "32"], ["BF16", "32"], ["INT8", "32"]]


def test_without_an_fp32_measurement_the_changes_are_not_available():
    page = Page(html_report(make_inputs(benchmark=benchmark(measurement("int8", 1, 3.0)))))
    assert page.table("Latency and throughput")[0][-2:] == ["n/a", "n/a"]


def test_an_int8_that_pays_raises_no_alarm(html, page):
    assert page.alarming("Latency and throughput") == []
    assert "INT8 is slower" not in html


def test_an_int8_slower_than_the_best_float_is_red_and_names_the_layers_at_fault():
    slow = benchmark(measurement("fp32", 32, 400.0), measurement("bf16", 32, 80.0), measurement("int8", 32, 100.0))
    html = html_report(make_inputs(benchmark=slow))
    (row,) = Page(html).alarming("Latency and throughput")
    assert row[:3] == ["INT8", "32", "100.00"]
    assert (
        "INT8 is slower than BF16 at batch 32: 100.00 ms against 80.00 ms, 25.0 % longer. 1 of 54 convolutions and "
        "linear layers ran in float: fc; the engine converts between types 7 times." in html
    )


def test_many_layers_at_fault_are_cut_in_the_sentence_and_listed_whole_below():
    layers = tuple(f"layer{i}.conv" for i in range(12))
    slow = benchmark(measurement("fp32", 1, 4.0), measurement("int8", 1, 5.0))
    html = html_report(make_inputs(benchmark=slow, engines=(engine("int8", 1, float_layers=layers),)))
    assert "layer6.conv, layer7.conv and 4 more; the engine converts" in html
    assert "<li><code>layer11.conv</code></li>" in html


def test_what_the_engine_ran_in_int8_is_listed_per_batch_size(page):
    assert page.table("What the INT8 engine really runs") == [
        ["1", "54", "98.1", "96.3", "7", "0"],
        ["32", "54", "98.1", "96.3", "7", "1"],
    ]


def test_the_placement_counts_layers_and_residual_adds(html, page):
    rows = page.table("Placement of the quantizers")
    assert ["Residual adds quantized", "15 of 16"] in rows
    assert ["Activation quantizers", "2, of which 1 on tensors that are never negative"] in rows
    assert "<code>head.scale</code>" in html


def test_findings_come_with_their_remedy_and_notes_are_folded(html, page):
    assert page.table("Errors and warnings") == [
        ["warning", "float-island", "add_3", "add_3 runs in float.", "Quantize it."]
    ]
    assert page.table("Notes") == [["info", "opset", "whole graph", "Opset 17.", "None needed."]]
    assert (
        html.index("Notes of the checks: 1</summary>")
        < html.index("Opset 17.")
        < html.index("</details>", html.index("Opset"))
    )


def test_errors_of_the_graph_checks_come_first_and_are_red():
    found = GraphFinding(check="axis", severity="error", node="conv1", message="Wrong axis.", remedy="Use axis 0.")
    checks = make_inputs().checks
    other = GraphChecks(graph="model_int8_trt.onnx", checks_run=("axis",), findings=(found,))
    page = Page(html_report(make_inputs(checks=(*checks, other))))
    assert page.table("Errors and warnings")[0] == [
        "error",
        "axis",
        "conv1",
        "Wrong axis.",
        "Use axis 0.",
        "model_int8_trt.onnx",
    ]
    assert len(page.alarming("Errors and warnings")) == 1
    assert page.alarming("Findings per graph") == [["model_int8_trt.onnx", "1", "1", "0", "0"]]


def test_changed_images_say_who_was_right(page):
    assert page.table("Images whose prediction changed: 2") == [
        ["PNEUMONIA/one.jpeg", "PNEUMONIA", "NORMAL", "PNEUMONIA", "won"],
        ["NORMAL/two.jpeg", "NORMAL", "NORMAL", "PNEUMONIA", "lost"],
    ]


def test_only_the_first_fifty_changed_images_are_listed():
    images = tuple(FlippedImage(f"{i}.png", label=0, fp32_prediction=0, int8_prediction=1) for i in range(60))
    page = Page(html_report(make_inputs(selection=selection(flipped_images=images))))
    rows = page.table("Images whose prediction changed: the first 50 of 60")
    assert [row[0] for row in rows] == [f"{i}.png" for i in range(50)]


def test_calibration_counts_draws_and_different_images(page):
    rows = page.table("Calibration draws")
    assert ["Images per draw", "3"] in rows
    assert ["Trials, each a seeded draw", "3"] in rows
    assert ["Different images over all draws", "5"] in rows


def adaptive_inputs():
    layers = (LayerLength("conv1", 32, 0.5), LayerLength("relu", None, 7.25))
    lengths = (
        TrialLength(64, layers),
        TrialLength(32, (layers[0], LayerLength("relu", 32, 1.0))),
        TrialLength(64, (LayerLength("conv1", 64, 1.5), LayerLength("relu", None, None))),
    )
    return make_inputs(draws=dataclasses.replace(make_inputs().draws, lengths=lengths))


def test_an_adaptive_calibration_lists_what_each_layer_needed_and_names_the_loose_ones():
    page = Page(html_report(adaptive_inputs()))
    title = "Images each layer needed for a tight amax"
    assert page.table(title) == [
        ["relu", "not reached (7.2 %)", "32 (1.0 %)", "not reached (n/a)"],
        ["conv1", "32 (0.5 %)", "32 (0.5 %)", "64 (1.5 %)"],
    ]
    assert [row[0] for row in page.alarming(title)] == ["relu"]
    assert "| relu | not reached (7.2 %) | 32 (1.0 %) | not reached (n/a) |" in markdown_report(adaptive_inputs())


def test_a_calibration_of_fixed_length_has_no_table_of_what_layers_needed(html):
    assert "Images each layer needed" not in html + markdown_report(make_inputs())


def test_provenance_identifies_checkpoint_data_versions_machine_and_time(page):
    identity = dict(page.table("Identity"))
    assert identity["Checkpoint SHA-256"] == "c" * 64
    assert identity["Configuration SHA-256"] == "d" * 64
    assert identity["Index of the images, SHA-256"] == "a" * 64
    assert identity["Run"] == "run-7"
    assert page.table("Splits") == [["train", "1,000", "0"], ["test", "624", "0"]]
    assert page.table("Library versions") == [["torch", "2.13.0"], ["openvino", "2026.4.0"]]
    assert page.table("Machine") == [["cores", "2"]]
    assert page.table("Time spent") == [["prepare", "30.0", "25.0"], ["calibrate", "90.0", "75.0"]]
    assert page.table("Files") == [["model_int8.onnx", "97.8 MB", "f" * 64]]


def test_the_configuration_is_folded_into_the_page(html):
    assert "<summary>Configuration as YAML</summary>\n<pre>model:\n  name: resnet50\n</pre>" in html


def test_warnings_of_every_stage_are_listed_once():
    repeated = make_inputs(warnings=("Half of the images are grey.", "The clock moved."))
    html = html_report(repeated)
    box = html[html.index('aria-label="Warnings"') : html.index('id="accuracy"')]
    assert re.findall(r"<li>(.*?)</li>", box) == [
        "Half of the images are grey.",
        "The clock moved.",
        "Class PNEUMONIA is never drawn.",
        "One residual add is left in float.",
    ]


def test_every_table_of_the_page_has_a_caption(html, page):
    assert len(page.tables) >= 18
    assert "" not in page.tables
    assert html.count("<table") == html.count("<caption>") == len(page.tables)


def test_the_page_loads_nothing_and_runs_nothing(html, page):
    loading = [value for _, name, value in page.attributes if name in {"src", "srcset", "data", "poster", "background"}]
    links = [value for _, name, value in page.attributes if name in {"href", "action", "xlink:href"}]
    assert len(loading) == 2
    assert all(value.startswith("data:image/png;base64,") for value in loading)
    assert all(value.startswith("#") for value in links)
    assert {"script", "link", "iframe", "object", "base"}.isdisjoint(page.tags)
    assert re.search(r"@import|url\(", html) is None


def test_every_link_of_the_page_leads_somewhere(page):
    targets = {value for _, name, value in page.attributes if name == "id"}
    links = {value[1:] for _, name, value in page.attributes if name == "href"}
    assert len(links) == 9
    assert links <= targets


def test_the_pictures_in_the_page_decode(html):
    first, second = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    with (
        Image.open(io.BytesIO(base64.b64decode(first))) as box_plot,
        Image.open(io.BytesIO(base64.b64decode(second))) as bars,
    ):
        assert box_plot.size == (660, 385)
        assert bars.size[0] == 660


def test_the_same_records_give_the_same_page(html):
    assert html_report(make_inputs()) == html


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


def test_markup_in_names_and_messages_is_escaped_in_the_page():
    html = html_report(hostile_inputs())
    page = Page(html)
    assert "<script" not in html
    assert page.tags.count("img") == 2
    assert html.count("&lt;script&gt;") > 25


def test_markup_in_names_and_messages_is_escaped_in_markdown():
    markdown = markdown_report(hostile_inputs())
    assert re.search(r"<\w", markdown) is None
    assert "&lt;script&gt;" in markdown


def test_one_trial_makes_a_whole_report():
    row = verdict().candidates[3].model_copy(update={"trial": 0})
    best = verdict().best.model_copy(update={"trial": 0})
    inputs = make_inputs(
        verdict=verdict().model_copy(update={"candidates": (row,), "best": best}),
        draws=dataclasses.replace(make_inputs().draws, indices=((0, 1),)),
    )
    assert Page(html_report(inputs)).table("Top-1 in percent on test") == [["0", "84.78 *"]]


def test_a_chosen_candidate_that_shares_a_table_is_found_under_the_other_name():
    chosen = selection(candidate="max-2", trial=2, method="max")
    table = results_table(make_inputs(selection=chosen))
    assert table.filter(table["chosen"])["sqnr_db"].to_list() == [12.0]


def test_seven_classes_are_numbered_above_the_columns():
    page = Page(html_report(many_classes(8)))
    rows = page.table("Confusion matrix: INT8")
    assert rows[7] == ["7 · class number 7", "2", "0", "0", "0", "0", "0", "0", "8"]


def test_a_thousand_classes_show_only_what_changed_most():
    html = html_report(many_classes(1000))
    page = Page(html)
    assert len(html) < 2_000_000
    assert not any(title.startswith("Confusion matrix") for title in page.tables)
    assert page.table("The 2 most confused pairs") == [
        ["class number 7", "class number 0", "0", "2", "+2"],
        ["class number 3", "class number 0", "0", "1", "+1"],
    ]
    rows = page.table("Recall and precision per class on test, %: the 20 of 1,000 classes that lost most recall")
    assert len(rows) == 20
    assert rows[0][:5] == ["class number 7", "10", "100.00", "80.00", "-20.00"]
    assert rows[1][:5] == ["class number 3", "10", "100.00", "90.00", "-10.00"]


def test_a_report_without_measurements_says_so():
    record = dataclasses.replace(benchmark(), measurements=())
    assert "Nothing was measured." in html_report(make_inputs(benchmark=record))


def test_markdown_holds_the_same_numbers_and_points_at_the_picture():
    markdown = markdown_report(make_inputs())
    assert verdict_sentence(make_inputs()) in markdown
    assert "| Top-1, % | 84.94 | 84.78 | -0.16 |" in markdown
    assert "| INT8 | 1 | 3.00 | 3.03 | 3.30 | 3.60 | 3.90 | 333.3 | -75.0 | +300.0 |" in markdown
    assert "| --- | ---: | ---: | ---: |" in markdown
    assert "](boxplot.png)" in markdown
    assert "- Class PNEUMONIA is never drawn." in markdown


def test_a_bar_in_a_name_does_not_break_a_markdown_table():
    images = (FlippedImage("a|b.png", label=0, fp32_prediction=0, int8_prediction=1),)
    assert r"| a\|b.png | NORMAL |" in markdown_report(make_inputs(selection=selection(flipped_images=images)))


def test_a_slow_int8_is_bold_in_markdown():
    slow = benchmark(measurement("fp32", 1, 4.0), measurement("int8", 1, 5.0))
    assert "**INT8 is slower than FP32 at batch 1: 5.00 ms against 4.00 ms, 25.0 % longer." in markdown_report(
        make_inputs(benchmark=slow)
    )


def test_the_results_hold_a_row_per_candidate_with_shared_tables_resolved():
    table = results_table(make_inputs())
    assert table["id"].to_list() == ["max-0", "entropy-0", "max-2", "entropy-2"]
    assert table["sqnr_db"].to_list() == [12.0, 21.0, 12.0, 22.5]
    assert table["agreement_percent"].to_list() == [92.3, 98.0, 92.3, 99.68]
    assert table["same_as"].to_list() == ["", "", "max-0", ""]
    assert table["chosen"].to_list() == [False, False, False, True]
    assert table["selection_top1_percent"].to_list() == [100.0] * 4
    assert table["top1_percent"].to_list() == [79.01, 84.29, 79.01, 84.78]


def test_a_candidate_that_was_never_evaluated_is_named():
    with pytest.raises(ValueError, match="Candidate 'max-0' of the verdict has no evaluation"):
        results_table(make_inputs(candidates=make_inputs().candidates[1:]))


def test_the_benchmark_table_keeps_every_raw_sample():
    table = benchmark_table(benchmark())
    assert table.height == 6
    assert table["samples_ms"].to_list()[2] == pytest.approx([3.0, 3.3, 2.7])
    assert table["throughput_images_per_s"][3] == pytest.approx(80.0)
    assert table["precision"].to_list() == ["fp32", "bf16", "int8"] * 2


def test_an_empty_benchmark_is_an_empty_table_with_its_columns():
    table = benchmark_table(dataclasses.replace(benchmark(), measurements=()))
    assert table.height == 0
    assert "samples_ms" in table.columns


def test_tables_survive_parquet(tmp_path):
    results_table(make_inputs()).write_parquet(tmp_path / "results.parquet")
    benchmark_table(benchmark()).write_parquet(tmp_path / "benchmark.parquet")
    assert {file.name for file in tmp_path.iterdir()} == {"results.parquet", "benchmark.parquet"}


def test_the_terminal_gets_accuracy_speed_and_what_ran():
    tables = terminal_tables(make_inputs())
    assert [table.title.split(" on ")[0] for table in tables[:2]] == [
        "FP32 and INT8",
        "INT8 against FP32, image by image",
    ]
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    assert all(isinstance(cell, str) for table in tables for row in table.rows for cell in row)


def test_only_columns_of_numbers_are_set_flush_right():
    table = Table("t", ("name", "value", "mixed"), (("a", "-1,234.5", "1"), ("b", "n/a", "x")))
    assert [table.is_numeric(column) for column in range(3)] == [False, True, False]


def test_the_box_plot_file_is_the_picture_of_the_page(html):
    png = boxplot_png(make_inputs())
    assert base64.b64encode(png).decode() in html
    assert png == box_plot_png(
        {"max": [79.01, 79.01], "entropy": [84.29, 84.78]},
        fp32_top1_percent=84.94,
        title="resnet50: test, 3 draws of 3 images",
    )

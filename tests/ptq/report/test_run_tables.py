"""Does each table of a report hold the numbers of its records?"""

import dataclasses

from report_inputs import (
    Page,
    adaptive_inputs,
    benchmark,
    by_class,
    evaluation,
    make_inputs,
    measurement,
    parity,
    selection,
    verdict,
)

from ptq.records.evaluation import FlippedImage
from ptq.records.graph import GraphChecks, GraphFinding
from ptq.records.parity import Parting
from ptq.report.html import html_report
from ptq.report.markdown import markdown_report
from ptq.report.run_tables import terminal_tables


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


def test_the_spread_over_the_draws_is_told_in_a_sentence_and_a_table(html, page):
    assert "Over 3 draws entropy&#39;s top-1 varies by 0.29 pp." in html
    assert page.table("Top-1 of each method over the calibration draws")[1] == [
        "entropy",
        "84.50",
        "84.20",
        "84.78",
        "0.29",
    ]


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


def test_what_the_engine_ran_in_int8_is_listed_per_batch_size(page):
    assert page.table("What the INT8 engine really runs") == [
        ["1", "54", "98.1", "96.3", "7", "0"],
        ["32", "54", "98.1", "96.3", "7", "1"],
    ]


def test_an_engine_that_does_what_the_file_says_raises_no_alarm(page):
    title = "The engine and its file on 64 images"
    assert page.table(title) == [
        ["INT8 on the engine against FP32", "19.7", "95.3"],
        ["The INT8 file in float against FP32", "19.7", "95.3"],
        ["INT8 on the engine against its file", "60.0", "100.0"],
    ]
    assert page.alarming(title) == []


def test_where_engine_and_file_part_stands_below_their_numbers_in_red():
    inputs = make_inputs(parity=parity(Parting("conv1", "saturation", "They part first at conv1: its sums saturate.")))
    html = html_report(inputs)
    assert len(Page(html).alarming("The engine and its file on 64 images")) == 2
    assert "They part first at conv1: its sums saturate." in html
    assert "They part first at conv1" in markdown_report(inputs)


def test_the_placement_counts_layers_and_residual_adds(html, page):
    rows = page.table("Placement of the quantizers")
    assert ["Residual adds quantized", "15 of 16"] in rows
    assert ["Activation quantizers", "2, of which 1 on tensors that are never negative"] in rows
    assert "<code>head.scale</code>" in html


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


def test_an_adaptive_calibration_lists_what_each_layer_needed_and_names_the_loose_ones():
    page = Page(html_report(adaptive_inputs()))
    title = "Images each layer needed for a tight amax"
    assert page.table(title) == [
        ["relu", "not reached (7.2 %)", "32 (1.0 %)", "not reached (n/a)"],
        ["conv1", "32 (0.5 %)", "32 (0.5 %)", "64 (1.5 %)"],
    ]
    assert [row[0] for row in page.alarming(title)] == ["relu"]
    assert "| relu | not reached (7.2 %) | 32 (1.0 %) | not reached (n/a) |" in markdown_report(adaptive_inputs())


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


def test_one_trial_makes_a_whole_report():
    row = verdict().candidates[3].model_copy(update={"trial": 0})
    best = verdict().best.model_copy(update={"trial": 0})
    inputs = make_inputs(
        verdict=verdict().model_copy(update={"candidates": (row,), "best": best}),
        draws=dataclasses.replace(make_inputs().draws, indices=((0, 1),)),
    )
    assert Page(html_report(inputs)).table("Top-1 in percent on test") == [["0", "84.78 *"]]


def test_the_terminal_gets_accuracy_speed_and_what_ran():
    tables = terminal_tables(make_inputs())
    assert [table.title.split(" on ")[0] for table in tables[:2]] == [
        "FP32 and INT8",
        "INT8 against FP32, image by image",
    ]
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    assert all(isinstance(cell, str) for table in tables for row in table.rows for cell in row)

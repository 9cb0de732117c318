import json

import networks
import numpy as np
import polars
import pytest
import torch

from flows.quantize_model import quantize_model
from ptq.config import PtqConfig
from ptq.records.verdict import Verdict
from ptq.storage.store import open_store

pytestmark = pytest.mark.usefixtures("prefect_backend")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "small.pth"
    torch.save(networks.small_resnet().state_dict(), path)
    return path


def config_of(checkpoint, images, directory, **sections):
    content = {
        "model": {"name": "networks:SmallResNet", "checkpoint": str(checkpoint), "publish_as": "small"},
        "data": {"path": str(images), "preprocessing": {"resize": 24, "crop": 24}},
        "calibration": {"trials": 2, "images": 16},
        "engine": {"name": "openvino", "threads": 1},
        "benchmark": {"batch_sizes": [1, 4], "duration_s": 0.05, "warmup_ms": 1.0, "rounds": 2},
        # Four classes and random weights: neither accuracy nor speed is what these tests are about.
        "gate": {"max_drop_pp": 100, "min_speedup_fp32": 0.0, "max_slowdown": 1000},
        "output": {"store": f"file://{directory / 'store'}", "directory": str(directory / "output")},
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section}
    return PtqConfig.model_validate(content)


@pytest.fixture(scope="module")
def finished(prefect_backend, checkpoint, image_folder, tmp_path_factory):
    """One run, its folder and its result."""
    directory = tmp_path_factory.mktemp("run")
    config = config_of(
        checkpoint, image_folder, directory, quantization={"dialects": ["cpu", "tensorrt"]}, gate={"isas": ["native"]}
    )
    return config, directory, quantize_model(config)


def verdict_in(directory):
    return Verdict.model_validate_json((directory / "output" / "verdict.json").read_bytes())


def test_a_run_leaves_every_promised_file(finished):
    _, directory, result = finished
    assert result.accepted
    found = {path.name for path in (directory / "output").iterdir()}
    assert found == {
        "verdict.json", "report.html", "report.md", "results.parquet", "predictions.parquet", "boxplot.png",
        "model_fp32.onnx", "model_int8.onnx", "model_int8_tensorrt.onnx", "engines", "graph_checks.json",
        "benchmark.parquet",
    }  # fmt: skip
    assert len(list((directory / "output" / "engines").iterdir())) >= 4


def test_the_verdict_names_every_trial_and_method_and_agrees_with_the_tables(finished):
    _, directory, _ = finished
    verdict = verdict_in(directory)
    assert len(verdict.candidates) == 10
    assert verdict.fp32.n_images == 48
    rows = polars.read_parquet(directory / "output" / "results.parquet")
    assert rows["id"].to_list() == [candidate.id for candidate in verdict.candidates]
    assert rows.filter(polars.col("chosen"))["id"].to_list() == [verdict.best.id]
    assert verdict.graph_checks.errors == 0
    assert verdict.int8.conv_int8_input_percent == 100


def test_the_model_is_evaluated_under_the_instruction_sets_of_the_gate_and_held_against_its_file(finished):
    _, directory, result = finished
    verdict = verdict_in(directory)
    (found,) = verdict.isas
    assert found.isa == verdict.engine.isa
    # The same kernels, in a process of their own.
    assert (found.top1_percent, found.drop_pp) == (verdict.best.top1_percent, pytest.approx(verdict.best.drop_pp))
    assert found.median_ms > 0
    assert any(reason.startswith(f"Under {found.isa} the top-1 drop is") for reason in result.reasons)
    assert verdict.parity.cause is None
    assert verdict.parity.images == 32
    assert any(reason.startswith("The engine computes what the INT8 file says") for reason in result.reasons)
    report = (directory / "output" / "report.html").read_text()
    assert "INT8 under each instruction set" in report
    assert "The engine and its file on 32 images" in report


def test_predictions_are_enough_to_compute_the_accuracy_again(finished):
    _, directory, _ = finished
    verdict = verdict_in(directory)
    table = polars.read_parquet(directory / "output" / "predictions.parquet")
    test = table.filter((polars.col("candidate") == "fp32") & (polars.col("split") == "test"))
    assert 100 * np.mean(test["prediction"].to_numpy() == test["label"].to_numpy()) == pytest.approx(
        verdict.fp32.top1_percent
    )


def test_the_confusion_matrices_of_the_report_count_the_stored_predictions(finished):
    _, directory, _ = finished
    table = polars.read_parquet(directory / "output" / "predictions.parquet").filter(polars.col("split") == "test")
    report = (directory / "output" / "report.html").read_text()
    names = ("north-east", "north-west", "south-east", "south-west")
    for candidate, title in (("fp32", "FP32"), (verdict_in(directory).best.id, "INT8")):
        matrix = report[report.index(f"Confusion matrix: {title}") :]
        matrix = matrix[: matrix.index("</table>")]
        rows = table.filter(polars.col("candidate") == candidate)
        for label, predicted in np.ndindex(4, 4):
            count = rows.filter((polars.col("label") == label) & (polars.col("prediction") == predicted)).height
            assert f"{names[label]} predicted as {names[predicted]}: {count} of 12" in matrix


def test_every_file_of_the_verdict_is_in_the_store(finished):
    config, directory, _ = finished
    store = open_store(config.output.store)
    for name, file in verdict_in(directory).files.items():
        path = store.backend.root / "objects" / file.sha256[:2] / file.sha256
        assert path.stat().st_size == file.size_bytes, name


def test_an_accepted_model_is_published(finished):
    config, directory, _ = finished
    latest = open_store(config.output.store).latest("small")
    assert latest["onnx_sha256"] == verdict_in(directory).files["model_int8.onnx"].sha256


def test_a_second_run_computes_nothing_and_ends_with_the_same_model(finished, checkpoint, image_folder):
    config, directory, _ = finished
    before = verdict_in(directory)
    result = quantize_model(config)
    notes = open_store(config.output.store).run_stages(result.run_id)
    assert len(notes) >= 15
    assert {note["cached"] for note in notes} == {True}
    after = verdict_in(directory)
    assert after.files["model_int8.onnx"] == before.files["model_int8.onnx"]
    assert after.candidates == before.candidates
    assert after.best == before.best


@pytest.mark.slow
def test_a_changed_percentile_repeats_only_what_depends_on_it(finished, checkpoint, image_folder):
    config, _, _ = finished
    calibration = config.calibration.model_copy(update={"methods": ("percentile",), "percentiles": (99.0,)})
    result = quantize_model(config.model_copy(update={"calibration": calibration}))
    computed = {
        note["stage"] for note in open_store(config.output.store).run_stages(result.run_id) if not note["cached"]
    }
    assert "compute_amax" in computed
    assert not computed & {"index_images", "prepare_split", "prepare_model", "collect_statistics", "export_qdq"}


@pytest.mark.slow
def test_several_percentiles_are_candidates_of_their_own_everywhere(finished, checkpoint, image_folder):
    config, directory, _ = finished
    calibration = config.calibration.model_copy(
        update={"methods": ("max", "percentile"), "percentiles": (90.0, 99.9), "trials": 1}
    )
    result = quantize_model(
        config.model_copy(
            update={
                "calibration": calibration,
                "output": config.output.model_copy(update={"directory": str(directory / "percentiles")}),
            }
        )
    )
    labels = ["max", "percentile-90", "percentile-99.9"]
    verdict = Verdict.model_validate_json((directory / "percentiles" / "verdict.json").read_bytes())
    assert result.accepted
    assert [candidate.id for candidate in verdict.candidates] == [f"{label}-0" for label in labels]
    assert verdict.best.method in labels
    results = polars.read_parquet(directory / "percentiles" / "results.parquet")
    assert results["method"].to_list() == labels
    report = (directory / "percentiles" / "report.md").read_text()
    assert "| Trial | max | percentile-90 | percentile-99.9 |" in report


@pytest.mark.slow
def test_an_adaptive_run_reports_the_images_each_layer_needed_and_keeps_those_used(checkpoint, image_folder, tmp_path):
    calibration = {"images": 96, "trials": 2, "methods": ["max", "percentile"], "percentiles": [99.0]}
    config = config_of(checkpoint, image_folder, tmp_path, calibration={**calibration, "tolerance_percent": 15.0})
    result = quantize_model(config)
    verdict = verdict_in(tmp_path)
    layers = [layer for trial in verdict.calibration for layer in trial.layers]
    assert [trial.trial for trial in verdict.calibration] == [0, 1]
    assert {trial.images for trial in verdict.calibration} <= {32, 64, 96}
    assert min(trial.images for trial in verdict.calibration) < 96
    assert all(layer.images_needed for layer in layers)
    assert "Images each layer needed for a tight amax" in (tmp_path / "output" / "report.md").read_text()
    (note,) = [
        n for n in open_store(config.output.store).run_stages(result.run_id) if n["stage"] == "collect_statistics"
    ]
    record = open_store(config.output.store).read_stage(note["stage"], note["key"]).record
    assert [len(draw) for draw in record["draws"]["indices"]] == [trial.images for trial in verdict.calibration]


@pytest.mark.slow
def test_a_run_whose_layers_stay_loose_says_which(checkpoint, image_folder, tmp_path):
    calibration = {"images": 40, "trials": 1, "methods": ["percentile"], "tolerance_percent": 0.01}
    quantize_model(config_of(checkpoint, image_folder, tmp_path, calibration=calibration))
    (trial,) = verdict_in(tmp_path).calibration
    loose = [layer.name for layer in trial.layers if layer.images_needed is None]
    report = (tmp_path / "output" / "report.md").read_text()
    assert trial.images == 40
    assert loose
    assert "not within 0.01 % after all 40 images of 1 of 1 draws" in report


@pytest.mark.slow
def test_another_weight_method_makes_another_graph_from_the_same_statistics(finished, checkpoint, image_folder):
    config, directory, _ = finished
    quantization = config.quantization.model_copy(update={"weight_method": "mse", "dialects": ("cpu",)})
    calibration = config.calibration.model_copy(update={"methods": ("max",)})
    result = quantize_model(config.model_copy(update={"quantization": quantization, "calibration": calibration}))
    computed = {
        note["stage"] for note in open_store(config.output.store).run_stages(result.run_id) if not note["cached"]
    }
    assert {"export_qdq", "evaluate"} <= computed
    assert "collect_statistics" not in computed


def test_a_rejected_model_is_not_published_and_the_previous_one_stays(finished, checkpoint, image_folder):
    config, directory, _ = finished
    before = open_store(config.output.store).latest("small")
    strict = config.model_copy(update={"gate": config.gate.model_copy(update={"min_speedup_fp32": 1000.0})})
    result = quantize_model(strict)
    assert not result.accepted
    assert "1000" in result.reasons[0] or "1,000" in result.reasons[0]
    assert open_store(config.output.store).latest("small") == before
    assert verdict_in(directory).gate.accepted is False


def test_the_page_of_the_run_shows_verdict_results_and_checks(finished):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    run = FlowRunFilter(name=FlowRunFilterName(any_=[finished[2].run_id]))
    with get_client(sync_client=True) as client:
        artifacts = {artifact.key: artifact for artifact in client.read_artifacts(flow_run_filter=run)}
    assert {"ptq-verdict", "ptq-results", "ptq-graph-checks"} <= set(artifacts)
    assert "data:image/png;base64," in artifacts["ptq-verdict"].data
    assert len(json.loads(artifacts["ptq-results"].data)) == 10


@pytest.mark.slow
def test_without_a_selection_split_the_verdict_says_so(checkpoint, image_folder, tmp_path):
    config = config_of(
        checkpoint, image_folder, tmp_path, data={"selection_split": "none"},
        calibration={"methods": ["max"], "trials": 1}, benchmark={"batch_sizes": [1]},
    )  # fmt: skip
    quantize_model(config)
    assert (
        "same images" in (tmp_path / "output" / "report.md").read_text()
        or "one split" in (tmp_path / "output" / "report.md").read_text()
    )

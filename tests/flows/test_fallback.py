from dataclasses import replace

import networks
import onnx
import pytest
import torch
from onnx import numpy_helper
from prefect import flow
from safetensors.torch import load_file

from flows.quantize_model import quantize_model
from ptq.config import LabelledMethod, PtqConfig
from ptq.records.verdict import Verdict
from ptq.report.terminal import tables_of_verdict
from ptq.storage.store import open_store
from tasks.runtime.context import RunContext
from tasks.stages.amax import compute_amax
from tasks.stages.calibration import collect_statistics
from tasks.stages.data import draw_calibration_images, index_images
from tasks.stages.engine import resolve_engine
from tasks.stages.fallback import carry_amax
from tasks.stages.model import prepare_model

pytestmark = pytest.mark.usefixtures("prefect_backend")

FALLBACK_STAGES = {"choose_methods", "rank_layers", "carry_amax", "fine_tune", "summarize_attempts"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One that no single method can quantize, and one that is easy to quantize and always says class 0."""
    directory = tmp_path_factory.mktemp("checkpoints")
    torch.save(networks.NeedsTwoMethods().state_dict(), directory / "needs_two_methods.pth")
    easy = networks.NeedsTwoMethods().state_dict()
    easy["spread.weight"][15] = easy["spread.bias"][15] = 0.0
    easy["fc.bias"][0] = 10.0
    torch.save(easy, directory / "biased.pth")
    return directory


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One store for all runs, so that what they share is computed once."""
    return f"file://{tmp_path_factory.mktemp('store')}"


def config_of(
    checkpoints,
    images,
    store,
    directory,
    *,
    name="needs_two_methods",
    methods=("max",),
    percentiles=(90.0,),
    trials=1,
    fallback=None,
    **gate,
):
    return PtqConfig.model_validate(
        {
            "model": {"name": "networks:NeedsTwoMethods", "checkpoint": str(checkpoints / f"{name}.pth")},
            "data": {"path": str(images), "preprocessing": {"resize": 24, "crop": 24}},
            "calibration": {"trials": trials, "images": 32, "methods": list(methods), "percentiles": list(percentiles)},
            "engine": {"name": "openvino", "threads": 1},
            "benchmark": {"batch_sizes": [1], "duration_s": 0.02, "warmup_ms": 1.0, "rounds": 1},
            "gate": {"max_drop_pp": 5, "min_speedup_fp32": 0.0, "max_slowdown": 1000, **gate},
            "fallback": fallback or {},
            "output": {"store": store, "directory": str(directory)},
        }
    )


def run(checkpoints, images, store, directory, **options):
    result = quantize_model(config_of(checkpoints, images, store, directory, **options))
    notes = open_store(store).run_stages(result.run_id)
    verdict = Verdict.model_validate_json((directory / "verdict.json").read_bytes())
    return result, verdict, notes


def stages(notes):
    return [note["stage"] for note in notes]


@pytest.mark.slow
def test_without_fallback_a_rejected_model_stays_rejected_and_nothing_new_runs(
    checkpoints, image_folder, store, tmp_path
):
    result, verdict, notes = run(checkpoints, image_folder, store, tmp_path)
    assert not result.accepted
    assert verdict.fp32.top1_percent == 100
    assert verdict.best.top1_percent == 25
    assert not FALLBACK_STAGES & set(stages(notes))
    assert stages(notes).count("export_qdq") == stages(notes).count("decide") == 1
    assert len(verdict.gate.reasons) == 4
    assert "What was tried" not in (tmp_path / "report.md").read_text()
    assert "What was tried" not in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_the_most_sensitive_layer_left_in_float_makes_the_model_acceptable(checkpoints, image_folder, store, tmp_path):
    result, verdict, notes = run(checkpoints, image_folder, store, tmp_path, fallback={"float_layers": 3})
    assert result.accepted
    assert verdict.best.id == "max_float1-0"
    assert verdict.best.top1_percent == 100
    assert [candidate.id for candidate in verdict.candidates] == ["max-0", "max_float1-0"]
    tried = [reason for reason in verdict.gate.reasons if reason.startswith("Tried")]
    assert len(tried) == 1
    assert tried[0].startswith("Tried one layer left in float: gather (")
    assert any("max-0 was chosen first and rejected for its accuracy" in reason for reason in verdict.gate.reasons)
    assert stages(notes).count("collect_statistics") == 1
    latest = open_store(store).latest("networks.NeedsTwoMethods")
    assert latest["onnx_sha256"] == verdict.files["model_int8.onnx"].sha256
    report = (tmp_path / "report.md").read_text()
    assert "**What was tried before giving up**" in report
    assert "| Layers left in float | gather: left in float by choice |" in report


@pytest.mark.slow
def test_an_attempt_exists_for_the_chosen_trial_alone(checkpoints, image_folder, store, tmp_path):
    _, verdict, _ = run(checkpoints, image_folder, store, tmp_path, trials=2, fallback={"float_layers": 1})
    names = [(candidate.method, candidate.trial) for candidate in verdict.candidates]
    assert names == [("max", 0), ("max", 1), ("max_float1", verdict.best.trial)]
    (trials,) = [table for table in tables_of_verdict(verdict) if table.title.startswith("Top-1 of every candidate")]
    assert sorted(trials.rows[1]) == ["100.00 *", "max_float1", "n/a"]


@pytest.mark.slow
def test_a_run_with_a_fallback_is_cached_like_any_other(checkpoints, image_folder, store, tmp_path):
    run(checkpoints, image_folder, store, tmp_path, fallback={"float_layers": 3})
    _, _, notes = run(checkpoints, image_folder, store, tmp_path, fallback={"float_layers": 3})
    assert set(stages(notes)) >= {"rank_layers", "carry_amax", "summarize_attempts"}
    assert {note["cached"] for note in notes} == {True}


@pytest.mark.slow
def test_a_method_chosen_per_layer_makes_a_model_acceptable_that_no_single_method_does(
    checkpoints, image_folder, store, tmp_path
):
    methods = ("max", "percentile")
    rejected, _, _ = run(checkpoints, image_folder, store, tmp_path / "without", methods=methods)
    result, verdict, notes = run(
        checkpoints, image_folder, store, tmp_path / "with", methods=methods,
        fallback={"per_layer_method": True, "float_layers": 3, "qat_epochs": 1},
    )  # fmt: skip
    assert not rejected.accepted
    assert result.accepted
    assert verdict.best.id == "per_layer-0"
    assert verdict.best.top1_percent == 100
    assert not {"rank_layers", "fine_tune"} & set(stages(notes))
    assert any(reason.startswith("Tried the method chosen per layer: ") for reason in verdict.gate.reasons)


@pytest.mark.slow
def test_several_percentiles_are_methods_to_choose_from(checkpoints, image_folder, store, tmp_path):
    # Percentile 100 is max, percentile 90 is what the other layers need.
    result, verdict, _ = run(
        checkpoints, image_folder, store, tmp_path, methods=("percentile",), percentiles=(90.0, 100.0),
        fallback={"per_layer_method": True},
    )  # fmt: skip
    assert result.accepted
    assert [candidate.id for candidate in verdict.candidates] == ["percentile-90-0", "percentile-100-0", "per_layer-0"]
    (chosen,) = [reason for reason in verdict.gate.reasons if reason.startswith("Tried the method chosen per layer")]
    assert chosen.startswith("Tried the method chosen per layer: 4 percentile-100, 1 percentile-90. ")


@pytest.mark.slow
def test_weights_changed_by_qat_are_judged_delivered_and_named(checkpoints, image_folder, store, tmp_path):
    # FP32 is wrong on three classes of four: trained weights must be better by at least 20 pp.
    result, verdict, _ = run(
        checkpoints, image_folder, store, tmp_path, name="biased", max_drop_pp=-20,
        fallback={"qat_epochs": 10, "qat_learning_rate": 0.2},
    )  # fmt: skip
    assert result.accepted
    assert verdict.best.id == "max_qat-0"
    assert verdict.best.drop_pp <= -20
    assert {candidate.id: candidate.same_as for candidate in verdict.candidates} == {"max-0": "", "max_qat-0": ""}
    assert any("QAT, which changed the weights: 10 epochs on 32 images" in reason for reason in verdict.gate.reasons)
    assert "weights changed by QAT" in (tmp_path / "report.md").read_text()
    weights = load_file(tmp_path / "weights_qat.safetensors")
    assert weights.keys() == networks.NeedsTwoMethods().state_dict().keys()
    assert weights["fc.bias"][0] < 10
    # The graph that was judged is the one that was trained: no bias corrected for the old weights got into it.
    graph = onnx.load(tmp_path / "model_int8.onnx").graph
    (bias,) = [numpy_helper.to_array(t) for t in graph.initializer if t.name == "fc.bias"]
    assert bias.tolist() == weights["fc.bias"].tolist()
    assert verdict.files["weights_qat.safetensors"].size_bytes == (tmp_path / "weights_qat.safetensors").stat().st_size


@pytest.mark.slow
def test_if_nothing_is_accepted_the_first_candidate_stays_and_every_attempt_is_named(
    checkpoints, image_folder, store, tmp_path
):
    result, verdict, _ = run(
        checkpoints, image_folder, store, tmp_path, methods=("max", "percentile"), max_drop_pp=-100,
        fallback={"per_layer_method": True, "float_layers": 3, "qat_epochs": 1},
    )  # fmt: skip
    assert not result.accepted
    assert verdict.best.id in {"max-0", "percentile-0"}
    assert {candidate.id for candidate in verdict.candidates} == {"max-0", "percentile-0"}
    tried = [reason for reason in result.reasons if reason.startswith("Tried")]
    assert [reason.split()[1] for reason in tried] == ["the", "one", "2", "3", "QAT,"]
    assert all("is rejected: The top-1 drop is" in reason for reason in tried)
    assert not result.reasons[0].startswith("Tried")
    report = (tmp_path / "report.html").read_text()
    assert "What was tried before giving up" in report
    assert report.count(">per_layer-0<") == 1


@pytest.mark.slow
def test_a_model_rejected_for_its_speed_is_not_tried_again(checkpoints, image_folder, store, tmp_path):
    result, _, notes = run(
        checkpoints, image_folder, store, tmp_path, min_speedup_fp32=1000.0,
        fallback={"float_layers": 3, "qat_epochs": 1},
    )  # fmt: skip
    assert not result.accepted
    assert not FALLBACK_STAGES & set(stages(notes))


def with_pools(run, pools):
    quantization = run.config.quantization.model_copy(update={"pools": pools})
    return replace(run, config=run.config.model_copy(update={"quantization": quantization}))


@flow
def carry(config, *, pools_before):
    """Carry the amax of max from a model with or without quantized pools over to one with them."""
    identity = resolve_engine(config.engine)
    run = RunContext(config.output.store, "carry", config, identity, ("fp32", "int8"), selection_split="test")
    data = index_images(config.data.path, config.data.splits, run=run)
    draws = draw_calibration_images(data, run=run)
    before, after = (
        prepare_model(data.class_names, data.has_named_classes, run=with_pools(run, pools))
        for pools in (pools_before, True)
    )
    method = LabelledMethod(label="max", method="max")
    tables = [
        compute_amax(collect_statistics(model, draws, run=run).histograms, model, 0, method, run=run)
        for model in (before, after)
    ]
    carried = carry_amax(before, after, tables[0], draws, LabelledMethod(label="max_float1", method="max"), run=run)
    return before.plan.sha256 == after.plan.sha256, tables[1], carried


@pytest.mark.parametrize("pools_before", [True, False], ids=["same quantizers", "a quantizer more"])
def test_a_table_carried_over_is_the_one_that_would_be_collected(
    checkpoints, image_folder, store, tmp_path, pools_before
):
    config = config_of(checkpoints, image_folder, store, tmp_path)
    is_same_plan, expected, carried = carry(config, pools_before=pools_before)
    assert is_same_plan == pools_before
    assert carried.method == "max_float1"
    assert carried.table == expected.table

"""Are nights kept as they were, and read in order and in bounds?"""

import logging
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest

from ptq.errors import UsageError
from ptq.records.base import ArtifactRef, to_jsonable
from ptq.records.benchmark import BenchmarkRecord, Measurement
from ptq.records.data import PreparedImages
from ptq.records.decision import GateDecision, RunResult
from ptq.records.graph import EngineIdentity
from ptq.records.verdict import (
    Verdict,
    VerdictBaseline,
    VerdictBest,
    VerdictCandidate,
    VerdictEngine,
    VerdictGraphChecks,
    VerdictInt8,
    VerdictLatency,
    VerdictMeasurement,
)
from ptq.service.nightly_results import (
    Night,
    NightFindings,
    NightLatency,
    keep_nightly_result,
    night_of_run,
    read_nights,
)
from ptq.storage.store import StageEntry

FOUND = NightFindings(
    version="62c0b78d59277ce1", is_new=True, fp32_top1_percent=98.0, top1_percent=97.5, drop_pp=0.5,
    drop_interval_pp=(-0.1, 1.1), test_images=400, latencies=(NightLatency(1, 0.5, 1.5), NightLatency(32, 9.0, None)),
    engine="openvino 2026.4 on a CPU", machine="a CPU, 2 cores",
)  # fmt: skip
NIGHT = Night(
    started_at="2026-11-24T02:00:00+00:00", model="digits", run_id="wise-owl", decision="accept", reason="",
    seconds=61.5, stages=30, cached_stages=12, images_decoded=112, found=FOUND,
)  # fmt: skip
IN_BERLIN = timezone(timedelta(hours=1))


def measurement(precision, batch_size, median_ms):
    return Measurement(
        precision=precision, batch_size=batch_size, samples_ms=(median_ms,), median_ms=median_ms, mean_ms=median_ms,
        p90_ms=median_ms, p95_ms=median_ms, p99_ms=median_ms, throughput_images_per_s=1.0,
        rounds_median_ms=(median_ms,),
    )  # fmt: skip


def benchmark_on(machine, *measurements):
    identity = EngineIdentity(name="openvino", version="2026.4", device="a CPU", threads=2)
    return BenchmarkRecord(engine=identity, machine=machine, clock_mhz=None, measurements=measurements, warnings=())


MEASURED = benchmark_on("a CPU, 2 cores", measurement("fp32", 1, 1.5), measurement("int8", 1, 0.5))


def result_of(store, *, decision="accept", reasons=("the drop is small",), benchmark=MEASURED):
    """What a run returns whose verdict holds these medians."""
    verdict = Verdict(
        run_id="wise-owl", model="resnet18", checkpoint_sha256="c", config_sha256="c",
        engine=VerdictEngine(name="openvino", version="2026.4", device="a CPU"),
        fp32=VerdictBaseline(top1_percent=98.0, n_images=400, loss=0.1),
        candidates=(VerdictCandidate(id="max-0", trial=0, method="max", top1_percent=97.5, drop_pp=0.5, loss=0.1),),
        best=VerdictBest(
            id="max-0", method="max", trial=0, top1_percent=97.5, drop_pp=0.5, drop_interval_pp=(-0.1, 1.1),
            mcnemar_p=0.5, flipped_images=2,
        ),
        benchmark=tuple(
            VerdictMeasurement(
                precision=each.precision, batch_size=each.batch_size, images_per_s=1.0,
                latency_ms=VerdictLatency(median=each.median_ms, p90=1.0, p99=1.0),
            )
            for each in benchmark.measurements
        ),
        int8=VerdictInt8(conv_int8_input_percent=100.0, conv_int8_output_percent=100.0, reformats=0),
        graph_checks=VerdictGraphChecks(errors=0, warnings=0), gate=GateDecision(accepted=True, reasons=()),
        files={}, versions={}, stage_seconds={},
    )  # fmt: skip
    return RunResult(
        run_id="wise-owl", accepted=decision == "accept", reasons=reasons, output_directory="out",
        verdict=store.put_bytes(verdict.model_dump_json(by_alias=True).encode(), "verdict.json"), model="digits",
        version="62c0b78d59277ce1", decision=decision, sentence="", top1_percent=97.5, drop_pp=0.5,
        is_new=decision == "accept",
    )  # fmt: skip


def note_stage(store, stage, record, *, cached, key="0"):
    entry = StageEntry(stage, 64 * key, to_jsonable(record), 1.0, 0.0)
    store.write_stage(entry)
    store.note_stage("wise-owl", entry, cached=cached)


def images(store, count):
    ref = store.put_bytes(b"pixels", "pixels.npy")
    return PreparedImages(pixels=ref, labels=ref, images=count, sha256_of_files=ref)


def night(store, result, **changes):
    started = datetime(2026, 11, 24, 3, 0, tzinfo=IN_BERLIN)
    named = {"run_id": "wise-owl", "started_at": started, "seconds": 61.52, "result": result, **changes}
    return night_of_run(store, "digits", **named)


def test_a_noted_night_is_read_as_it_was(store):
    keep_nightly_result(store, NIGHT)
    assert read_nights(store, "digits") == [NIGHT]


def test_nights_are_read_oldest_first_and_no_more_than_asked(store):
    for count in range(5):
        keep_nightly_result(store, replace(NIGHT, images_decoded=count))
    assert [found.images_decoded for found in read_nights(store, "digits", last=3)] == [2, 3, 4]
    assert [found.images_decoded for found in read_nights(store, "digits")] == [0, 1, 2, 3, 4]


def test_no_more_documents_are_read_than_asked(folder, monkeypatch):
    for _ in range(5):
        keep_nightly_result(folder, NIGHT)
    read, names = folder.backend.read, []
    monkeypatch.setattr(folder.backend, "read", lambda name: names.append(name) or read(name))
    read_nights(folder, "digits", last=2)
    assert len(names) == 2


def test_the_same_night_noted_twice_is_two_documents(store):
    keep_nightly_result(store, NIGHT)
    keep_nightly_result(store, NIGHT)
    assert len(list(store.backend.entries("nights/digits/"))) == 2


def test_a_model_has_its_own_nights(store):
    keep_nightly_result(store, NIGHT)
    keep_nightly_result(store, replace(NIGHT, model="digits-2"))
    assert [found.model for found in read_nights(store, "digits")] == ["digits"]
    assert read_nights(store, "digit") == []


def test_a_damaged_night_is_left_out_and_in_its_place(store):
    keep_nightly_result(store, NIGHT)
    keep_nightly_result(store, replace(NIGHT, images_decoded=7))
    first = next(store.backend.entries("nights/digits/")).name
    store.backend.write(first, store.backend.read(first)[0].replace(b"112", b"113"))
    assert [found.images_decoded for found in read_nights(store, "digits")] == [7]
    assert store.backend.entry(first) is not None


def test_a_night_of_another_shape_is_left_out_with_a_warning(folder, caplog):
    folder.append("nights", "digits", {"model": "digits"})
    keep_nightly_result(folder, NIGHT)
    with caplog.at_level(logging.WARNING):
        assert read_nights(folder, "digits") == [NIGHT]
    assert "A night of digits in " in caplog.text


def test_a_name_that_leaves_its_folder_is_refused(folder):
    with pytest.raises(UsageError, match=r"'\.\./models' cannot be a name in a store"):
        folder.append("nights", "../models", {})


def test_a_night_tells_what_its_run_found(folder):
    note_stage(folder, "benchmark", MEASURED, cached=False)
    found = night(folder, result_of(folder))
    assert found == replace(
        NIGHT, stages=1, cached_stages=0, images_decoded=0,
        found=replace(FOUND, latencies=(NightLatency(1, 0.5, 1.5),), machine="a CPU, 2 cores, threads: 2"),
    )  # fmt: skip


def test_only_images_that_were_not_in_the_store_count_as_decoded(folder):
    note_stage(folder, "prepare_split", images(folder, 40), cached=False, key="1")
    note_stage(folder, "prepare_split", images(folder, 500), cached=True, key="2")
    note_stage(folder, "draw_calibration_images", {"prepared": to_jsonable(images(folder, 32))}, cached=False)
    found = night(folder, result_of(folder))
    assert (found.stages, found.cached_stages, found.images_decoded) == (3, 1, 72)


def test_the_machine_is_the_one_on_which_the_medians_of_the_verdict_were_measured(folder):
    other = benchmark_on("another CPU", measurement("fp32", 1, 1.4), measurement("int8", 1, 0.4))
    note_stage(folder, "benchmark", other, cached=False, key="1")
    note_stage(folder, "benchmark", MEASURED, cached=True, key="2")
    assert night(folder, result_of(folder)).found.machine == "a CPU, 2 cores, threads: 2"
    assert night(folder, result_of(folder, benchmark=other)).found.machine == "another CPU, threads: 2"


def test_a_benchmark_that_is_gone_leaves_the_machine_unknown(folder):
    found = night(folder, result_of(folder)).found
    assert (found.machine, found.latencies) == ("unknown machine", (NightLatency(1, 0.5, 1.5),))


def test_a_rejected_night_has_the_first_reason(folder):
    found = night(folder, result_of(folder, decision="regress", reasons=("it is worse", "by 3 pp")))
    assert (found.decision, found.reason, found.found.is_new) == ("regress", "it is worse", False)


def test_a_failed_night_has_the_first_line_of_its_error_and_what_was_done(folder):
    note_stage(folder, "index_images", ArtifactRef("a", "0" * 64, 1), cached=True)
    found = night(folder, None, error="CheckpointError: it is cut off\nTraceback")
    assert (found.decision, found.reason, found.found) == ("failed", "CheckpointError: it is cut off", None)
    assert (found.stages, found.cached_stages, found.seconds) == (1, 1, 61.5)

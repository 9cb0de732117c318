from pathlib import Path

import pytest

from ptq.engines.trtexec import command_line, cross_checks, disagreements, parse_output
from ptq.errors import EngineBuildError
from ptq.numerics.latency import summarize
from ptq.records.benchmark import CrossCheck

# In the format that the program's own sources print; the numbers are made up.
PRINTED = """\
&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] # trtexec --loadEngine=a.engine
[07/01/2025-10:00:00] [I] === Performance summary ===
[07/01/2025-10:00:00] [I] Throughput: 1875.25 qps
[07/01/2025-10:00:00] [I] Latency: min = 0.55 ms, max = 0.75 ms, mean = 0.6 ms, median = 0.59 ms, \
percentile(90%) = 0.62 ms, percentile(95%) = 0.64 ms, percentile(99%) = 0.7 ms
[07/01/2025-10:00:00] [I] Enqueue Time: min = 0.002 ms, max = 0.02 ms, mean = 0.003 ms, median = 0.0025 ms, \
percentile(90%) = 0.004 ms, percentile(95%) = 0.005 ms, percentile(99%) = 0.01 ms
[07/01/2025-10:00:00] [I] H2D Latency: min = 0 ms, max = 0 ms, mean = 0 ms, median = 0 ms, \
percentile(90%) = 0 ms, percentile(95%) = 0 ms, percentile(99%) = 0 ms
[07/01/2025-10:00:00] [I] GPU Compute Time: min = 0.5 ms, max = 0.7 ms, mean = 0.53 ms, median = 0.525 ms, \
percentile(90%) = 0.55 ms, percentile(95%) = 0.56 ms, percentile(99%) = 0.61 ms
[07/01/2025-10:00:00] [I] Total Host Walltime: 3.002 s
[07/01/2025-10:00:00] [W] * GPU compute time is unstable, with coefficient of variance = 3.1%.
[07/01/2025-10:00:00] [I] Explanations of the performance metrics are printed in the verbose logs.
&&&& PASSED TensorRT.trtexec
"""
COMMON = ("trtexec", "--loadEngine=a.engine", "--warmUp=200", "--duration=3", "--iterations=10")


def command(version, *, transfers):
    return command_line(
        Path("a.engine"), version=version, warmup_ms=200.0, duration_s=3.0, transfers=transfers, program="trtexec"
    )


@pytest.mark.parametrize("version", [(8, 6), (10, 16), (11, 4)])
def test_compute_alone_is_asked_for_by_the_same_options_in_every_generation(version):
    assert command(version, transfers=False) == (
        *COMMON, "--percentile=90,95,99", "--noDataTransfers", "--useSpinWait", "--useCudaGraph"
    )  # fmt: skip


@pytest.mark.parametrize("version", [(8, 6), (10, 16)])
def test_transfers_are_the_default_before_11(version):
    assert command(version, transfers=True) == (*COMMON, "--percentile=90,95,99")


def test_transfers_are_asked_for_from_11_on():
    assert command((11, 4), transfers=True)[-2:] == ("--includeDataTransfers", "--noCudaGraph")


@pytest.mark.parametrize("version", [(8, 6), (10, 16), (11, 4)])
@pytest.mark.parametrize("transfers", [True, False])
def test_no_command_has_an_option_that_some_generation_has_lost(version, transfers):
    gone = ("--workspace", "--fp16", "--int8", "--best", "--bf16", "--fp8", "--calib")
    assert not [option for option in command(version, transfers=transfers) if option.startswith(gone)]


@pytest.mark.parametrize("version", ["8600", "101600", "110400"])
def test_the_performance_summary_is_read(version):
    found = parse_output(PRINTED.format(version=version))
    assert found.compute.median_ms == 0.525
    assert found.compute.percentiles_ms == {90.0: 0.55, 95.0: 0.56, 99.0: 0.61}
    assert (found.compute.min_ms, found.compute.max_ms, found.compute.mean_ms) == (0.5, 0.7, 0.53)
    assert found.latency is not None
    assert found.latency.median_ms == 0.59
    assert found.enqueue is not None
    assert found.enqueue.median_ms == 0.0025
    assert found.throughput_queries_per_s == 1875.25
    assert found.warnings == ("* GPU compute time is unstable, with coefficient of variance = 3.1%.",)


@pytest.mark.parametrize("text", ["", "[E] Error loading engine\n&&&& FAILED TensorRT.trtexec"])
def test_output_without_a_summary_is_an_error_with_its_last_line(text):
    with pytest.raises(EngineBuildError, match="without a GPU compute time and a throughput"):
        parse_output(text)


def program_that_prints(text, folder):
    """A program called trtexec that prints `text` and keeps its arguments."""
    (folder / "printed.txt").write_text(text)
    path = folder / "trtexec"
    path.write_text(f'#!/bin/sh\necho "$@" > {folder}/arguments.txt\ncat {folder}/printed.txt\n')
    path.chmod(0o755)
    return path


def test_the_program_on_the_path_is_run_and_its_median_stands_beside_our_own(tmp_path, monkeypatch):
    program_that_prints(PRINTED.format(version="8600"), tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    own = summarize("int8", 8, [[0.5]])
    (check,) = cross_checks([(tmp_path / "a.engine", own)], version="8.6.0", warmup_ms=200.0, duration_s=3.0)
    assert (check.precision, check.batch_size, check.trtexec_median_ms, check.own_median_ms) == ("int8", 8, 0.525, 0.5)
    assert "--useCudaGraph" in (tmp_path / "arguments.txt").read_text()


def test_a_program_that_fails_costs_no_benchmark(tmp_path, monkeypatch):
    program_that_prints("&&&& FAILED", tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    own = summarize("int8", 8, [[0.5]])
    assert cross_checks([(tmp_path / "a.engine", own)], version="8.6.0", warmup_ms=1.0, duration_s=1.0) == ()


def test_without_the_program_there_is_no_cross_check(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    own = summarize("int8", 8, [[0.5]])
    assert cross_checks([(tmp_path / "a.engine", own)], version="8.6.0", warmup_ms=1.0, duration_s=1.0) == ()


@pytest.mark.parametrize(("own_ms", "count"), [(1.04, 0), (0.96, 0), (1.06, 1), (0.94, 1)])
def test_medians_more_than_five_percent_apart_are_named(own_ms, count):
    found = disagreements([CrossCheck("int8", 1, 1.0, own_ms, "trtexec --loadEngine=a")])
    assert len(found) == count
    assert all("repeat: trtexec --loadEngine=a" in sentence for sentence in found)

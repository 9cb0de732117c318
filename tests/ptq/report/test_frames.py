"""Do the tables of a run as Parquet hold a row per candidate and every sample?"""

import dataclasses

import pytest
from report_inputs import benchmark, make_inputs, selection

from ptq.report.frames import benchmark_table, results_table


def test_a_chosen_candidate_that_shares_a_table_is_found_under_the_other_name():
    chosen = selection(candidate="max-2", trial=2, method="max")
    table = results_table(make_inputs(selection=chosen))
    assert table.filter(table["chosen"])["sqnr_db"].to_list() == [12.0]


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

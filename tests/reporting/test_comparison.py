"""Rows and pages of a comparison with rivals."""

from dataclasses import replace

import pytest

from offramp.reporting.comparison import About, Candidate, absences, compare, page, rows_of, table_cells

SCORES = [[0.2, 0.8], [0.6, 0.4], [0.9, 0.1]]


def result(*latencies, scores=SCORES, peak=100 << 20, **more):
    figures = {"peak_rss_bytes": peak, "bytes_read_per_input": 10.0, "scores": scores, **more}
    return {"latencies_seconds": list(latencies), **figures}


def candidate(name, *results, precision="fp32", **more):
    records = [{"round": number, "result": each} for number, each in enumerate(results)]
    return Candidate(name, precision, {}, records, **more)


def test_ratios_are_paired_within_rounds():
    seconds = (2.0, 4.0, 2.0, 1.0)
    first = candidate("transformers", result(1.0, 1.0, 4.0), *map(result, seconds))
    other = candidate("b", result(0.5), result(1.0, peak=200 << 20), *(result(each / 2) for each in seconds[1:]))
    one, two = rows_of([first, other])
    assert (one.ratio, one.latency_seconds_median, one.rounds) == (1.0, 2.0, 5)
    assert (two.ratio, two.ratio_low, two.ratio_high) == (0.5, 0.5, 0.5), "also where rounds differ fourfold"
    assert two.peak_rss_bytes == 200 << 20
    for records in (other.records[1:2], other.records[:4]):
        missing = rows_of([first, replace(other, records=records)])[1]
        assert (missing.ratio, missing.ratio_low) == (0.5, None), "few rounds have no interval"


def test_another_model_has_no_figures():
    good = candidate("transformers", result(1.0))
    wrong = [[0.8, 0.2], [0.4, 0.6], [0.1, 0.9]]
    near = [[0.19, 0.81], [0.6, 0.4], [0.9, 0.1]]
    rows = rows_of(
        [
            good,
            candidate("int8", result(1.0, scores=near), precision="int8"),
            candidate("fp32", result(1.0, scores=near)),
            candidate("wrong", result(1.0, scores=wrong), precision="int8"),
            candidate("shape", result(1.0, scores=[[1.0]]), precision="int8"),
        ]
    )
    assert rows[1].reason is None and rows[1].difference == pytest.approx(0.0125)
    for row in rows[2:]:
        assert row.latency_seconds_median is None and "its answers differ from those of transformers" in row.reason
    assert "0 % equal labels" in rows[3].reason


def test_the_precision_is_that_which_was_used():
    reference, other = candidate("a", result(1.0)), candidate("b", result(1.0, precision="fp32"), precision="bf16")
    assert [row.precision for row in rows_of([reference, other])] == ["fp32", "fp32"]


def test_a_comparison_without_float32_has_no_reference():
    row = rows_of([candidate("a", result(1.0), precision="int8")])[0]
    assert (row.difference, row.same_labels, row.reason, row.ratio) == (None, None, None, 1.0)
    assert "-" in table_cells([row], None)[1][0]


def test_equal_scores_have_a_range():
    assert compare([[1.0]], [[1.0]]) == (0.0, 1.0)
    assert compare([[1.0, 0.0]], [[1.0]]) == (float("inf"), 0.0)


def test_failures_have_their_reason():
    rows = rows_of(
        [
            Candidate("absent", "fp32", {}, reason="x is not installed"),
            Candidate("crashed", "fp32", {}, [{"round": 0, "failed": "exit 1"}]),
            Candidate("new", "fp32", {}),
        ]
    )
    assert absences(rows) == ["absent: x is not installed", "crashed: exit 1", "new: not measured yet"]


def test_the_memory_group_has_a_column():
    killed = candidate("a", result(1.0))
    killed = replace(killed, records=[*killed.records, {"round": None, "failed": "killed by signal 9", "killed": 1}])
    done = candidate("b", result(1.0))
    done = replace(done, records=[*done.records, {"round": None, "result": result(0.25), "hits": 1234, "killed": 0}])
    refused = Candidate(
        "c", "fp32", {}, [{"round": 0, "failed": "no"}, {"round": None, "failed": "too small", "hits": 0}]
    )
    head, cells = table_cells(rows_of([killed, done, refused]), "128 MiB")
    assert head[-1] == "in a group of 128 MiB"
    assert [row[-1] for row in cells] == ["killed", "finished 250.0 ms, 1,234 limit hits", "too small, 0 limit hits"]


def test_names_do_not_break_the_page():
    rows = rows_of([candidate("a|b`<script>", result(1.0)), Candidate("c", "fp32", {}, reason="<b>|")])
    facts = {"total_memory_bytes": 1 << 30, "library_versions": {}, "python_version": "3", "cpu_model": "x"}
    facts |= {"num_cores": 2, "platform": "Linux", "kernel": "6", "offramp_version": "0"}
    text = page(rows, About("offramp bench", "2026-01-01", "BERT", facts, ("avx2",), 2, "128 MiB", 60.0))
    assert "<script>" not in text and "a\\|b'&lt;script>" in text and "- c: &lt;b>\\|" in text
    assert "In a memory cgroup of 128 MiB" in text and "1.00 min" not in text and "to finish" in text


def test_ratios_are_to_a_run_whose_answers_count():
    wrong = candidate(
        "transformers-bf16", *(result(1.0, scores=[[9.0, -9.0]] * len(SCORES)) for _ in range(5)), precision="bf16"
    )
    good, other = (
        candidate(name, *map(result, [seconds] * 5)) for name, seconds in (("transformers", 2.0), ("b", 1.0))
    )
    rows = rows_of([wrong, good, other])
    assert [row.ratio for row in rows] == [None, 1.0, 0.5] and "answers differ" in rows[0].reason
    assert "of transformers [95 %]" in table_cells(rows, None)[0]

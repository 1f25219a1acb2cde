"""`bench` on labelled texts: every rival in a process of its own, with the scores that the models have."""

import json

import pytest

import offramp
from offramp.experiments.task_bench import Measured
from tests.cli.conftest import NUM_LAYERS, WORDS, write_tiny

TEXTS = [f"the {one} {other}" for one in WORDS for other in WORDS]
NUM_ROWS = 12
QUICK = ("--rows", NUM_ROWS, "--repeat", 1, "--threads", 1)
POLICY = "confidence:0.9"


def answers(store, exit, texts):
    with offramp.load(store, exit=exit) as classifier:
        return [(result.label, result.exit_stage) for result in classifier.predict(texts)]


@pytest.fixture(scope="module")
def dev(store, tmp_path_factory):
    """A table whose labels are what the whole model answers."""
    path = tmp_path_factory.mktemp("dev") / "dev.tsv"
    rows = [f"{text}\t{label}\n" for text, (label, _) in zip(TEXTS, answers(store, "none", TEXTS), strict=True)]
    path.write_text("body\tkind\n" + "".join(rows))
    return path


@pytest.fixture
def named(dev):
    return ("--dev", dev, "--text-column", "body", "--label-column", "kind")


def test_rivals_are_measured_on_the_same_texts_and_scored(run, store, named):
    said = run("bench", store, *named, *QUICK, "--exit", POLICY, "--budget", "2GiB", "--json")
    assert said.code == 0, said.err
    *rows, last = said.lines
    texts = [TEXTS[index * len(TEXTS) // NUM_ROWS] for index in range(NUM_ROWS)]
    truth = answers(store, "none", texts)
    by_exit = {(row["exit"], row["batch"]): row for row in rows}
    stages = [(f"stage:{number}", 1) for number in range(1, NUM_LAYERS)]
    assert list(by_exit) == [*((exit, batch) for exit in ("none", POLICY) for batch in (1, 8, "bulk")), *stages]
    for (exit, _), row in by_exit.items():
        found = answers(store, exit, texts)
        right = sum(label == true for (label, _), (true, _) in zip(found, truth, strict=True))
        assert row["scores"]["accuracy"] == pytest.approx(100 * right / NUM_ROWS)
        assert row["mean_exit"] == pytest.approx(sum(stage for _, stage in found) / NUM_ROWS)
        assert row["layer_count_speedup"] == pytest.approx(NUM_LAYERS / row["mean_exit"])
        assert 0 < row["peak_rss_bytes"] <= 2 << 30
        assert row["latency_seconds_p50"] <= row["latency_seconds_p90"] <= row["latency_seconds_p99"]
        assert (row["speedup"] is None) == (exit == "none")
        if exit != "none":
            assert row["score_difference"] == pytest.approx(100 * right / NUM_ROWS - 100)
            assert (row["score_difference_low"], row["speedup_low"]) == (None, None), "one round"
    assert {row["paired_over"] for row in rows if row["batch"] == 8} == {"batches"}
    record = last["record"]
    assert (record["task"], record["split"], record["num_texts"], record["rounds"]) == ("dev", "dev", NUM_ROWS, 1)
    assert (record["training_rows"], record["includes_training_rows"]) == (None, False)
    assert (record["budget_bytes"], record["threads"], record["num_layers"]) == (2 << 30, 1, NUM_LAYERS)


@pytest.mark.parametrize(("rounds", "num_intervals"), [(1, 0), (4, 1), (5, 2)])
def test_intervals_are_printed_for_several_rounds_only(run, store, named, monkeypatch, rounds, num_intervals):
    """The score has one from two rounds on, as it is that of texts; the speed-up from five on."""
    gain, speedup = ((0.1, 9.9) if num_intervals > number else (None, None) for number in range(2))
    row = Measured("exits", POLICY, 1, 1, 0.1, 0.1, 0.1, 9.0, 1 << 20, 1.0, {"accuracy": 90.0, "score": 90.0}, -1.0,
                   *gain, 2.0, *speedup, "texts", 2.0, 2.0)  # fmt: skip
    facts = {"num_texts": 1, "split": "dev", "metrics": ["accuracy"], "backend": "ort", "threads": 1, "task": "dev"}
    record = {**facts, "budget_bytes": 1 << 30, "rounds": rounds, "includes_training_rows": False}
    monkeypatch.setattr("offramp.experiments.task_bench.bench_task", lambda *_: ([row], record))
    said = run("bench", store, *named, "--repeat", rounds)
    assert said.code == 0, said.err
    assert [said.out.count(text) for text in ("0.1", "[95 %]")] == [num_intervals] * 2
    assert ("speed-up [95 %]" in said.out) == (num_intervals == 2)
    assert ("bootstraps" in said.out, "one round has no intervals" in said.out) == (rounds > 1, rounds == 1)


def test_people_get_a_table(run, named, tmp_path):
    assert run("divide", write_tiny(tmp_path / "model", exits=False), tmp_path / "store").code == 0
    said = run("bench", tmp_path / "store", *named, *QUICK)
    assert said.code == 0, said.err
    heading, head, *rows = said.out.splitlines()
    assert heading.startswith(f"dev: {NUM_ROWS} rows of dev, accuracy in percent; ort, 1 threads, budget ")
    assert heading.endswith("medians of 1 rounds")
    assert "by layer count" in head
    assert [row.split()[:2] for row in rows[:3]] == [["plain", "1"], ["plain", "8"], ["plain", "bulk"]]
    assert rows[3].startswith("Latencies are per batch."), "without exits there is nothing to cut at"


def test_what_cannot_be_measured_is_told_before_anything_is(refused, store, named, dev, tmp_path):
    def stops(code, mentions, *words):
        assert "round" not in refused(code, mentions, "bench", *words).err

    stops(2, "labelled data and something else", store, *named, "--input", dev)
    stops(2, "labelled data and something else", store, "--task", "sst2", "--text", "a")
    stops(2, "both a task and a table", store, *named, "--task", "sst2")
    stops(2, "no data", store, "--data", tmp_path)
    stops(2, "no column 'sentence'", store, "--dev", dev, "--label-column", "kind")
    stops(2, "unknown split 'tune'", store, *named, "--split", "tune")
    stops(2, "several budgets", store, *named, "--budget", "1GiB,2GiB")
    stops(2, "--batch and --profile are for one batch size", store, *named, "--batch", 8)
    stops(2, "'hope' is not a rule", store, *named, "--exit", "hope")
    stops(2, "patience:9", store, *named, "--exit", "patience:9")
    stops(2, "max_length 999", store, *named, "--max-length", 999)
    stops(3, "budget of 1.00 MiB", store, *named, "--budget", "1MiB")
    other = tmp_path / "other.tsv"
    other.write_text("sentence\tlabel\nthe bank\tham\nthe film\tspam\n")
    stops(2, "label 'ham' is none of business, film, sport", store, "--dev", other)


def test_a_store_without_exits_has_no_policy_to_measure(run, refused, named, tmp_path):
    run("divide", write_tiny(tmp_path / "model", exits=False), tmp_path / "store")
    said = refused(2, "this store has none", "bench", tmp_path / "store", *named, "--exit", POLICY)
    assert "round" not in said.err
    assert json.loads((tmp_path / "store" / "offramp.json").read_text())["exits"] is None

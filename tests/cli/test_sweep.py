"""`offramp sweep` on a real model: prerequisites, figures, and what a dry run tells."""

import json

import pytest

from offramp.experiments.results import read_results
from tests.cli.conftest import WORDS
from tests.cli.test_bench_task import answers

TEXTS = [f"the {one} {other} {third}" for one in WORDS for other in WORDS for third in WORDS[:3]]
RECIPE = """
from offramp.experiments import Grid
def recipe():
    of = dict(model="model", train="data.tsv", rows=8, rounds=1, threads=1)
    return [Grid(exit=["none", "oracle", "random:patience:1"], **of), Grid(exit="none", budget="9MiB", **of),
            Grid(model="model", passes=2, rounds=1, threads=1, trace=True, slots=1, residency="prefix")]
"""


@pytest.fixture
def place(model, store, tmp_path, monkeypatch):
    """A folder with a model, labelled data and a recipe."""
    rows = [f"{text}\t{label}\n" for text, (label, _) in zip(TEXTS, answers(store, "none", TEXTS), strict=True)]
    (tmp_path / "data.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "recipe.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_recipe_becomes_records_and_is_not_run_twice(run, place):
    said = run("sweep", "recipe.py", "--out", "out", "--dry-run")
    assert said.code == 0, said.err
    for what in (
        "divide-",
        "sample-",
        "transcript-",
        "exits-",
        "exit=oracle",
        "5 jobs to run",
        "no records to estimate",
    ):
        assert what in said.out
    assert not (place / "out").exists()
    said = run("sweep", "recipe.py", "--out", "out", "--json")
    assert said.code == 0, said.err
    assert said.lines == [{"out": "out", "jobs": 5, "recorded_before": 0, "left": 0}]
    found = {}
    for record in read_results(place / "out", print):
        engine = record["experiment"]["engine"]
        found[engine["budget"] or (record["samples"].get("spans") and "traced") or engine["exit"]] = record
    traced = found["traced"]
    assert traced["samples"]["memory"] and traced["samples"]["spans"] and "score" not in traced["figures"]
    full, oracle, shuffled, small = found["none"], found["oracle"], found["random:patience:1"], found[9 << 20]
    assert full["figures"]["score"] == oracle["figures"]["score"] == 100.0
    assert full["figures"]["mean_exit"] == 4 > oracle["figures"]["mean_exit"] >= 1
    assert 1 <= shuffled["figures"]["mean_exit"] <= 4 and shuffled["run"]["exit"] == "random:patience:1"
    assert small["status"] == "failed" and small["reason"]["kind"] == "memory" and "9.00 MiB" in small["reason"]["what"]
    for record in (full, oracle, shuffled):
        assert record["figures"]["memory"] == record["run"]["peak_rss_bytes"] > 0
        assert len(record["samples"]["latencies"]) == len(record["samples"]["truth"]) == 8
        assert record["environment"]["num_cores"] >= 1 and "caches" in record["environment"]
        assert set(record["inputs"]) == {"model", "data", "files"} and record["inputs"]["data"]
    made = sorted(path.name.partition("-")[0] for path in (place / "out" / "made").iterdir())
    assert made == ["divide", "exits", "exits", "sample", "transcript"], "each once"
    said = run("sweep", "recipe.py", "--out", "out", "--only", "exit=oracle", "--dry-run", "--json")
    assert said.lines == [{"make": [], "jobs": [], "seconds": 0}]


def test_a_store_is_measured_as_it_is(run, place, store):
    """The rows of the sample, the labels of the data, and nothing is made but the sample."""
    (place / "store").symlink_to(store)
    (place / "recipe.py").write_text(
        "from offramp.experiments import Grid\n"
        "def recipe():\n    return Grid(model='store', train='data.tsv', rows=8, rounds=1, threads=1, slots=1)\n"
    )
    said = run("sweep", "recipe.py", "--out", "out")
    assert said.code == 0 and "1/1" in said.err
    (record,) = read_results(place / "out", print)
    assert (record["figures"]["score"], record["figures"]["mean_exit"], record["run"]["num_slots"]) == (100.0, 4.0, 0)
    assert [path.name.partition("-")[0] for path in (place / "out" / "made").iterdir()] == ["sample"]


def test_what_is_not_there_is_an_error_and_no_record(run, refused, place):
    (place / "other.py").write_text(RECIPE.replace('model="model"', 'model="modle"'))
    refused(2, "modle", "sweep", "other.py", "--out", "out")
    refused(2, "no experiment is left", "sweep", "recipe.py", "--out", "out", "--only", "exit=votes:3")
    refused(2, "no such recipe", "sweep", "none.py", "--out", "out")
    refused(2, "needs TLS", "sweep", "recipe.py", "--out", "out", "--scheduler", "tcp://far:8786")
    assert json.loads((place / "out" / "results.json").read_text()) == {"format": 1}

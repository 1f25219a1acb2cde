"""`offramp sweep` on a real model: prerequisites, figures, and what a dry run tells."""

import csv
import json
import os
import re
import sys
import threading

import pytest

from offramp.experiments.results import read_results
from tests import newcomer
from tests.cli.conftest import WORDS, write_tiny
from tests.cli.test_bench_task import answers
from tests.experiments.conftest import in_process  # noqa: F401  # a fixture

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
    assert said.lines == [{"out": "out", "jobs": 5, "recorded_before": 0, "left": 0, "failed": 1, "failed_before": 0}]
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
        known = {"model", "data", "files", "source", "precision"}
        assert set(record["inputs"]) == known and record["inputs"]["data"]
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


def test_a_policy_of_ones_own_is_a_point_of_the_pareto_plot(run, place, store, in_process):  # noqa: F811
    """The class that the README shows. A dry run says what its estimate is without."""
    (place / "my_policy.py").write_text(newcomer._shown("offramp.policies"))
    (place / "store").symlink_to(store)
    recipe = (
        "from offramp.experiments import Grid\n"
        "def recipe():\n    exits = ['none', 'stage:2', 'my_policy.py:Falling:0.95,0.05']\n"
        "    return Grid(model='store', train='data.tsv', exit=exits, rows=8, rounds=1, threads=1)\n"
    )
    (place / "recipe.py").write_text(recipe)
    said = run("sweep", "recipe.py", "--out", "out")
    assert said.code == 0 and not any(record.get("reason") for record in read_results(place / "out", print)), said.err
    assert run("report", "out", "--assets", "assets").code == 0
    (path,) = (place / "assets").glob("*score-and-latency.csv")
    rows = {row[0]: row[1:] for row in csv.reader(path.read_text().splitlines())}
    named = {name.removeprefix("exit "): row for name, row in rows.items()}
    own = named["my_policy.py:Falling:0.95,0.05"]
    assert {"none", "stage:2"} < named.keys() and len(named) == 1 + 3
    assert float(own[0]) > 0 and 0 <= float(own[3]) <= 100 and own[-1] in ("True", "False")
    for rows, steps in (("8", ""), ("4", " without what is to make first (1)")):
        (place / "recipe.py").write_text(recipe.replace("rows=8, rounds=1", f"rows={rows}, rounds=2"))
        last = run("sweep", "recipe.py", "--out", "out", "--dry-run").out.splitlines()[-1]
        assert re.fullmatch(rf"\d jobs to run, about [\d.]+ \w+{re.escape(steps)}; \d are recorded", last), last


def test_what_is_not_there_is_an_error_and_no_record(run, refused, place):
    (place / "other.py").write_text(RECIPE.replace('model="model"', 'model="modle"'))
    refused(2, "modle", "sweep", "other.py", "--out", "out")
    refused(2, "no experiment is left", "sweep", "recipe.py", "--out", "out", "--only", "exit=votes:3")
    refused(2, "no such recipe", "sweep", "none.py", "--out", "out")
    far = ("--scheduler", "tcp://far:8786")
    refused(2, "needs TLS", "sweep", "recipe.py", "--out", "out", *far)
    refused(2, "needs TLS", "sweep", "recipe.py", "--out", "none", *far, "--dry-run")
    (place / "tuned.py").write_text(RECIPE.replace('exit="none"', 'exit="tune:drop=1"'))
    near = ("--scheduler", "tcp://localhost:1", "--dry-run")
    refused(2, "tuned with the profile of one machine", "sweep", "tuned.py", "--out", "none", *near)
    assert json.loads((place / "out" / "results.json").read_text()) == {"format": 1}


FAILING = """
from offramp.experiments import Grid
def recipe():
    return Grid(model=["toy", "toy-refuses"], job="toy", rounds=2)
"""


def test_a_sweep_says_at_its_end_that_jobs_failed(run, tmp_path, monkeypatch, in_process):  # noqa: F811
    """A failure is a result, so that the exit code is 0; it must not look like a success."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.py").write_text(FAILING)
    said = run("sweep", "recipe.py", "--out", "out", "--only", "model=toy")
    assert said.err.splitlines()[-1] == "out: 2 jobs have run; 0 were recorded before"
    warning = (
        "offramp: warning: 2 of 4 jobs failed: this toy refuses (take another toy) - out - "
        "correct the cause and give --retry refused: failures are records, and are not run again without it"
    )
    for first in (
        "out: 2 jobs have run, 2 failed; 2 were recorded before",
        "out: 0 jobs have run; 4 were recorded before, 2 failed",
    ):
        said = run("sweep", "recipe.py", "--out", "out")
        assert said.code == 0 and said.err.splitlines()[-2:] == [first, warning]
    said = run("sweep", "recipe.py", "--out", "out", "--json")
    assert said.lines[0]["failed_before"] == 2 and said.lines[0]["failed"] == 0
    assert said.err.splitlines()[-1] == warning
    said = run("sweep", "recipe.py", "--out", "out", "--retry", "killed,timeout", "--dry-run", "--json")
    assert said.lines[0]["jobs"] == []
    said = run("sweep", "recipe.py", "--out", "out", "--retry", "killed,refused", "--dry-run")
    assert "2 jobs to run" in said.out and "2 are recorded" in said.out
    said = run("sweep", "recipe.py", "--out", "out", "--retry", "refused", "--json")
    facts = {"jobs": 2, "recorded_before": 2, "left": 0, "failed": 2, "failed_before": 0}
    assert said.lines[0] == {"out": "out", **facts} and said.err.splitlines()[-1] == warning
    said = run("sweep", "recipe.py", "--out", "out", "--retry", "broken")
    assert said.code == 2 and "unknown kind of failure 'broken'; known: killed, timeout" in said.err


HOSTILE = ["[bold]x", "[/] y"]
"""Names of models that are markup of rich."""


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(run, tmp_path, monkeypatch, in_process):  # noqa: F811
    """With the time left, and with names that stay text."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("TERM", "xterm"), ("COLUMNS", "100")):
        monkeypatch.setenv(name, value)
    (tmp_path / "recipe.py").write_text(FAILING.replace('["toy", "toy-refuses"]', str(HOSTILE)))
    ended = [rf"model={re.escape(name)}, round {number}: took" for name in HOSTILE for number in (1, 2)]
    lines = run("sweep", "recipe.py", "--out", "lines").err
    assert "0/4, ? left: 4 jobs" in lines and re.search(r"3/4, [\d.]+ \w+ left: model=", lines)
    assert "\n4/4: model=" in lines and all(re.search(each, lines) for each in ended)
    (reader, writer), shown = os.openpty(), []
    listener = threading.Thread(target=lambda: shown.extend(iter(lambda: read_terminal(reader), b"")))
    listener.start()
    with open(writer, "w", encoding="utf-8") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        assert run("sweep", "recipe.py", "--out", "bar").code == 0
    listener.join(30)
    os.close(reader)
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", b"".join(shown).decode())
    assert all(re.search(each, text) for each in ended) and re.search(r"[\d.]+ \w+ left [━╸╺]+", text)
    assert "75%" in text and "3/4" not in text


def read_terminal(fd):
    """What was printed; nothing after the last writer has closed the terminal."""
    try:
        return os.read(fd, 4096)
    except OSError:
        return b""


RIVALS = """
from offramp.experiments import Grid
def recipe():
    of = dict(model="model", train="data.tsv", rows=8, rounds=1, threads=1)
    lists = Grid(rival="lazy-layers", residency=["fifo", "lru", "mru"], resident_layers=[1, 3], **of)
    return [Grid(**of), Grid(rival=[{names}], **of), lists]
"""
NAMES = ["transformers", "transformers-bf16", "disk", "disk-offload", "onnxruntime", "onnxruntime-int8", "llama.cpp"]


@pytest.mark.slow
def test_rivals_are_jobs_beside_offramp(run, place, tmp_path):
    (place / "rivals.py").write_text(RIVALS.format(names=str(NAMES)[1:-1]))
    said = run("sweep", "rivals.py", "--out", "out")
    assert said.code == 0, said.err
    found = {}
    for record in read_results(place / "out", print):
        each = record["experiment"]
        found[each["rival"], each["engine"]["residency"], each["engine"]["resident_layers"]] = record
    assert len(found) == 1 + len(NAMES) + 6
    absent = found.pop(("llama.cpp", "planned", None))
    assert (absent["status"], absent["reason"]["kind"]) == ("failed", "absent")
    assert "xllamacpp is not installed" in absent["reason"]["what"] and "--rival" in absent["reason"]["remedy"]
    own = found[None, "planned", None]
    for (name, *_), record in found.items():
        assert record["status"] == "done", record["reason"]
        figures, about = record["figures"], record["run"]
        assert {"latency", "latency_p95", "memory", "score", "time_per_input", "mean_exit"} <= figures.keys()
        assert len(record["samples"]["latencies"]) == len(record["samples"]["answers"]) == 8
        assert ("bytes" in figures) == (name not in ("disk", "disk-offload"))
        if name is not None:
            assert about["rival"] == name and about["versions"] and record["environment"]["num_cores"]
        if name not in ("transformers-bf16", "onnxruntime-int8"):
            assert record["samples"]["answers"] == own["samples"]["answers"], name
    lists = {key[1:]: record["figures"]["bytes"] for key, record in found.items() if key[0] == "lazy-layers"}
    assert lists["mru", 3] < 0.7 * lists["fifo", 3] and lists["fifo", 3] == pytest.approx(lists["lru", 1], rel=0.1)
    said = run("sweep", "rivals.py", "--out", "out", "--dry-run", "--json")
    assert said.lines[0]["jobs"] == []


STRATEGIES = """
from offramp.experiments import Grid
def recipe():
    of = dict(model="wide", passes=2, rounds=1, threads=1, max_length=16, resident_layers=2)
    return [Grid(reads=["mapped", "buffered", "direct"], slots=[1, 2, 3], **of),
            Grid(residency=["planned", "prefix", "even"], prefetch=[True, False], **of),
            Grid(residency=["fifo", "lru", "mru"], reads=["buffered", "direct"], **of),
            Grid(model="wide", budget="resident", passes=2, rounds=1, threads=1, max_length=16)]
"""


@pytest.mark.slow
def test_every_loading_strategy_is_an_option_of_a_recipe(run, tmp_path, monkeypatch):
    """Layers of 3 MiB, so that they are streamed; four layers, two of which are in memory at once."""
    write_tiny(tmp_path / "wide", exits=False, hidden_size=256, intermediate_size=1024, num_attention_heads=4)
    (tmp_path / "recipe.py").write_text(STRATEGIES)
    monkeypatch.chdir(tmp_path)
    said = run("sweep", "recipe.py", "--out", "out")
    assert said.code == 0, said.err
    found = {}
    for record in read_results(tmp_path / "out", print):
        assert record["status"] == "done", record["reason"]
        engine, about = record["experiment"]["engine"], record["run"]
        assert about["config"]["prefetch"] == engine["prefetch"] and about["config"]["residency"] == engine["residency"]
        if engine["reads"] in ("buffered", "direct"):
            assert about["reads"] == engine["reads"]
        if engine["slots"] is not None:
            assert about["num_slots"] == engine["slots"]
        found[tuple(engine[name] for name in ("reads", "slots", "residency", "prefetch", "budget"))] = record["figures"]
    assert len(found) == 9 + 6 + 6 + 1
    resident = found["auto", None, "planned", True, "resident"]
    assert resident["bytes"] < 1 << 20
    for rule, layers in (("fifo", 4), ("lru", 4), ("mru", 3)):
        read = found["buffered", None, rule, True, None]["bytes"]
        assert round(read / (3 << 20)) == layers, (rule, read)
    assert all(figures["memory"] <= figures["predicted_memory"] for figures in found.values())

"""`bench --against`: rivals beside offramp, from real stores and rivals that are made up."""

import json
import math
import shutil

import pytest

import offramp
from offramp.errors import BudgetError
from offramp.experiments import against, groups, rivals
from offramp.experiments.children import run_worker
from offramp.experiments.jobs import WorkerJob
from offramp.runtime.config import EngineConfig
from offramp.session.inputs import InputSource
from tests.cli.conftest import VOCABULARY, write_tiny

QUICK = ("--repeat", "2", "--passes", "2", "--threads", "1", "--max-length", "8", "--budget", "2GiB")

FAKE = """
import json, sys
job = json.load(sys.stdin)
if job["act"] == "versions":
    print(json.dumps({"result": dict.fromkeys(job["distributions"], "1.0")}))
elif job["rival"] == "disk":
    raise ValueError("no such layer")
else:
    logits = json.load(open(LOGITS)) if job["rival"] == "transformers" else [[9.0, 0.0, 0.0]] * len(job["inputs"])
    print(json.dumps({"result": {
        "latencies_seconds": [0.25] * (len(job["inputs"]) - job["warm"]), "peak_rss_bytes": 700 << 20,
        "bytes_read_per_input": 20.5, "precision": job["precision"], "logits": logits,
    }}))
"""


@pytest.fixture(scope="module")
def tokens():
    return [
        ([(number * 7919 + index * 104729 + 1) % len(VOCABULARY) for number in range(8)], [0] * 8) for index in range(4)
    ]


@pytest.fixture(scope="module")
def logits(store, tokens, tmp_path_factory):
    """What transformers would answer: the logarithms of what the store answers."""
    config = EngineConfig(budget="2GiB", threads=1, max_length=8)
    scores = run_worker(WorkerJob("tokens", str(store), config, tokens=tokens))["scores"]
    path = tmp_path_factory.mktemp("logits") / "logits.json"
    path.write_text(json.dumps([[math.log(score) for score in row] for row in scores]))
    return path


@pytest.fixture
def fake(monkeypatch, tmp_path, logits):
    """Rivals that print numbers."""
    (tmp_path / "fake.py").write_text(f"LOGITS = {str(logits)!r}\n{FAKE}")
    monkeypatch.setattr(rivals, "SCRIPT", tmp_path / "fake.py")
    for name in ("transformers", "disk", "transformers-bf16"):
        monkeypatch.setitem(rivals.RIVALS, name, rivals.Rival((name,), "fp32"))


def test_rivals_stand_beside_the_budgets_and_records_are_kept(run, store, fake, tmp_path, monkeypatch):
    records, page = tmp_path / "records.jsonl", tmp_path / "page.md"
    words = (
        "bench",
        store,
        *QUICK,
        "--against",
        "transformers,transformers-bf16,disk,onnxruntime",
        "--records",
        records,
    )
    monkeypatch.setitem(rivals.FORMS, "onnx", rivals.Form(("no-such-library",)))
    monkeypatch.setattr(rivals, "_versions", _absent(rivals._versions))
    said = run(*words, "--json", "--markdown", page)
    assert said.code == 0, said.err
    transformers, other, disk, onnx, ours = said.lines
    assert (transformers["ratio"], transformers["rounds"], transformers["versions"]) == (
        1.0,
        2,
        {"transformers": "1.0"},
    )
    assert "answers differ" in other["reason"] and other["latency_seconds_median"] is None
    assert disk["reason"] == "exit 1: ValueError: no such layer"
    assert onnx["reason"] == "its model cannot be converted: no-such-library is not installed"
    assert (ours["name"], ours["rounds"], ours["same_labels"]) == ("offramp 2048MiB", 2, 1.0)
    assert ours["difference"] < 1e-6 and ours["ratio"] > 0 and ours["ratio_low"] is None, "two rounds: no interval"
    assert said.err.count("disk: exit 1") == 1, "what failed is not tried again in the same call"
    text = page.read_text()
    assert "| offramp 2048MiB | fp32 |" in text and "- disk: exit 1: ValueError: no such layer" in text
    assert "transformers 1.0" in text and "random ids, 8 tokens" in text
    monkeypatch.setattr(against, "run_worker", None)
    again = run(*words)
    assert again.code == 0 and "round" not in again.err.replace("round 1/2: disk", ""), "all but the failure is there"
    assert "offramp 2048MiB" in again.out and "disk: exit 1" in again.out
    more = run(*words, "--max-length", "4")
    assert more.code == 1, "other inputs are measured"
    monkeypatch.setattr(against, "machine", lambda: {"cpu_model": "another"})
    assert run(*words).code == 1, "records of another machine do not count"


def _absent(real):
    return lambda python, names: (
        "no-such-library is not installed" if "no-such-library" in names else real(python, names)
    )


def test_every_store_has_its_budgets_and_one_that_is_too_small_a_reason(
    run, store, fake, tmp_path, monkeypatch, logits
):
    def run_worker(job, *_, **more):
        if job.config.budget == 1 << 20:
            raise BudgetError("budget of 1.00 MiB is too small", None, "give 90MiB")
        figures = {"latencies_seconds": [0.1, 0.1], "peak_rss_bytes": 1, "bytes_read_per_input": 0}
        return {**figures, "scores": [[0.5, 0.25, 0.25]] * 4}

    monkeypatch.setattr(against, "run_worker", run_worker)
    other = offramp.divide(write_tiny(tmp_path / "model", num_hidden_layers=1, exits=False), tmp_path / "other")
    words = ("--repeat", "1", "--passes", "2", "--threads", "1", "--max-length", "8", "--against", "disk")
    said = run("bench", store, *words, "--also", other, "--budget", "resident,1MiB")
    names = ["offramp store resident", "offramp store 1MiB", "offramp other resident", "offramp other 1MiB"]
    assert said.code == 0 and all(f"\n{name} " in said.out for name in names), said.err
    assert "offramp other 1MiB: budget of 1.00 MiB is too small" in said.out


def test_texts_are_tokenized_for_all(run, store, fake, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(against, "_measure", lambda comparison, plan, records, log: seen.extend(plan))
    (tmp_path / "texts.txt").write_text("the bank fell\na film won today\nshares\n")
    words = ("--budget", "2GiB", "--input", tmp_path / "texts.txt", "--max-length", "5")
    assert run("bench", store, *words, "--against", "transformers").code == 0
    job, ours = (trial.job for trial, number in seen if number == 0)
    assert [ids for ids, _ in job.inputs] == [
        [2, 5, 7, 12, 3],
        [2, 6, 8, 13, 3],
        [2, 5, 7, 12, 3],
        [2, 6, 8, 13, 3],
        [2, 10, 3],
    ]
    assert [(list(ids), list(types)) for ids, types in ours.job.tokens] == list(job.inputs)


def test_a_model_of_other_labels_has_a_reason(store):
    result = {"latencies_seconds": [0.1], "peak_rss_bytes": 1, "bytes_read_per_input": 0, "logits": [[1.0, 2.0]]}
    assert against._with_scores({"result": result}, store) == {"failed": "gives 2 logits, the store 3"}


@pytest.mark.parametrize(
    "content", ["rubbish\n", "{}\n", "[1]\n", '{"key": "a", "round": 0, "result": {}}\n', "[" * 9999 + "\n"]
)
def test_a_file_that_holds_no_records_is_refused(run, store, fake, tmp_path, content):
    path = tmp_path / "records"
    path.write_text(content)
    said = run("bench", store, *QUICK, "--against", "transformers", "--records", path)
    assert said.code == 2 and "not a file of records of a comparison" in said.err
    assert path.read_text() == content


def test_a_torn_record_is_dropped(tmp_path):
    path = tmp_path / "records"
    path.write_text('{"key": "a", "name": "b", "round": 0, "failed": "c"}\n{"key": "a", "na')
    assert len(against.Records(path)._records) == 1 and path.read_text().endswith('"failed": "c"}\n')


@pytest.mark.parametrize(
    "words, mentions",
    [
        (("--against", "caffe"), "unknown rival 'caffe'"),
        (("--against", "disk=/no/python"), "'/no/python' is no Python interpreter for disk"),
        (("--model", "x"), "give --against transformers"),
        (("--group", "128MiB"), "give --against transformers"),
        (("--against", "disk", "--exit", "patience:1"), "rivals have no exits"),
        (("--against", "disk", "--batch", "8"), "rivals have no exits"),
        (("--against", "disk", "--task", "sst2"), "rivals and labelled data"),
        (("--against", "disk", "--input", "-"), "give --input a file"),
        (("--against", "disk", "--model", "/no/such/model"), "not a model folder of transformers"),
        (("--against", "disk", "--markdown", "page.pdf"), "use .md"),
        (("--against", "disk", "--records", "/no/such/folder/x"), "no such folder"),
        (("--against", "disk", "--also", "/no/such/store"), "no such store"),
    ],
)
def test_wrong_words_are_refused_before_anything_runs(run, store, words, mentions):
    said = run("bench", store, "--budget", "2GiB", *words)
    assert said.code == 2 and mentions in said.err and "round" not in said.err


def test_stores_of_one_name_are_told_apart(store, tmp_path):
    stores = (store, tmp_path / store.name)
    shutil.copytree(*stores)
    comparison = against.Comparison(stores, ("resident",), (), EngineConfig(), InputSource())
    names = [trial.name for path in stores for trial in against._settings(comparison, path, [([1], [0])])]
    assert names == [f"offramp {path} resident" for path in stores]


def test_without_a_budget_or_a_loadable_store(run, store, tmp_path, monkeypatch):
    assert "give --budget" in run("bench", store, "--against", "disk").err
    monkeypatch.setattr(against, "INDEX_FILE", "absent")
    said = run("bench", store, "--budget", "2GiB", "--against", "disk")
    assert said.code == 2 and "give --model FOLDER" in said.err


def test_a_group_that_cannot_be_made_is_said(run, store, fake, monkeypatch):
    monkeypatch.setattr(groups, "missing", lambda: "needs root")
    monkeypatch.setattr(against, "_measure", lambda *_: None)
    said = run("bench", store, *QUICK, "--against", "transformers", "--group", "128MiB")
    assert said.code == 0 and "no run in a memory group: needs root" in said.err


def test_groups_of_both_versions_are_limited_and_read(tmp_path, monkeypatch):
    v1, v2 = tmp_path / "v1", tmp_path / "v2"
    (v1 / "memory").mkdir(parents=True)
    (v1 / "memory" / "memory.limit_in_bytes").touch()
    v2.mkdir()
    monkeypatch.setattr(groups, "_remove", lambda folder: None)
    with groups.memory_group(1 << 20, v1) as group:
        assert (group.folder / "memory.limit_in_bytes").read_text() == "1048576"
        (group.folder / "memory.failcnt").write_text("3\n")
        (group.folder / "memory.max_usage_in_bytes").write_text("99\n")
        (group.folder / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
        assert group.usage() == {"charged_peak_bytes": 99, "hits": 3, "killed": 1}
    with groups.memory_group(1 << 20, v2) as group:
        assert (group.folder / "memory.max").read_text() == "1048576"
        (group.folder / "memory.events").write_text("low 0\nhigh 0\nmax 5\noom 1\noom_kill 0\n")
        assert group.usage() == {"charged_peak_bytes": None, "hits": 5, "killed": 0}
        assert group.around(["x"])[-1] == "x" and (v2 / "cgroup.subtree_control").read_text() == "+memory"


@pytest.mark.slow
@pytest.mark.parametrize("name", rivals.RIVALS)
def test_a_real_rival_gives_the_answers_of_the_store(run, store, model, name):
    """Slow, and skipped where the rival is not installed in this environment."""
    found = rivals.versions(rivals.Chosen(name))
    if isinstance(found, str):
        pytest.skip(found)
    words = ("--repeat", "1", "--passes", "6", "--threads", "1", "--budget", "2GiB", "--model", model, "--json")
    said = run("bench", store, *words, "--against", name)
    assert said.code == 0 and [each["reason"] for each in said.lines] == [None, None], said.out

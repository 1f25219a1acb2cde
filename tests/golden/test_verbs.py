"""The verbs that a device needs, each run as a process on golden stores. Runs on Python 3.8 without PyTorch."""

import json
import re
import subprocess
import sys

import pytest

from offramp.cli import COMMANDS
from tests.golden.common import TOLERANCE, TUNED, read_answers, unpack

CLASSIFIERS = read_answers()["stores"]
TEXTS = [name for name, each in CLASSIFIERS.items() if not name.endswith("-export") and "text" in each["inputs"][0]]
"""Stores that ONNX Runtime 1.10 runs, and that classify texts."""
STORE = "bert-tuned"
TOLERANCES = {"ort": TOLERANCE, "numpy": 1e-5}
"""Largest accepted difference from the recorded scores of ONNX Runtime, by backend."""
needs_memory = pytest.mark.skipif("memory" not in COMMANDS, reason="offramp has no verb `memory`")


def process(*words):
    """Run a verb in a process of its own. Returns the JSON lines of stdout, or stdout itself where it is no JSON."""
    command = [sys.executable, "-m", "offramp", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()] if "--json" in words else done.stdout


@pytest.fixture(scope="module")
def backends():
    """The backends of `run` that need neither PyTorch nor another machine."""
    named = re.search(r"--backend \{([a-z,]+)\}", process("run", "--help"))
    return [name for name in named.group(1).split(",") if name in TOLERANCES]


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """Return a function that unpacks a golden store by its name and returns its folder."""
    folder = tmp_path_factory.mktemp("golden")
    return lambda name: unpack(name, folder)


def inputs_of(name):
    """Return the options of `run` that name the inputs of a golden store, and their places: texts come before pairs."""
    inputs = list(enumerate(CLASSIFIERS[name]["inputs"]))
    texts = [(place, each["text"]) for place, each in inputs if "text" in each]
    pairs = [(place, each["pair"]) for place, each in inputs if "pair" in each]
    words = [word for _, text in texts for word in ("--text", text)]
    words += [word for _, pair in pairs for word in ("--pair", pair[0], pair[1])]
    return words, [place for place, _ in texts + pairs]


def recorded(name):
    """Return the recorded results of ONNX Runtime by exit rule: the whole model, and one rule that lets rows exit."""
    rules = {each["exit"]: each["results"] for each in CLASSIFIERS[name]["answers"] if each["backend"] == "ort"}
    early = [rule for rule in rules if rule.startswith(("confidence", "patience")) or rule.endswith(".json")]
    return {rule: rules[rule] for rule in ["none", *early[-1:]]}


@pytest.mark.parametrize("name", TEXTS)
def test_run_prints_the_recorded_answers(golden, backends, name):
    words, places = inputs_of(name)
    for rule, expected in recorded(name).items():
        exit = str(TUNED / rule) if rule.endswith(".json") else rule
        for backend in backends:
            options = ["--backend", backend, "--threads", 1, "--exit", exit, "--json"]
            lines = process("run", golden(name), *words, *options)
            record = lines.pop()["record"]
            assert record["num_inputs"] == len(places) == len(lines)
            assert record["peak_rss_bytes"] <= record["budget_bytes"]
            for line, place in zip(lines, places):
                found = {field: line[field] for field in ("label", "exit_stage", "stages_run")}
                assert found == {field: expected[field][place] for field in found}
                assert abs(line["score"] - expected["score"][place]) <= TOLERANCES[backend]


def test_plan_names_a_budget_that_run_accepts(golden, backends):
    for backend in backends:
        options = ["--backend", backend, "--threads", 1, "--json"]
        (plan,) = process("plan", golden(STORE), *options)
        assert plan["feasible"]
        budget = plan["smallest_budget_bytes"] + (2 << 20)
        record = process("run", golden(STORE), "--text", "the red sky", "--budget", f"{budget}B", *options)[-1][
            "record"
        ]
        assert record["peak_rss_bytes"] <= budget == record["budget_bytes"]
        assert "predicted peak" in process("plan", golden(STORE), *options[:-1])


def test_ls_lists_every_shard_of_the_manifest(golden):
    manifest = json.loads((golden(STORE) / "offramp.json").read_text())
    lines = process("ls", golden(STORE), "--json")
    assert lines and all((golden(STORE) / line["file"]).stat().st_size == line["bytes"] for line in lines)
    assert {line["shard"] for line in lines} == {shard["name"] for shard in manifest["shards"]}
    printed = process("ls", golden(STORE))
    assert all(line["file"] in printed for line in lines)


def test_verify_reads_every_file(golden):
    checks = process("verify", golden(STORE), "--json")
    assert len(checks) > 5 and all(check["ok"] for check in checks)
    assert f"{len(checks)} files" in process("verify", golden(STORE))


@needs_memory
def test_memory_draws_a_run(golden, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "memory.svg"
    words = ["--threads", 1, "--text", "the red sky", "--out", picture, "--json"]
    (record,) = process("memory", golden(STORE), *words)
    assert record["num_inputs"] == 1 and record["peak_rss_bytes"] > 0
    assert picture.read_text(encoding="utf-8").rstrip().endswith("</svg>")


@needs_memory
def test_profile_measures_what_run_uses(golden, tmp_path):
    profile = tmp_path / "profile.json"
    process("profile", golden(STORE), "--threads", 1, "--max-length", 16, "--out", profile)
    seconds = json.loads(profile.read_text())["seconds"]
    assert seconds and all(0 < row[0] <= row[-1] for row in seconds)
    words = ["--threads", 1, "--max-length", 16, "--text", "the red sky", "--deadline", "10s", "--profile", profile]
    lines = process("run", golden(STORE), *words, "--json")
    assert lines[-1]["record"]["num_cut_by_deadline"] == 0

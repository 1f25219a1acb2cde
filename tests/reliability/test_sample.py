"""A sample of the reliability run, and the proof that its judgement bites: each kind of fault is named.

`make reliability` runs all of it. Here two stores of the tests are attacked, without PyTorch.
"""

import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from tests.reliability import hostile, onnx_graphs, stores
from tests.reliability.attacks import HONEST, Attack, mutations
from tests.reliability.hostile import Hostile, run_verb
from tests.reliability.run import Run
from tests.reliability.trial import Bench, Ended, fault_of
from tests.reliability.verbs import Verb, verbs_of

FORMAT3 = Path(__file__).parents[1] / "store" / "format3"
VERBS = ("run", "run-numpy", "plan", "ls", "verify")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and watches files as Linux does")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose honest models are a store of texts and a store of arrays."""
    run = Run(tmp_path_factory.mktemp("reliability"), is_sample=True, workers=2)
    for base, archive in (("names", "encoder"), ("captured", "captured")):
        with zipfile.ZipFile(FORMAT3 / f"{archive}.zip") as file:
            file.extractall(run.honest / base / "store")
    return run


@pytest.fixture(scope="module")
def bench(run):
    bench = Bench(run.scratch / "own")
    yield bench
    bench.close()


def attacks():
    """Every 32nd manifest and graph, and every sixth of the legal twins."""
    found = [each for each in (*stores.attacks(), *onnx_graphs.attacks(0)) if each.base == "names"]
    refused = [each for each in found if not each.is_legal]
    return refused[::32] + [each for each in found if each.is_legal][::6]


def test_a_sample_of_hostile_stores_is_refused_or_harmless_and_the_legal_twins_run(run, monkeypatch):
    monkeypatch.setattr(hostile, "verbs_of", lambda *of: [verb for verb in verbs_of(*of) if verb.name in VERBS])
    given = attacks()
    Hostile(run, "sample").try_all(given)
    trials = [each for each in run.records() if "legal" in each]
    assert len(trials) == sum(len(set(VERBS) & set(each.verbs or VERBS)) for each in given)
    assert [each for each in run.records() if each.get("fault")] == []
    assert {each["outcome"] for each in trials if each["legal"]} <= {"honest answer", "other model"}
    assert {each["outcome"] for each in trials if not each["legal"]} >= {"refused"}


def ended(**facts):
    """A harmless end, but for `facts`."""
    return Ended(**{"code": 0, "seconds": 0.1, "peak_bytes": 100 << 20, "touched": (), "out": "", "err": "", **facts})


@pytest.mark.parametrize(
    ("facts", "fault"),
    [
        ({}, None),
        ({"code": 4, "err": "offramp: error: x - y - z\n"}, None),
        ({"code": 4, "err": "offramp: warning: w\nofframp: error: x\n"}, None),
        ({"code": -11}, "signal 11"),
        ({"code": "hangs", "seconds": 20.0}, "hangs"),
        ({"seconds": 11.0}, "hangs"),
        ({"peak_bytes": 200 << 20}, "memory"),
        ({"code": 1, "err": "offramp: error: internal\n"}, "exit 1"),
        ({"code": 99}, "exit 99"),
        ({"code": 4, "err": ""}, "not one line"),
        ({"code": 4, "err": "offramp: error: a\nofframp: error: b\n"}, "not one line"),
        ({"code": 0, "err": "offramp: error: a\n"}, "not one line"),
        ({"code": 4, "err": "offramp: error: a\nmore\n"}, "not one line"),
        ({"code": 4, "err": "Traceback (most recent call last):\nofframp: error: a\n"}, "not ours"),
        ({"code": 4, "err": "2026 [E:onnxruntime:, x.cc:1] bad\nofframp: error: a\n"}, "not ours"),
        ({"out": "\x1b[2J"}, "control characters"),
        ({"err": "\u202e"}, "control characters"),
        ({"touched": ("secret.bin",)}, "touched"),
    ],
)
def test_each_kind_of_fault_is_named(facts, fault):
    found = fault_of(ended(**facts), honest_bytes=100 << 20)
    assert found is None if fault is None else fault in found


def test_a_file_that_is_opened_or_made_elsewhere_is_seen(bench):
    with bench.place() as place:
        (place / "store").mkdir()
        (place / "texts.txt").symlink_to("canary/secret.txt")
        words = Verb("x", "run|store|--input|texts.txt").words("names")
        shutil.copytree(FORMAT3, place / "zips")
        with zipfile.ZipFile(FORMAT3 / "encoder.zip") as file:
            file.extractall(place / "store")
        found = bench.run("light", place, words)
        assert "secret.txt" in found.touched
        trace = run_verb(bench, Verb("x", "run|store|--text|a|--trace|../trace.jsonl"), "names", place)
        assert any("trace.jsonl" in name for name in trace.touched) or trace.code != 0
        assert run_verb(bench, Verb("x", "run|store|--text|a|--trace|stray.jsonl"), "names", place).touched


def test_an_attack_that_runs_with_another_answer_is_a_fault_unless_it_may(run):
    edits = [each for each in stores.attacks() if each.name == "another activation"]
    strict = Attack("manifest", "activation, strict", "names", edits[0].make, verbs=("run",), answers=HONEST)
    before = len(run.records())
    judged = Run(run.out / "strict", is_sample=True, workers=1)
    shutil.copytree(run.honest, judged.honest)
    Hostile(judged, "sample").try_all([strict])
    assert any("another answer" in (each.get("fault") or "") for each in judged.records())
    assert len(run.records()) == before


def test_mutations_reach_every_key_of_a_manifest(run):
    tree = json.loads((run.honest / "names/store/offramp.json").read_bytes())
    paths = {path[:1] for _, path, _ in mutations(tree)}
    assert paths == {(key,) for key in tree}
    assert len(list(mutations(tree))) > 1000

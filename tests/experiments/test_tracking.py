"""Trackers: each record is a run with options and figures, and a tracker that fails loses no record."""

import sys
import time
import types

import pytest

from offramp.errors import UsageError
from offramp.experiments import Grid, sweep, tracking
from offramp.experiments.results import read_results
from offramp.experiments.sweep import SweepSettings
from offramp.experiments.tracking import TRACKERS, Tracking, track

TOYS = list(Grid(job="toy", model="toy", seed=[1, 2], rounds=2))
PROGRAM = """
import json, sys, time
for line in sys.stdin:
    record = json.loads(line)
    open({path!r}, "a").write(json.dumps(record) + "\\n")
    {act}
    print("taken", flush=True)
"""


def ignore(*what):
    pass


@pytest.fixture
def tracker(monkeypatch, tmp_path):
    """Replace the process of the tracker by a program that notes what it takes, and acts; returns what it took."""

    def replace(act="pass"):
        path = tmp_path / "taken.jsonl"
        monkeypatch.setattr(tracking, "COMMAND", (sys.executable, "-c", PROGRAM.format(path=str(path), act=act)))
        monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: name)
        return path

    return replace


def tracked(folder, lines):
    with Tracking("trackio", folder, lines.append) as watching:
        sweep.sweep(TOYS, folder, SweepSettings(), ignore, ignore, watch=watching.add)
    return len(read_results(folder, ignore))


def test_each_record_is_given_to_the_tracker(tracker, in_process, tmp_path):
    import json

    path, lines = tracker(), []
    assert tracked(tmp_path / "out", lines) == 4 and not lines
    taken = [json.loads(line) for line in path.read_text().splitlines()]
    assert [each["name"] for each in taken] == [f"seed={seed}, round {number}" for number, seed in
                                                [(1, 1), (1, 2), (2, 2), (2, 1)]]  # fmt: skip
    assert taken[0]["options"]["seed"] == "1" and set(taken[0]["figures"]) == {"latency", "score"}
    assert [each["round"] for each in taken] == [1, 1, 2, 2] and taken[0]["status"] == "done"


@pytest.mark.parametrize(
    ("act", "says"),
    [
        ("raise SystemExit('gone')", "its process has ended"),
        ("print('no network')", "no network"),
        ("time.sleep(60)", "it does not take a record"),
        ("sys.stdout.buffer.write(b'caf\\xe9\\n')", "caf\ufffd"),
    ],
)
def test_a_tracker_that_fails_loses_no_record(tracker, in_process, tmp_path, monkeypatch, act, says):
    monkeypatch.setattr(tracking, "MOST_SECONDS", 1.0)
    tracker(act)
    lines = []
    assert tracked(tmp_path / "out", lines) == 4
    assert len(lines) == 1 and says in lines[0] and "records are kept" in lines[0]


@pytest.mark.parametrize(
    "after",
    ["time.sleep(60)", "import subprocess; subprocess.Popen(['sleep', '5'], stdin=subprocess.DEVNULL)"],
)
def test_a_tracker_that_does_not_end_is_ended(tracker, in_process, tmp_path, monkeypatch, after):
    """Itself, or a process that it has left behind with its pipe."""
    tracker()
    monkeypatch.setattr(tracking, "COMMAND", (*tracking.COMMAND[:2], f"{tracking.COMMAND[2]}\nimport time\n{after}"))
    monkeypatch.setattr(tracking, "END_SECONDS", 0.2)
    began, lines = time.monotonic(), []
    assert tracked(tmp_path / "out", lines) == 4 and not lines
    assert time.monotonic() - began < 4


def test_a_reason_that_is_no_text_is_an_answer(monkeypatch, tmp_path):
    code = (
        "import sys; from offramp.experiments import tracking\n"
        "def track(*given):\n    print('of a library', flush=True)\n    raise ValueError('caf\\udce9')\n"
        "tracking.track = track; sys.exit(tracking.main())"
    )
    monkeypatch.setattr(tracking, "COMMAND", (sys.executable, "-c", code))
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: name)
    lines = []
    with Tracking("trackio", tmp_path, lines.append) as watching:
        watching.add({"experiment": TOYS[0].to_json(), "figures": {}, "round": 1, "status": "done"}, "a")
    assert "caf\\udce9" in lines[0]


def test_a_long_name_of_a_run_is_a_name_of_a_folder():
    first, second = (tracking._file_name(f"{'é/' * 200}{number}") for number in (1, 2))
    assert first != second and max(len(name.encode()) for name in (first, second)) <= 255
    assert first.startswith("é_é_") and tracking._file_name("budget=1/2, round 3") == "budget=1_2, round 3"


def test_a_tracker_that_is_not_installed_is_an_error_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="wandb is not installed - --track wandb - pip install wandb"):
        Tracking("wandb", tmp_path / "out", ignore)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", TRACKERS)
def test_a_record_is_a_run_of_the_tracker(monkeypatch, tmp_path, name):
    calls = []

    class Tracker:
        def __init__(self, *given, **options):
            calls.append((given, options))

        def __getattr__(self, name):
            return lambda *given, **options: calls.append((name, *given, options))

    module = types.ModuleType("accelerate.tracking")
    module.LOGGER_TYPE_TO_CLASS = {name: Tracker}
    package = types.ModuleType("accelerate")
    package.PartialState = lambda cpu: None
    monkeypatch.setitem(sys.modules, "accelerate", package)
    monkeypatch.setitem(sys.modules, "accelerate.tracking", module)
    record = {"name": "budget=1/2, round 3", "options": {"seed": "1"}, "figures": {"latency": 0.5}, "round": 3}
    track(name, "project", tmp_path, {**record, "status": "done"})
    track(name, "project", tmp_path, {**record, "figures": {}, "status": "failed"})
    assert str(calls[0]).count("round 3") == 1
    assert calls[1:5] == [
        ("start", {}), ("store_init_configuration", {"seed": "1", "status": "done"}, {}),
        ("log", {"latency": 0.5}, {"step": 3}), ("finish", {}),
    ]  # fmt: skip
    assert [call[0] for call in calls[6:]] == ["start", "store_init_configuration", "finish"], "it has no figures"

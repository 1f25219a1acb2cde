"""Trackers: each record is a run with options and figures, and a tracker that fails loses no record."""

import contextlib
import os
import sqlite3
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
    for variable in tracking._PLACES:
        monkeypatch.setenv(variable, "chosen")
    record = {"name": "budget=1/2, round 3", "options": {"seed": "1"}, "figures": {"latency": 0.5}, "round": 3}
    track(name, "project", tmp_path, {**record, "status": "done"})
    track(name, "project", tmp_path, {**record, "figures": {}, "status": "failed"})
    assert str(calls[0]).count("round 3") == 1
    assert calls[1:5] == [
        ("start", {}), ("store_init_configuration", {"seed": "1", "status": "done"}, {}),
        ("log", {"latency": 0.5}, {"step": 3}), ("finish", {}),
    ]  # fmt: skip
    assert [call[0] for call in calls[6:]] == ["start", "store_init_configuration", "finish"], "it has no figures"
    assert {os.environ[variable] for variable in tracking._PLACES} == {"chosen"}


STAND_INS = {
    "wandb": """
def init(**options):
    note("init", **options)
    return Run()
class Run:
    def log(self, values, step=None):
        note("log", values=values, step=step)
    def finish(self):
        note("finish")
class config:
    update = staticmethod(lambda values, **options: note("config", values=values))
""",
    "mlflow": """
class Run: pass
class utils:
    class validation:
        MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH = 6000, 10
known = []
def search_experiments(filter_string):
    name = filter_string.removeprefix("name = '").removesuffix("'")
    assert "'" not in name, f"a filter that does not parse: {filter_string}"
    return [each for each in known if each.name == name]
def create_experiment(name, **options):
    found = Run()
    found.name, found.experiment_id = name, "7"
    known.append(found)
    note("create", name=name)
    return "7"
def start_run(**options):
    note("init", **options)
    return Run()
def log_params(values):
    note("config", values=values)
def log_metrics(values, step=None):
    note("log", values=values, step=step)
def end_run():
    note("finish")
""",
}
"""Library that a test cannot have -> the functions of it that accelerate calls, each of which notes its call."""
NOTE = """
import json, os
def note(call, **given):
    with open(os.environ["NOTED"], "a") as file:
        file.write(json.dumps([call, given]) + "\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", STAND_INS)
def test_records_come_through_the_trackers_of_accelerate(name, in_process, tmp_path, monkeypatch):
    """The process, accelerate and its tracker are real: the library behind it is a stand-in."""
    import json

    pytest.importorskip("accelerate")
    (tmp_path / "libraries").mkdir()
    (tmp_path / "libraries" / f"{name}.py").write_text(NOTE + STAND_INS[name])
    monkeypatch.setenv("NOTED", str(tmp_path / "noted.jsonl"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "libraries"), *sys.path]))
    monkeypatch.syspath_prepend(str(tmp_path / "libraries"))
    lines = []
    with Tracking(name, tmp_path / "it's out", lines.append) as watching:
        sweep.sweep(TOYS, tmp_path / "it's out", SweepSettings(), ignore, ignore, watch=watching.add)
    assert not lines
    noted = [json.loads(line) for line in (tmp_path / "noted.jsonl").read_text().splitlines()]
    of = lambda call: [given for each, given in noted if each == call]  # noqa: E731
    assert len(of("init")) == len(of("finish")) == len(of("log")) == 4
    names = [given.get("run_name") or given.get("name") for given in of("init")]
    assert names == ["seed=1, round 1", "seed=2, round 1", "seed=2, round 2", "seed=1, round 2"]
    assert [given["step"] for given in of("log")] == [1, 1, 2, 2] and len(of("create")) == (name == "mlflow")
    assert all(set(given["values"]) == {"latency", "score"} for given in of("log"))
    options = {}
    for given in of("config"):
        options |= given["values"]
    assert options["status"] == "done" and options["model"] == "toy" and options["exit"] == "none"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "trackio", "mlflow", "wandb"])
def test_records_are_files_of_trackers_that_are_installed(name, in_process, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    for library in (name, "accelerate"):
        pytest.importorskip(library)
    lines = []
    with Tracking(name, tmp_path / "out", lines.append) as watching:
        sweep.sweep(TOYS, tmp_path / "out", SweepSettings(), ignore, ignore, watch=watching.add)
    assert not lines
    files = [path for path in (tmp_path / "out" / tracking.FOLDER).rglob("*") if path.is_file()]
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is written beside the results"
    if name == "mlflow":
        with contextlib.closing(sqlite3.connect(tmp_path / "out" / tracking.FOLDER / "mlflow.db")) as database:
            runs = database.execute("select name, status from runs order by name").fetchall()
            assert runs == [(f"seed={seed}, round {number}", "FINISHED") for seed in (1, 2) for number in (1, 2)]
            assert database.execute("select count(*) from metrics where key = 'latency'").fetchone() == (4,)
    elif name == "wandb":
        assert sum(path.suffix == ".wandb" for path in files) == 4
    elif name == "tensorboard":
        assert sum(path.name.startswith("events.") and path.parent.name == "seed=1, round 2" for path in files) == 1
    else:
        assert any(path.stat().st_size for path in files)

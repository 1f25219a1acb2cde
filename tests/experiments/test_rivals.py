"""Rivals: how they are named, run in processes of their own, and distrusted."""

import json
import os
import stat
import subprocess
import sys
import time
from importlib import metadata

import pytest

from offramp.errors import AbsentError, OfframpError, RefusedError, UsageError
from offramp.experiments import against, experiment, rival_process, rivals
from offramp.experiments.children import TimedOutError
from offramp.experiments.pools import failure_of
from offramp.experiments.prerequisites import Source, measuring_job, needs_of
from offramp.experiments.rivals import FORMS, RIVALS, Chosen, RivalJob, parse_against, run_process, versions
from offramp.experiments.steps import take_step
from offramp.session.inputs import InputSource
from tests.processes import is_running, wait_until
from tests.toy import ToyTextEncoder, write_toy

MEASURED = {
    "latencies_seconds": [0.1], "peak_rss_bytes": 1, "bytes_read_per_input": 0.0, "precision": "fp32",
    "logits": [[0.5, 1.0], [0.5, 1.0]],
}  # fmt: skip
INPUTS = [([1, 2], [0, 0])] * 2


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Replace the process of a rival by a Python program."""

    def replace(code):
        (tmp_path / "rival.py").write_text(code)
        monkeypatch.setattr(rivals, "SCRIPT", tmp_path / "rival.py")

    return replace


def measured(tmp_path, seconds=20.0, name="transformers", inputs=INPUTS):
    return RivalJob(Chosen(name), tmp_path, None, inputs, 1, 1).run(seconds)


def printing(tree):
    return f"print({json.dumps(json.dumps({'result': tree}))})"


def test_every_rival_has_a_process_a_form_and_a_precision():
    assert set(rival_process.RIVALS) == set(RIVALS) and set(rival_process.FORMS) == set(FORMS)
    assert {each.form for each in RIVALS.values()} - {None} <= set(FORMS)
    assert {each.source for each in FORMS.values()} - {None} <= set(FORMS)


def test_rivals_are_named_with_their_interpreters():
    found = parse_against(f"transformers, onnxruntime-int8={sys.executable} ,llama.cpp")
    assert [(each.name, each.python) for each in found] == [
        (name, sys.executable) for name in ("transformers", "onnxruntime-int8", "llama.cpp")
    ]


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "unknown rival ''; known: transformers"),
        ("transformers,", "unknown rival ''"),
        ("../../bin/sh", "unknown rival '../../bin/sh'"),
        ("trans\x1b[2Jformers", r"trans\\x1b[2Jformers"),
        ("x" * 5000, "x ... x"),
        ("disk,disk", "rival disk is given twice"),
        ("disk=", "'' is no Python interpreter for disk"),
        ("disk=/no/such", "'/no/such' is no Python interpreter for disk"),
        ("disk=/", "'/' is no Python interpreter for disk"),
        ("disk=\0", r"'\\x00' is no Python interpreter for disk"),
        (f"disk={__file__}", "is no Python interpreter for disk"),
        ("=disk", "unknown rival ''"),
    ],
)
def test_hostile_names_are_refused(text, words):
    with pytest.raises(ValueError) as caught:
        parse_against(text)
    assert words in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 2000


def test_the_process_imports_nothing_of_offramp_and_prints_one_line():
    job = {"act": "versions", "distributions": ["numpy", "no-such"]}
    code = f"import runpy, sys; runpy.run_path({str(rivals.SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], input=json.dumps(job), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {"result": {"numpy": None, "no-such": None}}, done.stderr


def test_a_rival_whose_parent_has_ended_before_it_began_does_nothing(script):
    parent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    job = {"act": "versions", "distributions": ["no-such"], "parent": parent.pid}

    def said():
        command = [sys.executable, "-I", "-S", str(rivals.SCRIPT)]
        return subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=True).stdout

    assert "no-such" in said(), "a script may start Python: the parent is a grandparent"
    parent.stdin.close()
    os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)
    assert said() == "", "of a parent that nobody has waited for"
    parent.wait()
    assert said() == ""
    script("import json, sys\nprint(json.dumps({'result': json.load(sys.stdin)}))")
    assert run_process(sys.executable, {"act": "versions"}, 20)["result"]["parent"] == os.getpid()


def test_files_beside_the_script_are_not_modules_of_a_rival(script, tmp_path):
    script(rivals.SCRIPT.read_text())
    (tmp_path / "openvino.py").write_text("raise SystemExit('shadowed')")
    job = {"act": "measure", "rival": "openvino", "model": str(tmp_path), "threads": 1, "inputs": [], "warm": 0}
    assert "No module named 'openvino'" in run_process(sys.executable, job, 60)["failed"]


def test_an_absent_library_is_named(monkeypatch):
    monkeypatch.setitem(RIVALS, "disk", rivals.Rival(("no-such-library", "numpy"), "fp32"))
    assert versions(Chosen("disk")) == "no-such-library is not installed"
    monkeypatch.setitem(RIVALS, "disk", rivals.Rival(("numpy",), "fp32", "gguf"))
    monkeypatch.setitem(FORMS, "gguf", rivals.Form(("no-such-library",)))
    assert versions(Chosen("disk")) == "its model cannot be converted: no-such-library is not installed"


def test_a_measurement_is_returned(script, tmp_path):
    script("import sys\nsys.stderr.write('noise')\nprint('noise')\n" + printing(MEASURED))
    assert measured(tmp_path) == {"result": MEASURED}


@pytest.mark.parametrize(
    "code, reason",
    [
        ("raise ValueError('no weights')", "exit 1: ValueError: no weights"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
        ("import os; os._exit(7)", "exit 7"),
        ("", "printed no result"),
        ("print('rubbish')", "printed no result"),
        ("print('[' * 100000)", "printed no result"),
        ("print('{\"result\": 1}')", "printed no result"),
        ("import sys; sys.stdout.buffer.write(bytes(range(256)))", "printed no result"),
        ('print(\'{"failed": "a\\\\u001b[2Jb"}\')', r"a\x1b[2Jb"),
        (printing(MEASURED) + "\nraise SystemExit(3)", "exit 3"),
        (printing({}), "printed a result without the numbers of a measurement"),
    ],
)
def test_a_rival_that_fails_has_a_reason(script, tmp_path, code, reason):
    script(code)
    assert measured(tmp_path) == {"failed": reason}


@pytest.mark.parametrize(
    "change",
    [
        {"latencies_seconds": [0.1, 0.2]}, {"latencies_seconds": [0]}, {"latencies_seconds": ["0.1"]},
        {"latencies_seconds": [float("nan")]}, {"latencies_seconds": None}, {"peak_rss_bytes": -1},
        {"peak_rss_bytes": True}, {"bytes_read_per_input": float("inf")}, {"logits": []}, {"logits": [[0.5, 1.0]]},
        {"logits": [[0.5, 1.0], [0.5]]}, {"logits": [[], []]}, {"logits": "ab"}, {"precision": 8},
        {"precision": "fp4"},
        {"peak_rss_bytes": 10**400},
    ],
)  # fmt: skip
def test_numbers_that_are_none_are_no_measurement(script, tmp_path, change):
    assert rivals.is_measurement(MEASURED, "logits", 1, 2)
    assert not rivals.is_measurement({**MEASURED, **change}, "logits", 1, 2)


def test_a_rival_that_hangs_ends_with_its_children(script, tmp_path):
    pid_file = tmp_path / "pid"
    script(
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid))\ntime.sleep(60)"
    )
    began = time.monotonic()
    assert measured(tmp_path, seconds=1.0) == {"failed": "did not finish in 1.00 s", "kind": "timeout"}
    assert time.monotonic() - began < 20
    child = int(pid_file.read_text())
    wait_until(lambda: not is_running(child), "the child of the rival still runs")  # the kernel ends it a moment later


def test_an_interpreter_that_is_no_program(tmp_path):
    path = tmp_path / "python"
    path.write_bytes(b"\x7fELF rubbish")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    assert "does not start: Exec format error" in run_process(str(path), {"act": "versions"}, 20)["failed"]


def test_another_interpreter_sees_none_of_our_variables(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    assert "PYTHONPATH" not in rivals._environment("/other/python", 2)
    assert rivals._environment(sys.executable, 2)["PYTHONPATH"] == "/ours"
    assert rivals._environment(sys.executable, 2)["OMP_NUM_THREADS"] == "2"


def test_a_form_is_made_once_and_never_half(script, monkeypatch, tmp_path):
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "cache"))
    making = (
        "import json, os, sys\njob = json.load(sys.stdin)\n"
        "if job['act'] == 'versions': print(json.dumps({'result': dict.fromkeys(job['distributions'], '1')}))\n"
        "else:\n    os.mkdir(job['out']); open(job['out'] + '/file', 'w').write(job['form'])\n    "
    )
    lines, chosen = [], Chosen("onnxruntime-int8")
    script(making + "raise ValueError('half')")
    found = rivals.prepared(chosen, tmp_path, "digest", lines.append)
    assert found == "its model was not converted: exit 1: ValueError: half"
    assert not list((tmp_path / "cache" / "rivals").iterdir()), "nothing is left"
    script(making + "print('{\"result\": {}}')")
    folder = rivals.prepared(chosen, tmp_path, "digest", lines.append)
    assert (folder / "file").read_text() == "onnx-int8" and len(lines) == 3
    assert rivals.prepared(chosen, tmp_path, "digest", lines.append) == folder and len(lines) == 3
    assert rivals.prepared(chosen, tmp_path, "another", lines.append) != folder
    assert rivals.prepared(Chosen("transformers"), tmp_path, "digest", lines.append) is None


def test_a_model_folder_has_weights(tmp_path):
    with pytest.raises(UsageError, match="not a model folder"):
        rivals.model_digest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="give --model FOLDER"):
        rivals.model_digest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    first = rivals.model_digest(tmp_path)
    (tmp_path / "other.txt").write_text("ignored")
    assert rivals.model_digest(tmp_path) == first
    os.truncate(tmp_path / "model.safetensors", 4)
    assert rivals.model_digest(tmp_path) != first


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": "128MiB"}, "the rival disk has no option budget"),
        ({"exit": "patience:1", "task": "sst2"}, "no option exit"),
        ({"residency": "fifo", "resident_layers": 2}, "no option residency, resident_layers"),
        ({"rival": "lazy-layers", "residency": "prefix"}, "no option residency"),
        ({"batch": 2, "trace": True, "dtype": "int8"}, "no option batch, trace, dtype"),
    ],
)
def test_a_rival_has_none_of_the_options_of_an_engine(options, says, tmp_path):
    each = experiment(**{"model": "m", "rival": "disk", **options})
    with pytest.raises(UsageError, match=f"{says} - m - give rivals a Grid of their own, without it"):
        needs_of(each, Source("m", "d", False), "rows", tmp_path)


def test_a_list_of_layers_is_not_recorded_as_planned(tmp_path):
    each = experiment(model="m", rival="lazy-layers", resident_layers=2)
    with pytest.raises(
        UsageError, match="has no residency planned - m - give it a Grid of its own, with residency fifo, lru, mru"
    ):
        needs_of(each, Source("m", "d", False), None, tmp_path)


def test_a_rival_needs_a_conversion_by_its_interpreter_and_a_store_for_the_token_ids(tmp_path):
    each = experiment(model="m", rival="lazy-layers", residency="mru", resident_layers=3, threads=2, passes=4)
    needs = needs_of(each, Source("m", "d", False), None, tmp_path, {"lazy-layers": "/p"})
    assert [step.kind for step in needs.steps.values()] == ["divide", "convert"]
    assert needs.steps[needs.rival.name].arguments == {"rival": "lazy-layers", "model": "m", "python": "/p"}
    needs.rival.mkdir()
    (needs.rival / "made.json").write_text('{"result": {"digest": "e"}}')
    step = measuring_job(each, 1, needs).step
    assert step["options"] == {"residency": "mru", "resident_layers": 3} and step["threads"] == 2
    assert (step["kind"], step["digest"], step["python"], step["passes"]) == ("rival", "e", "/p", 4)
    other = needs_of(each, Source("m", "d", False), None, tmp_path)
    assert other.rival != needs.rival, "of another interpreter"
    (tmp_path / "store").mkdir()
    with pytest.raises(UsageError, match="reads the model that the store was made from"):
        needs_of(each, Source(str(tmp_path / "store"), "d", True), None, tmp_path)


def test_an_absent_rival_has_a_reason_that_is_not_tried_again(monkeypatch, tmp_path):
    monkeypatch.setitem(RIVALS, "disk", rivals.Rival(("no-such-distribution",), "fp32"))
    with pytest.raises(AbsentError) as caught:
        take_step({"kind": "convert", "rival": "disk", "model": str(tmp_path), "python": sys.executable}, print)
    assert str(caught.value) == (
        "disk: no-such-distribution is not installed - install it, or give --rival disk=PYTHON"
    )
    assert failure_of(caught.value)["kind"] == "absent"


def rival_step(tmp_path, **more):
    """The step of a round of a rival of the toy model."""
    write_toy(tmp_path / "store").close()
    return {
        "kind": "rival", "rival": "disk", "model": "m", "python": sys.executable, "digest": "d",
        "store": str(tmp_path / "store"), "inputs": InputSource(texts=("a",)).to_json(), "sample": None, "passes": 1,
        "threads": 1, "max_length": 8, "timeout": None, "options": {}, **more,
    }  # fmt: skip


def test_versions_are_those_of_the_round_not_of_the_conversion(monkeypatch, tmp_path):
    monkeypatch.setitem(RIVALS, "disk", rivals.Rival(("numpy",), "fp32"))
    monkeypatch.setattr(RivalJob, "run", lambda *_: {"result": {**MEASURED, "logits": [[0.5, 1.0, 0.0]] * 3}})
    monkeypatch.setattr(against, "open_encoder", lambda *_: ToyTextEncoder())
    record = take_step(rival_step(tmp_path, versions={"numpy": "1.0"}, inputs=InputSource().to_json()), print)
    assert record["run"]["versions"] == {"numpy": metadata.version("numpy")}


@pytest.mark.parametrize(
    ("printed", "error", "says"),
    [
        ({"failed": "killed by signal 9"}, OfframpError, "disk: killed"),
        (
            {"failed": "did not finish in 1.00 s", "kind": "timeout"},
            TimedOutError,
            "disk: did not finish .* longer timeout",
        ),
        ({"result": {**MEASURED, "logits": [[0.5, 1.0]] * 3}}, RefusedError, "2 logits"),
    ],
)
def test_a_rival_that_fails_in_a_sweep_has_a_reason(monkeypatch, tmp_path, printed, error, says):
    monkeypatch.setattr(RivalJob, "run", lambda *_: printed)
    monkeypatch.setitem(RIVALS, "disk", rivals.Rival(("numpy",), "fp32"))
    monkeypatch.setattr(against, "open_encoder", lambda *_: ToyTextEncoder())
    with pytest.raises(error, match=says):
        take_step(rival_step(tmp_path), print)

"""Worker processes: what they print, how they fail, and when they end."""

import json
import os
import subprocess
import sys
import time

import pytest

from offramp import errors
from offramp.errors import MissingExtraError, OfframpError
from offramp.experiments import children
from offramp.experiments import worker as worker_process
from offramp.experiments.children import WORKER, TimedOutError, run_worker
from offramp.experiments.jobs import WorkerJob
from offramp.measure import conditions
from offramp.runtime.config import EngineConfig
from offramp.session.inputs import InputSource
from tests.processes import is_running, wait_until

JOB = WorkerJob("plan", "store")
CLASSES = sorted(
    (each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, OfframpError)),
    key=lambda each: each.__name__,
)


@pytest.fixture
def worker(monkeypatch):
    """Replace the worker by a Python program."""

    def replace(code):
        monkeypatch.setattr(children, "WORKER", (sys.executable, "-c", code))

    return replace


def test_the_result_and_the_progress_arrive(worker):
    worker("""print('{"progress": "one"}\\n{"progress": "two"}\\n{"result": {"x": 1}}')""")
    lines = []
    assert run_worker(JOB, lines.append) == {"x": 1}
    assert lines == ["one", "two"]


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_keeps_its_class_and_its_parts(monkeypatch, kind):
    """Through the code of the worker itself, with a job that fails."""
    raised = MissingExtraError("torch", "demo") if kind is MissingExtraError else kind("W", "X", "Y")
    make = 'MissingExtraError("torch", "demo")' if kind is MissingExtraError else f'{kind.__name__}("W", "X", "Y")'
    code = (
        "import sys\nfrom offramp.errors import *\nfrom offramp.experiments import worker\n"
        f"def fail(job): raise {make}\n"
        "worker._RUN['plan'] = fail\nsys.exit(worker.main())"
    )
    monkeypatch.setattr(children, "WORKER", (sys.executable, "-c", code))
    with pytest.raises(kind) as caught:
        run_worker(JOB)
    assert type(caught.value) is kind
    assert str(caught.value) == str(raised)
    assert (caught.value.what, caught.value.where, caught.value.remedy) == (raised.what, raised.where, raised.remedy)
    assert caught.value.exit_code == kind.exit_code


def test_an_unforeseen_error_is_named_and_its_traceback_is_logged(worker):
    worker(
        "import sys\nfrom offramp.experiments import worker\n"
        "worker._RUN['plan'] = lambda job: 1 / 0\nsys.exit(worker.main())"
    )
    lines = []
    with pytest.raises(OfframpError, match="internal error in a worker process: ZeroDivisionError: division by zero"):
        run_worker(JOB, lines.append)
    assert lines[0].startswith("Traceback") and lines[-1] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("lacking", [MemoryError, OSError])
def test_an_error_arrives_where_nothing_is_left_to_describe_the_machine(monkeypatch, capsys, lacking):
    def describe(folder):
        raise lacking

    monkeypatch.setattr(conditions, "surroundings", describe)
    assert worker_process._refuse({"class": "BudgetError", "what": "x", "where": None, "remedy": None}, "", 3) == 3
    found = children.error_of(json.loads(capsys.readouterr().out)["error"])
    assert type(found) is errors.BudgetError and found.environment is None


def test_the_time_limit_of_a_process_that_the_worker_started_is_one(worker):
    error = {"class": "TimedOutError", "what": "disk: did not finish in 1.00 s", "where": None, "remedy": "wait"}
    worker(f"print({json.dumps(json.dumps({'error': error}))})")
    with pytest.raises(TimedOutError, match=r"disk: did not finish in .* - wait"):
        run_worker(JOB)


def test_lines_that_are_no_messages_are_reported(worker):
    worker("""print('hello\\n{"other": 1}\\n[]\\n{"result": 2}')""")
    lines = []
    assert run_worker(JOB, lines.append) == 2
    told = "a worker process printed a line that is no message: "
    assert lines == [told + "hello", told + '{"other": 1}', told + "[]"]


def test_a_worker_without_a_result_is_an_error(worker):
    worker("print('hello')")
    with pytest.raises(OfframpError, match="a worker process ended with 0 and no result"):
        run_worker(JOB)
    worker("import sys; sys.exit('no such library')")
    with pytest.raises(OfframpError, match="ended with 1 and no result - no such library"):
        run_worker(JOB)


@pytest.mark.parametrize("last_words", ["", "a warning"])
def test_a_worker_that_is_killed(worker, last_words):
    worker(f"import os, sys; print({last_words!r}, file=sys.stderr, flush=True); os.kill(os.getpid(), 9)")
    with pytest.raises(OfframpError) as caught:
        run_worker(JOB)
    assert str(caught.value) == "a worker process ended with -9 and no result"


def test_a_caller_that_is_interrupted_stops_the_worker(worker):
    """Otherwise this would last a minute."""
    worker("""import time; print('{"progress": "one"}', flush=True); time.sleep(60)""")

    def stop(line):
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_worker(JOB, stop)
    assert time.monotonic() - began < 30


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_worker_ends_with_its_parent():
    worker = (
        "import os, time\nfrom offramp.experiments import worker\n"
        "def wait(job): worker._log(str(os.getpid())); time.sleep(60)\n"
        "worker._RUN['plan'] = wait\nworker.main()"
    )
    caller = (
        "import functools, sys\nfrom offramp.experiments import children, jobs\n"
        f"children.WORKER = (sys.executable, '-c', {worker!r})\n"
        "children.run_worker(jobs.WorkerJob('plan', 'store'), functools.partial(print, flush=True))"
    )
    with subprocess.Popen([sys.executable, "-c", caller], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    wait_until(lambda: not is_running(pid), "the worker runs for a minute if nothing ends it")


def test_a_worker_whose_parent_has_ended_already_does_nothing():
    tree = {**WorkerJob("plan", "no-such-store").to_json(), "parent": 1 << 30}
    done = subprocess.run(WORKER, input=json.dumps(tree), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_unknown_keys_are_refused():
    def ask(**more):
        tree = {**JOB.to_json(), "parent": os.getpid(), **more}
        done = subprocess.run(WORKER, input=json.dumps(tree), capture_output=True, text=True, check=False)
        assert done.returncode == 1
        return json.loads(done.stdout)["error"]["what"]

    assert "unknown key of a job colour; known: job, store, config" in ask(colour="red")
    assert "unknown engine option bugdet; known: budget, exit" in ask(config={"bugdet": 1})
    assert "unknown job 'dance'; known jobs: plan, passes" in ask(job="dance")


def test_a_job_survives_json():
    inputs = InputSource(("a",), (("b", "c"),), "t.tsv", "body", None)
    job = WorkerJob("run", "store", EngineConfig(budget="1MiB", batch="bulk"), inputs, 3, 4, True, True)
    assert WorkerJob.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_a_worker_loads_nothing_of_its_parents_side():
    """What is loaded counts in its measured peak."""
    code = "import offramp.experiments.worker, sys; print({'subprocess', 'tempfile'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"

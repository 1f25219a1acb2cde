"""Sweeps by a scheduler of dask: refusals without one, and with a real scheduler and two workers."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import CancelledError

import pytest

from offramp.errors import MissingExtraError, UsageError
from offramp.experiments import Grid, experiment, pools, scheduled
from offramp.experiments.jobs import WorkerJob
from offramp.experiments.pools import MAX_ATTEMPTS, run_all
from offramp.experiments.prerequisites import Prerequisite, Source, needs_of
from offramp.experiments.results import Results, read_results
from offramp.experiments.scheduled import ScheduledPool, require_safe, require_unplaced, run_remotely
from offramp.experiments.sweep import Runner, SweepSettings, sweep
from tests.experiments.test_sweep import ignore, stable


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:8786", "tcp://localhost:1", "tls://far:8786"])
def test_safe_addresses(address):
    require_safe(address)


@pytest.mark.parametrize("address", ["tcp://far:8786", "tcp://10.0.0.7:8786"])
def test_another_machine_needs_tls(address):
    with pytest.raises(UsageError, match="needs TLS") as caught:
        require_safe(address)
    assert caught.value.remedy.endswith(address.replace("tcp", "tls"))


@pytest.mark.parametrize("address", ["", "far", "http://localhost:1", "tcp://localhost", "tcp://[", "tcp://h:99999"])
def test_addresses_that_are_none(address):
    with pytest.raises(UsageError, match="not the address of a scheduler"):
        require_safe(address)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"device": "board"}, "device=board is of one machine"),
        ({"exit": "tune:latency=40ms", "task": "sst2"}, "exit=tune:latency=40ms is tuned with the profile"),
        ({"exit": "tune:latency=patience:2", "task": "sst2"}, "exit=tune:latency=patience:2 is tuned"),
        ({"exit": "tune:drop=1", "task": "sst2"}, "exit=tune:drop=1 is tuned with the profile of one machine"),
    ],
)
def test_experiments_of_one_machine_are_not_given_to_a_scheduler(options, part):
    others = [experiment(model="m"), experiment(model="m", task="sst2", exit="oracle")]
    require_unplaced("tcp://localhost:8786", others)
    with pytest.raises(UsageError, match=f"{part}.* - m - run this experiment there, without --scheduler"):
        require_unplaced("tcp://localhost:8786", [*others, experiment(model="m", **options)])


def test_what_is_tuned_needs_a_profile_of_a_machine(tmp_path):
    """The reason for which every `tune:` is refused."""
    for exit in ("tune:latency=5ms", "tune:latency=patience:2", "tune:drop=1"):
        each = experiment(model="m", task="sst2", exit=exit)
        steps = needs_of(each, Source("m", "stored", True), "rows", tmp_path).steps.values()
        assert "profile" in [step.kind for step in steps]


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingExtraError, match=r"offramp\[sweep\]"):
        ScheduledPool("tcp://localhost:8786")


def test_a_remote_job_is_json_alone():
    job = WorkerJob(
        "step", "", step={"kind": "toy", "experiment": experiment(job="toy", model="toy").to_json(), "round": 1}
    )
    found = json.loads(run_remotely(json.dumps({"job": job.to_json(), "timeout": None})))
    outcome = found["outcome"]
    assert outcome["attempts"] == 1 and len(outcome["result"]["samples"]["latencies"]) == 10 and not found["lines"]


def test_a_worker_makes_one_attempt_of_those_that_are_counted_here(in_process):
    each = experiment(job="toy", model="toy-is-killed")
    job = WorkerJob("step", "", step={"kind": "toy", "experiment": each.to_json(), "round": 1})
    outcome = json.loads(run_remotely(json.dumps({"job": job.to_json(), "timeout": None})))["outcome"]
    assert (outcome["error"]["kind"], outcome["attempts"], len(in_process)) == ("killed", 1, 1)


class Remote:
    """A future of dask that a test ends."""

    def __init__(self, function, arguments, worker):
        self.function, self.arguments, self.worker = function, arguments, worker
        self.key, self.status, self._callback, self._result = str(id(self)), "pending", None, None

    def add_done_callback(self, callback):
        self._callback = callback
        if self.status != "pending":
            callback(self)

    def end(self, status, result):
        if self.status != "pending":
            return
        self.status, self._result = status, result
        if self._callback is not None:
            self._callback(self)

    def answer(self, seconds=1.0, kind=None, lines=(), **result):
        """The worker has run the job."""
        error = {"kind": kind, "what": "no", "where": None, "remedy": None}
        outcome = {"result": result} if kind is None else {"error": error}
        self.end("finished", json.dumps({"outcome": {**outcome, "attempts": 1, "seconds": seconds}, "lines": lines}))

    def result(self):
        if isinstance(self._result, Exception):
            raise self._result
        return self._result

    def release(self):
        self.end("cancelled", CancelledError("released"))


class Client:
    """A client of dask without a scheduler: `machines` are its workers, each with the name of its machine."""

    status = "running"

    def __init__(self, machines):
        self.machines, self.jobs, self.events = machines, [], {}
        self.num_answered = 0
        """Number of jobs that are run at once, in this process."""

    def nthreads(self, callback_timeout):
        return dict.fromkeys(self.machines, 1)

    def get_events(self, worker):
        return self.events.get(worker, ())

    def submit(self, function, *arguments, workers, pure):
        (worker,), remote = workers, Remote(function, arguments, workers[0])
        if function is scheduled.machine_id:
            remote.end("finished", self.machines[worker])
        else:
            assert worker in self.machines and not pure
            self.jobs.append(remote)
            if len(self.jobs) <= self.num_answered:
                remote.end("finished", function(*arguments))
        return remote

    @property
    def running(self):
        return [job for job in self.jobs if job.status == "pending"]

    def lose(self, worker, *begun):
        """A worker is killed; `begun` are the keys of its tasks."""
        del self.machines[worker]
        self.events[worker] = [(0.0, {"action": "remove-worker", "processing-tasks": {*begun}}), (0.0, "other")]

    def break_off(self):
        """The scheduler is killed: as dask does, futures end first and the client stays `connecting`."""
        self.status = "connecting"
        for job in self.running:
            job.end("cancelled", CancelledError("scheduler-connection-lost"))

    def close(self, timeout):
        self.status = "closed"


@pytest.fixture
def pool_of(monkeypatch):
    """A function that returns a pool and its client, given the machine of each worker."""
    monkeypatch.setattr(scheduled, "_LOOK_SECONDS", 0)
    monkeypatch.setattr(scheduled, "_CONNECT_SECONDS", 0.05)
    monkeypatch.setattr(scheduled, "_RESTART_SECONDS", 0.05)
    monkeypatch.setattr(pools, "_WAIT_SECONDS", 0.01)

    def make(**machines):
        client = Client(machines)
        monkeypatch.setattr(scheduled, "connect", lambda address: client)
        return ScheduledPool("tcp://localhost:8786"), client

    return make


def some_jobs(count):
    return iter([(number, WorkerJob("step", "", step={"kind": "toy"}), None) for number in range(count)])


def outcomes(pool, count, act, alone=False, log=ignore):
    """Run jobs; `act` is called with the number of those that have ended, before each look at the scheduler."""
    ended, look = [], pool.check

    def check():
        act(len(ended))
        look()

    pool.check = check
    for token, outcome in run_all(pool, some_jobs(count), 1, log, alone):
        ended.append((token, outcome))
    return [outcome for _, outcome in sorted(ended)]


def test_a_sweep_whose_scheduler_dies_ends_without_records_of_what_is_unknown(pool_of, in_process, tmp_path):
    toys = list(Grid(job="toy", model="toy", seed=range(5), rounds=1))
    pool, client = pool_of(a="here", b="there")
    client.num_answered = 1

    def kill(done, total, line):
        if done == 1:
            client.break_off()

    with pytest.raises(UsageError, match=r"the scheduler is gone .* - start it, and run the command again"):
        sweep(toys, tmp_path, SweepSettings(), ignore, kill, lambda: pool)
    assert [record["status"] for record in read_results(tmp_path, ignore)] == ["done"]
    assert len(client.jobs) == 2 and client.status == "closed", "none is given to a scheduler that is gone"
    pool, client = pool_of(a="here", b="there")
    client.num_answered = 4
    plan = sweep(toys, tmp_path, SweepSettings(), ignore, ignore, lambda: pool)
    assert (len(plan.jobs), plan.num_recorded, plan.failed, plan.failed_before) == (4, 1, [], [])
    assert len(in_process) == 5


def test_what_has_ended_is_kept_when_the_scheduler_dies(pool_of):
    pool, client = pool_of(a="here", b="there", c="yonder")
    jobs, seen = run_all(pool, some_jobs(3), 1, ignore), []
    place = pool._place

    def placed(sent):
        place(sent)
        seen.append(sent)
        if len(seen) == 3:
            client.jobs[1].answer()
            client.break_off()

    pool._place = placed
    assert next(jobs)[0] == 1
    with pytest.raises(UsageError, match="the scheduler is gone"):
        next(jobs)


def test_a_connection_that_breaks_at_a_question_is_the_same(pool_of):
    pool, client = pool_of(a="here")

    def nthreads(callback_timeout):
        raise OSError("closed")

    client.nthreads = nthreads
    with pytest.raises(UsageError, match=r"the scheduler is gone \(OSError: closed\)"):
        outcomes(pool, 1, ignore)


def test_a_scheduler_without_workers_is_refused_at_the_start_and_later(pool_of):
    with pytest.raises(UsageError, match=r"the scheduler has no worker - .* - start one: dask worker"):
        pool_of()
    pool, client = pool_of(a="here")
    with pytest.raises(UsageError, match="the scheduler has no worker"):
        outcomes(pool, 1, lambda num_ended: client.machines.clear())


def test_workers_that_come_later_are_used(pool_of):
    pool, client = pool_of(a="here")
    most = []

    def act(num_ended):
        most.append(len(client.running))
        if len(most) == 3:
            client.machines["b"] = "there"
        elif len(most) > 5:
            for job in client.running:
                job.answer()

    assert len(outcomes(pool, 4, act)) == 4 and most[2] == 1 and max(most) == 2


@pytest.mark.parametrize(("alone", "most"), [(True, 2), (False, 3)])
def test_two_jobs_that_measure_time_are_never_on_one_machine(pool_of, alone, most):
    pool, client = pool_of(a="here", b="here", c="there")
    assert pool.room(1, alone) == most
    seen = []

    def act(num_ended):
        running = [client.machines[job.worker] for job in client.running]
        assert len({job.worker for job in client.running}) == len(running), "one job a worker"
        assert not alone or len(set(running)) == len(running)
        seen.append(len(running))
        if client.running:
            client.running[-1].answer()

    assert len(outcomes(pool, 6, act, alone)) == 6 and max(seen) == most


def test_what_measures_time_runs_alone_unless_cores_are_shared(monkeypatch, tmp_path):
    asked = []
    noting = lambda pool, jobs, num_jobs, log, alone=False: asked.append((num_jobs, alone)) or ()  # noqa: E731
    monkeypatch.setattr("offramp.experiments.sweep.run_all", noting)
    for share_cores, timed in ((False, (1, True)), (True, (3, False))):
        with Results(tmp_path, ignore) as results:
            runner = Runner(results, None, SweepSettings(3, share_cores), ignore, ignore)
            runner._measure([])
            runner._make([Prerequisite("profile", tmp_path / "profile-1", {})])
        assert asked == [(3, False), timed, (3, False), (1, True)], "others, timed jobs, divisions, profiles"
        asked.clear()


def test_a_job_whose_workers_are_killed_fails_after_two_attempts(pool_of):
    """Whatever the scheduler allows; and an attempt that had not begun does not count."""
    pool, client = pool_of(a="1", b="2", c="3", d="4")
    began = time.perf_counter()

    def act(num_ended):
        number = len(client.jobs)
        for job in client.running[:1]:
            client.lose(job.worker, *([job.key] if number != 1 else []))
            time.sleep(0.02)

    (outcome,) = outcomes(pool, 1, act)
    assert outcome["error"]["kind"] == "killed" and "worker of this job was lost" in outcome["error"]["what"]
    assert outcome["attempts"] == MAX_ATTEMPTS == 2 and len({job.worker for job in client.jobs}) == 3
    assert 0.03 < outcome["seconds"] <= time.perf_counter() - began


def test_a_job_of_a_killed_worker_is_run_by_another(pool_of):
    class KilledWorker(Exception):  # noqa: N818
        """As dask has it: it allows no failure."""

    pool, client = pool_of(a="1", b="2")

    def act(num_ended):
        if client.running and len(client.jobs) == 1:
            client.running[0].end("error", KilledWorker())
        elif client.running:
            client.running[0].answer(seconds=3.0)

    (outcome,) = outcomes(pool, 1, act)
    assert outcome["attempts"] == 2 and "result" in outcome and 3.0 < outcome["seconds"] < 13


def test_attempts_on_a_worker_count_with_those_of_lost_workers(pool_of):
    pool, client = pool_of(a="1", b="2")

    def act(num_ended):
        for job in client.running:
            if len(client.jobs) == 1:
                client.lose(job.worker, job.key)
            else:
                job.answer(kind="killed")

    (outcome,) = outcomes(pool, 1, act)
    assert (outcome["error"]["kind"], outcome["attempts"]) == ("killed", 2)


def test_a_worker_that_cannot_run_jobs_ends_the_sweep(pool_of):
    pool, client = pool_of(a="here")

    def act(num_ended):
        for job in client.running:
            job.end("error", ModuleNotFoundError("No module named 'offramp'"))

    with pytest.raises(UsageError, match=r"cannot run jobs .* - a - install the same offramp there"):
        outcomes(pool, 1, act)


def test_the_log_of_a_worker_is_shown_here(pool_of):
    pool, client, lines = *pool_of(a="here"), []
    outcomes(pool, 1, lambda num_ended: [job.answer(lines=["a warning"]) for job in client.running], log=lines.append)
    assert lines == ["a warning"]


@contextlib.contextmanager
def cluster(num_workers=2, scheme="tcp", environment=None):
    """A scheduler and workers as processes of their own; yields the address and the workers, the scheduler last."""
    program = lambda name: [sys.executable, "-m", f"distributed.cli.dask_{name}", "--no-dashboard"]  # noqa: E731
    host = ["--host", "127.0.0.1", "--port", "0", "--protocol", scheme]
    scheduler = subprocess.Popen([*program("scheduler"), *host], stderr=subprocess.PIPE, text=True, env=environment)
    workers = []
    try:
        line = next(line for line in scheduler.stderr if f"{scheme}://" in line)
        address = f"{scheme}://127.0.0.1:" + line.strip().rpartition(":")[2]
        code = [*program("worker"), address, "--nthreads", "1", "--no-nanny"]
        for _ in range(num_workers):
            workers.append(subprocess.Popen(code, stderr=subprocess.DEVNULL, env=environment))
        yield address, [*workers, scheduler]
    finally:
        for child in (*workers, scheduler):
            child.kill()
            child.wait()
        scheduler.stderr.close()


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3]], ids=["few", "many"])
@pytest.mark.filterwarnings("ignore")
def test_one_process_two_jobs_and_two_workers_give_the_same_records(tmp_path, seeds):
    late = Grid(job="toy", model="late", timeout="1ms", rounds=len(seeds))
    toys = [*Grid(job="toy", model="toy", seed=seeds, rounds=2), *late]
    sweep(toys, tmp_path / "one", SweepSettings(1), ignore, ignore)
    sweep(toys, tmp_path / "two", SweepSettings(2), ignore, ignore)
    with cluster() as (address, _):
        sweep(toys, tmp_path / "dask", SweepSettings(), ignore, ignore, lambda: ScheduledPool(address))
    assert stable(tmp_path / "one") == stable(tmp_path / "two") == stable(tmp_path / "dask")


@pytest.mark.filterwarnings("ignore")
def test_the_jobs_of_a_killed_worker_are_run_by_the_other(tmp_path):
    toys, ended = list(Grid(job="toy", model="toy", seed=range(12), rounds=1)), []
    with cluster() as (address, workers):

        def kill_one(done, total, line):
            ended.append(line)
            if done == 2:
                workers[0].kill()

        sweep(toys, tmp_path / "out", SweepSettings(), ignore, kill_one, lambda: ScheduledPool(address))
    assert len(stable(tmp_path / "out")) and stable(tmp_path / "out").count('"done"') == 12


def end_worker(text):
    """In place of a job: it ends the process of its worker."""
    os._exit(1)


@pytest.mark.filterwarnings("ignore")
def test_a_job_that_ends_its_workers_is_recorded_as_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduled, "run_remotely", end_worker)
    with cluster(3) as (address, _):
        sweep(list(Grid(job="toy", model="toy", rounds=1)), tmp_path, SweepSettings(), ignore, ignore,
              lambda: ScheduledPool(address))  # fmt: skip
    (record,) = read_results(tmp_path, ignore)
    assert (record["reason"]["kind"], record["attempts"]) == ("killed", 2) and record["seconds"] > 0


@pytest.mark.filterwarnings("ignore")
def test_a_real_scheduler_that_dies_ends_the_sweep_and_another_continues_it(tmp_path):
    toys = list(Grid(job="toy", model="toy", seed=range(6), rounds=1))
    with cluster(1) as (address, children):

        def kill(done, total, line):
            if done == 2:
                children[-1].kill()

        with pytest.raises(UsageError, match="the scheduler is gone"):
            sweep(toys, tmp_path, SweepSettings(), ignore, kill, lambda: ScheduledPool(address))
    assert stable(tmp_path).count('"done"') == len(read_results(tmp_path, ignore)) == 2
    with cluster(1) as (address, _):
        sweep(toys, tmp_path, SweepSettings(), ignore, ignore, lambda: ScheduledPool(address))
    assert stable(tmp_path).count('"done"') == 6


@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_that_is_not_there(monkeypatch):
    monkeypatch.setattr(scheduled, "_CONNECT_SECONDS", 1)
    with pytest.raises(UsageError, match="no scheduler answers"):
        ScheduledPool(f"tcp://127.0.0.1:{1 + os.getpid() % 1000}")


def certificate(path, name):
    """Write a key and a certificate that it signs itself, of this machine's address, and return the file."""
    words = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={name}"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", path / f"{name}.key", "-out", path / f"{name}.crt"]
    subprocess.run(["openssl", "req", *words], check=True, capture_output=True)
    both = path / f"{name}.pem"
    both.write_text((path / f"{name}.key").read_text() + (path / f"{name}.crt").read_text())
    return both


def tls(certificates, authority):
    """The environment of dask's configuration with these files."""
    names = ["CA_FILE", "SCHEDULER__CERT", "WORKER__CERT", "CLIENT__CERT"]
    found = zip(names, [authority, *[certificates] * 3], strict=True)
    variables = {f"DASK_DISTRIBUTED__COMM__TLS__{name}": str(path) for name, path in found}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}


@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_by_tls_runs_jobs_of_those_alone_who_have_its_certificate(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make certificates")
    own, foreign = certificate(tmp_path, "own"), certificate(tmp_path, "foreign")
    recipe = tmp_path / "toys.py"
    recipe.write_text(
        "from offramp.experiments import Grid\ndef recipe():\n"
        "    return Grid(job='toy', model='toy', seed=[1, 2, 3], rounds=2)\n"
    )

    def swept(out, address, environment):
        words = ["sweep", recipe, "--out", tmp_path / out, "--scheduler", address]
        words = [sys.executable, "-m", "offramp", *map(str, words)]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)

    with cluster(scheme="tls", environment=tls(own, own)) as (address, _):
        done = swept("own", address, tls(own, own))
        assert done.returncode == 0, done.stderr
        bare = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        for to, environment, says in (
            (address, bare, "no certificates for TLS (dask's configuration names none)"),
            (address, tls(tmp_path / "no.pem", own), "no certificates for TLS (FileNotFoundError"),
            (address, tls(foreign, own), "no scheduler answers"),
            (address, tls(own, foreign), "no scheduler answers"),
            (address.replace("tls", "tcp"), tls(own, own), "no scheduler answers"),
        ):
            refused = swept("none", to, environment)
            assert refused.returncode == 2 and refused.stderr.startswith(f"offramp: error: {says}"), refused.stderr
    sweep(
        list(Grid(job="toy", model="toy", seed=[1, 2, 3], rounds=2)), tmp_path / "here", SweepSettings(), ignore, ignore
    )
    assert stable(tmp_path / "own") == stable(tmp_path / "here")

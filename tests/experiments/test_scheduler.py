"""Sweeps by a scheduler of dask: refusals without one, and with a real scheduler and two workers."""

import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from offramp.errors import MissingExtraError, UsageError
from offramp.experiments import Grid, experiment, pools
from offramp.experiments.jobs import WorkerJob
from offramp.experiments.pools import ScheduledPool, require_safe, require_unplaced, run_remotely
from offramp.experiments.sweep import SweepSettings, sweep
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


@pytest.mark.parametrize("options", [{"device": "board"}, {"exit": "tune:latency=40ms", "task": "sst2"}])
def test_experiments_of_one_machine_are_not_given_to_a_scheduler(options):
    others = [experiment(model="m"), experiment(model="m", task="sst2", exit="tune:drop=1")]
    require_unplaced("tcp://localhost:8786", others)
    with pytest.raises(UsageError, match=r"is of one machine, .* - m - run this experiment there, without --scheduler"):
        require_unplaced("tcp://localhost:8786", [*others, experiment(model="m", **options)])


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingExtraError, match=r"offramp\[sweep\]"):
        ScheduledPool("tcp://localhost:8786")


def test_a_remote_job_is_json_alone():
    job = WorkerJob(
        "step", "", step={"kind": "toy", "experiment": experiment(job="toy", model="toy").to_json(), "round": 1}
    )
    found = json.loads(run_remotely(json.dumps({"job": job.to_json(), "timeout": None})))
    assert found["attempts"] == 1 and len(found["result"]["samples"]["latencies"]) == 10


@contextlib.contextmanager
def cluster(num_workers=2, scheme="tcp", environment=None):
    """A scheduler and workers as processes of their own; yields the address and the workers."""
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
        yield address, workers
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


@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_that_is_not_there(monkeypatch):
    monkeypatch.setattr(pools, "_CONNECT_SECONDS", 1)
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

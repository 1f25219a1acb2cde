"""A deadlock fails here instead of hanging, and nothing is remembered between tests."""

import gc
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from tests.runtime.driver import Shelf

DEADLOCK_SECONDS = 60


@pytest.fixture(autouse=True)
def deadlocks_fail():
    """Waiting for a lock or a thread can be interrupted: the signal ends it, and what waits during the clean-up."""

    def give_up(*_):
        raise TimeoutError(f"no end after {DEADLOCK_SECONDS} s: a deadlock")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, DEADLOCK_SECONDS, 5)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    shelf = Shelf(tmp_path_factory.mktemp("stores"))
    yield shelf
    shelf.close()


@pytest.fixture
def no_collector():
    """What a cycle holds is not freed, and no weak reference calls back at a random moment."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def run_python(tmp_path):
    """Run a script in a fresh process that can import what we can; returns what it printed."""

    def run(script):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", textwrap.dedent(script)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run

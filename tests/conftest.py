"""Fixtures for all tests, and the selection of tests that are slow or run alone."""

import gc
import itertools
import os
import signal
import threading
import time

import pytest

from offramp.runtime import memory_model
from tests.selection import are_alone, is_left_out, select
from tests.shared_work import AllPages, share_onnx_graphs

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts background jobs so; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path, config):
    """Read no other files for the tests that run alone: it would take longer than they do, and one core waits."""
    return True if are_alone(config.option.markexpr) and is_left_out(collection_path) else None


def pytest_collection_modifyitems(config, items):
    is_whole = config.args == config.getini("testpaths") and not config.option.keyword
    select(items, is_whole and not are_alone(config.option.markexpr))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collect no garbage meanwhile: modules and tests are none, and would be looked through a dozen times."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish():
    """Take modules and tests out of what Python's collector of cycles looks through again and again."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """Collect garbage after each file of tests, and exclude what remains, such as modules, from later collections."""
    try:
        return (yield)
    finally:
        if nextitem is None or nextitem.path != item.path:
            gc.collect()
            gc.freeze()


@pytest.fixture
def one_thread():
    """Torch as it was found, after a test; one thread within, on whose number the bits of a training depend."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cache_names(tmp_path_factory):
    """Names of folders that do not exist. Numbered folders of pytest take longer the more there are."""
    folder = tmp_path_factory.mktemp("caches")
    return (str(folder / str(number)) for number in itertools.count())


@pytest.fixture(autouse=True)
def own_cache(cache_names, monkeypatch):
    """Give every test a cache folder of its own, so that no test reads or writes the user's."""
    monkeypatch.setenv("OFFRAMP_CACHE", next(cache_names))


@pytest.fixture(scope="session", autouse=True)
def shared_work(tmp_path_factory):
    """Share slow work between tests. All processes of a test run use one folder."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "onnx"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        share_onnx_graphs(monkeypatch, folder)
        monkeypatch.setattr(memory_model, "TouchedPages", AllPages)
        yield


class Clock:
    """A clock that only `sleep` advances noticeably: each reading adds a microsecond, so that no duration is zero."""

    def __init__(self):
        self._seconds, self._lock = 0.0, threading.Lock()

    def sleep(self, seconds):
        """Advance the clock without waiting."""
        with self._lock:
            self._seconds += seconds

    def read(self):
        """Return the time in seconds; replaces `time.perf_counter`."""
        self.sleep(1e-6)
        return self._seconds


@pytest.fixture
def clock(monkeypatch):
    """Replace `time.perf_counter`, so that measured durations do not depend on what else the machine does."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock.read)
    return clock

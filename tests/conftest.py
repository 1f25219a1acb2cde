"""What holds for all tests."""

import signal

import pytest

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as of a job that a shell began with `&`; children would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Nothing is remembered between tests, and nothing is written to the user's cache."""
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path_factory.mktemp("cache")))

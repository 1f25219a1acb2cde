"""What holds for all tests."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Nothing is remembered between tests, and nothing is written to the user's cache."""
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path_factory.mktemp("cache")))

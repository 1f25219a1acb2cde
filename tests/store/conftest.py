import shutil

import pytest

from tests.store.small import write_small


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """A small store that nobody changes."""
    return write_small(tmp_path_factory.mktemp("pristine") / "store")


@pytest.fixture
def store(pristine, tmp_path):
    """A copy of it that a test may spoil."""
    return shutil.copytree(pristine, tmp_path / "store")

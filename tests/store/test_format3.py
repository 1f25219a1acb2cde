"""Stores of format 3 that were written once: later code must read them, and write the same manifests.

`encoder` and `captured` are golden stores of formats 1 and 2 that were rewritten; `loop` is a module whose cell is
called 400 times.
"""

import zipfile
from pathlib import Path

import pytest

from offramp.errors import OfframpError
from offramp.store import Store
from offramp.store.manifest import dumps, seal
from offramp.store.parsing import loads
from tests.golden.common import unpack
from tests.store.small import problems, tree_of
from tests.store.test_manifest import LEAVES, leaves

FOLDER = Path(__file__).parent / "format3"


@pytest.fixture(params=["encoder", "captured", "loop"])
def path(request, tmp_path):
    with zipfile.ZipFile(FOLDER / f"{request.param}.zip") as file:
        file.extractall(tmp_path / request.param)
    return tmp_path / request.param


def test_it_is_sound_and_written_again_byte_for_byte(path):
    data = (path / "offramp.json").read_bytes()
    assert problems(path) == {} and b'"format": 3' in data and dumps(loads(data)) == data


@pytest.mark.parametrize(("new", "old"), [("encoder", "bert-own-shared"), ("captured", "arrays-export")])
def test_it_has_the_program_of_the_store_that_it_was_rewritten_from(tmp_path, new, old):
    with zipfile.ZipFile(FOLDER / f"{new}.zip") as file:
        file.extractall(tmp_path / new)
    with Store(tmp_path / new) as one, Store(unpack(old, tmp_path)) as other:
        assert one.program == other.program and one.labels == other.labels
        assert one.manifest.shards == other.manifest.shards and one.manifest.proof == other.manifest.proof


def test_a_loop_is_written_once(tmp_path):
    with zipfile.ZipFile(FOLDER / "loop.zip") as file:
        data = file.read("offramp.json")
    module = loads(data).program.module
    assert len(data) < 8000 and len(module.parts) == 402
    assert [part.start.number for part in module.parts[1:401]] == list(range(1, 401))
    assert len(module.parts[399].flows) > 390


@pytest.mark.parametrize("extent", ["some", "sixth"])
@pytest.mark.parametrize("path", ["encoder", "captured"], indirect=True)
def test_every_value_may_be_wrong(path, extent):
    """Never another exception; what is taken comes back. Each leaf gets a sixth of all wrong values, or one of them."""
    tree, step = tree_of(path), 6 if extent == "sixth" else len(LEAVES)
    for index, (container, key) in enumerate(list(leaves(tree))):
        value = container[key]
        for wrong in LEAVES[index % step :: step]:
            container[key] = wrong
            try:
                loaded = loads(seal(tree))
            except OfframpError as error:
                assert error.exit_code == 4 and str(error).isprintable()
            else:
                assert loads(dumps(loaded)) == loaded
        container[key] = value

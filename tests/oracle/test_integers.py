"""An int8 store gives the same bits under every plan, answers close to its model's, and no harm by odd scales."""

import hashlib

import numpy as np
import pytest

import offramp
from offramp.errors import OfframpError
from offramp.store import Store
from tests.oracle.tiny import (
    BACKENDS,
    Case,
    Way,
    ask_transformers,
    logits,
    make_batch,
    make_model,
    run,
    streamed_shards,
)
from tests.store.small import reseal, tree_of

CASES = (Case("bert"), Case("distilbert", "relu"), Case("electra", embedding_size=32))
LENGTHS = [31, 9, 16, 2]


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """case -> (model, int8 store, a batch)."""
    made = {}

    def make(case):
        if case not in made:
            folder, model = tmp_path_factory.mktemp("integers"), make_model(case.config())
            model.save_pretrained(folder / "model")
            store = offramp.divide(folder / "model", folder / "store", dtype="int8")
            made[case] = model, store, make_batch(model.config, LENGTHS)
        return made[case]

    return make


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_plan_gives_the_same_bits(divided, case, backend):
    model, store, batch = divided(case)
    found = logits(store, batch, backend=backend)
    for way in (Way(residents=frozenset(streamed_shards(store)), num_slots=0), Way(reads="direct", verify="never")):
        assert np.array_equal(logits(store, batch, way, backend=backend), found), way
    wanted = ask_transformers(model, batch)
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 3e38, 1e-45])
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_scales_end_in_an_error_or_in_numbers(divided, tmp_path, backend, value):
    """A program that can write digests can write any weights: nothing but answers may depend on them."""
    _, store, batch = divided(CASES[0])
    changed(store, tmp_path / "copy", "layer-01-up", "up.scale", np.array([value] * 2, np.float32))
    gave_numbers = ends_in_numbers(tmp_path / "copy", batch, backend)
    assert gave_numbers or not np.isfinite(value) or value > 1


@pytest.mark.parametrize("channels", [[0, 128], [-1, 5], [-129, 0], [1 << 62, 0]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_inputs_that_are_not_there_end_in_an_error_or_in_numbers(divided, tmp_path, backend, channels):
    _, store, batch = divided(CASES[0])
    changed(store, tmp_path / "copy", "layer-01-down", "down.channels", np.array(channels))
    ends_in_numbers(tmp_path / "copy", batch, backend)


def changed(store, copy, shard_name, role, first):
    """Copy a store, with other first numbers of a tensor and digests that fit them."""
    copy.mkdir()
    for path in store.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    tree = tree_of(store)
    shard = next(each for each in tree["shards"] if each["name"] == shard_name)
    (tensor,) = (each for each in shard["tensors"] if each["role"] == role)
    data = bytearray((copy / shard["file"]).read_bytes())
    start = shard["data_start"] + tensor["offset"]
    data[start : start + first.nbytes] = first.tobytes()
    (copy / shard["file"]).write_bytes(data)
    shard["sha256"] = hashlib.sha256(data).hexdigest()
    reseal(copy, tree)


def ends_in_numbers(store, batch, backend):
    """Run a store. False if it ends in an error."""
    with Store(store):
        pass
    try:
        with np.errstate(all="ignore"):
            (outcomes,) = run(store, [batch], backend=backend)
    except OfframpError:
        return False
    assert np.isfinite(np.stack([outcome.logits_C for outcome in outcomes])).all()
    return True

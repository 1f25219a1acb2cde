"""Stores with blocks answer as whole ones do, whatever the size of blocks, and the same bits however they are run.

Shapes: B rows, S tokens, C labels.
"""

import functools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import offramp
from offramp.backends import open_backend
from offramp.checkpoints.exits import ModelWithExits
from offramp.division import config
from offramp.store import Store
from offramp.store.exits import describe_exits
from tests.oracle.tiny import (
    BACKENDS,
    CASES,
    Case,
    Way,
    ask_transformers,
    encode,
    inputs_of,
    logits,
    make_batch,
    make_model,
    run,
    streamed_shards,
)
from tests.toy import open_engine

SIZES = (3_000, 9_000, 40_000)
"""Blocks of rows of 64 to 128 numbers: of 5 to 11 rows, of 17 to 34, and of whole products."""
LENGTHS = [31, 9, 16, 2]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(config, "LEAST_BLOCK_BYTES", 1)


@pytest.fixture(scope="module")
def blocked(divided):
    """(case, size of blocks) -> store."""

    @functools.cache
    def make(case, block_bytes):
        one = divided(case)
        return offramp.divide(one.source, one.store.parent / f"blocks-{block_bytes}", block_bytes=block_bytes)

    return make


@pytest.mark.parametrize(
    ("case", "block_bytes"),
    [
        *((CASES[0], block_bytes) for block_bytes in SIZES),
        *(pytest.param(case, 9_000, marks=[] if case is CASES[8] else pytest.mark.slow) for case in CASES[1:]),
    ],
    ids=str,
)
def test_answers_are_those_of_the_whole_store_and_of_transformers(divided, blocked, case, block_bytes):
    one, store = divided(case), blocked(case, block_bytes)
    batch = make_batch(one.model.config, LENGTHS)
    theirs = ask_transformers(one.model, batch)
    for backend in BACKENDS:
        found, whole = logits(store, batch, backend=backend), logits(one.store, batch, backend=backend)
        np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-5)
        assert np.abs(found - whole).max() <= 1e-6 * max(np.abs(whole).max(), 1), backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_plan_read_path_and_check_gives_the_same_bits(divided, blocked, backend):
    store, batch = blocked(CASES[0], 9_000), make_batch(divided(CASES[0]).model.config, LENGTHS)
    shards = streamed_shards(store)
    plain = logits(store, batch, Way(0, frozenset(shards)), backend=backend)

    @settings(deadline=None, max_examples=5, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.integers(1, 4), st.sets(st.sampled_from(shards)), st.booleans(), st.sampled_from(["first", "always"]))
    def check(num_slots, residents, direct, verify):
        way = Way(num_slots, frozenset(residents), direct, verify)
        np.testing.assert_array_equal(logits(store, batch, way, backend=backend), plain)

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_that_share_a_sweep_are_answered_as_alone(divided, blocked, backend):
    """Their values wait between the blocks of a product."""
    path, settings = blocked(CASES[0], 3_000), divided(CASES[0]).model.config
    batches = [make_batch(settings, lengths, seed=seed) for seed, lengths in enumerate(([12, 12], [5, 20], [1]))]
    with Store(path) as store:
        engine = open_engine(store, "none", 1, frozenset(), backend=open_backend(backend, store, 1))
        together = engine.sweep([encode(batch, store.program.texts) for batch in batches])
        engine.close()
    alone = np.concatenate([logits(path, batch, backend=backend) for batch in batches])
    np.testing.assert_array_equal(np.stack([outcome.logits_C for outcome in together]), alone)


def write_with_exits(folder):
    """A model with random exits of the form `own`."""
    model = ModelWithExits(make_model(Case("bert").config()), "own").eval()
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.normal_(std=0.3)
    model.model.save_pretrained(folder)
    save_file(model.exit_tensors(), folder / "exits.safetensors")
    (folder / "exits.json").write_bytes(describe_exits("own", 3))
    return model


def test_blocks_of_integers_give_the_bits_of_the_whole(tmp_path):
    """Their sums are exact, whatever the number of columns; exits are not cut."""
    model = write_with_exits(tmp_path / "model")
    batch = make_batch(model.model.config, LENGTHS)
    whole = offramp.divide(tmp_path / "model", tmp_path / "whole", dtype="int8")
    wanted = {backend: logits(whole, batch, backend=backend, exit="stage:2") for backend in BACKENDS}
    for block_bytes in (600, 2_300, 9_000):
        target = tmp_path / str(block_bytes)
        store = offramp.divide(tmp_path / "model", target, dtype="int8", block_bytes=block_bytes)
        for backend in BACKENDS:
            found = logits(store, batch, backend=backend, exit="stage:2")
            np.testing.assert_array_equal(found, wanted[backend], backend)


def test_blocks_of_halves_are_upcast(tmp_path, divided):
    """A block has as many bytes in a slot, where it is F32, as one that is stored so."""
    one = divided(CASES[0])
    stores = [
        offramp.divide(one.source, tmp_path / dtype, dtype=dtype, block_bytes=9_000) for dtype in ("fp16", "fp32")
    ]
    whole = offramp.divide(one.source, tmp_path / "whole", dtype="fp16")
    assert streamed_shards(stores[0]) == streamed_shards(stores[1])
    batch = make_batch(one.model.config, LENGTHS)
    for backend in BACKENDS:
        found, wanted = (logits(store, batch, backend=backend) for store in (stores[0], whole))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_leave_at_exits_and_the_others_go_on(tmp_path, backend):
    model = write_with_exits(tmp_path / "model")
    batch = make_batch(model.model.config, LENGTHS)
    with torch.no_grad():
        said_KBC = np.stack([each.numpy() for each in model(**inputs_of(model.model.config, batch))])
    exponents_KBC = np.exp(said_KBC)
    confidence_KB = (exponents_KBC / exponents_KBC.sum(-1, keepdims=True)).max(-1)
    threshold = float(np.sort(confidence_KB[0])[1:3].mean())
    expected = [next((k for k in (1, 2) if confidence_K[k - 1] >= threshold), 3) for confidence_K in confidence_KB.T]
    store = offramp.divide(tmp_path / "model", tmp_path / "store", block_bytes=9_000)
    (outcomes,) = run(store, [batch], backend=backend, exit=f"confidence:{threshold:.7f}")
    assert [outcome.exit_stage for outcome in outcomes] == expected and len({*expected}) > 1
    for row, outcome in enumerate(outcomes):
        np.testing.assert_allclose(outcome.logits_C, said_KBC[expected[row] - 1][row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_promised_memory_counts_the_blocks_that_wait(divided, blocked, backend):
    """What a batch keeps between two blocks: the hidden state, the inner values, and blocks of the next product."""
    whole, blocks = divided(CASES[0]).store, blocked(CASES[0], 3_000)
    with Store(whole) as one, Store(blocks) as other:
        backends = [open_backend(backend, store, 1) for store in (one, other)]
        states = [each.state_bytes(2, 8) - each.mask_bytes(2, 8) for each in backends]
        assert states[0] == 4 * 16 * 64 and states[1] == 4 * 16 * (64 + 128 + 60), "the last block has 4 outputs"
        backends[1].warm_up(2, 8)
        for each in backends:
            each.close()

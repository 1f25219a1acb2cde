"""Classifiers of images with exits, run as graphs: what each exit says, who leaves where, what is read for it.

Shapes: B rows, C labels; K exits, the last of them the model's own head.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import offramp
from offramp.backends import open_backend
from offramp.errors import BudgetError, StoreError
from offramp.policies import parse, replay
from offramp.policies.evidence import SINGLE_LABEL
from offramp.program.inputs import Batch
from offramp.runtime.inputs import InputReader
from offramp.store import Store
from tests.store.small import refused, reseal, tree_of
from tests.tiny_vision import NAMES, pixels, png, with_exits, write_exits, write_model
from tests.toy import open_engine

BACKENDS = ("ort", "torch")
NUM_ROWS = 6
POLICIES = ("patience:1", "patience:2", "confidence:0.6", "confidence:0.9")


@dataclass(frozen=True)
class Divided:
    """A classifier with random exits, its store, and what each exit says of `PIXELS`: [K, B, C]."""

    model: Any
    store: Path
    said_KBC: np.ndarray


PIXELS = pixels(NUM_ROWS, seed=3)


@pytest.fixture(scope="session")
def divided_vision(tmp_path_factory):
    transformers.utils.logging.disable_progress_bar()

    @functools.cache
    def make(name):
        torch.set_num_threads(1)
        folder = tmp_path_factory.mktemp(name)
        model = with_exits(write_model(folder / "model", name))
        write_exits(folder / "model", model)
        with torch.no_grad():
            said = model(pixel_values=torch.from_numpy(PIXELS))
        store = offramp.divide(folder / "model", folder / "store")
        return Divided(model, store, np.stack([logits_BC.numpy() for logits_BC in said]))

    return make


def encode(pixels):
    """The images as a batch of inputs."""
    return Batch({"pixel_values": pixels}, len(pixels), 1, np.ones(len(pixels), np.int64))


def run(path, batches, exit="none", backend="ort", num_slots=2, residents=()):
    """Outcomes of each batch through the engine."""
    with Store(path, "never") as store:
        widest = max(len(set(step.shards) - set(residents)) for step in store.program.steps())
        opened = open_backend(backend, store, 1)
        engine = open_engine(store, exit, max(num_slots, widest), residents, backend=opened)
        try:
            return [engine.sweep([encode(batch)], more=True) for batch in batches]
        finally:
            engine.close()


def logits(outcomes):
    return np.stack([outcome.logits_C for outcome in outcomes])


@pytest.mark.parametrize("name", NAMES)
def test_exits_stand_between_all_blocks(divided_vision, name):
    """So that what follows is about four exits, and not about the last alone."""
    one = divided_vision(name)
    assert one.said_KBC.shape == (4, NUM_ROWS, 3)
    with Store(one.store, "never") as store:
        assert len(store.program.layers) == 4
    assert len({tuple(row) for row in one.said_KBC.argmax(2)}) > 1, "exits differ"
    assert len(set(one.said_KBC[0].argmax(1))) > 1, "images differ"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_exit_says_what_the_trained_model_says_there(divided_vision, name, backend):
    """Bit for bit on PyTorch."""
    one = divided_vision(name)
    for exit_stage, said_BC in enumerate(one.said_KBC, 1):
        (outcomes,) = run(one.store, [PIXELS], f"stage:{exit_stage}", backend)
        assert {outcome.exit_stage for outcome in outcomes} == {exit_stage}
        np.testing.assert_allclose(logits(outcomes), said_BC, rtol=0, atol=0 if backend == "torch" else 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_without_exits_it_is_the_model_of_transformers(divided_vision, name):
    """Bit for bit on PyTorch, for any number of rows."""
    one = divided_vision(name)
    for num_rows in (1, NUM_ROWS):
        batch = PIXELS[:num_rows]
        with torch.no_grad():
            theirs = one.model.model(pixel_values=torch.from_numpy(batch)).logits.numpy()
        np.testing.assert_array_equal(logits(run(one.store, [batch], backend="torch")[0]), theirs)
        np.testing.assert_allclose(logits(run(one.store, [batch])[0]), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_rows_leave_where_the_replay_of_their_logits_says(divided_vision, name, backend, policy):
    one = divided_vision(name)
    exit_B = replay(parse(policy), one.said_KBC, SINGLE_LABEL)
    for size in (1, 4):
        batches = [PIXELS[start : start + size] for start in range(0, NUM_ROWS, size)]
        outcomes = [each for batch in run(one.store, batches, policy, backend) for each in batch]
        assert [outcome.exit_stage for outcome in outcomes] == exit_B.tolist()
        np.testing.assert_allclose(logits(outcomes), one.said_KBC[exit_B - 1, np.arange(NUM_ROWS)], rtol=0, atol=1e-5)


def test_policies_let_some_leave_and_some_stay(divided_vision):
    """Else the test above would tell nothing."""
    left = {exit for name in NAMES for policy in POLICIES
            for exit in replay(parse(policy), divided_vision(name).said_KBC, SINGLE_LABEL)}  # fmt: skip
    assert left == {1, 2, 3, 4}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_do_not_depend_on_who_else_is_in_the_batch(divided_vision, name, backend):
    one, order = divided_vision(name), np.random.default_rng(5).permutation(NUM_ROWS)
    exit_B = replay(parse("confidence:0.6"), one.said_KBC, SINGLE_LABEL)
    (outcomes,) = run(one.store, [PIXELS[order]], "confidence:0.6", backend)
    assert [outcome.exit_stage for outcome in outcomes] == exit_B[order].tolist()
    expected = one.said_KBC[exit_B[order] - 1, order]
    np.testing.assert_allclose(logits(outcomes), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_who_leaves_earlier_reads_less(divided_vision, name):
    one = divided_vision(name)
    read = [run(one.store, [PIXELS[:1]], f"stage:{stage}")[0][0].bytes_read for stage in range(1, 5)]
    assert read == sorted(set(read))


def test_bytes_are_those_of_the_shards_on_the_way(divided_vision):
    """Each weight once a pass, and nothing else: buffers and constants stay in memory."""
    one = divided_vision("vit")
    (outcomes,) = run(one.store, [PIXELS[:2]])
    with Store(one.store, "never") as store:
        used = {name for step in store.program.steps() for name in step.shards}
        total = sum(store.manifest.shards[name].bytes for name in used)
    assert sum(outcome.bytes_read for outcome in outcomes) == total


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_resident_and_how_many_slots_there_are_changes_no_bit(divided_vision, name, backend):
    one = divided_vision(name)
    with Store(one.store, "never") as store:
        names = [name for step in store.program.steps() for name in step.shards]
    policy, batches = "confidence:0.6", [PIXELS[:4], PIXELS[4:]]
    wanted = [logits(outcomes) for outcomes in run(one.store, batches, policy, backend)]
    for num_slots, residents in ((1, ()), (3, ()), (1, names[::2]), (0, names)):
        found = [logits(outcomes) for outcomes in run(one.store, batches, policy, backend, num_slots, residents)]
        for found_BC, wanted_BC in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(found_BC, wanted_BC)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_smallest_budget_runs_and_less_is_refused(divided_vision, backend, monkeypatch):
    """Of this process, whose footprint moves by some pages from one plan to the next."""
    monkeypatch.setattr("offramp.runtime.run_plan.SMALL_SHARD_BYTES", 0)  # else all of these models is resident
    one, images = divided_vision("vit"), [png(seed) for seed in range(5)]
    options = {"backend": backend, "threads": 1, "batch": 2, "exit": "confidence:0.6"}
    with offramp.load(one.store, 8 << 30, **options) as classifier:
        assert classifier.plan.num_slots == 0, "everything is resident"
        wanted = [(result.label, result.exit_stage) for result in classifier.predict(images)]
    plan = offramp.prepare(one.store, 1, **options).plan
    assert not plan.feasible and plan.num_slots > 0
    with pytest.raises(BudgetError, match="smallest budget that works"):
        offramp.load(one.store, plan.smallest_budget_bytes - (32 << 20), **options)
    with offramp.load(one.store, plan.smallest_budget_bytes + (4 << 20), **options) as classifier:
        assert [(result.label, result.exit_stage) for result in classifier.predict(images)] == wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_of_another_size_is_an_error_that_says_so(divided_vision, backend, monkeypatch):
    one, images = divided_vision("vit"), [np.zeros((1, 3, 24, 24), np.float32)]
    with pytest.raises(StoreError, match=r"\(1, 3, 24, 24\), and the module was divided for \(2, 3, 16, 16\)"):
        run(one.store, images, backend=backend)
    monkeypatch.setattr(InputReader, "read", lambda self, batch, *_: (dict(batch.arrays), 0))
    with pytest.raises(StoreError, match="does not take these inputs"):
        run(one.store, images, backend=backend)


@pytest.mark.parametrize("examples", [[{}], [{"inputs": {}}], [{"inputs": {"pixel_values": []}}], [1], 1])
def test_a_proof_of_another_kind_is_an_error_that_says_so(divided_vision, tmp_path, examples):
    tree = tree_of(divided_vision("vit").store)
    assert tree["proof"]["examples"]
    tree["proof"]["examples"] = examples
    reseal(tmp_path, tree)
    refused(StoreError, lambda: Store(tmp_path, "never"), "proof")


def test_inputs_of_another_kind_are_refused(divided_vision):
    one = divided_vision("vit")
    with pytest.raises(ValueError, match="expected inputs"):
        run(one.store, [PIXELS.astype(np.float64)])

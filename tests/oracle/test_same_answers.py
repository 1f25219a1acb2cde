"""Nothing about how a store is run changes what it answers.

Shapes: B rows, S tokens, C labels.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offramp.runtime.run_plan import choose_reads
from offramp.store import Store
from tests.oracle.tiny import BACKENDS, Case, Way, logits, make_batch, run, streamed_shards
from tests.rounding import PERMUTED_TOLERANCE
from tests.selection import examples

CASE = Case("roberta")
quick = settings(
    deadline=None, max_examples=examples(20), database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def store(divided):
    return divided(CASE).store


@pytest.fixture(scope="module")
def batch(divided):
    return make_batch(divided(CASE).model.config, [31, 9, 16, 2])


@st.composite
def ways(draw, store):
    """Any plan: with 0 slots everything is resident. Direct and mapped where the file system can."""
    shards = streamed_shards(store)
    num_slots = draw(st.integers(0, 3))
    residents = draw(st.sets(st.sampled_from(shards))) if num_slots else shards
    with Store(store) as opened:
        wanted = draw(st.sampled_from(["buffered", "direct", "mapped"]))
        reads = choose_reads(opened, wanted, shards, 0, 0).name
    return Way(num_slots, frozenset(residents), reads, draw(st.sampled_from(["first", "always", "never"])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_plan_read_path_and_check_gives_the_same_bits(store, batch, backend):
    plain = logits(store, batch, Way(num_slots=0, residents=frozenset(streamed_shards(store))), backend=backend)

    @quick
    @given(ways(store))
    def check(way):
        np.testing.assert_array_equal(logits(store, batch, way, backend=backend), plain)

    check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_slots", [0, 1, 2, 3])
def test_what_the_wrap_around_fetched_gives_the_same_bits(store, batch, backend, num_slots):
    way = Way(num_slots, frozenset() if num_slots else frozenset(streamed_shards(store)))
    short = batch.rows([3, 1])
    passes = run(store, [batch, short, batch, batch], way, backend=backend)
    alone = [logits(store, one, way, backend=backend) for one in (batch, short)]
    for outcomes, place in zip(passes, (0, 1, 0, 0), strict=True):
        np.testing.assert_array_equal(np.stack([outcome.logits_C for outcome in outcomes]), alone[place])


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_the_batch_permutes_the_answers(store, batch, backend):
    """Bit for bit, but where libraries round a row by its place."""
    order = [2, 0, 3, 1]
    answers = logits(store, batch, backend=backend)
    permuted = logits(store, batch.rows(order), backend=backend)
    np.testing.assert_allclose(permuted, answers[order], rtol=0, atol=PERMUTED_TOLERANCE[backend])


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_size_and_padding_change_no_more_than_the_last_bits(store, batch, backend):
    together = logits(store, batch, backend=backend)
    for row, length in enumerate(batch.mask_BS.sum(1)):
        alone = batch.rows([row])
        trimmed = type(batch)(alone.ids_BS[:, :length], alone.mask_BS[:, :length], alone.types_BS[:, :length])
        for one in (alone, trimmed):
            np.testing.assert_allclose(logits(store, one, backend=backend)[0], together[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree(divided, backend):
    one = divided(CASE)
    batch = make_batch(one.model.config, [40, 3, 22], seed=1)
    ours, theirs = (logits(one.store, batch, backend=name) for name in (backend, "torch"))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)

import numpy as np
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from hypothesis import given
from hypothesis import strategies as st

from offramp.training.trainer import LengthGroupedBatches


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=300),
    st.integers(1, 7),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_each_row_comes_once_an_epoch_and_no_batch_is_too_large(lengths, batch_size, seed, epoch):
    sampler = LengthGroupedBatches(np.array(lengths), batch_size, seed)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert max(map(len, batches)) <= batch_size
    assert len(batches) == len(sampler)
    assert all(len(batch) == batch_size for batch in batches[:-1])


@given(st.integers(1, 100), st.integers(1, 7), st.integers(0, 3))
def test_two_processes_share_an_epoch(num_rows, batch_size, skipped):
    """As accelerate deals batches out, and skips those that were trained on before an interruption."""
    sampler = LengthGroupedBatches(np.arange(num_rows) % 5, batch_size, seed=0)
    parts = [list(BatchSamplerShard(sampler, 2, index)) for index in range(2)]
    assert len(parts[0]) == len(parts[1]) == len(BatchSamplerShard(sampler, 2, 0))
    assert {row for part in parts for batch in part for row in batch} == set(range(num_rows))
    skipped = min(skipped, len(parts[1]))
    assert list(SkipBatchSampler(BatchSamplerShard(sampler, 2, 1), skipped)) == parts[1][skipped:]


def test_seed_and_epoch_alone_decide():
    lengths_N = np.arange(100) % 13 + 1
    sampler = LengthGroupedBatches(lengths_N, 8, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first != second
    fresh = LengthGroupedBatches(lengths_N, 8, seed=3)
    fresh.set_epoch(1)
    assert list(fresh) == second, "an epoch does not need those before it"
    assert list(LengthGroupedBatches(lengths_N, 8, seed=4)) != first


def test_rows_of_a_batch_are_about_equally_long():
    lengths_N = np.random.default_rng(0).integers(1, 100, 2000)
    spreads = [np.ptp(lengths_N[batch]) for batch in LengthGroupedBatches(lengths_N, 16, seed=0)]
    assert np.mean(spreads) < 5

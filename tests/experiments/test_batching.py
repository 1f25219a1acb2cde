"""Texts that run together: by hand, pass by pass."""

import numpy as np
import pytest

from offramp.experiments.batching import beyond_shares, padded
from offramp.runtime.profile import DeviceProfile

NUM_EXITS = 3
PASS = (0.4, 0.8, 1.2)
"""Seconds of a pass of 4 rows to each exit, whatever their lengths."""
BYTES = (10.0, 30.0, 60.0)
"""Of each of 4 rows that leave together."""


def make_profile(reads=(0.0, 0.0, 0.0), batch=4):
    heads = (0.0,) * (NUM_EXITS - 1)
    return DeviceProfile(
        {"batch": batch}, (8,), (PASS,), (PASS,), (PASS,), (heads,), (PASS,), reads, reads, BYTES, 3
    )  # fmt: skip


def shares(profile, exits):
    """Seconds and bytes a text as shares, and with what they leave out."""
    exit_N = np.array(exits)
    costs, lengths_N = profile.costs(), np.full(len(exits), 8)
    seconds = costs.at(lengths_N)[np.arange(len(exits)), exit_N - 1].mean()
    more = beyond_shares(profile, costs, lengths_N, exit_N)
    return seconds, seconds + more[0], np.array(BYTES)[exit_N - 1].mean() + more[1]


def test_texts_that_run_together_are_as_long_as_the_longest():
    lengths_N = np.array([5, 9, 3, 4, 2, 8, 1])
    assert padded(lengths_N, 3).tolist() == [9, 9, 9, 8, 8, 8, 1]
    assert padded(lengths_N, 1).tolist() == lengths_N.tolist()
    assert padded(lengths_N, 10).tolist() == [9] * 7


def test_without_reads_seconds_are_shares():
    share, seconds, _ = shares(make_profile(), [1, 1, 1, 3, 2, 2, 3, 3])
    assert seconds == share == pytest.approx((3 * 0.1 + 0.3 + 2 * 0.2 + 2 * 0.3) / 8)


def test_a_layer_that_one_row_comes_to_is_read_for_it_alone():
    """The pass takes 0.4 s, and then twice what reading takes, 0.3 s, and not the row's share, 0.1 s."""
    share, seconds, num_bytes = shares(make_profile(reads=(0.3, 0.3, 0.3)), [1, 1, 1, 3])
    assert 4 * share == pytest.approx(0.4 + 0.1 + 0.1)
    assert 4 * seconds == pytest.approx(0.4 + 0.3 + 0.3)
    assert 4 * num_bytes == pytest.approx(4 * 10 + 4 * 20 + 4 * 30), "all that three layers hold"


def test_what_reading_takes_is_at_most_what_the_whole_pass_took():
    _, seconds, _ = shares(make_profile(reads=(9.0, 9.0, 9.0)), [1, 1, 1, 2])
    assert 4 * seconds == pytest.approx(0.4 + 0.4)


def test_reads_that_the_rows_hide_take_nothing_more():
    share, seconds, _ = shares(make_profile(reads=(0.1, 0.1, 0.1)), [1, 1, 3, 3])
    assert seconds == pytest.approx(share)


def test_each_batch_reads_for_itself():
    one = shares(make_profile(reads=(0.3, 0.3, 0.3)), [1, 1, 1, 3])
    assert shares(make_profile(reads=(0.3, 0.3, 0.3)), [1, 1, 1, 3] * 5) == pytest.approx(one)
    together = shares(make_profile(reads=(0.3, 0.3, 0.3)), [1, 1, 1, 1, 3, 3, 3, 3])
    assert together[1] == together[0]
    assert together[2] == pytest.approx((10 + 60) / 2)


@pytest.mark.parametrize("exits", [[1, 2, 3], [3], [1, 1]])
def test_texts_that_run_alone_pay_what_they_take(exits):
    profile = make_profile(reads=(9.0, 9.0, 9.0), batch=1)
    lengths_N = np.full(len(exits), 8)
    assert beyond_shares(profile, profile.costs(), lengths_N, np.array(exits)) == (0.0, 0.0)

"""Texts that run together: by hand, pass by pass."""

import numpy as np
import pytest

from offramp.experiments.batching import additional_costs, padded
from offramp.runtime.profile import DeviceProfile
from offramp.store.policy_file import MeasuredOn

NUM_EXITS = 3
PASS = (0.4, 0.8, 1.2)
"""Seconds of a pass of 4 rows to each exit, whatever their lengths."""
SINGLE = (0.25, 0.5, 0.75)
"""Of a pass of one row."""
BYTES = (10.0, 30.0, 60.0)
"""Of each of 4 rows that leave together."""


def make_profile(single=SINGLE, gather=0.0, batch=4, after=0.0, heads=(0.0, 0.0)):
    reads, single_heads = (0.0,) * NUM_EXITS, tuple(seconds / 2 for seconds in heads)
    return DeviceProfile(
        MeasuredOn(batch=batch), (8,), (PASS,), (PASS,), (PASS,), (heads,), 0.0, (PASS,), reads, reads, BYTES,
        (single,),
        (single_heads,), (gather,), after, 0.8, 3,
    )  # fmt: skip


def shares(profile, exits):
    """Seconds and bytes a text as shares, and with what they leave out."""
    exit_N, lengths_N = np.array(exits), np.full(len(exits), 8)
    seconds = profile.costs().at(lengths_N)[np.arange(len(exits)), exit_N - 1].mean()
    more = additional_costs(profile, 1, lengths_N, exit_N)
    return seconds, seconds + more[0], np.array(BYTES)[exit_N - 1].mean() + more[1]


def test_texts_that_run_together_are_as_long_as_the_longest():
    lengths_N = np.array([5, 9, 3, 4, 2, 8, 1])
    assert padded(lengths_N, 3).tolist() == [9, 9, 9, 8, 8, 8, 1]
    assert padded(lengths_N, 1).tolist() == lengths_N.tolist()
    assert padded(lengths_N, 10).tolist() == [9] * 7


def test_where_one_row_takes_its_share_seconds_are_shares():
    proportional = make_profile(single=(0.1, 0.2, 0.3))
    share, seconds, _ = shares(proportional, [1, 1, 1, 3, 2, 2, 3, 3])
    assert seconds == pytest.approx(share) == pytest.approx((3 * 0.1 + 0.3 + 2 * 0.2 + 2 * 0.3) / 8)


def test_a_layer_that_one_row_comes_to_takes_what_one_row_takes():
    """The pass takes 0.4 s, and then twice 0.25 s, and not the row's share, 0.1 s."""
    share, seconds, num_bytes = shares(make_profile(), [1, 1, 1, 3])
    assert 4 * share == pytest.approx(0.4 + 0.1 + 0.1)
    assert 4 * seconds == pytest.approx(0.4 + 0.25 + 0.25)
    assert 4 * num_bytes == pytest.approx(4 * 10 + 4 * 20 + 4 * 30), "all that three layers hold"


def test_between_one_row_and_all_of_them_a_line_is_drawn():
    _, seconds, _ = shares(make_profile(), [1, 2, 2, 2])
    assert 4 * seconds == pytest.approx(0.4 + 0.25 + (0.4 - 0.25) * 2 / 3)


def test_heads_that_never_run_are_taken_off_passes_of_one_row_too():
    exit_N, lengths_N = np.array([1, 1, 1, 3]), np.full(4, 8)
    profile = make_profile(heads=(0.04, 0.04))
    share = profile.costs(3).at(lengths_N)[np.arange(4), exit_N - 1].sum()
    more, _ = additional_costs(profile, 3, lengths_N, exit_N)
    assert share + 4 * more == pytest.approx(0.4 + (0.25 - 0.02) + (0.25 - 0.02)), "the first head is in no layer after"


def test_rows_that_leave_together_take_nothing_more():
    for exits in ([1] * 4, [3] * 4, [2] * 4 + [1] * 4):
        share, seconds, _ = shares(make_profile(gather=0.05), exits)
        assert seconds == pytest.approx(share)


def test_each_time_that_some_leave_and_some_stay_rows_are_gathered():
    none, some = (shares(make_profile(gather=gather), [1, 1, 2, 3])[1] for gather in (0.0, 0.05))
    assert 4 * (some - none) == pytest.approx(2 * 0.05)


@pytest.mark.parametrize(
    ("batch", "exits", "passes"),
    [(1, [1, 1, 3, 2], [0.4, 0.4, 1.2, 0.8]), (4, [1, 1, 1, 3, 1, 1, 2, 1], [0.4 + 2 * 0.25, 0.4 + 0.25])],
)
def test_among_short_passes_each_takes_less(batch, exits, passes):
    """By the logarithm of what passes take, which is less as well, of what they took that the profile was among."""
    plain, cached = (shares(make_profile(batch=batch, after=each), exits)[1] for each in (0.0, 0.1))
    less = len(exits) * (cached - plain) / len(passes)
    assert less < 0
    assert less == pytest.approx(0.1 * np.log((np.array(passes) + less) / 0.8).mean(), rel=0.01)


def test_no_pass_is_foretold_to_take_less_than_half():
    plain, cached = (shares(make_profile(batch=1, after=each), [1])[1] for each in (0.0, 10.0))
    assert cached == pytest.approx(plain / 2)


def test_each_batch_pays_for_itself():
    one = shares(make_profile(gather=0.05), [1, 1, 1, 3])
    assert shares(make_profile(gather=0.05), [1, 1, 1, 3] * 5) == pytest.approx(one)
    together = shares(make_profile(), [1, 1, 1, 1, 3, 3, 3, 3])
    assert together[1] == pytest.approx(together[0])
    assert together[2] == pytest.approx((10 + 60) / 2)


@pytest.mark.parametrize("exits", [[1, 2, 3], [3], [1, 1]])
def test_texts_that_run_alone_pay_what_they_take(exits):
    profile = make_profile(gather=9.0, batch=1)
    assert additional_costs(profile, 1, np.full(len(exits), 8), np.array(exits)) == (0.0, 0.0)

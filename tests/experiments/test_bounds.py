"""Bounds: the oracle and random exits, on transcripts made by hand, and run by the engine's protocol."""

import numpy as np
import pytest

from offramp.errors import UsageError
from offramp.experiments.bounds import PlannedExits, exits_of
from offramp.policies import parse, replay
from offramp.policies.evidence import SINGLE_LABEL

LOGITS_KNC = np.random.default_rng(0).standard_normal((5, 200, 3)).astype(np.float32)


def test_the_oracle_leaves_at_the_first_exit_with_the_last_answer():
    exits_N = exits_of("oracle", LOGITS_KNC, SINGLE_LABEL, 0)
    answer_KN = LOGITS_KNC.argmax(-1)
    for row, exit in enumerate(exits_N):
        assert answer_KN[exit - 1, row] == answer_KN[-1, row]
        assert all(answer_KN[before, row] != answer_KN[-1, row] for before in range(exit - 1))
    assert exits_N.min() == 1 and exits_N.max() == 5


def test_random_exits_have_the_depths_of_the_policy_and_a_seed():
    exits_N = replay(parse("patience:1"), LOGITS_KNC, SINGLE_LABEL)
    found = [exits_of("random:patience:1", LOGITS_KNC, SINGLE_LABEL, seed) for seed in (1, 1, 2)]
    assert all(sorted(each) == sorted(exits_N) for each in found)
    assert (found[0] == found[1]).all() and (found[0] != found[2]).any()
    with pytest.raises(UsageError):
        exits_of("random:stage:9", LOGITS_KNC, SINGLE_LABEL, 0)


def test_random_exits_of_a_policy_that_reads_lengths(tmp_path):
    code = "from offramp.policies import MemorylessPolicy\n\n\nclass Short(MemorylessPolicy):\n"
    code += "    def update(self, exit_index, evidence):\n        return evidence.lengths_B < 10\n"
    (tmp_path / "mine.py").write_text(code)
    lengths_N = np.where(np.arange(200) < 50, 5, 20)
    found = exits_of(f"random:{tmp_path}/mine.py:Short", LOGITS_KNC, SINGLE_LABEL, 0, lengths_N)
    assert sorted(found) == [1] * 50 + [5] * 150


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_planned_exits_are_taken_in_the_order_of_the_rows(batch):
    exits = exits_of("oracle", LOGITS_KNC, SINGLE_LABEL, 0)[:20].tolist()
    policy, taken = PlannedExits("oracle", exits), []
    policy.start(3, 5)
    policy.restart()
    for start in range(0, len(exits), batch):
        rows = list(range(start, min(start + batch, len(exits))))
        decider = policy.start(len(rows), 5)
        exit_of = dict.fromkeys(rows, 5)
        for exit_index in range(1, 5):
            leaves = decider.update(exit_index, None)
            exit_of.update({row: exit_index for row, leave in zip(rows, leaves, strict=True) if leave})
            rows = [row for row, leave in zip(rows, leaves, strict=True) if not leave]
            decider.keep(~leaves)
        taken += exit_of.values()
    assert taken == exits


def test_exits_beyond_the_model_are_refused():
    policy = PlannedExits("oracle", [1, 9])
    assert str(policy) == "oracle"
    policy.check(9, None)
    with pytest.raises(UsageError, match="planned"):
        policy.check(5, None)

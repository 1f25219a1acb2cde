from dataclasses import replace

import numpy as np
import pytest

import offramp
from offramp.errors import BudgetError
from offramp.experiments.choosing import ALLOWED_LOSS
from offramp.experiments.demo import MAX_LENGTH, SPARE_BYTES, _budget, choose_policy
from offramp.runtime.config import EngineConfig
from tests.cli.conftest import write_tiny

TRUTH_N = np.arange(200) % 2


def said(num_wrong_by_exit, sureness):
    """Logits [K, N, 2]: exit k is wrong on the first so many samples, and as sure as it is told."""
    right_KN = np.arange(len(TRUTH_N)) >= np.array(num_wrong_by_exit)[:, None]
    sign_KN = np.where(right_KN, 1, -1) * np.where(TRUTH_N == 1, 1, -1) * sureness
    return np.stack([-sign_KN, sign_KN], axis=-1).astype(np.float32)


def test_the_earliest_policy_that_loses_nothing_is_chosen():
    told = []
    assert choose_policy(said([0, 0, 0, 0], 5.0), TRUTH_N, told.append) == "confidence:0.99"
    assert told[0] == "tune split: patience:1: accuracy 100.0 (full depth 100.0), mean exit 2.00"
    assert choose_policy(said([0, 0, 0, 0], 0.1), TRUTH_N, told.append) == "patience:1"


def test_a_loss_beyond_the_allowed_one_rules_a_policy_out():
    allowed = round(ALLOWED_LOSS / 100 * len(TRUTH_N))
    assert choose_policy(said([allowed, 0, 0, 0], 5.0), TRUTH_N, print) == "confidence:0.99"
    assert choose_policy(said([allowed + 1, 0, 0, 0], 5.0), TRUTH_N, print) == "patience:1"


def test_none_where_every_exit_but_the_last_is_bad():
    assert choose_policy(said([90, 90, 90, 90, 0], 5.0), TRUTH_N, print) == "none"


@pytest.mark.parametrize("column", [0, 1])
def test_a_policy_may_gain(column):
    logits_KNC = said([0, 0, 0, 50], 5.0)
    logits_KNC[:, :, column] += 0.01
    assert choose_policy(logits_KNC, TRUTH_N, print) == "confidence:0.99"


def test_the_budget_is_checked_before_any_run(tmp_path):
    store = offramp.divide(write_tiny(tmp_path / "model", max_position_embeddings=MAX_LENGTH), tmp_path / "store")
    config = EngineConfig(max_length=MAX_LENGTH)
    with pytest.raises(BudgetError, match="the smallest budget that works is"):
        _budget(store, replace(config, budget=1 << 20))
    assert _budget(store, replace(config, budget=1 << 30)) == 1 << 30
    assert SPARE_BYTES < _budget(store, config) < 1 << 30

"""Other seconds: the index form weighs them without a new fit, all else stays as it was tuned."""

from offramp.policies import parse, replay
from offramp.policies.combine import AllOf, AnyOf, From
from offramp.policies.costs import Costs
from offramp.policies.fitting import TrainingSet, fit_index_risks, fit_risks, fit_stopping
from offramp.policies.learned import Halting, Index, Starting, with_costs
from tests.policies.driver import SINGLE
from tests.policies.test_learned import COSTS, NUM_EXITS, make_logits


def slower(first):
    """Everything takes four times as long."""
    return Costs(COSTS.lengths, tuple(tuple(4 * each for each in row[first - 1 :]) for row in COSTS.seconds))


def index_from(first, data, price=0.5):
    logits_KNC, truth_N, lengths_N = data
    training_set = TrainingSet.from_logits(logits_KNC[first - 1 :], truth_N, lengths_N, SINGLE)
    costs = Costs(COSTS.lengths, tuple(row[first - 1 :] for row in COSTS.seconds))
    policy = Index(fit_index_risks(training_set), costs, price)
    return policy if first == 1 else Starting(first, policy)


def test_an_index_is_what_a_fit_with_these_seconds_would_be_and_leaves_earlier():
    data = make_logits()
    logits_KNC, _, lengths_N = data
    for first in (1, 2):
        policy = index_from(first, data)
        again = with_costs(policy, slower)
        inner = again if first == 1 else again.policy
        assert inner.costs == slower(first)
        assert inner.risks == (policy if first == 1 else policy.policy).risks
        exits, other = (replay(each, logits_KNC, SINGLE, lengths_N) for each in (policy, again))
        assert (other <= exits).all() and other.mean() < exits.mean() - 0.1
        assert (other == replay(index_from(first, data, 2.0), logits_KNC, SINGLE, lengths_N)).all(), (
            "four times the price"
        )


def test_parts_are_recosted_and_what_needs_a_fit_is_not():
    data = make_logits()
    training_set, index, rule = TrainingSet.from_logits(*data, SINGLE), index_from(1, data), parse("patience:2")
    new = with_costs(index, slower)
    assert new != index
    assert with_costs(From(2, AnyOf((AllOf((index, rule)), rule))), slower) == From(
        2, AnyOf((AllOf((new, rule)), rule))
    )
    for policy in (
        rule,
        Halting(fit_risks(training_set), 0.1),
        fit_stopping(training_set, fit_risks(training_set), COSTS, 0.5),
    ):
        assert with_costs(policy, slower) == policy
    assert new.num_early_exits + 1 == NUM_EXITS

"""Learned policies: what they save, what they refuse, and that they do what the formulas say."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import UsageError
from offramp.policies import Evidence, fitting, parse, replay
from offramp.policies.codec import FIRST_FEATURE_NAMES, from_json, to_json
from offramp.policies.combine import AllOf, AnyOf, From
from offramp.policies.costs import Costs
from offramp.policies.evidence import FEATURES, FeatureMemory
from offramp.policies.fitting import TrainingSet, fit_index_risks, fit_risks, fit_stopping, fit_thresholds
from offramp.policies.learned import Halting, Index, Starting, Stopping, Thresholds, predict_risk
from tests.policies.driver import MULTI, REGRESSION, SINGLE, exits_of, logits, quick

NUM_EXITS = 5
COSTS = Costs((4, 64), ((0.01, 0.02, 0.03, 0.04, 0.05), (0.1, 0.2, 0.3, 0.4, 0.5)))


def make_logits(num=4000, seed=0, num_classes=3):
    """Exits that know more and more of easy samples, and of hard ones only late; truth and lengths beside them."""
    generator = np.random.default_rng(seed)
    truth_N = generator.integers(0, num_classes, num)
    easy_N = generator.uniform(0.2, 3, num)
    lengths_N = generator.integers(4, 65, num)
    logits_KNC = generator.normal(0, 1, (NUM_EXITS, num, num_classes)).cumsum(0) * 0.4
    for exit_index in range(NUM_EXITS):
        logits_KNC[exit_index, np.arange(num), truth_N] += easy_N * (exit_index + 1) / 2
    return logits_KNC.astype(np.float32), truth_N, lengths_N


@pytest.fixture(scope="module")
def data():
    return make_logits(num=16_000, seed=5)


@pytest.fixture(scope="module")
def training_set(data):
    return TrainingSet.from_logits(*data, SINGLE)


@pytest.fixture(scope="module")
def learned(training_set):
    """One of each kind."""
    risks = fit_risks(training_set)
    return [
        fit_thresholds(training_set, 0.8),
        Halting(risks, 0.1),
        fit_stopping(training_set, fit_risks(training_set), COSTS, 0.5),
        Index(fit_index_risks(training_set), COSTS, 0.5),
    ]


def test_policies_for_several_prices_share_fits_and_are_those_of_sets_of_their_own(monkeypatch):
    fit, fitted = fitting._logistic, []
    monkeypatch.setattr(fitting, "_logistic", lambda *args: fitted.append(None) or fit(*args))

    def policies(*sets):
        fitted.clear()
        found = [
            fit_stopping(each, fit_risks(each), COSTS, price) for each, price in zip(sets, (0.1, 2.0), strict=True)
        ]
        return [to_json(each) for each in found], len(fitted)

    first, second, other = (TrainingSet.from_logits(*make_logits(num=300), SINGLE) for _ in range(3))
    (alone, num_alone), (together, num_together) = policies(first, second), policies(other, other)
    assert together == alone and alone[0] != alone[1]
    num_heads = NUM_EXITS - 1
    assert num_alone == 6 * num_heads and num_together <= num_alone - num_heads - 2


def objective(policy, data, price):
    """Mean of loss + price x seconds, and its parts."""
    logits_KNC, truth_N, lengths_N = data
    exit_N = replay(policy, logits_KNC, SINGLE, lengths_N)
    wrong = (logits_KNC[exit_N - 1, np.arange(len(exit_N))].argmax(1) != truth_N).mean()
    seconds = COSTS.at(lengths_N)[np.arange(len(exit_N)), exit_N - 1].mean()
    return wrong + price * seconds, wrong, seconds


@pytest.mark.parametrize("price", [0.1, 0.5, 2.0])
def test_the_cost_function_beats_thresholds_and_patience(training_set, data, price):
    """On new samples, by what it is made to minimise; the others are those that are best on the samples it saw."""
    fresh = make_logits(num=20_000, seed=1)
    others = [parse(text) for text in ("none", *(f"stage:{k}" for k in range(1, NUM_EXITS)))]
    others += [parse(f"confidence:{level}") for level in np.linspace(0.35, 0.995, 60)]
    others += [parse(f"patience:{patience}") for patience in range(1, NUM_EXITS)]
    best = min(others, key=lambda policy: objective(policy, data, price)[0])
    rival = objective(best, fresh, price)[0]
    assert objective(fit_stopping(training_set, fit_risks(training_set), COSTS, price), fresh, price)[0] < rival
    assert objective(Index(fit_index_risks(training_set), COSTS, price), fresh, price)[0] < rival


def test_a_dearer_second_leaves_earlier(training_set, data):
    pairs = fit_index_risks(training_set)
    for make in (
        lambda price: fit_stopping(training_set, fit_risks(training_set), COSTS, price),
        lambda price: Index(pairs, COSTS, price),
    ):
        seconds = [
            objective(make(price), data, price)[2] for price in (-1e6, -0.1, 0.0, 0.01, 0.1, 0.5, 1.0, 3.0, 30.0, 1e6)
        ]
        assert seconds == sorted(seconds, reverse=True)
        assert seconds[-1] == pytest.approx(COSTS.at(data[2])[:, 0].mean()), "all leave at the first exit"
        assert seconds[0] > 2 * seconds[-1]


def test_long_rows_leave_earlier(training_set, data):
    """They pay more for the same gain."""
    stopping = fit_stopping(training_set, fit_risks(training_set), COSTS, 1.0)
    exit_N = replay(stopping, data[0], SINGLE, data[2])
    assert exit_N[data[2] > 50].mean() < exit_N[data[2] < 15].mean() - 0.5


def test_other_costs_need_no_new_fit(training_set, data):
    """The index form, with costs doubled at half the price, decides as before."""
    pairs = fit_index_risks(training_set)
    double = Costs(COSTS.lengths, tuple(tuple(2 * second for second in row) for row in COSTS.seconds))
    before, after = (
        replay(each, data[0], SINGLE, data[2]) for each in (Index(pairs, COSTS, 1), Index(pairs, double, 0.5))
    )
    assert (before == after).all()


def test_risks_are_calibrated(training_set, data):
    """Among the samples that are told to be wrong with probability p, about p are."""
    fresh = TrainingSet.from_logits(*make_logits(seed=2), SINGLE)
    for weights, features_NF, loss_N in zip(fit_risks(training_set), fresh.features_KNF, fresh.loss_KN, strict=False):
        risk_N = predict_risk(weights, features_NF, True)
        assert risk_N.mean() == pytest.approx(loss_N.mean(), abs=0.03)
        for low, high in ((0, 0.2), (0.2, 0.5), (0.5, 1)):
            chosen_N = (risk_N >= low) & (risk_N < high)
            if chosen_N.sum() > 200:
                assert risk_N[chosen_N].mean() == pytest.approx(loss_N[chosen_N].mean(), abs=0.08)


def test_stopping_follows_the_formula_sample_by_sample(training_set, data):
    """Written again, one sample at a time."""
    logits_KNC, _, lengths_N = data
    policy = fit_stopping(training_set, fit_risks(training_set), COSTS, 0.7)
    found = replay(policy, logits_KNC, SINGLE, lengths_N)

    def logistic(weights, features):
        return 1 / (1 + np.exp(-sum(w * f for w, f in zip(weights, features, strict=True))))

    for sample in range(40):
        expected = NUM_EXITS
        seconds = [np.interp(lengths_N[sample], (4, 64), column) for column in zip(*COSTS.seconds, strict=True)]
        for k in range(1, NUM_EXITS):
            x = training_set.features_KNF[k - 1, sample]
            gain = logistic(policy.risks[k - 1], x) - logistic(policy.futures[k - 1], x)
            wait = logistic(policy.waits[k - 1], x) * (seconds[-1] - seconds[k])
            if gain <= 0.7 * (seconds[k] - seconds[k - 1] + wait):
                expected = k
                break
        assert found[sample] == expected


def test_geometric_shares_are_kept(training_set, data):
    for ratio in (0.5, 1.0, 2.0):
        exit_N = replay(fit_thresholds(training_set, ratio), data[0], SINGLE)
        shares = ratio ** np.arange(NUM_EXITS)
        counts = np.bincount(exit_N, minlength=NUM_EXITS + 1)[1:]
        np.testing.assert_allclose(counts / len(exit_N), shares / shares.sum(), atol=0.002)


def test_a_regression_has_a_cost_function_too():
    _, truth_N, lengths_N = make_logits()
    value_N = truth_N.astype(np.float64)
    noise = np.random.default_rng(0).normal(0, 1, (NUM_EXITS, len(value_N)))
    values_KN1 = (value_N + noise / np.arange(1, NUM_EXITS + 1)[:, None]).astype(np.float32)[:, :, None]
    training_set = TrainingSet.from_logits(values_KN1, value_N, lengths_N, REGRESSION)
    policy = fit_stopping(training_set, fit_risks(training_set), COSTS, 1.0)
    exit_N = replay(policy, values_KN1, REGRESSION, lengths_N)
    assert 1 < exit_N.mean() < NUM_EXITS
    with pytest.raises(UsageError, match="which a regression does not have"):
        Thresholds((0.5,) * (NUM_EXITS - 1)).check(NUM_EXITS, REGRESSION)


@pytest.mark.parametrize("case", ["constant", "one class", "always right", "always wrong", "two samples"])
def test_degenerate_splits_fit(case):
    logits_KNC, truth_N, lengths_N = make_logits(num=2 if case == "two samples" else 50)
    if case == "constant":
        logits_KNC[:] = 0
    if case == "one class":
        logits_KNC, truth_N = logits_KNC[:, :, :1], np.zeros(50, np.int64)
    if case == "always right":
        logits_KNC[:, np.arange(50), truth_N] = 20
    if case == "always wrong":
        logits_KNC[:, np.arange(50), truth_N] = -20
    training_set = TrainingSet.from_logits(logits_KNC, truth_N, lengths_N, SINGLE)
    for policy in (
        fit_stopping(training_set, fit_risks(training_set), COSTS, 0.1),
        Index(fit_index_risks(training_set), COSTS, 0.1),
        fit_thresholds(training_set, 1.0),
    ):
        exit_N = replay(policy, logits_KNC, SINGLE, lengths_N)
        assert ((exit_N >= 1) & (exit_N <= NUM_EXITS)).all()
        if case == "always right" and not isinstance(policy, Thresholds):
            assert (exit_N == 1).all(), "nothing to gain"


def test_nan_is_refused():
    logits_KNC, truth_N, lengths_N = make_logits(num=10)
    logits_KNC[1, 3, 0] = np.nan
    with pytest.raises(ValueError, match="logits must be finite"):
        TrainingSet.from_logits(logits_KNC, truth_N, lengths_N, SINGLE)


def test_one_exit_has_nothing_to_learn():
    logits_KNC, truth_N, lengths_N = make_logits(num=10)
    training_set = TrainingSet.from_logits(logits_KNC[-1:], truth_N, lengths_N, SINGLE)
    policy = fit_stopping(training_set, fit_risks(training_set), Costs((4,), ((0.1,),)), 1.0)
    assert replay(policy, logits_KNC[-1:], SINGLE, lengths_N).tolist() == [1] * 10


def test_files_read_back(learned):
    for policy in learned:
        tree = json.loads(json.dumps(to_json(policy)))
        assert from_json(tree) == policy
        assert str(from_json(tree)) == str(policy)
        assert str(policy).startswith(policy.word + ":")
        with pytest.raises(UsageError, match="was fitted for 5 exits, but the model has 6"):
            policy.check(6, SINGLE)
        policy.check(5, SINGLE)
    assert len({str(policy) for policy in learned}) == len(learned)


def test_policy_files_with_the_first_feature_names_are_read(learned):
    """Offramp 0.1 called the feature `log_odds` by another name; the numbers are the same."""
    halting = learned[1]
    tree = json.loads(json.dumps(to_json(halting)))
    assert tree["features"][1] == "log_odds"
    assert from_json({**tree, "features": FIRST_FEATURE_NAMES}) == halting
    with pytest.raises(ValueError, match="features must be one, log_odds"):
        from_json({**tree, "features": [*FIRST_FEATURE_NAMES[:-1], "length"]})


def test_learned_policies_are_joined_with_rules_and_kept(learned, data):
    """A file of each reads back, and leaves where its parts say."""
    logits_KNC, _, lengths_N = data
    exits = lambda policy: replay(policy, logits_KNC, SINGLE, lengths_N)  # noqa: E731
    one, other, rule = learned[2], Starting(2, Thresholds((0.9, 0.8, 0.7))), parse("patience:2")
    for joined, same in (
        (AnyOf((one, rule)), np.minimum(exits(one), exits(rule))),
        (AllOf((one, parse("confidence:0.01"))), exits(one)),
        (From(3, one), None),
        (AnyOf((AllOf((one, rule)), other)), None),
    ):
        again = from_json(json.loads(json.dumps(to_json(joined))))
        assert again == joined
        assert same is None or (exits(joined) == same).all()
    assert exits(From(3, one)).min() == 3
    assert to_json(parse("patience:1|confidence:0.9")) == {"kind": "rule", "text": "patience:1|confidence:0.9"}
    for tree, match in (
        ({"kind": "all", "parts": [to_json(one)]}, "two parts"),
        ({"kind": "from", "exit_index": True, "policy": to_json(one)}, "True"),
        ({"kind": "from", "exit_index": 2, "policy": 3}, "a policy must be an object"),
        ({"kind": "any", "parts": [3, 3]}, "a policy must be an object"),
    ):
        with pytest.raises(ValueError, match=match):
            from_json(tree)


def test_a_policy_that_starts_later_sees_every_exit_from_there_on_when_joined(learned, data):
    logits_KNC, _, lengths_N = data
    whole = learned[2]
    costs = Costs(whole.costs.lengths, tuple(row[1:] for row in whole.costs.seconds))
    starting = Starting(2, Stopping(whole.risks[1:], whole.futures[1:], whole.waits[1:], costs, whole.price))
    alone_N = replay(starting, logits_KNC, SINGLE, lengths_N)
    joined = From(4, starting)
    assert (joined.first_evidence(NUM_EXITS), starting.first_evidence(NUM_EXITS)) == (1, 2)
    later_N = replay(joined, logits_KNC, SINGLE, lengths_N)
    assert (later_N[alone_N >= 4] == alone_N[alone_N >= 4]).all()
    assert later_N.min() == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "oracle"}, "kind must be one of"),
        ({"features": ["one"]}, "features must be one, log_odds"),
        ({"price": float("nan")}, "numbers must be finite, got nan"),
        ({"price": None}, "numbers must be finite, got None"),
        ({"price": True}, "numbers must be finite, got True"),
        ({"risks": [[1.0]]}, f"each row must have {len(FEATURES)} weights, got 1"),
        ({"risks": None}, "invalid value"),
        ({"risks": []}, "weights and costs must have the same exits"),
        ({"futures": [["1"] * len(FEATURES)] * (NUM_EXITS - 1)}, "numbers must be finite, got '1'"),
        ({"costs": {"lengths": [4], "seconds": [[0.2, 0.1, 0.3, 0.4, 0.5]]}}, "seconds must be finite"),
        ({"costs": {"lengths": [4], "seconds": [[0.1, 0.2]]}}, "weights and costs must have the same exits"),
        ({"costs": {"lengths": [64, 4], "seconds": COSTS.seconds}}, "lengths must be strictly increasing"),
        ({"costs": {}}, "invalid value"),
        ({"costs": 3}, "invalid value"),
        ({"waits": [[0.0] * len(FEATURES)]}, "weights and costs must have the same exits"),
        ({"more": 1}, "expected risks, futures, waits"),
    ],
)
def test_files_of_something_else_are_refused(learned, change, message):
    tree = json.loads(json.dumps(to_json(learned[2])))
    with pytest.raises(ValueError, match=message):
        from_json({**tree, **change})


def test_costs_are_linear_between_lengths():
    np.testing.assert_allclose(COSTS.at(np.array([4, 34, 64, 500]))[:, 0], [0.01, 0.055, 0.1, 0.1])


def test_features_forget_who_left():
    memory = FeatureMemory(3)
    memory.update(Evidence.from_logits(np.eye(3), SINGLE, np.array([1, 2, 3])))
    memory.keep(np.array([True, False, True]))
    found = memory.update(Evidence.from_logits(np.eye(3)[[0, 1]], SINGLE, np.array([1, 3])))
    streak = found[:, FEATURES.index("streak")]
    assert streak.tolist() == [0.25, 0.0]


@quick
@given(st.data(), logits(num_exits=NUM_EXITS), st.sampled_from([SINGLE, MULTI]))
def test_a_batch_leaves_where_its_rows_would_leave_alone(learned, data, logits_KNC, problem):
    policy = data.draw(st.sampled_from(learned))
    lengths_N = np.array(data.draw(st.lists(st.integers(1, 99), min_size=5, max_size=5)))[: logits_KNC.shape[1]]
    together = replay(policy, logits_KNC, problem, lengths_N)
    alone = [
        int(replay(policy, logits_KNC[:, [row]], problem, lengths_N[[row]])[0]) for row in range(logits_KNC.shape[1])
    ]
    assert together.tolist() == alone
    assert exits_of(policy, logits_KNC, problem) == replay(policy, logits_KNC, problem).tolist()


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_the_constant_of_a_risk_is_not_penalised(share):
    """Features that tell nothing predict the share of losses, also where losses are rare."""
    loss_N = np.zeros(200)
    loss_N[: int(200 * share)] = 1
    weights = fitting._logistic(np.ones((200, 1)), loss_N)
    assert predict_risk(weights, np.ones((1, 1)), True)[0] == pytest.approx(share, rel=1e-3)

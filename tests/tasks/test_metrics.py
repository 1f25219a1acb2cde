import numpy as np
import pytest

from offramp.measure.statistics import bootstrap
from offramp.tasks.glue import TASKS
from offramp.tasks.metrics import METRICS, metrics_of_ids, paired_interval, resampled_scores, score, score_exits


def test_known_values():
    truth, answer = np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0])
    found = score(("accuracy", "f1", "matthews"), truth, answer)
    assert found == pytest.approx(
        {"accuracy": 75, "f1": 200 / 3, "matthews": 100 / np.sqrt(3), "score": (75 + 200 / 3 + 100 / np.sqrt(3)) / 3}
    )
    values = score(("pearson", "spearman"), np.array([1.0, 2, 3]), np.array([1.0, 4, 9]))
    assert values["spearman"] == pytest.approx(100)
    assert 98 < values["pearson"] < 100


def test_answers_that_tell_nothing_score_nothing():
    assert score(("pearson", "spearman"), np.array([1.0, 2, 3]), np.ones(3))["score"] == 0
    assert score(("matthews",), np.array([0, 1]), np.array([1, 1]))["score"] == 0
    assert score(("f1",), np.array([0, 0]), np.array([0, 0]))["score"] == 0


def test_f1_is_of_the_same_class_whatever_its_id():
    truth, answer = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 0, 1])
    names = ("accuracy", "f1", "matthews")
    straight, turned = (metrics_of_ids(names, ids) for ids in ((0, 1), (1, 0)))
    assert straight == names != turned and metrics_of_ids(names, (2, 0, 1)) == names
    assert [*score(turned, 1 - truth, 1 - answer).values()] == [*score(straight, truth, answer).values()]
    draws = [resampled_scores(*each, 50) for each in ((straight, truth, answer), (turned, 1 - truth, 1 - answer))]
    assert np.allclose(*draws)


def test_every_task_has_known_metrics():
    assert {name for task in TASKS.values() for name in task.metrics} <= set(METRICS)


def test_wrong_arguments():
    for metrics, truth, answer in (
        (("accuracy",), [1], []),
        (("accuracy",), [], []),
        (("bleu",), [1], [1]),
        ((), [1], [1]),
    ):
        with pytest.raises(ValueError, match="expected"):
            score(metrics, np.array(truth), np.array(answer))


def test_each_exit_has_its_scores():
    logits_KNC = np.array([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    assert [found["score"] for found in score_exits(["accuracy"], np.array([0, 1]), logits_KNC)] == [50, 100]
    values_KNC = np.array([[[1.0], [2.0], [3.0]], [[3.0], [2.0], [1.0]]])
    scores = score_exits(["pearson"], np.array([0.0, 1.0, 2.0]), values_KNC)
    assert [found["score"] for found in scores] == pytest.approx([100, -100])


def test_a_paired_interval_is_about_the_gain_and_knows_its_sign():
    truth_N = np.arange(400) % 2
    good_N = np.where(np.arange(400) % 10 == 0, 1 - truth_N, truth_N)
    bad_N = np.where(np.arange(400) % 4 == 0, 1 - truth_N, truth_N)
    gain, low, high = paired_interval(["accuracy"], truth_N, good_N, bad_N)
    assert gain == pytest.approx(15)
    assert 0 < low < gain < high
    assert paired_interval(["accuracy"], truth_N, bad_N, good_N)[2] < 0
    assert paired_interval(["accuracy"], truth_N, good_N, good_N) == (0, 0, 0)


def test_a_paired_interval_has_the_width_of_the_standard_error():
    """Accuracy: the difference has a mean of +-1 and 0 with a known variance."""
    rng = np.random.default_rng(0)
    truth_N = np.zeros(1000, np.int64)
    one_N, other_N = (rng.random(1000) < 0.2).astype(np.int64), (rng.random(1000) < 0.2).astype(np.int64)
    _, low, high = paired_interval(["accuracy"], truth_N, one_N, other_N)
    wanted = 2 * 1.96 * 100 * (other_N - one_N).std() / np.sqrt(1000)
    assert high - low == pytest.approx(wanted, rel=0.1)


def test_a_draw_of_one_label_alone_is_no_error():
    truth_N = np.array([0] * 30 + [1])
    gain, low, high = paired_interval(["matthews", "f1"], truth_N, truth_N, np.zeros(31, np.int64))
    assert gain == pytest.approx(100)
    assert low <= gain
    assert np.isfinite([low, high]).all()


def test_runs_of_several_seeds_are_drawn_together():
    """Three equal runs tell no more than one."""
    truth_N = np.arange(300) % 2
    one_N, other_N = np.where(np.arange(300) % 7 == 0, 1 - truth_N, truth_N), np.ones(300, np.int64)
    alone = paired_interval(["accuracy"], truth_N, one_N, other_N)
    assert paired_interval(["accuracy"], truth_N, np.stack([one_N] * 3), np.stack([other_N] * 3)) == pytest.approx(
        alone
    )


def test_a_bootstrap_resamples_every_axis_alike_for_both_sides():
    """The ratio of two equal sides has no spread, and that of sides in proportion none either."""
    seconds_RU = np.random.default_rng(1).random((5, 40)) + 1

    def ratio(rounds, units):
        drawn = np.ix_(rounds, units)
        return float(np.median((2 * seconds_RU)[drawn], axis=0).sum() / np.median(seconds_RU[drawn], axis=0).sum())

    value, draws = bootstrap(ratio, seconds_RU.shape, 50)
    assert [value, *draws] == pytest.approx([2] * 51)
    calls = []
    bootstrap(lambda rounds, units: calls.append((rounds, units)) or 0.0, (5, 40), 7)
    assert len(calls) == 8 and calls[0][0].tolist() == list(range(5)) and calls[0][1].tolist() == list(range(40))
    assert all((len(rounds), len(units)) == (5, 40) for rounds, units in calls)
    assert any(len(set(units)) < 40 for _, units in calls[1:])


def test_the_draws_are_the_same_for_ever():
    """Published intervals can be recomputed."""
    draws = []
    bootstrap(lambda draw: draws.append(draw.tolist()) or 0.0, (400,), 3)
    whole = np.random.default_rng(0).integers(0, 400, (3, 400))
    assert draws == [list(range(400)), *whole.tolist()]

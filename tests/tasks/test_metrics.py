import numpy as np
import pytest

from offramp.tasks.glue import TASKS
from offramp.tasks.metrics import METRICS, score


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

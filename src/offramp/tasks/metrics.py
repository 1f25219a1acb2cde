"""Metrics of tasks, computed by scikit-learn and scipy, and intervals of their differences.

Scores are in percent, and larger is better.

Shapes: K exits, N examples, C outputs of a head, S runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np

from offramp.measure.statistics import Estimate, resampled


def _accuracy(truth_N: np.ndarray, answer_N: np.ndarray) -> float:
    return float((truth_N == answer_N).mean())


def _f1(positive: int, truth_N: np.ndarray, answer_N: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(cast(Any, f1_score(truth_N == positive, answer_N == positive, zero_division=cast(Any, 0.0))))


def _matthews(truth_N: np.ndarray, answer_N: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(truth_N, answer_N))


def _correlation(name: str, truth_N: np.ndarray, answer_N: np.ndarray) -> float:
    """Return a correlation of scipy, or 0 if either array is constant and the correlation undefined."""
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = float(getattr(stats, name)(truth_N, answer_N)[0]) if len(truth_N) > 1 else 0.0
    return value if np.isfinite(value) else 0.0


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy, "f1": partial(_f1, 1), "f1_of_0": partial(_f1, 0), "matthews": _matthews,
    "pearson": partial(_correlation, "pearsonr"), "spearman": partial(_correlation, "spearmanr"),
}  # fmt: skip


def metrics_of_ids(metrics: Sequence[str], ids: Sequence[int]) -> tuple[str, ...]:
    """Return the metrics for a model that has these ids of the labels 0 and 1: F1 is that of label 1, whatever its id.

    F1 is only of tasks with two labels; other metrics do not depend on the order of labels.
    """
    return tuple("f1_of_0" if name == "f1" and list(ids) == [1, 0] else name for name in metrics)


def default_metrics(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the metrics of data that name none: accuracy, or, without labels (a regression), both correlations."""
    return ("accuracy",) if labels else ("pearson", "spearman")


def score(metrics: Sequence[str], truth_N: np.ndarray, answer_N: np.ndarray) -> dict[str, float]:
    """Return each metric in percent, and `score`, their mean. Answers are label ids, or values for correlations.

    Raises ValueError for arrays of different lengths or length 0, and for an unknown metric.
    """
    if len(truth_N) != len(answer_N) or not len(truth_N):
        raise ValueError(f"expected as many answers as truths, at least one, got {len(answer_N)} and {len(truth_N)}")
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"expected metrics out of {', '.join(METRICS)}, got {list(metrics)}")
    found = {name: 100 * METRICS[name](np.asarray(truth_N), np.asarray(answer_N)) for name in metrics}
    return {**found, "score": sum(found.values()) / len(found)}


def resampled_scores(metrics: Sequence[str], truth_N: np.ndarray, answer_N: np.ndarray, num_draws: int) -> np.ndarray:
    """Return the score [D] of each of D resamples, which are those of `bootstrap` for this number of examples.

    Accuracies, and metrics of two classes, are computed from counts; for others `score` is called for each resample.
    """
    parts = [_scores_of(metrics, truth_N, answer_N, draws_DN) for draws_DN in resampled(len(truth_N), num_draws)]
    return np.concatenate(parts)


def _scores_of(metrics: Sequence[str], truth_N: np.ndarray, answer_N: np.ndarray, draws_DN: np.ndarray) -> Any:
    truth_N, answer_N = np.asarray(truth_N), np.asarray(answer_N)
    if not set(metrics) <= {"accuracy", "f1", "f1_of_0", "matthews"} or not _is_binary(truth_N, answer_N):
        if set(metrics) == {"accuracy"}:
            return 100 * (truth_N == answer_N)[draws_DN].mean(axis=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a resample may contain a single label
            return np.array([score(metrics, truth_N[draw], answer_N[draw])["score"] for draw in draws_DN])
    hit, false, missed, rejected = (
        ((truth_N == truth) & (answer_N == answer))[draws_DN].sum(axis=1).astype(np.float64)
        for truth, answer in ((1, 1), (0, 1), (1, 0), (0, 0))
    )
    found = {
        "accuracy": (hit + rejected) / len(truth_N),
        "f1": _ratio_or_0(2 * hit, 2 * hit + false + missed),
        "f1_of_0": _ratio_or_0(2 * rejected, 2 * rejected + false + missed),
        "matthews": _ratio_or_0(
            hit * rejected - false * missed,
            np.sqrt((hit + false) * (hit + missed) * (rejected + false) * (rejected + missed)),
        ),
    }
    return 100 * sum(found[name] for name in metrics) / len(metrics)


def _is_binary(*arrays: np.ndarray) -> bool:
    return all(np.isin(array, (0, 1)).all() for array in arrays)


def _ratio_or_0(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def score_exits(metrics: Sequence[str], truth_N: np.ndarray, logits_KNC: np.ndarray) -> list[dict[str, float]]:
    """Return the scores of each exit."""
    return [score(metrics, truth_N, answers(logits_NC)) for logits_NC in logits_KNC]


def answers(logits_NC: np.ndarray) -> np.ndarray:
    """Return the predicted label ids [N], or the values [N] of a regression, which has one output."""
    return logits_NC[:, 0] if logits_NC.shape[1] == 1 else logits_NC.argmax(1)


def paired_interval(
    metrics: Sequence[str], truth_N: np.ndarray, answer_SN: np.ndarray, other_SN: np.ndarray, num_rounds: int = 1000
) -> Estimate:
    """Return the score of `answer` minus the score of `other` on the same examples.

    With several runs (seeds) a side, [S, N], the difference is that of the means over runs, each scored on the same
    resampled examples.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there may be a single label
        value = _mean_score(metrics, truth_N, answer_SN) - _mean_score(metrics, truth_N, other_SN)
    answer_D, other_D = (
        np.mean([resampled_scores(metrics, truth_N, each_N, num_rounds) for each_N in np.atleast_2d(side_SN)], axis=0)
        for side_SN in (answer_SN, other_SN)
    )
    low, high = np.percentile(answer_D - other_D, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def _mean_score(metrics: Sequence[str], truth_N: np.ndarray, answer_SN: np.ndarray) -> float:
    return float(np.mean([score(metrics, truth_N, each_N)["score"] for each_N in np.atleast_2d(answer_SN)]))

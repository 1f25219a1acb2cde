"""Metrics of tasks, by scikit-learn and scipy; all in percent, larger is better.

Shapes: K exits, N examples, C outputs of a head, S runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np


def _accuracy(truth_N: np.ndarray, answer_N: np.ndarray) -> float:
    return float((truth_N == answer_N).mean())


def _f1(truth_N: np.ndarray, answer_N: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    value: Any = f1_score(truth_N, answer_N, zero_division=cast(Any, 0.0))
    return float(value)


def _matthews(truth_N: np.ndarray, answer_N: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(truth_N, answer_N))


def _pearson(truth_N: np.ndarray, answer_N: np.ndarray) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, truth_N, answer_N)


def _spearman(truth_N: np.ndarray, answer_N: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, truth_N, answer_N)


def _correlation(measure: Callable, truth_N: np.ndarray, answer_N: np.ndarray) -> float:
    """0 where a side is constant: such answers tell nothing of the order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = float(measure(truth_N, answer_N)[0]) if len(truth_N) > 1 else 0.0
    return value if np.isfinite(value) else 0.0


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}


def default_metrics(labels: Sequence[str]) -> tuple[str, ...]:
    """Of data that name none: accuracy; both correlations for a regression, which has no labels."""
    return ("accuracy",) if labels else ("pearson", "spearman")


def score(metrics: Sequence[str], truth_N: np.ndarray, answer_N: np.ndarray) -> dict[str, float]:
    """Each metric in percent, and `score`, their mean. Answers are label ids, or values for correlations.

    Raises ValueError for arrays of different or no length, and for an unknown metric.
    """
    if len(truth_N) != len(answer_N) or not len(truth_N):
        raise ValueError(f"expected as many answers as truths, at least one, got {len(answer_N)} and {len(truth_N)}")
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"expected metrics out of {', '.join(METRICS)}, got {list(metrics)}")
    found = {name: 100 * METRICS[name](np.asarray(truth_N), np.asarray(answer_N)) for name in metrics}
    return {**found, "score": sum(found.values()) / len(found)}


def score_exits(metrics: Sequence[str], truth_N: np.ndarray, logits_KNC: np.ndarray) -> list[dict[str, float]]:
    """The scores of each exit, by what it says of each example."""
    return [score(metrics, truth_N, answers(logits_NC)) for logits_NC in logits_KNC]


def answers(logits_NC: np.ndarray) -> np.ndarray:
    """Label ids [N], or the values [N] of a regression, which has one output."""
    return logits_NC[:, 0] if logits_NC.shape[1] == 1 else logits_NC.argmax(1)


def paired_interval(
    metrics: Sequence[str], truth_N: np.ndarray, answer_SN: np.ndarray, other_SN: np.ndarray, num_rounds: int = 1000
) -> tuple[float, float, float]:
    """Score of `answer` minus score of `other` on the same examples, and its 95 % interval.

    With several runs S (seeds) a side, [S, N], it is the mean over runs, each scored on the same draw. The interval is
    the percentile bootstrap over examples, both sides drawn together, from a fixed seed (Efron and Tibshirani, "An
    Introduction to the Bootstrap", 1993, chapter 13).
    """

    def gain(draw: np.ndarray) -> float:
        own, other = (np.atleast_2d(side_SN)[:, draw] for side_SN in (answer_SN, other_SN))
        return _mean_score(metrics, truth_N[draw], own) - _mean_score(metrics, truth_N[draw], other)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a draw may hold one label only
        return bootstrap_interval(gain, (len(truth_N),), num_rounds)


def bootstrap_draws(statistic: Callable[..., float], sizes: Sequence[int], num_draws: int) -> tuple[float, np.ndarray]:
    """Return a statistic of the whole data, and of `num_draws` bootstrap samples from a fixed seed.

    `statistic` receives an array of indices for each axis of `sizes`.
    """
    generator = np.random.default_rng(0)
    draws = [statistic(*(generator.integers(0, size, size) for size in sizes)) for _ in range(num_draws)]
    return statistic(*map(np.arange, sizes)), np.array(draws)


def bootstrap_interval(
    statistic: Callable[..., float], sizes: Sequence[int], num_draws: int = 1000
) -> tuple[float, float, float]:
    """Return a statistic of the whole data and its 95 % percentile interval; see `bootstrap_draws`."""
    whole, draws = bootstrap_draws(statistic, sizes, num_draws)
    low, high = np.percentile(draws, [2.5, 97.5])
    return whole, float(low), float(high)


def _mean_score(metrics: Sequence[str], truth_N: np.ndarray, answer_SN: np.ndarray) -> float:
    return sum(score(metrics, truth_N, answer_N)["score"] for answer_N in answer_SN) / len(answer_SN)

"""Results of a classifier, computed from the logits of one row.

Shapes: C labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np

from offramp.program.program import MULTI_LABEL, REGRESSION
from offramp.runtime.sweep import Outcome


@dataclass(frozen=True)
class Result:
    """The answer for one input. The fields are the keys of `offramp run --json`."""

    label: Optional[str]
    """The `id2label` string; None for a regression of one value. Multi-label: the most probable one; several values:
    the name of the largest."""
    score: float
    """Softmax probability of the label (multi-label: sigmoid; regression: the value, or the largest of several)."""
    exit_stage: int
    """The exit that answered, from 1; the number of layers if no exit stopped the row earlier."""
    stages_run: int
    """Layers that were computed for this input."""
    bytes_read: int
    """Share of this input in the bytes read from the store."""
    labels: Optional[Tuple[str, ...]] = None
    """Multi-label only: all labels with a probability of one half or more."""
    values: Optional[Tuple[float, ...]] = None
    """Regression of several values only: all of them, in the order of their ids."""
    scores: Optional[Dict[str, float]] = None
    """Probability of each label, in the order of their ids, if all scores were requested; None for a regression. Labels
    that are not distinct have their ids in front, as in `0:film`."""


def result_of(outcome: Outcome, problem: Optional[str], labels: Sequence[str], *, all_scores: bool = False) -> Result:
    """Return the result of one row."""
    assert outcome.logits_C is not None, "every row of a finished sweep has logits"
    logits_C = outcome.logits_C.astype(np.float64)
    common = (outcome.exit_stage, outcome.exit_stage, outcome.bytes_read)
    if problem == REGRESSION and len(logits_C) == 1:
        return Result(None, float(logits_C[0]), *common)
    if problem == REGRESSION:
        best = int(np.argmax(logits_C))
        return Result(labels[best], float(logits_C[best]), *common, values=tuple(logits_C.tolist()))
    if problem == MULTI_LABEL:
        scores_C = [_sigmoid(logit) for logit in logits_C]
        best = int(np.argmax(scores_C))
        likely = tuple(label for label, logit in zip(labels, logits_C) if logit >= 0)
        scores = _by_label(labels, scores_C) if all_scores else None
        return Result(labels[best], scores_C[best], *common, likely, scores=scores)
    exponents_C = np.exp(logits_C - logits_C.max())
    best = int(logits_C.argmax())
    scores = _by_label(labels, (exponents_C / exponents_C.sum()).tolist()) if all_scores else None
    return Result(labels[best], float(exponents_C[best] / exponents_C.sum()), *common, scores=scores)


def scores_of(result: Result) -> List[float]:
    """Return the numbers of a result that has all scores: one per label, or the values of a regression."""
    return list(result.scores.values()) if result.scores is not None else list(result.values or (result.score,))


def _by_label(labels: Sequence[str], scores_C: Sequence[float]) -> Dict[str, float]:
    found = dict(zip(labels, scores_C))
    if len(found) < len(labels):
        found = {f"{index}:{label}": score for index, (label, score) in enumerate(zip(labels, scores_C))}
    return found


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))

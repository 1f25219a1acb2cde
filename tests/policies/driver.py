"""What the tests of this room share: a plain loop over exits, and rows that hypothesis draws.

Shapes: K exits, B rows, C outputs of the head.
"""

from __future__ import annotations

import math

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from offramp.policies import (
    AllOf,
    AnyOf,
    Confidence,
    Entropy,
    Evidence,
    From,
    FullDepth,
    Margin,
    Patience,
    StopAt,
    Votes,
)
from tests.selection import examples

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"

quick = settings(deadline=None, max_examples=examples(150), database=None)


def exits_of(policy, logits_KBC, problem=SINGLE, first=None):
    """The exit, from 1, at which each row leaves. Rows that left are dropped; who is left leaves at the last exit."""
    num_exits, num_rows = logits_KBC.shape[:2]
    decider = policy.start(num_rows, num_exits)
    rows, exit_B = np.arange(num_rows), np.full(num_rows, num_exits)
    for exit_index in range(first or policy.first_evidence(num_exits), num_exits + 1):
        leaves = decider.update(exit_index, Evidence.from_logits(logits_KBC[exit_index - 1, rows], problem))
        assert leaves.dtype == bool and leaves.shape == rows.shape
        exit_B[rows[leaves]] = exit_index
        decider.keep(~leaves)
        rows = rows[~leaves]
    return exit_B.tolist()


def answers(labels_KB, num_classes=2):
    """Logits [K, B, C] of exits that give these labels."""
    return np.eye(num_classes, dtype=np.float32)[np.asarray(labels_KB)]


def logits(num_exits=None, max_outputs=3, step=1.0):
    """Logits [K, B, C] of few values, multiples of `step`, so that exits often agree and often tie."""
    num_exits = st.integers(1, 8) if num_exits is None else st.just(num_exits)
    shapes = st.tuples(num_exits, st.integers(0, 5), st.integers(1, max_outputs))
    values = st.integers(-2, 2).map(lambda value: np.float32(value * step))
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=values))


def rules(num_exits):
    """Rules that make sense for a classification with so many exits."""
    return st.one_of(
        st.builds(StopAt, st.integers(1, num_exits)),
        st.builds(Patience, st.integers(1, num_exits - 1) | st.just(math.inf)),
        st.builds(Votes, st.integers(2, num_exits)),
        st.builds(Confidence, st.floats(0, 1, exclude_min=True)),
        st.builds(Margin, st.floats(0, 1, exclude_min=True)),
        st.builds(Entropy, st.floats(0, 1, exclude_max=True)),
    )


def policies(num_exits):
    """Everything that the grammar can say and that makes sense for a classification with so many exits."""
    several = st.lists(rules(num_exits), min_size=2, max_size=3).map(tuple)
    inner = rules(num_exits) | st.builds(AllOf, several)
    joined = inner | st.builds(AnyOf, st.lists(inner, min_size=2, max_size=3).map(tuple))
    return st.just(FullDepth()) | joined | st.builds(From, st.integers(1, num_exits), joined)

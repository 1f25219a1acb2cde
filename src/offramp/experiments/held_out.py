"""Rows that a model was trained on are kept out of its evaluation.

A run folder and its stores keep digests of these rows (`store.trained_rows`). A few rows of other data may be copies of
them by chance: they are left out and counted. Where they are many, the data are those of the training, or were cut in
another way, and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offramp.checkpoints.source import read_training
from offramp.errors import UsageError
from offramp.experiments.children import Log
from offramp.store.trained_rows import TrainedRows, read_trained_rows
from offramp.tasks.digests import row_digests
from offramp.tasks.examples import Example

MOST_SHARE = 0.1
"""Largest share of a split that is left out. With more, what remains is not the data that were named."""


@dataclass(frozen=True)
class HeldOut:
    """Rows of one split that are evaluated."""

    examples: Sequence[Example]
    training_rows: int | None
    """Number of rows of the split that were trained on; None: unknown."""
    includes_training_rows: bool
    """True if rows that were trained on are evaluated all the same."""
    salt: str
    """Salt of the digests."""
    digests_N: np.ndarray
    """Digests of the rows; without a salt, none."""


def held_out(
    folder: Path, splits: Mapping[str, Sequence[Example]], include: bool, log: Log, salt: str = ""
) -> dict[str, HeldOut]:
    """Return the rows of each split without those that the model was trained on; `include`: with them.

    `salt` is that of the digests, for a model that does not record the rows of its training. `log` receives a line for
    such a model, and for each split with rows that were trained on.

    Raises UsageError if more than `MOST_SHARE` of a split was trained on.
    """
    trained = read_trained_rows(folder)
    if trained is not None:
        return {name: _held_out(folder, name, rows, trained, include, log) for name, rows in splits.items()}
    log(f"{folder}: the rows of its training are not recorded, so that none of them can be left out")
    found = {}
    for name, examples in splits.items():
        digests_N = row_digests((example.text for example in examples if salt), salt)
        found[name] = HeldOut(examples, None, include, salt, digests_N)
    return found


def _held_out(
    folder: Path, name: str, examples: Sequence[Example], trained: TrainedRows, include: bool, log: Log
) -> HeldOut:
    digests_N = row_digests((example.text for example in examples), trained.salt, trained.arguments)
    seen_N = trained.among(digests_N)
    num_seen = int(seen_N.sum())
    what = f"{num_seen} of {len(examples)} rows of {name} were trained on"
    if num_seen > MOST_SHARE * len(examples) and not include:
        remedy = "give --train, --dev and --split-seed as in training, or other data, or --include-training-rows"
        raise UsageError(what, folder, remedy)
    if num_seen:
        log(f"{what}, and are {'evaluated' if include else 'left out'}")
    if include or not num_seen:
        return HeldOut(examples, num_seen, include, trained.salt, digests_N)
    kept = [example for example, seen in zip(examples, seen_N, strict=True) if not seen]
    return HeldOut(kept, num_seen, include, trained.salt, digests_N[~seen_N])


def require_same_cut(folder: Path, cut: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise UsageError if rows of these splits may have been training data, for a model that does not record its rows.

    `cut` describes the present split of the data, and `train.json` that of training: `task`, `split_seed`, `cuts_dev`.
    """
    described = read_training(folder)
    found = None if described is None else described.data
    if found is None or found.get("task") != cut["task"] or found == cut:
        return
    if read_trained_rows(folder) is None and (cut["cuts_dev"] or not set(names) <= {"dev"}):
        changed = [f"{key} {found.get(key)} there, {cut[key]} here" for key in cut if found.get(key) != cut[key]]
        differing = ", ".join(changed)
        what = f"the data are split differently than in training ({differing}): rows may have been training data"
        remedy = "give --train, --dev and --split-seed as in training, or --include-training-rows"
        raise UsageError(what, folder, remedy)

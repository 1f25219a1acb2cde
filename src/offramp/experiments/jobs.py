"""Jobs of worker processes, with a JSON form. Keeps to Python 3.8: `offramp profile` uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Tuple

from offramp.errors import OfframpError
from offramp.program.checks import require_known
from offramp.runtime.config import EngineConfig
from offramp.session.inputs import InputSource

JOBS = {
    "plan": "the plan of an engine, or BudgetError",
    "passes": "a benchmark record of `passes` batches of random inputs",
    "inputs": "a benchmark record of one run over `inputs`",
    "tokens": "a benchmark record of `tokens`, one text a batch, the first of them to warm up, and all scores of each",
    "run": "results of `inputs` and the record; with `sampled`, memory samples and spans as well",
    "profile": "a device profile; with `recall`, the cached one if there is one",
    "reference": "results of `inputs` by transformers, whole in memory, and the record",
    "measure": "figures and raw samples of one round of an experiment: of `inputs`, or of random ones (`step`)",
    "step": "what the step of a sweep that `step` describes has made",
}
"""Kind of job -> its result."""
ORACLE, RANDOM = BOUNDS = "oracle", "random:"
"""Exits of `bounds`: the whole text, and the word before a policy."""
WARM_UP_PASSES = 2
"""Batches at the start of a benchmark that its record omits."""


@dataclass(frozen=True)
class WorkerJob:
    """One job. Raises ValueError for an unknown kind."""

    job: str
    """A key of JOBS."""
    store: str
    """Folder of the store; of the model for `reference`."""
    config: EngineConfig = field(default_factory=EngineConfig)
    inputs: InputSource = field(default_factory=InputSource)
    passes: int = 10
    max_inputs: int | None = None
    """Number of inputs to run; None: all."""
    recall: bool = False
    sampled: bool = False
    step: Mapping[str, Any] | None = None
    """Arguments of a job of a sweep, plain values (`experiments.steps`)."""
    tokens: Sequence[Tuple[Sequence[int], Sequence[int]]] = ()
    """Token ids and token types of each text."""

    def __post_init__(self) -> None:
        if self.job not in JOBS:
            raise ValueError(f"unknown job {self.job!r}; known jobs: {', '.join(JOBS)}")
        object.__setattr__(self, "tokens", tuple((tuple(ids_S), tuple(types_S)) for ids_S, types_S in self.tokens))

    @property
    def folder(self) -> str:
        """Folder on the disk that the job reads, or to which it writes what it makes; "" if it has none."""
        step = self.step or {}
        return self.store or next((str(step[name]) for name in ("store", "out", "model") if step.get(name)), "")

    def to_json(self) -> dict[str, Any]:
        """Return the job as a tree of plain values."""
        return {**vars(self), "config": self.config.to_json(), "inputs": self.inputs.to_json()}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> WorkerJob:
        """Inverse of `to_json`. Raises ValueError for unknown names."""
        require_known(cls, tree, "key of a job")
        parts = {"config": EngineConfig, "inputs": InputSource}
        return cls(**{name: parts[name].from_json(value) if name in parts else value for name, value in tree.items()})


def described(error: OfframpError) -> dict[str, Any]:
    """Return an error as plain values, for `children.error_of`."""
    where = None if error.where is None else str(error.where)
    return {"class": type(error).__name__, "what": error.what, "where": where, "remedy": error.remedy}

"""Parts of a record that reports and comparisons rely on, with the types and ranges that sweeps write.

Records may come from anybody. What is checked here needs no second look where it is used; other keys are free.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from offramp.program.checks import WrongError, read_used
from offramp.program.consistency import MAX_STEPS
from offramp.tasks.metrics import METRICS

LEAST_NUMBER, MOST_NUMBER = 1e-18, 1e18
"""Range of the sizes of figures and samples, other than 0: ratios and pictures of others would leave that of floats."""
Scalar = str | int | float | bool | None
_MEASURED: Mapping[str, Any] = {"low": -MOST_NUMBER, "high": MOST_NUMBER}


@dataclass(frozen=True)
class _Reason:
    """Why an experiment failed."""

    what: str
    where: str | None = None
    remedy: str | None = None


@dataclass(frozen=True)
class _Git:
    """State of the repository of a sweep."""

    commit: str
    changed_files: int


@dataclass(frozen=True)
class _Inputs:
    """Fingerprints of what was measured."""

    data: Scalar = None
    source: Scalar = None
    precision: Scalar = None


@dataclass(frozen=True)
class _Environment:
    """The machine, and its state during the measurement."""

    cpu_model: str | None = None
    num_cores: int | None = None
    caches: dict[str, Scalar] | None = None
    total_memory_bytes: int | None = None
    memory_limit_bytes: int | None = None
    storage: dict[str, Scalar] | None = None
    governor: str | None = None
    platform: str | None = None
    kernel: str | None = None
    python_version: str | None = None
    offramp_version: str | None = None
    library_versions: dict[str, Scalar] | None = None
    load_1min: float | None = field(default=None, metadata=_MEASURED)
    available_memory_bytes: int | None = None
    frequency_khz: float | None = field(default=None, metadata=_MEASURED)
    throttle_count: int | None = None


@dataclass(frozen=True)
class _Run:
    """Results of the run."""

    budget_bytes: Scalar = None
    rival: str | None = None
    versions: dict[str, Scalar] | None = None


@dataclass(frozen=True)
class _Samples:
    """Raw samples. `truth`, `answers` and `metrics` go together."""

    latencies: tuple[float, ...] | None = field(default=None, metadata=_MEASURED)
    truth: tuple[str | int | float, ...] | None = field(default=None, metadata=_MEASURED)
    answers: tuple[str | int | float, ...] | None = field(default=None, metadata=_MEASURED)
    metrics: tuple[str, ...] | None = field(default=None, metadata={"choices": tuple(METRICS)})
    labels: tuple[Scalar, ...] | None = None
    memory: tuple[tuple[float, int, int | None, int | None], ...] | None = field(default=None, metadata=_MEASURED)
    spans: tuple[tuple[str, int, str, float, float, int, str, int], ...] = field(default=(), metadata=_MEASURED)

    def __post_init__(self) -> None:
        if self.truth is not None and not (self.metrics and self.answers and len(self.truth) == len(self.answers)):
            raise WrongError("samples need an answer for each truth, and metrics")
        if any(0 < abs(seconds) < LEAST_NUMBER for seconds in self.latencies or ()):
            raise WrongError(f"samples have a latency that is no number from {LEAST_NUMBER:g} on")
        if not all(0 <= stage < MAX_STEPS for _, stage, *_ in self.spans):
            raise WrongError(f"spans name a stage that is none of {MAX_STEPS}")


@dataclass(frozen=True)
class _Used:
    """Keys of a record, of which it may lack those with a default."""

    figures: dict[str, Any]
    samples: dict[str, Any]
    inputs: dict[str, Any]
    round: int
    key: str
    experiment: dict[str, Any] | None = None
    reason: dict[str, Any] | None = None
    git: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    run: dict[str, Any] | None = None
    seconds: float = field(default=0.0, metadata=_MEASURED)
    ended: str = ""


_PARTS = {
    "reason": _Reason, "git": _Git, "environment": _Environment, "run": _Run, "samples": _Samples, "inputs": _Inputs,
}  # fmt: skip
"""Key of a record -> the types of what it holds."""


def require_parts(record: Mapping[str, Any]) -> None:
    """Raise WrongError naming the first part that no sweep writes."""
    used = read_used(_Used, dict(record))
    for name, kind in _PARTS.items():
        part = getattr(used, name)
        if part is not None:
            read_used(kind, part, name)

"""Policy files: one tuned exit policy as JSON, with the conditions under which it was tuned. Also the reading and
writing of JSON files with a format number, which device profiles share.
"""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple, Type, TypeVar, Union

from offramp.errors import StoreError, UsageError, VersionError, missing
from offramp.program.checks import read, strict_json
from offramp.store.files import read_plain, translate_path_errors, write_atomic

FORMAT = 1
MAX_BYTES = 16 << 20
"""Largest policy file or device profile that is read."""
UNRECORDED = 0
"""Value of `MeasuredOn.budget_bytes` where the budget was not recorded; None means that there was no budget."""
_REMEDY = "make it again: offramp tune"
_NOT_NEGATIVE: Mapping[str, Any] = {"low": 0}
_Facts = TypeVar("_Facts", bound="Union[Prediction, MeasuredOn]")


@dataclass(frozen=True)
class Prediction:
    """Performance of a policy on the tune split. None: not recorded."""

    score: Optional[float] = None
    """Percent."""
    loss: Optional[float] = None
    """Points of the score, relative to the last exit."""
    seconds: Optional[float] = field(default=None, metadata=_NOT_NEGATIVE)
    """Mean latency of an input."""
    mean_exit: Optional[float] = field(default=None, metadata=_NOT_NEGATIVE)
    bytes_read: Optional[float] = field(default=None, metadata=_NOT_NEGATIVE)
    """Mean of an input."""
    reached: Tuple[float, ...] = ()
    """Share of rows that reach each layer; empty: not recorded."""

    def __post_init__(self) -> None:
        if not all(0 <= share <= 1 for share in self.reached):
            raise ValueError(f"reached must be the share of rows that reach each layer, not {self.reached!r}")


@dataclass(frozen=True)
class MeasuredOn:
    """Machine, store and engine of a latency measurement. None: not recorded, except for the budget."""

    platform: Optional[str] = None
    cpu_model: Optional[str] = None
    num_cores: Optional[int] = None
    memory_gib: Optional[float] = field(default=None, metadata=_NOT_NEGATIVE)
    backend: Optional[str] = None
    threads: Optional[int] = None
    batch: Union[int, str, None] = None
    """Rows of a batch, or "bulk"."""
    store_sha256: Optional[str] = None
    num_slots: Optional[int] = None
    residents: Optional[int] = None
    """Number of resident shards."""
    reads: Optional[str] = None
    budget_bytes: Optional[int] = UNRECORDED
    """Budget in bytes; None: what the machine allowed."""

    def to_json(self) -> Dict[str, Any]:
        """Return what is recorded, by name."""
        return {
            name: value
            for name, value in vars(self).items()
            if (value != UNRECORDED if name == "budget_bytes" else value is not None)
        }


@dataclass(frozen=True)
class PolicyFile:
    """One tuned policy."""

    policy: Dict[str, Any]
    """The policy, as `policies.codec.from_json` reads it."""
    model_sha256: str
    """Fingerprint of the model folder whose exits were tuned."""
    deadline_seconds: Optional[float]
    predicted: Prediction
    certificate: Optional[Dict[str, Any]]
    tuned_on: Dict[str, Any]
    """Task, metrics, and the digests of the splits."""
    measured_on: MeasuredOn
    """Conditions of the device profile."""
    front: Sequence[Dict[str, Any]]
    """Policies that no other beats in both score and latency, the fastest first."""


def write_policy(path: Path, file: PolicyFile) -> None:
    """Write a policy file atomically. Raises UsageError for a path that cannot be written, DiskFullError."""
    facts = {"predicted": asdict(file.predicted), "measured_on": file.measured_on.to_json()}
    write_json(path, {"format": FORMAT, **vars(file), **facts})


def read_policy(path: Path) -> PolicyFile:
    """Read a policy file. Raises UsageError where there is none, StoreError for something else, VersionError."""
    tree, given = read_json(path, "policy file", _REMEDY), {}
    unknown = sorted(tree.keys() - {"format", *(each.name for each in fields(PolicyFile))})
    if unknown:
        raise StoreError(f"policy file with the unknown key {unknown[0]!r}", path, _REMEDY)
    for each in fields(PolicyFile):
        kind: Any = each.type
        if each.name not in tree:
            raise StoreError(f"policy file without {each.name!r}", path, _REMEDY)
        try:
            if kind in (Prediction, MeasuredOn):
                given[each.name] = facts_from_json(kind, tree[each.name])
            else:
                given[each.name] = read(kind, tree[each.name], each.name)
        except ValueError as error:
            raise StoreError(f"policy file with an invalid {each.name!r} ({error})", path, _REMEDY) from None
    seconds = given["deadline_seconds"]
    if seconds is not None and not 0 < seconds < math.inf:
        raise StoreError("policy file with an invalid 'deadline_seconds'", path, _REMEDY)
    return PolicyFile(**given)


def facts_from_json(kind: Type[_Facts], tree: Mapping[str, Any]) -> _Facts:
    """Build a Prediction or MeasuredOn; absent facts are not recorded. Raises ValueError for names and wrong types."""
    return read(kind, tree, "", fills=True)


def write_json(path: Path, tree: Any) -> None:
    """Write a value atomically."""
    with translate_path_errors("a file cannot be written there", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, [json.dumps(tree, indent=1).encode() + b"\n"])


def read_json(path: Path, what: str, remedy: str) -> Dict[str, Any]:
    """Read an object of FORMAT; `what` and `remedy` appear in errors.

    Raises UsageError where there is no file, StoreError for something else, VersionError for another format.
    """
    try:
        data = read_plain(path, MAX_BYTES + 1)
    except FileNotFoundError:
        raise missing(path, what) from None
    except OSError as error:
        raise UsageError(f"{what} cannot be read ({error.strerror})", path, "check the path") from None
    try:
        if len(data) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        tree = read(Dict[str, Any], strict_json(data), "it")
        if "format" not in tree:
            raise ValueError("it has no key 'format'")
    except ValueError as error:
        raise StoreError(f"no {what} ({error})", path, remedy) from None
    if type(tree["format"]) is not int or tree["format"] != FORMAT:
        raise VersionError(f"{what} of format {tree['format']!r}; format {FORMAT} is supported", path, remedy)
    if "trust_kernels" in tree:
        raise StoreError(f"{what} with 'trust_kernels', which only a caller sets", path, remedy)
    return tree

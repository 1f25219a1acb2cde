"""Policy files and device profiles: JSON that a command writes and a later one reads. What is in it, others know.

A policy file holds the policy, the model that it is for, what it was measured on, what it is thought to give, and the
certificate if it has one.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

from offramp.errors import StoreError, UsageError, VersionError
from offramp.store.files import MAX_SMALL_BYTES, translate_path_errors, write_atomic

FORMAT = 1
_REMEDY = "make it again: offramp tune"


@dataclass(frozen=True)
class PolicyFile:
    """One tuned policy."""

    policy: Dict[str, Any]
    """As `policies.codec.from_json` reads it."""
    model_sha256: str
    """Fingerprint of the model folder whose exits were tuned."""
    deadline_seconds: Optional[float]
    predicted: Dict[str, Any]
    """Score, loss, mean latency, mean exit and bytes read on the tune split, and the share that comes to each layer."""
    certificate: Optional[Dict[str, Any]]
    tuned_on: Dict[str, Any]
    """Task, metrics, and the digests of the splits."""
    measured_on: Dict[str, Any]
    """What the device profile was: machine, store, engine, batch size, budget."""
    front: List[Dict[str, Any]]
    """The policies that none beats in score and latency both, the fastest first."""


def write_policy(path: Path, file: PolicyFile) -> None:
    """Write it so that it is complete or absent. Raises UsageError for a place that cannot be, DiskFullError."""
    write_json(path, {"format": FORMAT, **asdict(file)})


def read_policy(path: Path) -> PolicyFile:
    """Read it. Raises UsageError where there is none, StoreError for something else, VersionError."""
    tree = read_json(path, "policy file", _REMEDY)
    try:
        file = PolicyFile(**{name: tree[name] for name in PolicyFile.__dataclass_fields__})
    except KeyError as error:
        raise StoreError(f"policy file without {error}", path, _REMEDY) from None
    seconds, objects = file.deadline_seconds, dict.fromkeys(("predicted", "tuned_on", "measured_on"), dict)
    kinds: Dict[str, type] = {**objects, "front": list, "model_sha256": str}
    wrong = [name for name, kind in kinds.items() if not isinstance(getattr(file, name), kind)]
    if not isinstance(file.certificate, (dict, type(None))):
        wrong.append("certificate")
    if seconds is not None and not (type(seconds) in (int, float) and 0 < seconds < math.inf):
        wrong.append("deadline_seconds")
    if wrong:
        raise StoreError(f"policy file whose {wrong[0]!r} is none", path, _REMEDY)
    return file


def write_json(path: Path, tree: Dict[str, Any]) -> None:
    """Write an object, atomically."""
    with translate_path_errors("a file cannot be written there", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, [json.dumps(tree, indent=1).encode() + b"\n"])


def read_json(path: Path, what: str, remedy: str) -> Dict[str, Any]:
    """Read an object of our format.

    Raises UsageError where there is no file, StoreError for something else, VersionError for another format.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SMALL_BYTES)
    except OSError as error:
        raise UsageError(f"{what} cannot be read ({error.strerror})", path, "check the path") from None
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict) or "format" not in tree:
        raise StoreError(f"no {what}", path, remedy)
    if tree["format"] != FORMAT:
        raise VersionError(f"{what} of format {tree['format']!r}, {FORMAT} is read", path, remedy)
    return tree

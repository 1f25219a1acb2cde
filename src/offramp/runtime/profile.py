"""The device profile: what leaving at each exit takes on this machine, measured through the real engine.

Whole passes are timed (`profiler.py`), under the budget that the policy is for: what is resident, what prefetch hides
and what it does not is in them, and need not be composed. A profile is of one store, backend, budget and batch size on
one machine; elsewhere it is refused.

Shapes: L lengths, K exits, B rows of a pass, S tokens of a row.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Tuple, Union

import numpy as np

from offramp.errors import OfframpError, RefusedError, StoreError
from offramp.measure.hardware import machine
from offramp.policies.costs import Costs, as_tuples
from offramp.store.memory import cache_folder
from offramp.store.policy_file import FORMAT, read_json, write_json
from offramp.units import named_size

if TYPE_CHECKING:
    from offramp.session.classifier import Classifier

_REMEDY = "measure it again: offramp bench STORE --save-profile FILE"

Table = Tuple[Tuple[float, ...], ...]


@dataclass(frozen=True)
class DeviceProfile:
    """Seconds of passes of `batch` rows that leave together; `costs` are those of a text. Rows of tables are lengths,
    columns exits, from the first to the last.
    """

    fingerprint: Dict[str, Any]
    """Machine, store, backend, batch size and plan."""
    lengths: Tuple[int, ...]
    seconds: Table
    """[L, K], from the texts to the answers of each exit, all heads before it included: the mean, which is the median
    of a cell, drawn out as means of the whole column are; a cell has too few passes for a mean of its own. Of passes
    after others that take `among_seconds`.
    """
    seconds_p99: Table
    step_seconds_p99: Table
    """[L, K], from the answer of the exit before, or from the start, to this one."""
    head_seconds: Table
    """[L, K - 1], the head and the decision of each exit but the last: the median, drawn out to what passes take less
    that run none of them. Threads that waited for a head start the next layer later, for one.
    """
    decide_seconds: float
    """Of a decision that is none, which is in `head_seconds`: the median."""
    compute_seconds: Table
    """[L, K], of each layer: the median."""
    read_seconds: Tuple[float, ...]
    """[K], of each layer, hidden or not: the median; 0 where it was resident."""
    read_seconds_p99: Tuple[float, ...]
    bytes_read: Tuple[float, ...]
    """[K], of a text that leaves there: the median."""
    single_seconds: Table
    """[L, K], as `seconds`, of a pass of one row."""
    single_head_seconds: Table
    """[L, K - 1], as `head_seconds`, of a pass of one row."""
    gather_seconds: Tuple[float, ...]
    """[L], of taking the rows that are left out of the arrays of a pass: the median; 0 where a pass has one row."""
    after_seconds: float
    """What a pass takes more if those before it took e times as long: the longer ago, the less is left in caches."""
    among_seconds: float
    """What the passes before took, of a profile: the geometric mean."""
    num_rounds: int
    compute_seconds_p99: Table = ()
    """As `compute_seconds`; this and the next two are told, and nothing is foretold by them."""
    head_seconds_p99: Table = ()
    """[L, K - 1], of what lies between the instructions of a head and its decision."""
    decide_seconds_p99: float = 0.0
    budget_bytes: Optional[int] = None
    """None: whatever the machine allows."""

    @property
    def num_exits(self) -> int:
        """K."""
        return len(self.seconds[0])

    @property
    def batch(self) -> int:
        """Rows of a pass; one where the fingerprint does not say."""
        return int(self.fingerprint.get("batch", 1))

    @property
    def measured_on(self) -> Dict[str, Any]:
        """The fingerprint, and the rest of what it was measured with."""
        return {**self.fingerprint, "batch": self.batch, "budget_bytes": self.budget_bytes}

    def costs(self, first_head: int = 1) -> Costs:
        """Seconds a text to each exit for a policy whose first head is `first_head`: a row's share of the pass."""
        return self._costs(self.seconds, self.head_seconds, first_head, self.batch)

    def costs_from(self, first: int) -> Costs:
        """The same, to the exits from `first` on alone, as if there were no others."""
        costs = self.costs(first)
        return Costs(costs.lengths, tuple(row[first - 1 :] for row in costs.seconds))

    def single_costs(self, first_head: int = 1) -> Costs:
        """The same of a text that runs alone."""
        return self._costs(self.single_seconds, self.single_head_seconds, first_head, 1)

    def _costs(self, table: Table, heads: Table, first_head: int, num_rows: int) -> Costs:
        rows = []
        for seconds_K, heads_K in zip(table, heads):
            spared = sum(heads_K[: first_head - 1])
            row: List[float] = []
            for exit_index, seconds in enumerate(seconds_K, start=1):
                rest = seconds - (spared if exit_index >= first_head else sum(heads_K[: exit_index - 1]))
                share = rest / num_rows
                row.append(max(share, (row[-1] if row else 0.0) + 1e-7))  # noise must not turn the order round
            rows.append(tuple(row))
        return Costs(self.lengths, tuple(rows))

    def step_p99(self, exit_index: int, length: int) -> float:
        """Seconds of a pass from the exit before to this one, seldom exceeded: for a deadline guard."""
        column = [row[exit_index - 1] for row in self.step_seconds_p99]
        return float(np.interp(length, self.lengths, column))


def engine_of(store_sha256: str, backend: str, num_threads: int, num_rows: Union[int, str]) -> Dict[str, Any]:
    """What a profile holds for, beside its budget: another value of any of these, and it does not. `num_rows`: of a
    batch, or "bulk".
    """
    return {
        **machine(),
        "backend": backend,
        "threads": num_threads,
        "batch": num_rows,
        "store_sha256": store_sha256,
    }


def fingerprint_of(classifier: Classifier) -> Dict[str, Any]:
    """The same, and the plan, which under one budget differs a little with the longest text."""
    plan, backend = classifier.plan, classifier.backend
    return {
        **engine_of(classifier.store.digest, backend.name, backend.num_threads, classifier.settings.num_rows),
        "num_slots": plan.num_slots,
        "residents": len(plan.residents),
        "reads": "direct" if classifier.direct and plan.num_slots else "buffered",
    }


def save_profile(profile: DeviceProfile, path: Optional[Path] = None) -> None:
    """Keep it in a file, or, best effort, in the cache folder."""
    tree = {"format": FORMAT, **asdict(profile)}
    if path is not None:
        write_json(path, tree)
        return
    try:
        write_json(_cached(profile.fingerprint), tree)
    except (OSError, OfframpError):  # an unwritable cache is no error
        return


def load_profile(path: Path) -> DeviceProfile:
    """Read it from a file. Raises UsageError, StoreError, VersionError."""
    tree = read_json(path, "device profile", _REMEDY)
    try:
        fields = {name: as_tuples(tree[name]) for name in DeviceProfile.__dataclass_fields__}
        profile = DeviceProfile(**{**fields, "fingerprint": dict(tree["fingerprint"])})
        for costs in (profile.costs(), profile.costs(profile.num_exits), profile.single_costs()):
            if len(costs.lengths) != len(profile.gather_seconds) or costs.num_exits != len(profile.bytes_read):
                raise ValueError(f"tables that do not fit {len(costs.lengths)} lengths and {costs.num_exits} exits")
        if not (0 <= profile.after_seconds < math.inf and 0 < profile.among_seconds < math.inf):
            raise ValueError("passes that took no time")
        if not isinstance(profile.budget_bytes, (int, type(None))):
            raise ValueError(f"a budget of {profile.budget_bytes!r}")
        shapes = [{len(row) for row in table} for table in (profile.seconds_p99, profile.step_seconds_p99)]
        if any(shape != {profile.num_exits} for shape in shapes):
            raise ValueError(f"tails that do not fit {profile.num_exits} exits")
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError) as error:
        raise StoreError(f"no device profile of this version ({error})", path, _REMEDY) from None
    return profile


def cached_profile(fingerprint: Dict[str, Any], longest: int) -> Optional[DeviceProfile]:
    """The profile of this fingerprint in the cache folder, if it has inputs of this length."""
    try:
        profile = load_profile(_cached(fingerprint))
    except OfframpError:  # nothing there, or not ours: measured again
        return None
    fits = profile.fingerprint == fingerprint and profile.lengths[-1] >= longest
    return profile if fits else None


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What is another value here than there; "" if nothing is."""
    other = [key for key in here if there.get(key) != here[key]]
    return ", ".join(f"{key} {_shown(there.get(key))} there, {_shown(here[key])} here" for key in other[:3])


def _shown(fact: Any) -> str:
    is_size = isinstance(fact, int) and fact >= 1 << 20
    return named_size(fact) if is_size else repr(fact)


def require_here(profile: DeviceProfile, here: Mapping[str, Any], where: object) -> None:
    """Raise RefusedError naming what differs, if a profile is of another machine, store, engine or budget."""
    told = differences(profile.measured_on, here)
    if told:
        remedy = "measure this one: offramp bench STORE --save-profile FILE, with the options that it will run with"
        raise RefusedError(f"the profile was measured elsewhere ({told})", where, remedy)


def _cached(fingerprint: Dict[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "profiles" / (key + ".json")

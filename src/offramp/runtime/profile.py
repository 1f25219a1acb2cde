"""The device profile: latency of each exit on this machine, measured through the real engine.

Whole passes are timed (`offramp.profiling`) under the budget that the policy is for, so the latencies include resident
shards and the effect of prefetching. A profile holds for one store, backend, budget and batch size on one machine;
under other conditions it is refused.

Shapes: L lengths, K exits, B rows of a pass, S tokens of a row.
"""

import hashlib
import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

from offramp.errors import OfframpError, RefusedError, StoreError
from offramp.measure.hardware import default_threads, machine
from offramp.policies.costs import Costs
from offramp.program.checks import POSITIVE, read
from offramp.program.program import plain
from offramp.runtime.config import EngineConfig
from offramp.runtime.run_plan import BUFFERED
from offramp.store.memory import cache_folder
from offramp.store.policy_file import FORMAT, MeasuredOn, facts_from_json, read_json, write_json
from offramp.units import named_size

if TYPE_CHECKING:
    from offramp.session.classifier import Classifier

_REMEDY = "measure it again: offramp profile STORE --out FILE"

Table = Tuple[Tuple[float, ...], ...]


@dataclass(frozen=True)
class DeviceProfile:
    """Latencies of passes whose `batch` rows all leave at one exit. Rows of tables are lengths, columns exits in order.

    Times in seconds. `costs` gives the latency of one input.
    """

    fingerprint: MeasuredOn
    """Machine, store, backend, batch size and plan."""
    lengths: Tuple[int, ...] = field(metadata=POSITIVE)
    seconds: Table
    """Mean latency from the inputs to the answers of each exit, including all earlier heads [L, K].

    Estimated as the median of a cell, scaled by the ratio of mean to median of the whole column, since a cell has too
    few passes for a mean of its own. Holds after passes that take `among_seconds`.
    """
    seconds_p99: Table
    step_seconds_p99: Table
    """99th percentile of the time from the answer of the previous exit, or from the start, to this one [L, K]."""
    head_seconds: Table
    """Cost of the head and decision of each exit but the last [L, K - 1].

    Estimated from passes with and without heads: a head also delays the start of the next layer, which waits for it.
    """
    decide_seconds: float
    """Median time of a decision by the profiled policy, which computes nothing; included in `head_seconds`."""
    compute_seconds: Table
    """Median compute time of each layer [L, K]."""
    read_seconds: Tuple[float, ...]
    """Median read time of each layer, whether hidden by computation or not [K]; 0 where the layer is resident."""
    read_seconds_p99: Tuple[float, ...]
    bytes_read: Tuple[float, ...]
    """Median bytes read for an input that leaves at each exit [K]."""
    single_seconds: Table
    """Same as `seconds` for passes of one row [L, K]."""
    single_head_seconds: Table
    """Same as `head_seconds` for passes of one row [L, K - 1]."""
    gather_seconds: Tuple[float, ...]
    """Median time of removing the rows that left from the arrays of a pass [L]; 0 where a pass has one row."""
    after_seconds: float
    """Additional latency of a pass after passes that take e times as long: fewer weights remain in CPU caches."""
    among_seconds: float
    """Geometric mean latency of the passes that preceded those measured."""
    num_rounds: int = field(metadata=POSITIVE)
    compute_seconds_p99: Table = ()
    """99th percentile of `compute_seconds`. This field and the next two are informative only."""
    head_seconds_p99: Table = ()
    """99th percentile of the time of a head and its decision [L, K - 1]."""
    decide_seconds_p99: float = 0.0
    budget_bytes: Optional[int] = None
    """Memory budget in bytes; None: what the machine allows."""

    @property
    def num_exits(self) -> int:
        """Number of exits, K."""
        return len(self.seconds[0])

    @property
    def batch(self) -> int:
        """Rows of a pass; 1 where the fingerprint does not record them."""
        return 1 if self.fingerprint.batch is None else int(self.fingerprint.batch)

    @property
    def measured_on(self) -> MeasuredOn:
        """The fingerprint with batch size and budget: all conditions of the measurement."""
        return replace(self.fingerprint, batch=self.batch, budget_bytes=self.budget_bytes)

    def to_json(self) -> Dict[str, Any]:
        """Return the profile as a tree of plain values."""
        return {**asdict(self), "fingerprint": self.fingerprint.to_json()}

    def costs(self, first_head: int = 1) -> Costs:
        """Return the latency of an input at each exit, as its share of the pass, for a policy that evaluates heads from
        `first_head` on.
        """
        return self._costs(self.seconds, self.head_seconds, first_head, self.batch)

    def costs_from(self, first: int) -> Costs:
        """Return the costs of the exits from `first` on, for a policy that uses only those."""
        costs = self.costs(first)
        return Costs(costs.lengths, tuple(row[first - 1 :] for row in costs.seconds))

    def single_costs(self, first_head: int = 1) -> Costs:
        """Return the costs of an input that runs alone, batch size 1."""
        return self._costs(self.single_seconds, self.single_head_seconds, first_head, 1)

    def _costs(self, table: Table, heads: Table, first_head: int, num_rows: int) -> Costs:
        rows = []
        for seconds_K, heads_K in zip(table, heads):
            row: List[float] = []
            for exit_index, seconds in enumerate(seconds_K, start=1):
                share = (seconds - sum(heads_K[: min(exit_index, first_head) - 1])) / num_rows
                row.append(max(share, (row[-1] if row else 0.0) + 1e-7))  # noise must not change the order
            rows.append(tuple(row))
        return Costs(self.lengths, tuple(rows))

    def step_p99(self, exit_index: int, length: int) -> float:
        """Return the 99th percentile of the time from the previous exit to this one, for a deadline guard."""
        return float(np.interp(length, self.lengths, [row[exit_index - 1] for row in self.step_seconds_p99]))


def conditions_of(store_sha256: str, config: EngineConfig) -> MeasuredOn:
    """Return the conditions, on this machine, of an engine: a latency measured under others does not hold for it."""
    return MeasuredOn(
        **machine(),
        backend=config.backend,
        threads=config.threads or default_threads().number,
        batch=config.batch,
        store_sha256=store_sha256,
        budget_bytes=config.budget_bytes,
    )


def fingerprint_of(classifier: "Classifier") -> MeasuredOn:
    """Return the conditions of a classifier and its plan, which under one budget depends on the longest input."""
    plan, backend = classifier.plan, classifier.backend
    return MeasuredOn(
        **machine(),
        backend=backend.name,
        threads=backend.num_threads,
        batch=classifier.settings.num_rows,
        store_sha256=classifier.store.digest,
        num_slots=plan.num_slots,
        residents=len(plan.residents),
        reads=(classifier.planned_reads if plan.num_slots else BUFFERED).name,
    )


def save_profile(profile: DeviceProfile, path: Optional[Path] = None) -> None:
    """Write a profile to a file, or, without `path`, to the cache folder if that is possible."""
    tree = {"format": FORMAT, **profile.to_json()}
    allowed = () if path is not None else (OSError, OfframpError)  # a cache that cannot be written is no error
    with suppress(*allowed):
        write_json(path or _cached(profile.fingerprint), tree)


def load_profile(path: Path) -> DeviceProfile:
    """Read a profile from a file. Raises UsageError, StoreError, VersionError."""
    return profile_from_json(read_json(path, "device profile", _REMEDY), path)


def profile_from_json(tree: Mapping[str, Any], where: object) -> DeviceProfile:
    """Inverse of `DeviceProfile.to_json`. Raises StoreError naming `where` for something else."""
    try:
        fingerprint = facts_from_json(MeasuredOn, tree["fingerprint"])
        given = {key: value for key, value in tree.items() if key != "format"}
        profile = read(DeviceProfile, {**given, "fingerprint": plain(fingerprint)}, "")
        _require_consistent(profile)
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError) as error:
        raise StoreError(f"no device profile of this version ({error})", where, _REMEDY) from None
    return profile


def _require_consistent(profile: DeviceProfile) -> None:
    for costs in (profile.costs(), profile.costs(profile.num_exits), profile.single_costs()):
        if len(costs.lengths) != len(profile.gather_seconds) or costs.num_exits != len(profile.bytes_read):
            raise ValueError(f"tables do not match {len(costs.lengths)} lengths and {costs.num_exits} exits")
    if not (0 <= profile.after_seconds < math.inf and 0 < profile.among_seconds < math.inf):
        raise ValueError("latencies of passes must be above 0")
    if {len(row) for row in (*profile.seconds_p99, *profile.step_seconds_p99)} != {profile.num_exits}:
        raise ValueError(f"percentiles do not match {profile.num_exits} exits")


def cached_profile(fingerprint: MeasuredOn, longest: int) -> Optional[DeviceProfile]:
    """Return the profile of this fingerprint from the cache folder, if it covers inputs of `longest` tokens."""
    try:
        profile = load_profile(_cached(fingerprint))
    except OfframpError:  # absent, or of another version
        return None
    return profile if profile.fingerprint == fingerprint and profile.lengths[-1] >= longest else None


def differences(there: MeasuredOn, here: MeasuredOn) -> str:
    """Return up to three conditions of `here` that differ as "name value there, value here", or "" if none does."""
    old, new = there.to_json(), here.to_json()
    other = [name for name in new if old.get(name) != new[name]]
    return ", ".join(f"{name} {_shown(old.get(name))} there, {_shown(new[name])} here" for name in other[:3])


def _shown(fact: Any) -> str:
    is_size = isinstance(fact, int) and fact >= 1 << 20
    return named_size(fact) if is_size else repr(fact)


def require_here(profile: DeviceProfile, here: MeasuredOn, where: object) -> None:
    """Raise RefusedError naming what differs, if a profile was measured under other conditions than `here`."""
    differing = differences(profile.measured_on, here)
    if differing:
        remedy = "measure one here with the options of the run: offramp profile STORE --out FILE"
        raise RefusedError(f"the profile was measured under other conditions ({differing})", where, remedy)


def _cached(fingerprint: MeasuredOn) -> Path:
    key = hashlib.sha256(json.dumps(fingerprint.to_json(), sort_keys=True).encode()).hexdigest()
    return cache_folder() / "profiles" / (key + ".json")

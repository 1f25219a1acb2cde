"""The engine configuration: the one place that names the options of a run.

`offramp.load(**options)`, the command line, worker processes, records and policy files use `EngineConfig`. What has no
JSON form (a `Policy`, a `DeviceProfile`, the inputs themselves) is an argument beside it.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Callable, Dict, Mapping, Optional, Union

from offramp.program.checks import require_known
from offramp.units import parse_count, parse_duration, parse_size

READS = ("auto", "direct", "buffered", "mapped")
"""Ways to read shards: by O_DIRECT, copied from the page cache, mapped where it keeps them, or whichever suits."""
VERIFY = ("first", "always", "never")
"""Times at which a store checks digests. Equal to `store.reader.VERIFY`, whose import would load NumPy."""
PLANNED = "planned"
FIFO, LRU, MRU = LISTS = ("fifo", "lru", "mru")
"""Rules of a list of layers: one that is not in it replaces the one loaded first, used least recently, loaded last."""
RESIDENCIES = (PLANNED, "prefix", "even", *LISTS)
"""Rules by which shards are resident: as the planner chooses, the first ones, evenly spaced ones, or a list."""
BULK = "bulk"
"""Value of `batch` that means: the most rows that the budget holds, sorted by length."""
AUTO = "auto"
"""Value of `budget` that means: the memory limit of the container, less what the kernel takes of it."""
RESIDENT = "resident"
"""Value of `budget` that means: all weights stay in memory, or the engine is refused."""
MOST_THREADS = 1024
"""Most threads of a backend. A pool of 10,000 did not start within a minute."""


def parse_budget(value: Any) -> Union[int, str]:
    """Return a budget in bytes, AUTO or RESIDENT. Raises ValueError as `parse_size` does."""
    return value if value in (AUTO, RESIDENT) else parse_size(value)


def _parse_batch(value: Any) -> Union[int, str]:
    return BULK if value == BULK else parse_count(value)


def _parse_threads(value: Any) -> int:
    number = parse_count(value)
    if number > MOST_THREADS:
        raise ValueError(f"at most {MOST_THREADS}, not {value!r}")
    return number


def _parse_text(value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)) or not str(value).strip():
        raise ValueError(f"must be a text, not {value!r}")
    return os.fspath(value)


def _parse_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {value!r}")
    return value


def _option(default: Any, parse: Callable, help: str = "", metavar: Optional[str] = None, choices: tuple = ()) -> Any:
    """Return a field with its parser, which accepts text and values alike, and its documentation on the command line.

    An option without `help` is available from Python only. Without `choices` any value that parses is allowed.
    """
    return field(default=default, metadata={"parse": parse, "help": help, "metavar": metavar, "choices": choices})


@dataclass(frozen=True)
class EngineConfig:
    """Options of an engine, checked on construction. Raises ValueError naming the option and the accepted values."""

    budget: Union[int, str, None] = _option(
        None,
        parse_budget,
        "memory budget of the whole process: 128MiB, 0.3GB; auto: what the container allows; resident: all weights stay"
        " in memory, or it is refused (default: what the machine allows)",
        "SIZE",
    )
    """Maximum resident memory of the whole process in bytes; None: what the machine allows; `"auto"`: the memory limit
    of the container less what the kernel takes of it, or what the machine allows if that is less; `"resident"`: what
    the machine allows, and all weights must fit. Accepts `"128MiB"`."""
    exit: str = _option(
        "none",
        _parse_text,
        "exit policy: none, stage:K, patience:P, ... joined by | and &, a policy file, or FILE.py:CLASS[:ARGUMENTS]",
        "POLICY",
    )
    """Exit policy: a rule, the path of a policy file that `offramp tune` wrote, or a class of the user
    (`policies.own`)."""
    deadline: Optional[float] = _option(
        None, parse_duration, "time limit of each request, such as 60ms: the best answer so far is returned", "TIME"
    )
    """Time limit in seconds of each request; None: that of the policy file, if it has one. Accepts `"60ms"`."""
    profile: Optional[str] = _option(
        None, _parse_text, "device profile of offramp profile: for a deadline, and for index policies", "FILE"
    )
    """Path of a device profile, used by a deadline and by index policies; None: the cached profile, if there is one."""
    backend: str = _option("ort", _parse_text, "compute backend (default: ort, ONNX Runtime)")
    """Compute backend; `offramp.backends` lists the names."""
    threads: Optional[int] = _option(None, _parse_threads, "threads of the backend (default: all processors)", "N")
    """Threads of the backend; None: the processors of this process."""
    batch: Union[int, str] = _option(1, _parse_batch, "rows run together; bulk: the most that fit (default: 1)", "N")
    """Rows that run together, or `"bulk"`."""
    max_length: Optional[int] = _option(None, parse_count, "most tokens of a text (default: the model's limit)", "N")
    """Number of tokens to which texts are truncated; None: the limit of the model."""
    reads: str = _option(
        "auto", _parse_text, "direct: O_DIRECT; buffered: page cache; mapped: no copy (default: auto)", choices=READS
    )
    """Way to read shards: `direct` (O_DIRECT), `buffered` (page cache), `mapped` (page cache, no copy), or `auto`."""
    verify: str = _option("first", _parse_text, "when shards are hashed (default: first)", choices=VERIFY)
    """Time of hashing shards: at their `first` use on this machine, `always`, or `never`."""
    longest: Optional[int] = _option(None, parse_count)
    """Number of tokens of the longest input, if known; plans for short inputs are smaller."""
    own_process: bool = _option(False, _parse_flag)
    """True: the process serves this engine only, and the budget holds from the start of the process."""
    trust_kernels: bool = _option(
        False, _parse_flag, "run captured kernels whose operations offramp does not list as safe: they may run any code"
    )
    """True: captured kernels may contain operations outside the table of their backend. Limits of size stay. Only a
    caller sets it: no file can."""

    slots: Optional[int] = _option(None, parse_count)
    """Number of slots of the ring, to compare plans; None: the planner chooses. A step that holds several shards at
    once needs as many."""
    residency: str = _option(PLANNED, _parse_text, choices=RESIDENCIES)
    """Rule by which shards become resident, to compare plans. `fifo`, `lru`, `mru`: a list of layers that are loaded
    when they are due (`runtime.due`)."""
    prefetch: bool = _option(True, _parse_flag)
    """False: the read of a shard starts when its step is due, to measure what reading ahead gains. The plan is the
    same. A list of layers never reads ahead."""
    resident_layers: Optional[int] = _option(None, parse_count)
    """Most layers whose weights are in memory at once, slots included, to compare rules at equal memory; None: as many
    as the budget holds, and one in a list. What belongs to no layer then stays in memory, and shards of at most 256 KiB
    of layers that have larger ones."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is None and each.default is None:
                continue
            choices = each.metadata["choices"]
            try:
                if choices and value not in choices:
                    raise ValueError(f"must be one of {', '.join(choices)}, not {value!r}")
                object.__setattr__(self, each.name, each.metadata["parse"](value))
            except ValueError as error:
                raise ValueError(f"{each.name}: {error}") from None

        if self.is_list and (self.slots is not None or self.reads == "mapped"):
            name = "reads: mapped" if self.slots is None else "slots"
            raise ValueError(f"{name}: a list of layers ({self.residency}) has its own copies; give resident_layers")

    @property
    def is_list(self) -> bool:
        """True if layers are kept in a list, and loaded when they are due."""
        return self.residency in LISTS

    @property
    def budget_bytes(self) -> Optional[int]:
        """The budget in bytes; None: what the machine allows."""
        return self.budget if isinstance(self.budget, int) else None

    def to_json(self) -> Dict[str, Any]:
        """Return the options as a tree of plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> EngineConfig:
        """Build a configuration from options by name. Raises ValueError for an unknown name."""
        require_known(cls, tree, "engine option")
        return cls(**tree)

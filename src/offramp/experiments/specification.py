"""The specification of one experiment, which says everything that is varied, and its identity.

An experiment is repeated in rounds; each round is a job with a record. The key of an experiment is a hash of its
specification and of the digests of its inputs; the id of a job is the key and the number of its round.
"""

import difflib
import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from offramp.errors import RefusedError
from offramp.experiments.rivals import RIVALS
from offramp.program.checks import POSITIVE, WrongError, read
from offramp.runtime.config import EngineConfig
from offramp.store.manifest import FP32, STORED
from offramp.tasks.data import DataSpec
from offramp.training.settings import TrainSettings
from offramp.units import named_size, parse_duration

MEASURE, STREAM, TOY = "measure", "stream", "toy"
MEASURING = (MEASURE, STREAM)
"""Jobs that measure time: of those on one machine, none runs beside another."""
INPUTS = "inputs.safetensors"
"""File of a model folder with example inputs of a job `stream`, by name, as `offramp divide --inputs` reads it; without
it, they are made up from the config."""
RECIPE = "recipe"
"""Name of the module of a recipe, and of its function."""
_GROUPS: dict[str, type] = {"data": DataSpec, "engine": EngineConfig, "training": TrainSettings}
"""Field of an experiment -> the class that names its options."""
_LEFT_TO_OTHERS = {"training": ("max_length", "seed"), "engine": ("own_process", "longest")}
"""Group -> options that are not set by name: another option of the experiment, or the runner, determines them."""
MAX_SPECIFICATION_BYTES = 256 << 10
"""Longest specification of a record that is read, as JSON; the names of 10,000 labels take half of that."""
NOT_IDENTIFYING = ("rounds", "timeout")
"""Fields that may change without an experiment becoming another one: its records stay valid."""
SPLITS = ("train", "tune", "certify", "dev", "dev_matched", "dev_mismatched")
"""Names of splits; the last two of MNLI alone."""
ADDED = {"rival": None, "prefetch": True, "resident_layers": None}
"""Option that is newer than the first records -> the value that these stand for, with which it is no part of a key."""


@dataclass(frozen=True)
class Experiment:
    """One specification. `experiment` makes one from options by name. Raises ValueError for a wrong value."""

    model: str
    """A run folder, a model folder or a store; with `training`, the model to train. With `seed` and without `training`:
    MODEL/seed-N, as `offramp train --seed 1,2,3` writes it."""
    job: str = field(default=MEASURE, metadata={"choices": (MEASURE, STREAM, TOY)})
    """`measure`; `stream`, which divides a model folder by a run, streams it under small budgets, and compares answers
    bit for bit; or `toy`, which computes some numbers from the specification, to try a scheduler."""
    data: Any = None
    """`tasks.DataSpec`, or None: random inputs."""
    split: str = field(default="dev", metadata={"choices": SPLITS})
    """Rows that are measured; of MNLI, `dev` is the first of its two."""
    rows: int = field(default=200, metadata=POSITIVE)
    """Number of evenly spaced rows of the split."""
    include_training_rows: bool = False
    passes: int = field(default=10, metadata=POSITIVE)
    """Batches of random inputs, without `data`."""
    engine: Any = field(default_factory=EngineConfig)
    """`runtime.config.EngineConfig`. In addition to its policies, `exit` may be `oracle`, `random:POLICY`,
    `tune:latency=TIME`, `tune:latency=RULE` or `tune:drop=POINTS`; see `prerequisites`."""
    rival: str | None = field(default=None, metadata={"choices": tuple(RIVALS)})
    """Another way to run the model, of those of `bench --against`; None: offramp. Of the engine's options a rival has
    `threads` and `max_length`, and `lazy-layers` also `residency` (a list) and `resident_layers`."""
    training: Any = None
    """`training.TrainSettings`, or None: the model is used as it is."""
    dtype: str = field(default=FP32, metadata={"choices": STORED})
    """Dtype of the matrices of the store that is divided for the experiment."""
    seed: int | None = None
    """Seed of the training; of the permutation for `random:POLICY`."""
    trace: bool = False
    """True: the record also holds the memory over time and the spans of the stages."""
    device: str | None = None
    """Name of the machine that the experiment needs; None: any. An experiment is never moved to another one."""
    rounds: int = field(default=5, metadata=POSITIVE)
    """Number of repetitions, each in a process of its own, alternating with the other experiments."""
    timeout: float | None = None
    """Most seconds of one round, and of a rival's process; None: no limit, and 5 minutes of a rival."""
    place: ClassVar[str | None] = None
    """Line of the recipe that made it, for messages: no part of the specification. None: no recipe did."""

    def __post_init__(self) -> None:
        for name, kind in _GROUPS.items():
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, _group(kind, value))
            elif not isinstance(value, kind) and (value is not None or name == "engine"):
                raise ValueError(f"{name} must be the options of {kind.__name__}, not {value!r}")
        try:
            json.dumps(self.to_json(), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"an experiment needs a form in JSON: {error}") from None
        if not self.model.strip():
            raise ValueError(f"model must name a folder, not {self.model!r}")

    def to_json(self) -> dict[str, Any]:
        """Return the specification as a tree of plain values."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return json.loads(json.dumps({**own, **{name: _tree(own[name]) for name in _GROUPS}}))

    @classmethod
    def from_json(cls, tree: Any) -> "Experiment":
        """Inverse of `to_json`. Raises ValueError naming what is wrong."""
        return read(cls, tree, "experiment", fills=True)

    def key(self, inputs: Mapping[str, Any]) -> str:
        """Return the identity of this experiment on these inputs: digests of its model and data."""
        tree = {name: value for name, value in self.to_json().items() if name not in NOT_IDENTIFYING}
        found = {**identifying(tree), "engine": identifying(tree["engine"])}
        return digest_of({"experiment": found, "inputs": dict(inputs)})

    def flat(self) -> dict[str, Any]:
        """Return all options by their names in a recipe; absent groups are left out."""
        tree = self.to_json()
        flat = {name: value for name, value in tree.items() if name not in _GROUPS}
        for name, options in OPTIONS.items():
            flat.update({option: tree[name][option] for option in options if tree[name] is not None})
        return flat


def identifying(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options without those that were added later and have the value of older records: what keys are made of."""
    return {name: value for name, value in options.items() if name not in ADDED or value != ADDED[name]}


def specification_of(record: Mapping[str, Any], folder: object) -> Experiment:
    """Return the experiment of a record. Raises RefusedError if this release cannot read it."""
    specification_text(record, folder)
    try:
        return Experiment.from_json(record["experiment"])
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise _unreadable(str(error), folder) from None


def specification_text(record: Mapping[str, Any], folder: object) -> str:
    """Return the specification of a record as JSON, equal for equal ones.

    Raises RefusedError for one that is nested deeply, or takes long to read, compare and show: each record has one.
    """
    try:
        text = json.dumps(record.get("experiment"), sort_keys=True)
    except RecursionError:
        raise _unreadable("nested too deeply", folder) from None
    if not isinstance(record.get("experiment"), Mapping) or len(text) > MAX_SPECIFICATION_BYTES:
        raise _unreadable(f"no object of at most {MAX_SPECIFICATION_BYTES} bytes", folder)
    return text


def _unreadable(what: str, folder: object) -> RefusedError:
    remedy = "use the release that wrote it, or run the sweep again"
    return RefusedError(f"a record has a specification that cannot be read ({what})", str(folder), remedy)


OPTIONS: dict[str, tuple[str, ...]] = {
    name: tuple(each.name for each in fields(kind) if each.name not in _LEFT_TO_OTHERS.get(name, ()))
    for name, kind in _GROUPS.items()
}
"""Group -> its options, which a recipe sets by name."""


def option_names() -> list[str]:
    """Return the names of all options of an experiment."""
    own = [each.name for each in fields(Experiment) if each.name not in _GROUPS]
    return list(dict.fromkeys([*own, *(option for options in OPTIONS.values() for option in options)]))


def require_options(names: Iterable[str]) -> None:
    """Raise ValueError for names that no option has, naming the options that are spelt most alike."""
    known, unknown = option_names(), []
    for name in sorted(set(names) - set(known)):
        close = difflib.get_close_matches(name.lower(), known)
        unknown.append(f"{name} (did you mean {' or '.join(close)}?)" if close else name)
    if unknown:
        fields = "fields" if len(unknown) > 1 else "field"
        raise ValueError(f"unknown {fields} {', '.join(unknown)}; known: {', '.join(known)}")


def experiment(**options: Any) -> Experiment:
    """Return an experiment from options by name: fields of `Experiment`, `EngineConfig`, `DataSpec`, `TrainSettings`.

    Raises ValueError for an unknown option, naming the known ones, and for a wrong value.
    """
    require_options(options)
    groups = {name: {key: options[key] for key in known if key in options} for name, known in OPTIONS.items()}
    own = {name: value for name, value in options.items() if not any(name in known for known in OPTIONS.values())}
    tree: dict[str, Any] = {**own, "engine": groups["engine"]}
    if "model" not in own:
        raise ValueError("no model")
    if own.get("timeout") is not None:
        tree["timeout"] = parse_duration(own["timeout"])
    data = {name: value for name, value in groups["data"].items() if value is not None}
    tree["data"] = data if {"task", "train", "dev"} & data.keys() else None
    if data and tree["data"] is None:
        raise ValueError(f"{', '.join(data)} without data: task, train and dev are missing")
    training = {name: value for name, value in groups["training"].items() if value is not None}
    if training:
        length = {"max_length": options["max_length"]} if options.get("max_length") else {}
        tree["training"] = {**training, **length, "seed": own.get("seed") or 0}
    return made_at(recipe_place(), Experiment.from_json(tree))


def made_at(place: str | None, found: Experiment) -> Experiment:
    """Return an experiment that knows the line of the recipe that made it."""
    object.__setattr__(found, "place", place)
    return found


def recipe_place() -> str | None:
    """Return the line of the recipe that is being run; None if none is."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == RECIPE:
            return f"{frame.f_globals['__file__']}, line {frame.f_lineno}"
        frame = frame.f_back
    return None


def names_of(experiments: Sequence[Experiment]) -> dict[Experiment, str]:
    """Return a name of each experiment: the options in which they differ; of a single one, its model."""
    flats = {each: each.flat() for each in experiments}
    values: dict[str, set[str]] = {}
    for name in option_names():
        values[name] = {str(flat.get(name)) for flat in flats.values()}
    varied = [name for name in option_names() if len(values[name]) > 1 and name not in NOT_IDENTIFYING]
    found = {}
    for each, flat in flats.items():
        parts = [f"{name}={spelt(name, flat[name])}" for name in varied if flat.get(name) is not None]
        found[each] = " ".join(parts) or each.model
    return found


def spelt(name: str, value: Any) -> str:
    """Return the value of an option as `--only` takes it."""
    if name == "budget" and isinstance(value, int):
        return named_size(value)
    return "none" if value is None else str(value)


def digest_of(tree: Any) -> str:
    """Return a hash of plain values, as 16 hexadecimal digits."""
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _group(kind: Any, tree: Mapping[str, Any]) -> Any:
    if hasattr(kind, "from_json"):
        return kind.from_json(tree)
    unknown = sorted(set(tree) - {each.name for each in fields(kind)})
    if unknown:
        raise WrongError(f"unknown option of training {', '.join(unknown)}")
    for name, value in tree.items():
        if not isinstance(value, (str, int, float, type(None))) and not callable(value):
            raise WrongError(f"training: {name} must be a number or a word")
    return kind(**tree)


def _tree(group: Any) -> Any:
    return asdict(group) if group is not None else None

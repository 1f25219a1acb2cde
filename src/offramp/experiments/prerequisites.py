"""Prerequisites of experiments: trained models, stores, samples of data, profiles, transcripts, tuned policies.

Each is made once, in a folder `made/KIND-KEY` of the results. Its key is a hash of the digests of what it is made from,
so that equal ones are shared and changed inputs make new ones. `made.json` in the folder is written last: what lacks it
is made again, from where it was interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from offramp.backends import BACKENDS
from offramp.errors import UsageError
from offramp.experiments.figures import SAMPLE
from offramp.experiments.jobs import BOUNDS, ORACLE, RANDOM, WorkerJob
from offramp.experiments.rivals import INDEX_FILE, LISTED
from offramp.experiments.specification import MEASURE, NOT_IDENTIFYING, STREAM, Experiment, digest_of, identifying
from offramp.experiments.steps import LATENCY_OF, POLICY, RUN, STORE
from offramp.measure.hardware import machine
from offramp.runtime.config import BULK, LISTS, PLANNED, EngineConfig
from offramp.session.inputs import InputSource
from offramp.store.manifest import FP32
from offramp.units import parse_duration

if TYPE_CHECKING:
    from offramp.policies import Policy
    from offramp.tasks import DataSpec

MADE = "made.json"
TIMED = ("profile",)
"""Kinds that measure time: nothing runs beside them."""
_TUNE = "tune:"
_OF_MODELS = ("divide", "convert", "profile")
"""Kinds that need no data, unless the model is trained before."""
_OR_TRAIN = 'or give an option of the training, such as loss="pabee": the sweep then trains the model first'
_GOALS = {"latency": ("latency_seconds", parse_duration), "drop": ("max_drop", float)}


@dataclass(frozen=True)
class Source:
    """A model as it was found: its folder, digest, and whether it is a store."""

    folder: str
    sha256: str
    is_store: bool
    num_layers: int | None = None
    """Number of layers, and so of exits after a training; None: only a run of the model tells."""
    max_length: int | None = None
    """Most tokens of a text; None: unknown, or no model of texts."""
    problem: str | None = None
    source: str | None = None
    """Digest of the model that a store was made from; of another folder its own."""
    precision: str = FP32
    """Precision of a store: stores of one source that differ in it are one model for a comparison."""
    has_head: bool | None = None
    """True if the model ends in a classification head; None: only a run of the model tells."""
    has_exits: bool | None = None
    """True if the folder has trained exits; None: unknown."""


@dataclass(frozen=True)
class Prerequisite:
    """One step that several experiments may need."""

    kind: str
    folder: Path
    arguments: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    """Names of those that are made before."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Configuration of a profile."""
    model: str = ""
    data: str = ""
    """Model and data that it is made of, as the recipe names them."""

    @property
    def name(self) -> str:
        """`KIND-KEY`."""
        return self.folder.name

    @property
    def is_made(self) -> bool:
        """True if it is complete."""
        return (self.folder / MADE).is_file()

    def job(self) -> WorkerJob:
        """Return the job of a worker process that makes it."""
        if self.kind == "profile":
            return WorkerJob("profile", str(self.arguments["store"]), self.engine, recall=True)
        step = {**self.arguments, "kind": self.kind, "out": str(self.folder)}
        return WorkerJob("step", "", step=step)


@dataclass
class Needs:
    """Prerequisites of one experiment, in the order in which they are made."""

    made: Path
    steps: dict[str, Prerequisite] = field(default_factory=dict)
    store: str = ""
    sample: Path | None = None
    exits: Path | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    rival: Path | None = None
    """Folder of the conversion for a rival."""
    model: str = ""
    data: str = ""
    """Model and data of the experiment, as the recipe names them."""
    rival_step: Mapping[str, str] = field(default_factory=dict)
    """Name, model and interpreter of the rival."""
    data_sha256: str | None = None
    model_sha256: str | None = None
    store_sha256: str | None = None
    """Digests of the data, the model folder and the store that are measured as they are: none may change meanwhile."""

    def add(self, kind: str, about: Any, needs: tuple[Path, ...] = (), **arguments: Any) -> Path:
        """Add a step whose key is a hash of `about`; return its folder."""
        folder, engine = self.made / f"{kind}-{digest_of([kind, about])}", arguments.pop("engine", EngineConfig())
        names = tuple(need.name for need in needs if need.name in self.steps)
        data = "" if kind in _OF_MODELS and not names else self.data
        if self.model_sha256 is not None and kind in ("divide", "train") and not names:  # of the model itself
            arguments["sha256"] = self.model_sha256
        if "data" in arguments:
            arguments["data_sha256"] = self.data_sha256
        self.steps[folder.name] = Prerequisite(kind, folder, arguments, names, engine, self.model, data)
        return folder


def needs_of(
    each: Experiment, source: Source | None, data_sha256: str | None, made: Path,
    pythons: Mapping[str, str] = MappingProxyType({}),
) -> Needs:  # fmt: skip
    """Return what an experiment needs. `pythons` are the interpreters of rivals, by name; others are run by this one.

    Raises UsageError for options that contradict each other.
    """
    needs = Needs(made, engine=each.engine, model=each.model, data=_name_of(each.data))
    needs.data_sha256, needs.model_sha256 = data_sha256, None if source is None or source.is_store else source.sha256
    if each.job == STREAM and source is not None:
        needs.model = _streamed_folder(each, source)
    if each.job != MEASURE or source is None:
        return needs
    _require_consistent(each, source)
    each, data_sha256 = _pinned(_fitted(each, source)), _as_read(each.data, data_sha256)
    needs.engine = each.engine
    model, digest, before = _model(needs, each, source, data_sha256)
    if source.is_store and each.training is None and each.dtype == FP32:
        needs.store, needs.store_sha256, stored = model, digest, digest
    else:
        divided = needs.add("divide", [digest, each.dtype], before, model=model, dtype=each.dtype)
        needs.store, stored = str(divided / STORE), divided.name
        before = (*before, divided)
    if each.rival is not None:
        if source.is_store and each.training is None:
            _require_loadable(model, each.rival)
        python = pythons.get(each.rival, sys.executable)
        needs.rival_step = {"rival": each.rival, "model": model, "python": python}
        needs.rival = needs.add("convert", [digest, each.rival, python], before, **needs.rival_step)
    if each.data is None:
        return needs
    data = {"data": asdict(each.data), "include": each.include_training_rows}
    about = [stored, data_sha256, each.split, each.rows, each.include_training_rows]
    sampled = {"store": needs.store, "split": each.split, "rows": each.rows}
    needs.sample = needs.add("sample", about, before, **sampled, **data)
    exit, length = each.engine.exit, each.engine.max_length
    if exit.startswith((_TUNE, *BOUNDS)):
        splits = ["tune", "certify"] if exit.startswith(_TUNE) else [each.split]
        model, answering = (model, digest) if each.dtype == FP32 else (needs.store, stored)
        about = [answering, data_sha256, length, each.include_training_rows, splits]
        run = {"model": model, "splits": splits, "max_length": length}
        transcript = needs.add("transcript", about, before, **run, **data)
        if exit.startswith(_TUNE):
            _tune(needs, each, stored, transcript, before)
        else:
            _bound(needs, each, needs.sample, transcript)
    return needs


def _name_of(data: DataSpec | None) -> str:
    """Return the name of data in messages."""
    return "" if data is None else str(data.task or data.train or data.dev)


def _as_read(data: DataSpec | None, sha256: str | None) -> str | None:
    """Return the digest of data as they are read: of the user's files, whose digest is of their bytes, with the options
    that choose their columns, labels, format and splits. The digest of a task is of its examples.
    """
    if data is None or data.task is not None:
        return sha256
    options = {name: value for name, value in data.to_json().items() if name != "offline"}
    roles = {name: options[name] and PurePath(options[name]).suffix for name in ("train", "dev")}
    return digest_of([sha256, {**options, **roles}])


def rule_of(exit: str) -> str:
    """Return the policy of an exit option, without `random:` and `tune:latency=`."""
    return next((exit[len(word) :] for word in (RANDOM, f"{_TUNE}latency=") if exit.startswith(word)), exit)


def _pinned(each: Experiment) -> Experiment:
    """Return the experiment with the digests of Python files in its exit: they are not to change while it is run."""
    from offramp.policies.own import pinned

    rule = rule_of(each.engine.exit)
    exit = each.engine.exit[: len(each.engine.exit) - len(rule)] + pinned(rule)
    return replace(each, engine=replace(each.engine, exit=exit))


def shortened(each: Experiment, source: Source | None) -> int | None:
    """Return the most tokens of a text that the model takes, if its training would take more by default; else None."""
    if each.training is None or each.engine.max_length is not None or source is None or source.max_length is None:
        return None
    return source.max_length if each.training.max_length > source.max_length else None


def _fitted(each: Experiment, source: Source) -> Experiment:
    """Return the experiment with texts in its training that are no longer than the model takes.

    Raises UsageError for a length that the model does not have.
    """
    length, wanted = shortened(each, source), each.engine.max_length
    if wanted is not None and source.max_length is not None and wanted > source.max_length:
        what = f"max_length {wanted} exceeds the {source.max_length} tokens that the model supports"
        raise UsageError(what, each.model, f"give max_length={source.max_length} or less")
    if length is None or each.training is None:
        return each
    return replace(each, training=replace(each.training, max_length=length))


def _policy_of(exit: str) -> Policy | None:
    """Return the policy that an exit option names, if it names one. Raises UsageError for a text that is none."""
    if exit in (ORACLE, "none") or (exit.startswith(_TUNE) and LATENCY_OF not in goal_of(exit)):
        return None
    from offramp.session.policy_files import read_exit

    rule = rule_of(exit)
    if rule != exit:
        _require_rule(rule)  # not a policy file
    return read_exit(rule).policy


def _bound(needs: Needs, each: Experiment, sample: Path, transcript: Path) -> None:
    """Add the exits of the rows of the sample, which a bound knows beforehand."""
    rule, seed = each.engine.exit, each.seed or 0
    about = [sample.name, transcript.name, rule, seed]
    arguments = {"sample": str(sample), "transcript": str(transcript), "rule": rule, "rows": each.rows, "seed": seed}
    needs.exits = needs.add("exits", about, (sample, transcript), **arguments)
    needs.engine = replace(each.engine, exit="none")


def _model(
    needs: Needs, each: Experiment, source: Source, data_sha256: str | None
) -> tuple[str, str, tuple[Path, ...]]:
    """Return the folder and the digest of the model, and what is made before: a training, if it is asked for."""
    if each.training is None:
        return source.folder, source.sha256, ()
    settings = asdict(each.training)
    about = [source.sha256, data_sha256, settings]
    trained = needs.add("train", about, model=source.folder, data=asdict(each.data), settings=settings)
    return str(trained / RUN), trained.name, (trained,)


def _tune(needs: Needs, each: Experiment, stored: str, transcript: Path, before: tuple[Path, ...]) -> None:
    """Add a profile of this machine and the policy that is tuned with it."""
    engine = replace(each.engine, exit="none", deadline=None, profile=None)
    about = [stored, identifying(engine.to_json()), machine()]
    profile = needs.add("profile", about, before, store=needs.store, engine=engine)
    goal = goal_of(each.engine.exit)
    arguments = {"transcript": str(transcript), "profile": str(profile), "include": each.include_training_rows}
    policy = needs.add("tune", [transcript.name, profile.name, goal], (transcript, profile), goal=goal, **arguments)
    needs.engine = replace(each.engine, exit=str(policy / POLICY))


def goal_of(exit: str) -> dict[str, Any]:
    """Return the options of `tuning.Goal` for `tune:latency=TIME` or `tune:drop=POINTS`, or LATENCY_OF a rule.

    Raises UsageError.
    """
    name, _, value = exit[len(_TUNE) :].partition("=")
    if name == "latency" and value[:1].isalpha():
        _require_rule(value)
        return {LATENCY_OF: value}
    try:
        option, parse = _GOALS[name]
        return {option: parse(value)}
    except (KeyError, ValueError):
        raise UsageError(f"exit {exit}: no goal", None, "give tune:latency=40ms or tune:drop=1") from None


def _require_consistent(each: Experiment, source: Source) -> None:
    """Raise UsageError for options that contradict each other, and for an exit that the model does not have."""
    exit = each.engine.exit
    if each.rival is not None:
        _require_options(each)
    if each.data is None and each.training is not None:
        raise UsageError("a training without data", each.model, "give task, train or dev")
    if each.data is None and exit != "none" and not _is_fixed(exit):
        what = "policies leave at other exits on random inputs than on real ones"
        raise UsageError(what, each.model, "give task or dev, or exit none or stage:K")
    if exit.startswith((*BOUNDS, _TUNE)) and each.engine.batch == BULK:
        reason = (
            "whose profile is of a fixed number of rows" if exit.startswith(_TUNE) else "whose order of rows is another"
        )
        raise UsageError(f"exit {exit} in bulk mode, {reason}", each.model, "give a batch size")
    if each.engine.backend not in BACKENDS:
        what = f"no backend {each.engine.backend}"
        raise UsageError(what, each.model, f"give {', '.join(BACKENDS)}")
    policy = _policy_of(exit)
    if policy is not None and source.num_layers is not None:
        policy.check(source.num_layers, source.problem if each.training is None else None)
    _require_answers(each, source, policy)


def _require_answers(each: Experiment, source: Source, policy: Policy | None) -> None:
    """Raise UsageError for data of which the model predicts nothing, and for a policy without exits to leave at."""
    trains, num_layers = each.training is not None, source.num_layers or 1
    if each.data is not None and not trains and source.has_head is False:
        what = "the model has no classification head"
        raise UsageError(what, each.model, f"name a classifier, {_OR_TRAIN}")
    exit, deadline = each.engine.exit, each.engine.deadline
    leaves = exit.startswith((*BOUNDS, _TUNE)) or (policy is not None and policy.earliest_exit(num_layers) < num_layers)
    if num_layers == 1 or not (leaves or deadline is not None):
        return
    needing = f"exit {exit}" if leaves else "a deadline"
    if trains and each.training.loss == "last":
        what = f"{needing} needs exits, and a training with loss last makes none"
        raise UsageError(what, each.model, "give exit none, or another loss")
    if not trains and source.has_exits is False:
        what = f"{needing} needs exits and the model has none"
        raise UsageError(what, each.model, f"give exit none, name a run folder of offramp train, {_OR_TRAIN}")


def _is_fixed(exit: str) -> bool:
    """Return whether an exit is `stage:K`, at which all inputs leave."""
    from offramp.policies import StopAt

    return rule_of(exit) == exit and isinstance(_policy_of(exit), StopAt)


def _require_rule(text: str) -> None:
    """Raise UsageError for an invalid policy, before anything is made."""
    from offramp.policies import parse

    parse(text, code=True)


def measuring_job(each: Experiment, number: int, needs: Needs) -> WorkerJob:
    """Return the job of round `number` of an experiment whose prerequisites are made."""
    if each.job != MEASURE:
        step = {"kind": each.job, "experiment": each.to_json(), "round": number, "model": needs.model}
        step["sha256"] = needs.model_sha256
        return WorkerJob("step", "", step=step)
    engine, inputs = needs.engine, InputSource()
    if needs.sample is not None:
        sample = json.loads((needs.sample / SAMPLE).read_text())
        inputs = InputSource(file=str(needs.sample / sample["inputs"]))
        engine = replace(engine, max_length=engine.max_length or sample["max_length"])
    paths = {"sample": needs.sample, "exits": needs.exits, "store": needs.store}
    if needs.rival is not None:
        return _rival_job(each, needs, engine, inputs)
    step = {**{name: path and str(path) for name, path in paths.items()}, "rule": each.engine.exit}
    return WorkerJob("measure", needs.store, engine, inputs, each.passes, sampled=each.trace, step=step)


def _rival_job(each: Experiment, needs: Needs, engine: EngineConfig, inputs: InputSource) -> WorkerJob:
    """Return the job of a round of a rival."""
    assert needs.rival is not None
    known = json.loads((needs.rival / MADE).read_text())["result"]
    step = {**needs.rival_step, **known, "kind": "rival", "store": needs.store, "inputs": inputs.to_json()}
    step |= {"sample": needs.sample and str(needs.sample), "passes": each.passes, "timeout": each.timeout}
    step |= {"threads": engine.threads, "max_length": engine.max_length, "options": {}}
    if each.rival == LISTED:
        step["options"] = {"residency": engine.residency, "resident_layers": engine.resident_layers or 1}
    return WorkerJob("step", "", engine, step=step)


def _require_options(each: Experiment) -> None:
    """Raise UsageError for options that the rival of an experiment does not have."""
    engine = each.engine
    known = {"threads": engine.threads, "max_length": engine.max_length}
    if each.rival == LISTED and engine.residency == PLANNED:
        what = f"the rival {LISTED} keeps a list of layers, and has no residency {PLANNED}"
        raise UsageError(what, each.model, f"give it a Grid of its own, with residency {', '.join(LISTS)}")
    if each.rival == LISTED and engine.residency in LISTS:
        known |= {"residency": engine.residency, "resident_layers": engine.resident_layers}
    plain = replace(EngineConfig(), **known)
    other = [name for name, value in vars(engine).items() if value != getattr(plain, name)]
    other += [name for name in ("trace", "dtype") if getattr(each, name) != getattr(Experiment("plain"), name)]
    if other:
        what = f"the rival {each.rival} has no option {', '.join(other)}"
        raise UsageError(what, each.model, "give rivals a Grid of their own, without it")


def _streamed_folder(each: Experiment, source: Source) -> str:
    """Return the model folder of a job `stream`. Raises UsageError for a store, and for options without effect."""
    if source.is_store:
        what = f"the job {STREAM} divides a model itself, and this is a store"
        raise UsageError(what, each.model, "name the model folder that it was made from")
    plain = Experiment(each.model, STREAM, engine=EngineConfig(threads=each.engine.threads))
    free = replace(plain, **{name: getattr(each, name) for name in ("device", *NOT_IDENTIFYING)})
    other = [name for name, value in each.flat().items() if value != free.flat().get(name)]
    if other:
        what = f"the job {STREAM} has no option {', '.join(other)}"
        raise UsageError(what, each.model, "give it a Grid of its own, without it")
    return source.folder


def _require_loadable(folder: str, rival: str) -> None:
    """Raise UsageError for a store that transformers cannot load."""
    if not Path(folder, INDEX_FILE).exists():
        what = f"the rival {rival} reads the model that the store was made from"
        raise UsageError(what, folder, "name the model folder, or a store that transformers loads")

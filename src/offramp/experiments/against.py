"""A store under several budgets, and its rivals, measured side by side: each in processes of its own, in rounds.

All see the same token ids, one text at a time. In a round each is measured once, starting each round with another one.
Records may be kept in a file: what is there is not measured again.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from offramp.errors import BudgetError, OfframpError, UsageError
from offramp.experiments import groups
from offramp.experiments.children import Log, ignore, run_worker
from offramp.experiments.jobs import WARM_UP_PASSES, WorkerJob
from offramp.experiments.rivals import (
    INDEX_FILE,
    MEASURE_SECONDS,
    Chosen,
    Inputs,
    RivalJob,
    is_measurement,
    model_digest,
    prepared,
    versions,
)
from offramp.measure import default_threads
from offramp.measure.hardware import machine
from offramp.profiling.random_inputs import random_length, random_numbers
from offramp.reporting.comparison import Candidate
from offramp.runtime.config import EngineConfig
from offramp.runtime.sweep import Outcome
from offramp.session.inputs import InputSource
from offramp.session.results import result_of, scores_of
from offramp.store import Store
from offramp.store.files import iter_chunks
from offramp.store.manifest import require_head
from offramp.tasks import open_encoder
from offramp.tasks.lines import silent
from offramp.units import format_duration, format_size, named_budget

GROUP_SECONDS = 60.0
"""Time limit of a process in the memory group."""
KEPT = ("latencies_seconds", "peak_rss_bytes", "bytes_read_per_input", "precision", "scores", "reads")
"""Keys of a result that its record keeps."""


@dataclass(frozen=True)
class OfframpJob:
    """The measurement of a store under one budget."""

    job: WorkerJob

    def run(self, seconds: float, within: Sequence[str]) -> dict[str, Any]:
        """Return `{"result": tree}` or `{"failed": reason}`."""
        try:
            return {"result": run_worker(self.job, ignore, seconds, within=within)}
        except BudgetError as error:
            return {"failed": error.what, "refused": True}
        except OfframpError as error:
            return {"failed": error.what}


@dataclass(frozen=True)
class Trial:
    """One way to run the model: what it is, and its job, or the reason why it cannot be run."""

    name: str
    precision: str
    versions: dict[str, str] = field(default_factory=dict)
    job: OfframpJob | RivalJob | None = None
    reason: str | None = None
    key: str = ""
    """Digest of what is measured: records of another key are of something else."""


@dataclass(frozen=True)
class Comparison:
    """Stores, budgets and rivals that are compared, their inputs, and the number of rounds."""

    stores: tuple[Path, ...]
    budgets: tuple[int | str, ...]
    chosen: tuple[Chosen, ...]
    config: EngineConfig
    source: InputSource
    """Texts; none: random token ids."""
    model: Path | None = None
    """Model folder that the rivals read; None: the first store that transformers can load."""
    passes: int = 10
    rounds: int = 5
    group_bytes: int | None = None


def run_comparison(comparison: Comparison, path: Path | None, log: Log) -> list[Candidate]:
    """Measure what the file of records at `path` lacks, and return the rivals and the settings of offramp with all
    their records.

    Raises UsageError for a store that is not one of texts, for a model folder that is none, and for a file of other
    content; the errors of the stores.
    """
    records = Records(path)
    trials = _trials(comparison, log)
    rounds = [(trial, number) for number in range(comparison.rounds) for trial in _rotated(trials, number)]
    _measure(comparison, rounds, records, log)
    if comparison.group_bytes is not None and (reason := groups.missing()):
        log(f"offramp: warning: no run in a memory group: {reason}")
    elif comparison.group_bytes is not None:
        _measure(comparison, [(trial, None) for trial in trials], records, log)
    return [
        Candidate(each.name, each.precision, each.versions, records.of(each, comparison), each.reason)
        for each in trials
    ]


def describe(comparison: Comparison) -> str:
    """Return a sentence about the model and the inputs."""
    with Store(comparison.stores[0], "never") as store:
        size = format_size(sum(shard.data_bytes for shard in store.manifest.shards.values()))
        about = f"{store.manifest.source.architecture}, {len(store.program.layers)} layers, {size} of weights"
    if comparison.source:
        inputs = f"the texts of {comparison.source.file}" if comparison.source.file else "texts"
    else:
        inputs = f"random ids, {random_length(str(comparison.stores[0]), comparison.config.max_length)} tokens"
    return f"{about}; inputs: {inputs}, batch 1"


def _rotated(trials: Sequence[Trial], number: int) -> list[Trial]:
    first = number % len(trials)
    return [*trials[first:], *trials[:first]]


def _trials(comparison: Comparison, log: Log) -> list[Trial]:
    """Return the rivals in their order, and each store under each budget."""
    model = comparison.model or _loadable(comparison.stores)
    with Store(comparison.stores[0], "never") as store:
        length = comparison.config.max_length
        inputs = token_inputs(store, comparison.source, comparison.passes, length, log)
    threads = comparison.config.threads or default_threads().number
    digest = model_digest(model)
    rivals = [_rival(chosen, model, digest, inputs, threads, log) for chosen in comparison.chosen]
    return [*rivals, *(trial for path in comparison.stores for trial in _settings(comparison, path, inputs))]


def _loadable(stores: Sequence[Path]) -> Path:
    """Return the first store that transformers loads as it loads a model folder."""
    found = next((path for path in stores if (path / INDEX_FILE).exists()), None)
    if found is None:
        what = "the rivals need the model that the store was made from, or a store that transformers loads"
        raise UsageError(what, stores[0], "give --model FOLDER")
    return found


def token_inputs(store: Store, source: InputSource, passes: int, max_length: int | None, log: Log) -> Inputs:
    """Return the token ids and types of all passes, the warm-up first: of texts, or of random ids without any.

    Raises UsageError for a store that is not one of texts.
    """
    require_head(store.manifest, store.path)
    texts = store.program.texts
    if texts is None:
        raise UsageError("the rivals run classifiers of texts", store.path, "give a store of such a model")
    if not source:
        length, count = random_length(str(store.path), max_length), WARM_UP_PASSES + passes
        rows = [(random_numbers(length, index) % texts.vocab_size).tolist() for index in range(count)]
        return [(ids_S, [0] * length) for ids_S in rows]
    encoder = open_encoder(store.path, store.program.inputs, texts, max_length, log)
    encoded = [encoder.encode([text]).arrays for text in source.read(silent)]
    rows = [(each["input_ids"][0].tolist(), each["token_type_ids"][0].tolist()) for each in encoded]
    return [*(rows[index % len(rows)] for index in range(WARM_UP_PASSES)), *rows]


def _rival(chosen: Chosen, model: Path, digest: str, inputs: Inputs, threads: int, log: Log) -> Trial:
    found = versions(chosen)
    if isinstance(found, str):
        return Trial(chosen.name, chosen.rival.precision, reason=found)
    form = prepared(chosen, model, digest, log)
    if isinstance(form, str):
        return Trial(chosen.name, chosen.rival.precision, found, reason=form)
    job = RivalJob(chosen, model, form, inputs, WARM_UP_PASSES, threads)
    key = _key(digest, found, {**job.to_json(), "model": None, "prepared": form and form.name}, chosen.python)
    return Trial(chosen.name, chosen.rival.precision, found, job, key=key)


def _settings(comparison: Comparison, path: Path, inputs: Inputs) -> Iterator[Trial]:
    """Yield a trial for each budget of a store."""
    with Store(path, "never") as store:
        precision, digest = store.manifest.precision, store.digest
    is_unique = [each.name for each in comparison.stores].count(path.name) == 1
    suffix = f" {path.name if is_unique else path}" if len(comparison.stores) > 1 else ""
    for budget in comparison.budgets:
        job = WorkerJob("tokens", str(path), replace(comparison.config, budget=budget), tokens=inputs)
        named = budget if isinstance(budget, str) else named_budget(budget)
        key = _key(digest, {**job.to_json(), "store": None})
        yield Trial(f"offramp{suffix} {named}", precision, job=OfframpJob(job), key=key)


def _key(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _measure(comparison: Comparison, plan: Sequence[tuple[Trial, int | None]], records: "Records", log: Log) -> None:
    """Measure what is missing, in order. What failed in this call is not tried again."""
    failed: set[str] = set()
    due = [(trial, number) for trial, number in plan if records.lacks(trial, number, comparison)]
    if due and due[0][1] is not None:
        _read_back([*comparison.stores, *{job.prepared or job.model for job in _rival_jobs(due)}])
    for trial, number in due:
        if trial.key in failed or trial.job is None:
            continue
        load = os.getloadavg()[0]
        if number is None:
            assert comparison.group_bytes is not None
            message = _run_in_group(trial.job, comparison.group_bytes)
        else:
            message = trial.job.run(MEASURE_SECONDS, ())
        message = {**_with_scores(message, comparison.stores[0]), "load": load}
        records.add(trial, number, comparison, message)
        failed |= {trial.key} if "failed" in message else set()
        place = f"round {number + 1}/{comparison.rounds}" if number is not None else "group"
        log(f"{place}: {trial.name}: {_short(message)}")


def _rival_jobs(due: Sequence[tuple[Trial, int | None]]) -> Iterator[RivalJob]:
    return (trial.job for trial, _ in due if isinstance(trial.job, RivalJob))


def _short(message: dict[str, Any]) -> str:
    return message.get("failed") or format_duration(float(np.median(message["result"]["latencies_seconds"])))


def _run_in_group(job: OfframpJob | RivalJob, limit_bytes: int) -> dict[str, Any]:
    """Measure in a memory group, from an empty page cache; the message says what the group counted."""
    groups.drop_caches()
    with groups.memory_group(limit_bytes) as group:
        return {**job.run(GROUP_SECONDS, group.around(())), **group.usage()}


def _with_scores(message: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a message with what a record keeps: scores as the store's labels have them in place of logits."""
    result = message.get("result")
    if result is None:
        return message
    if "logits" in result:
        with Store(path, "never") as store:
            labels, output = store.labels, store.program.output
        assert output is not None, "the store has a head"
        if len(result["logits"][0]) != output.num_labels:
            return {"failed": f"gives {len(result['logits'][0])} logits, the store {output.num_labels}"}
        outcomes = [Outcome(np.array(logits)) for logits in result["logits"]]
        found = [result_of(outcome, output.problem, labels, all_scores=True) for outcome in outcomes]
        result = {**result, "scores": [scores_of(each) for each in found]}
    return {**message, "result": {key: result[key] for key in KEPT if key in result}}


def _read_back(folders: Sequence[Path]) -> None:
    """Drop the files of folders from the page cache and read them again: freshly written ones are up to 8 % faster."""
    os.sync()
    for folder in folders:
        for path in filter(Path.is_file, folder.rglob("*")):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                for _ in iter_chunks(file.fileno(), os.fstat(file.fileno()).st_size):
                    pass


class Records:
    """Records of processes in a file, one JSON line each, appended when a process has ended; None: not kept.

    Those of another machine do not count, unless they do not name theirs, as older ones do not.

    Raises UsageError for a file of other content. An incomplete last line, of a process that was killed, is dropped.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._machine = path, machine()
        lines = path.read_bytes().splitlines(keepends=True) if path is not None and path.exists() else []
        if path is not None and lines and not lines[-1].endswith(b"\n"):
            path.write_bytes(b"".join(lines := lines[:-1]))
        self._records = [_parsed(line, path) for line in lines]

    def of(self, trial: Trial, comparison: Comparison) -> list[dict[str, Any]]:
        """Return the records of a trial: those of its rounds, and with a memory group the one in it."""
        keys = {trial.key} if comparison.group_bytes is None else {trial.key, _group_key(trial, comparison)}
        here = [each for each in self._records if each.get("machine") in (None, self._machine)]
        return [each for each in here if each["key"] in keys and (each["round"] or 0) < comparison.rounds]

    def lacks(self, trial: Trial, number: int | None, comparison: Comparison) -> bool:
        """Return whether a round of a trial, or its run in the memory group, has no result yet.

        A run in the group that failed has a result: that it failed. Other failures are tried again.
        """
        found = [each for each in self.of(trial, comparison) if each["round"] == number]
        return trial.job is not None and not (found if number is None else any("result" in each for each in found))

    def add(self, trial: Trial, number: int | None, comparison: Comparison, message: dict[str, Any]) -> None:
        """Append a record."""
        key = trial.key if number is not None else _group_key(trial, comparison)
        record = {"key": key, "name": trial.name, "round": number, "machine": self._machine, **message}
        self._records.append(record)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")


def _group_key(trial: Trial, comparison: Comparison) -> str:
    return f"{trial.key}-{comparison.group_bytes}"


def _parsed(line: bytes, path: Path | None) -> dict[str, Any]:
    """Return a record. Raises UsageError for a line that is none."""
    try:
        found = json.loads(line)
        result = found.get("result")
        fine = isinstance(found["key"], str) and isinstance(found["round"], (int, type(None)))
        fine = fine and (isinstance(found["failed"], str) if result is None else is_measurement(result, "scores"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        fine, found = False, {}
    if not fine:
        raise UsageError("not a file of records of a comparison", path, "name another file for --records")
    return found

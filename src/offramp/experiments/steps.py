"""Steps of the worker processes of a sweep: digests of inputs, prerequisites, and jobs of toys and of rivals.

A step is a tree of plain values: `kind`, a key of `_STEPS`, and its arguments. Paths that a step makes are complete or
are completed by the same step. Libraries are imported by the step that needs them: this module is imported
before a measurement, which counts the memory of its whole process.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.errors import ChangedError, OfframpError, RefusedError, UsageError, missing
from offramp.experiments.figures import SAMPLE
from offramp.experiments.jobs import WorkerJob, described
from offramp.measure import median

if TYPE_CHECKING:
    from offramp.checkpoints.source import Source
    from offramp.experiments.bounds import PlannedExits
    from offramp.experiments.children import Log
    from offramp.tasks import Splits

EXITS, POLICY, PROFILE, RUN, STORE = "exits.json", "policy.json", "profile.json", "run", "store"
"""Names of what steps make, in the folder of the step."""
RUN_AGAIN = "run the sweep again: it measures what is there now"
LATENCY_OF = "latency_of"
"""Goal of `tune:latency=RULE`: the mean latency of this rule on the tune split."""
Tree = Mapping[str, Any]


def take_step(step: Tree, log: Log) -> Any:
    """Take a step and return what it tells of it: plain values."""
    return _STEPS[step["kind"]](step, log)


def _identify(step: Tree, log: Log) -> Any:
    """Return facts of models and digests of data, in the order of `models` and `data`; the last may be an error."""
    finds = {
        "models": lambda model: _identify_model(model, step["offline"], log),
        "data": lambda tree: _data_digest(tree, log),
    }
    found: dict[str, list[Any]] = {name: [] for name in finds}
    for name, find in finds.items():
        for given in step[name]:
            try:
                found[name].append(find(given))
            except OfframpError as error:
                found[name].append({"error": described(error)})
                return found  # the sweep ends with this error: what follows may take minutes to read
    return found


def _identify_model(model: str, offline: bool, log: Log) -> Tree:
    """Return the folder and the digest of a model, and what its config or manifest tells."""
    from offramp.checkpoints.hub import resolve
    from offramp.checkpoints.source import open_source
    from offramp.store.reader import is_store, read_manifest_bytes

    log(f"reading {model}")
    folder = resolve(model, offline)
    if is_store(folder):
        found, facts = hashlib.sha256(read_manifest_bytes(folder)).hexdigest(), _facts_of_store(folder)
    else:
        with open_source(folder) as source:
            found = source.fingerprint()
            facts = {**_facts_of(source), "source": found}
    return {"folder": str(folder), "sha256": found, "is_store": is_store(folder), **facts}


def _facts_of(source: Source) -> Tree:
    """Return what the config of a model folder tells without PyTorch, against which a recipe is checked."""
    has_exits = source.exits() is not None
    if source.misfit() is not None:
        return {"has_exits": has_exits}
    encoder = source.encoder()
    facts = {"num_layers": encoder.num_layers, "max_length": encoder.max_length, "problem": encoder.problem}
    return {**facts, "has_head": encoder.problem is not None, "has_exits": has_exits}


def _facts_of_store(folder: Path) -> Tree:
    """Return what the manifest of a store tells, against which a recipe is checked."""
    from offramp.store import Store

    with Store(folder, "never") as store:
        program = store.program
        length = None if program.texts is None else program.texts.max_length
        facts = {"num_layers": len(program.layers) or None, "max_length": length, "problem": program.problem}
        facts |= {"has_head": program.problem is not None, "has_exits": store.manifest.exits is not None}
        return {**facts, "source": store.manifest.source.fingerprint, "precision": store.manifest.precision}


def _data_digest(tree: Tree, log: Log) -> str:
    """Return a digest of labelled data: of the examples of a task of GLUE, or of the bytes of own files.

    Raises UsageError for a pipe, which other processes could not read again.
    """
    from offramp.experiments.specification import digest_of
    from offramp.store.files import sha256_of
    from offramp.tasks.examples import digest
    from offramp.tasks.lines import is_pipe

    if tree["task"] is not None:
        splits = _load(tree, log).examples
        return digest_of({name: digest(examples) for name, examples in splits.items()})
    found = []
    for path in (Path(tree[name]) for name in ("train", "dev") if tree[name] is not None):
        if is_pipe(str(path)):
            raise UsageError("each process reads the data again", path, "give a file")
        files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
        if not path.exists():
            raise missing(path)
        _require_columns(tree, path)
        for each in files:
            with each.open("rb") as file:
                found.append([each.relative_to(path).as_posix(), sha256_of(file.fileno())])
    return digest_of(found)


def _require_columns(tree: Tree, path: Path) -> None:
    """Raise UsageError for a table whose first row lacks a column that is named, or needed."""
    from offramp.experiments.children import ignore
    from offramp.tasks import arrays, images, tables

    if str(path).endswith(arrays.SUFFIX) or images.is_image_source(str(path)):
        return
    layout = tables.Layout(tree["format"], tree["header"], tree["quotes"])
    for row in tables.read_table(path, layout, tables.Notes(ignore)):
        columns = tables.text_columns(row, tree["text_column"], tree["pair_column"])
        tables.require_columns(row, (*columns, tree["label_column"]))
        return


def _load(tree: Tree, log: Log, problem: str | None = None, labels: Any = None) -> Splits:
    """Load labelled data, with the labels of a model where the data are its own files."""
    from offramp.policies.evidence import REGRESSION
    from offramp.tasks import DataSpec, load

    spec = DataSpec.from_json(tree)
    if spec.task is None and spec.labels is None:
        is_regression = spec.regression or problem == REGRESSION
        spec = replace(spec, regression=is_regression, labels=tuple(labels) if labels and not is_regression else None)
    return load(spec, log)


def _load_unchanged(step: Tree, log: Log, problem: str | None = None, labels: Any = None) -> Splits:
    """Load the data of a step. Raises ChangedError if its files are not those that the sweep has identified."""
    tree, data = step["data"], _load(step["data"], log, problem, labels)
    known = step.get("data_sha256")
    if known is not None and tree["task"] is None and _data_digest(tree, log) != known:
        raise ChangedError("the data have changed since the sweep began", tree["train"] or tree["dev"], RUN_AGAIN)
    return data


def _train(step: Tree, log: Log) -> Any:
    from offramp.checkpoints.source import read_training
    from offramp.training import TrainSettings, train_exits

    out = Path(step["out"]) / RUN
    if read_training(out) is None:
        _require_identified(step)
        data = _load_unchanged(step, log)
        facts = {"labels": data.labels, "metrics": data.metrics, "progress": log}
        cut = {"task": data.name, "split_seed": step["data"]["split_seed"], "cuts_dev": data.cuts_dev}
        train, tune = data.examples.get("train") or [], data.examples.get("tune") or []
        train_exits(step["model"], train, tune, out, settings=TrainSettings(**step["settings"]), data=cut, **facts)
    return {"run": str(out)}


def _divide(step: Tree, log: Log) -> Any:
    from offramp.division import divide
    from offramp.runtime.footprint import tune_allocator
    from offramp.store import Store
    from offramp.store.reader import is_store

    out = Path(step["out"]) / STORE
    if not is_store(out):
        tune_allocator()
        divide(step["model"], out, dtype=step["dtype"], say=log)
    with Store(out, "never") as store:
        fingerprint = store.manifest.source.fingerprint
    if step.get("sha256") not in (None, fingerprint):
        shutil.rmtree(out)  # it is not what the folder of the step is named after
    _require_unchanged(step, fingerprint)
    return {"store": str(out)}


def _require_identified(step: Tree) -> None:
    """Raise ChangedError if the model folder of a step is not the one that the sweep has identified."""
    from offramp.checkpoints.source import open_source

    if step.get("sha256") is not None:
        with open_source(Path(step["model"])) as source:
            _require_unchanged(step, source.fingerprint())


def _require_unchanged(step: Tree, fingerprint: str) -> None:
    """Raise ChangedError if this is not the fingerprint of the model that the sweep has identified."""
    if step.get("sha256") not in (None, fingerprint):
        raise ChangedError("the model has changed since the sweep began", step["model"], RUN_AGAIN)


def _sample(step: Tree, log: Log) -> Any:
    """Write the rows that are measured as `offramp run` reads them, and beside them their labels."""
    from offramp.experiments.evaluation import trained_length
    from offramp.experiments.held_out import require_same_cut
    from offramp.experiments.results import MAX_ROWS
    from offramp.experiments.task_bench import take_sample, write_inputs
    from offramp.store import Store
    from offramp.store.manifest import require_head
    from offramp.store.policy_file import write_json

    out, tree = Path(step["out"]), step["data"]
    with Store(step["store"], "never") as store:
        require_head(store.manifest, store.path)
        data = _load_unchanged(step, log, store.program.problem, store.labels)
        cut = {"task": data.name, "split_seed": tree["split_seed"], "cuts_dev": data.cuts_dev}
        if not step["include"]:
            require_same_cut(store.path, cut, [step["split"]])
        sample = take_sample(store, data, step["split"], step["rows"], include=step["include"], log=log)
        length = trained_length(store.path) if store.program.texts is not None else None
    if len(sample.truth_N) > MAX_ROWS:
        what = f"{len(sample.truth_N)} rows are more than a record holds"
        raise UsageError(what, step["split"], f"give rows={MAX_ROWS} or fewer")
    inputs = write_inputs(sample, out)
    truth = [value.item() for value in sample.truth_N]
    facts = {"split": sample.split, "metrics": sample.metrics, "labels": sample.labels, "truth": truth}
    known = {"data_sha256": sample.data_sha256, "training_rows": sample.training_rows, "max_length": length}
    write_json(out / SAMPLE, {**facts, **known, "inputs": inputs.name})
    return known


def _transcript(step: Tree, log: Log) -> Any:
    from offramp.experiments.evaluation import EvalSettings, classifier_facts, evaluate

    folder = Path(step["model"])
    facts = classifier_facts(folder)
    data = _load_unchanged(step, log, str(facts.problem), facts.labels)
    settings = EvalSettings(
        max_length=step["max_length"], transcript=Path(step["out"]), include_training_rows=step["include"]
    )
    reports = evaluate(folder, data, step["splits"], settings, log=log)
    return {"exits": {report.split: [asdict(row) for row in report.exits] for report in reports}}


def _tune(step: Tree, log: Log) -> Any:
    from offramp.experiments.trials import Trials
    from offramp.experiments.tuning import Goal, tune
    from offramp.policies import parse
    from offramp.runtime.profile import load_profile
    from offramp.store.policy_file import write_policy
    from offramp.store.transcript import read_transcript

    folder, profile = Path(step["transcript"]), load_profile(Path(step["profile"]) / PROFILE)
    transcript, wanted = read_transcript(folder, "tune"), dict(step["goal"])
    if LATENCY_OF in wanted:
        wanted["latency_seconds"] = Trials(transcript, profile).rule(parse(wanted.pop(LATENCY_OF), code=True)).seconds
    goal = Goal(**wanted, include_training_rows=step["include"])
    certify_on = None if goal.max_drop is None else read_transcript(folder, "certify")
    file, _ = tune(transcript, certify_on, profile, goal, log)
    write_policy(Path(step["out"]) / POLICY, file)
    return {"predicted": asdict(file.predicted), "certificate": file.certificate}


def _exits(step: Tree, log: Log) -> Any:
    from offramp.experiments.bounds import exits_of
    from offramp.store.policy_file import write_json
    from offramp.store.transcript import read_transcript
    from offramp.tasks.examples import spread

    sample = json.loads((Path(step["sample"]) / SAMPLE).read_text())
    transcript = read_transcript(Path(step["transcript"]), sample["split"])
    logits_KNC = transcript.logits_NKC.swapaxes(0, 1)
    known = transcript.about.problem, step["seed"], transcript.lengths_N
    exits = spread(exits_of(step["rule"], logits_KNC, *known).tolist(), step["rows"])
    if len(exits) != len(sample["truth"]):
        what = f"the transcript has {len(exits)} rows, the sample {len(sample['truth'])}"
        raise RefusedError(what, step["transcript"], "name another --out")
    write_json(Path(step["out"]) / EXITS, exits)
    return {"mean_exit": sum(exits) / len(exits)}


def _toy(step: Tree, log: Log) -> Any:
    """Compute figures from the specification alone."""
    text = json.dumps([step["experiment"], step["round"]], sort_keys=True).encode()
    number = int.from_bytes(hashlib.sha256(text).digest()[:4], "big") / 2**32
    seconds = [0.01 * (1 + number + index) for index in range(step["experiment"]["passes"])]
    return {"figures": {"latency": median(seconds), "score": 100 * number}, "samples": {"latencies": seconds}}


def _convert(step: Tree, log: Log) -> Any:
    from offramp.experiments.rival_steps import convert

    return convert(step, log)


def _stream(step: Tree, log: Log) -> Any:
    from offramp.experiments.bitwise import stream_model

    _require_identified(step)
    return stream_model(step, log)


def _rival(step: Tree, log: Log) -> Any:
    from offramp.experiments.rival_steps import measure

    return measure(step, log)


_STEPS: dict[str, Callable[[Tree, Any], Any]] = {
    "identify": _identify, "train": _train, "divide": _divide, "sample": _sample, "transcript": _transcript,
    "tune": _tune, "exits": _exits, "toy": _toy, "convert": _convert, "rival": _rival,
    "stream": _stream,
}  # fmt: skip


def planned_exits(job: WorkerJob) -> PlannedExits | None:
    """Return the policy of a job whose exits are known beforehand; None for other jobs."""
    assert job.step is not None
    if job.step["exits"] is None:
        return None
    from offramp.experiments.bounds import PlannedExits

    return PlannedExits(job.step["rule"], json.loads((Path(job.step["exits"]) / EXITS).read_text()))

"""A sweep: the jobs of experiments that have no record yet, their prerequisites first, each in a process of its own.

The rounds of all experiments alternate, starting each round with another one, so that drifts of the machine fall on all
alike. Jobs that measure time run one at a time unless `share_cores` is set. Every job ends with one record, a failure
with its reason; a sweep that was killed continues with the jobs that have none.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.errors import ChangedError, DiskFullError, OfframpError
from offramp.experiments.children import Log, error_of, ignore, run_worker
from offramp.experiments.jobs import WorkerJob
from offramp.experiments.pools import CHANGED, LocalPool, Outcome, Pool, failure_of, run_all
from offramp.experiments.prerequisites import (
    MADE,
    TIMED,
    Needs,
    Prerequisite,
    Source,
    measuring_job,
    needs_of,
    rule_of,
    shortened,
)
from offramp.experiments.results import FORMAT, Record, Results, TooLargeError
from offramp.experiments.results import MADE as MADE_FOLDER
from offramp.experiments.specification import INPUTS, MEASURING, STREAM, TOY, Experiment, names_of
from offramp.experiments.steps import PROFILE, RUN_AGAIN
from offramp.measure import median
from offramp.policies.own import python_files
from offramp.runtime.profile import profile_from_json, save_profile
from offramp.store.policy_file import write_json
from offramp.units import format_duration

if TYPE_CHECKING:
    from offramp.experiments.searching import Study

DONE, FAILED = "done", "failed"
_REPEATED = ("memory", "refused", "absent")
"""Kinds of failures that every round of an experiment has: the other rounds are recorded without being run."""
_RIVAL_SECONDS = 60.0
"""Seconds that a worker may take besides the process of its rival, to make token ids and to compare answers."""
Progress = Callable[[int, int, str], None]
"""Function that receives the number of jobs that have ended, that of all, and one line of text."""


Watch = Callable[[Record, str], None]
"""Function that receives each record after it is on the disk, and the name of its experiment."""


@dataclass(frozen=True)
class SweepSettings:
    """Options of a sweep."""

    num_jobs: int = 1
    """Jobs that run beside each other, if they do not measure time."""
    share_cores: bool = False
    """True: jobs that measure time run beside each other as well."""
    limit: int | None = None
    """Most jobs of this sweep; None: all."""
    device: str | None = None
    """Name of this machine, for experiments that need one; None: the name of the host."""
    pythons: Mapping[str, str] = field(default_factory=dict)
    """Rival -> interpreter that runs it; others are run by this one."""
    retry: Sequence[str] = ()
    """Kinds of failures of earlier sweeps that are measured again."""


@dataclass(frozen=True)
class Job:
    """One round of one experiment."""

    key: str
    number: int
    """Number of the round, from 1."""
    experiment: Experiment
    inputs: Mapping[str, Any]
    needs: Needs

    @property
    def id(self) -> str:
        """Key of the experiment and number of the round."""
        return f"{self.key}.{self.number}"


@dataclass
class Plan:
    """Jobs and prerequisites of a sweep."""

    jobs: list[Job]
    """Jobs without a record, in the order in which they run."""
    steps: list[Prerequisite]
    """Prerequisites that are not made yet."""
    num_recorded: int
    elsewhere: list[Experiment] = field(default_factory=list)
    """Experiments that need another machine."""
    num_limited: int = 0
    """Jobs that are left for the next sweep."""
    failed: list[Record] = field(default_factory=list)
    """Records of the failed jobs of this sweep."""
    failed_before: list[Record] = field(default_factory=list)
    """Records of the failed jobs of earlier sweeps, which are not run again unless that is asked for."""


def plan_sweep(experiments: Sequence[Experiment], folder: Path, records: Sequence[Record], settings: SweepSettings,
               log: Log) -> Plan:  # fmt: skip
    """Return what there is to do. Inputs are read in a process of their own: their digests are parts of the keys.

    Raises the errors of missing or damaged models and data.
    """
    found, elsewhere = jobs_of(experiments, folder, settings, log)
    plan = plan_jobs(found, records, settings.limit)
    plan.elsewhere = elsewhere
    return plan


def jobs_of(
    experiments: Sequence[Experiment], folder: Path, settings: SweepSettings, log: Log
) -> tuple[list[Job], list[Experiment]]:
    """Return the first round of each experiment, and the experiments that need another machine."""
    here = settings.device or platform.node()
    possible = [each for each in experiments if each.device in (None, here)]
    sources, digests = identify(possible, log)
    made, found = (folder / MADE_FOLDER).absolute(), []
    for model, length in {(_model(each), shortened(each, sources.get(_model(each)))) for each in possible}:
        if length is not None:
            log(f"offramp: warning: {model} has {length} tokens: its training truncates texts to these")
    for each in possible:
        source, data = sources.get(_model(each)), digests.get(each.data)
        inputs = {"model": source and source.sha256, "data": data, "files": files_of(each)}
        try:
            needs = needs_of(each, source, data, made, settings.pythons)
        except OfframpError as error:
            raise error.placed(each.place) from None
        known = {} if source is None else {"source": source.source, "precision": source.precision}  # no part of the key
        found.append(Job(each.key(inputs), 1, each, {**inputs, **known}, needs))
    return found, [each for each in experiments if each not in possible]


def plan_jobs(found: Sequence[Job], records: Sequence[Record], limit: int | None) -> Plan:
    """Return the rounds of jobs that have no record, at most `limit`, and what they need."""
    recorded = {record["id"]: record for record in records}
    every = {job.id: job for job in _in_rounds(found)}  # experiments that differ in their number of rounds share some
    jobs = [job for job in every.values() if job.id not in recorded]
    kept = jobs[:limit]
    steps = {name: step for job in kept for name, step in job.needs.steps.items() if not step.is_made}
    plan = Plan(kept, list(steps.values()), len(every) - len(jobs), num_limited=len(jobs) - len(kept))
    plan.failed_before = _failures(recorded[id] for id in every if id in recorded)
    return plan


def without(records: Iterable[Record], kinds: Sequence[str]) -> list[Record]:
    """Return the records without failures of these kinds: their jobs are run again, and the newer records count."""
    return [each for each in records if (each.get("reason") or {}).get("kind") not in kinds]


def _failures(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record["status"] == FAILED]


def identify(experiments: Sequence[Experiment], log: Log) -> tuple[dict[str, Source], dict[Any, str]]:
    """Return the source of each model, and the digest of each set of data."""
    measured = [each for each in experiments if each.job != TOY]
    models = list(dict.fromkeys(_model(each) for each in measured))
    data = list(dict.fromkeys(each.data for each in measured if each.data is not None))
    if not models:
        return {}, {}
    offline = any(each.offline for each in data)
    step = {"kind": "identify", "models": models, "data": [asdict(each) for each in data], "offline": offline}
    found = run_worker(WorkerJob("step", "", step=step), log)
    for inputs, answers, name in ((models, found["models"], _model), (data, found["data"], attrgetter("data"))):
        for given, answer in zip(inputs, answers, strict=False):  # there is none after an error
            if isinstance(answer, Mapping) and "error" in answer:
                raise error_of(answer["error"]).placed(next(each.place for each in measured if name(each) == given))
    sources = [Source(**tree) for tree in found["models"]]
    return dict(zip(models, sources, strict=True)), dict(zip(data, found["data"], strict=True))


def files_of(each: Experiment) -> dict[str, str]:
    """Return the digests of the policy files, Python files, device profile and example inputs of an experiment."""
    exit = each.engine.exit
    names = [exit, *re.split("[&|>]", exit), *python_files(rule_of(exit)), *filter(None, [each.engine.profile])]
    names += [str(Path(each.model, INPUTS))] if each.job == STREAM else []
    paths = [Path(name.strip()) for name in names]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


def _model(each: Experiment) -> str:
    """Return the folder of the model of an experiment."""
    return each.model if each.seed is None or each.training is not None else str(Path(each.model, f"seed-{each.seed}"))


def _in_rounds(found: Sequence[Job]) -> Iterator[Job]:
    """Yield the jobs of all rounds; each round starts with another experiment."""
    for index in range(max((job.experiment.rounds for job in found), default=0)):
        first = index % len(found)
        for job in [*found[first:], *found[:first]]:
            if index < job.experiment.rounds:
                yield Job(job.key, index + 1, job.experiment, job.inputs, job.needs)


def estimated_seconds(plan: Plan, records: Sequence[Record]) -> float | None:
    """Return the seconds that the jobs of a plan will take, by records of the same model, else of any; None: unknown.

    What is made first is not included.
    """
    ended = [record for record in records if record["status"] == DONE]
    if not ended:
        return None
    by_model: dict[str, list[float]] = {}
    for record in ended:
        by_model.setdefault(record["experiment"]["model"], []).append(record["seconds"])
    others = median([record["seconds"] for record in ended])
    return sum(median(by_model.get(job.experiment.model, [others])) for job in plan.jobs)


class Runner:
    """Carries out a plan and adds records to the results."""

    def __init__(
        self, results: Results, pool: Pool, settings: SweepSettings, log: Log, progress: Progress,
        watch: Watch = lambda record, name: None,
    ) -> None:  # fmt: skip
        self.results, self.pool, self.settings, self.log, self.progress = results, pool, settings, log, progress
        self._watch, self.names = watch, {}
        """Experiment -> its name among the others; made for each plan, unless it is set."""
        self._failed: dict[str, Mapping[str, Any]] = {}
        """Name of a prerequisite that failed -> its failure: the reason, and the environment where it is known."""
        self._refused: dict[str, Mapping[str, Any]] = {}
        """Key of an experiment of which a round failed as every round would -> its failure."""
        self._git = git_state()

    def run(self, plan: Plan) -> None:
        """Make what is needed, run the jobs, and note in the plan which failed.

        Raises DiskFullError and ChangedError, after which the sweep can be continued.
        """
        num_before = len(self.results.records)
        for record in self.results.records:
            reason = record.get("reason")
            if reason is not None and reason["kind"] in _REPEATED:
                self._refused.setdefault(record["key"], _failure(reason, record))
        (self.results.folder / MADE_FOLDER).mkdir(exist_ok=True)
        self._make(plan.steps)
        self._measure(plan.jobs)
        plan.failed = _failures(self.results.records[num_before:])

    def _make(self, steps: Sequence[Prerequisite]) -> None:
        """Make all steps, each after those it needs; those that measure time alone."""
        waiting = {step.name: step for step in steps}
        while waiting:
            ready = [step for step in waiting.values() if not any(need in waiting for need in step.needs)]
            for is_timed in (False, True):
                group = [step for step in ready if (step.kind in TIMED) == is_timed]
                num_workers = 1 if is_timed else self.settings.num_jobs
                for step, outcome in run_all(self.pool, self._starting(group), num_workers, self.log, is_timed):
                    self._note_made(step, outcome)
            for step in ready:
                del waiting[step.name]

    def _starting(self, group: Sequence[Prerequisite]) -> Iterator[tuple[Prerequisite, WorkerJob, None]]:
        for step in group:
            failed = next((name for name in (step.name, *step.needs) if name in self._failed), None)
            if failed is not None:  # itself: for an earlier trial of a search
                self._failed[step.name] = self._failed[failed]
                continue
            step.folder.mkdir(parents=True, exist_ok=True)
            self.log(f"making {step.name}")
            yield step, step.job(), None

    def _note_made(self, step: Prerequisite, outcome: Outcome) -> None:
        if "error" in outcome:
            self._require_no_end(outcome)
            what = f"{step.kind} failed: {outcome['error']['what']}"
            self._failed[step.name] = _failure({**outcome["error"], "what": what}, outcome)
            self.log(f"offramp: warning: {step.name}: {outcome['error']['what']}")
            return
        if step.kind == "profile":
            save_profile(profile_from_json(outcome["result"], step.name), step.folder / PROFILE)
        about = {"kind": step.kind, "result": None if step.kind == "profile" else outcome["result"]}
        write_json(step.folder / MADE, {**about, "seconds": outcome["seconds"]})

    def _measure(self, jobs: Sequence[Job]) -> None:
        """Run the jobs: those that measure time one at a time, unless asked otherwise."""
        timed = [job for job in jobs if job.experiment.job in MEASURING]
        others = [job for job in jobs if job.experiment.job not in MEASURING]
        self.names = self.names or names_of([job.experiment for job in jobs])
        self._num_done, self._num_all = 0, len(jobs)
        self.progress(0, len(jobs), f"{len(jobs)} jobs")
        for group, num_jobs in ((others, self.settings.num_jobs), (timed, self._num_timed())):
            alone = group is timed and not self.settings.share_cores
            for job, outcome in run_all(self.pool, self._next(group), num_jobs, ignore, alone):
                self._add(job, outcome, self.pool.room(num_jobs, alone))

    def _next(self, group: Sequence[Job]) -> Iterator[tuple[Job, WorkerJob, float | None]]:
        """Yield the jobs to run. The rounds of an experiment that cannot run are recorded without being run."""
        for job in group:
            failure = next((self._failed[name] for name in job.needs.steps if name in self._failed), None)
            failure = failure or self._refused.get(job.key)
            if failure is not None:
                self._add(job, {**failure, "attempts": 0, "seconds": 0.0}, 0)
                continue
            yield job, measuring_job(job.experiment, job.number, job.needs), _limit(job.experiment)

    def _add(self, job: Job, outcome: Outcome, beside: int) -> None:
        """Add the record of a job that has ended, and tell of it."""
        _require_same_store(job, outcome)
        try:
            self.results.add(self._record(job, outcome, beside))
        except TooLargeError as error:
            failure = _failure(failure_of(error), outcome["result"])
            outcome = {**failure, "attempts": outcome["attempts"], "seconds": outcome["seconds"]}
            self.results.add(self._record(job, outcome, beside))
        self._watch(self.results.records[-1], self.names[job.experiment])
        self._num_done += 1
        state = outcome["error"]["what"] if "error" in outcome else f"took {format_duration(outcome['seconds'])}"
        self.progress(self._num_done, self._num_all, f"{self.names[job.experiment]}, round {job.number}: {state}")

    def _record(self, job: Job, outcome: Outcome, beside: int) -> Record:
        about = {"format": FORMAT, "id": job.id, "key": job.key, "round": job.number}
        about |= {"experiment": job.experiment.to_json(), "inputs": dict(job.inputs)}
        reason = outcome.get("error")
        if reason is not None:
            self._require_no_end(outcome)
            if reason["kind"] in _REPEATED:
                self._refused[job.key] = _failure(reason, outcome)
            found = {"status": FAILED, "reason": dict(reason), "figures": {}, "samples": {}}
            found |= {"environment": outcome["environment"]} if "environment" in outcome else {}
        else:
            found = {"status": DONE, **outcome["result"]}
        facts = {"seconds": outcome["seconds"], "attempts": outcome["attempts"], "workers": beside}
        ended = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return {**about, **found, **facts, "git": self._git, "ended": ended}

    def _require_no_end(self, outcome: Outcome) -> None:
        """Raise DiskFullError or ChangedError if a job failed because of it: the sweep ends without its record."""
        reason = outcome["error"]
        if reason["kind"] == "disk":
            raise DiskFullError(reason["what"], reason["where"], "free some space and run again: records are kept")
        if reason["kind"] == CHANGED:
            raise ChangedError(f"{reason['what']}, and the sweep ends", reason["where"], reason["remedy"])

    def _num_timed(self) -> int:
        return self.settings.num_jobs if self.settings.share_cores else 1


def _failure(reason: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the outcome of a failure, with the environment of a record, an outcome or a result if that has one."""
    known = {"environment": about["environment"]} if about.get("environment") else {}
    return {"error": reason, **known}


def _require_same_store(job: Job, outcome: Outcome) -> None:
    """Raise ChangedError if a store that is measured as it is was replaced since the sweep began."""
    run = outcome.get("result", {}).get("run") or {}
    if job.needs.store_sha256 is not None and run.get("store_sha256", job.needs.store_sha256) != job.needs.store_sha256:
        raise ChangedError("the store has changed since the sweep began", job.needs.store, RUN_AGAIN)


def _limit(each: Experiment) -> float | None:
    """Return the most seconds of a worker: one that runs a rival ends the rival at the limit, with all it started."""
    return each.timeout if each.timeout is None or each.rival is None else each.timeout + _RIVAL_SECONDS


def git_state() -> dict[str, Any] | None:
    """Return the commit of the working folder and the number of changed files; None outside a repository."""
    found = []
    for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            done = subprocess.run(("git", *words), capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        found.append(done.stdout)
    return {"commit": found[0].strip(), "changed_files": len(found[1].splitlines())}


@contextlib.contextmanager
def open_pool(settings: SweepSettings, make: Callable[[], Pool] | None) -> Iterator[Pool]:
    """Context manager of a pool: of local processes, or the one that `make` returns."""
    pool = LocalPool(settings.num_jobs) if make is None else make()
    try:
        yield pool
    finally:
        pool.close()


def sweep(
    experiments: Sequence[Experiment], folder: Path, settings: SweepSettings, log: Log, progress: Progress,
    make_pool: Callable[[], Pool] | None = None, watch: Watch = lambda record, name: None,
) -> Plan:  # fmt: skip
    """Run the jobs of experiments that have no record in a results folder; return what was planned.

    Raises the errors of the models and data, of `Results`, and DiskFullError.
    """
    with Results(folder, log) as results, open_pool(settings, make_pool) as pool:
        results.records = without(results.records, settings.retry)
        plan = plan_sweep(experiments, folder, results.records, settings, log)
        for each in plan.elsewhere:
            log(f"{each.model}: needs the device {each.device}, and is not run here")
        Runner(results, pool, settings, log, progress, watch).run(plan)
    return plan


def search(
    study: Study, folder: Path, settings: SweepSettings, log: Log, progress: Progress,
    make_pool: Callable[[], Pool] | None = None, watch: Watch = lambda record, name: None,
) -> Plan:  # fmt: skip
    """Run the trials of a search, each when those before have records; return what was run.

    Raises what `sweep` raises.
    """
    with Results(folder, log) as results, open_pool(settings, make_pool) as pool:
        results.records = without(results.records, settings.retry)
        found, elsewhere = jobs_of(list(study.search), folder, settings, log)
        jobs, whole = {job.experiment: job for job in found}, Plan([], [], 0, elsewhere)
        runner = Runner(results, pool, settings, log, lambda done, total, line: None, watch)
        runner.names = names_of(list(jobs))
        for number, each in enumerate(study, 1):
            if each not in jobs:
                study.tell(each, ())
                continue
            left = None if settings.limit is None else settings.limit - len(whole.jobs)
            plan = plan_jobs([jobs[each]], results.records, left)
            runner.progress = lambda done, total, line, number=number: progress(
                number - (done < total), len(study), f"trial {number}: {line}"
            )
            if plan.jobs:
                runner.run(plan)
            whole.jobs += plan.jobs
            whole.num_recorded += plan.num_recorded
            whole.num_limited += plan.num_limited
            whole.failed += plan.failed
            whole.failed_before += plan.failed_before
            if plan.num_limited:
                break
            study.tell(each, [record for record in results.records if record["key"] == jobs[each].key])
    return whole

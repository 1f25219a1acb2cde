"""Run the experiments of a recipe, each round in a process of its own, and add their records to a results folder.

offramp sweep recipes/budgets.py --out results
offramp sweep recipes/budgets.py --out results --only exit=none --limit 10 --dry-run

What has a record is not run again: after an interruption, the same command continues. Failures are records, too:
--retry killed,timeout runs those of these kinds again. A recipe is a Python file with a function recipe() that returns
a Grid: it is code, and it is run. A results folder is also a recipe: of the experiments that it has records of, which
are measured again into another folder.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from offramp.cli.options import argument, count, emit, log, table_of, warn
from offramp.errors import UsageError, escaped
from offramp.units import format_duration


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of sweep."""
    add = parser.add_argument
    add("recipe", help="a Python file with a function recipe(), or a results folder")
    add("--out", required=True, metavar="DIR", help="the results folder, new or one to continue")
    add("--only", action="append", default=[], metavar="NAME=VALUE[,VALUE...]", help="run these experiments only")
    add("--limit", type=count, metavar="N", help="run at most N jobs")
    add("--dry-run", action="store_true", help="print what would run, and how long, and run nothing")
    jobs = "run up to N untimed jobs (training, division) at once (default: 1)"
    add("--jobs", type=count, default=1, metavar="N", help=jobs)
    add("--share-cores", action="store_true", help="also run timed jobs N at once: they slow each other down")
    add("--scheduler", metavar="ADDRESS", help="a dask scheduler: tcp://localhost:8786, or tls://HOST:8786")
    retry = "run again what failed in these ways: killed, timeout, memory, refused, absent, error"
    add("--retry", type=argument(_parse_kinds), default=(), metavar="KIND[,KIND...]", help=retry)
    add("--device", metavar="NAME", help="name of this machine, for experiments with a device (default: the host's)")
    rival = "a Python that runs a rival (default: this one)"
    add("--rival", type=argument(_parse_rival), action="append", default=[], metavar="NAME=PYTHON", help=rival)
    track = "also give each record to a tracker, through accelerate: trackio, tensorboard, mlflow or wandb"
    add("--track", choices=("trackio", "tensorboard", "mlflow", "wandb"), metavar="NAME", help=track)
    add("--json", action="store_true", help="print one JSON object at the end")


def _parse_rival(text: str) -> Any:
    from offramp.experiments.rivals import parse_against

    if "=" not in text:
        raise ValueError(f"{text!r} is not NAME=PYTHON")
    return parse_against(text)


def _parse_kinds(text: str) -> tuple[str, ...]:
    from offramp.experiments.pools import RECORDED

    kinds = tuple(text.split(","))
    unknown = next((kind for kind in kinds if kind not in RECORDED), None)
    if unknown is not None:
        raise ValueError(f"unknown kind of failure {unknown!r}; known: {', '.join(RECORDED)}")
    return kinds


def main(args: argparse.Namespace) -> None:
    """Plan, and unless that is all, run."""
    from offramp.experiments.grid import Search, read_recipe
    from offramp.experiments.sweep import SweepSettings

    found = read_recipe(Path(args.recipe), args.only)
    pythons = {each.name: each.python for chosen in args.rival for each in chosen}
    settings = SweepSettings(args.jobs, args.share_cores, args.limit, args.device, pythons, args.retry)
    _require_installed(found, args)
    if args.scheduler is not None:
        from offramp.experiments.scheduled import require_unplaced

        require_unplaced(args.scheduler, list(found))
    if args.dry_run:
        _show_plan(list(found), Path(args.out), settings, args.json)
        if isinstance(found, Search) and not args.json:
            print(f"a search: at most {found.trials} of these experiments are run, each chosen by those before")
        return
    plan, front = _run(found, args, settings)
    facts = {"out": args.out, "jobs": len(plan.jobs), "recorded_before": plan.num_recorded, "left": plan.num_limited}
    facts |= {"failed": len(plan.failed), "failed_before": len(plan.failed_before)}
    if args.json:
        _warn_of_failures(plan, args.out)
        emit({**facts, **({"front": front} if front is not None else {})})
        return
    failed, before = (f", {len(each)} failed" if each else "" for each in (plan.failed, plan.failed_before))
    left = f", {plan.num_limited} are left" if plan.num_limited else ""
    log(f"{args.out}: {len(plan.jobs)} jobs have run{failed}; {plan.num_recorded} were recorded before{before}{left}")
    _warn_of_failures(plan, args.out)
    if front is not None:
        from offramp.experiments.comparison import FIGURES

        names = list(front[0]["objectives"]) if front else []
        columns = {"Pareto front": lambda row: row["experiment"]}
        columns |= {name: lambda row, name=name: FIGURES[name].show(row["objectives"][name]) for name in names}
        print(table_of(front, columns))


def _warn_of_failures(plan: Any, out: str) -> None:
    """Warn of jobs that failed, in this sweep or before: they are not run again unless that is asked for."""
    failed = [*plan.failed_before, *plan.failed]
    if not failed:
        return
    reasons = Counter((record["reason"]["what"], record["reason"]["remedy"]) for record in failed)
    (what, remedy), *others = [reason for reason, _ in reasons.most_common()]
    reason = f"{what} ({remedy})" if remedy else what
    kinds = ",".join(sorted({str(record["reason"].get("kind")) for record in failed}))
    warn(
        f"{len(failed)} of {len(plan.jobs) + plan.num_recorded} jobs failed: {reason}"
        f"{', among other reasons' if others else ''} - {out} - "
        f"correct the cause and give --retry {kinds}: failures are records, and are not run again without it"
    )


def _require_installed(found: Any, args: argparse.Namespace) -> None:
    """Raise UsageError where a library that a search or a tracker needs is not installed."""
    from offramp.experiments.grid import Search

    if isinstance(found, Search):
        from offramp.experiments.searching import require_optuna

        require_optuna()
    if args.track is not None:
        from offramp.experiments.tracking import require_tracker

        require_tracker(args.track)


def _run(found: Any, args: argparse.Namespace, settings: Any) -> tuple[Any, Any]:
    """Run experiments or a search; return the plan, and for a search the experiments that no other one surpasses."""
    from offramp.experiments.grid import Search
    from offramp.experiments.scheduled import ScheduledPool
    from offramp.experiments.specification import names_of
    from offramp.experiments.sweep import search, sweep

    make_pool, out = None, Path(args.out)
    if args.scheduler is not None:
        make_pool = lambda: ScheduledPool(args.scheduler)  # noqa: E731
    with ExitStack() as stack:
        watch = {}
        if args.track is not None:
            from offramp.experiments.tracking import Tracking

            watch["watch"] = stack.enter_context(Tracking(args.track, out, log)).add
        progress = stack.enter_context(_progress())
        if not isinstance(found, Search):
            return sweep(found, out, settings, log, progress, make_pool, **watch), None
        from offramp.experiments.searching import Study

        study = Study(found)
        plan = search(study, out, settings, log, progress, make_pool, **watch)
        front, names = study.front(), names_of(list(found))
        return plan, [
            {"experiment": names[each], "objectives": dict(zip(found.objectives, values, strict=True))}
            for each, values in front.items()
        ]


def _show_plan(experiments: list[Any], folder: Path, settings: Any, as_json: bool) -> None:
    from offramp.experiments.results import ABOUT, read_records
    from offramp.experiments.specification import names_of
    from offramp.experiments.sweep import estimated_seconds, plan_sweep, without

    if folder.exists() and not folder.is_dir():
        raise UsageError("not a folder", folder, "name a new folder with --out")
    records = read_records(folder, log) if (folder / ABOUT).exists() else []
    records = without(records, settings.retry)
    plan = plan_sweep(experiments, folder, records, settings, log)
    seconds = estimated_seconds(plan, records)
    if as_json:
        steps = [step.name for step in plan.steps]
        emit({"make": steps, "jobs": [job.id for job in plan.jobs], "seconds": seconds})
        return
    if plan.steps:
        columns = {"to make first": lambda step: step.name, "model": lambda step: step.model}
        columns["data"] = lambda step: step.data or "-"
        print(table_of(plan.steps, columns) + "\n")
    rounds = Counter(job.key for job in plan.jobs)
    firsts = {job.key: job.experiment for job in plan.jobs}
    names = names_of(list(firsts.values()))
    columns = {"experiment": lambda key: names[firsts[key]], "key": str, "rounds": lambda key: rounds[key]}
    print(table_of(rounds, columns))
    duration = "no records to estimate the time from" if seconds is None else f"about {format_duration(seconds)}"
    if plan.steps and seconds is not None:
        duration += f" without what is to make first ({len(plan.steps)})"
    print(f"\n{len(plan.jobs)} jobs to run, {duration}; {plan.num_recorded} are recorded")
    for each in plan.elsewhere:
        print(f"not here: {each.model} needs the device {each.device}")


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """Context manager of a function that shows how far the sweep is: a bar on a terminal, lines otherwise."""
    began = time.monotonic()

    def left_of(num_done: int, num_all: int) -> str:
        nonlocal began
        if num_done == 0:  # what is needed first has been made
            began = time.monotonic()
            return "?"
        return format_duration((time.monotonic() - began) / num_done * (num_all - num_done))

    def show(num_done: int, num_all: int, line: str) -> None:
        left = f", {left_of(num_done, num_all)} left" if num_done < num_all else ""
        log(f"{num_done}/{num_all}{left}: {line}")

    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield show
        return
    if not sys.stderr.isatty():
        yield show
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("sweep", total=None)

        def advance(num_done: int, num_all: int, line: str) -> None:
            left = left_of(num_done, num_all) + " left"
            bar.update(task, completed=num_done, total=num_all, description=left, refresh=True)
            bar.console.print(escaped(line), markup=False, highlight=False)

        yield advance

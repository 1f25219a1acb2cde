"""Measure offramp's main job against its rivals and write the report: `python bench/main_job.py --out bench-out`.

Every measurement is a process of its own and one line in OUT/main-job.jsonl, added when it is done. A line that is
there is not measured again, so a run that was killed goes on where it was; begin with another OUT after a change of
code. In a round each rival runs once, in order, so that what disturbs the machine disturbs them alike.

`--against COMMIT` compares this checkout with another commit instead of with rivals; `against.py` says how.
"""

import argparse
import datetime as dt
import signal
import sys
from pathlib import Path
from typing import Any

import against
import report
from folders import Folders
from records import add_record, read_records
from sections import SECTIONS, Section, Trial

ROUNDS = 5
MAX_UNFINISHED = 2
"""A rival that ran into its time limit this often is not tried again."""


class Ledger:
    """The records on disk, one JSON line each, in the order in which they were made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = read_records(path)

    def of(self, section: Section, trial: Trial) -> list[dict[str, Any]]:
        """Records of one rival with these settings; failures only where there is nothing else."""
        wanted = section.name, trial.rival, trial.settings
        found = [each for each in self.records if (each["section"], each["rival"], each["settings"]) == wanted]
        return [each for each in found if "failed" not in each["result"]] or found[-1:]

    def add(self, section: Section, trial: Trial, number: int, result: dict[str, Any]) -> None:
        now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        key = {"section": section.name, "rival": trial.rival, "round": number, "settings": trial.settings}
        record = {**key, "finished": now, "result": result}
        self.records.append(record)
        add_record(self.path, record)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def is_due(ledger: Ledger, section: Section, trial: Trial, number: int) -> bool:
    """Whether this round of the rival is still to be measured."""
    found = [record for record in ledger.of(section, trial) if "failed" not in record["result"]]
    num_unfinished = sum("unfinished" in record["result"] for record in found)
    return num_unfinished < MAX_UNFINISHED and all(record["round"] != number for record in found)


def measure(section: Section, folders: Folders, ledger: Ledger, rounds: int) -> None:
    """Run what is missing of a section, round by round."""
    trials, rounds, ready = section.trials(folders), section.rounds or rounds, False
    for number in range(rounds):
        for trial in trials:
            if not is_due(ledger, section, trial, number):
                continue
            if not ready:
                section.prepare(folders)
                ready = True
            result = trial.measure()
            ledger.add(section, trial, number, result)
            trouble = result.get("failed") or result.get("unfinished")
            say(f"{section.name} {number + 1}/{rounds}: {trial.rival}{f': {trouble}' if trouble else ''}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    sections, settings = ([each.name for each in group] for group in (SECTIONS, against.SETTINGS))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="models, stores and records; several GB")
    parser.add_argument("--rounds", type=int, help=f"processes of each rival (default: {ROUNDS}, or {against.ROUNDS})")
    parser.add_argument("--only", help=f"sections, of {','.join(sections)}; with --against of {','.join(settings)}")
    parser.add_argument("--against", metavar="COMMIT", help="compare this checkout with a commit")
    parser.add_argument("--report", type=Path, help="the page (default: main-job.md, or redesign.md, in docs/results)")
    args = parser.parse_args(argv)
    names = settings if args.against else sections
    args.only = args.only.split(",") if args.only else names
    args.rounds = args.rounds or (against.ROUNDS if args.against else ROUNDS)
    args.report = args.report or Path("docs/results") / ("redesign.md" if args.against else "main-job.md")
    if unknown := set(args.only) - set(names):
        parser.error(f"not one of {','.join(names)}: {', '.join(sorted(unknown))}")
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is running ends and its groups vanish
    if args.against:
        return against.compare(args.against, args.out, args.rounds, args.only, args.report)
    folders = Folders(args.out.resolve())
    folders.build(say)
    ledger = Ledger(folders.out / "main-job.jsonl")
    missing = {section.name: section.missing(folders.out) for section in SECTIONS}
    for section in SECTIONS:
        if section.name not in args.only:
            continue
        if missing[section.name]:
            say(f"{section.name}: skipped: {missing[section.name]}")
        else:
            measure(section, folders, ledger, args.rounds)
    found = {
        section.name: {trial.rival: ledger.of(section, trial) for trial in section.trials(folders)}
        for section in SECTIONS
    }
    only = "" if len(args.only) == len(SECTIONS) else f" --only {','.join(args.only)}"
    command = f"python bench/main_job.py --out {args.out} --rounds {args.rounds}{only}"
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(report.write(found, missing, folders.out, command))
    say(f"report: {args.report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

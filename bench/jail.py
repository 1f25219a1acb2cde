"""A stand-in for a small board: memory and disk-read limits by cgroups (version 1), for the processes that are put in.

The memory limit counts the page cache that the processes cause, too. Needs root. The groups vanish with the `with`
block, and what still runs in them then is killed.

`python bench/jail.py --out OUT --records FILE`: how long BERT-base takes from a disk of 100 MB/s, as fp32, fp16 and
int8 and by llama.cpp in Q8_0. OUT is that of rivals_page.py. Each run is a process that starts from a cold page cache:
the time from its start to the first answer, and the median of the passes that follow it, back to back.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folders import THREADS, TOKENS, Folders, evict, words
from processes import failure, offramp, run
from records import add_record, read_records

import offramp as project
from offramp.experiments.groups import DROP_CACHES, MemoryGroup, group
from offramp.experiments.rivals import SCRIPT, Chosen, model_digest, prepared
from offramp.measure import median

MEMORY = Path("/sys/fs/cgroup/memory")
DISK = Path("/sys/fs/cgroup/blkio")
READ_BYTES_PER_SECOND = 100_000_000
STORES = {"fp32": "store", "fp16": "store-fp16", "int8": "store-int8"}
RIVAL = "q8_0 of llama.cpp"
PLACES = ((128, "auto"), (None, None), (128, "96MiB"), (96, "auto"))
"""Limit of the memory group in MiB (None: no limit), and budget of offramp."""
MOST_SECONDS = 120.0
_TIMED = """import json, sys, time
from pathlib import Path
job = json.loads(sys.argv[1])
def read_bytes():
    return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])
def timed(run):
    ends, disk = [job["began"]], [0]
    for each in job["inputs"]:
        run(each)
        ends.append(time.monotonic())
        disk.append(read_bytes())
    ends, disk = ([after - before for before, after in zip(all, all[1:])] for all in (ends, disk))
    print(json.dumps({"first_seconds": ends[0], "first_bytes": disk[0], "seconds": ends[1:], "bytes": disk[1:]}))
"""
_OFFRAMP = """import offramp
options = {"threads": job["threads"], "max_length": job["tokens"], "own_process": True}
with offramp.load(job["store"], budget=job["budget"], **options) as classifier:
    timed(lambda text: classifier.predict([text]))
"""
_LLAMA = """from runpy import run_path
run, _ = run_path(job["script"])["llama_cpp"](job)
timed(lambda row: run(*row))
"""


def missing(folder: Path, *, disk: bool = False) -> str | None:
    """What keeps a jail from being built here, or None; `disk`: for one that limits reads of `folder`."""
    if os.geteuid() != 0:
        return "needs root"
    if not (MEMORY / "memory.limit_in_bytes").exists():
        return "needs cgroup v1 with the memory controller"
    if not os.access(DROP_CACHES, os.W_OK):
        return "may not drop the page cache"
    if disk and not (DISK / "blkio.throttle.read_bps_device").exists():
        return "needs cgroup v1 with the blkio controller"
    if disk and disk_of(folder) is None:
        return "the folder lies on no disk of its own"
    return None


def disk_of(path: Path) -> str | None:
    """MAJOR:MINOR of the whole disk below `path`, which alone can be throttled; None where there is none."""
    device = path.stat().st_dev
    node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not node.exists():
        return None
    node = node.resolve()
    return ((node.parent if (node / "partition").exists() else node) / "dev").read_text().strip()


@dataclass(frozen=True)
class Jail:
    """Groups that a command can be started in."""

    groups: tuple[Path, ...]

    def around(self, command: Sequence[str]) -> list[str]:
        """The command that enters the groups and then becomes `command`."""
        script = 'n=$1; shift; while [ "$n" -gt 0 ]; do echo $$ > "$1"; shift; n=$((n - 1)); done; exec "$@"'
        doors = [str(each / "cgroup.procs") for each in self.groups]
        return ["/bin/sh", "-c", script, "jail", str(len(doors)), *doors, *command]

    def usage(self) -> dict[str, int | None]:
        """The most memory that was charged so far, page cache included, and how often the limit was hit."""
        found = MemoryGroup(next(each for each in self.groups if MEMORY in each.parents), True).usage()
        return {"charged_peak_bytes": found["charged_peak_bytes"], "failcnt": found["hits"]}


@contextlib.contextmanager
def jail(
    *, memory_bytes: int | None = None, read_bytes_per_second: int | None = None, folder: Path | None = None
) -> Iterator[Jail]:
    """A jail with one or both limits; `folder` lies on the disk whose reads are limited."""
    with contextlib.ExitStack() as stack:
        groups = []
        if memory_bytes is not None:
            groups.append(stack.enter_context(group(MEMORY)))
            MemoryGroup(groups[-1], True).limit(memory_bytes)
        if read_bytes_per_second is not None:
            if folder is None:
                raise ValueError("a limit of reads needs a folder that tells the disk")
            groups.append(stack.enter_context(group(DISK)))
            limit = f"{disk_of(folder)} {read_bytes_per_second}"
            (groups[-1] / "blkio.throttle.read_bps_device").write_text(limit)
        yield Jail(tuple(groups))


class SlowDisk:
    """Runs from a slow disk, recorded one by one."""

    def __init__(self, folders: Folders, records: Path, passes: int) -> None:
        self._folders, self._records, self._passes = folders, records, passes
        model, self._llama = folders.models / "bert-base", folders.out / "venvs" / "llama.cpp" / "bin" / "python"
        os.environ.update(folders.environment)
        form = prepared(Chosen("llama.cpp", str(self._llama)), model, model_digest(model), print)
        assert isinstance(form, Path), form
        self._form, self._words = form, (model / "vocab.txt").read_text().split("\n")
        if not (folders.out / STORES["fp16"]).exists():
            run(offramp("divide", model, folders.out / STORES["fp16"], "--dtype", "fp16"), {})

    def run(self, what: str, group_mib: int | None, budget: str | None, round_: int) -> None:
        """Run one setting, unless it is recorded."""
        key = {"run": what, "group_mib": group_mib, "budget": budget, "round": round_}
        if any(key.items() <= record.items() for record in read_records(self._records)):
            return
        texts = [words(TOKENS - 2, number) for number in range(1 + self._passes)]
        job: dict[str, Any] = {"threads": THREADS, "tokens": TOKENS, "budget": budget, "inputs": texts}
        if what == RIVAL:
            ids = [[self._words.index(word) for word in f"[CLS] {text} [SEP]".split()] for text in texts]
            job |= {"script": str(SCRIPT), "prepared": str(self._form), "inputs": [(row, [0] * TOKENS) for row in ids]}
            python, script, read = self._llama, _LLAMA, (self._form, self._llama.parents[1].resolve())
        else:
            job["store"] = str(self._folders.out / STORES[what])
            python, script, read = Path(sys.executable), _OFFRAMP, (Path(job["store"]).resolve(), Path(sys.prefix))
        evict(*read, Path(project.__file__).parents[1])
        memory_bytes = None if group_mib is None else group_mib << 20
        disk = {"read_bytes_per_second": READ_BYTES_PER_SECOND, "folder": self._folders.out}
        with jail(memory_bytes=memory_bytes, **disk) as cell:
            job["began"] = time.monotonic()
            done = run(cell.around([str(python), "-c", _TIMED + script, json.dumps(job)]), {}, MOST_SECONDS)
        reason = failure(done)
        found = {"failed": reason} if reason else json.loads(done.lines[-1][1])
        add_record(self._records, {**key, **found, "peak_bytes": done.peak_rss_bytes, "load": os.getloadavg()[0]})
        print(json.dumps({**key, **found}), file=sys.stderr, flush=True)


def show(records: list[dict[str, Any]]) -> None:
    """Print a table: medians, and ratios to fp32 of the same place within rounds."""
    print(
        "| group | budget | run | first answer | of fp32 | pass | of fp32 | read a pass | peak |\n" + "|---" * 9 + "|"
    )
    for (group_mib, budget), what in itertools.product(PLACES, (*STORES, RIVAL)):
        place = {"group_mib": group_mib, "budget": budget}
        here = [each for each in records if place.items() <= each.items()]
        own = {each["round"]: each for each in here if each["run"] == what}
        if not own:
            continue
        cells = [f"{group_mib} MiB" if group_mib else "none", budget if budget and what != RIVAL else "-", what]
        ended = {number: each for number, each in own.items() if "failed" not in each}
        if not ended:
            print("| " + " | ".join([*cells, next(iter(own.values()))["failed"]]) + " |")
            continue
        base = {each["round"]: each for each in here if each["run"] == "fp32" and "failed" not in each}
        for value in (lambda each: each["first_seconds"], lambda each: median(each["seconds"])):
            ratios = [value(each) / value(base[number]) for number, each in ended.items() if number in base]
            cells.append(f"{median([value(each) for each in ended.values()]):.2f} s")
            cells.append(f"{median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-")
        cells.append(f"{median([median(each['bytes']) for each in ended.values()]) / 1e6:.1f} MB")
        cells.append(f"{max(each['peak_bytes'] for each in ended.values()) / (1 << 20):.1f} MiB")
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Run what is not recorded yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--places", type=int, default=len(PLACES), help="how many of the groups and budgets")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after this time")
    args, began = parser.parse_args(), time.monotonic()
    reason = missing(args.out, disk=True)
    if reason is not None:
        sys.exit(f"jail.py: {reason}")
    slow = SlowDisk(Folders(args.out), args.records, args.passes)
    runs = itertools.product(range(args.rounds), PLACES[: args.places], (*STORES, RIVAL))
    for number, (group_mib, budget), what in runs:
        if (what != RIVAL or budget != "96MiB") and time.monotonic() - began < args.seconds:
            slow.run(what, group_mib, budget, number)
    show(read_records(args.records))


if __name__ == "__main__":
    main()

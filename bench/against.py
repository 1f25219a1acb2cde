"""Compare this checkout with another commit on the main job: `python bench/main_job.py --out OUT --against COMMIT`.

Each side divides its own stores from the same random models and runs with its own `PYTHONPATH`. Before the first round
the pages of all stores are dropped from the page cache and read back: a freshly written store was streamed 8 % faster
than the same store read back. In a round each setting is measured once a side, each in a process of its own, and the
side that goes first alternates. Records are JSON lines in OUT; rounds that exist are not measured again.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from figures import mib, table
from folders import Folders
from processes import failure, json_result, offramp, rival, run
from records import add_record, read_records

ROOT = Path(__file__).resolve().parents[1]
ONE_RUN = Path(__file__).with_name("one_run.py")
ROUNDS = 40
LATENCY_LIMIT, LATENCY_BOUND, NARROW = 1.02, 1.05, 0.03
"""Largest ratio of latencies (estimate, upper 95 % bound), and the width of an interval that settles an estimate."""
PEAK_LIMIT_BYTES, START_LIMIT_SECONDS = 1 << 20, 0.030
NUM_DRAWS = 10_000
MODELS = {"store": "bert-base", "store-exits": "bert-base-exits"}
HEADING = "## Main job against the code before"

Say = Callable[[str], None]
Result = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One way to run the main job; `exit` is a rule under which rows leave early."""

    name: str
    budget: str
    batch: int = 1
    exit: str = "none"
    store: str = "store"
    passes: int = 8

    def words(self) -> list[str]:
        """Return the options of one_run.py."""
        words = ("--budget", self.budget, "--batch", self.batch, "--exit", self.exit, "--passes", self.passes)
        return [str(word) for word in words]


SETTINGS = (
    Setting("resident", "1GiB"),
    Setting("192MiB", "192MiB"),
    Setting("128MiB", "128MiB"),
    Setting("96MiB", "96MiB"),
    Setting("batch-8", "192MiB", batch=8, passes=4),
    Setting("exits", "128MiB", exit="patience:4|stage:8", store="store-exits"),
)


@dataclass(frozen=True)
class Side:
    """One of the two versions of the code: `new` is this checkout, `old` is the commit it is compared with."""

    name: str
    version: str
    """Commit, and a digest of the changes that are not committed."""
    source: Path
    """Folder for PYTHONPATH."""
    folders: Folders

    @property
    def place(self) -> Path:
        """Folder of the stores and the cache of this side."""
        return self.folders.out / "against" / f"{self.name}-{self.version}"

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of every process of this side."""
        own = {"PYTHONPATH": str(self.source), "OFFRAMP_CACHE": str(self.place / "cache"), "PYTHONWARNINGS": "ignore"}
        return {**self.folders.environment, **own}

    def store(self, name: str) -> Path:
        return self.place / name

    def divide(self) -> None:
        """Divide the models that have no store yet, and let a first run verify and remember every file."""
        for name, model in MODELS.items():
            if self.store(name).exists():
                continue
            done = run(offramp("divide", self.folders.models / model, self.store(name)), self.environment)
            if reason := failure(done):
                raise SystemExit(f"divide {model} ({self.name}): {reason}\n{done.errors}")

    def measure(self, setting: Setting) -> Result:
        """Run one process. Returns what it printed, or `{"failed": reason}`."""
        command = [sys.executable, str(ONE_RUN), str(self.store(setting.store)), *setting.words()]
        result = json_result([*command, "--began", repr(time.monotonic())], self.environment)
        if "code" in result and Path(result.pop("code")) != self.source:
            raise SystemExit(f"{self.name} did not run the code of {self.source}")
        return result


def sides_of(commit: str, folders: Folders) -> dict[str, Side]:
    """Return both sides; the source of `commit` is unpacked under OUT."""
    sha, head = git("rev-parse", "--short=12", f"{commit}^{{commit}}"), git("rev-parse", "--short=12", "HEAD")
    source = folders.out / "against" / f"source-{sha}"
    if not source.exists():
        partial = source.with_name(source.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        archive = subprocess.run(("git", "archive", sha, "src"), cwd=ROOT, check=True, stdout=subprocess.PIPE)
        subprocess.run(("tar", "-x", "-C", partial), input=archive.stdout, check=True)
        partial.rename(source)
    changes = subprocess.run(("git", "diff", "HEAD", "--", "src"), cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    version = f"{head}-{hashlib.sha256(changes).hexdigest()[:8]}" if changes else head
    new, old = Side("new", version, ROOT / "src", folders), Side("old", sha, source / "src", folders)
    return {"old": old, "new": new}


def git(*words: str) -> str:
    """Return what git prints of this checkout, without the line end."""
    return subprocess.run(("git", *words), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def prepare(sides: dict[str, Side], say: Say) -> None:
    """Build models and stores of both sides, and read the stores back into the page cache."""
    folders = sides["new"].folders
    folders.models.mkdir(parents=True, exist_ok=True)
    for stale in set((folders.out / "against").glob("new-*")) - {sides["new"].place}:
        if stale.is_dir():
            shutil.rmtree(stale)  # a store of earlier code takes 0.9 GB
    say("models and stores")
    if reason := failure(run(rival("build", folders.models), folders.environment)):
        raise SystemExit(f"building the models: {reason}")
    for side in sides.values():
        side.divide()
    say("page cache: drop, read back, verify")
    os.sync()
    for side in sides.values():
        for path in side.place.rglob("*"):
            drop_pages(path)
    folders.warm(*(side.store(name) for side in sides.values() for name in MODELS))
    for side in sides.values():
        for name in MODELS:
            side.measure(Setting("verify", "1GiB", store=name, passes=1))


def drop_pages(path: Path) -> None:
    """Drop the pages of a file from the page cache. Pages must have been written to disk."""
    if path.is_file():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(sides: dict[str, Side], settings: Sequence[Setting], rounds: int, path: Path, say: Say) -> None:
    """Add what is missing to the records: every setting on both sides, round by round."""
    known = {(each["setting"], each["side"], each["round"]) for each in read_records(path)}
    missing = [
        (number, setting, side)
        for number in range(rounds)
        for setting in settings
        for side in (("old", "new") if number % 2 == 0 else ("new", "old"))
        if (setting.name, side, number) not in known
    ]
    if missing:
        prepare(sides, say)
    for number, setting, side in missing:
        result = sides[side].measure(setting)
        add_record(path, {"setting": setting.name, "side": side, "round": number, "result": result})
        shown = result.get("failed") or f"{1e3 * float(np.median(result['latency_seconds'])):.1f} ms"
        say(f"round {number + 1}/{rounds} {setting.name} {side}: {shown}")


@dataclass(frozen=True)
class Estimate:
    """The median of paired values, one a round, with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Estimate by the percentile bootstrap over rounds, from a fixed seed."""
        values_R = np.asarray(values)
        drawn_DR = np.random.default_rng(0).choice(values_R, (NUM_DRAWS, len(values_R)))
        low, high = np.percentile(np.median(drawn_DR, axis=1), [2.5, 97.5])
        return cls(float(np.median(values_R)), float(low), float(high))

    def shown(self, unit: str, digits: int, scale: float = 1.0) -> str:
        value, low, high = (f"{scale * each:.{digits}f}" for each in (self.value, self.low, self.high))
        return f"{value}{unit} [{low}, {high}]"


def latency_verdict(ratio: Estimate) -> str:
    """Return `holds`, `fails` or `inconclusive` for a ratio of latencies, new / old."""
    if ratio.value <= LATENCY_LIMIT and ratio.high <= LATENCY_BOUND:
        return "holds"
    is_settled = ratio.high - ratio.low <= NARROW
    return "**fails**" if ratio.low > LATENCY_LIMIT or (ratio.value > LATENCY_LIMIT and is_settled) else "inconclusive"


def limit_verdict(difference: Estimate, limit: float) -> str:
    """Return `holds`, `fails` or `inconclusive` for a difference with an upper limit."""
    if difference.value <= limit:
        return "holds"
    return "**fails**" if difference.low > limit else "inconclusive"


def paired(records: Sequence[dict[str, Any]], setting: Setting) -> list[tuple[Result, Result]]:
    """Return the (old, new) results of the rounds in which both sides succeeded."""
    found = {(each["side"], each["round"]): each["result"] for each in records if each["setting"] == setting.name}
    good = {key: result for key, result in found.items() if "failed" not in result}
    rounds = sorted({number for _, number in good})
    return [(good["old", n], good["new", n]) for n in rounds if ("old", n) in good and ("new", n) in good]


def row_of(records: Sequence[dict[str, Any]], setting: Setting) -> tuple[str, ...]:
    """Return one line of the table, or why there is none."""
    pairs = paired(records, setting)
    failed = [
        each["result"]["failed"] for each in records if each["setting"] == setting.name and "failed" in each["result"]
    ]
    if not pairs:
        return (setting.name, "0", f"**{failed[-1]}**" if failed else "not measured")
    latency = [[float(np.median(result["latency_seconds"])) for result in pair] for pair in pairs]
    ratio = Estimate.of([new / old for old, new in latency])
    peak = Estimate.of([new["peak_bytes"] - old["peak_bytes"] for old, new in pairs])
    starts = {
        key: Estimate.of([new[key] - old[key] for old, new in pairs]) for key in ("ready_seconds", "first_seconds")
    }
    same = all(old["answers"] == new["answers"] for old, new in pairs)
    return (
        setting.name,
        f"{len(pairs)}" + (f" ({len(failed)} failed)" if failed else ""),
        " / ".join(f"{1e3 * float(np.median(side)):.1f}" for side in zip(*latency, strict=True)),
        f"{ratio.shown('', 3)}: {latency_verdict(ratio)}",
        f"{peak.shown('', 2, 2**-20)}: {limit_verdict(peak, PEAK_LIMIT_BYTES)}",
        *(f"{each.shown('', 1, 1e3)}: {limit_verdict(each, START_LIMIT_SECONDS)}" for each in starts.values()),
        "equal" if same else "**differ**",
    )


HEAD = (
    "setting", "rounds", "latency old / new (ms)", "latency new / old [95 % CI]", "peak difference (MiB)",
    "start to ready, difference (ms)", "start to first answer, difference (ms)", "answers",
)  # fmt: skip


def section(
    records: Sequence[dict[str, Any]], sides: dict[str, Side], settings: Sequence[Setting], command: str
) -> str:
    """Return the section of the report."""
    from offramp.measure.hardware import environment

    facts = environment(sides["new"].folders.out)
    versions = {"python": facts["python_version"], **facts["library_versions"]}
    described = [
        f"{each.name}: {', '.join(f'{k} {v}' for k, v in asdict(each).items() if k != 'name')}" for each in settings
    ]
    lines = [
        HEADING,
        "",
        f"- command: `{command}`",
        f"- old: commit {sides['old'].version}; new: commit {sides['new'].version}"
        " (a second part is the digest of changes that are not committed)",
        f"- machine: {facts['cpu_model']}, {facts['num_cores']} cores, {mib(facts['total_memory_bytes'])} of memory,"
        f" {facts['storage']['file_system']}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}",
        f"- settings: {'; '.join(described)}",
        "",
        "A classifier of BERT-base's shape with random weights, 128 tokens, 2 threads, warm page cache. Each row is one"
        " setting; each round is one process a side, and latency is the median of its passes. Estimates are medians of"
        " per-round ratios or differences (new against old) with 95 % bootstrap intervals over rounds.",
        f"Latency holds if the estimate is at most {LATENCY_LIMIT} and its upper bound at most {LATENCY_BOUND}; peak if"
        f" its difference is at most {PEAK_LIMIT_BYTES >> 20} MiB; start if its difference is at most"
        f" {1e3 * START_LIMIT_SECONDS:.0f} ms.",
        "",
        *table(HEAD, [row_of(records, setting) for setting in settings]),
    ]
    return "\n".join(lines) + "\n"


def put_section(page: Path, text: str) -> None:
    """Replace the section of a page that begins with HEADING and ends at the next heading, or append it."""
    before, _, after = (page.read_text() if page.exists() else "").partition(HEADING)
    _, mark, rest = after.partition("\n## ")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text((before.rstrip() + "\n\n" if before.strip() else "") + text + (f"{mark}{rest}" if mark else ""))


def compare(commit: str, out: Path, rounds: int, only: Sequence[str], report: Path) -> int:
    """Measure what is missing, write the report, and return 1 if anything fails, else 0."""

    def say(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    folders = Folders(out.resolve())
    settings = [setting for setting in SETTINGS if setting.name in only]
    sides = sides_of(commit, folders)
    records = folders.out / "against" / f"{sides['old'].version}-{sides['new'].version}.jsonl"
    measure(sides, settings, rounds, records, say)
    selection = f" --only {','.join(only)}" if len(settings) < len(SETTINGS) else ""
    command = f"python bench/main_job.py --out {out} --against {commit} --rounds {rounds}{selection}"
    found = read_records(records)
    measured = {record["setting"] for record in found}
    text = section(found, sides, [setting for setting in SETTINGS if setting.name in measured], command)
    put_section(report, text)
    print(text)
    say(f"report: {report}")
    return int("**" in text)

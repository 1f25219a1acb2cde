"""Compare answers with another commit, bit for bit: `python -m tests.checks.same_answers --out OUT --against COMMIT`.

Stores are the golden ones and freshly divided small models of each kind: encoders of texts by names, texts and images
by a run, arrays, and modules for `offramp.stream`. Both sides read the golden stores and the stores that the old code
divided; each side also reads the stores that it divided itself. A cell is one way to run a store: backend, budget, way
of reading, batch and exit rule. Scores are compared as bits of float64; labels, exits and layers by value. Cells in
which both sides raise the same error count as refused. Exit code 1 if any cell differs.

Where rows leave a batch at different exits, measured times decide whether the remaining rows are gathered, and PyTorch
then computes with another number of rows: last bits vary from run to run of the same code (7e-8). Cells that differ are
therefore repeated, and count as equal if, for each row, both sides gave one answer in common. Bulk mode runs without a
budget only: under a budget, the memory of the process decides which texts share a batch, and with it their last bits.
"""

import argparse
import collections
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.commits import Side, sides_of

SIDE = Path(__file__).with_name("same_answers_side.py")
BACKENDS = ("ort", "torch")
EXTRA_MIB = (0, 2, 4, 8, None)
"""Budgets above the smallest that works, in MiB; None is no limit."""
REPEATS = 10
RULES = ("patience:1", "confidence:0.4", "patience:2|confidence:0.6")
Cell = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A store that is read: its name under a folder, kind of inputs, and whether it has exits."""

    name: str
    inputs: str
    has_exits: bool
    is_regression: bool = False

    def rules(self) -> list[str]:
        """Return the exit rules of the cells."""
        if not self.has_exits:
            return ["none", "patience:inf"]
        return ["none", "stage:1", "stage:2", "patience:1"] if self.is_regression else ["none", "stage:1", *RULES]


def cells_of(subject: Subject, store: Path, is_brief: bool) -> list[Cell]:
    """Return the cells of one classifier; `is_brief`: without the product of budgets, reads and batches."""
    found, rules = [], subject.rules()

    def add(backend: str, extra: int | None, reads: str, batch: Any, rule: str, threads: int = 1) -> None:
        run = {"extra_mib": extra, "reads": reads, "batch": batch, "exit": rule, "threads": threads}
        found.append({"store": str(store), "inputs": subject.inputs, "backend": backend, **run})

    for backend in BACKENDS:
        for rule in rules:
            add(backend, None, "auto", 1, rule)
            add(backend, 0, "buffered", 4, rule)
        if is_brief:
            continue
        for extra in EXTRA_MIB:
            for reads in ("direct", "buffered"):
                for index, batch in enumerate((1, 4, "bulk") if extra is None else (1, 4)):
                    add(backend, extra, reads, batch, rules[-1] if (index + (reads == "direct")) % 2 else "none")
        add(backend, 2, "auto", 4, "none", threads=2)
    return found


def fresh_subjects() -> list[Subject]:
    """Return the classifiers of small_models.py."""
    from tests.checks import small_models

    found = [Subject(m.name, m.kind, bool(m.heads), m.name.endswith("regression")) for m in small_models.models()]
    return [*found, Subject("arrays", "arrays", True)]


def golden_subjects() -> list[Subject]:
    """Return the golden classifiers."""
    from tests.golden.common import read_answers

    found = []
    for name, recorded in read_answers()["stores"].items():
        has_exits = any(each["exit"] == "stage:1" for each in recorded["answers"])
        found.append(Subject(name, f"golden:{name}", has_exits, name.endswith("regression")))
    return found


def stream_cells(stores: dict[str, Path], modules: dict[str, str]) -> list[Cell]:
    """Return the cells of modules for `stream`; `modules`: name of the store -> package:class."""
    return [
        {"store": str(stores[name]), "module": module, "weight_budget": budget, "reads": reads}
        for name, module in modules.items()
        for budget in ("smallest", "3MiB", None)
        for reads in ("direct", "buffered")
    ]


FRESH_MODULES = {
    "tied": "small_models:Tied",
    "gpt2-lm": "transformers:GPT2LMHeadModel",
    "mixtral-lm": "transformers:MixtralForCausalLM",
}
GOLDEN_MODULES = {"tied-eager": "tests.golden.modules:Tied", "gpt2-eager": "transformers:GPT2LMHeadModel"}


def golden_cells(folder: Path) -> list[Cell]:
    """Unpack the golden stores, and return their cells."""
    from tests.golden.common import unpack

    found = [cell for each in golden_subjects() for cell in cells_of(each, unpack(each.name, folder), is_brief=True)]
    return found + stream_cells({name: unpack(name, folder) for name in GOLDEN_MODULES}, GOLDEN_MODULES)


def fresh_cells(stores: Path, is_brief: bool) -> list[Cell]:
    """Return the cells of freshly divided stores."""
    found = [cell for each in fresh_subjects() for cell in cells_of(each, stores / each.name, is_brief)]
    return found + stream_cells({name: stores / name for name in FRESH_MODULES}, FRESH_MODULES)


def side_process(side: Side, *words: object, **options: Any) -> subprocess.Popen:
    """Start same_answers_side.py with the code of a side."""
    environment = {**os.environ, **side.environment, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SIDE), *map(str, words)]
    return subprocess.Popen(command, env=environment, text=True, **options)


def build(sides: dict[str, Side], out: Path) -> None:
    """Make the models with the old code, and divide them with both."""
    models = out / "models"
    if not (out / "models.done").exists():
        shutil.rmtree(models, ignore_errors=True)
        finish({"make": side_process(sides["old"], "make", models, stdout=subprocess.DEVNULL)})
        (out / "models.done").touch()
    for path in out.glob("stores-*"):
        shutil.rmtree(path)
    finish({name: side_process(side, "divide", models, out / f"stores-{name}") for name, side in sides.items()})


def finish(running: dict[str, subprocess.Popen]) -> None:
    """Wait for all processes. Raises SystemExit if one fails."""
    codes = {name: process.wait() for name, process in running.items()}
    if any(codes.values()):
        raise SystemExit(f"failed: {codes}")


def answers_of(side: Side, cells: list[Cell], out: Path, label: str = "answers") -> subprocess.Popen:
    """Start a side on its cells; answers go to OUT/LABEL-NAME.jsonl."""
    (out / f"cells-{side.name}.json").write_text(json.dumps(cells))
    with (out / f"cells-{side.name}.json").open() as given, (out / f"{label}-{side.name}.jsonl").open("w") as taken:
        return side_process(side, "answer", stdin=given, stdout=taken)


def read(side: str, out: Path, label: str = "answers") -> list[Any]:
    """Return the answers of a side, in the order of its cells."""
    return [json.loads(line) for line in (out / f"{label}-{side}.jsonl").read_text().splitlines()]


def verdict_of(old: Any, new: Any) -> str:
    """Return `equal`, `refused` (the same error on both sides) or `differs`."""
    if "error" in old or "error" in new:
        return "refused" if old.get("error") == new.get("error") else "differs"
    return "equal" if old["answers"] == new["answers"] else "differs"


def repeated(sides: dict[str, Side], cells: dict[str, list[Cell]], out: Path) -> list[bool]:
    """Run cells REPEATS times on both sides. Returns whether every row of a cell had an answer that both sides gave."""
    finish({name: answers_of(side, REPEATS * cells[name], out, "again") for name, side in sides.items()})
    number = len(cells["old"])
    answers = {name: read(name, out, "again") for name in sides}
    return [share_answers(answers["old"][index::number], answers["new"][index::number]) for index in range(number)]


def share_answers(old: list[Any], new: list[Any]) -> bool:
    """Return whether repeated answers of two sides have, for each row, an answer in common."""
    if any("error" in each for each in [*old, *new]):
        return False
    sides = ([each["answers"] for each in side] for side in (old, new))
    rows = ([{json.dumps(row) for row in answers} for answers in zip(*side, strict=True)] for side in sides)
    return all(one & other for one, other in zip(*rows, strict=True))


def described(cell: Cell) -> str:
    """Return a cell in one line."""
    return " ".join(f"{key}={value}" for key, value in cell.items() if key != "inputs")


def report(cells: list[Cell], pairs: list[tuple[Any, Any]], verdicts: list[str]) -> int:
    """Print what differs, what was refused, and the totals. Returns 1 if any cell differs."""
    errors = collections.Counter[str]()
    for cell, (old, new), verdict in zip(cells, pairs, verdicts, strict=True):
        if verdict in ("differs", "repeats"):
            print(f"{verdict}: {described(cell)}\n  old: {json.dumps(old)[:400]}\n  new: {json.dumps(new)[:400]}")
        elif verdict == "refused":
            errors[f"{Path(cell['store']).name}: {old['error']}: {old['message']}"] += 1
    for message, number in errors.items():
        print(f"refused by both sides, {number} cells: {message}")
    good = [new for _, new in pairs if "plan" in new]
    slots = collections.Counter(str(each["plan"][0]) for each in good)
    print(f"slots of the plans (new side): {dict(slots)}")
    exits = collections.Counter(row[2] for each in good if each["plan"][0] != "stream" for row in each["answers"])
    print(f"exits of the answers (new side): {dict(sorted(exits.items()))}")
    counts = collections.Counter(verdicts)
    print(
        f"{counts['equal']} cells equal, {counts['repeats']} equal when repeated, {counts['differs']} differ,"
        f" {counts['refused']} refused by both sides"
    )
    return int(counts["differs"] > 0)


def judged(sides: dict[str, Side], cells: dict[str, list[Cell]], out: Path) -> int:
    """Compare what both sides answered, repeat the cells that differ, and print the report."""
    pairs = list(zip(read("old", out), read("new", out), strict=True))
    verdicts = [verdict_of(*pair) for pair in pairs]
    indices = [index for index, verdict in enumerate(verdicts) if verdict == "differs"]
    if indices:
        print(f"{len(indices)} cells are repeated", file=sys.stderr)
        again = {name: [cells[name][index] for index in indices] for name in sides}
        for index, is_shared in zip(indices, repeated(sides, again, out), strict=True):
            verdicts[index] = "repeats" if is_shared else "differs"
    return report(cells["new"], pairs, verdicts)


def main() -> int:
    """Build, run both sides, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("same-answers-out"), help="models, stores and answers")
    parser.add_argument("--against", required=True, metavar="COMMIT", help="the commit whose answers are the reference")
    parser.add_argument("--only", metavar="NAME,...", help="these stores alone, such as bert,vit,tied-eager")
    args = parser.parse_args()
    began, out = time.perf_counter(), args.out.resolve()
    (out / "against").mkdir(parents=True, exist_ok=True)
    sides = sides_of(args.against, out)
    build(sides, out)
    print(f"models and stores: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    common, brief = golden_cells(out / "golden"), fresh_cells(out / "stores-old", is_brief=True)
    full = {name: fresh_cells(out / f"stores-{name}", is_brief=False) for name in sides}
    cells = {name: [*common, *brief, *full[name]] for name in sides}
    if args.only:
        names = set(args.only.split(","))
        cells = {name: [cell for cell in each if Path(cell["store"]).name in names] for name, each in cells.items()}
    finish({name: answers_of(side, cells[name], out) for name, side in sides.items()})
    status = judged(sides, cells, out)
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

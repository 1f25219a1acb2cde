"""Commands that read a store, a model folder, or the files beside them, and the answers that they print."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXTS = "--text|red sky|--text|the green grass is a rose"
ROWS = "--text-column|sentence|--label-column|label|--offline"
TUNING = "--transcript|transcripts|--profile|profile.json|--force-profile|--max-drop|60|--confidence|0.5|--threads|1"


@dataclass(frozen=True)
class Verb:
    """A command line, run in the place of an input."""

    name: str
    line: str
    """Words, separated by bars. INPUTS stands for the inputs of the kind of model."""
    reads: str = "store"
    """Folder or file that must be there."""
    kind: str = "light"
    """Zygote that runs it."""
    is_costly: bool = False
    """It starts processes or trains: seconds instead of a tenth of one."""
    bases: tuple[str, ...] = ()
    """Honest models for which it works; empty: all that have what it reads."""

    def words(self, base: str) -> list[str]:
        """Return the command line for a kind of model."""
        inputs = {"image": "--input|image.png", "arrays": "--input|arrays.npz"}.get(base, TEXTS)
        return self.line.replace("INPUTS", inputs).split("|")


NARROW = ("int8", "rotated", "int8-blocked", "fp16", "blocked")
TEXT = ("names", "captured", "format1", "format2", "int8-captured", *NARROW)
NAMES = ("names", "format1", *NARROW)
EXITS = ("names", "captured")
VERBS = (
    Verb("run", "run|store|INPUTS|--json|--threads|1|--budget|400MiB"),
    Verb("run-numpy", "run|store|INPUTS|--json|--backend|numpy", bases=NAMES),
    Verb("run-torch", "run|store|INPUTS|--json|--threads|1|--backend|torch", kind="torch"),
    Verb("run-batch", "run|store|--input|texts.txt|--json|--threads|1|--batch|2|--exit|confidence:0.4", bases=TEXT),
    Verb("plan", "plan|store|--threads|1|--batch|2"),
    Verb("plan-torch", "plan|store|--json|--threads|1|--backend|torch", kind="torch"),
    Verb("ls", "ls|store|--graph|made/stages.svg"),
    Verb("verify", "verify|store"),
    Verb("memory", "memory|store|INPUTS|--threads|1|--out|made/memory.svg"),
    Verb("eval", f"eval|store|--dev|rows.tsv|{ROWS}|--include-training-rows", kind="torch", bases=EXITS),
    Verb("divide-store", "divide|store|made/store", kind="torch", bases=("names",)),
    Verb("profile", "profile|store|--threads|1|--max-length|16|--out|made/profile.json", is_costly=True, bases=TEXT),
    Verb("bench", "bench|store|--budget|400MiB|--repeat|1|--passes|1|--threads|1|--json", is_costly=True),
    Verb(
        "train-store",
        f"train|store|--train|rows.tsv|{ROWS}|--out|made/run|--loss|heads-only|--heads-epochs|1|--batch|8|--max-length|16",
        kind="torch", is_costly=True, bases=EXITS,
    ),
    Verb("tune", f"tune|store|{TUNING}|--out|made/policy.json", kind="torch", bases=("names",)),
    Verb("tune-captured", f"tune|store|{TUNING}|--out|made/policy.json", kind="torch", bases=("captured",)),
    Verb("run-policy", "run|store|INPUTS|--json|--threads|1|--exit|policy.json", "policy.json"),
    Verb("run-deadline", "run|store|INPUTS|--json|--threads|1|--deadline|5s|--profile|profile.json", "profile.json"),
    Verb("explain", "tune|--explain|policy.json", "policy.json", "torch"),
    Verb("divide", "divide|model|made/store|--offline", "model", "torch"),
    Verb("eval-model", f"eval|model|--dev|rows.tsv|{ROWS}|--include-training-rows", "model", "torch", bases=EXITS),
    Verb(
        "train",
        f"train|model|--train|rows.tsv|{ROWS}|--out|made/run|--loss|heads-only|--heads-epochs|1|--batch|8|--max-length|16",
        "model", "torch", True, EXITS,
    ),
)  # fmt: skip
VERBS = (
    *VERBS,
    *(
        Verb(f"report-{form}", f"report|results|--out|made/page.{form}|--assets|made/assets", "results", "torch")
        for form in ("html", "md", "tex", "csv")
    ),
    Verb("compare", "compare|results|others|--figure|latency", "results", "torch"),
)
TORCH_VERBS = ("run-torch", "plan-torch", "verify", "eval")
ONNX_VERBS = ("run", "run-batch", "plan", "memory", "verify", "profile", "bench")
"""Verbs that read the graphs for PyTorch, and those for ONNX Runtime."""


def verbs_of(reads: str, base: str, honest: Path) -> list[Verb]:
    """Return the verbs that read a folder or a file of an honest model."""
    return [
        verb
        for verb in VERBS
        if verb.reads == reads and (not verb.bases or base in verb.bases) and (honest / base / reads).exists()
    ]


def answers(verb: Verb, out: str) -> Any:
    """Return what the answer of a command depends on the model for; None where it only says what it did."""
    return _ANSWERS.get(verb.name, lambda out: None)(out)


def _predictions(out: str) -> list[Any]:
    results = [json.loads(line) for line in out.splitlines()]
    keys = ("label", "labels", "score", "values", "exit_stage")
    return [[result.get(key) for key in keys] for result in results if "record" not in result]


def _lines(out: str) -> list[str]:
    return out.splitlines()


_ANSWERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(
        ("run", "run-numpy", "run-torch", "run-batch", "run-policy", "run-deadline"), _predictions
    ),
    "eval": _lines, "eval-model": _lines,
}  # fmt: skip

"""The questions of a course project of 2021, asked again: docs/results/study.md, which says how the models are made.

SHAPES holds `bert-base-exits` and `distilbert`; RUNS holds `minilm/TASK` and `distil/TASK`; GLUE the tables.

SHAPES=shapes RUNS=runs GLUE=glue offramp sweep recipes/ancestor.py --out results/study

With QUICK=1 a small part of it: some minutes.
"""

import os

from offramp.experiments import Grid, patience

SHAPES, RUNS, GLUE = (os.environ.get(name, name.lower()) for name in ("SHAPES", "RUNS", "GLUE"))
QUICK = bool(os.environ.get("QUICK"))
TIMED, SCORED = {"rounds": 1 if QUICK else 5}, {"rows": 100 if QUICK else 1000, "rounds": 1}
LAYERS = {"bert-base-exits": 12, "distilbert": 6}
MODELS = [f"{RUNS}/minilm", f"{RUNS}/distil"]
TASKS = [("cola", "dev"), ("mnli", "dev"), ("mnli", "dev_mismatched"), ("qnli", "dev"), ("qqp", "dev")]
CHANCE = ["patience:2", "confidence:0.8"]
TUNED = [f"tune:latency=patience:{number}" for number in (1, 2, 3)]


def schedules(name, layers):
    """Memory and latency with 1 to all layers in memory: the lists of 2021, and the ring of offramp."""
    counts = [1, layers] if QUICK else [count for count in (1, 2, 4, 6, 8, 10, 12) if count <= layers]
    of = {"model": f"{SHAPES}/{name}", "max_length": 128, "passes": 5, **TIMED}
    yield Grid(residency=["fifo", "mru", "planned"], resident_layers=counts, **of)
    yield Grid(rival="lazy-layers", residency=["fifo", "mru"], resident_layers=[1, layers // 2], **of)


def depths():
    """Latency to exit K of BERT-base with 6 of 12 layers in memory: what an exit saves where layers are loaded."""
    exits = [f"stage:{number}" for number in ((3, 6) if QUICK else (2, 4, 6, 8, 10))]
    of = {"model": f"{SHAPES}/bert-base-exits", "task": "mnli", "data": GLUE, "rows": 20, **TIMED}
    return Grid(residency=["mru", "planned"], resident_layers=6, exit=["none", *exits], **of)


def policies(models, task, split):
    """Patience against policies tuned to its latency, between bounds; all layers in memory, or two."""
    of = {"model": [f"{model}/{task}" for model in models], "task": task, "split": split, "data": GLUE}
    known, bounds = ["none", *patience(1, 4), "confidence:0.8"], ["oracle", *(f"random:{rule}" for rule in CHANCE)]
    yield Grid(exit=[*known, *bounds], **of, **SCORED)
    yield Grid(exit=TUNED, resident_layers=[2, None], **of, **SCORED)
    if split == "dev":
        yield Grid(exit=["none", "patience:2", TUNED[1]], resident_layers=[2, None], rows=100, **of, **TIMED)


def recipe():
    """Return the experiments of all three questions."""
    found = [grid for name, layers in LAYERS.items() for grid in schedules(name, layers)]
    asked = [(MODELS[:1], *TASKS[0])] if QUICK else [(MODELS, *each) for each in TASKS]
    return [*found, depths(), *(grid for each in asked for grid in policies(*each))]

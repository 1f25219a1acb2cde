"""Latency and memory of BERT-base's shape against the budget, and of rivals; docs/results/main-job.md has figures.

`python bench/shapes.py models` makes the models, with random weights.

MODELS=models offramp sweep recipes/main_job.py --out results/main-job
"""

import os

from offramp.experiments import Grid


def recipe():
    """Full depth under budgets, then exits after three, six and nine layers."""
    models = os.environ.get("MODELS", "models")
    budgets = ["resident", "192MiB", "128MiB", "120MiB", "96MiB"]
    of = {"threads": 2, "max_length": 128, "passes": 10, "rounds": 10, "trace": True}
    exits = Grid(model=f"{models}/bert-base-exits", exit=["stage:3", "stage:6", "stage:9"], budget=budgets[2:], **of)
    rivals = ["transformers", "disk", "onnxruntime", "onnxruntime-int8"]
    shared = {"model": f"{models}/bert-base", **of}
    return [Grid(budget=budgets, **shared), Grid(rival=rivals, **{**shared, "trace": False}), exits]

"""Models of any kind, divided by a run and streamed bit for bit; docs/results/any-model.md has the figures.

MODELS holds model folders of transformers, sorted by kind, as KIND/NAME: your own, or tiny ones with random weights,
which `python -m tests.zoo.folders models` writes, of all architectures; of twelve with `--sample 12`.

MODELS=models offramp sweep recipes/any_model.py --out results/any-model

Jobs run one at a time, since they measure how much slower a stream is than its model. `--jobs 2 --share-cores` is for
the comparison of answers alone: models then slow each other down.
"""

import os
from pathlib import Path

from offramp.experiments import Grid

MODELS = Path(os.environ.get("MODELS", "models"))


def recipe():
    """Each model once, with one thread: the smallest budget of weights, twice that, and slices of rows below it."""
    folders = sorted(str(path.parent) for path in MODELS.glob("*/*/config.json"))
    return Grid(job="stream", model=folders or [f"{MODELS}/KIND/NAME"], threads=1, rounds=1, timeout="300s")

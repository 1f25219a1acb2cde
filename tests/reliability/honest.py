"""Honest models, their stores and their inputs, made once: `python -m tests.reliability.honest FOLDER`.

`FOLDER/NAME` holds a `model`, the `store` that it was divided into, inputs, and for the text models a policy, a device
profile and transcripts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
TRAINING = ("--loss", "heads-only", "--heads-epochs", "2", "--batch", "16", "--max-length", "16")
BASES = ("names", "captured", "large", "image", "arrays", "format1", "format2")
"""Text models divided by names and by a run, one whose weights are streamed under a small budget, a model of images, a
module of arrays, and stores of the old formats."""
NARROW = {
    "int8": ("names", "--dtype", "int8"),
    "int8-captured": ("captured", "--dtype", "int8"),
    "int8-blocked": ("names", "--dtype", "int8", "--block", "1KiB"),
    "fp16": ("names", "--dtype", "fp16"),
    "blocked": ("names", "--block", "1KiB"),
}
"""Store of integers, half floats or blocks -> the model that it is divided from, and the options."""
GOLDEN = {
    "format1": "stores/bert-tuned",
    "format2": "stores/albert-export",
    "rotated": "narrow_stores/bert-int8-rotated",
}
"""Store that earlier versions wrote -> its archive."""


def call(*words: object) -> None:
    """Run a command of offramp in this process."""
    from offramp.cli import main

    if main([str(word) for word in words]):
        raise SystemExit(f"offramp {words[0]} failed")


def make(folder: Path) -> None:
    """Make what is not there yet."""
    for name in (*BASES, *NARROW, "rotated", "results"):
        if (folder / name).exists():
            continue
        partial = folder / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        made = make_old if name in GOLDEN else make_narrow if name in NARROW else make_text
        {"image": make_image, "arrays": make_arrays, "results": make_results}.get(name, made)(partial)
        partial.rename(folder / name)


def make_text(place: Path) -> None:
    """Make a classifier of texts with trained exits, its store, transcripts, a device profile and a policy."""
    from tests.checks import small_models

    name = "albert" if place.name.startswith("captured") else "bert"
    model = next(each for each in small_models.models() if each.name == name)
    if not place.name.startswith("large"):
        model = dataclasses.replace(model, shape={**model.shape, **SIZES})
    small_models.write_folder(place / "bare", model)
    small_models.write_texts(place / "rows.tsv", 400)
    data = ("--train", place / "rows.tsv", "--text-column", "sentence", "--label-column", "label")
    call("train", place / "bare", *data, "--out", place / "model", *TRAINING)
    call("divide", place / "model", place / "store")
    call("eval", place / "model", *data, "--split", "tune,certify", "--transcript", place / "transcripts")
    call("profile", place / "store", "--out", place / "profile.json", "--threads", 1, "--max-length", 16)
    goal = ("--max-drop", 60, "--confidence", 0.5, "--threads", 1)
    known = ("--transcript", place / "transcripts", "--profile", place / "profile.json", "--force-profile")
    call("tune", place / "store", *known, *goal, "--out", place / "policy.json")
    (place / "texts.txt").write_text("the red sky is a rose\nblue grass\n" * 2)
    lines = (place / "rows.tsv").read_text().splitlines(keepends=True)
    (place / "rows.tsv").write_text("".join(lines[:25]))
    shutil.rmtree(place / "bare")


def make_image(place: Path) -> None:
    """Make a classifier of images with random exits, and its store."""
    from tests import tiny_vision
    from tests.checks import small_models

    model = tiny_vision.write_model(place / "model", "resnet")
    tiny_vision.write_exits(place / "model", tiny_vision.with_exits(model))
    call("divide", place / "model", place / "store")
    (place / "image.png").write_bytes(small_models.png(1, 120))


def make_arrays(place: Path) -> None:
    """Unpack a store of a module that takes arrays, and write arrays for it."""
    import numpy as np

    with zipfile.ZipFile(ROOT / "tests/store/format3/captured.zip") as archive:
        archive.extractall(place / "store")
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((3, 4)).astype(np.float32)
    np.savez(place / "arrays.npz", numbers=numbers, word=np.array([1, 2, 3]))


def make_narrow(place: Path) -> None:
    """Divide a model that is there into a store of integers, half floats or blocks."""
    from unittest import mock

    from offramp.division import config

    base, *options = NARROW[place.name.partition(".")[0]]
    with mock.patch.object(config, "LEAST_BLOCK_BYTES", 1):  # this model has no larger matrices
        call("divide", place.parent / base / "model", place / "store", *options)
    shutil.copy(place.parent / base / "texts.txt", place)


def make_results(place: Path) -> None:
    """Write a results folder with some of the published records, and another one to compare it with."""
    lines: list[str] = []
    for kind in ("main-job", "glue", "latency"):
        lines += (ROOT / f"docs/results/records/{kind}/records.jsonl").read_text().splitlines(keepends=True)[:4]
    for name in ("results", "others"):
        (place / name).mkdir()
        (place / name / "results.json").write_text('{"format": 1}')
        (place / name / "records.jsonl").write_text("".join(lines))


def make_old(place: Path) -> None:
    """Unpack a golden store of an earlier version."""
    name = GOLDEN[place.name.partition(".")[0]]
    with zipfile.ZipFile(ROOT / f"tests/golden/{name}.zip") as archive:
        archive.extractall(place / "store")
    (place / "texts.txt").write_text("the red sky is a rose\nblue grass\n")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    target = Path(sys.argv[1]).resolve()
    os.environ["OFFRAMP_CACHE"] = str(target / "cache")
    make(target)
    print(json.dumps(sorted(path.name for path in target.iterdir())))

"""Bit flips: `python -m tests.reliability.flips HONEST NUMBER` flips so many single bits of each kind of file, in one
process, and prints one JSON line for each kind.

Each flip must be found by `verify`. Each twentieth must also be refused by a run, or change no answer, though the run
before it has remembered the file as verified.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .trial import copy_tree

KINDS = {
    "shard of a layer": ("names", "layer-01-up.safetensors"),
    "shard of rows that are gathered": ("names", "embedding-rows.safetensors"),
    "digests of blocks": ("names", "embedding-rows.blocks"),
    "shard of a captured program": ("captured", "weights-001.safetensors"),
    "constants": ("captured", "constants.safetensors"),
    "graph for ONNX Runtime": ("captured", "graphs/*.onnx"),
    "graph for PyTorch": ("captured", "graphs/*.json"),
    "exit heads": ("names", "exits.safetensors"),
    "description of exits": ("names", "exits.json"),
    "labels": ("names", "labels.json"),
    "tokenizer": ("names", "tokenizer.json"),
    "settings of the tokenizer": ("names", "offramp_tokenizer.json"),
    "configuration": ("names", "config.json"),
    "manifest": ("names", "offramp.json"),
}
"""Kind of file -> honest store, and name or pattern."""
RUN_EVERY = 20


def flip(path: Path, number: int, seed: int) -> Iterator[int]:
    """Yield so many bits of a file, each while it is flipped; different ones, as far as there are so many."""
    data = path.read_bytes()
    places = list(range(8 * len(data)))
    random.Random(seed).shuffle(places)
    for bit in places[:number]:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        yield bit
    path.write_bytes(data)


def trial(store: Path, file: Path, number: int) -> dict:
    """Flip bits of one file. Returns counts, and the first flips that were not found or changed an answer."""
    import offramp
    from offramp.errors import RefusedError

    def run() -> object:
        with offramp.load(store, threads=1, exit="confidence:0.4") as classifier:
            return [(each.label, each.score, each.exit_stage) for each in classifier.predict(["red sky", "blue grass"])]

    honest, missed, wrong, num_flips, num_runs, num_same = run(), [], [], 0, 0, 0
    time.sleep(0.2)  # a younger file is not remembered as verified
    run()
    for bit in flip(file, number, seed=1):
        num_flips += 1
        try:
            found = any(check.problem for check in offramp.verify(store))
        except RefusedError:
            found = True
        if not found:
            missed.append(bit)
        if num_flips % RUN_EVERY == 0:
            num_runs += 1
            try:
                is_same = run() == honest
                num_same += is_same
                if not is_same:
                    wrong.append(bit)
            except RefusedError:
                pass
    facts = {"flips": num_flips, "missed": len(missed), "runs": num_runs, "same": num_same, "wrong": len(wrong)}
    return {**facts, "first_missed": missed[:3], "first_wrong": wrong[:3]}


def main() -> None:
    """Flip bits of each kind of file."""
    honest, number = Path(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["OFFRAMP_CACHE"] = f"{scratch}/cache"
        for kind, (base, pattern) in KINDS.items():
            store = copy_tree(honest / base / "store", Path(scratch) / kind.replace(" ", "-"))
            files = sorted(store.glob(pattern))
            if not files:
                print(json.dumps({"kind": kind, "skipped": f"the store {base} has no {pattern}"}), flush=True)
                continue
            began = time.monotonic()
            found = trial(store, files[0], number)
            print(json.dumps({"kind": kind, **found, "seconds": round(time.monotonic() - began, 1)}), flush=True)


if __name__ == "__main__":
    main()

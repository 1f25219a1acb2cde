"""Engines that are opened, used and closed many times, and what the process holds afterwards."""

import contextlib
import importlib
import time
from pathlib import Path
from typing import NamedTuple

import offramp
from offramp.measure import read_memory
from tests.golden.common import read_answers, to_array, to_input, unpack

CLASSIFIERS = {
    "ort-texts": ("bert-tuned", {"backend": "ort"}),
    "torch-texts": ("bert-tuned", {"backend": "torch", "threads": 1}),
    "numpy-texts": ("bert-tuned", {"backend": "numpy"}),
    "ort-arrays": ("arrays-export", {"backend": "ort"}),
    "torch-arrays": ("arrays-export", {"backend": "torch", "threads": 1}),
    "ort-budget": ("bert-tuned", {"backend": "ort", "budget": "1GiB", "batch": "bulk"}),
    "ort-deadline": ("bert-tuned", {"backend": "ort", "deadline": "10s"}),
}
"""Case -> golden store and options of `offramp.load`."""
CASES = (*CLASSIFIERS, "ort-again", "stream", "stream-budget", "store", "left-open", "refused")


class Held(NamedTuple):
    """What a process holds."""

    threads: int
    descriptors: int
    rss_bytes: int


def held():
    """Return what this process holds now. A thread that was joined is listed until the kernel has ended it."""
    counts = []
    for _ in range(5):
        time.sleep(0.01)
        counts.append([len(list(Path("/proc/self", each).iterdir())) for each in ("task", "fd")])
    threads, descriptors = map(min, zip(*counts, strict=True))
    return Held(threads, descriptors, read_memory().rss_bytes)


def make_case(name, folder):
    """Return a function that opens, uses and closes an engine of a case once."""
    if name in CLASSIFIERS:
        store, options = CLASSIFIERS[name]
        return _classifying(store, folder, **{"threads": 2, **options})
    if name.startswith("stream"):
        return _streaming(folder, **({"budget": "4GiB"} if name == "stream-budget" else {"weight_budget": "16KiB"}))
    return {"ort-again": _again, "store": _reading, "left-open": _leaving, "refused": _refused}[name](folder)


def _classifying(name, folder, **options):
    store = unpack(name, folder)
    inputs = [to_input(each) for each in read_answers()["stores"][name]["inputs"]]

    def once():
        with offramp.load(store, warn=lambda line: None, **options) as classifier:
            assert len(classifier.predict(inputs)) == len(inputs)

    return once


def _again(folder):
    """One classifier that is opened again each time."""
    classifier = offramp.prepare(unpack("bert-tuned", folder), threads=2)

    def once():
        with classifier:
            classifier.predict(["good film"])

    return once


def _streaming(folder, **options):
    import torch

    store, calls = unpack("tied-eager", folder), read_answers()["streams"]["tied-eager"]["calls"]
    module = importlib.import_module("tests.golden.modules").Tied
    inputs = {key: torch.from_numpy(to_array(tree)) for key, tree in calls[0]["inputs"].items()}

    def once():
        with offramp.stream(module, store, **options) as stream:
            stream(**inputs)

    return once


def _reading(folder):
    store = unpack("bert-tuned", folder)

    def once():
        with offramp.Store(store) as opened:
            for name, shard in opened.manifest.shards.items():
                opened.read_shard(name, memoryview(bytearray(shard.bytes)), halves=True)

    return once


def _leaving(folder):
    """Close in the middle of an iterator of results, and twice."""
    store = unpack("bert-tuned", folder)

    def once():
        classifier = offramp.load(store, threads=2)
        results = classifier.predict(["good film", "bad film"], stream=True)
        next(results)
        classifier.close()
        classifier.close()

    return once


def _refused(folder):
    """An engine that fails after its backend was opened: its budget is refused, or its inputs cannot be measured."""
    store = unpack("bert-tuned", folder)

    def once():
        for options in ({"budget": "1MiB"}, {"texts": [None]}):
            with contextlib.suppress(offramp.OfframpError, TypeError):
                offramp.load(store, threads=2, **options)
                raise AssertionError("nothing was refused")

    return once


def run_case(name: str, folder: Path, times: int, at: tuple[int, ...]):
    """Open and close a case `times` times, and yield (number, what the process holds) after each number of `at`."""
    once = make_case(name, folder)
    for number in range(1, times + 1):
        once()
        if number in at:
            yield number, held()

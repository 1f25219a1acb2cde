"""What the benchmark runs on, under its output folder: models with random weights, their stores, and texts."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from processes import failure, offramp, rival, run

STORES = {"store": "bert-base", "store-exits": "bert-base-exits", "store-distilbert": "distilbert"}
THREADS, TOKENS = 2, 128
LOOK = ("--threads", THREADS, "--max-length", TOKENS)
"""How every `offramp run` is asked to look at a text."""
WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "with", "as", "his", "they", "at")
"""Common words, each one token of BERT's vocabulary."""


@dataclass(frozen=True)
class Folders:
    """Paths under `out`, and the environment of every process."""

    out: Path

    @property
    def models(self) -> Path:
        return self.out / "models"

    @property
    def store(self) -> Path:
        return self.out / "store"

    @cached_property
    def environment(self) -> dict[str, str]:
        """The same threads for everybody, no network, no progress bars, and a cache that is nobody else's."""
        return {
            "OFFRAMP_CACHE": str(self.out / "cache"),
            "OMP_NUM_THREADS": str(THREADS),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }

    def build(self, say: Callable[[str], None]) -> None:
        """Make what is not there yet. What is there was made whole."""
        self.models.mkdir(parents=True, exist_ok=True)
        say("models and stores")
        commands = [rival("build", self.models)]
        commands += [
            offramp("divide", self.models / model, self.out / store)
            for store, model in STORES.items()
            if not (self.out / store).exists()
        ]
        for command in commands:
            reason = failure(run(command, self.environment))
            if reason:
                raise SystemExit(f"{' '.join(command)}: {reason}")
        batches = {"ragged": [words(3), words(35), words(79), words(126)], "pairs": pairs(), "one": [words(126)]}
        self.batches.write_text(json.dumps(batches))

    def texts(self, number: int) -> Path:
        """A file of texts, one a line, each longer than 128 tokens."""
        path = self.out / f"texts-{number}.txt"
        path.write_text("".join(f"{words(140, shift)}\n" for shift in range(number)))
        return path

    @property
    def batches(self) -> Path:
        """Batches of texts by name, as JSON: four of 5 to 128 tokens, four pairs, one of 128 tokens."""
        return self.out / "batches.json"

    def warm(self, *paths: Path) -> None:
        """Bring all files below the paths into the page cache."""
        for path in paths:
            for file in sorted(path.rglob("*")):
                if file.is_file():
                    with file.open("rb", buffering=0) as stream:
                        while stream.read(1 << 20):
                            pass


def words(number: int, shift: int = 0) -> str:
    """A text of so many tokens, special ones not counted."""
    return " ".join(WORDS[(index + shift) * 7 % len(WORDS)] for index in range(number))


def pairs() -> list[tuple[str, str]]:
    """Pairs of unequal length, the last one too long for 128 tokens."""
    return [(words(2), words(3)), (words(30), words(8)), (words(10), words(60)), (words(90), words(90))]

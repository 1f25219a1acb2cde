"""What the benchmark runs on, under its output folder: models with random weights, their stores, and texts."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from commits import QUIET

THREADS, TOKENS = 2, 128
"""Threads as in QUIET, and tokens of a text."""
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
        return {**QUIET, "OFFRAMP_CACHE": str(self.out / "cache")}

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

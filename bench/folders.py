"""What the benchmark runs on, under its output folder: models with random weights, their stores, and texts."""

import os
from collections.abc import Sequence
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


def evict(*folders: Path) -> None:
    """Drop the pages of all files in the folders that no process maps from the page cache; write new ones first."""
    os.sync()
    for path in files_in(folders):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_back(*folders: Path) -> None:
    """Bring all files in the folders into the page cache."""
    for path in files_in(folders):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


def files_in(folders: Sequence[Path]) -> list[Path]:
    """The files in folders, at any depth; links are left out."""
    paths = (path for folder in folders for path in sorted(folder.rglob("*")))
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def words(number: int, shift: int = 0) -> str:
    """A text of so many tokens, special ones not counted."""
    return " ".join(WORDS[(index + shift) * 7 % len(WORDS)] for index in range(number))

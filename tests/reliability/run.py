"""State of a reliability run: its folders, its limits, and the records of the trials that are done."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.records import add_record, read_records


@dataclass
class Run:
    """One reliability run, which goes on where it was stopped."""

    out: Path
    is_sample: bool
    """The kept sample: fewer drawn inputs, and costly verbs for some inputs alone."""
    workers: int = 2
    minutes: float | None = None
    """Time of this start; what is not reached is left for the next."""
    limit: int | None = None
    """Most inputs of a part."""
    match: str = ""
    """Text that the names of the inputs contain."""
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self._file, self._lock = self.out / "records.jsonl", threading.Lock()
        records = read_records(self._file)
        self._done = {(each["part"], each.get("name"), each.get("verb")) for each in records}
        self.num_added = self.num_faults = 0

    @property
    def honest(self) -> Path:
        """Folder of the honest models."""
        return self.out / "honest"

    @property
    def scratch(self) -> Path:
        """Folder in which trials run."""
        return self.out / "scratch"

    @property
    def costly_every(self) -> int:
        """Number of inputs for one that costly verbs are tried on."""
        return 40 if self.is_sample else 1

    @property
    def is_over(self) -> bool:
        """Whether the time of this start has passed."""
        return self.minutes is not None and time.monotonic() - self.began > 60 * self.minutes

    def drawn(self, sample: int, whole: int) -> int:
        """Return the number of inputs to draw: in the kept sample, and in the whole run."""
        return sample if self.is_sample else whole

    def limited(self, items: Iterator[Any]) -> list[Any]:
        """Return the items that match, or so many of them as the limit says, at equal distances."""
        found = [item for item in items if self.match in getattr(item, "key", "")]
        step = 1 if self.limit is None else max(1, -(-len(found) // self.limit))
        return found[::step]

    def has(self, part: str, name: str, verb: str = "") -> bool:
        """Return whether a trial is in the records."""
        return (part, name, verb) in self._done

    def add(self, part: str, name: str, verb: str = "", **facts: Any) -> None:
        """Add a trial, or a number of trials, to the records."""
        with self._lock:
            self._done.add((part, name, verb))
            add_record(self._file, {"part": part, "name": name, "verb": verb, **facts})
            self.num_added += 1
            if facts.get("fault"):
                self.num_faults += 1
                print(f"FAULT {part} {name} {verb}: {facts['fault']}", flush=True)

    def records(self) -> list[dict[str, Any]]:
        """Return all records."""
        return read_records(self._file)

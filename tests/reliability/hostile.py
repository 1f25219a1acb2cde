"""The parts that try hostile inputs: each input is tried with every verb that reads it, and judged."""

from __future__ import annotations

import math
import os
import queue
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .attacks import HONEST, Attack
from .run import Run
from .trial import MOST_SECONDS, Bench, Ended, copy_tree, fault_of
from .verbs import Verb, answers, verbs_of

OWN = ("made", "home", "tmp", "canary")
"""Folders of a place that a command may write to, or that are watched otherwise."""


@dataclass(frozen=True)
class Baseline:
    """Behaviour of a verb on the honest input."""

    ended: Ended
    answer: Any


class Hostile:
    """Runner of attacks by several workers, each with processes of its own."""

    def __init__(self, run: Run, part: str) -> None:
        self._run, self._part = run, part
        self._baselines: dict[tuple[str, str], Baseline] = {}
        self._lock = threading.Lock()

    def try_all(self, attacks: Iterable[Attack]) -> None:
        """Try all attacks that are not in the records."""
        waiting: queue.Queue[tuple[int, Attack]] = queue.Queue()
        for item in enumerate(attacks):
            waiting.put(item)
        workers = [threading.Thread(target=self._work, args=(waiting, number)) for number in range(self._run.workers)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def _work(self, waiting: queue.Queue[tuple[int, Attack]], number: int) -> None:
        bench = Bench(self._run.scratch / f"{self._part}-{number}")
        try:
            while not self._run.is_over:
                index, attack = waiting.get_nowait()
                self._try(bench, attack, index)
        except queue.Empty:
            pass
        finally:
            bench.close()

    def _verbs(self, attack: Attack, index: int) -> Iterator[Verb]:
        """Yield the verbs that read what an attack changes; costly ones for some of the attacks alone."""
        for verb in verbs_of(attack.reads, attack.base, self._run.honest):
            is_wanted = not attack.verbs or verb.name in attack.verbs
            if is_wanted and (not verb.is_costly or index % self._run.costly_every == 0):
                yield verb

    def _try(self, bench: Bench, attack: Attack, index: int) -> None:
        verbs = [verb for verb in self._verbs(attack, index) if not self._run.has(self._part, attack.key, verb.name)]
        if not verbs:
            return
        with bench.place() as place:
            fill(place, self._run.honest / attack.base)
            try:
                attack.make(place)
            except Exception as error:
                self._run.add(
                    self._part, attack.key, "", outcome="not made", error=f"{type(error).__name__}: {error}"[:200]
                )
                return
            for verb in verbs:
                self._judge(bench, attack, verb, place)

    def _judge(self, bench: Bench, attack: Attack, verb: Verb, place: Path) -> None:
        baseline = self._baseline(bench, attack.base, verb)
        if baseline.ended.code != 0:
            return
        ended = run_verb(bench, verb, attack.base, place)
        most_seconds = MOST_SECONDS + verb.is_costly * baseline.ended.seconds
        fault = fault_of(ended, baseline.ended.peak_bytes, most_seconds)
        is_same = None
        if fault is None and ended.code == 0 and baseline.answer is not None:
            is_same = answers(verb, ended.out) == baseline.answer
            if attack.answers == HONEST and not is_same:
                fault = f"another answer: {ended.out[:200]}"
        if fault is None and attack.is_legal and ended.code != 0:
            fault = f"a legal twin is refused: {ended.error[:300]}"
        outcome = "refused" if ended.code else "other model" if is_same is False else "honest answer"
        facts = {"code": ended.code, "seconds": ended.seconds, "legal": attack.is_legal, "error": ended.error[:160]}
        more_mib = (ended.peak_bytes - baseline.ended.peak_bytes) >> 20
        self._run.add(
            self._part,
            attack.key,
            verb.name,
            outcome="fault" if fault else outcome,
            fault=fault,
            more_mib=more_mib,
            **facts,
        )

    def _baseline(self, bench: Bench, base: str, verb: Verb) -> Baseline:
        with self._lock:
            if (base, verb.name) not in self._baselines:
                with bench.place() as place:
                    fill(place, self._run.honest / base)
                    ended = max(
                        (run_verb(bench, verb, base, place) for _ in range(2)), key=lambda each: each.peak_bytes
                    )
                answer = answers(verb, ended.out) if ended.code == 0 else None
                self._baselines[base, verb.name] = Baseline(ended, answer)
                self._run.add(
                    self._part,
                    f"honest/{base}",
                    verb.name,
                    outcome="honest" if ended.code == 0 else "honest input refused",
                    fault=fault_of(ended, ended.peak_bytes, math.inf),
                    code=ended.code,
                    seconds=ended.seconds,
                    error=ended.error[:300],
                )
            return self._baselines[base, verb.name]


def fill(place: Path, honest: Path) -> None:
    """Copy an honest place into a scratch folder."""
    for path in honest.iterdir():
        if path.is_dir():
            copy_tree(path, place / path.name)
        else:
            shutil.copy(path, place / path.name)


def run_verb(bench: Bench, verb: Verb, base: str, place: Path, **more: Any) -> Ended:
    """Run a verb with a new folder for its outputs and an empty cache. Files that it changed count as touched."""
    for name in ("made", "home", "tmp"):
        shutil.rmtree(place / name, ignore_errors=True)
        (place / name).mkdir()
    before = listed(place)
    ended = bench.run(verb.kind, place, verb.words(base), **more)
    after = listed(place)
    changed = sorted({path for path, _ in set(before.items()) ^ set(after.items())})
    if not changed:
        return ended
    return Ended(**{**vars(ended), "touched": (*ended.touched, *changed)})


def listed(place: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of all files of a place that a command must not change."""
    found = {}
    for folder, folders, files in os.walk(place):
        if Path(folder) == place:
            folders[:] = [name for name in folders if name not in OWN]
        for name in (*files, *folders):
            path = f"{folder}/{name}"
            status = os.lstat(path)
            found[path] = (status.st_size if name in files else 0, status.st_mtime_ns)
    return found

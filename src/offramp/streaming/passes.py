"""Passes of a streamed module that several threads call: one at a time, and which calls belong to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offramp.forks import Forked

PATIENCE_SECONDS = 5.0
"""Time in which a running pass must do something, so that another pass still waits for its end."""


class Passes(Forked):
    """One pass at a time. Calls of parts by other threads belong to the pass that runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.changing = threading.RLock()
        """Held while weights are exchanged, which every thread of a pass may do."""
        self.thread = self._native_thread = 0
        """The thread that runs a pass; 0: none does."""
        self.is_reading = False
        """True while the pass waits for weights."""
        self.is_shared = False
        """True if other threads have called parts of the pass."""
        self.is_forked = False
        """True in the child of a fork."""
        self.survive_forks()

    @property
    def is_own(self) -> bool:
        """True in the thread that runs the pass."""
        return self.thread == threading.get_ident()

    @contextmanager
    def begin(self) -> Iterator[bool]:
        """Wait until no pass runs, and yield True: the caller runs the next one.

        Yield False if the running pass does nothing in the meantime. It may be waiting for this call, such as one that
        the module makes of itself in another thread: the call belongs to it.
        """
        if self.is_own or not self._acquired():
            yield False
            return
        lock = self._lock
        try:
            self._native_thread = threading.get_native_id()
            self.is_reading = self.is_shared = False
            self.thread = threading.get_ident()
            yield True
        finally:
            self.thread = 0
            lock.release()

    def after_fork(self) -> None:
        """Forget a pass of another thread, which does not live on in the child."""
        self.changing = threading.RLock()
        self.is_forked, self._native_thread = True, threading.get_native_id()
        if not self.is_own:
            self._lock, self.thread = threading.Lock(), 0

    def _acquired(self) -> bool:
        while True:
            before = self._progress()
            if self._lock.acquire(timeout=PATIENCE_SECONDS):
                return True
            if self.is_reading or self._progress() != before:
                continue
            if self.thread:
                return False
            self._lock = threading.Lock()  # an interrupt has left it locked

    def _progress(self) -> tuple[int, str]:
        """Return the thread that runs the pass and, on Linux, what changes while it computes: its times and faults."""
        try:
            return self.thread, Path(f"/proc/self/task/{self._native_thread}/stat").read_text()
        except OSError:
            return self.thread, ""

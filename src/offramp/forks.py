"""Forks: what an object with locks or threads does so that it works in the child of a fork.

A fork copies all memory and only the thread that forks. The other threads are gone in the child, and locks that they
held are never released there.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import List

_FORKING = threading.RLock()
_OWNERS: weakref.WeakSet = weakref.WeakSet()
_PREPARED: List[Forked] = []
"""Objects that are prepared for the fork that is under way."""


class Forked:
    """An object with locks or threads. From `survive_forks` on the methods are called around each fork."""

    def survive_forks(self) -> None:
        """Call the methods around each fork, as long as the object lives."""
        _OWNERS.add(self)

    def before_fork(self) -> None:
        """Bring the state to a point where a copy of it is consistent."""

    def after_fork_in_parent(self) -> None:
        """Undo `before_fork`."""

    def after_fork(self) -> None:
        """Replace locks and forget threads, in the child."""
        raise NotImplementedError


def _prepare() -> None:
    _FORKING.acquire()
    _PREPARED[:] = list(_OWNERS)
    for owner in _PREPARED:
        owner.before_fork()


def _resume() -> None:
    for owner in _PREPARED:
        owner.after_fork_in_parent()
    _PREPARED.clear()
    _FORKING.release()


def _resume_in_child() -> None:
    global _FORKING  # noqa: PLW0603
    _FORKING = threading.RLock()
    for owner in _PREPARED:
        owner.after_fork()
    _PREPARED.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_prepare, after_in_parent=_resume, after_in_child=_resume_in_child)

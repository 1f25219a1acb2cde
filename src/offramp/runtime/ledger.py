"""Limits of a plan: the least of the budget and of what the system allows, less what other engines reserve.

A budget is that of the whole process. Each open engine reserves its growth, so that the next one is planned with what
is left, whether the weights of the first are in memory by then or not.
"""

from __future__ import annotations

import threading
import weakref
from typing import Callable, List, NamedTuple, Optional

from offramp.forks import Forked
from offramp.measure import address_space_bytes, available_bytes, container_bytes, read_memory

BUDGET, CONTAINER, MEMORY, ADDRESS_SPACE = "budget", "container", "available memory", "address space"
OTHER_BUDGET = "budget of another open engine"
GROUP_BYTES, GROUP_SHARE = 2 << 20, 256
"""Memory that a container is charged for beside the resident memory of the process: kernel stacks, slabs and pages of
files that no process maps, and page tables, as a share of its limit. Measured by bench/groups.py."""
STACK_BYTES = 3 * (8 << 20)
"""Address space of the stacks of the threads that an open engine starts: its reader, a second reader, a sampler."""


class Limit(NamedTuple):
    """Most resident memory of the process in bytes, and what sets it."""

    num_bytes: int
    source: str = BUDGET
    reserved_bytes: int = 0
    """Weights of other open engines, in memory or not yet."""
    margin_bytes: int = 0
    """Part of the limit of a container that is left to the kernel; not in `num_bytes`."""


class Share(NamedTuple):
    """Reservation of an open engine, in bytes."""

    weight_bytes: int
    activation_bytes: int
    budget_bytes: Optional[int]
    """Budget of the engine; None: only the limit of the system, which bounds all plans."""
    resident_bytes: Callable[[], int]
    """Method that returns how much of its weights is in memory. The ledger does not keep the object of the method."""
    measured: int
    """Moment at which the process was measured for it, by `Ledger.moment`."""


def group_margin_bytes(group_bytes: int) -> int:
    """Return what a container with this limit is charged for beside the resident memory of the process."""
    return min(GROUP_BYTES + group_bytes // GROUP_SHARE, group_bytes)


def group_bytes(process_bytes: int) -> int:
    """Return the least limit of a container in which a process may take `process_bytes`."""
    charged = process_bytes + GROUP_BYTES
    return charged + (charged - 1) // (GROUP_SHARE - 1)


def container_limit() -> Optional[Limit]:
    """Return what the container leaves to this process beside the kernel, or None without a container."""
    container = container_bytes()
    if container is None:
        return None
    margin = group_margin_bytes(container)
    return Limit(container - margin, CONTAINER, margin_bytes=margin)


def system_limit() -> Limit:
    """Return what the system allows this process: memory that it has or may still use, of its container, to map."""
    rss_bytes, container, mappable = read_memory().rss_bytes, container_limit(), address_space_bytes()
    limits = [Limit(available_bytes() + rss_bytes, MEMORY)]
    if container is not None:
        limits.append(container)
    if mappable is not None:
        limits.append(Limit(rss_bytes + max(mappable - STACK_BYTES, 0), ADDRESS_SPACE))
    return min(limits, key=lambda limit: limit.num_bytes)


def least_limit(budget: Optional[int]) -> Limit:
    """Return the least of a budget, if there is one, and of what the system allows."""
    system = system_limit()
    return system if budget is None or budget > system.num_bytes else Limit(budget)


class Ledger(Forked):
    """The shares of the open engines of this process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held between a plan and its reservation."""
        self.process_bytes: Optional[int] = None
        """Budget of the only engine of this process; None: others may follow, with larger budgets."""
        self._shares: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._moment = 0
        self.survive_forks()

    def after_fork(self) -> None:
        """Replace the lock, which another thread may have held."""
        self.lock = threading.RLock()

    def moment(self) -> int:
        """Return a number that is larger at each call."""
        self._moment += 1
        return self._moment

    def reserve(self, owner: object, share: Share) -> None:
        """Enter the share of an engine that opens. It is dropped with its owner, or by `release`."""
        self._shares[owner] = share._replace(resident_bytes=_weak(share.resident_bytes))

    def release(self, owner: object) -> None:
        """Drop the share of an engine, if it has one."""
        self._shares.pop(owner, None)

    def resident_bytes(self) -> int:
        """Return the weights of all open engines that are in memory."""
        return sum(share.resident_bytes() for share in self._all())

    def left(self, limit: Limit, measured: int) -> Limit:
        """Return a limit with what open engines have reserved, or the least budget of theirs.

        Args:
            measured: moment at which the process was measured, without their weights. Of engines that were measured
                later the activations count too: they were not in memory then.
        """
        shares = self._all()
        later = sum(share.activation_bytes for share in shares if share.measured > measured)
        least = min((share.budget_bytes for share in shares if share.budget_bytes is not None), default=limit.num_bytes)
        if least < limit.num_bytes:
            limit = Limit(least, OTHER_BUDGET)
        return limit._replace(reserved_bytes=sum(share.weight_bytes for share in shares) + later)

    def _all(self) -> List[Share]:
        return list(self._shares.values())


def _weak(method: Callable[[], int]) -> Callable[[], int]:
    """Return a function that calls a method of an object as long as that lives, and then returns 0."""
    reference = weakref.WeakMethod(method)

    def call() -> int:
        method = reference()
        return 0 if method is None else method()

    return call


LEDGER = Ledger()

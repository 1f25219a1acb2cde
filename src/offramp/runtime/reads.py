"""How shards are read: past the page cache (O_DIRECT) where memory is scarce, through it where it is not.

Buffered reads near a tight limit thrash: the kernel evicts the pages that the next pass needs and the process waits on
reclaim. Direct reads leave no page behind, but every pass pays the disk.
"""

from __future__ import annotations

import errno
import os

from offramp.errors import DamagedError
from offramp.runtime.slots import Slot
from offramp.store import Store

READS = ("auto", "direct", "buffered")


def choose_direct(store: Store, reads: str, growth_bytes: int, available_bytes: int) -> bool:
    """Whether to read with O_DIRECT.

    `auto`: when the store's pages and what the plan will take exceed what is available, and the file system can.
    """
    if reads not in READS:
        raise ValueError(f"reads must be one of {READS}, not {reads!r}")
    if reads == "buffered" or not hasattr(os, "O_DIRECT"):
        return False
    store_bytes = sum(shard.bytes for shard in store.manifest.shards.values())
    if reads == "auto" and store_bytes + growth_bytes <= available_bytes:
        return False
    return direct_works(store)


def direct_works(store: Store) -> bool:
    """Probe: read the smallest shard to its end, into an aligned buffer; EINVAL may come at open or at read."""
    whole = [shard for shard in store.manifest.shards.values() if shard.blocks is None]
    if not whole:
        return False
    shard = min(whole, key=lambda shard: shard.bytes)
    slot = Slot(-(-shard.bytes // 4096) * 4096)
    try:
        return store.read_shard(shard.name, slot.view, direct=True)[1]
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    except DamagedError:
        return False  # a short tail: the buffered read will tell whether the file is damaged

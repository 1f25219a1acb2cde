"""Choice of the way of reading: direct (O_DIRECT) if memory is scarce, otherwise buffered through the page cache.

Buffered reads near a memory limit thrash: the kernel evicts the pages that the next pass needs, and the process waits
for reclaim. Direct reads leave no pages behind, but every pass pays for the disk.
"""

from __future__ import annotations

import errno
import os

from offramp.errors import DamagedError
from offramp.runtime.config import READS
from offramp.runtime.slots import Slot
from offramp.store import Store


def choose_direct(store: Store, reads: str, growth_bytes: int, available_bytes: int) -> bool:
    """Return whether to read with O_DIRECT.

    `auto` chooses direct reads if the size of the store plus the planned growth exceeds the available memory and the
    file system supports them. Raises ValueError for an unknown value of `reads`.
    """
    if reads not in READS:
        raise ValueError(f"reads must be one of {READS}, got {reads!r}")
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
        return False  # a short tail: the buffered read reports whether the file is damaged

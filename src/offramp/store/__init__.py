"""Keep: the divided checkpoint as a folder.

This room knows byte offsets, file names and checksums. `runtime` decides when a shard is read, and `backends` compute.
"""

from offramp.store.checking import verify
from offramp.store.manifest import Manifest, Shard, Tensor
from offramp.store.reader import Store
from offramp.store.writer import StoreWriter

__all__ = ["Manifest", "Shard", "Store", "StoreWriter", "Tensor", "verify"]

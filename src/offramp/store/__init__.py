"""Keep: the divided checkpoint as a folder.

Knows byte offsets, file names and checksums; when a shard is read and what it computes is decided elsewhere.
"""

from offramp.store.checking import verify
from offramp.store.manifest import Manifest, Shard, Tensor
from offramp.store.reader import Store
from offramp.store.writer import StoreWriter

__all__ = ["Manifest", "Shard", "Store", "StoreWriter", "Tensor", "verify"]

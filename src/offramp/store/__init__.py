"""Keep: the divided checkpoint as a folder.

Knows byte offsets, file names and checksums, and nothing of when a shard is read or what it computes.
"""

from offramp.store.checking import verify
from offramp.store.manifest import Encoder, Manifest, Shard, Stage, Step, Tensor
from offramp.store.reader import Store
from offramp.store.writer import StoreWriter

__all__ = ["Encoder", "Manifest", "Shard", "Stage", "Step", "Store", "StoreWriter", "Tensor", "verify"]

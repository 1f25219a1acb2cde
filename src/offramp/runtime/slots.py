"""Page-aligned buffers for shards, allocated once and reused: what O_DIRECT and SIMD want, never the heap's."""

from __future__ import annotations

import mmap

import numpy as np


class Slot:
    """One anonymous, page-aligned buffer. Pages cost memory when they are first touched."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._map = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self._map)
        self.array = np.frombuffer(self._map, np.uint8)

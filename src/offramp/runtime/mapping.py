"""Shards mapped over the slots of a pool: the pages of a file take the place of a slot's memory, and nothing is copied.

The address of a slot stays the same, so views of it stay valid. A mapped page counts as resident memory as one that was
copied does, and the pages that a slot had before are unmapped.

A file that is cut under a mapping kills the process that reads it. A shard is therefore mapped only under a read lease,
which is held from before its digest is verified, in place, until its slot is released. When another process asks for a
file, all mapped shards in use are replaced by copies, the leases are given back, and from then on shards are copied.
The reader thread looks for that before each read and while it waits.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import sys
import threading
from queue import Empty, SimpleQueue
from typing import Callable, Dict, Iterable, Optional, Sequence, Tuple

import numpy as np

from offramp.runtime.ring import LIVENESS_SECONDS
from offramp.runtime.slots import PAGE, BufferPool, Slot, pages_of
from offramp.store import Store, files, pages
from offramp.store.leases import LeasedFile, lease_obstacle
from offramp.store.reader import READ_CHUNK_BYTES, most_open, open_shard, verify_mapped

TEND_SECONDS = 0.5
"""Time between two looks for a lease that another process waits for, while leases are held."""
Copy = Callable[[str, memoryview, Callable[[], bool]], Tuple[int, bool]]
"""Function that reads a shard by copying it, as `Ring` has it."""


class _Files:
    """Descriptors of shards on which leases are taken; as many stay open as `Store` keeps open."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._files: Dict[str, LeasedFile] = {}

    def __getitem__(self, shard: str) -> LeasedFile:
        if shard not in self._files:
            self._files[shard] = LeasedFile(open_shard(self._store, shard))
        return self._files[shard]

    def end_lease(self, shard: str) -> None:
        """Give back the lease of a shard."""
        self._files[shard].end_lease()
        if len(self._files) > most_open():
            self._files.pop(shard).close()

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()
        self._files.clear()


class MappedPool(BufferPool):
    """A pool whose slots are filled by mapping. The reader thread alone acquires, reads, and waits."""

    def __init__(self, store: Store, pool: BufferPool, copy: Copy) -> None:
        self._store, self._pool, self._copy = store, pool, copy
        self._files = _Files(store)
        self._used: Dict[Slot, Optional[Tuple[str, int]]] = {}
        """Slots in use; for one that maps a shard its name and the bytes of its pages. Its file has a lease."""
        self._lock = threading.Lock()
        """Held while leases are given back: no page of a slot in use may lose its lease before it is copied."""
        self._is_frozen = False
        self._taken: Optional[Slot] = None
        self.obstacle: Optional[str] = None
        """Why shards are no longer mapped, or None."""

    def read(self, shard: str, view: memoryview, cancelled: Callable[[], bool]) -> Tuple[int, bool]:
        """Bring a shard into memory, as a `Reader` of the ring: into the slot that was acquired for it, or, if it is a
        resident, by copying it to `view`.
        """
        taken, self._taken = self._taken, None
        if taken is None:
            return self._copy(shard, view, cancelled)
        self.tend()
        return self.fill(shard, taken, cancelled)

    def wait(self, wakeups: SimpleQueue) -> None:
        """Wait for an item of a queue, and look after the leases meanwhile."""
        has_leases = True
        while has_leases:
            with contextlib.suppress(OSError):  # no memory for copies: the next look tries again
                has_leases = self.tend()
            if has_leases:
                with contextlib.suppress(Empty):
                    wakeups.get(timeout=TEND_SECONDS)
                    return
        wakeups.get()

    def fill(self, shard: str, slot: Slot, cancelled: Callable[[], bool]) -> Tuple[int, bool]:
        """Map a shard over the start of its slot, or copy it there where that is impossible.

        Returns (bytes read, complete). Raises DamagedError for another size or digest than the manifest has.
        """
        if self.obstacle is None:
            file, is_mapped = self._files[shard], False
            obstacle = file.take()
            try:
                if obstacle is None:
                    num_bytes, is_mapped = self._map(file, shard, slot, cancelled)
                    return num_bytes, is_mapped
            except OSError as error:  # if it is the disk, the read that follows tells
                obstacle = f"a shard cannot be mapped ({error.strerror})"
            finally:
                if not is_mapped:
                    self._files.end_lease(shard)
            self._stop(obstacle, slot)
        return self._copy(shard, slot.view, cancelled)

    def _map(self, file: LeasedFile, shard: str, slot: Slot, cancelled: Callable[[], bool]) -> Tuple[int, bool]:
        """Map a leased file, bring its pages into memory, and verify them. Returns (bytes read, complete)."""
        listed, done = self._store.manifest.shards[shard], 0
        num_bytes, size = listed.bytes, pages_of(listed.bytes) * PAGE
        files.require_size(file.fd, num_bytes, self._store.path / listed.file)
        pages.map_file(slot.address, file.fd, size)
        while done < size:
            if cancelled():
                return done, False
            if not file.is_held:
                raise OSError(errno.EAGAIN, "another process opens it for writing")
            pages.populate(slot.address + done, min(READ_CHUNK_BYTES, size - done))
            done += min(READ_CHUNK_BYTES, size - done)
        if not verify_mapped(self._store, shard, file.fd, slot.view[:num_bytes], cancelled):
            return num_bytes, False
        with self._lock:
            self._used[slot] = shard, size
        return num_bytes, True

    def tend(self) -> bool:
        """Give way to a process that waits for a leased file. Return whether leases are held."""
        with self._lock:
            leased = [self._files[mapped[0]] for mapped in self._used.values() if mapped is not None]
            are_held = all(file.is_held for file in leased)  # under the lock: the engine gives leases back, too
        if not are_held:
            self._stop("another process opened a file of the store for writing")
        return bool(leased) and are_held

    def before_fork(self) -> None:
        """Replace all mapped shards in use by copies and give back their leases, which the child would have as well."""
        self._is_frozen = self._lock.acquire(timeout=LIVENESS_SECONDS)
        if self._is_frozen:
            with contextlib.suppress(OSError):  # the child tries again
                self._make_all_own()

    def after_fork_in_parent(self) -> None:
        """Release the lock."""
        if self._is_frozen:
            self._lock.release()

    def after_fork(self) -> None:
        """Close the files, whose leases are those of the parent. Slots in use become copies, if they are not yet."""
        self._lock, self._taken = threading.Lock(), None
        for slot, mapped in self._used.items():
            if mapped is not None:
                pages.make_own(slot.address, mapped[1])
            self._used[slot] = None
        self._files.close()

    def fits(self, shard: str) -> bool:
        """Return whether a buffer for the shard is available now."""
        return self._pool.fits(shard)

    def acquire(self, shard: str) -> Slot:
        """Return a buffer for a shard; `fits` must hold."""
        with self._lock:
            slot = self._taken = self._pool.acquire(shard)
            self._used[slot] = None
        return slot

    def release(self, slot: Slot) -> None:
        """Return a slot to the pool, and the lease of the shard that it maps."""
        with self._lock:
            self._end_use(slot)
            self._pool.release(slot)

    def discard(self, slot: Slot) -> None:
        """Discard a slot that a caller still references, with a copy of the shard that it maps."""
        with self._lock:
            self._own(slot)
            del self._used[slot]
            self._pool.discard(slot)

    def clear(self, kept: Optional[Slot]) -> None:
        """Release all slots except `kept`, the one that is being filled, with their leases."""
        with self._lock:
            for slot in [slot for slot in self._used if slot is not kept]:
                self._end_use(slot)
            self._pool.clear(kept)

    def pages(self) -> Iterable[mmap.mmap]:
        """Return the mappings in which all buffers lie."""
        return self._pool.pages()

    def close(self) -> None:
        """Drop all buffers, give back all leases, and close the files."""
        self.clear(None)
        self._pool.close()
        self._files.close()

    def _end_use(self, slot: Slot) -> None:
        mapped = self._used.pop(slot, None)
        if mapped is not None:
            self._files.end_lease(mapped[0])

    def _own(self, slot: Slot) -> None:
        """Replace a mapped shard by a copy, then give back its lease. What follows it in the slot is emptied."""
        mapped = self._used.get(slot)
        if mapped is None:
            return
        shard, size = mapped
        pages.make_own(slot.address, size)
        rest = pages_of(slot.num_bytes) * PAGE - size
        if rest:
            pages.map_memory(slot.address + size, rest)
        self._used[slot] = None
        self._files.end_lease(shard)

    def _make_all_own(self) -> None:
        for slot in self._used:
            self._own(slot)

    def _stop(self, obstacle: str, filling: Optional[Slot] = None) -> None:
        """Copy shards from now on. No page of a file stays in the pool: what is copied there would be lost with it.

        `filling` is the slot that is being filled, if any: its content is not needed.
        """
        with self._lock:
            self._make_all_own()
            kept = [(slot.address, pages_of(slot.num_bytes) * PAGE) for slot in self._used if slot is not filling]
            for buffer in self._pool.pages():
                _empty(buffer, kept)
            self.obstacle = obstacle


def _empty(buffer: mmap.mmap, kept: Sequence[Tuple[int, int]]) -> None:
    """Replace the pages of a buffer by empty ones, except those of the spans `kept` (address, bytes)."""
    address = np.frombuffer(buffer, np.uint8).ctypes.data
    last = address + pages_of(len(buffer)) * PAGE
    for start, size in (*sorted(span for span in kept if address <= span[0] < last), (last, 0)):
        if start > address:
            pages.map_memory(address, start - address)
        address = max(address, start + size)


def mapping_obstacle(store: Store, shards: Sequence[str]) -> Optional[str]:
    """Return why streamed shards of a store cannot be mapped, or None. One of them is mapped to find out."""
    if not shards:
        return "all weights stay in memory"
    if not all(store.manifest.layouts[name].is_file for name in shards):
        return "weights of fp16 are upcast while they are read"
    if not sys.platform.startswith("linux"):
        return "this system has no read leases"
    shard = min(shards, key=lambda name: store.manifest.shards[name].bytes)
    file = LeasedFile(open_shard(store, shard))
    try:
        return lease_obstacle(file.fd) or file.take() or _probe(file)
    finally:
        file.end_lease()
        file.close()


def _probe(file: LeasedFile) -> Optional[str]:
    """Map the start of a file, and return why that does not work, or None."""
    slot = Slot(PAGE)
    try:
        pages.map_file(slot.address, file.fd, PAGE)
        pages.populate(slot.address, PAGE)
    except (OSError, AttributeError, ValueError) as error:  # a kernel before 5.14, or a C library without a function
        return f"this system does not map shards ({error})"
    data = os.pread(file.fd, PAGE, 0)
    return None if slot.view[: len(data)] == data else "this system does not map shards"

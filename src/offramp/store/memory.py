"""Cache of verification results, so that `verify="first"` hashes a file once per change instead of once per process.

A file is identified by (device, inode, size, mtime_ns, ctime_ns); programs can set all of these except ctime. Each
store has one small file, replaced atomically. If two processes write at once, one set of results is lost; this costs
hashing but is never wrong. An unwritable cache is not an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Dict, Optional

from offramp.errors import UsageError
from offramp.program.checks import parse
from offramp.store.files import NewFile, absolute, read_plain, write_all

_MAX_BYTES = 16 << 20
"""Largest cache that is read. The blocks of a table of 100 GiB take 3 MiB."""
_TICK_NANOSECONDS = 100_000_000
"""Upper bound on the resolution of file timestamps. Two changes within this time can have equal timestamps."""
_COARSE_TICK_NANOSECONDS = 2_000_000_000
"""Upper bound on the resolution where timestamps are whole seconds, as on FAT and ext3."""


def cache_folder() -> Path:
    """Return the cache folder: `${OFFRAMP_CACHE:-$XDG_CACHE_HOME/offramp}`."""
    home = os.path.expanduser("~")  # noqa: PTH111 - pathlib raises where a user has no home
    base = os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache"
    return Path(os.environ.get("OFFRAMP_CACHE") or f"{base}/offramp")


def identity_of(fd: int) -> Optional[str]:
    """Return the identity of the file behind `fd`, or None if the file is so new that a change might not be visible.

    Must be called before the file is read. A change far in the future was made under another clock: it is not new.
    """
    stat = os.fstat(fd)
    tick = _TICK_NANOSECONDS if stat.st_ctime_ns % 1_000_000_000 else _COARSE_TICK_NANOSECONDS
    if abs(time.time_ns() - stat.st_ctime_ns) < tick:
        return None
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


class VerifiedMemory:
    """Record of the shards and blocks of one store that matched their digests."""

    def __init__(self, store: Path, manifest_bytes: bytes) -> None:
        key = hashlib.sha256(os.fsencode(os.path.realpath(str(store))) + b"\0" + manifest_bytes).hexdigest()
        self._path = absolute(cache_folder()) / "verified" / (key + ".json")
        self._verified = self._load()
        self._saved = dict(self._verified)

    def knows(self, shard: str, identity: Optional[str]) -> bool:
        """Return whether the whole file of `shard` was verified with this identity."""
        return identity is not None and self._verified.get(shard) == identity

    def remember(self, shard: str, identity: Optional[str]) -> None:
        """Record that the whole file matched its digest."""
        if identity is not None:
            self._verified[shard] = identity

    def blocks(self, shard: str, identity: Optional[str], count: int) -> bytearray:
        """Return one byte per block of the file: 1 if the block was verified with this identity, otherwise 0."""
        recorded, _, text = self._verified.get(_blocks_key(shard), "").partition(" ")
        try:
            bitmap = bytearray.fromhex(text) if recorded == identity else bytearray()
        except ValueError:
            bitmap = bytearray()
        return bitmap if len(bitmap) == count else bytearray(count)

    def remember_blocks(self, shard: str, identity: Optional[str], bitmap: bytearray) -> None:
        """Record the current state of the bitmap returned by `blocks`."""
        if identity is not None:
            self._verified[_blocks_key(shard)] = f"{identity} {bitmap.hex()}"

    def save(self) -> None:
        """Write the cache if it changed. Errors are ignored."""
        if self._verified == self._saved:
            return
        with contextlib.suppress(OSError, UsageError):  # without a cache the next process hashes again
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with NewFile(self._path) as file:
                write_all(file.fd, json.dumps(self._verified).encode())
                file.finish(flush=False)
            self._saved = dict(self._verified)

    def _load(self) -> Dict[str, str]:
        try:
            return parse(Dict[str, str], read_plain(self._path, _MAX_BYTES))
        except (OSError, ValueError):  # absent, unreadable or incomplete: start empty
            return {}


def _blocks_key(shard: str) -> str:
    return shard + " blocks"  # names of shards contain no space

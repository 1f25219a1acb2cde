"""What has been verified, remembered in the cache folder, so that `first` hashes a file once and not once a process.

A file is recognised by (device, inode, size, mtime_ns, ctime_ns); programs can set all of these but ctime. One small
file a store, replaced atomically; two processes that write at once lose one's memory, never its truth. An unwritable
cache is no error: then nothing is remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Dict, Optional

_TICK_NANOSECONDS = 100_000_000
"""File systems stamp times by a clock of some milliseconds: within a tick, two states of a file look the same."""


def cache_folder() -> Path:
    """`${OFFRAMP_CACHE:-$XDG_CACHE_HOME/offramp}`."""
    home = os.path.expanduser("~")  # noqa: PTH111 - pathlib raises where a user has no home
    base = os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache"
    return Path(os.environ.get("OFFRAMP_CACHE") or f"{base}/offramp")


def identity_of(fd: int) -> Optional[str]:
    """By what the file behind `fd` is recognised as unchanged.

    Take it before the file is read. None while it is so new that a change would not show.
    """
    stat = os.fstat(fd)
    if time.time_ns() - stat.st_ctime_ns < _TICK_NANOSECONDS:
        return None
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


class VerifiedMemory:
    """Which shards and blocks of one store have been seen to match their digests."""

    def __init__(self, store: Path, manifest_bytes: bytes) -> None:
        key = hashlib.sha256(os.fsencode(os.path.realpath(str(store))) + b"\0" + manifest_bytes).hexdigest()
        self._path = cache_folder() / "verified" / (key + ".json")
        self._seen = self._load()
        self._changed = False

    def knows(self, shard: str, identity: Optional[str]) -> bool:
        """Whether the whole file of `shard` was verified when it had this identity."""
        return identity is not None and self._seen.get(shard) == identity

    def remember(self, shard: str, identity: Optional[str]) -> None:
        """The whole file matched."""
        if identity is not None:
            self._put(shard, identity)

    def blocks(self, shard: str, identity: Optional[str], count: int) -> bytearray:
        """One byte a block of the file: 1 where it was verified."""
        known, _, text = self._seen.get(_blocks_key(shard), "").partition(" ")
        try:
            bitmap = bytearray.fromhex(text) if known == identity else bytearray()
        except ValueError:
            bitmap = bytearray()
        return bitmap if len(bitmap) == count else bytearray(count)

    def remember_blocks(self, shard: str, identity: Optional[str], bitmap: bytearray) -> None:
        """Keep what `blocks` gave for this identity, as it is now."""
        if identity is not None:
            self._put(_blocks_key(shard), f"{identity} {bitmap.hex()}")

    def save(self) -> None:
        """Write the memory if it changed."""
        if not self._changed:
            return
        with contextlib.suppress(OSError):  # a read-only or full cache only costs the next process some hashing
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._replace(json.dumps(self._seen))
            self._changed = False

    def _replace(self, text: str) -> None:
        fd, temporary = tempfile.mkstemp(dir=str(self._path.parent))
        try:
            with os.fdopen(fd, "w") as stream:
                stream.write(text)
            Path(temporary).replace(self._path)
        except BaseException:
            Path(temporary).unlink()
            raise

    def _put(self, key: str, value: str) -> None:
        self._changed |= self._seen.get(key) != value
        self._seen[key] = value

    def _load(self) -> Dict[str, str]:
        try:
            tree = json.loads(self._path.read_text())
        except (OSError, ValueError, RecursionError):  # absent, unreadable or torn: nothing is remembered
            return {}
        return {key: value for key, value in tree.items() if isinstance(value, str)} if isinstance(tree, dict) else {}


def _blocks_key(shard: str) -> str:
    return shard + " blocks"  # no name of a shard has a space

"""Reading a store: whole shards into buffers of the caller, and rows of gathered tables, all verified by digest.

When a shard is read and how long it stays in memory
is decided by `runtime`, which may also map its file.
"""

from __future__ import annotations

import contextlib
import copyreg
import hashlib
import os
import resource
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, Optional, Tuple

import numpy as np

from offramp.errors import DamagedError, StoreError, UsageError, require_folder
from offramp.forks import Forked
from offramp.program.dtypes import ALIGNMENT_BYTES, DTYPES, HALF
from offramp.program.program import Program
from offramp.store import files, pages
from offramp.store import manifest as m
from offramp.store.folders import Folder, is_being_replaced
from offramp.store.memory import VerifiedMemory, identity_of
from offramp.store.parsing import loads, parse_labels
from offramp.store.safetensors import PAGE_BYTES, parse_header
from offramp.store.upcasting import Staging, place_chunk

READ_CHUNK_BYTES = 2 << 20
"""Bytes per system call; a cancelled read stops at the next multiple."""
Cancelled = Callable[[], bool]
"""Function that returns whether to stop reading. `bool` itself always returns False."""
ROWS_AT_ONCE = 64
"""Rows of a table that are copied or upcast at a time, through an array of this size."""
MOST_OPEN = 64
"""Maximum number of files of shards that stay open between reads. An open of a local file takes microseconds."""
VERIFY = ("always", "first", "never")
_REMEDY = "divide the model again"


def aligned_bytes(num_bytes: int) -> np.ndarray:
    """Return new memory, uint8 [num_bytes], aligned as tensors are."""
    room = np.empty(num_bytes + ALIGNMENT_BYTES, np.uint8)
    start = -room.ctypes.data % ALIGNMENT_BYTES
    return room[start : start + num_bytes]


class Store(Forked):
    """An open store. Shards may be read from any thread; rows from one thread at a time. A pickle names its folder.

    Until it is closed a division does not delete its files. What is read after that opens the folder again. Files of a
    store that is not closed are closed with the object.
    """

    def __init__(self, path: os.PathLike | str, verify: str = "first") -> None:
        if verify not in VERIFY:
            raise ValueError(f"verify must be one of {VERIFY}, not {verify!r}")
        self.folder, self.policy = Folder(path), verify
        self.path = self.folder.path
        data = read_manifest_bytes(self.path, self.folder)
        self.manifest = loads(data, self.path / m.FILE_NAME)
        self.digest = hashlib.sha256(data).hexdigest()
        self._verified = VerifiedMemory(self.path, data)
        self._fds: Dict[Tuple[str, bool], int] = {}
        weakref.finalize(self, _close_all, self._fds).atexit = False  # a thread may be reading then
        self._opening = threading.Lock()
        self._bitmaps: Dict[str, Tuple[Optional[str], bytearray]] = {}
        self._digests: Dict[str, bytes] = {}
        self._helper: Optional[ThreadPoolExecutor] = None
        self._staging = Staging()
        self.survive_forks()

    def after_fork(self) -> None:
        """Forget the thread that reads second halves, and the lock that it may have held."""
        self._opening, self._helper, self._staging = threading.Lock(), None, Staging()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def program(self) -> Program:
        """The computation of the store."""
        return self.manifest.program

    @cached_property
    def labels(self) -> Tuple[str, ...]:
        """Labels in the order of their ids, verified. Raises DamagedError."""
        file, output = self.manifest.labels, self.program.output
        if file is None or output is None:
            return self.manifest.inline_labels
        return parse_labels(self.read_file(file), output.num_labels, self.path / file.file)

    def close(self) -> None:
        """Close all files, and remember which shards and blocks were verified."""
        for name, (identity, bitmap) in self._bitmaps.items():
            self._verified.remember_blocks(name, identity, bitmap)
        self._verified.save()
        if self._helper is not None:
            self._helper.shutdown()
            self._helper = None
        _close_all(self._fds)
        self.folder.close()
        self._bitmaps.clear()

    def read_file(self, file: m.File) -> bytes:
        """Return the verified content of a small file. Raises StoreError for a graph that refers to another file."""
        with _folder_of(self) as dir_fd:
            data = files.read_small(self.path, file, dir_fd=dir_fd)
        if isinstance(file, m.Graph):
            require_self_contained(data, self.path / file.file)
        return data

    def read_shard(
        self, name: str, buffer: memoryview, *, direct: bool = False, halves: bool = False, cancelled: Cancelled = bool
    ) -> Tuple[int, bool]:
        """Read the whole file of shard `name` to the start of `buffer`, as `Manifest.layouts` has it in memory.

        Returns (bytes read, complete). Raises DamagedError where the file is short or its digest differs.

        Args:
            direct: bypass the page cache; the buffer must be page-aligned and a multiple of 4096 bytes long.
            halves: let two threads copy, as in direct reads.
            cancelled: called between chunks; the read stops when it returns True.
        """
        shard, needed = self.manifest.shards[name], self.manifest.layouts[name].num_bytes
        needed = -(-needed // PAGE_BYTES) * PAGE_BYTES if direct else needed
        if len(buffer) < needed:
            raise ValueError(f"shard {name} takes {needed} bytes, the buffer has {len(buffer)}")
        with self.opened(name, direct) as fd:
            identity, check = self._identify(name, fd)
            if (direct or halves) and not check and shard.bytes > 2 * READ_CHUNK_BYTES:
                return self._read_halves(shard, fd, buffer[:needed], cancelled)
            digest = hashlib.sha256() if check else None
            num_bytes, complete = self._read_span(shard, fd, buffer[:needed], (0, shard.bytes), cancelled, digest)
        if digest is not None and complete:
            self._require(digest.hexdigest() == shard.sha256, shard, "sha256 differs from the manifest")
            self._verified.remember(name, identity)
        return num_bytes, complete

    def _identify(self, name: str, fd: int) -> Tuple[Optional[str], bool]:
        """Return the identity of a shard's file, and whether its digest must be verified."""
        identity = identity_of(fd)
        is_known = self.policy == "first" and self._verified.knows(name, identity)
        return identity, self.policy != "never" and not is_known

    def _read_halves(self, shard: m.Shard, fd: int, buffer: memoryview, cancelled: Cancelled) -> Tuple[int, bool]:
        """Read both halves of a file at once. Returns (bytes read, complete).

        A disk serves two direct readers faster than one, and two threads that copy from the page cache disturb the
        threads that compute for half as long.
        """
        middle = shard.bytes // 2 // READ_CHUNK_BYTES * READ_CHUNK_BYTES
        if self._helper is None:
            self._helper = ThreadPoolExecutor(1, "offramp-second-half")
        second = self._helper.submit(self._read_span, shard, fd, buffer, (middle, shard.bytes), cancelled)
        try:
            num_bytes, complete = self._read_span(shard, fd, buffer, (0, middle), cancelled)
        finally:
            wait([second])  # even after an error, so that no thread writes to the buffer any more
        more_bytes, more_complete = second.result()
        return num_bytes + more_bytes, complete and more_complete

    def _read_span(
        self, shard: m.Shard, fd: int, view: memoryview, span: Tuple[int, int], cancelled: Cancelled, digest: Any = None
    ) -> Tuple[int, bool]:
        """Read the bytes of `span` into `view` and update `digest`. Returns (bytes read, complete)."""
        (offset, end), layout = span, self.manifest.layouts[shard.name]
        is_cold = pages.is_cold(fd, offset, end)
        with contextlib.nullcontext() if layout.is_file else self._staging.buffer() as staging:
            while offset < end:
                if cancelled():
                    return offset - span[0], False
                if is_cold:
                    pages.read_in(fd, offset)
                chunk = view[offset : offset + READ_CHUNK_BYTES] if staging is None else staging
                got = self._read_chunk(shard, fd, chunk, offset, end)
                if staging is not None:
                    got -= got % 4 if offset + got < end else 0  # no item is split
                    place_chunk(shard, layout, chunk[:got], offset, view)
                if digest is not None:
                    digest.update(chunk[:got])
                offset += got
        return offset - span[0], True

    def _read_chunk(self, shard: m.Shard, fd: int, chunk: memoryview, offset: int, end: int) -> int:
        """Read at most one chunk from `offset` on. Returns the number of bytes before `end` that were read."""
        with files.translate_read_errors(self.path / shard.file):
            got = os.preadv(fd, [chunk], offset)
        got = min(got, end - offset)
        self._require(got > 0, shard, f"file ends at byte {offset} of {shard.bytes}")
        return got

    def read_tensor(self, name: str, tensor: m.Tensor) -> bytearray:
        """Return the bytes of one tensor of shard `name`; the whole file is verified first, as for `read_shard`."""
        shard = self.manifest.shards[name]
        where, data = self.path / shard.file, bytearray(tensor.num_bytes)
        with self.opened(name) as fd:
            identity, check = self._identify(name, fd)
            if check:
                with files.translate_read_errors(where):
                    self._require(files.sha256_of(fd) == shard.sha256, shard, "sha256 differs from the manifest")
                self._verified.remember(name, identity)
            files.read_exactly(fd, [(memoryview(data), shard.data_start + tensor.offset)], where)
        return data

    def gather(
        self,
        shard_name: str,
        role: str,
        rows_N: np.ndarray,
        *,
        upcasts: bool = False,
        allocate: Callable[[int], np.ndarray] = aligned_bytes,
    ) -> Tuple[np.ndarray, int]:
        """Return rows of a gathered table [N, width] in the order of `rows_N`, and the bytes read.

        Only the blocks that contain these rows are read and verified. `upcasts`: rows of F16 are returned as float32.
        `allocate` returns the memory of the result, uint8 [num_bytes], by its size. Gathering takes no memory beside
        it, except for the distinct rows of F16.
        """
        shard = self.manifest.shards[shard_name]
        tensor = next(tensor for tensor in shard.tensors if tensor.role == role)
        height, width = tensor.shape
        unique_U = np.array(sorted(set(rows_N.tolist())), rows_N.dtype)  # np.unique imports numpy.ma, at 10 ms
        inverse_N = np.searchsorted(unique_U, rows_N)
        if len(unique_U) and (unique_U[0] < 0 or unique_U[-1] >= height):
            raise ValueError(f"{tensor.name}: rows {unique_U[0]}..{unique_U[-1]} requested, the table has {height}")
        dtype, is_upcast = DTYPES[tensor.dtype], upcasts and tensor.dtype == HALF
        name = dtype.numpy or f"u{dtype.item_bytes}"  # rows of a dtype that NumPy does not have are unsigned integers
        places_U = np.arange(len(unique_U))
        if not is_upcast:  # each row is read to its first place in the result
            places_U[inverse_N[::-1]] = np.arange(len(rows_N))[::-1]
        shape, make = (len(unique_U if is_upcast else rows_N), width), aligned_bytes if is_upcast else allocate
        found_MW = _rows(shape, np.dtype(name), make)
        start, row_bytes = shard.data_start + tensor.offset, tensor.num_bytes // height
        view, where = found_MW.reshape(-1).view(np.uint8).data, self.path / shard.file
        with self.opened(shard_name) as fd:
            read = len(unique_U) * row_bytes + self._check_blocks(shard, fd, start, row_bytes, unique_U)
            pieces = (
                (view[place * row_bytes : (place + count) * row_bytes], start + row * row_bytes)
                for place, row, count in _runs(unique_U, places_U)
            )
            files.read_exactly(fd, pieces, where)
        from_N = places_U[inverse_N]
        rows_NW = _rows((len(rows_N), width), np.dtype(np.float32), allocate) if is_upcast else found_MW
        is_missing_N = is_upcast | (from_N != np.arange(len(rows_N)))
        for first in range(0, len(rows_N), ROWS_AT_ONCE):
            chunk = slice(first, first + ROWS_AT_ONCE)
            if is_missing_N[chunk].any():
                rows_NW[chunk] = found_MW.take(from_N[chunk], 0)
        return rows_NW, read

    @contextlib.contextmanager
    def opened(self, name: str, direct: Optional[bool] = False) -> Iterator[int]:
        """Context manager of the descriptor of a shard's file, which stays open if few others do. Raises StoreError.

        `direct`: it reads past the page cache; None: either, as it may be open already.
        A descriptor that stays open is never closed for another one: a thread may be reading from it.
        """
        with self._opening:
            direct = (name, True) in self._fds if direct is None else direct
            fd = self._fds.get((name, direct))
            if fd is None:
                fd = self._open(self.manifest.shards[name], direct)
                if len(self._fds) < most_open():
                    self._fds[name, direct] = fd
            stays = (name, direct) in self._fds
        try:
            yield fd
        finally:
            if not stays:
                os.close(fd)

    def _open(self, shard: m.Shard, direct: bool) -> int:
        with _folder_of(self) as dir_fd:
            fd = files.open_regular(self.path, shard.file, os.O_DIRECT if direct else 0, dir_fd=dir_fd)
        try:
            files.require_size(fd, shard.bytes, self.path / shard.file)
        except BaseException:
            os.close(fd)
            raise
        if shard.blocks is not None and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # only advice: rows are scattered, readahead would fetch megabytes
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return fd

    def _check_blocks(self, shard: m.Shard, fd: int, start: int, row_bytes: int, rows_U: np.ndarray) -> int:
        """Verify the blocks that contain these rows, unless they are known. Returns the bytes read for it."""
        if self.policy == "never" or not len(rows_U):
            return 0
        first_U = (start + rows_U * row_bytes) // m.BLOCK_BYTES
        last_U = (start + (rows_U + 1) * row_bytes - 1) // m.BLOCK_BYTES
        spans = [range(first, last + 1) for first, last in zip(first_U.tolist(), last_U.tolist())]
        bitmap, digests, read = self._blocks_of(shard, fd), self._digests[shard.name], 0
        for block in sorted(set().union(*spans)):
            if bitmap[block] and self.policy == "first":
                continue
            with files.translate_read_errors(self.path / shard.file):
                data = os.pread(fd, m.BLOCK_BYTES, block * m.BLOCK_BYTES)
            matches = hashlib.sha256(data).digest() == digests[block * 32 : block * 32 + 32]
            self._require(matches, shard, f"sha256 of block {block} differs from the manifest")
            bitmap[block] = 1
            read += len(data)
        return read

    def _blocks_of(self, shard: m.Shard, fd: int) -> bytearray:
        """Return one byte per block of the file in its present state: 1 if it has been verified."""
        assert shard.blocks is not None
        identity, count = identity_of(fd), shard.num_blocks
        if shard.name not in self._digests:
            digests = self.read_file(shard.blocks)
            self._require(len(digests) == 32 * count, shard, f"{len(digests)} bytes of digests for {count} blocks")
            self._digests[shard.name] = digests
        known = self._bitmaps.get(shard.name)
        if known is None or known[0] != identity:
            self._bitmaps[shard.name] = identity, self._verified.blocks(shard.name, identity, count)
        return self._bitmaps[shard.name][1]

    def _require(self, fine: bool, shard: m.Shard, what: str) -> None:
        if not fine:
            raise DamagedError(what, self.path / shard.file, _REMEDY)


copyreg.pickle(Store, lambda store: (Store, (store.path, store.policy)))


def _close_all(fds: Dict[Tuple[str, bool], int]) -> None:
    """Close the files of a store, and forget them."""
    while fds:
        os.close(fds.popitem()[1])


@contextlib.contextmanager
def _folder_of(store: Store) -> Iterator[int]:
    """Context manager of the descriptor of a store's folder.

    Raises StoreError if another store has taken its place after `close`, or where the file system has no locks.
    """
    opened = store.folder
    is_same = opened.is_open or hashlib.sha256(read_manifest_bytes(store.path, opened)).hexdigest() == store.digest
    try:
        if is_same:
            yield opened.fd
            return
    except DamagedError:
        if not opened.is_replaced:
            raise
    if not is_same:
        opened.close()
    raise StoreError("another store has taken the place of the one that was opened", store.path, "open it again")


def most_open() -> int:
    """Return how many files of shards may stay open: a quarter of what the process may open, and at most MOST_OPEN."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_OPEN if limit == resource.RLIM_INFINITY else min(MOST_OPEN, limit // 4)


def open_shard(store: Store, name: str) -> int:
    """Return a new descriptor of a shard's file, which the caller closes. Raises StoreError."""
    with store._opening:
        return store._open(store.manifest.shards[name], direct=False)


def verify_mapped(store: Store, name: str, fd: int, content: memoryview, cancelled: Cancelled = bool) -> bool:
    """Verify the content of a shard in memory, unless its file needs no hashing. Raises DamagedError.

    Returns False if it was cancelled. The caller makes sure that neither can change meanwhile.
    """
    shard = store.manifest.shards[name]
    identity, check = store._identify(name, fd)
    if not check:
        return True
    digest = hashlib.sha256()
    for start in range(0, shard.bytes, READ_CHUNK_BYTES):
        if cancelled():
            return False
        digest.update(content[start : start + READ_CHUNK_BYTES])
    is_same = digest.hexdigest() == shard.sha256
    store._require(is_same, shard, "sha256 differs from the manifest")
    store._verified.remember(name, identity)
    return True


def is_store(folder: Path) -> bool:
    """Return whether a folder has a manifest, which may be damaged, or had one until another store takes its place."""
    return os.path.lexists(str(folder / m.FILE_NAME)) or is_being_replaced(folder)


def read_manifest_bytes(path: Path, folder: Optional[Folder] = None) -> bytes:
    """Return the bytes of the manifest in a folder, which may be open. Raises UsageError where there is none."""
    where, remedy = path / m.FILE_NAME, "offramp divide MODEL STORE makes one"
    if not path.is_dir() and not is_being_replaced(path):  # in this order: it may be taken away in between
        require_folder(path, "store", remedy)
    with contextlib.closing(Folder(path)) if folder is None else contextlib.nullcontext(folder) as opened:
        dir_fd: int = opened.fd
        if m.FILE_NAME not in os.listdir(dir_fd):
            raise UsageError(f"not a store: no {m.FILE_NAME}", path, f"{remedy} under a new name")
        with files.opened(path, m.FILE_NAME, dir_fd=dir_fd) as fd, files.translate_read_errors(where):
            size = os.fstat(fd).st_size
            if size > m.MAX_MANIFEST_BYTES:
                raise DamagedError(f"manifest of {size} bytes, at most {m.MAX_MANIFEST_BYTES} are read", where, _REMEDY)
            return os.pread(fd, size, 0)


def _runs(rows_U: np.ndarray, places_U: np.ndarray) -> Iterable[Tuple[int, int, int]]:
    """Return (first place, first row, count) of each run of consecutive rows whose places are consecutive, too."""
    if not len(rows_U):
        return []
    breaks = (np.diff(rows_U) != 1) | (np.diff(places_U) != 1)
    bounds = np.concatenate([[0], np.flatnonzero(breaks) + 1, [len(rows_U)]])
    return zip(places_U[bounds[:-1]].tolist(), rows_U[bounds[:-1]].tolist(), np.diff(bounds).tolist())


def require_self_contained(graph: bytes, where: object) -> None:
    """Raise StoreError for an ONNX graph that refers to another file: old versions of ONNX Runtime read any path.

    Such a reference has the key `location`, which is stored as plain text; graphs of a store do not contain this word.
    """
    if b"location" in graph:
        raise StoreError("graph refers to data in another file", where, _REMEDY)


def tensor_view(tensor: m.Tensor, buffer: np.ndarray, data_start: int = 0) -> np.ndarray:
    """Return a tensor of a loaded shard (`buffer` is uint8).

    Aligned tensors are views; others are copied to aligned memory: alignment changes the last bits of a result.
    """
    start, dtype = data_start + tensor.offset, DTYPES[tensor.dtype].numpy
    if dtype is None:
        raise StoreError(f"tensor {tensor.name!r} is {tensor.dtype}, for which NumPy has no dtype", None, _REMEDY)
    raw = buffer[start : start + tensor.num_bytes]
    if raw.ctypes.data % ALIGNMENT_BYTES:
        unaligned, raw = raw, aligned_bytes(len(raw))
        raw[:] = unaligned
    return raw.view(dtype).reshape(tensor.shape)


def _rows(shape: Tuple[int, int], dtype: np.dtype, allocate: Callable[[int], np.ndarray]) -> np.ndarray:
    return allocate(shape[0] * shape[1] * dtype.itemsize).view(dtype).reshape(shape)


def load_tensors(store: Store, file: m.File) -> Dict[str, np.ndarray]:
    """Return all tensors of a small safetensors file of the store, verified: name -> array."""
    data = store.read_file(file)
    header = parse_header(data, len(data), store.path / file.file)
    array = np.frombuffer(data, np.uint8)
    return {
        name: tensor_view(m.Tensor(name, "", entry.dtype, entry.shape, entry.start), array, header.data_start)
        for name, entry in header.tensors.items()
    }

import json
import shutil
import types

import numpy as np
import pytest

from offramp.errors import DamagedError
from offramp.store import Store, memory, reader
from offramp.store.memory import VerifiedMemory, cache_folder
from offramp.store.reader import READ_CHUNK_BYTES
from tests.store.small import flip, let_time_pass, names_in, read, refused, rewrite, write_small


@pytest.fixture
def hashed(monkeypatch):
    """Bytes that the reader has hashed, one number an update."""
    real, sizes = reader.hashlib.sha256, []

    class Counting:
        def __init__(self, data=b""):
            self._digest = real()
            self.digest, self.hexdigest = self._digest.digest, self._digest.hexdigest
            if data:
                self.update(data)

        def update(self, data):
            sizes.append(len(data))
            self._digest.update(data)

    monkeypatch.setattr(reader, "hashlib", types.SimpleNamespace(sha256=Counting))
    return sizes


@pytest.fixture
def old(store, monkeypatch):
    """A store whose files are old enough to be recognised."""
    let_time_pass(monkeypatch)
    return store


def bytes_hashed(store, hashed, shard="layer-00", verify="first"):
    with Store(store, verify) as opened:
        hashed.clear()
        read(opened, shard)
        return sum(hashed)


def cache_file():
    (path,) = (cache_folder() / "verified").iterdir()
    return path


def test_a_shard_is_hashed_once_and_not_once_a_process(old, hashed):
    size = (old / "layer-00.safetensors").stat().st_size
    assert [bytes_hashed(old, hashed) for _ in range(3)] == [size, 0, 0]
    assert bytes_hashed(old, hashed, "layer-01") > 0


def test_always_and_never(old, hashed):
    size = (old / "layer-00.safetensors").stat().st_size
    assert [bytes_hashed(old, hashed, verify="never") for _ in range(2)] == [0, 0]
    assert [bytes_hashed(old, hashed, verify="always") for _ in range(2)] == [size, size]


def test_within_one_process_too(old, hashed):
    with Store(old) as opened:
        hashed.clear()
        read(opened, "layer-00")
        first = sum(hashed)
        read(opened, "layer-00")
        assert (first, sum(hashed)) == (opened.manifest.shards["layer-00"].bytes,) * 2


def test_equal_bytes_rewritten_are_hashed_again(old, hashed):
    path = old / "layer-00.safetensors"
    size = bytes_hashed(old, hashed)
    rewrite(path, path.read_bytes())
    assert [bytes_hashed(old, hashed) for _ in range(2)] == [size, 0]


@pytest.mark.parametrize("verify", ["first", "always"])
def test_other_bytes_of_one_size_and_mtime_are_found(old, hashed, verify):
    """Only ctime tells, which no program can set."""
    path = old / "layer-00.safetensors"
    bytes_hashed(old, hashed)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    rewrite(path, data)
    refused(DamagedError, lambda: bytes_hashed(old, hashed, verify=verify), "sha256 differs from the manifest")


def test_a_change_while_the_store_is_open_is_found(old):
    path = old / "layer-00.safetensors"
    with Store(old) as opened:
        data = bytearray(read(opened, "layer-00"))
        data[-1] ^= 1
        rewrite(path, data)
        refused(DamagedError, lambda: read(opened, "layer-00"), "sha256 differs")
    refused(DamagedError, lambda: Store(old).read_shard("layer-00", memoryview(data)), "sha256 differs")


def test_a_change_during_the_read_is_not_remembered_as_good(tmp_path, monkeypatch):
    """What is remembered is the file as it was before it was read."""
    let_time_pass(monkeypatch)
    store = write_small(tmp_path / "store", num_layer_items=READ_CHUNK_BYTES // 4)
    path = store / "layer-00.safetensors"
    data = path.read_bytes()
    num_chunks = []

    def cancelled():
        num_chunks.append(None)
        if len(num_chunks) == 2:
            rewrite(path, data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
        return False

    with Store(store) as opened:
        buffer = bytearray(len(data))
        assert opened.read_shard("layer-00", memoryview(buffer), cancelled=cancelled) == (len(data), True)
        assert buffer == data
    with Store(store) as opened:
        refused(DamagedError, lambda: read(opened, "layer-00"), "sha256 differs")


def test_a_file_that_was_just_written_is_not_remembered(store, hashed, monkeypatch):
    """Within a tick of the file system's clock, another change would not show."""
    now = (store / "layer-00.safetensors").stat().st_ctime_ns + 1_000_000
    monkeypatch.setattr(memory, "time", types.SimpleNamespace(time_ns=lambda: now))
    size = bytes_hashed(store, hashed)
    assert size and bytes_hashed(store, hashed) == size


def test_a_copy_of_a_store_is_another_store(old, hashed, tmp_path):
    size = bytes_hashed(old, hashed)
    shutil.copytree(old, tmp_path / "copy")
    assert bytes_hashed(tmp_path / "copy", hashed) == size


def test_a_store_is_the_same_under_a_link(old, hashed, tmp_path):
    bytes_hashed(old, hashed)
    (tmp_path / "link").symlink_to(old)
    assert bytes_hashed(tmp_path / "link", hashed) == 0


def test_another_manifest_is_another_store(old, hashed, tmp_path):
    size = bytes_hashed(old, hashed)
    manifest = (old / "offramp.json").read_bytes()
    write_small(tmp_path / "other", num_layer_items=301)
    for path in (tmp_path / "other").iterdir():
        if path.is_file():
            path.replace(old / path.name)
    assert (old / "offramp.json").read_bytes() != manifest
    assert bytes_hashed(old, hashed) == size + 4


def test_blocks_are_remembered(old, hashed):
    def gather(rows):
        with Store(old) as opened:
            hashed.clear()
            opened.gather("rows", "word", np.array(rows))
            return sum(hashed)

    assert gather([0]) == 65536
    assert gather([1, 2]) == 0
    assert gather([0, 2000]) == 65536
    assert gather([0, 1, 2000, 2001]) == 0


def test_blocks_of_a_changed_file_are_forgotten(old):
    """Verified before the change, by a process that still has the store open, and that then remembers what it saw."""
    path = old / "rows.safetensors"
    with Store(old) as opened:
        opened.gather("rows", "word", np.array([0]))
        data = bytearray(path.read_bytes())
        data[4096] ^= 1
        rewrite(path, data)
    with Store(old) as opened:
        refused(DamagedError, lambda: opened.gather("rows", "word", np.array([0])), "sha256 of block 0 differs")


def test_blocks_that_change_while_the_store_is_open_are_found(old):
    path = old / "rows.safetensors"
    with Store(old) as opened:
        opened.gather("rows", "word", np.array([0]))
        data = bytearray(path.read_bytes())
        data[4096] ^= 1
        rewrite(path, data)
        refused(DamagedError, lambda: opened.gather("rows", "word", np.array([0])), "sha256 of block 0 differs")


def test_the_memory_does_not_grow_with_changes(old):
    path = old / "rows.safetensors"
    sizes = []
    for _ in range(3):
        with Store(old) as opened:
            opened.gather("rows", "word", np.array([0]))
            read(opened, "layer-00")
        sizes.append(len(json.loads(cache_file().read_text())))
        rewrite(path, path.read_bytes())
    assert sizes == [2, 2, 2]


def test_damage_is_not_remembered(old, hashed):
    flip(old / "layer-00.safetensors", 8 * 5000)
    for _ in range(2):
        refused(DamagedError, lambda: bytes_hashed(old, hashed), "sha256 differs")
    flip(old / "layer-00.safetensors", 8 * 5000)
    assert bytes_hashed(old, hashed) > 0


@pytest.mark.parametrize("spoilt", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"layer-00": 1}', None])
def test_a_corrupt_memory_is_no_error(old, hashed, spoilt):
    size = bytes_hashed(old, hashed)
    path = cache_file()
    path.unlink()
    if spoilt is None:
        path.mkdir()
    else:
        path.write_bytes(spoilt)
    assert bytes_hashed(old, hashed) == size


@pytest.mark.parametrize("bitmap", ["", "zz", "01", "01" * 1000])
def test_corrupt_blocks_are_forgotten(old, bitmap):
    with Store(old) as opened:
        opened.gather("rows", "word", np.array([0]))
    tree = json.loads(cache_file().read_text())
    identity = tree["rows blocks"].split(" ")[0]
    cache_file().write_text(json.dumps({"rows blocks": f"{identity} {bitmap}"}))
    with Store(old) as opened:
        assert opened.gather("rows", "word", np.array([0]))[1] > 65536


def test_a_cache_that_cannot_be_written_is_no_error(old, hashed, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "file"))
    size = bytes_hashed(old, hashed)
    assert bytes_hashed(old, hashed) == size > 0


def test_a_full_disk_leaves_no_half_memory(old, hashed, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as spoilt:
        spoilt.setattr(memory, "write_all", full)
        size = bytes_hashed(old, hashed)
    assert list((cache_folder() / "verified").iterdir()) == []
    assert bytes_hashed(old, hashed) == size


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("OFFRAMP_CACHE", "/o")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("HOME", "/h")
    assert str(cache_folder()) == "/o"
    monkeypatch.setenv("OFFRAMP_CACHE", "")
    assert str(cache_folder()) == "/x/offramp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(cache_folder()) == "/h/.cache/offramp"


def test_the_memory_lies_in_the_cache_and_never_in_the_store(old, hashed):
    before = names_in(old)
    bytes_hashed(old, hashed)
    assert names_in(old) == before
    assert cache_file().parent.parent == cache_folder()


def test_nothing_new_is_not_written(old):
    with Store(old) as opened:
        read(opened, "layer-00")
    before = cache_file().stat()
    with Store(old) as opened:
        read(opened, "layer-00")
    assert cache_file().stat().st_ino == before.st_ino


def test_two_memories_at_once_lose_one_and_never_mix(tmp_path):
    one, other = VerifiedMemory(tmp_path, b""), VerifiedMemory(tmp_path, b"")
    one.remember("a", "1")
    other.remember("b", "2")
    one.save()
    other.save()
    last = VerifiedMemory(tmp_path, b"")
    assert (last.knows("a", "1"), last.knows("b", "2")) == (False, True)
    assert not last.knows("b", "1") and not last.knows("b", None)


YEARS = 20 * 365 * 86400 * 10**9


@pytest.mark.parametrize(
    ("ctime", "away", "is_known"),
    [
        (10**18 + 1, 10**7, False),
        (10**18 + 1, -(10**7), False),
        (10**18 + 1, 2 * 10**8, True),
        (10**18 + 1, -YEARS, True),
        (10**18 + 1, YEARS, True),
        (10**18, 10**9, False),
        (10**18, -(10**9), False),
        (10**18, 3 * 10**9, True),
    ],
)
def test_a_file_is_new_within_a_tick_of_its_time_on_either_side(monkeypatch, ctime, away, is_known):
    """A clock that stands years before the files would make every pass hash them again. Whole seconds tick slowly."""
    facts = types.SimpleNamespace(st_dev=1, st_ino=2, st_size=3, st_mtime_ns=4, st_ctime_ns=ctime)
    monkeypatch.setattr(memory, "os", types.SimpleNamespace(fstat=lambda _: facts))
    monkeypatch.setattr(memory, "time", types.SimpleNamespace(time_ns=lambda: ctime + away))
    assert (memory.identity_of(0) is not None) is is_known


def test_a_cache_that_is_named_from_the_working_folder_stays_where_it_was(old, hashed, monkeypatch, tmp_path):
    monkeypatch.setenv("OFFRAMP_CACHE", "cache")
    monkeypatch.chdir(tmp_path)
    with Store(old) as opened:
        read(opened, "layer-00")
        monkeypatch.chdir("/")
    assert (tmp_path / "cache" / "verified").is_dir()

import contextlib
import errno
import gc
import hashlib
import mmap
import os
import pickle
import random
import tempfile
import threading
import time
import tracemalloc
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.errors import DamagedError, StoreError
from offramp.store import Store, Tensor
from offramp.store.manifest import BLOCK_BYTES, Graph, all_files
from offramp.store.memory import cache_folder
from offramp.store.reader import READ_CHUNK_BYTES, ROWS_AT_ONCE, load_tensors, tensor_view
from tests.selection import examples
from tests.store.small import (
    HIDDEN,
    SHARDS,
    VOCABULARY,
    arrays,
    flip,
    let_time_pass,
    names_in,
    problems,
    read,
    refused,
    reseal,
    tree_of,
    write_small,
)

BIG_ITEMS = 5 * READ_CHUNK_BYTES // 8
"""Layers of two and a half chunks."""


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("big") / "store", num_layer_items=BIG_ITEMS)


def page_buffer(store, shard):
    return memoryview(mmap.mmap(-1, -(-store.manifest.shards[shard].bytes // 4096) * 4096))


def read_direct(store, shard, buffer):
    try:
        return store.read_shard(shard, buffer, direct=True)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            pytest.skip("this file system has no direct reads")
        raise


def test_a_pickled_store_is_opened_again_wherever_the_process_is(tmp_path, monkeypatch):
    folder = write_small(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    with Store(folder.name, "always") as store:
        data = pickle.dumps(store)
    monkeypatch.chdir("/")
    with pickle.loads(data) as store:
        assert (store.path, store.policy) == (folder, "always")


@pytest.mark.parametrize("verify", ["first", "always", "never"])
def test_a_shard_is_the_whole_file(pristine, verify):
    with Store(pristine, verify) as store:
        for shard in SHARDS:
            assert read(store, shard) == (pristine / f"{shard}.safetensors").read_bytes()


def test_tensors_are_what_was_written(pristine):
    with Store(pristine) as store:
        for shard in SHARDS:
            buffer = np.frombuffer(read(store, shard), np.uint8)
            entry, wanted = store.manifest.shards[shard], arrays(shard)
            views = {tensor.role: tensor_view(tensor, buffer, entry.data_start) for tensor in entry.tensors}
            assert views.keys() == wanted.keys()
            assert all(np.array_equal(views[role], wanted[role]) for role in wanted)


@pytest.mark.parametrize("verify", ["always", "never"])
def test_single_tensors_are_what_was_written(pristine, verify):
    with Store(pristine, verify) as store:
        for shard in SHARDS:
            for tensor in store.manifest.shards[shard].tensors:
                assert bytes(store.read_tensor(shard, tensor)) == arrays(shard)[tensor.role].tobytes()


def test_a_flipped_bit_is_found_when_a_single_tensor_is_read(store):
    flip(store / "layer-00.safetensors", 8 * 5000)
    with Store(store) as opened:
        tensor = opened.manifest.shards["layer-00"].tensors[0]
        message = refused(DamagedError, lambda: opened.read_tensor("layer-00", tensor), "sha256 differs")
        assert "layer-00.safetensors" in message


def test_direct_reads_give_the_same_bytes(big):
    with Store(big, "always") as store:
        for shard in SHARDS:
            buffer = page_buffer(store, shard)
            size = store.manifest.shards[shard].bytes
            assert read_direct(store, shard, buffer) == (size, True)
            assert buffer[:size] == (big / f"{shard}.safetensors").read_bytes()


@pytest.mark.parametrize("direct", [False, True])
def test_a_buffer_that_is_too_small(pristine, direct):
    with Store(pristine) as store:
        size = store.manifest.shards["norm"].bytes
        needed = 8192 if direct else size
        with pytest.raises(ValueError, match=f"shard norm takes {needed} bytes, the buffer has {needed - 1}"):
            store.read_shard("norm", memoryview(bytearray(needed - 1)), direct=direct)


def test_a_larger_buffer_is_left_alone_behind_the_shard(pristine):
    with Store(pristine) as store:
        size = store.manifest.shards["norm"].bytes
        buffer = bytearray(b"\x77" * (size + 100))
        assert store.read_shard("norm", memoryview(buffer)) == (size, True)
        assert buffer[size:] == b"\x77" * 100


def test_unknown_verification(pristine):
    with pytest.raises(ValueError, match=r"verify must be one of \('always', 'first', 'never'\), not 'maybe'"):
        Store(pristine, "maybe")


@pytest.mark.parametrize("num_chunks", [0, 1, 2])
def test_a_cancelled_read_stops_within_a_chunk(big, num_chunks):
    asked = []

    def cancelled():
        asked.append(None)
        return len(asked) > num_chunks

    with Store(big) as store:
        buffer = bytearray(store.manifest.shards["layer-00"].bytes)
        expected = (num_chunks * READ_CHUNK_BYTES, False)
        assert store.read_shard("layer-00", memoryview(buffer), cancelled=cancelled) == expected
        assert not any(buffer[expected[0] :])


@pytest.mark.parametrize("direct", [False, True])
def test_both_halves_of_a_read_give_the_whole_file(big, direct):
    with Store(big, "never") as store:
        buffer = page_buffer(store, "layer-00")
        num_bytes = store.manifest.shards["layer-00"].bytes
        if direct:
            assert read_direct(store, "layer-00", buffer) == (num_bytes, True)
        else:
            assert store.read_shard("layer-00", buffer, halves=True) == (num_bytes, True)
        assert bytes(buffer[:num_bytes]) == (big / "layer-00.safetensors").read_bytes()
        names = [thread.name for thread in threading.enumerate()]
        assert any(name.startswith("offramp-second-half") for name in names)
    assert not any(thread.name.startswith("offramp-second-half") for thread in threading.enumerate())


@pytest.mark.parametrize("direct", [False, True])
def test_a_read_that_is_cancelled_says_what_both_halves_read(big, direct):
    lock, answers = threading.Lock(), iter([False, False])

    def cancelled():
        with lock:
            return next(answers, True)

    with Store(big, "never") as store:
        buffer = page_buffer(store, "layer-00")
        if direct:
            read_direct(store, "norm", buffer)
        num_bytes, complete = store.read_shard("layer-00", buffer, direct=direct, halves=True, cancelled=cancelled)
    assert not complete
    assert READ_CHUNK_BYTES <= num_bytes <= 2 * READ_CHUNK_BYTES


@pytest.mark.parametrize("half", [0, 1])
def test_nobody_writes_to_the_buffer_after_a_half_has_failed(big, monkeypatch, half):
    """The other half is waited for, and the error of the one that failed is raised."""
    middle, done = READ_CHUNK_BYTES, []
    with Store(big, "never") as store:
        buffer = page_buffer(store, "layer-00")
        read_direct(store, "norm", buffer)
        read_chunk = store._read_chunk

        def slow_or_broken(shard, fd, view, offset, end):
            if (offset >= middle) == bool(half):
                raise DamagedError("broken", shard.file)
            time.sleep(0.05)
            done.append(read_chunk(shard, fd, view, offset, end))
            return done[-1]

        monkeypatch.setattr(store, "_read_chunk", slow_or_broken)
        with pytest.raises(DamagedError, match="broken"):
            store.read_shard("layer-00", buffer, direct=True)
        assert sum(done) >= (middle if half else READ_CHUNK_BYTES // 2)


def test_a_cancelled_read_is_not_taken_for_verified(big, monkeypatch):
    let_time_pass(monkeypatch)
    with Store(big) as store:
        answers = iter([False, False, True])
        store.read_shard("layer-00", memoryview(bytearray(1 << 23)), cancelled=lambda: next(answers))
    assert not cache_folder().joinpath("verified").exists()


@pytest.mark.parametrize("verify", ["first", "always"])
def test_every_flipped_bit_of_a_shard_is_found_at_the_first_use(store, verify):
    draw = random.Random(1)
    for _ in range(100):
        shard = draw.choice(SHARDS)
        path = store / f"{shard}.safetensors"
        bit = draw.randrange(8 * path.stat().st_size)
        flip(path, bit)
        with Store(store, verify) as opened:
            message = refused(DamagedError, lambda: read(opened, shard), "sha256 differs from the manifest")  # noqa: B023
            assert f"{shard}.safetensors" in message
        flip(path, bit)
    assert problems(store) == {}


def test_never_finds_nothing(store):
    flip(store / "layer-00.safetensors", 8 * 5000)
    with Store(store, "never") as opened:
        assert read(opened, "layer-00") == (store / "layer-00.safetensors").read_bytes()


@pytest.mark.parametrize("size", [0, 4096, READ_CHUNK_BYTES, READ_CHUNK_BYTES + 4096, READ_CHUNK_BYTES + 1234])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("verify", ["first", "never"])
def test_a_file_that_is_cut_while_it_is_read(tmp_path, size, direct, verify):
    path = write_small(tmp_path / "store", num_layer_items=BIG_ITEMS)

    def cut():
        os.truncate(path / "layer-00.safetensors", size)
        return False

    with Store(path, verify) as opened:
        buffer = page_buffer(opened, "layer-00")
        if direct:
            read_direct(opened, "norm", buffer)
        action = lambda: opened.read_shard("layer-00", buffer, direct=direct, cancelled=cut)  # noqa: E731
        refused(DamagedError, action, f"file ends at byte {size} of ")


def test_a_file_that_is_removed_while_it_is_open_is_still_read(store):
    with Store(store, "always") as opened:
        before = read(opened, "layer-00")
        (store / "layer-00.safetensors").unlink()
        assert read(opened, "layer-00") == before


def test_many_threads_open_each_file_once(pristine):
    before = names_in("/proc/self/fd")
    store, barrier, results = Store(pristine), threading.Barrier(8), []

    def work():
        barrier.wait()
        results.append([read(store, shard) for shard in SHARDS])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(result == results[0] for result in results)
    assert len(names_in("/proc/self/fd")) - len(before) == 1 + len(SHARDS), "the folder, and each shard once"
    store.close()
    assert names_in("/proc/self/fd") == before


def test_the_files_of_a_store_that_is_not_closed_are_closed_with_it(pristine):
    before = names_in("/proc/self/fd")
    store = Store(pristine)
    for shard in SHARDS:
        read(store, shard)
    assert len(names_in("/proc/self/fd")) - len(before) == 1 + len(SHARDS), "the folder, and each shard"
    store.close()
    read(store, "norm")  # opens it again
    assert len(names_in("/proc/self/fd")) - len(before) == 2, "the folder, and the shard"
    del store
    gc.collect()
    assert names_in("/proc/self/fd") == before


ROWS = st.lists(st.integers(0, VOCABULARY - 1), max_size=40)


@settings(deadline=None, max_examples=examples(60))
@given(ROWS)
def test_gathered_rows_are_those_of_the_table(pristine, rows):
    with Store(pristine) as store:
        found_NW, _ = store.gather("rows", "word", np.array(rows, np.int64))
    assert np.array_equal(found_NW, arrays("rows")["word"][rows])
    assert found_NW.shape == (len(rows), HIDDEN)


@pytest.mark.parametrize("rows", [range(VOCABULARY), [7, *range(VOCABULARY), 3] * 2], ids=["slice", "repeated"])
def test_gathering_takes_little_memory_beside_its_result(pristine, rows):
    rows_N = np.array(rows, np.int64)
    with Store(pristine, "never") as store:
        store.gather("rows", "word", rows_N)  # opens the file
        tracemalloc.start()
        try:
            rows_NW, _ = store.gather("rows", "word", rows_N)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    numbers = 250 * len(rows_N)  # ids, places, runs and their Python objects
    assert rows_NW.nbytes <= peak_bytes <= rows_NW.nbytes + 2 * ROWS_AT_ONCE * 4 * HIDDEN + numbers


@settings(deadline=None, max_examples=examples(60))
@given(ROWS, ROWS)
def test_only_touched_blocks_are_read_and_each_once(pristine, first, second):
    """64 bytes a row; data begin at 4096, so that block k holds the rows from 1024 k - 64 on."""
    seen = set()
    with contextlib.ExitStack() as stack:  # an example remembers nothing of the one before
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.dict(os.environ, OFFRAMP_CACHE=cache))
        with Store(pristine) as store:
            for rows in (first, second, second):
                touched = {(4096 + 64 * row) // BLOCK_BYTES for row in rows}
                left = [store.manifest.shards["rows"].bytes - BLOCK_BYTES * block for block in touched - seen]
                _, num_bytes = store.gather("rows", "word", np.array(rows, np.int64))
                assert num_bytes == sum(min(BLOCK_BYTES, size) for size in left) + 64 * len(set(rows))
                seen |= touched


@pytest.mark.parametrize(("verify", "num_blocks"), [("never", 0), ("first", 1), ("always", 2)])
def test_what_verification_of_rows_reads(pristine, verify, num_blocks):
    with Store(pristine, verify) as store:
        total = sum(store.gather("rows", "word", np.array([0, 1]))[1] for _ in range(2))
    assert total == 2 * 2 * 64 + num_blocks * BLOCK_BYTES


def test_a_flipped_bit_in_a_touched_block_is_found(store):
    """Row 960 is the first of block 1; row 961 shares its block, row 959 does not."""
    flip(store / "rows.safetensors", 8 * (4096 + 64 * 960))
    with Store(store) as opened:
        rows_NW, _ = opened.gather("rows", "word", np.array([0, 959, 4000]))
        assert np.array_equal(rows_NW, arrays("rows")["word"][[0, 959, 4000]])
        refused(DamagedError, lambda: opened.gather("rows", "word", np.array([961])), "sha256 of block 1 differs")
        refused(DamagedError, lambda: opened.gather("rows", "word", np.array([961])), "sha256 of block 1 differs")
    with Store(store, "never") as opened:
        opened.gather("rows", "word", np.array([961]))


def test_a_row_that_lies_in_two_blocks_needs_both(tmp_path):
    """Rows of 60 bytes: row 2116 lies at 131056..131116, and block 2 begins at 131072."""
    path = write_small(tmp_path / "store", width=15)
    flip(path / "rows.safetensors", 8 * 131_100)
    with Store(path) as store:
        assert store.gather("rows", "word", np.array([2115]))[1] == BLOCK_BYTES + 60
        refused(DamagedError, lambda: store.gather("rows", "word", np.array([2116])), "sha256 of block 2 differs")


@pytest.mark.parametrize(("row_bytes", "row", "num_blocks"), [
    (1, 0, 1), (BLOCK_BYTES - 1, 0, 1), (BLOCK_BYTES, 0, 1), (BLOCK_BYTES + 1, 0, 2), (BLOCK_BYTES, 1, 1),
    (BLOCK_BYTES - 1, 1, 2), (BLOCK_BYTES + 1, 1, 2),
])  # fmt: skip
def test_a_row_needs_the_blocks_of_its_bytes_from_the_first_to_the_last(pristine, row_bytes, row, num_blocks):
    with Store(pristine, "always") as store, store.opened("rows") as fd:
        shard = store.manifest.shards["rows"]
        assert store._check_blocks(shard, fd, 0, row_bytes, np.array([row])) == num_blocks * BLOCK_BYTES


def test_every_flipped_bit_of_a_table_is_found_by_whoever_reads_it_all(store):
    draw = random.Random(2)
    path = store / "rows.safetensors"
    for _ in range(30):
        bit = draw.randrange(8 * 4096, 8 * path.stat().st_size)
        flip(path, bit)
        with Store(store) as opened, pytest.raises(DamagedError, match="sha256 of block"):
            for role, array in arrays("rows").items():
                opened.gather("rows", role, np.arange(len(array)))
        flip(path, bit)


def test_digests_of_another_table(store):
    """Listed and sealed, as somebody would who wants to be found late."""
    tree = tree_of(store)
    (rows,) = (shard for shard in tree["shards"] if shard["name"] == "rows")
    for data, mentions in ((b"\0" * 160, "sha256 of block 0 differs"), (b"\0" * 128, "128 bytes of digests for 5")):
        (store / "rows.blocks").write_bytes(data)
        rows["blocks"].update(bytes=len(data), sha256=_sha256(data))
        reseal(store, tree)
        with Store(store) as opened:
            refused(DamagedError, lambda: opened.gather("rows", "word", np.array([0])), mentions)
        assert problems(store) == {"rows.safetensors": "blocks differ from rows.blocks"}


@pytest.mark.parametrize("rows", [[0], [5, 6, 7], [7, 3, 7], list(range(4096))])
def test_gathered_rows_begin_on_a_cache_line(pristine, rows):
    """Where they begin changes the last bits of what is computed from them."""
    with Store(pristine) as store:
        for _ in range(4):
            found, _ = store.gather("rows", "word", np.array(rows))
            assert found.ctypes.data % 64 == 0 and found.flags.writeable


@pytest.mark.parametrize("rows", [[-1], [VOCABULARY], [0, 10**12]])
def test_rows_that_the_table_has_not(pristine, rows):
    with Store(pristine) as store, pytest.raises(ValueError, match=f"the table has {VOCABULARY}"):
        store.gather("rows", "word", np.array(rows))


def test_a_table_that_is_cut_while_it_is_open(store):
    with Store(store, "never") as opened:
        opened.gather("rows", "word", np.array([0]))
        os.truncate(store / "rows.safetensors", 8192)
        refused(DamagedError, lambda: opened.gather("rows", "word", np.array([4000])), "file ends inside a tensor")


def test_views_are_aligned_or_copied():
    room = np.zeros(4096 + 128, np.uint8)
    buffer = room[-room.ctypes.data % 64 :][:4096]
    for offset in (0, 64, 128, 4, 60):
        view = tensor_view(Tensor("a", "a", "F32", (3,), offset), buffer)
        assert view.ctypes.data % 64 == 0
        assert np.shares_memory(view, buffer) == (offset % 64 == 0)
    assert tensor_view(Tensor("a", "a", "F32", (), 4), buffer).shape == ()
    assert tensor_view(Tensor("a", "a", "F32", (0, 3), 4), buffer).shape == (0, 3)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "C64"])
def test_a_dtype_that_arrays_do_not_have(dtype):
    tensor = Tensor("a\x1b[31m", "a", dtype, (1,), 0)
    refused(StoreError, lambda: tensor_view(tensor, np.zeros(64, np.uint8)), f"tensor 'a\\x1b[31m' is {dtype}")


def test_small_tensors_by_name(pristine, store):
    with Store(pristine) as opened:
        entry = opened.manifest.shards["head"]
        found = load_tensors(opened, entry)
        assert {name.removeprefix("head."): array.tolist() for name, array in found.items()} == {
            role: array.tolist() for role, array in arrays("head").items()
        }
        assert all(array.ctypes.data % 64 == 0 for array in found.values())


def test_a_graph_that_reads_other_files_is_refused(store):
    """As a graph of ONNX says it: old versions of ONNX Runtime would read ../../secret into a weight."""
    onnx = pytest.importorskip("onnx")
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../secret")
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    data = onnx.helper.make_model(graph).SerializeToString()
    (store / "graphs" / "layer.onnx").write_bytes(data)
    tree = tree_of(store)
    tree["graphs"]["layer"].update(bytes=len(data), sha256=_sha256(data))
    reseal(store, tree)
    with Store(store) as opened:
        graph = opened.manifest.graphs["layer"]
        assert isinstance(graph, Graph)
        message = refused(StoreError, lambda: opened.read_file(graph), "graph refers to data in another file")
        assert "graphs/layer.onnx" in message
    assert problems(store) == {"graphs/layer.onnx": "graph refers to data in another file"}


@pytest.mark.parametrize("name", ["vocab.txt", "exits.json"])
def test_a_small_file_of_the_right_size_with_other_bytes_is_refused(store, name):
    with Store(store, "never") as opened:
        file = next(file for file in all_files(opened.manifest) if file.file == name)
        assert opened.read_file(file) == (store / name).read_bytes()
        flip(store / name, 8)
        message = refused(DamagedError, lambda: opened.read_file(file), "sha256 differs from the manifest")
        assert name in message


def test_closing_twice_is_no_error(pristine):
    store = Store(pristine)
    read(store, "norm")
    store.close()
    store.close()


def test_the_digest_is_that_of_the_manifest(pristine):
    with Store(pristine) as store:
        assert store.digest == _sha256((pristine / "offramp.json").read_bytes())


def _sha256(data):
    return hashlib.sha256(data).hexdigest()

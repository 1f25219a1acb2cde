import hashlib
import os
import shutil
import tracemalloc

import numpy as np
import pytest

from offramp.errors import DiskFullError, SourceError, StageError, UsageError
from offramp.store import Store, StoreWriter
from offramp.store import manifest as m
from tests.store.small import FINGERPRINT, SHARDS, add_shard, arrays, flip, names_in, problems, read, write_small


def tree_bytes(folder):
    """Relative path -> content, or None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def interrupt(path, fingerprint=FINGERPRINT, num_shards=3):
    """A build that was left after some shards."""
    with StoreWriter(path, fingerprint) as writer:
        for name in SHARDS[:num_shards]:
            add_shard(writer, name)
    return path.with_name(path.name + ".partial")


def test_equal_inputs_give_equal_bytes(pristine, tmp_path):
    assert tree_bytes(write_small(tmp_path / "elsewhere")) == tree_bytes(pristine)


def test_a_store_holds_what_its_manifest_names(pristine):
    with Store(pristine) as store:
        named = {file.file for file in m.all_files(store.manifest)}
        assert set(tree_bytes(pristine)) == named | {"offramp.json", "graphs"}
    assert names_in(pristine.parent) == ["store"]


def test_data_begin_on_a_page(pristine):
    with Store(pristine) as store:
        for shard in store.manifest.shards.values():
            assert shard.data_start % 4096 == 0
            assert read(store, shard.name)[shard.data_start :] == b"".join(
                array.tobytes() for array in arrays(shard.name).values()
            )


def test_digests_of_blocks(pristine):
    data = (pristine / "rows.safetensors").read_bytes()
    blocks = [data[start : start + 65536] for start in range(0, len(data), 65536)]
    expected = b"".join(hashlib.sha256(block).digest() for block in blocks)
    assert (pristine / "rows.blocks").read_bytes() == expected
    assert len(blocks) == 5 and 0 < len(blocks[-1]) < 65536


@pytest.mark.parametrize("chunk_bytes", [1, 4095, 65536, 100_000])
def test_the_size_of_chunks_changes_nothing(pristine, tmp_path, chunk_bytes):
    content = {f"rows.{role}": array for role, array in arrays("rows").items()}
    content["rows.word"] = content["rows.word"][:2000]
    tensors = [(name, name[5:], "F32", array.shape) for name, array in content.items()]

    def read_chunks(name):
        data = content[name].tobytes()
        return (data[start : start + chunk_bytes] for start in range(0, len(data), chunk_bytes))

    written = []
    for number, chunks in enumerate((read_chunks, lambda name: [content[name].data])):
        with StoreWriter(tmp_path / f"{chunk_bytes}-{number}", FINGERPRINT) as writer:
            shard = writer.add_shard("rows", tensors, chunks, gathered=True)
            written.append((shard, (writer.partial / "rows.blocks").read_bytes()))
    assert written[0] == written[1]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        store = write_small(tmp_path / "store")
    finally:
        os.umask(before)
    for path in (store, *store.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask


@pytest.mark.parametrize("gathered", [False, True])
def test_a_large_tensor_passes_in_chunks(tmp_path, gathered):
    """64 MiB, given as a checkpoint gives it; once to write it, once to find it there."""
    shape = (1 << 20, 16)

    def chunks(_):
        for number in range(16):
            yield np.full(1 << 20, number, np.float32).data

    def add():
        with StoreWriter(tmp_path / "store", FINGERPRINT) as writer:
            return writer.add_shard("rows", [("rows.word", "word", "F32", shape)], chunks, gathered=gathered)

    for _ in range(2):
        tracemalloc.start()
        shard = add()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert shard.data_bytes == 64 << 20
        assert peak <= (8 << 20) + (1 << 18), peak


@pytest.mark.parametrize("num_bytes", [0, 1023, 1025])
def test_a_source_that_gives_another_number_of_bytes(tmp_path, num_bytes):
    with (
        StoreWriter(tmp_path / "store", FINGERPRINT) as writer,
        pytest.raises(ValueError, match=f"tensor 'a': expected 1024 bytes, got {num_bytes}"),
    ):
        writer.add_shard("a", [("a", "a", "F32", (256,))], lambda _: [b"x" * num_bytes])
    assert not (tmp_path / "store.partial" / "a.safetensors").exists()


def test_an_interrupted_build_leaves_no_target(tmp_path):
    interrupt(tmp_path / "store")
    assert names_in(tmp_path) == ["store.partial"]


def test_a_build_is_resumed(pristine, tmp_path):
    """What stands is kept, as the inode shows, and the rest is written."""
    partial = interrupt(tmp_path / "store")
    before = {name: (partial / f"{name}.safetensors").stat().st_ino for name in SHARDS[:3]}
    store = write_small(tmp_path / "store")
    assert {name: (store / f"{name}.safetensors").stat().st_ino for name in SHARDS[:3]} == before
    assert tree_bytes(store) == tree_bytes(pristine)
    assert names_in(tmp_path) == ["store"]


def flip_data(partial):
    flip(partial / "rows.safetensors", 8 * 5000)


def flip_header(partial):
    flip(partial / "norm.safetensors", 8 * 20)


def cut(partial):
    os.truncate(partial / "layer-00.safetensors", 5000)


def swap(partial):
    """Another file of the same size."""
    shutil.copy(partial / "norm.safetensors", partial / "layer-00.safetensors")


def leave_rubbish(partial):
    (partial / "layer-01.safetensors.tmp").write_text("half")
    (partial / "stranger").mkdir()
    (partial / "stranger" / "file").write_text("x")
    (partial / "graphs" / "old.onnx").write_text("x")
    (partial / "offramp.json").write_text("{}")
    (partial / "link").symlink_to("/")


def link_shard(partial):
    (partial / "norm.safetensors").rename(partial / "moved")
    (partial / "norm.safetensors").symlink_to("moved")


@pytest.mark.parametrize("spoil", [flip_data, flip_header, cut, swap, leave_rubbish, link_shard])
def test_what_was_left_is_kept_only_if_it_is_what_would_be_written(pristine, tmp_path, spoil):
    """Blessing a shard because it has the right name would give the damage a digest of its own."""
    spoil(interrupt(tmp_path / "store"))
    store = write_small(tmp_path / "store")
    assert tree_bytes(store) == tree_bytes(pristine)
    assert not any(path.is_symlink() for path in store.rglob("*"))


@pytest.mark.parametrize("state", [b"other", b"", b"\xff"])
def test_a_partial_build_of_another_source_is_cleared(pristine, tmp_path, state):
    partial = interrupt(tmp_path / "store")
    (partial / ".building").write_bytes(state)
    with StoreWriter(tmp_path / "store", FINGERPRINT) as writer:
        assert names_in(partial) == [".building", "graphs"]
        assert names_in(partial / "graphs") == []
        assert writer.partial == partial
    assert (partial / ".building").read_text() == FINGERPRINT


def test_a_build_that_lost_only_its_last_rename_is_cleared(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "store.partial")
    assert tree_bytes(write_small(tmp_path / "store")) == tree_bytes(pristine)


@pytest.mark.parametrize("spoil", [False, True])
def test_a_store_that_is_called_partial_is_not_cleared(store, tmp_path, spoil):
    store.rename(tmp_path / "other.partial")
    if spoil:
        flip(tmp_path / "other.partial" / "offramp.json", 8)
    before = tree_bytes(tmp_path / "other.partial")
    with pytest.raises(UsageError, match="was not created by offramp"):
        write_small(tmp_path / "other", fingerprint="2" * 64)
    assert tree_bytes(tmp_path / "other.partial") == before


def test_a_folder_that_somebody_else_made_is_not_cleared(tmp_path):
    (tmp_path / "store.partial").mkdir()
    (tmp_path / "store.partial" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"was not created by offramp - .*store\.partial - move it away"):
        write_small(tmp_path / "store")
    assert (tmp_path / "store.partial" / "thesis.tex").read_text() == "years of work"


def test_a_link_in_place_of_the_partial_folder_is_not_followed(tmp_path):
    """In a folder where others may write, it could point to what is dear."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".building").write_text("other")
    (home / "thesis.tex").write_text("years of work")
    (tmp_path / "store.partial").symlink_to(home)
    with pytest.raises(UsageError, match="a store cannot be built there"):
        write_small(tmp_path / "store")
    assert names_in(home) == [".building", "thesis.tex"]


@pytest.mark.parametrize("name", ["file/store", "store-of-" + "x" * 250, "file.partial-is-a-file/../file2"])
def test_no_place_for_a_store(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "file2.partial").write_text("")
    with pytest.raises(UsageError, match="a store cannot be built there") as caught:
        write_small(tmp_path / name)
    assert caught.value.exit_code == 2


def test_folders_above_are_made(tmp_path):
    assert problems(write_small(tmp_path / "a" / "b" / "store")) == {}


def test_a_relative_path(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    assert problems(write_small("../store")) == {}
    assert names_in(tmp_path) == ["inside", "store"]


def test_the_target_exists(store):
    before = tree_bytes(store)
    with pytest.raises(UsageError, match=r"target exists - .*store - choose another name, or --force"):
        write_small(store)
    assert tree_bytes(store) == before
    assert not store.with_name("store.partial").exists()


@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling link"])
def test_force_replaces_stores_alone(store, tmp_path, kind):
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("x")
    elif kind == "folder":
        target.mkdir()
        (target / "thesis.tex").write_text("years of work")
    else:
        target.symlink_to(store if kind == "link" else tmp_path / "nowhere")
    with pytest.raises(UsageError, match="target exists and is not a store, so --force does not replace it"):
        write_small(target, force=True)
    assert os.path.lexists(target)
    assert names_in(tmp_path) == ["store", "target"]


def test_force_replaces_a_store(store, tmp_path):
    new = tree_bytes(write_small(tmp_path / "new", num_layer_items=301))
    assert new != tree_bytes(store)
    write_small(store, num_layer_items=301, force=True)
    assert tree_bytes(store) == new
    assert names_in(tmp_path) == ["new", "store"]


def test_an_old_store_stays_until_the_new_one_is_there(store):
    before = tree_bytes(store)
    interrupt_forced = StoreWriter(store, FINGERPRINT, force=True)
    with interrupt_forced as writer:
        add_shard(writer, "rows")
    assert tree_bytes(store) == before


def test_a_backup_under_the_name_that_force_needs_is_not_deleted(store, tmp_path):
    shutil.copytree(store, tmp_path / "store.retired")
    with pytest.raises(UsageError, match=r"but it exists - .*store\.retired - move it away"):
        write_small(store, force=True)
    shutil.rmtree(store)
    write_small(store)
    assert problems(tmp_path / "store.retired") == {}


def test_a_retired_store_of_a_killed_writer_is_deleted(store, tmp_path):
    store.rename(tmp_path / "store.retired")
    (tmp_path / "store.retired" / ".retired").touch()
    write_small(store)
    assert names_in(tmp_path) == ["store"]


def test_two_writers_at_once(tmp_path, pristine):
    before = names_in("/proc/self/fd")
    with StoreWriter(tmp_path / "store", FINGERPRINT) as writer:
        add_shard(writer, "rows")
        with pytest.raises(
            UsageError, match=r"another process is building this store - .*partial - wait until it has finished"
        ):
            write_small(tmp_path / "store")
        assert (writer.partial / "rows.safetensors").exists()
    assert names_in("/proc/self/fd") == before
    assert tree_bytes(write_small(tmp_path / "store")) == tree_bytes(pristine)


def test_a_writer_that_finishes_while_another_waits_for_its_lock(tmp_path, monkeypatch):
    """The folder that is locked has become the store meanwhile."""
    import fcntl

    real = fcntl.flock

    def finish_first(fd, operation):
        if os.path.samestat(os.fstat(fd), tmp_path.stat()):
            return real(fd, operation)  # of the names in the folder above
        monkeypatch.undo()
        (tmp_path / "store.partial").rename(tmp_path / "store")
        return real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    with pytest.raises(UsageError, match="another process is building this store"):
        write_small(tmp_path / "store")
    assert names_in(tmp_path / "store") == []


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(UsageError, match="target exists"), StoreWriter(tmp_path / "store", FINGERPRINT) as writer:
        shards = {name: add_shard(writer, name) for name in SHARDS}
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "thesis.tex").write_text("years of work")
        with Store(write_small(tmp_path / "other")) as other:
            manifest = m.Manifest(other.manifest.source, other.program, shards, {}, ())
        writer.finish(manifest)
    assert names_in(tmp_path / "store") == ["thesis.tex"]


def test_space_is_asked_for_before_anything_is_written(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with StoreWriter(tmp_path / "store", FINGERPRINT) as writer:
        writer.require_space(free // 2)
        with pytest.raises(DiskFullError, match=r"^\S+ \S+ needed, \S+ \S+ free - ") as caught:
            writer.require_space(free * 2)
    assert caught.value.exit_code == 5


def test_what_is_there_counts_as_written(tmp_path, monkeypatch):
    interrupt(tmp_path / "store")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1000))
    with StoreWriter(tmp_path / "store", FINGERPRINT) as writer:
        present = sum(path.stat().st_size for path in writer.partial.rglob("*") if path.is_file())
        writer.require_space(present + 952)
        with pytest.raises(DiskFullError):
            writer.require_space(present + 954)


def test_a_full_disk_frees_the_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as spoilt:
        spoilt.setattr(os, "write", full)
        with pytest.raises(DiskFullError):
            write_small(tmp_path / "store")
    assert names_in(tmp_path) == ["store.partial"]
    assert problems(write_small(tmp_path / "store")) == {}


def test_a_build_that_is_refused_leaves_nothing_and_one_that_fails_is_resumed(tmp_path):
    for error, is_kept in ((StageError("no"), False), (SourceError("cut short"), True), (OSError("no"), True)):
        with pytest.raises(type(error)), StoreWriter(tmp_path / "store", FINGERPRINT) as writer:
            add_shard(writer, "norm")
            raise error
        assert writer.partial.exists() is is_kept and not (tmp_path / "store").exists()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("lost", [False, True])
def test_an_empty_folder_becomes_the_store_in_place(pristine, tmp_path, force, lost):
    """It may be a mount point, which cannot be renamed, with the folder that a new file system has."""
    target = tmp_path / "store"
    (target / "lost+found" if lost else target).mkdir(parents=True)
    if lost:
        (target / "lost+found" / "piece").write_text("of a file")
    before = target.stat().st_ino
    write_small(target, force=force)
    assert target.stat().st_ino == before
    assert names_in(tmp_path) == ["store"]
    found = {name: data for name, data in tree_bytes(target).items() if not name.startswith("lost+found")}
    assert found == tree_bytes(pristine)
    assert (target / "lost+found" / "piece").exists() is lost
    with pytest.raises(UsageError, match="target exists"):
        write_small(target)


def test_a_build_in_place_is_resumed_and_keeps_the_folder_if_it_is_refused(pristine, tmp_path):
    target = tmp_path / "store"
    target.mkdir()
    with pytest.raises(StageError), StoreWriter(target, FINGERPRINT) as writer:
        add_shard(writer, "norm")
        raise StageError("no")
    assert names_in(target) == []
    with StoreWriter(target, FINGERPRINT) as writer:
        add_shard(writer, "norm")
        with pytest.raises(UsageError, match="another process is building this store"):
            write_small(target)
    before = (target / "norm.safetensors").stat().st_ino
    write_small(target)
    assert (target / "norm.safetensors").stat().st_ino == before
    assert tree_bytes(target) == tree_bytes(pristine)


def mark(store, fingerprint):
    try:
        os.setxattr(store, "user.offramp.unfinished", fingerprint.encode())
    except OSError:
        pytest.skip("this file system has no extended attributes")


@pytest.mark.parametrize("force", [False, True])
def test_a_store_whose_writer_was_killed_at_its_end_is_completed_and_not_cleared(pristine, store, tmp_path, force):
    mark(store, FINGERPRINT)
    (tmp_path / "store.retired").mkdir()
    (tmp_path / "store.retired" / ".retired").touch()
    before = (store / "norm.safetensors").stat().st_ino
    write_small(store, force=force)
    assert (store / "norm.safetensors").stat().st_ino == before
    assert tree_bytes(store) == tree_bytes(pristine) and names_in(tmp_path) == ["store"]
    with pytest.raises(UsageError, match="target exists"):
        write_small(store)


def test_another_command_does_not_replace_what_was_killed_at_its_end(store):
    mark(store, FINGERPRINT)
    before = tree_bytes(store)
    with pytest.raises(UsageError, match="target exists"):
        write_small(store, fingerprint="2" * 64)
    assert tree_bytes(store) == before


def test_a_folder_with_files_is_no_empty_folder(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(UsageError, match="target exists"):
            write_small(tmp_path / "store", force=force)
    assert names_in(tmp_path / "store") == ["thesis.tex"]


def test_a_mount_point_is_not_replaced(store, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(store))
    with pytest.raises(UsageError, match=r"a mount point cannot be replaced - .* - remove its files"):
        write_small(store, force=True)


def test_a_file_system_that_reports_no_sizes(tmp_path, monkeypatch):
    with StoreWriter(tmp_path / "store", FINGERPRINT) as writer:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
        writer.require_space(1 << 60)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
        with pytest.raises(DiskFullError):
            writer.require_space(1 << 20)

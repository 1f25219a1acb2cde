import errno
import fcntl
import os
import shutil
import stat

import numpy as np
import pytest

from offramp.errors import DamagedError, DiskFullError, OfframpError, StoreError, SystemNotice, UsageError
from offramp.store import Store, StoreWriter
from offramp.store.files import (
    absolute,
    iter_chunks,
    lock_folder,
    make_folder,
    open_regular,
    translate_disk_full,
    write_atomic,
)
from offramp.store.folders import Folder
from tests.odd_files import dangling, fifo, folder, link, no_hang, unix_socket
from tests.store.small import names_in, problems, refused, use

FILES = ["layer-00.safetensors", "graphs/layer.onnx", "vocab.txt", "rows.blocks", "offramp.json"]


def device(path):
    path.unlink()
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("this user may not make devices")


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def extend(path):
    with open(path, "ab") as file:
        file.write(b"PK\3\4")


def empty(path):
    os.truncate(path, 0)


PLAIN = "not a regular file: a store must not contain links or devices"
ATTACKS = {
    link: PLAIN,
    dangling: PLAIN,
    fifo: PLAIN,
    folder: PLAIN,
    unix_socket: PLAIN,
    device: PLAIN,
    os.unlink: "file is missing",
    cut: "from the manifest",
    extend: "from the manifest",
    empty: "file has 0 bytes, expected",
}


@pytest.fixture(autouse=True)
def nothing_hangs():
    """A pipe that nobody writes to is waited for for ever, unless it is opened with care."""
    with no_hang(10):
        yield


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_none(store, file, attack):
    attack(store / file)
    if file == "offramp.json":
        mentions = {os.unlink: "no offramp.json", cut: "", extend: "", empty: "not JSON"}.get(attack, ATTACKS[attack])
        for action in (lambda: Store(store), lambda: problems(store)):
            refused(UsageError if attack is os.unlink else StoreError, action, mentions)
        return
    message = refused(DamagedError, lambda: use(store), ATTACKS[attack])
    assert str(store / file) in message
    found = problems(store)
    assert ATTACKS[attack] in found[file]
    assert found.keys() == {file}


def test_a_symlinked_folder_of_graphs(store):
    (store / "graphs").rename(store.parent / "elsewhere")
    (store / "graphs").symlink_to(store.parent / "elsewhere")
    refused(DamagedError, lambda: use(store), PLAIN)
    assert set(problems(store)) == {f"graphs/{kind}.onnx" for kind in ("embedding", "layer", "head", "exit")}


def test_a_file_in_place_of_the_folder_of_graphs(store):
    shutil.rmtree(store / "graphs")
    (store / "graphs").write_text("")
    refused(DamagedError, lambda: use(store), PLAIN)


def test_a_hard_link_is_as_good_as_its_digest(store):
    os.link(store / "vocab.txt", store.parent / "other")
    use(store)
    assert problems(store) == {}


def test_a_link_to_a_whole_store_is_the_users_own(store):
    link = store.parent / "link"
    link.symlink_to(store)
    use(link)
    assert problems(link) == {}


def test_two_shards_that_changed_places(store):
    """The same size and shape, each a sound file."""
    (store / "layer-00.safetensors").rename(store / "swap")
    (store / "layer-01.safetensors").rename(store / "layer-00.safetensors")
    (store / "swap").rename(store / "layer-01.safetensors")
    message = refused(DamagedError, lambda: use(store), "sha256 differs")
    assert "layer-00.safetensors" in message
    assert set(problems(store)) == {"layer-00.safetensors", "layer-01.safetensors"}


@pytest.mark.parametrize("name", ["missing", "file", "empty\x1b[31m"])
def test_no_store(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty\x1b[31m").mkdir()
    mentions = {"missing": "no such store", "file": "not a folder"}.get(name, "not a store: no offramp.json")
    refused(UsageError, lambda: Store(tmp_path / name), mentions)
    refused(UsageError, lambda: problems(tmp_path / name), mentions)


def test_an_empty_path_is_not_the_working_folder(store, monkeypatch):
    monkeypatch.chdir(store)
    refused(UsageError, lambda: Store(""), "no such file or folder - ''")


def test_other_files_beside_are_never_opened(store):
    os.mkfifo(store / "README.md")
    use(store)
    assert problems(store) == {}


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("call", ["open", "pread", "preadv"])
def test_a_disk_that_fails(store, monkeypatch, code, call):
    def failing(*_, **__):
        raise OSError(code, os.strerror(code))

    with Store(store) as opened:
        actions = {
            "open": lambda: opened.read_shard("norm", memoryview(bytearray(1 << 20))),
            "pread": lambda: opened.read_file(opened.manifest.files[0]),
            "preadv": lambda: opened.read_shard("norm", memoryview(bytearray(1 << 20))),
        }
        with monkeypatch.context() as spoilt:
            spoilt.setattr(os, call, failing)
            refused(StoreError, actions[call], f"cannot be read ({os.strerror(code)}) - {store}")


@pytest.mark.parametrize("call", ["pread", "preadv"])
def test_a_disk_that_fails_under_a_table(store, monkeypatch, call):
    def failing(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Store(store) as opened:
        opened.gather("rows", "type", np.array([0]))
        with monkeypatch.context() as spoilt:
            spoilt.setattr(os, call, failing)
            refused(StoreError, lambda: opened.gather("rows", "word", np.array([0])), "rows.safetensors - check")


def test_a_store_that_was_removed_while_it_was_open(store):
    with Store(store) as opened:
        shutil.rmtree(store)
        refused(DamagedError, lambda: opened.read_shard("norm", memoryview(bytearray(1 << 20))), "file is missing")


def test_no_descriptor_stays_open(store):
    os.mkfifo(store / "pipe")
    before = names_in("/proc/self/fd")
    for name in ("pipe", "missing", "graphs", "missing/x", "vocab.txt/x"):
        with pytest.raises(DamagedError):
            open_regular(store, name)
    use(store)
    assert names_in("/proc/self/fd") == before


def test_chunks(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(10)))
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    assert [len(chunk) for chunk in iter_chunks(fd, 10, 4)] == [4, 4, 2]
    assert b"".join(iter_chunks(fd, 7, 4)) == bytes(range(7))
    assert b"".join(iter_chunks(fd, 99, 4)) == bytes(range(10))
    os.close(fd)


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    def chunks():
        yield b"new"
        raise RuntimeError("source is gone")

    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="source is gone"):
        write_atomic(path, chunks())
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["file"]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    file = write_atomic(tmp_path / "file", [b"0123456789", memoryview(b"abcd")])
    assert (tmp_path / "file").read_bytes() == b"0123456789abcd"
    assert (file.file, file.bytes) == ("file", 14)


FULL = {
    errno.ENOSPC: "no space left - place - free some space and run again",
    errno.EDQUOT: "the quota of the disk is used up - place - free some space or raise the quota, and run again",
    errno.EFBIG: "the limit of file sizes is reached - place - raise it (ulimit -f unlimited) and run again",
}


@pytest.mark.parametrize("code", FULL)
def test_a_full_disk_is_said(code):
    with pytest.raises(DiskFullError) as caught, translate_disk_full("place"):
        raise OSError(code, os.strerror(code))
    assert caught.value.exit_code == 5
    assert str(caught.value) == FULL[code]


def test_a_writer_of_a_store_says_what_is_kept(tmp_path):
    writer = StoreWriter(tmp_path / "store", "fingerprint")
    with pytest.raises(DiskFullError) as caught, writer, translate_disk_full("place"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(caught.value) == f"{FULL[errno.ENOSPC]}: finished shards are kept"
    assert caught.value.remedy == "free some space and run again: finished shards are kept"


def test_other_troubles_of_a_disk_are_not_called_full():
    with pytest.raises(OSError, match="Input/output") as caught, translate_disk_full("place"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert not isinstance(caught.value, OfframpError)


def test_a_folder_inside_a_store_is_no_link(tmp_path):
    make_folder(tmp_path / "graphs")
    make_folder(tmp_path / "graphs")
    (tmp_path / "link").symlink_to(tmp_path / "graphs")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        refused(DamagedError, lambda: make_folder(tmp_path / name), PLAIN)  # noqa: B023


UNSUPPORTED = ("ENOSYS", "EOPNOTSUPP", "ENOLCK", "EINVAL", "EBADF")
BROKEN = ("EIO", "ENOSPC", "EACCES")


def failing_with(name):
    def fail(*_):
        number = getattr(errno, name)
        raise OSError(number, os.strerror(number))

    return fail


def test_a_lock_is_of_a_folder(tmp_path):
    """A file is not locked in place of a folder, nor a folder behind a link."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("folder")
    for name in ("file", "link"):
        with pytest.raises(UsageError, match="no place for it"):
            lock_folder(tmp_path / name, "no place for it", "it is busy")
    release = lock_folder(tmp_path / "folder", "no place for it", "it is busy")
    with pytest.raises(UsageError, match="it is busy"):
        lock_folder(tmp_path / "folder", "no place for it", "it is busy")
    release()
    lock_folder(tmp_path / "folder", "no place for it", "it is busy")()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_file_system_without_locks(tmp_path, monkeypatch, name):
    """A file that one process can create takes the place of the lock, and goes with it."""
    monkeypatch.setattr(fcntl, "flock", failing_with(name))
    with pytest.warns(SystemNotice, match=r"no locks: folder\.lock"):
        release = lock_folder(tmp_path / "folder", "no", "another process is here")
    with pytest.raises(UsageError, match=r"^another process is here - .*folder\.lock - wait .* remove this file"):
        lock_folder(tmp_path / "folder", "no", "another process is here")
    release()
    assert names_in(tmp_path) == ["folder"]
    with pytest.warns(SystemNotice):
        lock_folder(tmp_path / "folder", "no", "busy")()


@pytest.mark.parametrize("name", BROKEN)
def test_a_lock_that_fails_is_not_a_file_system_without_locks(tmp_path, monkeypatch, name):
    monkeypatch.setattr(fcntl, "flock", failing_with(name))
    before = names_in("/proc/self/fd")
    with pytest.raises((OSError, UsageError)):
        lock_folder(tmp_path / "folder", "cannot be locked", "busy")
    assert names_in(tmp_path) == ["folder"]
    assert names_in("/proc/self/fd") == before


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_file_system_that_cannot_flush(tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, "fsync", failing_with(name))
    with pytest.warns(SystemNotice, match="does not flush"):
        write_atomic(tmp_path / "file", [b"x"])
    assert (tmp_path / "file").read_bytes() == b"x"


@pytest.mark.parametrize("name", ["EIO", "ENOSPC"])
def test_a_flush_that_fails_is_an_error(tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, "fsync", failing_with(name))
    with pytest.raises((OSError, DiskFullError), match=r"file"):
        write_atomic(tmp_path / "file", [b"x"])
    assert names_in(tmp_path) == []


def test_a_folder_is_found_although_it_moves(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Folder("store")
    assert folder.path == store and folder.fd == folder.fd
    monkeypatch.chdir("/")
    store.rename(tmp_path / "moved")
    os.close(open_regular(folder.path, "graphs/layer.onnx", dir_fd=folder.fd))
    folder.close()
    refused(DamagedError, lambda: folder.fd, "file is missing")


def test_a_working_folder_that_was_deleted(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert absolute(tmp_path) == tmp_path
    with pytest.raises(UsageError, match="the working folder was deleted - store - change to a folder that exists"):
        absolute("store")


@pytest.mark.parametrize("path", [None, 5, b"store"])
def test_a_path_is_a_text_or_a_path(path):
    with pytest.raises(ValueError, match="must be a text or a Path, not"):
        absolute(path)
    with pytest.raises(ValueError, match="must be a text or a Path, not"):
        Store(path)

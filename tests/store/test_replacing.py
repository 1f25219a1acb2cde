"""Readers and writers of one store: a reader finishes on the files that it opened, and no wrong folder is deleted."""

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from offramp.errors import DamagedError, StoreError, SystemNotice, UsageError
from offramp.store import Store, StoreWriter, folders, reader, verify
from offramp.store.folders import exchange
from tests.store.small import FINGERPRINT, names_in, problems, read, write_small
from tests.store.test_places import everything
from tests.store.test_writer import tree_bytes

NEW, NEWER = {"num_layer_items": 301}, {"num_layer_items": 302}


@pytest.fixture(autouse=True)
def nothing_is_flushed(monkeypatch):
    """These tests end no machine, and a disk takes longer than all they do."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def fail(number):
    def failing(*_, **__):
        raise OSError(number, os.strerror(number))

    return failing


def no_exchange(monkeypatch):
    """A kernel of before 2014, or a file system without exchange."""
    monkeypatch.setattr(folders, "exchange", lambda *_: False)


def no_locks(monkeypatch):
    monkeypatch.setattr(fcntl, "flock", fail(errno.ENOLCK))


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SystemNotice)
        yield


def replace(store, **changes):
    return write_small(store, force=True, **changes)


def has_exchange(folder):
    for name in "ab":
        (folder / f"try-{name}").mkdir()
    done = exchange(folder / "try-a", folder / "try-b")
    for name in "ab":
        (folder / f"try-{name}").rmdir()
    return done


@pytest.mark.parametrize("spoil", [None, no_exchange])
def test_a_reader_finishes_on_the_files_that_it_opened(store, tmp_path, monkeypatch, quiet, spoil):
    monkeypatch.setattr(reader, "MOST_OPEN", 0)  # each read finds its file again
    if spoil:
        spoil(monkeypatch)
    old = tree_bytes(store)
    with Store(store, "always") as first:
        before = everything(first)
        replace(store, **NEW)
        with Store(store, "always") as second:
            between = everything(second)
            replace(store, **NEWER)
            assert everything(first) == before and everything(second) == between != before
        assert names_in(tmp_path) == ["store", "store.retired", "store.retired.1"]
        assert {**old, ".retired": b""} == tree_bytes(tmp_path / "store.retired")
        replace(store, **NEW)
        assert names_in(tmp_path) == ["store", "store.retired"]  # nobody reads the second one any more
        assert everything(first) == before
    replace(store)
    assert names_in(tmp_path) == ["store"]
    assert tree_bytes(store) == old


def test_a_store_that_nobody_reads_is_deleted_at_once(store, tmp_path):
    with Store(store) as opened:
        read(opened, "norm")
    replace(store, **NEW)
    assert names_in(tmp_path) == ["store"]


def test_what_is_read_after_close_is_of_the_store_that_was_opened(store):
    opened = Store(store)
    read(opened, "norm")
    opened.close()
    assert read(opened, "norm")
    opened.close()
    replace(store, **NEW)
    with pytest.raises(StoreError, match=r"another store has taken the place .* - .*store - open it again"):
        read(opened, "norm")
    with Store(store) as again:
        assert everything(again)


def test_without_locks_a_reader_is_told_what_happened(store, tmp_path, monkeypatch, quiet):
    no_locks(monkeypatch)
    monkeypatch.setattr(reader, "MOST_OPEN", 0)
    with Store(store) as opened:
        read(opened, "norm")
        replace(store, **NEW)
        assert names_in(tmp_path) == ["store"]
        for action in (lambda: read(opened, "norm"), lambda: opened.read_file(opened.manifest.files[0])):
            with pytest.raises(StoreError, match="another store has taken the place of the one that was opened"):
                action()
        shutil.rmtree(store)
        with pytest.raises(DamagedError, match="file is missing"):
            read(opened, "norm")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOSYS])
def test_reading_needs_no_lock(store, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", fail(number))
    with Store(store) as opened:
        assert everything(opened)
    assert problems(store) == {}


def test_verify_holds_the_store(store, tmp_path):
    checks = verify(store)
    next(checks)
    replace(store, **NEW)
    assert [check.problem for check in checks if check.problem] == []
    assert "store.retired" in names_in(tmp_path)


def test_a_reader_that_died_keeps_nothing(store, tmp_path):
    call = f"import time; from offramp.store import Store; s = Store({str(store)!r}); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.PIPE) as child:
        child.stdout.read(1)
        replace(store, **NEW)
        assert names_in(tmp_path) == ["store", "store.retired"]
        child.kill()
    replace(store)
    assert names_in(tmp_path) == ["store"]


def foreign_folder(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("years of work")


def link(tmp_path, name):
    foreign_folder(tmp_path, "home")
    (tmp_path / "home" / ".retired").touch()
    (tmp_path / name).symlink_to("home")


def linked_mark(tmp_path, name):
    foreign_folder(tmp_path, name)
    (tmp_path / "mark").touch()
    (tmp_path / name / ".retired").symlink_to(tmp_path / "mark")


def file(tmp_path, name):
    (tmp_path / name).write_text("years of work")


def marked_with_another_name(tmp_path, name):
    foreign_folder(tmp_path, name + ".old")
    (tmp_path / (name + ".old") / ".retired").touch()


@pytest.mark.parametrize("make", [foreign_folder, link, linked_mark, file, marked_with_another_name])
def test_no_folder_of_somebody_else_is_deleted(store, tmp_path, make):
    make(tmp_path, "store.retired.1")
    before = tree_bytes(tmp_path)
    for changes in (NEW, {}):
        with Store(store):
            replace(store, **changes)
    shutil.rmtree(tmp_path / "store.retired", ignore_errors=True)
    replace(store)
    after = tree_bytes(tmp_path)
    assert {name: after.get(name) for name in before if not name.startswith("store/")} == {
        name: data for name, data in before.items() if not name.startswith("store/")
    }


def test_a_link_in_place_of_the_mark_is_not_followed(store, tmp_path):
    (tmp_path / "dear").write_text("years of work")
    (store / ".retired").symlink_to(tmp_path / "dear")
    os.utime(tmp_path / "dear", (1, 1))
    replace(store, **NEW)
    assert (tmp_path / "dear").stat().st_mtime == 1
    assert names_in(tmp_path) == ["dear", "store"]


def killed(*_):
    raise KeyboardInterrupt


STEPS = {
    "before the mark": (folders, "_mark"),
    "before the exchange": (folders, "exchange"),
    "after the exchange": (folders, "retired_name"),
    "before the deletion": (folders, "delete_retired"),
    "in the deletion": (folders, "remove"),
}


@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_a_writer_that_was_killed_is_followed_by_one_that_finishes(store, tmp_path, monkeypatch, step, is_read):
    """The old store is there, or the new one, and the next division leaves nothing beside it that is not read."""
    if not has_exchange(tmp_path):
        pytest.skip("this file system cannot exchange two folders")
    old = tree_bytes(store)
    new = tree_bytes(write_small(tmp_path / "new", **NEW))
    with contextlib.ExitStack() as reading:
        opened = reading.enter_context(Store(store, "always")) if is_read else None
        with monkeypatch.context() as spoilt:
            spoilt.setattr(*STEPS[step], killed)
            with contextlib.suppress(KeyboardInterrupt):  # a store that is read is not deleted
                replace(store, **NEW)
        found = {name: data for name, data in tree_bytes(store).items() if name != ".retired"}
        assert found == (old if step.startswith("before the") and step != "before the deletion" else new)
        assert problems(store) == {}
        replace(store, **NEW)
        assert tree_bytes(store) == new
        assert names_in(tmp_path) == ["new", "store", *(["store.retired"] if opened else [])]
        if opened:
            assert everything(opened)
    replace(store, **NEW)
    assert names_in(tmp_path) == ["new", "store"]


def test_the_store_of_a_writer_killed_between_two_renames_is_kept(store, tmp_path, monkeypatch, quiet):
    """Where names cannot be exchanged there may be no store; the old one is deleted when the new one is there."""
    no_exchange(monkeypatch)
    monkeypatch.setattr(folders, "WAIT_SECONDS", 0.05)
    real = Path.rename

    def rename(path, target):
        if path.name == "store.partial":
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as spoilt, pytest.raises(KeyboardInterrupt):
        spoilt.setattr(Path, "rename", rename)
        replace(store, **NEW)
    assert not store.exists() and problems(tmp_path / "store.retired") == {}
    for action in (lambda: Store(store), lambda: list(verify(store))):
        with pytest.raises(StoreError, match=r"being replaced - .*store - run again .*; divide again if it was killed"):
            action()
    write_small(store, **NEW)
    assert names_in(tmp_path) == ["store"]


@pytest.mark.parametrize("kind", ["no store at all", "a retired store beside a link that leads nowhere"])
def test_a_store_that_is_absent_is_not_waited_for(tmp_path, kind):
    if kind != "no store at all":
        (tmp_path / "store").symlink_to("nowhere")
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"no such store|not a folder"):
        Store(tmp_path / "store")
    assert time.monotonic() - began < folders.WAIT_SECONDS


def test_who_opens_between_two_renames_waits_for_the_second(store, tmp_path):
    """Also by a link."""
    (tmp_path / "link").symlink_to(store)
    (store / ".retired").touch()
    shutil.copytree(store, tmp_path / "new")
    store.rename(tmp_path / "store.retired")
    timer = threading.Timer(0.1, (tmp_path / "new").rename, [store])
    timer.start()
    with Store(tmp_path / "link") as opened:
        assert opened.manifest
    timer.join()


@contextlib.contextmanager
def locked(store, kind):
    lock = os.open(store, os.O_RDONLY)
    fcntl.flock(lock, kind | fcntl.LOCK_NB)
    yield lock
    with contextlib.suppress(OSError):
        os.close(lock)


def test_a_reader_waits_for_the_lock_of_the_writer_that_has_just_finished(store):
    with locked(store, fcntl.LOCK_EX) as lock:
        timer = threading.Timer(0.1, fcntl.flock, [lock, fcntl.LOCK_UN])
        timer.start()
        with Store(store), pytest.raises(BlockingIOError), locked(store, fcntl.LOCK_EX):
            pass
        timer.join()


def test_a_writer_that_was_stopped_does_not_keep_readers_out(store, monkeypatch):
    monkeypatch.setattr(folders, "WAIT_SECONDS", 0.05)
    with locked(store, fcntl.LOCK_EX), Store(store) as opened:
        assert everything(opened)


def test_a_store_that_is_built_in_place_is_not_waited_for(tmp_path):
    """Its writer reads it to prove it."""
    (tmp_path / "store").mkdir()
    with StoreWriter(tmp_path / "store", FINGERPRINT):
        began = time.monotonic()
        with pytest.raises(UsageError, match="not a store"):
            Store(tmp_path / "store")
        assert time.monotonic() - began < 1


def test_names_are_exchanged_in_one_step(tmp_path):
    if not has_exchange(tmp_path):
        pytest.skip("this file system cannot exchange two folders")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "one").touch()
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert names_in(tmp_path / "a") == [] and names_in(tmp_path / "b") == ["one"]
    with pytest.raises(FileNotFoundError, match=r"missing.*->.*b"):
        exchange(tmp_path / "missing", tmp_path / "b")


@pytest.mark.parametrize("machine", ["mips", "x86"])
def test_a_machine_whose_number_of_the_call_is_unknown_cannot_exchange(tmp_path, monkeypatch, machine):
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "", "", "", machine)))
    assert exchange(tmp_path / "a", tmp_path / "b") is False


@pytest.mark.parametrize("is_64_bit", [False, True])
def test_a_process_of_other_words_than_the_machine_has_its_own_numbers(monkeypatch, is_64_bit):
    """Another number would be another call."""
    for machine, wide in folders._RENAMEAT2:
        assert (machine in ("x86_64", "aarch64")) is wide
    monkeypatch.setattr(sys, "maxsize", (1 << (63 if is_64_bit else 31)) - 1)
    monkeypatch.setattr(
        os, "uname", lambda: os.uname_result(("Linux", "", "", "", "armv7l" if is_64_bit else "x86_64"))
    )
    assert exchange(Path("missing"), Path("missing")) is False


@pytest.mark.parametrize("name", ["ENOSYS", "EINVAL", "EOPNOTSUPP", "EPERM", "EXDEV"])
def test_a_system_without_exchange_renames_twice_and_says_so(store, tmp_path, monkeypatch, name):
    import ctypes

    class Library:
        @staticmethod
        def syscall(*_):
            ctypes.set_errno(getattr(errno, name))
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Library)
    with pytest.warns(SystemNotice, match="cannot exchange two folders"):
        replace(store, **NEW)
    assert problems(store) == {} and names_in(tmp_path) == ["store"]


READERS = """
import os, sys, time
from pathlib import Path
from offramp.errors import OfframpError
from offramp.store import Store
from tests.store.test_places import everything
from tests.store.small import write_small

os.fsync = lambda fd: None
folder, stop = Path(sys.argv[1]), Path(sys.argv[1], "stop")

def answers(path):
    with Store(path, "always") as store:
        return everything(store)

known = [answers(folder / "old"), answers(folder / "new")]

def read_all(number):
    seen = set()
    while not stop.exists():
        seen.add(known.index(answers(folder / "store")))
        time.sleep(0.002)
    (folder / f"seen-{number}").write_text(str(sorted(seen)))

def watch():
    count = 0
    while not stop.exists():
        time.sleep(0)
        count += os.path.lexists(folder / "store/offramp.json") is False
    (folder / "absent").write_text(str(count))

pids = []
for number in range(7):
    pids.append(os.fork())
    if not pids[-1]:
        try:
            watch() if number == 6 else read_all(number)
        except BaseException as error:
            (folder / f"error-{number}").write_text(repr(error))
        os._exit(0)
for turn in range(int(sys.argv[2])):
    write_small(folder / "store", force=True, **({"num_layer_items": 301} if turn % 2 == 0 else {}))
stop.touch()
for pid in pids:
    os.waitpid(pid, 0)
write_small(folder / "store", force=True)
"""


def test_readers_never_see_anything_but_the_old_store_or_the_new_one(store, tmp_path):
    """Six processes read all files again and again while a store is replaced; one looks whether it is always there."""
    if not has_exchange(tmp_path):
        pytest.skip("this file system cannot exchange two folders")
    shutil.copytree(store, tmp_path / "old")
    write_small(tmp_path / "new", **NEW)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", READERS, str(tmp_path), "15"]
    subprocess.run(command, check=True, env=env, cwd=Path(__file__).parents[2], timeout=120)
    assert [path.read_text() for path in tmp_path.glob("error-*")] == []
    assert (tmp_path / "absent").read_text() == "0"
    assert {(tmp_path / f"seen-{number}").read_text() for number in range(6)} <= {"[0]", "[1]", "[0, 1]"}
    assert not [name for name in names_in(tmp_path) if name.startswith("store.")]

"""A process that dies at any change of its files leaves what the next one completes: the same files, and no others."""

import os
import shutil

import numpy as np
import pytest

from offramp.errors import UsageError
from offramp.store.files import NewFile, write_all, write_atomic
from offramp.store.memory import VerifiedMemory
from offramp.store.scratch import scratch_folder
from offramp.store.transcript import TranscriptWriter, find_transcript
from tests.forked import die_at, in_child, num_changes
from tests.store.small import names_in, write_small
from tests.store.test_transcript import ABOUT, NUM_EXITS, NUM_ROWS, arrays, write
from tests.store.test_writer import tree_bytes


def a_file(place):
    write_atomic(place / "policy.json", [b"{", b"}"])


def an_old_file(place):
    (place / "policy.json").write_bytes(b"old")


def a_transcript(place):
    given = arrays()
    if find_transcript(place / "t", ABOUT, given["features"].shape[2]) is None:
        write(place / "t", given)


def a_store(place):
    try:
        write_small(place / "store")
    except UsageError as error:
        assert "target exists" in str(error) and not has_attributes(place)


def has_attributes(place):
    """Whether the file system keeps the mark by which a store is known whose writer was killed at its very end."""
    try:
        os.setxattr(place, "user.offramp.test", b"")
    except OSError:
        return False
    return True


def a_replaced_store(place):
    write_small(place / "store", fingerprint="2" * 64, force=True)


def an_empty_folder(place):
    (place / "store").mkdir()


def verified(place):
    memory = VerifiedMemory(place / "store", b"manifest")
    memory.remember("layer", "1:2:3")
    memory.save()


def in_scratch(place):
    with scratch_folder("scratch-", place) as folder:
        write_atomic(folder / "inputs", [b"x"])


def nothing(place):
    pass


WORKS = {
    "file": (nothing, a_file),
    "file that exists": (an_old_file, a_file),
    "transcript": (nothing, a_transcript),
    "store": (nothing, a_store),
    "store in an empty folder": (an_empty_folder, a_store),
    "store that is replaced": (lambda place: write_small(place / "store"), a_replaced_store),
    "cache": (nothing, verified),
    "temporary folder": (nothing, in_scratch),
}


def sample(total):
    """The numbers of calls that are tried: all of few, else some and the last, where names change."""
    return range(total) if total < 50 else [*range(0, total - 12, 29), *range(total - 12, total)]


@pytest.mark.parametrize("name", WORKS)
def test_a_process_that_dies_at_any_call_leaves_what_the_next_completes(tmp_path, monkeypatch, name):
    """Every second time the next one dies as well, half way."""
    prepare, work = WORKS[name]
    place, problems = tmp_path / "place", []
    monkeypatch.setenv("OFFRAMP_CACHE", str(place / "cache"))

    def renew():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        num_changes(lambda: prepare(place))

    renew()
    total = num_changes(lambda: work(place))
    wanted = tree_bytes(place)
    assert total >= 4 and not list(place.rglob("*.tmp"))
    for number in sample(total):
        renew()
        assert die_at(number, lambda: work(place))
        if number % 2:
            die_at(number // 2, lambda: work(place))
        num_changes(lambda: work(place))
        found = tree_bytes(place)
        problems += [(number, file) for file in sorted({*found, *wanted}) if found.get(file, 0) != wanted.get(file, 0)]
    assert problems == []


def test_a_file_that_another_process_writes_is_left_to_it(tmp_path):
    path = tmp_path / "answers.csv"

    def fails():
        with pytest.raises(UsageError, match=r"another process is writing this file - .*answers\.csv - wait until"):
            write_atomic(path, [b"theirs"])

    with NewFile(path) as file:
        write_all(file.fd, b"ours")
        assert in_child(fails) == 0
        file.finish()
    assert (path.read_bytes(), names_in(tmp_path)) == (b"ours", ["answers.csv"])


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_temporary_name_that_is_taken_by_something_else_is_refused(tmp_path, kind):
    taken, dear = tmp_path / "a.csv.tmp", tmp_path / "dear"
    dear.write_text("years of work")
    {"link": lambda: taken.symlink_to(dear), "pipe": lambda: os.mkfifo(taken), "folder": taken.mkdir}[kind]()
    with pytest.raises(UsageError, match=r"is a link, a pipe, a device or a folder - .*a\.csv\.tmp - remove it"):
        write_atomic(tmp_path / "a.csv", [b"x"])
    assert dear.read_text() == "years of work" and os.path.lexists(taken)
    taken.rmdir() if kind == "folder" else taken.unlink()
    write_atomic(tmp_path / "a.csv", [b"x"])


def test_data_that_no_killed_process_left_are_not_replaced(tmp_path):
    """Without the description that was to come next, or with one of other data, they are somebody's own."""
    (tmp_path / "dev.safetensors").write_bytes(b"a model")
    for _ in range(2):
        with pytest.raises(UsageError, match=r"target exists - .*dev.safetensors - choose another folder"):
            write(tmp_path, arrays())
        assert (tmp_path / "dev.safetensors").read_bytes() == b"a model"
        write(tmp_path / "other", arrays())
        (tmp_path / "other" / "dev.json").rename(tmp_path / "dev.json.tmp")
        shutil.rmtree(tmp_path / "other")


def test_a_description_that_cannot_get_its_name_leaves_no_data(tmp_path, monkeypatch):
    def spoilt(function):
        def call(source, target, **options):
            if str(target).endswith(".json"):
                raise OSError(5, "Input/output error")
            return function(source, target, **options)

        return call

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, spoilt(getattr(os, name)))
    with pytest.raises(OSError, match="Input/output"):
        write(tmp_path, arrays())
    assert names_in(tmp_path) == []


def test_a_split_is_written_by_one_process_at_a_time(tmp_path):
    def fails():
        with pytest.raises(UsageError, match="another process is writing this file"):
            write(tmp_path, arrays(1))

    with TranscriptWriter(tmp_path, ABOUT, NUM_ROWS, NUM_EXITS, 2, 4) as writer:
        assert in_child(fails) == 0
        writer.write(0, **arrays())
        writer.finish()
    found = find_transcript(tmp_path, ABOUT, 4)
    assert found is not None
    np.testing.assert_array_equal(found.logits_NKC, arrays()["logits"])
    assert find_transcript(tmp_path, ABOUT, 0) is None, "it was to have no features"


def test_temporary_folders_in_use_and_of_others_are_kept(tmp_path, monkeypatch):
    (tmp_path / "other-x").mkdir()
    with scratch_folder("scratch-", tmp_path) as first, scratch_folder("scratch-", tmp_path) as second:
        assert first != second and first.is_dir() and second.is_dir()
    assert names_in(tmp_path) == ["other-x"]
    (tmp_path / "scratch-dead").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with scratch_folder("scratch-", tmp_path):
        assert (tmp_path / "scratch-dead").is_dir()
    monkeypatch.undo()
    with scratch_folder("scratch-", tmp_path):
        assert not (tmp_path / "scratch-dead").exists()

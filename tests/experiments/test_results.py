"""The results folder: what a kill, a second writer, a full disk or another release may leave, and what is refused."""

import base64
import errno
import hashlib
import json
import math
import os
import resource

import numpy as np
import pytest

from offramp.errors import DamagedError, DiskFullError, OfframpError, RefusedError, UsageError
from offramp.experiments import results
from offramp.experiments.results import ABOUT, RECORDS, Results, TooLargeError, completed, line_of, read_results
from offramp.store import files

RECORD = {"id": "a.1", "figures": {"latency": 0.5}}


@pytest.fixture
def folder(tmp_path):
    """A folder with three records."""
    with Results(tmp_path / "results", print) as found:
        for number in range(3):
            found.add({**RECORD, "id": f"a.{number}"})
    return tmp_path / "results"


def ids(records):
    return [record["id"] for record in records]


def test_records_are_added_and_read_again(folder):
    with Results(folder, print) as found:
        assert ids(found.records) == ["a.0", "a.1", "a.2"]
        found.add({**RECORD, "id": "b.1"})
    assert ids(read_results(folder, print)) == ["a.0", "a.1", "a.2", "b.1"]
    for line in (folder / RECORDS).read_text().splitlines():
        assert set(json.loads(line)) == {"sha256", "record"}, "each line is JSON by itself"


def test_the_last_line_of_an_id_is_its_record_and_comes_where_it_was_measured(folder):
    with Results(folder, print) as found:
        found.add({**RECORD, "id": "a.1", "figures": {"latency": 2.0}})
    with Results(folder, print) as found:
        assert ids(found.records) == ids(read_results(folder, print)) == ["a.0", "a.2", "a.1"]
        assert found.records[-1]["figures"] == {"latency": 2.0}
        for without in ({"figures": {}}, {"id": ["a"], "figures": {}}):
            found.add(without)
            found.add(without)
    assert len(read_results(folder, print)) == 7, "records of studies have no id"


def test_every_torn_last_line_is_cut_off_at_the_last_good_byte(folder):
    whole, logged = (folder / RECORDS).read_bytes(), []
    last = len(whole) - len(line_of({**RECORD, "id": "a.2"}))
    for end in {last + 1, last + 40, last + 80, len(whole) - 2, len(whole) - 1}:
        (folder / RECORDS).write_bytes(whole[:end])
        assert ids(read_results(folder, logged.append)) == ["a.0", "a.1"], "a reader leaves it out"
        assert len((folder / RECORDS).read_bytes()) == end, "and changes nothing"
        with Results(folder, logged.append) as found:
            found.add({**RECORD, "id": "a.2"})
        assert (folder / RECORDS).read_bytes() == whole
        assert "the last line is not finished" in logged[-2] and "cut off" in logged[-1]


def test_a_damaged_tail_of_several_lines_is_cut_off_and_a_damaged_middle_is_refused(folder):
    whole = (folder / RECORDS).read_bytes()
    lines = whole.splitlines(keepends=True)
    (folder / RECORDS).write_bytes(lines[0] + bytes(50) + b"\n" + lines[2][:-9] + b"\n")
    with Results(folder, print) as found:
        assert ids(found.records) == ["a.0"]
    assert (folder / RECORDS).read_bytes() == lines[0]
    changed = lines[1].replace(b"0.5", b"0.6")
    (folder / RECORDS).write_bytes(lines[0] + changed + lines[2])
    for read in (read_results, Results):
        with pytest.raises(DamagedError, match=r"line is damaged.*records.jsonl, line 2"):
            read(folder, print)
    with pytest.raises(DamagedError):
        Results(folder, print)  # the lock was released


def test_two_writers_at_once(folder):
    with Results(folder, print), pytest.raises(UsageError, match="another sweep writes to this folder"):
        Results(folder, print)
    with Results(folder, print):
        assert ids(read_results(folder, print)) == ["a.0", "a.1", "a.2"], "a reader needs no lock"


def test_without_locks_a_file_keeps_others_away(folder, monkeypatch):
    def no_locks(fd, kind):
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with pytest.warns(match="no locks"), Results(folder, print), pytest.raises(UsageError, match="another sweep"):
        Results(folder, print)
    assert not folder.with_name("results.lock").exists()


@pytest.mark.parametrize("read", [Results, read_results])
def test_results_of_another_version_and_unreadable_ones_are_refused(folder, read):
    (folder / ABOUT).write_text('{"format": 99}')
    with pytest.raises(RefusedError, match="results of format 99, and this release knows 1"):
        read(folder, print)
    (folder / ABOUT).write_text("{")
    with pytest.raises(RefusedError, match="unreadable"):
        read(folder, print)


def test_folders_that_are_none(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("x")
    with pytest.raises(UsageError, match=r"not a results folder: it holds precious.txt"):
        Results(tmp_path / "other", print)
    with pytest.raises(UsageError, match="not a results folder"):
        read_results(tmp_path / "other", print)
    with pytest.raises(UsageError, match="no such results folder"):
        read_results(tmp_path / "none", print)
    with Results(tmp_path / "empty", print):
        pass
    with pytest.raises(UsageError, match="no records"):
        read_results(tmp_path / "empty", print)


def test_a_folder_whose_first_file_was_not_finished_is_taken(tmp_path):
    """A process that is killed as it begins leaves a temporary file, which the same command replaces."""
    (tmp_path / (ABOUT + ".tmp")).write_text('{"form')
    with Results(tmp_path, print):
        assert not list(tmp_path.glob("*.tmp"))
    (tmp_path / ABOUT).rename(tmp_path / (ABOUT + ".tmp"))
    (tmp_path / "precious.txt").write_text("x")
    (tmp_path / RECORDS).unlink()
    with pytest.raises(UsageError, match=r"it holds precious.txt"):
        Results(tmp_path, print)


def test_a_full_disk_leaves_no_part_of_a_record(folder):
    """The kernel itself refuses to let the file grow."""
    before = (folder / RECORDS).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Results(folder, print) as found:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 30, limits[1]))
        try:
            with pytest.raises(DiskFullError):
                found.add({**RECORD, "id": "b.1"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (folder / RECORDS).read_bytes() == before
        found.add({**RECORD, "id": "b.1"})
    assert ids(read_results(folder, print))[3:] == ["b.1"]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with Results(tmp_path / "new", print) as found:
        found.add({"id": "x", "values": [math.nan, math.inf, 1.5, (2, None)], "nested": {"score": -math.inf}})
    (record,) = read_results(tmp_path / "new", print)
    assert record == {"id": "x", "values": [None, None, 1.5, [2, None]], "nested": {"score": None}}


def test_the_format_is_written_down():
    assert results.FORMAT == 1
    assert line_of({"a": 1}) == (
        b'{"sha256": "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862", "record": {"a":1}}\n'
    )


@pytest.mark.parametrize(
    "body",
    [
        b"7", b"[1]", b"null", b"[" * 100000 + b"]" * 100000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 1e400}',
        b'{"a": NaN}', b'{"a": 1, "a": 2}', b'{"a": "\xff"}', b'{"a": [' + b"{}," * 400_000 + b"0]}",
        b'{"a": "' + b"x" * (17 << 20) + b'"}',
    ],
)  # fmt: skip
def test_a_line_with_its_digest_that_is_no_record_is_refused(tmp_path, body):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "results.json").write_text('{"format": 1}')
    digest = hashlib.sha256(body).hexdigest().encode()
    (folder / "records.jsonl").write_bytes(b'{"sha256": "' + digest + b'", "record": ' + body + b"}\n")
    with pytest.raises(DamagedError, match=r"no record|a line of more than"):
        read_results(folder, print)


def test_a_file_without_ends_of_lines_is_not_read_whole(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "results.json").write_text('{"format": 1}')
    with (folder / "records.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DamagedError, match="a line of more than"):
        read_results(folder, print)


@pytest.mark.parametrize(
    "part",
    [
        {"reason": {"what": 7}}, {"git": {"commit": 7, "changed_files": 0}}, {"seconds": "7"}, {"ended": 7},
        {"environment": []}, {"experiment": []}, {"run": 1}, {"figures": 3}, {"seconds": None}, {"ended": None},
        {"seconds": 1e300}, {"reason": {"what": "x", "where": []}}, {"inputs": {"source": []}},
        {"inputs": {"data": {}}},
        {"environment": {"caches": "x"}}, {"environment": {"caches": {"a": []}}}, {"environment": {"load_1min": "x"}},
        {"environment": {"total_memory_bytes": "x"}}, {"run": {"budget_bytes": []}}, {"samples": {"latencies": ["x"]}},
        {"samples": {"latencies": [1e-320]}}, {"samples": {"latencies": [1e300]}}, {"samples": {"memory": [[1, 2]]}},
        {"samples": {"spans": [["a", 1 << 40, "compute", 0.0, 1.0, 0, "loop", 0]]}},
        {"samples": {"spans": [["a", -1, "compute", 0.0, 1.0, 0, "loop", 0]]}}, {"samples": {"spans": [[7]]}},
        {"samples": {"truth": [0, 1], "answers": [0], "metrics": ["accuracy"]}},
        {"samples": {"truth": [0], "answers": [[1]], "metrics": ["accuracy"]}},
        {"samples": {"truth": [0], "answers": [1], "metrics": ["x"]}}, {"samples": {"labels": [[]]}},
    ],
)  # fmt: skip
def test_a_record_of_other_types_is_refused(part):
    with pytest.raises(RefusedError, match="parts that no sweep writes"):
        completed({"key": "k", "round": 1, **part}, "folder")


def test_a_record_that_could_not_be_read_again_is_not_added(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "MAX_RECORD_VALUES", 10_000)
    with Results(tmp_path / "results", print) as found:
        with pytest.raises(TooLargeError, match=r"result not kept .* give fewer rows"):
            found.add({"samples": {"spans": [["a", 1]] * 11_000}})
        found.add({"samples": {"spans": [["a", 1]] * 1_000}})
    assert len(read_results(tmp_path / "results", print)) == 1


def many(num_rows):
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 3, num_rows).tolist()
    scores = generator.normal(size=num_rows).tolist()
    return {
        "latencies": scores[:65536],
        "exits": [12] * num_rows,
        "answers": [300, *truth[1:]],
        "truth": truth,
        "regression": scores,
    }


def test_the_samples_of_many_rows_are_kept_exactly(tmp_path):
    """More values than are read of a record that nobody packs; lists of few rows stay as they were."""
    record = {"id": "x", "samples": {**many(results.MAX_ROWS), "few": [1, 2], "mixed": [1, 0.5] * 20_000}}
    with Results(tmp_path / "results", print) as found:
        found.add(record)
        assert found.num_bytes < results.MAX_RECORD_BYTES
    assert read_results(tmp_path / "results", print) == [record]
    few = {"samples": {"truth": [1] * (results.PACKED_FROM - 1)}}
    assert b"packed" not in line_of(few) and b"packed" in line_of({"samples": {"truth": [1] * results.PACKED_FROM}})
    odd = [math.nan, *[0.5] * results.PACKED_FROM]
    assert b"null" in line_of({"samples": {"latencies": odd}}), "what is no number is null, as in other records"


@pytest.mark.parametrize(
    "packed",
    [
        {"packed": "f8", "base64": "AAAAAAAA8H8="}, {"packed": "O", "base64": ""}, {"packed": "f8", "base64": "AAAA"},
        {"packed": "u1", "base64": "*"}, {"packed": [], "base64": ""}, {"packed": "i8", "base64": 7},
        {"packed": "u1", "base64": "AAAA" * 1_400_000},
    ],
)  # fmt: skip
def test_packed_samples_that_no_sweep_writes_are_refused(tmp_path, packed):
    folder = tmp_path / "results"
    with Results(folder, print):
        pass
    (folder / RECORDS).write_bytes(line_of({"samples": {"truth": packed}}))
    with pytest.raises(DamagedError, match="no record"):
        read_results(folder, print)


@pytest.mark.parametrize(("kind", "size"), [("u1", 1), ("i8", 8), ("f8", 8)])
def test_the_values_of_all_packed_lists_are_counted(monkeypatch, kind, size):
    """Before any is decoded: three lists, each of which is allowed, gave nearly three times as many values."""

    def record(*lengths):
        lists = enumerate(base64.b64encode(bytes(size * length)).decode() for length in lengths)
        return {"samples": {f"list {number}": {"packed": kind, "base64": text} for number, text in lists}}

    monkeypatch.setattr(results, "MAX_PACKED_VALUES", 100)
    for lengths in ((100,), (50, 25, 25), (34, 33, 33), (98, 1, 1)):
        found = results._unpacked(record(*lengths))["samples"]
        assert [len(values) for values in found.values()] == list(lengths)
    monkeypatch.setattr(results, "_unpack", None)
    for lengths in ((101,), (100, 100, 100), (50, 25, 26), (99, 1, 1)):
        with pytest.raises(ValueError, match="more packed samples than are kept"):
            results._unpacked(record(*lengths))


def test_figures_that_nothing_can_have_count_as_missing():
    given = {"a": 10**400, "b": 1e300, "c": 1e-320, "d": "x", "e": True, "f": 0, "g": -3.5, "h": 1e15}
    found = completed({"key": "k", "round": 1, "figures": given}, "folder")["figures"]
    assert found == {**given, **dict.fromkeys("abcd")}


@pytest.mark.parametrize("make", [lambda path, own: path.symlink_to(own), lambda path, own: os.mkfifo(path),
                                  lambda path, own: path.mkdir(), lambda path, own: os.link(own, path)])  # fmt: skip
def test_a_sweep_changes_no_other_file_by_the_name_of_the_records(folder, tmp_path, make):
    own = tmp_path / "own.txt"
    own.write_text("mine\n")
    (folder / RECORDS).unlink()
    make(folder / RECORDS, own)
    with pytest.raises(OfframpError, match=r"is a link, a pipe|no file of records"):
        Results(folder, print)
    assert own.read_text() == "mine\n"

"""Rows that were trained on are left out where they are few, refused where they are many, evaluated where asked for."""

import json

import numpy as np
import pytest

from offramp.errors import UsageError
from offramp.experiments.held_out import MOST_SHARE, held_out, require_same_cut
from offramp.store.trained_rows import FILE_NAME, TrainedRows
from offramp.tasks import DataSpec, load
from offramp.tasks.arrays import Record
from offramp.tasks.digests import row_digests
from offramp.tasks.examples import Example
from offramp.tasks.images import Image

SALT, NUM_ROWS = "ab" * 16, 40


def as_text(number, folder):
    return f"row {number}"


def as_pair(number, folder):
    return (f"row {number}", "a row")


def as_record(number, folder):
    return Record.of({"x": np.arange(4.0) + number})


def as_image(number, folder):
    path = folder / f"{number}.png"
    path.write_bytes(f"pixels {number}".encode())
    return Image(path)


KINDS = (as_text, as_pair, as_record, as_image)


def write_trained(folder, rows, arguments=()):
    digests_N = np.unique(row_digests(rows, SALT, arguments))
    (folder / FILE_NAME).write_bytes(TrainedRows(SALT, arguments, digests_N).to_bytes())


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("num_trained", [0, 1, int(MOST_SHARE * NUM_ROWS), int(MOST_SHARE * NUM_ROWS) + 1, NUM_ROWS])
def test_few_are_left_out_many_refused_and_all_evaluated_if_asked(make, include, num_trained, tmp_path):
    write_trained(tmp_path, [make(number, tmp_path) for number in range(100 - num_trained, 300)])
    examples, said = [Example(make(60 + number, tmp_path), number) for number in range(NUM_ROWS)], []
    if num_trained > MOST_SHARE * NUM_ROWS and not include:
        with pytest.raises(UsageError, match=f"{num_trained} of 40 rows of dev were trained on - .*--include-training"):
            held_out(tmp_path, {"dev": examples}, include, said.append)
        return
    found = held_out(tmp_path, {"dev": examples}, include, said.append)["dev"]
    assert (found.training_rows, found.includes_training_rows) == (num_trained, include)
    expected = NUM_ROWS if include else NUM_ROWS - num_trained
    assert [example.label for example in found.examples] == list(range(expected))
    assert len(found.digests_N) == expected
    assert len(said) == (num_trained > 0) and all(f"{num_trained} of 40 rows" in line for line in said)


def test_each_split_is_checked_before_any_is_returned(tmp_path):
    write_trained(tmp_path, ["a", "b"])
    with pytest.raises(UsageError, match="1 of 2 rows of certify"):
        held_out(tmp_path, {"tune": [Example("c", 0)], "certify": [Example("A ", 0), Example("d", 1)]}, False, print)


def test_a_model_that_does_not_record_its_rows_is_evaluated_and_one_line_says_so(tmp_path):
    said, splits = [], {"tune": [Example("a", 0)], "dev": [Example("b", 0)]}
    found = held_out(tmp_path, splits, False, said.append)
    assert [(each.training_rows, len(each.examples)) for each in found.values()] == [(None, 1), (None, 1)]
    (line,) = said
    assert "not recorded" in line
    assert len(held_out(tmp_path, splits, False, said.append, SALT)["dev"].digests_N) == 1


TABLE = [("Red rose", "a"), ("blue sky", "b"), ("green grass", "a"), ("a grey sea", "b")]


def write_tsv(path, rows):
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))


def write_csv(path, rows):
    path.write_text("label,text\r\n" + "".join(f'{label},"{text}"\r\n' for text, label in rows), encoding="utf-16")


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps({"sentence": f" {text} ", "label": label}) + "\n" for text, label in rows))


def write_parquet(path, rows):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(rows, columns=["text", "label"]).to_parquet(path)


WRITERS = {"tsv": write_tsv, "csv": write_csv, "jsonl": write_jsonl, "parquet": write_parquet}


@pytest.mark.parametrize("suffix", WRITERS)
def test_rows_are_recognised_in_a_table_of_any_format(suffix, tmp_path):
    """The rows of training came from a list in Python."""
    write_trained(tmp_path, [text for text, _ in TABLE])
    WRITERS[suffix](tmp_path / f"dev.{suffix}", [*TABLE, ("a new row", "a")])
    data = load(DataSpec(dev=tmp_path / f"dev.{suffix}"), log=lambda line: None)
    with pytest.raises(UsageError, match="4 of 5 rows of dev"):
        held_out(tmp_path, data.examples, False, print)


def test_a_frame_of_pandas_is_no_exception(tmp_path):
    pandas = pytest.importorskip("pandas")
    write_trained(tmp_path, [text for text, _ in TABLE])
    data = load(DataSpec(dev=pandas.DataFrame(TABLE, columns=["text", "label"])), log=lambda line: None)
    with pytest.raises(UsageError, match="4 of 4 rows of dev"):
        held_out(tmp_path, data.examples, False, print)


def test_arrays_of_a_file_are_recognised_by_the_arguments_of_the_training(tmp_path):
    x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    write_trained(tmp_path, [Record.of(row) for row in x], ("0",))
    labels, numbers = np.array(list("ababab")), np.arange(6)
    np.savez(tmp_path / "data.npz", **{"0": x.astype(np.float64), "label": labels, "number": numbers})
    data = load(DataSpec(dev=tmp_path / "data.npz"))
    with pytest.raises(UsageError, match="6 of 6 rows of dev"):
        held_out(tmp_path, data.examples, False, print)


CUT = {"task": "mine", "split_seed": 0, "cuts_dev": True}


def test_without_recorded_rows_another_cut_is_refused(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps({"data": CUT}))
    require_same_cut(tmp_path, CUT, ["dev"])
    require_same_cut(tmp_path, {**CUT, "task": "other", "split_seed": 1}, ["dev"])
    require_same_cut(tmp_path, {**CUT, "cuts_dev": False}, ["dev"])
    for other, names in (({**CUT, "split_seed": 1}, ["dev"]), ({**CUT, "cuts_dev": False}, ["dev", "tune"])):
        with pytest.raises(UsageError, match=r"split differently than in training .*--include-training-rows"):
            require_same_cut(tmp_path, other, names)
    write_trained(tmp_path, ["a row"])
    require_same_cut(tmp_path, {**CUT, "split_seed": 1}, ["dev"])

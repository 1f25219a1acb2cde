"""Records of arrays from files: what is read, cut, stacked and refused."""

import numpy as np
import pytest
import torch

from offramp.errors import UsageError
from offramp.tasks import DataSpec, load
from offramp.tasks.arrays import ArrayInputs, Record, records_at
from offramp.tasks.examples import digest
from offramp.tasks.lines import silent
from offramp.tasks.rows import ArrayRows

RNG = np.random.default_rng(0)


def write(path, num=60, **arrays):
    labels = np.array(["ab"[i % 2] for i in range(num)])
    np.savez(path, **{"x": RNG.standard_normal((num, 3)).astype(np.float32), "label": labels, **arrays})
    return path


def load_arrays(train, dev=None, **fields):
    return load(DataSpec(train=train, dev=dev, **fields), silent)


def test_a_file_is_cut_by_content(tmp_path):
    splits = load_arrays(write(tmp_path / "d.npz"), None)
    assert splits.labels == ("a", "b") and splits.metrics == ("accuracy",)
    assert set(splits.examples) == {"train", "tune", "certify", "dev"}
    assert sum(map(len, splits.examples.values())) == 60
    again = load_arrays(tmp_path / "d.npz", None)
    assert {name: digest(rows) for name, rows in splits.examples.items()} == {
        name: digest(rows) for name, rows in again.examples.items()
    }
    other = load_arrays(tmp_path / "d.npz", split_seed=1)
    assert digest(other.examples["train"]) != digest(splits.examples["train"])


def test_copies_of_a_record_fall_together(tmp_path):
    x = np.repeat(RNG.standard_normal((30, 3)).astype(np.float32), 4, axis=0)
    np.savez(tmp_path / "d.npz", x=x, label=np.arange(120) // 4 % 2)
    splits = load_arrays(tmp_path / "d.npz", None)
    homes = {}
    for name, rows in splits.examples.items():
        for row in rows:
            assert homes.setdefault(row.text.read(), name) == name


def test_labels_are_names_ids_or_numbers(tmp_path):
    write(tmp_path / "ids.npz", label=np.arange(60) % 12)
    assert load_arrays(tmp_path / "ids.npz", None).labels == tuple(map(str, range(12)))
    known = load_arrays(None, tmp_path / "ids.npz", labels=tuple(f"class {i}" for i in range(12)))
    assert [row.label for row in known.examples["dev"][:3]] == [0, 1, 2] and set(known.examples) == {"dev"}
    write(tmp_path / "many.npz", num=120, label=np.linspace(0, 1, 120))
    with pytest.raises(UsageError, match=r"120 different numbers.*--regression"):
        load_arrays(tmp_path / "many.npz", None)
    write(tmp_path / "one.npz", label=np.zeros(60, np.int64))
    with pytest.raises(UsageError, match="1 different labels"):
        load_arrays(tmp_path / "one.npz", None)
    write(tmp_path / "values.npz", label=np.linspace(0, 1, 60))
    values = load_arrays(tmp_path / "values.npz", tmp_path / "values.npz", regression=True)
    assert values.metrics == ("pearson", "spearman") and values.examples["dev"][-1].label == 1.0


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"label": np.zeros(60)[:, None]}, "no array 'label' of labels"),
        ({"x": np.zeros((7, 3))}, "7 records and 60 labels"),
        ({"z": np.zeros(7)}, "do not have equal numbers of records"),
        ({"x": np.zeros(())}, "do not have equal numbers of records"),
        ({"x": np.array([{}] * 60)}, "no arrays"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, told, tmp_path):
    path = write(tmp_path / "d.npz", **arrays)
    with pytest.raises(UsageError, match=told):
        load_arrays(path, None)


def test_labels_of_arrays_are_read_as_those_of_a_table(tmp_path):
    """Numbers by value, and ids only where none is a name: 0 and 1 were one class of a model with labels 1 and 2."""
    path = write(tmp_path / "d.npz", label=np.arange(60) % 2 / 1.0)
    assert load_arrays(path, None).labels == ("0", "1")
    assert {example.label for example in load_arrays(None, path, labels=("0", "1")).examples["dev"]} == {0, 1}
    for labels in (("1", "2"), ("1", "0.5")):
        with pytest.raises(UsageError, match="label '0' is none of"):
            load_arrays(None, path, labels=labels)
    said, spec = [], DataSpec(dev=path, labels=("no", "yes"))
    assert [example.label for example in load(spec, said.append).examples["dev"][:3]] == [0, 1, 0]
    assert said == [f"{path}: labels are read as ids of the model's labels: 0 = no, 1 = yes"]
    for labels, told in ((np.where(np.arange(60) == 7, np.nan, 1.0), "null or NaN"), (np.array([b"x"] * 60), "bytes")):
        with pytest.raises(UsageError, match=told):
            load_arrays(write(tmp_path / "e.npz", label=labels), None)


def test_what_is_no_file_of_arrays_is_refused(tmp_path):
    (tmp_path / "d.npz").write_text("no zip")
    (tmp_path / "e.npz").write_bytes(b"PK\3\4 torn")
    for name, told in (("absent.npz", "no such file"), ("d.npz", "no arrays"), ("e.npz", "no arrays")):
        with pytest.raises(UsageError, match=told):
            records_at(tmp_path / name)
    with pytest.raises(UsageError, match="text_column and pair_column are for texts, the data are arrays"):
        load_arrays(None, write(tmp_path / "g.npz"), text_column="x")
    with pytest.raises(UsageError, match="label 'b' is none of"):
        load_arrays(None, write(tmp_path / "f.npz"), labels=("a", "c"))


def test_every_flipped_byte_of_a_file_of_arrays_is_refused_or_read(tmp_path):
    """Flags, methods, versions and lengths of a zip have errors of several classes; the file as it was is read."""
    whole = write(tmp_path / "whole.npz").read_bytes()
    path, codes = tmp_path / "x.npz", set()
    for place in [None, *range(90), *range(len(whole) - 90, len(whole))]:
        data = bytearray(whole)
        if place is not None:
            data[place] ^= 0xFF
        path.write_bytes(data)
        try:
            codes.add(len(records_at(path)))
        except UsageError:
            codes.add("refused")
    assert codes == {60, "refused"}


def test_records_are_made_of_arrays_tensors_tuples_and_mappings():
    assert list(Record.of(torch.ones(3)).arrays) == ["0"]
    assert list(Record.of((torch.ones(3), np.ones(2))).arrays) == ["0", "1"]
    assert str(Record.of({"x": np.ones((2, 3), np.float32)})) == "x float32 [2, 3]"
    record = Record.of({"x": np.ones(2)})
    assert Record.of(record) is record
    assert record.read() != Record.of({"y": np.ones(2)}).read() != Record.of({"y": np.ones((1, 2))}).read()
    with pytest.raises(UsageError, match="takes arrays"):
        Record.of("a text")


def test_inputs_are_stacked_and_others_left_out():
    inputs = ArrayInputs({"x": ("float32", (3,)), "i": ("int64", ())})
    items = [{"x": np.ones(3, np.float32), "i": np.int64(n), "label": "a"} for n in range(4)]
    found = inputs.encode(items)
    assert (found.num_rows, found.length, found.lengths_B.tolist()) == (4, 1, [1, 1, 1, 1])
    x, i = found.arrays["x"], found.arrays["i"]
    assert set(found.arrays) == {"x", "i"} and x.shape == (4, 3) and i.tolist() == [0, 1, 2, 3]
    assert inputs.encode(list(inputs.sample)).arrays["x"].shape == (1, 3)
    assert list(inputs.lengths(items)) == [1] * 4
    assert inputs.encoding_bytes(items) >= 20
    for wrong in ({"x": np.ones(3)}, {"x": np.ones(3), "i": np.int64(0)}, {"x": np.ones((3, 1), np.float32), "i": 1}):
        with pytest.raises(UsageError, match="the module takes"):
            inputs.encode([wrong])


def test_rows_come_in_batches():
    records = [Record.of({"x": np.full(2, n)}) for n in range(5)]
    rows = ArrayRows(records, np.arange(5))
    batch = rows.batch([3, 1])
    assert batch["x"].tolist() == [[3, 3], [1, 1]] and batch["labels"].tolist() == [3, 1]
    assert len(rows) == 5 and rows.lengths_N.tolist() == [1] * 5

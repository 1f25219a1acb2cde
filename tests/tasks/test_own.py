import json

import pytest

from offramp.errors import MissingExtraError, UsageError
from offramp.tasks.own import Columns, load_own

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

COLUMNS = Columns("review", "stars")
ROWS = [{"review": f"text {number}", "stars": str(number % 3 + 9)} for number in range(60)]


def write(path, rows=ROWS):
    names = list(rows[0])
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        path.write_text(
            "".join(mark.join(map(str, cells)) + "\n" for cells in [names, *(row.values() for row in rows)])
        )
    return path


def counts(splits):
    return {name: len(found) for name, found in splits.examples.items()}


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "parquet"])
def test_every_kind_of_table_gives_the_same(tmp_path, suffix):
    found = load_own(write(tmp_path / f"mine.{suffix}"), None, COLUMNS)
    assert found == load_own(write(tmp_path / "mine.tsv"), None, COLUMNS)
    assert (found.name, found.labels, found.metrics) == ("mine", ("9", "10", "11"), ("accuracy",))
    assert sum(counts(found).values()) == 60
    assert set(found.examples) == {"train", "tune", "certify", "dev"}
    assert {example.label for examples in found.examples.values() for example in examples} == {0, 1, 2}


def test_labels_that_are_numbers_keep_their_type(tmp_path):
    rows = [{"review": f"text {number}", "stars": number % 2} for number in range(60)]
    for suffix in ("jsonl", "parquet"):
        assert load_own(write(tmp_path / f"mine.{suffix}", rows), None, COLUMNS).labels == ("0", "1")


def test_a_dev_file_is_reported_and_never_trained_on(tmp_path):
    dev = write(tmp_path / "dev.csv", [{"review": "unseen", "stars": "10"}])
    found = load_own(write(tmp_path / "train.csv"), dev, COLUMNS)
    assert [example.text for example in found.examples["dev"]] == ["unseen"]
    assert sum(counts(found).values()) == 61


def test_a_model_brings_its_labels_and_needs_no_train_file(tmp_path):
    dev = write(tmp_path / "dev.csv", [{"review": "unseen", "stars": "10"}])
    found = load_own(None, dev, COLUMNS, labels=("10", "9"))
    assert found.examples == {"dev": [("unseen", 0)]}
    with pytest.raises(UsageError, match=r"label '10' is none of good, bad - .*dev.csv:2"):
        load_own(None, dev, COLUMNS, labels=("good", "bad"))
    with pytest.raises(UsageError, match="label '10' is none of 9, 11"):
        load_own(None, dev, COLUMNS, labels=("9", "11"))


def test_pairs_and_values(tmp_path):
    rows = [{"a": f"one {number}", "b": "two", "near": number / 10} for number in range(60)]
    found = load_own(write(tmp_path / "t.tsv", rows), None, Columns("a", "near", "b"), labels=())
    assert (found.labels, found.metrics) == ((), ("pearson", "spearman"))
    assert all(isinstance(example.text, tuple) for example in found.examples["train"])
    assert {example.label for examples in found.examples.values() for example in examples} == {
        n / 10 for n in range(60)
    }


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"review": None, "stars": "9"}, r"column 'review' is null or NaN - .*:61 - correct the row"),
        ({"review": "x", "stars": float("nan")}, r"column 'stars' is null or NaN - .*:61"),
        ({"text": "x", "stars": "9"}, r"no column 'review', found 'text', 'stars' - .*:61"),
    ],
)
def test_holes_are_named(tmp_path, row, match):
    with pytest.raises(UsageError, match=match):
        load_own(write(tmp_path / "t.jsonl", [*ROWS, row]), None, COLUMNS)


def test_holes_of_a_parquet_table_are_named(tmp_path):
    rows = [{"review": "x", "stars": 1.0}, {"review": "y", "stars": float("nan")}, {"review": None, "stars": 0.0}]
    with pytest.raises(UsageError, match=r"column 'stars' is null or NaN - .*t.parquet:2"):
        load_own(write(tmp_path / "t.parquet", rows), None, COLUMNS)


@pytest.mark.parametrize(("row", "column"), [("lost,", "stars"), (",9", "review"), ("  ,9", "review")])
def test_empty_cells_are_named(tmp_path, row, column):
    """pandas writes NaN so."""
    path = write(tmp_path / "t.csv")
    path.write_text(path.read_text() + row + "\n")
    with pytest.raises(UsageError, match=rf"column '{column}' is empty - .*t.csv:62 - correct the row"):
        load_own(path, None, COLUMNS)


def test_labels_may_be_long(tmp_path):
    rows = [{"review": f"text {number}", "stars": "9" * (5000 + number % 2)} for number in range(60)]
    assert len(load_own(write(tmp_path / "t.jsonl", rows), None, COLUMNS).labels) == 2


def test_values_must_be_finite_numbers(tmp_path):
    rows = [{"review": f"text {number}", "stars": "nan" if number == 7 else "1.5"} for number in range(60)]
    with pytest.raises(UsageError, match=r"'nan' is not a finite number - .*t.tsv:9"):
        load_own(write(tmp_path / "t.tsv", rows), None, COLUMNS, labels=())


def test_labels_that_are_none_are_refused(tmp_path):
    one = [{"review": f"text {number}", "stars": "9"} for number in range(60)]
    with pytest.raises(
        UsageError, match=r"column 'stars' has 1 different labels - .* - a classifier needs at least two"
    ):
        load_own(write(tmp_path / "t.tsv", one), None, COLUMNS)
    values = [{"review": f"text {number}", "stars": number / 7} for number in range(150)]
    with pytest.raises(UsageError, match=r"150 different numbers - .* - --regression for values"):
        load_own(write(tmp_path / "t.tsv", values), None, COLUMNS)


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"split \w+ of t is empty - .* - give more data"):
        load_own(write(tmp_path / "t.tsv", ROWS[:3]), None, COLUMNS)
    (tmp_path / "dev.tsv").write_text("review\tstars\n")
    with pytest.raises(UsageError, match="split dev of train is empty"):
        load_own(write(tmp_path / "train.tsv"), tmp_path / "dev.tsv", COLUMNS)
    with pytest.raises(UsageError, match="no table"):
        load_own(None, None, COLUMNS)


def test_what_is_no_table_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"table cannot be read \(No such file"):
        load_own(tmp_path / "absent.parquet", None, COLUMNS)
    (tmp_path / "t.parquet").write_text("text")
    with pytest.raises(UsageError, match=r"not Parquet .* - .*t.parquet - save it again"):
        load_own(tmp_path / "t.parquet", None, COLUMNS)
    with pytest.raises(UsageError, match=r"unknown kind of table '\.xlsx'"):
        load_own(write(tmp_path / "t.xlsx"), None, COLUMNS)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'offramp\[data\]'"):
        load_own(write(tmp_path / "u.parquet"), None, COLUMNS)

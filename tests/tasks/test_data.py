import dataclasses
import json
import os
import threading

import pytest

from offramp.errors import MissingExtraError, UsageError
from offramp.tasks import DataSpec, load
from offramp.tasks.examples import counted

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

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


def load_table(train, dev=None, **fields):
    return load(DataSpec(train=train, dev=dev, **{"text_column": "review", "label_column": "stars", **fields}))


def counts(splits):
    return {name: len(found) for name, found in splits.examples.items()}


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "parquet"])
def test_every_kind_of_table_gives_the_same(tmp_path, suffix):
    found = load_table(write(tmp_path / f"mine.{suffix}"))
    assert found == load_table(write(tmp_path / "mine.tsv"))
    assert (found.name, found.labels, found.metrics) == ("mine", ("9", "10", "11"), ("accuracy",))
    assert sum(counts(found).values()) == 60
    assert set(found.examples) == {"train", "tune", "certify", "dev"}
    assert {example.label for examples in found.examples.values() for example in examples} == {0, 1, 2}


def test_labels_that_are_numbers_keep_their_type(tmp_path):
    rows = [{"review": f"text {number}", "stars": number % 2} for number in range(60)]
    for suffix in ("jsonl", "parquet"):
        assert load_table(write(tmp_path / f"mine.{suffix}", rows)).labels == ("0", "1")


def test_tables_in_memory_are_data(tmp_path):
    frame = pytest.importorskip("pandas").DataFrame(ROWS)
    assert load_table(frame).examples == load_table(write(tmp_path / "mine.tsv")).examples
    with pytest.raises(ValueError, match="a table in memory has no JSON form"):
        DataSpec(train=frame).to_json()


def test_a_pipe_is_data(tmp_path):
    file = write(tmp_path / "mine.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    writer = threading.Thread(target=(tmp_path / "pipe.csv").write_bytes, args=(file.read_bytes(),))
    writer.start()
    assert load_table(tmp_path / "pipe.csv").examples == load_table(file).examples
    writer.join()


def test_columns_are_looked_for_where_no_name_is_given(tmp_path):
    said = []
    rows = [{"text": row["review"], "label": row["stars"], "pair": "b"} for row in ROWS]
    found = load(DataSpec(train=write(tmp_path / "t.csv", rows)), said.append)
    assert {example.text[1] for example in found.examples["train"]} == {"b"}
    assert "texts are read from the column 'text' and 'pair'" in said[0]
    both = [{"text": row["review"], "sentence": row["review"], "label": row["stars"]} for row in ROWS]
    load(DataSpec(train=write(tmp_path / "both.csv", both)), said.append)
    assert said[1].endswith("texts are read from the column 'sentence'")
    headless = tmp_path / "h.csv"
    headless.write_text("".join(f"{row['review']},{row['stars']}\n" for row in ROWS))
    numbered = {"text_column": "1", "label_column": "2", "header": False}
    assert load_table(headless, **numbered).examples == load_table(write(tmp_path / "mine.csv")).examples


@pytest.mark.parametrize("names", [{"text_column": "stars"}, {"text_column": "review", "pair_column": "stars"}])
def test_a_column_is_not_both_text_and_label(tmp_path, names):
    """A model that reads its labels has a score that says nothing."""
    with pytest.raises(UsageError, match=r"text and label are both read from the column 'stars' - .*:2 - name another"):
        load(DataSpec(train=write(tmp_path / "t.csv", ROWS), label_column="stars", **names))


def test_numbers_in_other_spellings_are_one_label(tmp_path):
    said, spellings = [], (1, 1.0, "1", "1.0", 0)
    rows = [{"review": f"text {number}", "stars": spellings[number % 5]} for number in range(60)]
    spec = DataSpec(train=write(tmp_path / "t.jsonl", rows), text_column="review", label_column="stars")
    found = load(spec, said.append)
    assert found.labels == ("0", "1")
    assert sum(example.label for examples in found.examples.values() for example in examples) == 48
    assert said == [f"{tmp_path / 't.jsonl'}: the labels 1 and 1.0 are one class, 1"]


@pytest.mark.parametrize("labels", [("LABEL_0", "LABEL_1", "LABEL_2"), ("no", "yes", "maybe")])
def test_ids_of_the_labels_of_a_model_are_labels(tmp_path, labels):
    def spec(*ids):
        rows = [{"review": f"text {number}", "stars": each} for number, each in enumerate(ids)]
        dev = write(tmp_path / "d.jsonl", rows)
        return DataSpec(dev=dev, text_column="review", label_column="stars", labels=labels)

    said = []
    assert [example.label for example in load(spec(2, 0.0, "1"), said.append).examples["dev"]] == [2, 0, 1]
    assert f"labels are read as ids of the model's labels: 0 = {labels[0]}" in "".join(said)
    for wrong in ((0, 1, 2, 3), (0, -1), (0, labels[1]), ("00", 1)):
        with pytest.raises(UsageError, match="is none of"):
            load(spec(*wrong), said.append)


def test_labels_in_another_case_are_those_of_the_model(tmp_path):
    rows = [{"text": f"text {number}", "label": each} for number, each in enumerate(("Bad", "GOOD", "bad"))]
    dev, said = write(tmp_path / "d.jsonl", rows), []
    spec = DataSpec(dev=dev, text_column="text", labels=("good", "bad"))
    assert [example.label for example in load(spec, said.append).examples["dev"]] == [1, 0, 1]
    assert said == [f"{dev}:1: labels are read as the model's labels, whatever their case: Bad = bad, GOOD = good"]
    with pytest.raises(UsageError, match="'Bad' is none of bad, BAD"):
        load(dataclasses.replace(spec, labels=("bad", "BAD")), said.append)


@pytest.mark.parametrize(
    ("labels", "notice"),
    [
        (("good", "good ", "bad"), "the labels 'good' and 'good ' differ in case or spaces only"),
        ((True, "True", "no"), "the labels 'True' and 'true' differ in case or spaces only"),
        ((0.5, 1, 1.5), "the labels are numbers, and each is a class (--regression predicts values)"),
        ((-1, 0, 1), "the labels are numbers"),
        ((0, 1, 2), None),
        (("a", "b", "1.5"), None),
    ],
)
def test_labels_that_may_not_be_the_classes_that_were_meant_are_said(tmp_path, labels, notice):
    said = []
    rows = [{"review": f"text {number}", "stars": labels[number % 3]} for number in range(60)]
    load(DataSpec(train=write(tmp_path / "t.jsonl", rows), text_column="review", label_column="stars"), said.append)
    assert (f"{tmp_path / 't.jsonl'}: {notice}" in "".join(said)) if notice else not said


def test_a_label_is_one_line_in_a_count():
    assert counted([0, 1], ("a\nb", "c")) == "a\\nb 1, c 1"


def test_rows_of_pairs_among_single_texts_are_counted(tmp_path):
    rows = [{"text": "a", "label": 0}, {"text": "b", "pair": "c", "label": 1}]
    said = []
    found = load(DataSpec(dev=write(tmp_path / "t.jsonl", rows)), said.append)
    assert [example.text for example in found.examples["dev"]] == ["a", ("b", "c")]
    assert "rows are pairs of texts, of the column 'text' and 'pair', unlike the first: 1" in "".join(said)


def test_odd_rows_are_counted_and_named(tmp_path):
    odd = [{"review": 5, "stars": 9}, {"review": "x", "stars": ["9"]}, {"review": " ", "stars": 9}, {"stars": 9}]
    match = r"column 'review' is a int, not a text \(3 other rows are odd: .*:62, .*:63, .*:64\) - .*:61 - write a text"
    with pytest.raises(UsageError, match=match):
        load_table(write(tmp_path / "t.jsonl", [*ROWS, *odd]))


def test_a_dev_file_is_reported_and_never_trained_on(tmp_path):
    dev = write(tmp_path / "dev.csv", [{"review": "unseen", "stars": "10"}])
    found = load_table(write(tmp_path / "train.csv"), dev)
    assert [example.text for example in found.examples["dev"]] == ["unseen"]
    assert sum(counts(found).values()) == 61


def test_a_model_brings_its_labels_and_needs_no_train_file(tmp_path):
    dev = write(tmp_path / "dev.csv", [{"review": "unseen", "stars": "10"}])
    found = load_table(None, dev, labels=("10", "9"))
    assert found.examples == {"dev": [("unseen", 0)]}
    with pytest.raises(UsageError, match=r"label '10' is none of good, bad - .*dev.csv:2"):
        load_table(None, dev, labels=("good", "bad"))
    with pytest.raises(UsageError, match="label '10' is none of 9, 11"):
        load_table(None, dev, labels=("9", "11"))


def test_pairs_and_values(tmp_path):
    rows = [{"a": f"one {number}", "b": "two", "near": number / 10} for number in range(60)]
    found = load_table(
        write(tmp_path / "t.tsv", rows), text_column="a", label_column="near", pair_column="b", regression=True
    )
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
        load_table(write(tmp_path / "t.jsonl", [*ROWS, row]))


def test_holes_of_a_parquet_table_are_named(tmp_path):
    rows = [{"review": "x", "stars": 1.0}, {"review": "y", "stars": float("nan")}, {"review": None, "stars": 0.0}]
    with pytest.raises(UsageError, match=r"column 'stars' is null or NaN \(1 other rows are odd: .*:3\) - .*:2"):
        load_table(write(tmp_path / "t.parquet", rows))


@pytest.mark.parametrize(("row", "column"), [("lost,", "stars"), (",9", "review"), ("  ,9", "review")])
def test_empty_cells_are_named(tmp_path, row, column):
    """pandas writes NaN so."""
    path = write(tmp_path / "t.csv")
    path.write_text(path.read_text() + row + "\n")
    with pytest.raises(UsageError, match=rf"column '{column}' is empty - .*t.csv:62 - correct the row"):
        load_table(path)


def test_labels_may_be_long(tmp_path):
    rows = [{"review": f"text {number}", "stars": "9" * (5000 + number % 2)} for number in range(60)]
    assert len(load_table(write(tmp_path / "t.jsonl", rows)).labels) == 2


def test_values_must_be_finite_numbers(tmp_path):
    """Values beyond 32 bits became infinite in training, which said that the learning rate was too high."""
    wrong = {
        "inf": "'inf' is not a finite number",
        "nan": "column 'stars' is null or NaN",
        "1e400": "'1e400' is not a finite number",
        "-1e39": "'-1e39' is not a number of 32 bits",
    }
    for value, match in wrong.items():
        rows = [{"review": f"text {number}", "stars": value if number == 7 else "1.5"} for number in range(60)]
        with pytest.raises(UsageError, match=f"{match} - .*t.tsv:9"):
            load_table(write(tmp_path / "t.tsv", rows), regression=True)


def test_labels_that_are_none_are_refused(tmp_path):
    one = [{"review": f"text {number}", "stars": "9"} for number in range(60)]
    with pytest.raises(
        UsageError, match=r"column 'stars' has 1 different labels - .* - a classifier needs at least two"
    ):
        load_table(write(tmp_path / "t.tsv", one))
    values = [{"review": f"text {number}", "stars": number / 7} for number in range(150)]
    with pytest.raises(UsageError, match=r"150 different numbers - .* - --regression for values"):
        load_table(write(tmp_path / "t.tsv", values))


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"split \w+ of t is empty - .* - give more data"):
        load_table(write(tmp_path / "t.tsv", ROWS[:3]))
    (tmp_path / "dev.tsv").write_text("review\tstars\n")
    with pytest.raises(UsageError, match="split dev of train is empty"):
        load_table(write(tmp_path / "train.tsv"), tmp_path / "dev.tsv")
    with pytest.raises(UsageError, match="no data"):
        load_table(None, None)


def test_what_is_no_table_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"no such file or folder - .*absent\.parquet"):
        load_table(tmp_path / "absent.parquet")
    (tmp_path / "t.parquet").write_text("text")
    with pytest.raises(UsageError, match=r"not Parquet .* - .*t.parquet - save it again"):
        load_table(tmp_path / "t.parquet")
    with pytest.raises(UsageError, match=r"unknown kind of input '\.xlsx'"):
        load_table(write(tmp_path / "t.xlsx"))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'offramp\[data\]'"):
        load_table(write(tmp_path / "u.parquet"))


SPECS = [
    DataSpec(task="rte", offline=True, split_seed=3),
    DataSpec(train="t.csv", dev="d.csv", text_column="a", pair_column="b", label_column="c", labels=("x", "y")),
    DataSpec(dev="d.npz", regression=True),
]


@pytest.mark.parametrize("spec", SPECS)
def test_a_specification_survives_json(spec):
    assert DataSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_paths_and_lists_are_accepted_and_stored_as_strings_and_tuples(tmp_path):
    spec = DataSpec(train=tmp_path / "t.csv", labels=["x", "y"])
    assert (spec.train, spec.labels) == (str(tmp_path / "t.csv"), ("x", "y"))


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({}, UsageError, "no data - give a task, or a train or dev file"),
        ({"data": "glue"}, UsageError, "no data"),
        ({"task": "rte", "train": "t.csv"}, UsageError, "both a task and a table"),
        ({"train": "t.csv", "data": "glue"}, UsageError, "data names a folder of GLUE, and no task is given - glue"),
        ({"task": "colla"}, UsageError, "unknown task 'colla' - known are cola"),
        (
            {"task": "rte", "text_column": "a", "header": True},
            UsageError,
            "and text_column, header would have no effect",
        ),
        ({"task": "rte", "label_column": "c"}, UsageError, "and label_column would have no effect"),
        ({"train": 7}, TypeError, "PathLike"),
        ({"train": "t.csv", "text_column": 7}, ValueError, "text_column must be str or NoneType, not 7"),
        ({"train": "t.csv", "label_column": None}, ValueError, "label_column must be str, not None"),
        ({"train": "t.csv", "split_seed": True}, ValueError, "split_seed must be int, not True"),
        ({"train": "t.csv", "regression": 1}, ValueError, "regression must be bool, not 1"),
        ({"train": "t.csv", "labels": ()}, ValueError, "labels must be names, at least one"),
        ({"train": "t.csv", "labels": (0, 1)}, ValueError, "labels must be names, at least one"),
        ({"train": "t.csv", "labels": ("a", "b"), "regression": True}, ValueError, "labels must be None for a regr"),
    ],
)
def test_a_specification_is_checked_when_it_is_made(fields, error, match):
    with pytest.raises(error, match=match):
        DataSpec(**fields)
    with pytest.raises(error, match=match):
        DataSpec.from_json(fields)


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match="unknown key columns; known: task, data, train"):
        DataSpec.from_json({"task": "rte", "columns": []})


def test_glue_is_loaded_from_files(tmp_path):
    (tmp_path / "sst2").mkdir()
    rows = "".join(f"a film {number}\t{number % 2}\n" for number in range(60))
    (tmp_path / "sst2" / "train.tsv").write_text("sentence\tlabel\n" + rows)
    found = load(DataSpec(task="sst2", data=tmp_path))
    assert found.labels == ("negative", "positive") and found.partial == ("there is no dev file",)
    assert load(DataSpec(task="sst2", data=tmp_path, split_seed=1)).examples != found.examples


def test_glue_is_loaded_from_the_hub_without_files(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "offramp.tasks.data.load_hub", lambda task, seed, *, offline: asked.append((task, seed, offline))
    )
    load(DataSpec(task="rte", split_seed=2, offline=True))
    assert [(task.name, seed, offline) for task, seed, offline in asked] == [("rte", 2, True)]


def test_options_of_texts_and_regressions_are_refused_for_images(tmp_path):
    with pytest.raises(UsageError, match="folders of images have classes, and this is a regression"):
        load(DataSpec(train=tmp_path, regression=True))
    with pytest.raises(UsageError, match="text_column and pair_column are for texts, the data are images"):
        load(DataSpec(train=tmp_path, pair_column="b"))

"""Files of results: what is written is what was answered, whole or not at all."""

import json
import sys
from dataclasses import replace
from itertools import pairwise

import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offramp.cli.options import require_writable
from offramp.errors import OfframpError, UsageError
from offramp.session.outputs import FORMATS, require_library, write_results
from offramp.session.results import Result
from offramp.tasks.tables import read_table
from tests.selection import examples

ONE = Result("film", 0.75, 2, 2, 4096)
MODELS = {
    "single": ONE,
    "all scores": replace(ONE, scores={"film": 0.75, 'a "b",\n': 0.25}),
    "several labels": replace(ONE, labels=("film", "news, late")),
    "regression": replace(ONE, label=None),
    "several values": replace(ONE, values=(0.1, -2.0)),
}
INPUTS = ["the film", 'a "quoted", text\r\nof two lines', "", ("a pair", "of texts"), "half \ud83d of a letter", "=1+1"]


def read(path):
    """The rows of a file, with numbers as numbers and lists as lists."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_bytes().splitlines()]
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    rows = [dict(cells) for _, cells in read_table(path)]
    for row in rows:
        for name in row:
            if name not in ("input", "label"):
                row[name] = json.loads(row[name])
    return rows


@pytest.mark.parametrize("suffix", FORMATS)
def test_capitals_in_a_suffix_do_not_count(tmp_path, suffix):
    for path in (tmp_path / f"one{suffix}", tmp_path / f"two{suffix.upper()}"):
        require_writable(str(path), tuple(FORMATS), atomic=True)
        require_library(str(path))
        write_results(str(path), [("a", ONE)])
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix.upper()}").read_bytes()


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("model", MODELS)
def test_there_is_a_row_for_each_input_with_what_applies_to_the_model(tmp_path, suffix, model):
    result, path = MODELS[model], tmp_path / f"out{suffix}"
    write_results(str(path), [(given, replace(result, exit_stage=place)) for place, given in enumerate(INPUTS)])
    rows = read(path)
    assert [row["exit_stage"] for row in rows] == list(range(len(INPUTS)))
    texts = [given if isinstance(given, str) else list(given) for given in INPUTS]
    if suffix != ".jsonl":
        texts = [given if isinstance(given, str) else json.dumps(given) for given in texts]
        texts = [given.encode("utf-8", "backslashreplace").decode() for given in texts]
        assert set(rows[0]) == {
            *("input", "score", "exit_stage", "stages_run", "bytes_read"),
            *(name for name in ("label", "labels", "values") if getattr(result, name) is not None),
            *(f"scores.{name}" for name in result.scores or ()),
        }
    assert [row["input"] for row in rows] == texts
    for row in rows:
        assert (row.get("label"), row["score"], row["bytes_read"]) == (result.label, 0.75, 4096)
        assert (row.get("labels"), row.get("values")) == tuple(
            None if each is None else list(each) for each in (result.labels, result.values)
        )
        for name, score in (result.scores or {}).items():
            assert (row["scores"][name] if suffix == ".jsonl" else row[f"scores.{name}"]) == score
    assert [path.name for path in tmp_path.iterdir()] == [path.name]


@settings(
    deadline=None, max_examples=examples(30), database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=st.lists(st.tuples(st.text(), st.text(), st.floats(0, 1)), min_size=1, max_size=5))
@pytest.mark.parametrize("suffix", FORMATS)
def test_any_text_label_and_score_is_read_back(tmp_path, suffix, rows):
    path = tmp_path / f"out{suffix}"
    write_results(str(path), [(text, replace(ONE, label=label, score=score)) for text, label, score in rows])
    assert [(row["input"], row["label"], row["score"]) for row in read(path)] == rows


def test_parquet_is_written_a_group_at_a_time(tmp_path):
    path = tmp_path / "out.parquet"
    write_results(str(path), ((f"text {place}", replace(ONE, bytes_read=place)) for place in range(2500)))
    file = pyarrow.parquet.ParquetFile(path)
    sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
    assert sizes == [1024, 1024, 452]
    numbers = file.read().column("bytes_read").to_pylist()
    assert all(after == before + 1 for before, after in pairwise(numbers)) and len(numbers) == 2500


def test_long_inputs_end_a_group_earlier(tmp_path):
    path = tmp_path / "out.parquet"
    write_results(str(path), (("a" * 100_000, ONE) for _ in range(10)))
    file = pyarrow.parquet.ParquetFile(path)
    assert [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)] == [3, 3, 3, 1]


def test_what_parquet_loads_is_loaded_before_the_plan(run_python):
    printed = run_python(
        """
        import sys
        from offramp.session.outputs import require_library, write_results
        from offramp.session.results import Result
        require_library("out.parquet")
        before = set(sys.modules)
        write_results("out.parquet", [("a", Result("film", 0.5, 1, 1, 0, ("film",), scores={"film": 0.5}))])
        print("pyarrow.parquet" in before, sorted(set(sys.modules) - before))
        """
    )
    assert printed == "True []\n"


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("number", [0, 1, 2000])
def test_a_failure_leaves_the_file_that_was_there(tmp_path, suffix, number):
    def answers():
        yield from (("a", ONE) for _ in range(number))
        raise UsageError("line 3")

    path = tmp_path / f"out{suffix}"
    path.write_text("before")
    with pytest.raises(UsageError, match="line 3"):
        write_results(str(path), answers())
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "out.csv"
    link.symlink_to(tmp_path / "there" / "data")
    write_results(str(link), [("a", ONE)])
    assert link.is_symlink() and (tmp_path / "there" / "data").read_text().startswith('"input","label"')


def test_without_pyarrow_the_other_formats_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(OfframpError, match=r"pyarrow is not installed - out\.parquet - .*; \.csv and \.jsonl need no"):
        require_library("out.parquet")
    require_library("out.csv")

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.errors import UsageError
from offramp.tasks.lines import Notes
from offramp.tasks.tables import Layout, field, label_field, read_stream, read_table, read_texts


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows(path):
    return [cells for _, cells in read_table(path)]


TEXTS = ("plain", 'a "quote" inside', '"all of it"', "tab\there", "line\nbreak", '"', "")


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("separator", ["\t", ","])
@settings(deadline=None)
@given(texts=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4))
def test_what_a_writer_of_quotes_writes_is_read_or_refused(tmp_path_factory, quoting, separator, texts):
    """Rows of a TSV file whose quotes are not recognised are read literally, and have other numbers of fields."""
    path = tmp_path_factory.mktemp("quotes") / ("t.csv" if separator == "," else "t.tsv")
    wanted = [{"text": text, "label": "x"} for text in texts]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=separator, quoting=quoting)
        writer.writerows([["text", "label"], *([text, "x"] for text in texts)])
    assert rows(path) == wanted
    assert [cells for _, cells in read_table(path, Layout(quotes=True))] == wanted


@pytest.mark.parametrize("text", ['"one', 'two "x"', '"three"', '"four" and "five"', '""'])
def test_quotes_of_a_tsv_that_is_not_quoted_are_part_of_the_text(tmp_path, text):
    path = write(tmp_path / "t.tsv", f"text\tlabel\nplain\t1\n{text}\t0\nplain\t1\n")
    assert [row["text"] for row in rows(path)] == ["plain", text, "plain"]


def test_quotes_in_later_lines_of_a_tsv_are_counted(tmp_path):
    said = []
    notes = Notes(said.append)
    path = write(tmp_path / "t.tsv", "text\n" + "plain\n" * 60 + '"a ""b"""\n')
    assert [cells["text"] for _, cells in read_table(path, notes=notes)][-1] == '"a ""b"""'
    notes.report()
    assert said == [f"rows have quotes that were kept (--quotes yes removes them): 1 ({path}:62)"]


def test_quotes_mean_nothing_in_a_tsv_and_something_in_a_csv(tmp_path):
    tsv = write(tmp_path / "t.tsv", 'text\tlabel\r\n"one\t1\r\n\r\ntwo "x"\t0\r\n')
    assert rows(tsv) == [{"text": '"one', "label": "1"}, {"text": 'two "x"', "label": "0"}]
    csv = write(tmp_path / "t.csv", 'text,label\n"one, ""x""\nnext",1\n')
    assert rows(csv) == [{"text": 'one, "x"\nnext', "label": "1"}]


def test_json_lines_and_byte_order_marks(tmp_path):
    lines = json.dumps({"text": "ä", "label": 1}) + "\n\n" + json.dumps({"text": "b", "label": "x"}) + "\n"
    assert rows(write(tmp_path / "t.jsonl", lines)) == [{"text": "ä", "label": 1}, {"text": "b", "label": "x"}]
    assert rows(write(tmp_path / "t.tsv", b"\xef\xbb\xbftext\none\n")) == [{"text": "one"}]
    for name in ("t.tsv", "t.csv"):
        assert rows(write(tmp_path / name, "text\none\n".encode("utf-16"))) == [{"text": "one"}]


@pytest.mark.parametrize(
    ("cells", "label"),
    [
        ((1, 1.0, "1", "1.0", "1.00"), "1"),
        ((-3, "-3.0"), "-3"),
        ((1.5, "1.5"), "1.5"),
        ((True, "true"), "true"),
        (("01",), "01"),
        (("1.10",), "1.10"),
        (("a.0",), "a.0"),
    ],
)
def test_labels_that_are_one_number_are_one_label(cells, label):
    assert {label_field(("here", {"label": cell}), "label") for cell in cells} == {label}


@pytest.mark.parametrize("cell", [None, float("nan"), "nan", " NaN ", [], ["x"], {"x": 1}])
def test_what_is_no_label_is_refused(cell):
    with pytest.raises(UsageError, match=r"column 'label' is (null or NaN|a list|a dict)"):
        label_field(("here", {"label": cell}), "label")


@pytest.mark.parametrize("cell", [None, float("nan"), 5, 1.5, True, ["good", "cat"], {}])
def test_what_is_no_text_is_refused(cell):
    with pytest.raises(UsageError, match="column 'text' is"):
        field(("here", {"text": cell}), "text")


def test_options_of_the_layout_are_never_ignored(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text('text,label\n"a" b,1\n"c",2\n')
    found = [tuple(cells.values()) for _, cells in read_table(path, Layout(quotes=False))]
    assert found == [('"a" b', "1"), ('"c"', "2")]
    with pytest.raises(UsageError, match="not CSV"):
        list(read_table(path))
    (tmp_path / "some.txt").write_text("text\na film\n")
    for layout in (Layout(header=True), Layout(quotes=True)):
        with pytest.raises(UsageError, match="plain text has no header and no quotes"):
            read_texts(tmp_path / "some.txt", layout=layout)
    assert len(list(read_texts(tmp_path / "some.txt", layout=Layout(header=False, quotes=False)))) == 2


def test_rows_of_a_table_in_memory(tmp_path):
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    found = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    frame = pandas.DataFrame(found)
    assert [cells for _, cells in read_table(frame)] == found
    assert {type(cells["label"]) for _, cells in read_table(frame)} == {int}
    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_list([*found, {"text": "c", "label": -1}], features=names)
    assert [cells["label"] for _, cells in read_table(data)] == ["no", "yes", None]
    for form in ("numpy", "torch"):
        for each, wanted in ((data, ["no", "yes", None]), (datasets.Dataset.from_list(found), [0, 1])):
            cells = [row["label"] for _, row in read_table(each.with_format(form))]
            assert cells == wanted and {type(cell) for cell in cells} <= {str, int, type(None)}, form
    frame.columns = ["text", "text"]
    with pytest.raises(UsageError, match="two columns are named 'text' - DataFrame"):
        list(read_table(frame))
    with pytest.raises(UsageError, match="DatasetDict is no table"):
        list(read_table(datasets.DatasetDict(train=data)))


def test_only_cells_that_are_used_must_be_values_of_python(tmp_path):
    """Text that is not UTF-8, and a time out of range, were called faults of the program, in any column."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {
        "text": ["abcd", "good"],
        "when": pa.array([1 << 61, 1], pa.timestamp("ms")),
        "other": ["wxyz", "good"],
        "raw": [b"a", b"b"],
    }
    path = tmp_path / "odd.parquet"
    parquet.write_table(pa.table(columns), path, compression="none", use_dictionary=False, write_statistics=False)
    path.write_bytes(path.read_bytes().replace(b"wxyz", b"\xff\xfe\xfd\xfc"))
    assert list(read_texts(path)) == ["abcd", "good"]
    for name in ("when", "other"):
        with pytest.raises(UsageError, match=f"column '{name}' is unreadable .* - .*odd.parquet:1 - correct the row"):
            list(read_texts(path, name))
    with pytest.raises(UsageError, match="column 'raw' is bytes, not one label"):
        label_field(next(read_table(path)), "raw")


def test_columns_may_be_named_from_outside(tmp_path):
    with write(tmp_path / "t.tsv", "x\ty\n").open("rb") as stream:
        layout = Layout("tsv", columns=("a", "b"))
        assert list(read_stream(stream, "here", layout, Notes())) == [("here:1", {"a": "x", "b": "y"})]


def test_columns_without_a_header_are_numbered(tmp_path):
    path = write(tmp_path / "t.csv", "x,y\n")
    assert [cells for _, cells in read_table(path, Layout(header=False))] == [{"1": "x", "2": "y"}]


def test_blank_and_short_rows_are_counted_where_they_are_skipped(tmp_path):
    said = []
    notes = Notes(said.append)
    path = write(tmp_path / "t.tsv", "a\tb\n\n1\t2\n3\n\t\n" + "\n" * 9)
    found = [cells for _, cells in read_table(path, Layout(skips_short=True), notes)]
    assert found == [{"a": "1", "b": "2"}, {"a": "", "b": ""}]
    notes.report()
    places = ", ".join(f"{path}:{number}" for number in (2, 6, 7, 8, 9))
    short = f"rows with too few fields were skipped: 1 ({path}:4)"
    assert said == [f"blank lines were skipped: 10 ({places}, ...)", short]


def test_rows_say_where_they_stand(tmp_path):
    (row,) = read_table(write(tmp_path / "t.tsv", "text\tx\n\none\t1\n"))
    assert row[0].endswith("t.tsv:3")
    with pytest.raises(UsageError, match=r"no column 'label', found 'text', 'x' - .*t.tsv:3 - name one of these"):
        field(row, "label")


@pytest.mark.parametrize(
    ("name", "content", "mention"),
    [
        ("t.tsv", "a\tb\n1\n", "1 fields, 2 are expected - .*t.tsv:2"),
        ("t.csv", 'a\n"open\n', "not CSV"),
        ("t.jsonl", "[1]\n", "a list, not an object"),
        ("t.jsonl", "{\n", "not JSON"),
        ("t.tsv", b"a\n\xff\n", "not UTF-8"),
        ("t.xls", "a\n", "unknown kind of input '.xls'"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, name, content, mention):
    with pytest.raises(UsageError, match=mention):
        rows(write(tmp_path / name, content))
    for missing in ("none.tsv", "none"):
        with pytest.raises(UsageError, match=r"no such file or folder - .*none"):
            rows(tmp_path / missing)

import json

import pytest

from offramp.errors import UsageError
from offramp.tasks.tables import field, read_stream, read_table


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows(path):
    return [cells for _, cells in read_table(path)]


def test_quotes_mean_nothing_in_a_tsv_and_something_in_a_csv(tmp_path):
    tsv = write(tmp_path / "t.tsv", 'text\tlabel\r\n"one\t1\r\n\r\ntwo "x"\t0\r\n')
    assert rows(tsv) == [{"text": '"one', "label": "1"}, {"text": 'two "x"', "label": "0"}]
    csv = write(tmp_path / "t.csv", 'text,label\n"one, ""x""\nnext",1\n')
    assert rows(csv) == [{"text": 'one, "x"\nnext', "label": "1"}]


def test_json_lines_and_byte_order_marks(tmp_path):
    lines = json.dumps({"text": "ä", "label": 1}) + "\n\n" + json.dumps({"text": "b", "label": "x"}) + "\n"
    assert rows(write(tmp_path / "t.jsonl", lines)) == [{"text": "ä", "label": "1"}, {"text": "b", "label": "x"}]
    assert rows(write(tmp_path / "t.tsv", b"\xef\xbb\xbftext\none\n")) == [{"text": "one"}]


def test_columns_may_be_named_from_outside(tmp_path):
    with write(tmp_path / "t.tsv", "x\ty\n").open("rb") as stream:
        assert list(read_stream(stream, ".tsv", "here", ("a", "b"))) == [("here:1", {"a": "x", "b": "y"})]


def test_rows_say_where_they_stand(tmp_path):
    (row,) = read_table(write(tmp_path / "t.tsv", "text\n\none\n"))
    assert row[0].endswith("t.tsv:3")
    with pytest.raises(UsageError, match=r"no column 'label', found 'text' - .*t.tsv:3 - name one of these"):
        field(row, "label")


@pytest.mark.parametrize(
    ("name", "content", "mention"),
    [
        ("t.tsv", "a\tb\n1\n", "1 columns, 2 are expected - .*t.tsv:2"),
        ("t.csv", 'a\n"open\n', "not CSV"),
        ("t.jsonl", "[1]\n", "a list, not an object"),
        ("t.jsonl", "{\n", "not JSON"),
        ("t.tsv", b"a\n\xff\n", "not UTF-8"),
        ("t.xls", "a\n", "unknown kind of table '.xls'"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, name, content, mention):
    with pytest.raises(UsageError, match=mention):
        rows(write(tmp_path / name, content))
    with pytest.raises(UsageError, match="cannot be read"):
        rows(tmp_path / "none.tsv")

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import itertools
import json
import lzma
import os
import re
import sys
import threading
import tracemalloc
import zipfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from offramp.errors import UsageError
from offramp.tasks import lines
from offramp.tasks.columns import has_spaced_fields
from offramp.tasks.lines import MAX_TEXT_BYTES
from offramp.tasks.tables import Layout, read_table, read_texts
from tests.selection import examples


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def type_in(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


@pytest.fixture
def said():
    """What `read_texts` says: pass `said.append`."""
    return []


def test_a_text_file_has_one_text_a_line_and_blank_lines_are_counted(write, said):
    path = write("some.TXT", "\ufeff\nfirst\n\ufeff  second, indented\r\n \t \r\nthird\u2028still third\x0cand\rhere")
    texts = ["", "first", "\ufeff  second, indented", " \t ", "third\u2028still third\x0cand\rhere"]
    assert list(read_texts(path, log=said.append)) == texts
    assert said == [f"blank texts, each answered as an empty one: 2 ({path}:1, {path}:4)"]


@given(lines=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0")), min_size=1))
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_there_is_a_text_for_each_line_in_every_encoding(tmp_path_factory, encoding, lines):
    lines = ["first", *lines]
    mark = "\ufeff" if encoding.endswith("e") else ""
    path = tmp_path_factory.mktemp("any") / "any.txt"
    path.write_bytes((mark + "".join(line + "\n" for line in lines)).encode(encoding))
    assert list(read_texts(path)) == lines


def test_standard_input_is_read_as_utf8_whatever_the_locale(monkeypatch):
    type_in(monkeypatch, "café\n\n中国\n".encode())
    assert list(read_texts("-")) == ["café", "", "中国"]
    type_in(monkeypatch, "café\n中国\n".encode("utf-16"))
    assert list(read_texts("-")) == ["café", "中国"]


def test_standard_input_may_be_a_table_and_may_be_closed(monkeypatch, said):
    type_in(monkeypatch, b'{"text": "a"}\n')
    assert list(read_texts("-", log=said.append)) == ['{"text": "a"}']
    assert "--input-format jsonl" in said[0]
    type_in(monkeypatch, b'{"text": "a"}\n')
    assert list(read_texts("-", layout=Layout("jsonl"))) == ["a"]
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="standard input is closed"):
        read_texts("-")


def test_a_pipe_without_a_suffix_is_plain_text(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("one\ntwo\n",))
    writer.start()
    assert list(read_texts(pipe)) == ["one", "two"]
    writer.join()


def test_of_a_long_line_the_beginning_is_read_and_this_is_said(write, said):
    long = "é" * MAX_TEXT_BYTES
    path = write("some.txt", f"short\n{long}\nlast\n")
    texts = list(read_texts(path, log=said.append))
    assert texts == ["short", long[: MAX_TEXT_BYTES // 2], "last"]
    assert said == [f"lines of which only the first 1.00 MiB was read: 1 ({path}:2)"]


@pytest.mark.parametrize("suffix", ["txt", "tsv", "csv", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_line_without_end_takes_no_memory(tmp_path, suffix, encoding):
    path = tmp_path / f"some.{suffix}"
    with path.open("wb") as file:
        file.write('"first '.encode(encoding))
        for _ in range(48):
            file.write(("x" * (1 << 20)).encode(encoding).lstrip(b"\xff\xfe"))
    tracemalloc.start()
    try:
        with contextlib.suppress(UsageError):
            list(read_texts(path))
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", ["txt", "tsv", "csv", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lines_that_end_with_cr_alone_are_lines_and_this_is_said(write, said, suffix, encoding):
    texts = [f"a good cat {number}" for number in range(9999)]
    lines = {"txt": texts, "jsonl": [json.dumps({"text": text}) for text in texts]}.get(suffix, ["text", *texts])
    path = write(f"some.{suffix}", "".join(line + "\r" for line in lines).encode(encoding))
    assert list(read_texts(path, log=said.append)) == texts
    assert [line for line in said if "CR" in line] == [
        f"{path}: lines end with CR alone, and each CR is read as a line break"
    ]


def test_a_cr_within_a_line_that_ends_with_lf_stays(write, said):
    path = write("some.csv", '"te\rxt",label\n"a\rb",1\r\n')
    assert list(read_texts(path, "te\rxt", log=said.append)) == ["a\rb"]
    assert list(read_texts(write("some.txt", "a\rb\nc\rd"), log=said.append)) == ["a\rb", "c\rd"]
    assert list(read_texts(write("one.txt", "a b\r"), log=said.append)) == ["a b"]
    assert not any("CR" in line for line in said)


def test_lines_that_end_with_cr_alone_take_no_memory(tmp_path):
    path = tmp_path / "some.txt"
    with path.open("wb") as file:
        for _ in range(48):
            file.write(b"short\r" + b"x" * (1 << 20))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_texts(path)) == 49
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()


def test_a_line_is_given_before_the_next_one_arrives(monkeypatch):
    reading, writing = os.pipe()
    with os.fdopen(reading, encoding="utf-8") as stdin, os.fdopen(writing, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdin", stdin)
        print("first", file=pipe, flush=True)
        texts = read_texts("-")
        assert next(texts) == "first"
        print("second", file=pipe, flush=True)
        assert next(texts) == "second"
    assert stdin.closed


def test_standard_input_stays_open(monkeypatch):
    type_in(monkeypatch, b"text\n")
    list(read_texts("-"))
    assert not sys.stdin.buffer.closed


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
@pytest.mark.parametrize(
    ("lines", "header", "texts", "mention"),
    [
        ("text label,one 1,two 2", None, ["one", "two"], "this line is the header, with the columns text, label"),
        ("label sentence,1 one", None, ["one"], "this line is the header"),
        ("one 1,two 2", None, ["one", "two"], "this line is a row, and there is no header"),
        ("text label,one 1", False, ["text", "one"], "read from the column '1'"),
        ("text,one", None, ["one"], "this line is the header"),
        ("good,one", None, ["good", "one"], "this line is a row"),
    ],
)
def test_what_is_taken_for_a_header_is_said(write, said, suffix, lines, header, texts, mention):
    mark = "\t" if suffix == "tsv" else ","
    path = write(f"some.{suffix}", "".join(line.replace(" ", mark) + "\n" for line in lines.split(",")))
    found = read_texts(path, log=said.append, layout=Layout(header=header))
    assert list(found) == texts
    assert mention in "\n".join(said)


@pytest.mark.parametrize("given", [(), ("sentence",)])
@pytest.mark.parametrize(
    ("suffix", "first", "separator", "remedy"),
    [
        ("csv", "sentence;label", "semicolons, not by commas", "save it with commas, as .csv"),
        ("csv", '"";"sentence";"label"', "semicolons, not by commas", "save it with commas"),
        ("csv", "sentence\tthe label", "tabs, not by commas", "give --input-format tsv, or name it .tsv"),
        ("tsv", "id,Text,x", "commas, not by tabs", "give --input-format csv, or name it .csv"),
        ("tsv", "sentence|x", "bars, not by tabs", "save it with commas"),
        ("txt", "sentence,label", "commas, in a file that is read as plain text", "give --input-format csv"),
        ("txt", '"text"\t"label"', "tabs, in a file that is read as plain text", "give --input-format tsv"),
        ("txt", "review;label", "semicolons, in a file", "save it with commas"),
    ],
)
def test_a_header_with_another_separator_is_refused(write, given, suffix, first, separator, remedy):
    """Its rows would be answered as texts, or refused as rows with too many fields."""
    path = write(f"some.{suffix}", f"{first}\r\nx\n")
    with pytest.raises(UsageError) as refused:
        list(read_texts(path, *(given if suffix != "txt" else ())))
    assert f"names are separated by {separator}" in str(refused.value)
    assert str(path) + ":1" in str(refused.value)
    assert remedy in str(refused.value)


def test_a_line_that_looks_like_a_header_is_read_where_the_layout_says_so(write):
    line = "sentence;label"
    assert list(read_texts(write("some.csv", f"{line}\nx\n"), layout=Layout(header=False))) == [line, "x"]
    assert list(read_texts(write("some.txt", f"{line}\nx\n"), layout=Layout("txt"))) == [line, "x"]


@pytest.mark.parametrize("suffix", ["txt", "tsv", "csv"])
@pytest.mark.parametrize(
    "first",
    [
        "A review, with a comment, and a score.",
        "title",
        "good; label",
        "class|no class?",
        "text, label",
        "a,b",
        "text,",
        "Text: one;two",
        "good; bad",
        "a|b|c",
    ],
)
def test_texts_that_hold_separators_are_read(write, suffix, first):
    line = f'"{first}"' if suffix == "csv" else first
    texts = list(read_texts(write(f"some.{suffix}", f"{line}\nmore\n"), layout=Layout(header=None)))
    assert texts[-1] == "more"
    assert first in texts


@pytest.mark.parametrize("given", [(), ("Kommentar",)])
@pytest.mark.parametrize(
    ("suffix", "mark", "what", "remedy"),
    [
        ("csv", ";", "2 fields that are separated by semicolons, not by commas", "save it with commas, as .csv"),
        ("csv", "\t", "2 fields that are separated by tabs, not by commas", "give --input-format tsv, or name it .tsv"),
        ("csv", "|", "2 fields that are separated by bars, not by commas", "save it with commas, as .csv"),
        ("tsv", ",", "2 fields that are separated by commas, not by tabs", "give --input-format csv, or name it .csv"),
    ],
)
def test_a_table_with_another_separator_is_refused_whatever_its_columns_are_called(
    write, given, suffix, mark, what, remedy
):
    rows = ["Kommentar\tUrteil", "sehr gut\t1", '"nein\tdanke"\t0', "", "ja\t1"]
    path = write(f"some.{suffix}", "".join(row.replace("\t", mark) + "\n" for row in rows))
    with pytest.raises(UsageError, match=what) as refused:
        list(read_texts(path, *given))
    assert f"{path}:1 - {remedy} (--header no if the lines are texts)" in str(refused.value)
    path = write(f"other.{suffix}", f"so{mark}la\ndo{mark}re\n")
    assert list(read_texts(path, layout=Layout(header=False))) == [f"so{mark}la", f"do{mark}re"]


@pytest.mark.parametrize(("suffix", "mark"), [("csv", ","), ("tsv", "\t")])
def test_a_line_that_names_the_separator_for_excel_is_skipped_and_said(write, said, suffix, mark):
    rows = [("text", "label"), ('"a\nb"', "1"), ("c", "2")]
    path = write(f"some.{suffix}", f"sep={mark}\r\n" + "".join(mark.join(row) + "\r\n" for row in rows))
    assert list(read_texts(path, log=said.append)) == ["a\nb", "c"]
    assert f"{path}:1: this line names the separator, and is skipped" in said[0]
    assert [place for place, _ in read_table(path)] == [f"{path}:4", f"{path}:5"]


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs"), ("~", "'~'")])
def test_a_line_that_names_another_separator_is_refused(write, mark, name):
    """With several columns its rows were read as texts."""
    path = write("some.csv", f"sep={mark}\nKommentar{mark}Urteil{mark}x\ngut{mark}1{mark}\n")
    with pytest.raises(UsageError, match=f"names {name} as the separator, not commas - .*some.csv:1"):
        read_texts(path)
    assert next(iter(read_texts(path, layout=Layout(header=False)))) == f"sep={mark}"


@pytest.mark.parametrize(
    ("lines", "notice"),
    [
        (["Kommentar;Urteil", "gut;1", "schlecht;0"], "each line has 2 fields that are separated by semicolons"),
        (["Kommentar\tUrteil", *["gut\t1"] * 99], "each line has 2 fields that are separated by tabs"),
        (["Kommentar,Urteil,x", "gut,1,2"], "each line has 3 fields that are separated by commas"),
        (["Text", "gut"], "this line is read as a text, and could be the header of a table"),
        (["good, very good", "bad, very bad"], None),
        (["a;b", "c"], None),
        (["a;b"], None),
    ],
)
def test_plain_text_that_looks_like_a_table_is_read_and_said(write, said, lines, notice):
    path = write("some.txt", "".join(f"{line}\n" for line in lines))
    assert list(read_texts(path, log=said.append)) == lines
    assert (len(said) == 1 and said[0].startswith(f"{path}:1: {notice}")) if notice else not said
    assert list(read_texts(path, log=said.append, layout=Layout("txt"))) == lines
    assert len(said) == bool(notice)


def test_spaces_after_the_commas_of_a_table_are_removed_and_said(write, said):
    path = write("some.csv", 'label, text, id\none, "good, very good", 1\ntwo, bad,2\n')
    assert list(read_texts(path, log=said.append)) == ["good, very good", "bad"]
    assert f"{path}:1: spaces after commas are removed" in said
    assert [row["label"] for _, row in read_table(path)] == ["one", "two"]
    assert list(read_texts(write("other.csv", "text,label\n one, two\n"))) == [" one"]


@pytest.mark.parametrize(
    ("line", "is_spaced"),
    [
        ('"Nice, really"\n', False), ('"Nice, ""really"", yes"', False), ('text,"a, b"', False), ('text," a"', False),
        ('"a, b",label', False), ('"a, not closed', False), ('text, "a,b"', True), ('"a,b", label', True),
        ('"a, b", "c,d", "e"\n', True), ('5" disk, label', True), ("text, label\n", True), ("text, \n", False),
    ],
)  # fmt: skip
def test_commas_within_quotes_have_no_spaces_after_them(line, is_spaced):
    assert has_spaced_fields(line) == is_spaced


def test_a_sentence_in_quotes_is_no_table_with_spaces(write, said):
    list(read_texts(write("some.csv", '"Nice, really"\n'), layout=Layout(header=False), log=said.append))
    assert not any("spaces after commas" in line for line in said)


def test_a_column_is_never_guessed_where_names_are_given(write):
    with pytest.raises(UsageError, match="no column 'sentence' or 'text', found 'question', 'answer'"):
        read_texts(write("some.tsv", "question\tanswer\na\tb\n"))


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_a_named_column_needs_a_header(write, suffix):
    mark = "\t" if suffix == "tsv" else ","
    path = write(f"some.{suffix}", "\ufeffid\ta\tb\n1\tit's\tx\n\n2\tc\t\n".replace("\t", mark))
    assert list(read_texts(path, "a")) == ["it's", "c"]
    assert list(read_texts(path, "b", "id")) == [("x", "1"), ("", "2")]


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_a_field_may_be_larger_than_the_csv_module_allows(write, suffix):
    mark = "\t" if suffix == "tsv" else ","
    path = write(f"some.{suffix}", f"text{mark}label\n" + "x" * 3_000_000 + f"{mark}1\n")
    assert [len(text) for text in read_texts(path, "text")] == [3_000_000]


def test_all_formats_of_a_table_give_the_same_texts(write, tmp_path):
    rows = [{"text": f'a {n} "quote", comma', "pair": "b"} for n in range(9)]
    frame = pytest.importorskip("pandas").DataFrame(rows)
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "t.parquet")
    wanted = [(row["text"], row["pair"]) for row in rows]
    assert list(read_texts(frame)) == wanted
    for suffix in ("csv", "tsv", "jsonl", "parquet"):
        assert list(read_texts(tmp_path / f"t.{suffix}")) == wanted


def test_jsonl_has_texts_and_pairs(write, said):
    path = write(
        "some.jsonl", '\ufeff{"text": "a\\nb"}\n\n{"text": "", "pair": "c", "label": 1}\r\n{"text": "\\ud83d"}'
    )
    assert list(read_texts(path, log=said.append)) == ["a\nb", ("", "c"), "\ud83d"]
    assert f"rows are pairs of texts, of the column 'text' and 'pair', unlike the first: 1 ({path}:3)" in said


def test_named_fields_of_jsonl(write):
    path = write("some.jsonl", '{"q": "what", "a": "that", "pair": "other"}\n')
    assert list(read_texts(path, "q", "a")) == [("what", "that")]
    assert list(read_texts(path, "q")) == [("what", "other")]
    with pytest.raises(UsageError, match="no column 'sentence' or 'text'"):
        read_texts(path, None, "a")


@given(texts=st.lists(st.text(), min_size=1))
def test_every_text_survives_jsonl(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("any") / "any.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    assert list(read_texts(path)) == texts


@pytest.mark.parametrize(
    "name, content, columns, message",
    [
        ("some.xls", "a,b\n", (), r"unknown kind of input '\.xls' - .*some\.xls - .*\.txt, \.tsv, \.csv"),
        ("none", "a\n", (), "unknown kind of input ''"),
        ("some.txt", "a\n", ("a",), "plain text has no columns"),
        ("some.txt", "", (), r"no input - .*some\.txt"),
        ("some.txt", "\n \r\n", (), "no input"),
        ("some.tsv", "", ("a",), "no input"),
        ("some.tsv", "a\tb\n", ("a",), "no input"),
        ("some.tsv", "a\tb\n1\t2\n", ("c",), r"no column 'c', found 'a', 'b' - .*some\.tsv:2"),
        ("some.tsv", "a\tb\n1\t2\n", ("a", "c"), "no column 'c', found 'a', 'b'"),
        ("some.tsv", "a\tb\n1\t2\n", (None, "b"), "no column 'sentence' or 'text', found 'a', 'b'"),
        ("some.tsv", "a\tb\n1\t2\n", ("a", "a"), "both read from the column 'a' - .*:2 - name another column"),
        ("some.tsv", "sentence\tb\n1\t2\n", (None, "sentence"), "both read from the column 'sentence'"),
        ("some.tsv", "a\tb\n1\t2\n3\n", ("b",), r"1 fields, 2 are expected - .*some\.tsv:3"),
        ("some.tsv", "a\tb\n1\t2\t3\n", ("b",), r"3 fields, 2 are expected - .*some\.tsv:2"),
        ("some.csv", "a,b\n1,2,3\n", ("b",), r"3 fields, 2 are expected - .*some\.csv:2"),
        ("some.csv", "a,b,a\n1,2,3\n", ("b",), r"two columns are named 'a' - .*some\.csv:1"),
        ("some.jsonl", '{"a": "x", "a": "y"}', ("a",), r"not JSON \(two of the keys 'a', 'a' are equal\)"),
        ("some.jsonl", "", (), "no input"),
        ("some.jsonl", '\n{"text": "a"\n', (), r"not JSON .*some\.jsonl:2"),
        ("some.jsonl", "[" * 100_000, (), r"not JSON .*some\.jsonl:1"),
        ("some.jsonl", '{"text": ' + "9" * 5000 + "}", (), "not JSON"),
        ("some.jsonl", '["text"]', (), r"a list, not an object - .*some\.jsonl:1"),
        ("some.jsonl", '{"txt": "a", "label": 1}', (), r"no column 'sentence' or 'text', found 'txt', 'label' - .*:1"),
        ("some.jsonl", "{}", ("a",), "no column 'a', found none"),
        ("some.jsonl", '{"text": "a"}', ("text", "b"), "no column 'b', found 'text'"),
        ("some.jsonl", '{"text": 7}', (), "column 'text' is a int, not a text"),
        ("some.jsonl", '{"text": ["a"]}', (), "column 'text' is a list, not a text"),
        ("some.jsonl", '{"text": NaN}', (), "column 'text' is null or NaN"),
        ("some.jsonl", '{"text": "a", "pair": null}', (), "column 'pair' is null or NaN"),
        ("some.txt", b"fine\n\xa3600m\n", (), r"not UTF-8 \(byte 0xa3 at 0\) - .*some\.txt:2"),
        ("some.txt", "text".encode("utf-16-le"), (), r"not UTF-8 \(zero bytes, perhaps UTF-16"),
        ("some.txt", "text".encode("utf-16")[:-1], (), r"damaged text \(.*truncated data"),
    ],
)
def test_what_is_wrong_is_told(write, name, content, columns, message):
    path = write(name, content)
    with pytest.raises(UsageError, match=message):
        list(read_texts(path, *columns))


def zipped(data: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as file:
        file.writestr("xl/workbook.xml", data)
    return target.getvalue()


@pytest.mark.parametrize("suffix", ["txt", "tsv", "csv", "jsonl"])
@pytest.mark.parametrize("content", [b"", b"text\n" * 999])
@pytest.mark.parametrize(
    ("pack", "what"),
    [
        (gzip.compress, "gzip data, not text - .* - decompress it"),
        (bz2.compress, "bzip2 data, not text - .* - decompress it"),
        (lzma.compress, "xz data, not text - .* - decompress it"),
        (lambda data: b"\x28\xb5\x2f\xfd\x04" + data, "zstd data, not text - .* - decompress it"),
        (zipped, r"a zip archive, such as an Excel workbook \(.xlsx\) or .*, not text - .* - export the sheet as CSV"),
        (lambda data: bytes.fromhex("d0cf11e0a1b11ae1") + data, "an old Office document, .* - export the sheet as CSV"),
        (lambda data: b"PAR1\x15" + data, "a Parquet file, not text - .* - name it .parquet, or give --input-format"),
        (lambda data: b"ARROW1\0\0" + data, "an Arrow file, not text - .* - save its texts as CSV, JSON lines"),
        (lambda data: b"\xff\xff\xff\xff\x10" + data, "an Arrow stream, not text - .* - save its texts as"),
        (lambda data: b"SQLite format 3\0" + data, "an SQLite database, not text - .* - save its texts as"),
        (lambda data: b"FEA1\0\0\0\0" + data, "a Feather file, not text - .* - save its texts as"),
        (lambda data: b"%PDF-1.7\n" + data, "a PDF document, not text - .* - save its texts as"),
        (lambda data: b"%PDF-2.0 \r%\xe2\xe3" + data, "a PDF document, not text - .* - save its texts as"),
        (lambda data: b"{\\rtf1\\ansi " + data, "an RTF document, not text - .* - save its texts as"),
        (lambda data: b"{\\rtf1\n\\ansi " + data, "an RTF document, not text - .* - save its texts as"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n" + data, "a pointer of Git LFS, .* git lfs pull"),
    ],
)
def test_compressed_data_and_workbooks_are_named(write, suffix, content, pack, what):
    with pytest.raises(UsageError, match=what):
        read_texts(write(f"some.{suffix}", pack(content)))


def test_a_text_that_begins_like_compressed_data_is_read(write):
    assert list(read_texts(write("some.txt", "BZh9 is a level\nPK\n"))) == ["BZh9 is a level", "PK"]


BEGINNINGS = ["BZh91AY", "PAR1", "%PDF-", "%PDF-1.", "%PDF-2.0", "%PDF-files", "{\\rtf", "{\\rtf1"]
"""And what the bytes by which a file of another kind is known have before the first that no text has."""
for mark, _ in (*lines._PACKED, *lines._ARCHIVES, *lines._BINARY):
    BEGINNINGS.append(re.findall(rb"^[ -~]*", mark)[0].decode())


@settings(max_examples=examples(200))
@given(st.sampled_from(sorted(set(BEGINNINGS))), st.text("abc 1.-é", min_size=1).filter(str.strip))
@example("FEA1", " model of a bridge")
@example("%PDF-", "files are documents")
def test_a_text_that_begins_with_the_characters_of_another_kind_is_read(beginning, rest):
    text = f"{beginning} {rest}"
    assert [line for _, line in lines.lines_of("x", io.BytesIO(text.encode()), lines.Notes())] == [text]


def test_a_missing_file_and_a_folder_are_told_at_the_call(tmp_path):
    with pytest.raises(UsageError, match=r"no such file.*none\.txt"):
        read_texts(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UsageError, match=r"Is a directory.*folder\.txt"):
        read_texts(tmp_path / "folder.txt")


def test_an_empty_standard_input_is_told(monkeypatch):
    type_in(monkeypatch, b"\n")
    with pytest.raises(UsageError, match="no input - -"):
        read_texts("-")


def test_a_file_is_read_as_it_is_asked_for(write):
    path = write("some.jsonl", '{"text": "good"}\n' * 3 + "bad\n")
    texts = read_texts(path)
    assert list(itertools.islice(texts, 3)) == ["good"] * 3
    with pytest.raises(UsageError, match=r"some\.jsonl:4"):
        next(texts)

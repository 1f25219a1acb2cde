from __future__ import annotations

import io
import itertools
import json
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import UsageError
from offramp.tasks.tables import read_texts


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def type_in(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


def test_a_text_file_has_one_text_a_line_and_blank_lines_are_skipped(write):
    path = write("some.TXT", "\ufefffirst\n\n\ufeff  second, indented\r\n \t \r\nthird\u2028still third\x0cand\rhere")
    assert list(read_texts(path)) == ["first", "\ufeff  second, indented", "third\u2028still third\x0cand\rhere"]


def test_standard_input_is_read_as_utf8_whatever_the_locale(monkeypatch):
    type_in(monkeypatch, "café\n\n中国\n".encode())
    assert list(read_texts("-")) == ["café", "中国"]


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


def test_the_first_column_of_a_tsv_is_the_text(write):
    path = write("some.tsv", 'text\tlabel\n"quoted\t1\n\tempty text\n\nno tab\r\n')
    assert list(read_texts(str(path))) == ["text", '"quoted', "", "no tab"]


def test_named_columns_of_a_tsv(write):
    path = write("some.tsv", '\ufeffid\ta\tb\n1\t"it\'s"\tx "y" z\n2\tc\t\textra\n')
    assert list(read_texts(path, "a")) == ['"it\'s"', "c"]
    assert list(read_texts(path, "b", "id")) == [('x "y" z', "1"), ("", "2")]


def test_a_field_may_be_larger_than_the_csv_module_allows(write):
    path = write("some.tsv", "text\tlabel\n" + "x" * 3_000_000 + "\t1\n")
    assert [len(text) for text in read_texts(path, "text")] == [3_000_000]


def test_jsonl_has_texts_and_pairs(write):
    path = write(
        "some.jsonl", '\ufeff{"text": "a\\nb"}\n\n{"text": "", "pair": "c", "label": 1}\r\n{"text": "\\ud83d"}'
    )
    assert list(read_texts(path)) == ["a\nb", ("", "c"), "\ud83d"]


def test_named_fields_of_jsonl(write):
    path = write("some.jsonl", '{"q": "what", "a": "that", "pair": "other"}\n')
    assert list(read_texts(path, "q", "a")) == [("what", "that")]
    assert list(read_texts(path, "q")) == [("what", "other")]
    with pytest.raises(UsageError, match="no field 'text'"):
        read_texts(path, None, "a")


@given(texts=st.lists(st.text(), min_size=1))
def test_every_text_survives_jsonl(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("any") / "any.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    assert list(read_texts(path)) == texts


@pytest.mark.parametrize(
    "name, content, columns, message",
    [
        ("some.csv", "a,b\n", (), r"unknown kind of input '\.csv' - .*some\.csv - .*\.txt, \.tsv or \.jsonl"),
        ("none", "a\n", (), "unknown kind of input ''"),
        ("some.txt", "a\n", ("a",), "plain text has no columns"),
        ("some.txt", "", (), r"no input - .*some\.txt"),
        ("some.txt", "\n \r\n", (), "no input"),
        ("some.tsv", "", ("a",), "no input"),
        ("some.tsv", "a\tb\n", ("a",), "no input"),
        ("some.tsv", "a\tb\n1\t2\n", ("c",), r"no column 'c', found 'a', 'b' - .*some\.tsv:1"),
        ("some.tsv", "a\tb\n1\t2\n", ("a", "c"), "no column 'c', found 'a', 'b'"),
        ("some.tsv", "a\tb\n1\t2\n", (None, "b"), "pair column 'b' without a text column"),
        ("some.tsv", "a\tb\n1\t2\n3\n", ("b",), r"1 columns, 2 are needed - .*some\.tsv:3"),
        ("some.jsonl", "", (), "no input"),
        ("some.jsonl", '\n{"text": "a"\n', (), r"not JSON .*some\.jsonl:2"),
        ("some.jsonl", "[" * 100_000, (), r"not JSON .*some\.jsonl:1"),
        ("some.jsonl", '{"text": ' + "9" * 5000 + "}", (), "not JSON"),
        ("some.jsonl", '["text"]', (), r"a list, not an object - .*some\.jsonl:1"),
        ("some.jsonl", '{"txt": "a", "label": 1}', (), r"no field 'text', found 'txt', 'label' - .*some\.jsonl:1"),
        ("some.jsonl", "{}", ("a",), "no field 'a', found none"),
        ("some.jsonl", '{"text": "a"}', ("text", "b"), "no field 'b', found 'text'"),
        ("some.jsonl", '{"text": 7}', (), "field 'text' is a int, not a string"),
        ("some.jsonl", '{"text": "a", "pair": null}', (), "field 'pair' is a NoneType, not a string"),
        ("some.txt", b"fine\n\xa3600m\n", (), r"not UTF-8 \(byte 0xa3 at 0\) - .*some\.txt:2"),
        ("some.txt", "text".encode("utf-16"), (), r"not UTF-8 \(byte 0xff at 0\) - .*some\.txt:1"),
    ],
)
def test_what_is_wrong_is_told(write, name, content, columns, message):
    path = write(name, content)
    with pytest.raises(UsageError, match=message):
        list(read_texts(path, *columns))


def test_a_missing_file_and_a_folder_are_told_at_the_call(tmp_path):
    with pytest.raises(UsageError, match=r"No such file.*none\.txt"):
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

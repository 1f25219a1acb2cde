"""Hostile results folders: records of sweeps with wrong values, and texts that are code elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.experiments.test_hostile_records import SPOILT

from .attacks import FREE, Attack, at, changed, drawn, mutations, nodes
from .sealed import plain_json

FILE, ABOUT = "results/records.jsonl", "results/results.json"
INJECTED = (
    "<script>alert(1)</script>", '"><svg onload=alert(1)>', "</style></svg><img src=x onerror=alert(1)>",
    '=HYPERLINK("http://x","y")', "+1+cmd|' /C calc'!A0", "@SUM(1)", "-2+3", "\t=1", "\\input{/etc/passwd}",
    "\\write18{id}", "$\\catcode`\\%=12$ %&#_{}~^", "a | b\n| c |", "![x](http://x/y.png)", "\x1b[2J\x07",
    "../../canary/secret", "{{ 7*7 }}", "</script><!--", "a\r\nb", "\ud800", "\x00",
)  # fmt: skip
"""Texts that are code in HTML, SVG, spreadsheets, LaTeX, Markdown, terminals, paths or templates."""
FREE_TEXTS = ("model", "task", "label", "labels", "cpu_model", "name", "error", "platform")
"""Keys whose texts are not words that options choose among."""


def attacks(honest: Path, number: int) -> Iterator[Attack]:
    """Yield damaged bytes, drawn edits of records, and the legal twin."""
    for name, data in _lines():
        yield Attack("results", name, "results", _written(data), "results", answers=FREE)
    for name, make in PLACES:
        yield Attack("results", name, "results", make, "results", answers=FREE)
    for index, record in enumerate(records_of((honest / "results" / FILE).read_bytes())):
        for name, path, value in drawn(mutations(record), number, f"results {index}"):
            yield Attack("record", f"{index} {name}", "results", _edited(index, path, value), "results", answers=FREE)
    for text in INJECTED:
        yield Attack("record", f"texts {text!a}", "results", _all_texts(text), "results", answers=FREE)
    for name, change in SPOILT.items():
        yield Attack("record", name, "results", _spoilt(change), "results", answers=FREE)
    yield Attack("results", "written again", "results", _edited(0, (), None), "results", is_legal=True)


def records_of(data: bytes) -> list[Any]:
    """Return the records of a file."""
    return [json.loads(line)["record"] for line in data.splitlines()]


def line_of(body: bytes) -> bytes:
    """Return the line of a record, with its digest."""
    return b'{"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'", "record": ' + body + b"}\n"


def _file_of(records: list[Any]) -> bytes:
    return b"".join(line_of(plain_json(each).replace(b"\n", b" ")) for each in records)


def _written(data: bytes) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        (place / FILE).write_bytes(data)

    return make


def _edited(index: int, path: tuple[Any, ...], value: Any) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        records = records_of((place / FILE).read_bytes())
        if path:
            changed(records[index], path, value)
        (place / FILE).write_bytes(_file_of(records))

    return make


def _spoilt(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Return the edit of the last record, if it has the parts that a change spoils."""

    def make(place: Path) -> None:
        records = records_of((place / FILE).read_bytes())
        change(records[-1])
        (place / FILE).write_bytes(_file_of(records))

    return make


def _all_texts(text: str) -> Callable[[Path], None]:
    """Return the edit that appends a text to each free text of all records."""

    def make(place: Path) -> None:
        records = records_of((place / FILE).read_bytes())
        for record in records:
            for path, value in list(nodes(record)):
                if isinstance(value, str) and not {*FREE_TEXTS, "environment"}.isdisjoint(path):
                    at(record, path[:-1])[path[-1]] = text if value.isdigit() else value + text
        (place / FILE).write_bytes(_file_of(records))

    return make


def _lines() -> Iterator[tuple[str, bytes]]:
    for name, body in (
        ("null", b"null"),
        ("a number", b"7"),
        ("a list", b"[1]"),
        ("nothing", b"{}"),
        ("deep lists", b"[" * 100000 + b"]" * 100000),
        ("deep objects", b'{"a":' * 900 + b"1" + b"}" * 900),
        ("a number of 5000 digits", b'{"a": ' + b"9" * 5000 + b"}"),
        ("NaN", b'{"a": NaN}'),
        ("1e400", b'{"a": 1e400}'),
        ("duplicate keys", b'{"a": 1, "a": 2}'),
        ("no UTF-8", b'{"a": "\xff\xfe"}'),
        ("a line of 100 MiB", b'{"a": "' + b"x" * (100 << 20) + b'"}'),
        ("3 million values", b'{"a": [' + b"{}," * 3_000_000 + b"0]}"),
    ):
        yield name, line_of(body)
    yield "a million empty lines", b"\n" * 1_000_000
    yield "zeros", bytes(4096)


def _sparse(place: Path) -> None:
    with (place / FILE).open("r+b") as file:
        file.truncate(1 << 40)


def _pipe(file: str) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        (place / file).unlink()
        os.mkfifo(place / file)

    return make


def _link(file: str, target: str) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        (place / file).unlink()
        (place / file).symlink_to(target)

    return make


def _about(data: bytes) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        (place / ABOUT).write_bytes(data)

    return make


PLACES: list[tuple[str, Callable[[Path], None]]] = [
    ("a hole of 1 TiB", _sparse),
    *((f"a pipe as {file}", _pipe(file)) for file in (FILE, ABOUT)),
    *((f"a link to {target}", _link(FILE, target)) for target in ("/dev/zero", "nowhere", "records.jsonl")),
    *((f"about: a link to {target}", _link(ABOUT, target)) for target in ("/dev/zero", "nowhere")),
    ("about: deep", _about(b"[" * 100000)),
    ("about: a long number", _about(b'{"format": ' + b"9" * 5000 + b"}")),
    ("about: a text", _about(b'{"format": "\\u001b[2J\\nofframp: error: x"}')),
    ("about: large", _about(b" " * (200 << 20))),
]
"""Name and edit of the files of the folder."""

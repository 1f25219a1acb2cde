"""JSON that would take much memory is refused before it is parsed."""

import json
import tracemalloc

import pytest

from offramp.program import checks
from offramp.program.checks import parsed_bytes, strict_json

KINDS = {
    "empty lists": lambda n: b"[" + b"[]," * (n // 3) + b"0]",
    "lists of one": lambda n: b"[" + b"[1]," * (n // 4) + b"0]",
    "objects of one": lambda n: b"[" + b'{"a":1},' * (n // 8) + b"0]",
    "names": lambda n: b"{" + b",".join(b'"%x":0' % number for number in range(n // 9)) + b"}",
    "numbers": lambda n: b"[" + b"1.5," * (n // 4) + b"0]",
    "strings": lambda n: b"[" + b",".join(b'"%x"' % number for number in range(n // 8)) + b"]",
    "a long string": lambda n: b'"' + b"a" * n + b'"',
    "a wide letter": lambda n: '"\U0001f600'.encode() + b"a" * n + b'"',
    "an escaped wide letter": lambda n: b'"\\ud83d\\ude00' + b"a" * n + b'"',
    "an accent": lambda n: '"ü'.encode() + b"a" * n + b'"',
}
"""Name -> JSON of about so many bytes."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_parsing_is_bounded_before_it_is_taken(monkeypatch, kind):
    monkeypatch.setattr(checks, "_HARMLESS_BYTES", 0)
    data = KINDS[kind](60_000)
    tracemalloc.start()
    tree = strict_json(data, most_bytes=parsed_bytes(data))
    taken_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tree == json.loads(data) and taken_bytes + len(data) <= parsed_bytes(data) + 8192
    monkeypatch.setattr(checks.json, "loads", lambda *_, **__: pytest.fail("it was parsed"))
    with pytest.raises(ValueError, match=r"may take .* of memory"):
        strict_json(data, most_bytes=parsed_bytes(data) - 1)


def test_what_is_called_harmless_is_not_counted_and_takes_little():
    worst = KINDS["empty lists"](checks._HARMLESS_BYTES)
    assert parsed_bytes(worst) < checks.MOST_PARSED_BYTES

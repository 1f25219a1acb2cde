from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.units import (
    format_duration,
    format_size,
    named_budget,
    named_duration,
    parse_count,
    parse_duration,
    parse_size,
)

SOURCES = sorted((Path(__file__).parents[1] / "src").rglob("*.py"))
SCALES = (ast.Mult, ast.Div, ast.FloorDiv, ast.RShift)
UNITS = re.compile(r"\s?([KMG]i?B|B|bytes|min|minutes|s|seconds|ms|us)\b")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("300MB", 300_000_000),
        ("0.3GB", 300_000_000),
        ("300MiB", 300 << 20),
        ("1.5 GiB", 3 << 29),
        (" 7 B ", 7),
        ("128M", 128 << 20),
        ("1.5g", 3 << 29),
        ("64Ki", 64 << 10),
        ("7b", 7),
        ("4kib", 4096),
        ("1TB", 10**12),
        (134217728, 134217728),
    ],
)
def test_sizes_as_people_write_them(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MiB",
        "-1",
        "-1MiB",
        "1e9",
        "1,5GB",
        "128 Mi B",
        "128MBs",
        "0",
        "0MiB",
        "0.0001B",
        "1.MB",
        "nan",
        "inf",
        "٣MB",
    ],
)
def test_what_is_no_size_is_refused_by_name(text):
    with pytest.raises(ValueError, match="a size must be"):
        parse_size(text)


@pytest.mark.parametrize("size", [0, -1, True, 1.5, None, b"1MB"])
def test_numbers_that_are_no_sizes_are_refused(size):
    with pytest.raises(ValueError, match="a size must be"):
        parse_size(size)


@given(st.integers(1, 1 << 60))
def test_an_integer_is_a_number_of_bytes(num_bytes):
    assert parse_size(num_bytes) == parse_size(f"{num_bytes} B") == num_bytes


@given(st.integers(1, 1 << 40) | st.floats(0.001, 1e6).map(lambda number: round(number, 3)))
def test_a_text_without_a_unit_is_refused_with_a_spelling_that_is_accepted(number):
    for parse in (parse_size, parse_duration):
        with pytest.raises(ValueError, match=r"must have a unit, got '.*': \S+\?") as refused:
            parse(f"{number:f}" if isinstance(number, float) else str(number))
        assert parse(str(refused.value).rpartition(" ")[2].rstrip("?")) > 0


@pytest.mark.parametrize(("text", "seconds"), [("40ms", 0.04), ("0.5 s", 0.5), ("500us", 5e-4), (2, 2.0), (0.25, 0.25)])
def test_durations_as_people_write_them(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@given(st.integers(1, 1 << 30), st.sampled_from(["kib", "KiB", "MIB", "gb", "TB"]))
def test_whole_sizes_are_exact_in_any_case(number, unit):
    factor = (1000 if unit[1:].lower() == "b" else 1024) ** ("kmgt".index(unit[0].lower()) + 1)
    assert parse_size(f"{number}{unit}") == number * factor


@given(st.integers(1, 1 << 50) | st.integers(1, 4 << 20))
def test_a_size_has_three_digits_and_reads_back(num_bytes):
    text = format_size(num_bytes)
    assert parse_size(text) == pytest.approx(num_bytes, rel=0.005)
    assert len(re.sub(r"\D", "", text)) >= min(3, len(str(num_bytes)))
    assert text.endswith((" MiB", " KiB", " B"))


@given(st.floats(1e-6, 1e5))
def test_a_duration_has_three_digits(seconds):
    number, unit = format_duration(seconds).split()
    assert float(number) * {"us": 1e-6, "ms": 1e-3, "s": 1, "min": 60}[unit] == pytest.approx(seconds, rel=0.005)
    assert "e" not in number


@given(st.floats(1e-6, 1e5), st.integers(1, 1 << 50))
def test_what_a_remedy_names_is_accepted_and_enough(seconds, num_bytes):
    assert seconds * 0.999999 <= parse_duration(named_duration(seconds)) <= 1.01 * seconds
    assert 0 <= parse_size(named_budget(num_bytes)) - num_bytes < 1 << 20


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (700, "700 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (12_900, "12.6 KiB"),
        (1 << 19, "512.0 KiB"),
        ((1 << 20) - 1, "1.00 MiB"),
        (128 << 20, "128.0 MiB"),
        (3 << 30, "3072.0 MiB"),
        (-(5 << 20), "-5.00 MiB"),
        (2.5, "2.5 B"),
    ],
)
def test_sizes_are_said_in_mib_and_small_ones_in_smaller_units(num_bytes, text):
    assert format_size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 us"),
        (1e-6, "1 us"),
        (0.00234, "2.34 ms"),
        (0.0123, "12.3 ms"),
        (0.99999, "1.00 s"),
        (90, "90.0 s"),
        (600, "10.0 min"),
    ],
)
def test_durations_are_said_in_the_unit_that_fits(seconds, text):
    assert format_duration(seconds) == text


def _formatted(tree: ast.AST) -> list[str]:
    """Return the f-strings that format a number with a precision or arithmetic, followed by a unit."""
    found = []
    for text in (node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)):
        for value, after in zip(text.values, text.values[1:], strict=False):
            is_computed = isinstance(value, ast.FormattedValue) and (
                value.format_spec is not None or isinstance(getattr(value.value, "op", None), SCALES)
            )
            if is_computed and isinstance(after, ast.Constant) and UNITS.match(str(after.value)):
                found.append(ast.unparse(text))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_messages_format_sizes_and_durations_by_one_formatter(path):
    assert path.name == "units.py" or _formatted(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(("count", "expected"), [(1, 1), ("12", 12), (np.int64(3), 3)])
def test_counts_are_whole_numbers_or_texts(count, expected):
    found = parse_count(count)
    assert (found, type(found)) == (expected, int)


@pytest.mark.parametrize("count", [0, -1, True, 1.0, "0", "-1", "1.5", "²", "", None])
def test_what_is_no_count_is_refused(count):
    with pytest.raises(ValueError, match="a whole number of at least 1, not "):
        parse_count(count)

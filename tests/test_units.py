from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.units import format_size, parse_count, parse_duration, parse_size


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


@given(st.integers(1 << 20, 1 << 50))
def test_what_is_formatted_reads_back_within_its_digit(num_bytes):
    assert abs(parse_size(format_size(num_bytes)) - num_bytes) <= 0.051 * (1 << 20)


def test_sizes_are_said_in_mib():
    assert format_size(128 << 20) == "128.0 MiB"
    assert format_size(1 << 19) == "0.5 MiB"


@pytest.mark.parametrize(("count", "expected"), [(1, 1), ("12", 12), (np.int64(3), 3)])
def test_counts_are_whole_numbers_or_texts(count, expected):
    found = parse_count(count)
    assert (found, type(found)) == (expected, int)


@pytest.mark.parametrize("count", [0, -1, True, 1.0, "0", "-1", "1.5", "²", "", None])
def test_what_is_no_count_is_refused(count):
    with pytest.raises(ValueError, match="a whole number of at least 1, not "):
        parse_count(count)

"""Digests of rows: equal for what a model cannot tell apart, and for copies in other files; else different."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from offramp.tasks.arrays import Record
from offramp.tasks.digests import row_digests
from offramp.tasks.examples import normalised
from offramp.tasks.images import Image

SALT, OTHER = "00112233445566778899aabbccddeeff", "f" * 32
ANY_TEXT = st.text(st.characters(codec=None), max_size=12)  # with lone surrogates, which tables may have
ROWS = st.one_of(ANY_TEXT, st.tuples(ANY_TEXT, ANY_TEXT))


def digest(item, *arguments, salt=SALT):
    (found,) = row_digests([item], salt, arguments)
    return int(found)


@given(ROWS, ROWS)
def test_texts_are_told_apart_exactly_as_the_cut_into_splits_does(one, other):
    assert (digest(one) == digest(other)) == (normalised(one) == normalised(other))


@given(st.text(st.characters(categories=["Ll"]), min_size=1, max_size=6), ANY_TEXT)
def test_spaces_and_case_do_not_matter_and_sides_of_a_pair_do(one, other):
    assert digest(one) == digest(f"  {one} ") and digest(one.upper()) == digest(one.upper().casefold())
    assume(normalised(other) not in ("", normalised(one)))
    assert len({digest((one, other)), digest((other, one)), digest(one), digest(f"{one} {other}")}) == 4


@pytest.mark.parametrize("dtypes", [("float32", "float64", "float16"), ("int32", "int64", "uint8")])
def test_numbers_are_compared_and_not_their_dtypes_or_names(dtypes):
    numbers = np.array([[0, 1, 2], [3, 4, 5]])
    found = {digest(Record.of(numbers.astype(dtype))) for dtype in dtypes}
    found |= {digest(Record.of({"x": torch.from_numpy(numbers.astype(dtypes[0]))}))}
    assert len(found) == 1
    changed = numbers.copy()
    changed[1, 2] += 1
    others = [changed, numbers.T, numbers.reshape(-1), numbers[None], numbers[:1]]
    assert not found & {digest(Record.of(other.astype(dtypes[0]))) for other in others}


def test_zero_has_no_sign():
    assert digest(Record.of(np.array([0.0]))) == digest(Record.of(np.array([-0.0])))


def test_arrays_that_training_did_not_have_do_not_count():
    x, y = np.arange(3.0), np.arange(4.0)
    trained = digest(Record.of({"a": x, "b": y}), "a", "b")
    assert digest(Record.of({"a": x, "b": y, "number": np.array(7)}), "a", "b") == trained
    assert digest(Record.of((y, x)), "a", "b") == trained, "positional arguments have other names"
    assert digest(Record.of({"a": x, "number": np.array(7)}), "a", "b") != trained


def test_copies_of_an_image_are_one_row(tmp_path):
    for name, data in (("a.png", b"one"), ("b.png", b"one"), ("c.png", b"two")):
        (tmp_path / name).write_bytes(data)
    one, copy, other = (digest(Image(tmp_path / name)) for name in ("a.png", "b.png", "c.png"))
    assert one == copy != other


def test_another_salt_gives_other_digests():
    rows = ["a rose", ("a", "rose"), Record.of(np.zeros(2))]
    assert not set(row_digests(rows, SALT).tolist()) & set(row_digests(rows, OTHER).tolist())
    assert row_digests([], SALT).dtype == np.uint64

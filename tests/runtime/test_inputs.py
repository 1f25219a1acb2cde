"""Inputs are checked before they reach a backend, and look-ups have the shape that the program gives them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from offramp.errors import StoreError
from offramp.program.inputs import Batch
from offramp.program.program import BATCH, TOKENS, Input, LookUp, Program, Value
from offramp.runtime.inputs import InputReader
from tests.runtime.driver import encode
from tests.toy import HIDDEN, MAX_LENGTH, Toy


@pytest.fixture
def store(shelf):
    with shelf.open(Toy()) as store:
        yield store


class Fake:
    """A store whose program takes these inputs and looks up nothing."""

    path = "store"

    def __init__(self, inputs, example=(2, 1)):
        self.program, self.manifest = Program(inputs, example=example), self

    def tensors(self):
        return {}


def batch_of(**arrays):
    num_rows = len(next(iter(arrays.values())))
    return Batch(arrays, num_rows, 1, np.ones(num_rows, np.int64))


def test_look_ups_are_rows_of_the_table_for_each_token(store):
    reader, batch = InputReader(store), encode(["abc", "d"])
    values, num_bytes = reader.read(batch)
    assert set(values) == {*store.program.inputs, *store.program.lookups}
    for name, lookup in store.program.lookups.items():
        shard, table = store.manifest.tensors()[lookup.table]
        rows_TH, _ = store.gather(shard.name, table.role, batch.arrays[lookup.input].reshape(-1))
        assert values[name].shape == (6, HIDDEN)
        assert np.array_equal(values[name], rows_TH)
    assert num_bytes > 0
    assert reader.row_bytes == {"word": 4 * HIDDEN, "position": 4 * HIDDEN, "type": 4 * HIDDEN}


def test_other_look_ups_have_the_axes_of_their_ids(store):
    shaped = LookUp("rows.word", "input_ids", Value("float32", (BATCH, TOKENS, HIDDEN)))
    reader = InputReader(store)
    reader.program = replace(store.program, lookups={"word": shaped})
    values, _ = reader.read(encode(["abc", "d"]))
    assert values["word"].shape == (2, 3, HIDDEN)


def test_inputs_of_texts_that_the_program_does_not_read_are_left_out(store):
    reader, batch = InputReader(store), encode(["abc"])
    reader.program = replace(store.program, inputs={"input_ids": Input("int64", (BATCH, TOKENS))}, lookups={})
    values, num_bytes = reader.read(batch)
    assert set(values) == {"input_ids"} and num_bytes == 0
    assert np.array_equal(reader.mask(batch), batch.arrays["attention_mask"])


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: {**arrays, "pixels": arrays["input_ids"]},
        lambda arrays: {name: array for name, array in arrays.items() if name != "position_ids"},
        lambda arrays: {**arrays, "input_ids": arrays["input_ids"].astype(np.int32)},
        lambda arrays: {**arrays, "token_type_ids": arrays["input_ids"][0]},
    ],
    ids=["another name", "a name that is missing", "another dtype", "another rank"],
)
def test_other_inputs_are_refused(store, change):
    batch = encode(["abc"])
    with pytest.raises(ValueError, match="expected inputs"):
        InputReader(store).read(replace(batch, arrays=change(batch.arrays)))


def test_a_batch_of_texts_without_a_mask_has_no_padding(store):
    batch = encode(["abc", "d"])
    assert InputReader(store).mask(batch).tolist() == [[1, 1, 1], [1, 0, 0]]
    arrays = {name: array for name, array in batch.arrays.items() if name != "attention_mask"}
    assert InputReader(store).mask(replace(batch, arrays=arrays)).tolist() == [[1] * 3] * 2


def test_a_blank_batch_is_as_large_as_asked_and_can_be_read(store):
    reader = InputReader(store)
    blank = reader.blank(3, MAX_LENGTH)
    assert (blank.num_rows, blank.length, blank.lengths_B.tolist()) == (3, MAX_LENGTH, [MAX_LENGTH] * 3)
    values, _ = reader.read(blank)
    assert values["word"].shape == (3 * MAX_LENGTH, HIDDEN)
    assert InputReader(Fake({"x": Input("float32", (BATCH, 4))})).blank(3, 1) is None


@pytest.mark.parametrize("num_rows", [1, 2, 7])
def test_any_number_of_rows_is_taken(num_rows):
    reader = InputReader(Fake({"x": Input("float32", (BATCH, 4), (2, None))}))
    assert reader.read(batch_of(x=np.zeros((num_rows, 4), np.float32)))[1] == 0
    assert reader.mask(batch_of(x=np.zeros((num_rows, 4), np.float32))) is None


@pytest.mark.parametrize("largest", [(), (2, None)])
def test_a_size_in_which_the_examples_do_not_differ_is_fixed(largest):
    reader = InputReader(Fake({"x": Input("float32", (BATCH, 4), largest)}))
    with pytest.raises(StoreError, match=r"x is \(1, 5\), and the module was divided for \(2, 4\)"):
        reader.read(batch_of(x=np.zeros((1, 5), np.float32)))


def test_a_size_in_which_they_differ_is_bounded_by_the_largest():
    reader = InputReader(Fake({"x": Input("float32", (BATCH, 4), (2, 6))}))
    for size in (1, 5, 6):
        reader.read(batch_of(x=np.zeros((1, size), np.float32)))
    with pytest.raises(StoreError, match="larger than the examples"):
        reader.read(batch_of(x=np.zeros((1, 7), np.float32)))


def test_texts_of_one_length_alone_are_refused_at_another(store):
    reader = InputReader(store)
    inputs = {name: replace(each, largest=(2, None)) for name, each in store.program.inputs.items()}
    reader.program = replace(store.program, inputs=inputs, example=(2, 3))
    reader.read(encode(["abc"]))
    with pytest.raises(StoreError, match="divide it with inputs of several such sizes as examples"):
        reader.read(encode(["abcd"]))


def test_texts_of_several_lengths_are_bounded_by_the_model_alone(store):
    reader = InputReader(store)
    inputs = {name: replace(each, largest=(2, 3)) for name, each in store.program.inputs.items()}
    reader.program = replace(store.program, inputs=inputs, example=(2, 2))
    assert reader.read(encode(["a" * MAX_LENGTH]))[0]["input_ids"].shape == (1, MAX_LENGTH)

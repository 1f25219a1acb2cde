"""Programs of captured graphs: inputs from examples, and pieces of a run as stages."""

import pytest

from offramp.program.captured import Piece, captured_inputs, captured_program
from offramp.program.consistency import check_program
from offramp.program.program import Input, Output, Program, Value

IDS = Value("int64", (2, 16))


def test_sizes_are_fixed_where_examples_agree():
    pixels = [{"x": Value("float32", shape)} for shape in ((2, 3, 8, 8), (1, 3, 8, 6), (1, 3, 8, 9))]
    inputs, example = captured_inputs(pixels, of_texts=False)
    assert inputs == {"x": Input("float32", ("batch", 3, 8, 8), (2, None, None, 9))} and example == (2, 1)


def test_texts_have_tokens():
    inputs, example = captured_inputs([{"input_ids": IDS}, {"input_ids": Value("int64", (1, 9))}], of_texts=True)
    assert inputs["input_ids"] == Input("int64", ("batch", "tokens"), (2, 16)) and example == (2, 16)


def test_a_length_that_no_example_varies_is_fixed():
    inputs, _ = captured_inputs([{"input_ids": IDS}], of_texts=True)
    assert inputs["input_ids"] == Input("int64", ("batch", "tokens"), (None, None))


def test_inputs_without_axes_and_examples_that_lack_an_input():
    examples = [{"x": Value("float32", ()), "y": IDS}, {"y": Value("int64", (2, 16, 1))}, {}]
    inputs, example = captured_inputs(examples, of_texts=False)
    assert inputs == {"x": Input("float32", (), ()), "y": Input("int64", ("batch", 16), (None, None))}
    assert example == (2, 1)


def pieces(count):
    names = ["x", *(f"h{i}" for i in range(count))]
    return [Piece("graph", (names[i],), (names[i + 1],), (f"w{i}",), ("c",), (f"s{i}",)) for i in range(count)]


@pytest.mark.parametrize(("exits", "sizes"), [((), [5]), ((2,), [2, 3]), ((1, 2, 4), [1, 1, 2, 1])])
def test_pieces_between_exits_are_layers(exits, sizes):
    hidden = Value("float32", ("batch", 8))
    values = {f"h{i}": hidden for i in range(5)}
    bare = Program({"x": Input("float32", ("batch", 8))}, output=Output("", "multi_label_classification", 8))
    program = captured_program(bare, pieces(5), values, exits, {}, "h4")
    check_program(program)
    assert [len(layer.steps) for layer in program.layers] == sizes
    assert [layer.exit for layer in program.layers] == [*(f"h{i - 1}" for i in exits), None]
    assert program.output == Output("h4", "multi_label_classification", 8) and len(list(program.steps())) == 5
    step = next(program.steps())
    assert (step.reads, step.writes) == ({"r0": "x"}, {"h0": hidden})
    assert (step.weights, step.constants, step.shards) == ({"w0": "w0"}, {"c0": "c"}, ("s0",))

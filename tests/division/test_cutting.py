"""Cutting an exported graph where stages begin: hand-made graphs of numbers, run by an interpreter of twenty lines."""

import json
from dataclasses import replace
from operator import add, mul

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.division import cutting
from offramp.division.cutting import Graph, Node, cut, has_hidden
from offramp.errors import StageError
from offramp.program.program import Call, Input, LookUp, Module, Output, Part, Program, Texts, Value, can_carry_exit
from tests.selection import examples

OPERATIONS = {
    "aten.add": add,
    "aten.mul": mul,
    "aten.scale": mul,
    "size": lambda value: value % 7,
    "double": lambda n: 2 * n,
}
"""The last two give numbers, and no tensors."""
WIDE = Value("float32", (2, 5, 4))
ROWS = Value("float32", ("batch", 5, 4))
"""The same, for any number of rows."""


def node(name, target, *args, module=None):
    calls = frozenset([Call(module, 1)] if module else [])
    return Node(
        name,
        target,
        [{"v": arg} if isinstance(arg, str) else arg for arg in args],
        {},
        calls,
        target in ("size", "double"),
    )


def graph_of(nodes, outputs, weights=("w1", "w2"), inputs=("x",), constants=("c1",), shapes=None):
    if shapes is None:
        shapes = {}
    names = [*inputs, *weights, *constants, *(node.name for node in nodes if not node.is_number)]
    values = {
        name: Value("float32", shapes.get(name, (4,) if name in (*weights, *constants) else WIDE.axes))
        for name in names
    }
    flowing = {name: 0 for name in names if name not in (*weights, *constants)}
    dynamic = dict.fromkeys(flowing, (0, 1))
    names_of = {name: f"layer.{name}" for name in weights}
    return Graph(
        tuple(nodes),
        tuple(inputs),
        names_of,
        {name: f"own.{name}" for name in constants},
        tuple(outputs),
        values,
        flowing,
        dynamic,
        {},
    )


def program_of(starts, hidden=None):
    first = Part((), None, (), None)
    later = [Part((), Call(module, 1), (WIDE, Value("int64", (2,))), hidden) for module in starts]
    return Program({}, module=Module("a.Toy", "0" * 64, {}, (first, *later), {}, (), (), (), ()))


def run_piece(data, given):
    tree = json.loads(data)
    names = [f"{letter}{i}" for letter in "rwc" for i in range(tree["inputs"][letter])]
    there = dict(zip(names, given, strict=True))
    for name, target, args, _ in tree["nodes"]:
        there[name] = OPERATIONS[target](*(there[arg["v"]] if isinstance(arg, dict) else arg for arg in args))
    return [there[name] for name in tree["outputs"]]


def run_pieces(found, inputs, tensors):
    there = dict(inputs)
    for piece in found.pieces:
        given = [there[name] for name in piece.reads]
        given += [tensors[name] for name in (*piece.weights, *piece.constants)]
        there.update(zip(piece.writes, run_piece(found.graphs[piece.kernel], given), strict=True))
    return [there[name] for name in found.outputs]


def run_whole(graph, inputs, tensors):
    there = {**inputs, **{name: tensors[stored] for name, stored in {**graph.weights, **graph.constants}.items()}}
    for each in graph.nodes:
        there[each.name] = OPERATIONS[each.target](
            *(there[arg["v"]] if isinstance(arg, dict) else arg for arg in each.args)
        )
    return [there[name] for name in graph.outputs]


TWO_LAYERS = (
    node("n", "size", "x"),
    node("a", "aten.add", "x", "w1", module="one"),
    node("b", "aten.scale", "a", "n", module="one"),
    node("d", "aten.add", "b", "w2", module="two"),
    node("e", "aten.scale", "d", "n", module="two"),
)
NUMBERS = {"layer.w1": 3, "layer.w2": 5, "own.c1": 11}


def test_pieces_that_differ_in_their_weights_alone_are_of_one_kind():
    nodes = [node("a", "aten.add", "x", "w1", module="one"), node("b", "aten.add", "a", "w2", module="two")]
    found = cut(graph_of(nodes, ["b"]), program_of(["two"]))
    first, second = found.pieces
    assert first.kernel == second.kernel and len(found.graphs) == 1
    assert (first.reads, first.writes, first.weights) == (("x",), ("a",), ("layer.w1",))
    assert (second.reads, second.writes, second.weights) == (("a",), ("b",), ("layer.w2",))
    assert found.outputs == ("b",) and found.values == dict.fromkeys("abx", ROWS)


@pytest.mark.parametrize("shapes", [{"w2": (8,)}, {"a": (2, 5, 8)}], ids=["a weight", "what flows"])
def test_pieces_with_inputs_of_another_shape_are_of_another_kind(shapes):
    """ONNX Runtime has the shapes of inputs in its graphs."""
    nodes = [node("a", "aten.add", "x", "w1", module="one"), node("b", "aten.add", "a", "w2", module="two")]
    assert len(cut(graph_of(nodes, ["b"], shapes=shapes), program_of(["two"])).graphs) == 2


def test_extents_that_change_from_call_to_call_make_no_other_kind():
    nodes = [node("a", "aten.add", "x", "w1", module="one"), node("b", "aten.add", "a", "w2", module="two")]
    assert len(cut(graph_of(nodes, ["b"], shapes={"a": (9, 7, 4)}), program_of(["two"])).graphs) == 1


def test_numbers_are_made_anew_in_each_piece_and_do_not_flow():
    graph = graph_of(TWO_LAYERS, ["e"])
    found = cut(graph, program_of(["two"]))
    second = found.pieces[1]
    assert set(second.reads) == {"b", "x"}, "the number of x is what the second piece reads it for"
    assert all("n" not in (*piece.reads, *piece.writes) for piece in found.pieces)
    assert [target for _, target, *_ in json.loads(found.graphs[second.kernel])["nodes"]] == [
        "aten.add",
        "size",
        "aten.scale",
    ]
    assert run_pieces(found, {"x": 10}, NUMBERS) == run_whole(graph, {"x": 10}, NUMBERS)


def test_what_a_later_piece_or_the_answer_needs_is_written_and_nothing_else():
    nodes = [
        node("a", "aten.add", "x", "w1", module="one"),
        node("b", "aten.mul", "a", "a", module="one"),
        node("d", "aten.add", "b", "w2", module="two"),
        node("e", "aten.add", "d", "a", module="three"),
    ]
    pieces = cut(graph_of(nodes, ["e", "b"]), program_of(["two", "three"])).pieces
    assert [piece.writes for piece in pieces] == [("a", "b"), ("d",), ("e",)]
    assert [piece.reads for piece in pieces] == [("x",), ("b",), ("d", "a")]


def test_constants_are_told_from_weights():
    nodes = [node("a", "aten.add", "x", "c1", module="one"), node("b", "aten.add", "a", "w1", module="two")]
    first, second = cut(graph_of(nodes, ["b"]), program_of(["two"])).pieces
    assert (first.weights, first.constants) == ((), ("own.c1",))
    assert (second.weights, second.constants) == (("layer.w1",), ())


def test_the_hidden_state_is_read_first():
    shapes = {"mask": (2, 1, 1, 5)}
    nodes = [
        node("a", "aten.add", "x", "w1", module="one"),
        node("b", "aten.add", "mask", "a", module="two"),
    ]
    graph = graph_of(nodes, ["b"], inputs=("x", "mask"), shapes=shapes)
    program = program_of(["two"], hidden=0)
    found = cut(graph, program)
    assert found.pieces[1].reads == ("a", "mask")
    assert has_hidden(found, graph, program, 1)
    assert cut(graph, program_of(["two"])).pieces[1].reads == ("mask", "a")
    assert not has_hidden(found, graph, program_of(["two"]), 1)


def test_of_two_values_that_could_be_the_hidden_state_none_is():
    nodes = [
        node("a", "aten.add", "x", "w1", module="one"),
        node("b", "aten.add", "x", "w2", module="one"),
        node("d", "aten.add", "b", "a", module="two"),
    ]
    program = program_of(["two"], hidden=0)
    assert cut(graph_of(nodes, ["d"]), program).pieces[1].reads == ("b", "a")


@pytest.mark.parametrize("starts", [["three"], ["two", "one"]], ids=["no operation", "before the stage before it"])
def test_a_stage_that_begins_nowhere_is_refused(starts):
    with pytest.raises(StageError, match=f"{starts[-1]}.*--method eager"):
        cut(graph_of(TWO_LAYERS, ["e"]), program_of(starts))


def test_what_flows_and_is_no_tensor_is_refused():
    nodes = [node("parts", "aten.chunk", "x", module="one"), node("b", "getitem", "parts", 0, module="two")]
    graph = graph_of(nodes, ["b"])
    del graph.values["parts"]
    with pytest.raises(StageError, match="parts flows between stages"):
        cut(graph, program_of(["two"]))


@st.composite
def graphs(draw):
    """Chains of operations on anything before them, in as many modules as there are stages."""
    num_nodes, num_stages = draw(st.integers(4, 14)), draw(st.integers(1, 4))
    cuts = sorted(
        draw(st.lists(st.integers(1, num_nodes - 1), min_size=num_stages - 1, max_size=num_stages - 1, unique=True))
    )
    tensors, numbers, nodes = ["x", "w1", "w2", "c1"], [], []
    for index in range(num_nodes):
        module = f"m{sum(index >= start for start in cuts)}"
        for name in draw(st.lists(st.sampled_from(["size", "double"]), max_size=2)):
            before = numbers if name == "double" else tensors
            if before:
                nodes.append(node(f"k{len(nodes)}", name, draw(st.sampled_from(before)), module=module))
                numbers.append(nodes[-1].name)
        target = draw(st.sampled_from(["aten.add", "aten.mul", *(["aten.scale"] if numbers else [])]))
        second = draw(st.sampled_from(numbers if target == "aten.scale" else tensors))
        nodes.append(node(f"t{index}", target, draw(st.sampled_from(tensors)), second, module=module))
        tensors.append(nodes[-1].name)
    outputs = draw(st.lists(st.sampled_from([f"t{i}" for i in range(num_nodes)]), min_size=1, max_size=3, unique=True))
    return graph_of(nodes, outputs), program_of([f"m{i}" for i in range(1, num_stages)])


@settings(deadline=None, max_examples=examples(100))
@given(graphs(), st.integers(-50, 50))
def test_the_pieces_one_after_the_other_are_the_whole(made, x):
    graph, program = made
    found = cut(graph, program)
    assert len(found.pieces) == len(program.module.parts)
    assert set(found.graphs) == {piece.kernel for piece in found.pieces}
    assert run_pieces(found, {"x": x}, NUMBERS) == run_whole(graph, {"x": x}, NUMBERS)


def looked_up(index, tables=frozenset({"layer.w1"}), inputs=("x",)):
    """The pieces of a graph that looks up rows of `w1`."""
    nodes = [
        node("rows", "aten.embedding.default", "w1", index, module="one"),
        node("b", "aten.add", "rows", "w2", module="two"),
    ]
    program = program_of(["two"])
    program = replace(program, inputs={name: Input("int64", ("batch", 5)) for name in inputs})
    return cut(graph_of(nodes, ["b"], inputs=inputs), program, tables)


def test_rows_that_an_input_looks_up_flow_in_and_the_table_does_not():
    found = looked_up("x")
    assert found.lookups == {"rows": LookUp("layer.w1", "x", ROWS)}
    assert found.pieces[0].weights == () and found.pieces[1].reads == ("rows",)
    assert found.values["rows"] == ROWS
    assert not any(b"embedding" in data for data in found.graphs.values())


@pytest.mark.parametrize("case", [{"index": "c1"}, {"index": "x", "tables": set()}])
def test_other_look_ups_stay_in_the_graph(case):
    """By what is no input, and of what is no table."""
    found = looked_up(**case)
    assert not found.lookups and found.pieces[0].weights == ("layer.w1",)
    assert any(b"embedding" in data for data in found.graphs.values())


def test_an_exit_on_texts_needs_a_place_for_each_token():
    nodes = [node("a", "aten.add", "x", "w1", module="one"), node("b", "aten.add", "a", "w2", module="two")]
    for length, stands in ((5, True), (6, False)):
        program = program_of(["two"], hidden=0)
        texts = Texts(10, 8, 0, 0)
        program = replace(program, texts=texts, example=(2, length))
        graph = graph_of(nodes, ["b"])
        assert has_hidden(cut(graph, program), graph, program, 1) is stands


@pytest.mark.parametrize(
    ("hidden", "stands"),
    [
        (WIDE, True),
        (Value("int64", (2, 5, 4)), False),
        (Value("bfloat16", (2, 5, 4)), False),
        (Value("float32", (2,)), False),
        (Value("float32", ("batch", "tokens")), False),
    ],
)
def test_an_exit_needs_what_a_head_can_read(hidden, stands):
    """Ids flow alone too, before they are looked up."""
    assert can_carry_exit(hidden) is stands


def test_an_output_that_is_no_row_of_logits_becomes_no_graph():
    graph = graph_of([node("a", "aten.add", "x", "w1", module="one")], ["a"], shapes={"a": (2, 5)})
    for output in (Output("", None, 0), Output("", "regression", 5)):
        assert cut(graph, replace(program_of([]), output=output)).outputs == ("a",)
    with pytest.raises(StageError, match=r"the first output has the axes .*, not 6 labels - .*--method eager"):
        cut(graph, replace(program_of([]), output=Output("", "regression", 6)))


def test_more_stages_than_a_program_has_become_no_graphs(monkeypatch):
    monkeypatch.setattr(cutting, "MAX_STEPS", 1)
    with pytest.raises(StageError, match=r"2 stages, at most 1 become graphs - .*--method eager"):
        cut(graph_of(list(TWO_LAYERS), ["e"]), program_of(["two"]))


def test_an_input_that_no_array_can_be_becomes_no_graph():
    graph = graph_of([node("a", "aten.add", "x", "w1", module="one")], ["a"])
    narrow = replace(graph, values={**graph.values, "x": Value("bfloat16", WIDE.axes)})
    with pytest.raises(StageError, match=r"the input 'x' is bfloat16, which NumPy does not have - .*--method eager"):
        cut(narrow, program_of([]))


def test_a_value_between_stages_that_no_array_can_be_becomes_no_graph():
    graph = graph_of(list(TWO_LAYERS), ["e"])
    narrow = replace(graph, values={**graph.values, "b": Value("bfloat16", WIDE.axes)})
    with pytest.raises(
        StageError, match=r"the value between stages 'b' is bfloat16, which NumPy does not have - .*--meth"
    ):
        cut(narrow, program_of(["two"]))
    inner = replace(graph, values={**graph.values, "a": Value("bfloat16", WIDE.axes)})
    assert cut(inner, program_of(["two"])).outputs == ("e",), "what stays within a stage may be anything"

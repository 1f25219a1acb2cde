"""The graphs of a module's stages in a manifest of format 2: what a stranger may write there, and what is refused."""

import copy
import dataclasses
import re

import pytest

from offramp.errors import DamagedError
from offramp.program.program import Value
from offramp.store.manifest import File, dumps, seal
from offramp.store.parsing import loads
from tests.store import old_formats
from tests.store.old_formats import value
from tests.store.small import refused, reseal, tree_of

SHAPE = (2, 4, 8)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Two stages of one kind, an exit between them."""
    stages = [
        {"kind": "graph-a", "reads": ["x"], "writes": ["h"], "weights": ["first"], "constants": ["own"]},
        {"kind": "graph-a", "reads": ["h"], "writes": ["y"], "weights": ["second"], "constants": ["own"]},
    ]
    path = old_formats.write_module(
        tmp_path_factory.mktemp("module") / "store",
        {name: {name: (2, 8)} for name in ("first", "second", "own")},
        [["first"], ["second"]],
        inputs=(("x", list(SHAPE), "float32"),),
        flows=[old_formats.flow(), old_formats.flow("block.1", 1, [value(SHAPE)], 0)],
        aliases={"second": ["alias"]},
        buffers=["own"],
        problem="single_label_classification",
        labels=["no", "yes"],
        segments={
            "stages": stages, "outputs": ["y"], "values": {"x": value(SHAPE), "h": value(SHAPE), "y": value((2, 2))},
            "batch": {"x": 0, "h": 0, "y": 0}, "exits": [1], "look_ups": {},
        },
    )  # fmt: skip
    tree = tree_of(path)
    tree["graphs"] = {"graph-a": {"file": "graphs/graph-a.onnx", "bytes": 8, "sha256": "0" * 64, "opset": 18, "ir": 8}}
    reseal(path, tree)
    return path


def look_ups(value="h", table="first", input="x"):
    return {value: {"table": table, "input": input}}


def segments(tree):
    return tree["program"]["segments"]


def test_stretches_between_exits_become_layers(path):
    manifest = loads((path / "offramp.json").read_bytes())
    program, rows = manifest.program, Value("float32", ("batch", 4, 8))
    assert [(stage.name, stage.role, stage.exit) for stage in program.stages] == [
        ("inputs", "begin", None), ("layer.0", "layer", "h"), ("layer.1", "layer", None), ("answer", "end", None),
    ]  # fmt: skip
    first, second = program.steps()
    assert (first.kernel, first.reads, first.writes) == ("graph-a", {"r0": "x"}, {"h": rows})
    assert (first.weights, first.constants, first.shards) == ({"w0": "first"}, {"c0": "own"}, ("first",))
    assert (second.reads, second.weights, second.shards) == ({"r0": "h"}, {"w0": "second"}, ("second",))
    assert {name: kernel.template for name, kernel in program.kernels.items()} == {
        "graph-a": "captured", "exit": "pooled-linear",
    }  # fmt: skip
    assert program.output.value == "y" and program.output.num_labels == 2 and program.example == (2, 1)
    assert manifest.inline_labels == ("no", "yes") and program.inputs["x"].axes == ("batch", 4, 8)


def test_it_is_written_again_as_format_3_with_its_labels_in_a_file(path):
    manifest = loads((path / "offramp.json").read_bytes())
    with pytest.raises(ValueError, match="labels"):
        dumps(manifest)
    moved = dataclasses.replace(manifest, inline_labels=(), labels=File("labels.json", 12, "0" * 64))
    assert loads(dumps(moved)) == moved


ATTACKS = {
    "a value before it is there": (
        lambda s: s["stages"][0].update(reads=["h"]), r"stages\[1\].steps\[0\] reads 'h' before it is written"),
    "a value of its own": (lambda s: s["stages"][1].update(reads=["y"]), r"exit: 'y' is not written by then"),
    "a value that is not listed": (lambda s: s["stages"][1].update(reads=["z"]), "names the value 'z'"),
    "an answer that is not listed": (lambda s: s.update(outputs=["z"]), "names the value 'z'"),
    "no answer": (lambda s: s.update(outputs=[]), "outputs"),
    "a batch of no value": (lambda s: s["batch"].update(z=0), "names the value 'z'"),
    "a batch extent too large": (lambda s: s["batch"].update(h=3), "'h' has no axis 3"),
    "a negative batch extent": (lambda s: s["batch"].update(h=-1), "must be an integer"),
    "an exit out of range": (lambda s: s.update(exits=[2]), "exits must be stages in order"),
    "an exit before all": (lambda s: s.update(exits=[0]), "must be an integer"),
    "an exit twice": (lambda s: s.update(exits=[1, 1]), "exits must be stages in order"),
    "an exit that is no number": (lambda s: s.update(exits=[True]), "must be an integer"),
    "an exit where nothing flows": (lambda s: s["stages"][1].update(reads=[]), "reads no value"),
    "an exit on a vector of nothing": (lambda s: s["values"]["h"].update(shape=[2]), "no hidden state"),
    "an exit on whole numbers": (lambda s: s["values"]["h"].update(dtype="int64"), "no hidden state"),
    "a value of no dtype": (lambda s: s["values"]["h"].update(dtype=""), r"writes\.h\.dtype must be"),
    "a value of an unknown dtype": (lambda s: s["values"]["y"].update(dtype="float31"), r"writes\.y\.dtype must be"),
    "weights that are not listed": (lambda s: s["stages"][0].update(weights=["z"]), "takes the tensor 'z'"),
    "constants that are not listed": (lambda s: s["stages"][0].update(constants=["z"]), "takes the tensor 'z'"),
    "another name of a weight": (lambda s: s["stages"][1].update(weights=["alias"]), "takes the tensor 'alias'"),
    "weights of another stage": (
        lambda s: s["stages"][0].update(weights=["second"]), "takes 'second', which is not in its shards"),
    "a kind without graph": (lambda s: s["stages"][0].update(kind="graph-b"), "have no graph"),
    "a kind that is no name": (lambda s: s["stages"][0].update(kind="../../x"), "kind must be a string like"),
    "a stage too few": (lambda s: s["stages"].pop(), "."),
    "a rank too large": (lambda s: s["values"]["h"].update(shape=[1] * 65), "at most 32"),
    "rows of no value": (lambda s: s.update(look_ups=look_ups(value="z")), "names the value 'z'"),
    "rows looked up by numbers": (lambda s: s.update(look_ups=look_ups()), "'h' is looked up by 'x', no input of ids"),
    "rows that are another value": (
        lambda s: s.update(look_ups=look_ups(input="x")), "no input of ids|is another value"),
    "rows looked up by nothing": (lambda s: s.update(look_ups=look_ups(input="z")), "by 'z', no input of ids"),
    "an unknown key": (lambda s: s.update(code="x"), "unknown keys"),
    "a missing key": (lambda s: s.pop("batch"), "lacks"),
    "a list for an object": (lambda s: s.update(values=[]), "must be an object"),
}  # fmt: skip


@pytest.mark.parametrize(("table", "told"), [("first", "of whose shard no rows are gathered"), ("z", "the tensor 'z'")])
def test_rows_are_looked_up_in_tables_alone(path, table, told):
    tree = copy.deepcopy(tree_of(path))
    tree["program"]["inputs"]["x"]["dtype"] = "int64"
    segments(tree)["values"]["rows"] = {"dtype": "float32", "shape": [2, 8, 8]}
    segments(tree).update(look_ups=look_ups("rows", table))
    assert told in refused(DamagedError, lambda: loads(seal(tree)))


@pytest.mark.parametrize("name", ATTACKS)
def test_what_makes_no_sense_is_refused(path, name):
    spoil, said = ATTACKS[name]
    tree = copy.deepcopy(tree_of(path))
    spoil(segments(tree))
    assert re.search(said, refused(DamagedError, lambda: loads(seal(tree))))


@pytest.mark.parametrize("dtype", ["", "y", "object", "float8_e5m2", "bfloat16", "O", "V4", "datetime64[s]"])
def test_inputs_of_graphs_have_dtypes_of_arrays(path, dtype):
    tree = tree_of(path)
    tree["program"]["inputs"]["x"]["dtype"] = dtype
    refused(DamagedError, lambda: loads(seal(tree)), "program.inputs.x.dtype must be one of")


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "bool", "complex64"])
def test_inputs_of_other_arrays_are_read(path, dtype):
    tree = tree_of(path)
    tree["program"]["inputs"]["x"]["dtype"] = dtype
    assert loads(seal(tree)).program.inputs["x"].dtype == dtype

"""The graphs of a module's stages in a manifest: what a stranger may write there, and what is refused."""

import copy
import re

import pytest

from offramp.errors import DamagedError
from offramp.program.program import Call, Flow, Program, Segment, Segments, Value
from offramp.store import StoreWriter
from offramp.store import manifest as m
from offramp.store.manifest import dumps, seal
from offramp.store.parsing import loads
from tests.store.small import FINGERPRINT, refused, tree_of

HIDDEN = Value("float32", (2, 4, 8))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Two stages of one kind, an exit between them."""
    folder = tmp_path_factory.mktemp("module") / "store"
    flows = (Flow(None, (), None), Flow(Call("block.1", 1), (HIDDEN,), 0))
    segments = Segments(
        (Segment("graph-a", ("x",), ("h",), ("first",), ("own",)),
         Segment("graph-a", ("h",), ("y",), ("second",), ("own",))),
        ("y",), {"x": HIDDEN, "h": HIDDEN, "y": HIDDEN}, {"x": 0, "h": 0, "y": 0}, (1,),
    )  # fmt: skip
    with StoreWriter(folder, FINGERPRINT) as writer:
        shards = {}
        for name in ("first", "second", "own"):
            shards[name] = writer.add_shard(name, [(name, name, "F32", (2, 8))], lambda _: [bytes(64)])
        stages = tuple(
            m.Stage(f"00{i}", "layer", (m.Step("module", (name,)),)) for i, name in enumerate(("first", "second"))
        )
        file = writer.add_file("graphs/graph-a.onnx", b"no graph")
        program = Program(
            "a.Module", FINGERPRINT, {}, {"x": HIDDEN}, flows, {"second": ("alias",)}, ("own",), (), (), (), 4096,
            "single_label_classification", ("no", "yes"), segments,
        )  # fmt: skip
        graphs = {"graph-a": m.Graph(file.file, file.bytes, file.sha256, 18, 8)}
        source = m.Source(FINGERPRINT, "Module", "module", "export")
        return writer.finish(m.ModuleManifest(source, program, stages, shards, graphs, ()))


def look_ups(value="h", table="first", input="x"):
    return {value: {"table": table, "input": input}}


def segments(tree):
    return tree["program"]["segments"]


def test_write_read_write_gives_the_same_bytes(path):
    data = (path / "offramp.json").read_bytes()
    found = loads(data)
    assert dumps(found) == data
    assert found.program.segments.exits == (1,)


ATTACKS = {
    "a value before it is there": (
        lambda s: s["stages"][0].update(reads=["h"]), r"stages\[0\] reads 'h' before it is there"),
    "a value of its own": (lambda s: s["stages"][1].update(reads=["y"]), r"reads 'y' before it is there"),
    "a value that is not listed": (lambda s: s["stages"][1].update(reads=["z"]), "names the value 'z'"),
    "an answer that is not listed": (lambda s: s.update(outputs=["z"]), "names the value 'z'"),
    "no answer": (lambda s: s.update(outputs=[]), "outputs"),
    "a batch of no value": (lambda s: s["batch"].update(z=0), "names the value 'z'"),
    "a batch extent too large": (lambda s: s["batch"].update(h=3), "'h' has no extent 3"),
    "a negative batch extent": (lambda s: s["batch"].update(h=-1), "must be an integer"),
    "an exit out of range": (lambda s: s.update(exits=[2]), "exits must be stages in order"),
    "an exit before all": (lambda s: s.update(exits=[0]), "must be an integer"),
    "an exit twice": (lambda s: s.update(exits=[1, 1]), "exits must be stages in order"),
    "an exit that is no number": (lambda s: s.update(exits=[True]), "must be an integer"),
    "an exit where nothing flows": (lambda s: s["stages"][1].update(reads=[]), "reads no value"),
    "an exit on a vector of nothing": (lambda s: s["values"]["h"].update(shape=[2]), "no hidden state"),
    "an exit on whole numbers": (lambda s: s["values"]["h"].update(dtype="int64"), "no hidden state"),
    "weights that are not listed": (lambda s: s["stages"][0].update(weights=["z"]), "takes the tensor 'z'"),
    "constants that are not listed": (lambda s: s["stages"][0].update(constants=["z"]), "takes the tensor 'z'"),
    "another name of a weight": (lambda s: s["stages"][1].update(weights=["alias"]), "takes the tensor 'alias'"),
    "weights of another stage": (
        lambda s: s["stages"][0].update(weights=["second"]), r"stages\[0\] takes 'second', not in the shards"),
    "a kind without graph": (lambda s: s["stages"][0].update(kind="graph-b"), "have no graph"),
    "a kind that is no name": (lambda s: s["stages"][0].update(kind="../../x"), "kind must be a string like"),
    "a stage too few": (lambda s: s["stages"].pop(), "."),
    "a rank too large": (lambda s: s["values"]["h"].update(shape=[1] * 65), "at most 64"),
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

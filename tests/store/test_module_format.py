"""Manifests of format 2, of a module that was divided by a run: what is checked, and what becomes of them."""

import copy
import shutil
from functools import partial

import numpy as np
import pytest

from offramp.cli import main
from offramp.errors import DamagedError, OfframpError
from offramp.program.program import Call, Value
from offramp.store import Store
from offramp.store.manifest import dumps, seal
from offramp.store.parsing import loads
from tests.store import old_formats
from tests.store.old_formats import value
from tests.store.small import problems, refused, reseal, tree_of
from tests.store.test_manifest import LEAVES, leaves, objects

TENSORS = {
    "first": {"first.weight": (8, 4), "first.bias": (8,)},
    "shared": {"norm": (4,)},
    "words": {"words": (64, 16)},
    "head": {"head": (32, 4)},
    "kept": {"kept": (2, 2)},
    "buffers": {"shift": (4,)},
    "unused": {"spare": ()},
}
GATHERED = ("words", "head")


def write_module(path):
    """A store of a module that never was: a table, a weight that may be sliced, a buffer, one that stays."""
    flows = [
        old_formats.flow(),
        old_formats.flow("blocks.1", 1, [value((2, 4)), value((2,), "bool")], 0),
        old_formats.flow("blocks.1", 2, [value((2, 4))]),
    ]
    stages = (("words", "first", "shared"), ("shared",), ("shared", "head"))
    return old_formats.write_module(
        path, TENSORS, stages, gathered=GATHERED, flows=flows, aliases={"norm": ["also.norm"]}, buffers=["shift"],
        pinned=["kept"], sliced=["head"], unused=["spare"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def module_store(tmp_path_factory):
    return write_module(tmp_path_factory.mktemp("module") / "store")


@pytest.fixture
def tree(module_store):
    return tree_of(module_store)


def test_it_becomes_a_program_without_stages(module_store):
    program = loads((module_store / "offramp.json").read_bytes()).program
    assert not program.stages and program.output is None and program.activation_bytes == 1000
    assert program.inputs["0"].axes == ("batch", 3)
    assert [part.shards for part in program.module.parts] == [
        ("words", "first", "shared"),
        ("shared",),
        ("shared", "head"),
    ]
    assert program.module.parts[1].start == Call("blocks.1", 1) and program.module.parts[1].hidden == 0
    assert program.module.parts[1].flows == (Value("float32", (2, 4)), Value("bool", (2,)))
    assert (program.module.pinned, program.module.sliced, program.module.unused) == (("kept",), ("head",), ("spare",))


def test_it_is_written_again_as_format_3(module_store):
    manifest = loads((module_store / "offramp.json").read_bytes())
    data = dumps(manifest)
    assert b'"format": 3' in data and loads(data) == manifest and dumps(loads(data)) == data


def test_sizes_in_which_the_proven_examples_differ_may_be_as_large_as_in_any(tree):
    example = {
        "inputs": {"0": ["int64", [5, 7]]}, "inputs_sha256": "2" * 64, "equal": True, "unplanned_loads": 0,
        "disorders": 0, "peak_weight_bytes": 1, "weight_budget_bytes": 2,
    }  # fmt: skip
    tree["proof"] = {"examples": [example], "is_paged": True}
    manifest = loads(seal(tree))
    assert manifest.program.inputs["0"].largest == (5, 7)
    assert manifest.proof.is_paged and manifest.proof.examples[0].inputs["0"].shape == (5, 7)
    tree["proof"]["examples"][0]["inputs"]["0"] = ["int64", [2, 3], 1]
    refused(DamagedError, lambda: loads(seal(tree)), "proof.examples[0].inputs must have 2 elements, not 3")


def test_every_key_is_needed_and_no_other_is_known(tree):
    count = 0
    for path, found in list(objects(tree)):
        if path == ".proof":  # its keys came one by one
            continue
        for key in [key for key in found if key != "format"]:
            value = found.pop(key)
            refused(DamagedError, lambda: loads(seal(tree)), f"lacks ['{key}']")
            found[key] = value
            count += 1
        found["wrong\x1b[31m"] = 1
        refused(DamagedError, lambda: loads(seal(tree)), r"has unknown keys ['wrong\x1b[31m']")
        del found["wrong\x1b[31m"]
    assert count > 80
    loads(seal(tree))


def test_every_value_may_be_wrong(tree):
    """Never another exception; what is taken says the same when written again."""
    taken = set()
    for container, key in leaves(tree):
        value = container[key]
        for wrong in LEAVES:
            if repr(wrong) == repr(value):
                continue
            container[key] = wrong
            try:
                loaded = loads(seal(tree))
            except OfframpError as error:
                assert error.exit_code == 4 and str(error).isprintable()
            else:
                taken.add(key)
                assert not loaded.inline_labels and loads(dumps(loaded)) == loaded
        container[key] = value
    free = {"architecture", "model_type", "method", "fingerprint", "name", "role", "widened_from", "graphs", "files"}
    free |= {"shards", "proof", "examples", "exits", "kind", "blocks", "bytes", "file", "steps"}
    free |= {"module", "weights_sha256", "versions", "torch", "inputs", "dtype", "shape", "number", "values", "hidden"}
    free |= {"aliases", "norm", "buffers", "pinned", "sliced", "unused", "activation_bytes", "start", "0", 0, 1}
    free |= {"problem", "labels", "segments"}
    assert taken <= free, taken - free


def flow(tree, index=1):
    return tree["program"]["flows"][index]


def program(tree, **changes):
    tree["program"].update(changes)


def shards_of(tree, index, names):
    tree["stages"][index]["steps"][0]["shards"] = names


def entry(tree, shard):
    return next(each for each in tree["shards"] if each["name"] == shard)["tensors"][0]


CHANGES = {
    "a flow too few": (lambda tree: tree["program"]["flows"].pop(), "flows has 2 entries for 3 stages"),
    "a stage too few": (lambda tree: tree["stages"].pop(), "flows has 3 entries for 2 stages"),
    "no stage": (lambda tree: (tree["stages"].clear(), program(tree, flows=[])), "flows has 0 entries for 0 stages"),
    "a first stage that begins with a call": (
        lambda tree: flow(tree, 0).update(start={"module": "x", "number": 1}),
        "the first part, and no other, has no start",
    ),
    "a second beginning": (lambda tree: flow(tree).update(start=None), "the first part, and no other, has no start"),
    "two stages that begin with one call": (
        lambda tree: flow(tree, 2)["start"].update(number=1),
        "start 'blocks.1, 1' is listed twice",
    ),
    "a call number 0": (lambda tree: flow(tree)["start"].update(number=0), "must be an integer from 1"),
    "a hidden state that does not flow": (lambda tree: flow(tree).update(hidden=2), "hidden must be an integer from 0"),
    "a hidden state of nothing": (lambda tree: flow(tree).update(hidden=0, values=[]), "hidden must be an integer"),
    "a hidden state before the first": (lambda tree: flow(tree).update(hidden=-1), "hidden must be an integer from 0"),
    "rank 65": (lambda tree: flow(tree)["values"][0].update(shape=[1] * 65), "shape has 65 elements"),
    "a negative extent": (lambda tree: flow(tree)["values"][0].update(shape=[-1]), "shape must be an integer from 0"),
    "another role": (
        lambda tree: tree["stages"][0].update(role="embedding"),
        "stage '000' must be one step of a layer",
    ),
    "a stage of two steps": (
        lambda tree: tree["stages"][0]["steps"].append({"kind": "module", "shards": []}),
        "stage '000' must be one step",
    ),
    "a stage of no step": (lambda tree: tree["stages"][0].update(steps=[]), "stage '000' must be one step"),
    "a stage twice": (lambda tree: tree["stages"][1].update(name="000"), "stage '000' is listed twice"),
    "a shard that is not there": (lambda tree: shards_of(tree, 0, ["x"]), "needs shard 'x', which is not listed"),
    "a shard twice in a stage": (
        lambda tree: shards_of(tree, 1, ["shared", "shared"]),
        "parts[1]: shard 'shared' is listed twice",
    ),
    "an alias of nothing": (lambda tree: program(tree, aliases={"x": ["y"]}), "names the tensor 'x', which is not"),
    "a buffer that is not there": (lambda tree: program(tree, buffers=["x"]), "names the tensor 'x', which is not"),
    "a slice of nothing": (lambda tree: program(tree, sliced=["x"]), "names the tensor 'x', which is not listed"),
    "an unused tensor that is not there": (lambda tree: program(tree, unused=["x"]), "names the tensor 'x', which"),
    "a pinned shard that is not there": (lambda tree: program(tree, pinned=["x"]), "names the shard 'x', which is not"),
    "an alias that is a tensor": (lambda tree: program(tree, aliases={"norm": ["kept"]}), "tensor 'kept' is listed"),
    "an alias of itself": (lambda tree: program(tree, aliases={"norm": ["norm"]}), "tensor 'norm' is listed twice"),
    "one alias of two": (
        lambda tree: program(tree, aliases={"norm": ["x"], "kept": ["x"]}),
        "tensor 'x' is listed twice",
    ),
    "a slice of a shard that is read as a whole": (
        lambda tree: program(tree, sliced=["norm"]),
        "program.module.sliced names 'norm', of whose shard no rows are gathered",
    ),
    "rows that stay": (
        lambda tree: program(tree, pinned=["head"]),
        "module.pinned names 'head', of which rows are",
    ),
    "a buffer in a stage": (
        lambda tree: program(tree, buffers=["norm"]),
        "module.buffers names 'norm', which is in",
    ),
    "a buffer that is pinned": (
        lambda tree: program(tree, buffers=["kept"]),
        "module.buffers names 'kept', which is",
    ),
    "rows of a list": (lambda tree: entry(tree, "words").update(shape=[64 * 16]), "must hold"),
    "rows of a cube": (lambda tree: entry(tree, "words").update(shape=[64, 4, 4]), "must hold"),
    "a table of no rows": (
        lambda tree: (
            entry(tree, "words").update(shape=[0, 16]),
            next(each for each in tree["shards"] if each["name"] == "words").update(bytes=4096),
        ),
        "must hold",
    ),
    "an encoder": (lambda tree: tree.update(encoder={}), "has unknown keys ['encoder']"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_cannot_be(tree, name):
    change, mentions = CHANGES[name]
    change(tree)
    refused(DamagedError, lambda: loads(seal(tree)), mentions)


def test_a_module_under_the_format_of_an_encoder_and_the_other_way_round(tree, pristine):
    refused(DamagedError, lambda: loads(seal({**tree, "format": 1})), "lacks ['encoder']")
    refused(DamagedError, lambda: loads(seal({**tree_of(pristine), "format": 2})), "lacks ['stages']")
    refused(DamagedError, lambda: loads(seal({**tree, "format": 3})), "lacks ['labels']")


def test_names_of_modules_are_not_judged_and_cannot_forge_a_line(tree):
    """No path is made of them, and no terminal sees them as they are."""
    for name in ("../../x", "\x1b[31m\nred", "x" * 100_000):
        changed = copy.deepcopy(tree)
        flow(changed)["start"]["module"] = name
        program(changed, module=name)
        assert loads(seal(changed)).program.module.parts[1].start.module == name
        changed[name] = 1
        refused(DamagedError, partial(loads, seal(changed)), "has unknown keys")


def test_rows_of_its_tables_are_gathered(module_store):
    with Store(module_store) as store:
        for name in GATHERED:
            (tensor,) = store.manifest.shards[name].tensors
            whole = np.frombuffer(store.read_tensor(name, tensor), np.float32).reshape(tensor.shape)
            rows, _ = store.gather(name, tensor.role, np.array([3, 0, 3]))
            assert np.array_equal(rows, whole[[3, 0, 3]])


def test_verify_finds_a_flipped_bit_in_each_file(tmp_path, capsys):
    store = write_module(tmp_path / "store")
    assert problems(store) == {} and main(["verify", str(store)]) == 0
    for path in sorted(store.iterdir()):
        if path.suffix in (".safetensors", ".blocks"):
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
            assert path.name in problems(store)
            data[-1] ^= 1
            path.write_bytes(data)
    assert problems(store) == {}


RUNNING = {
    "run": ("--budget", "1GiB", "--text", "a"),
    "plan": ("--budget", "1GiB"),
    "bench": ("--budget", "1GiB", "--repeat", "1", "--passes", "1"),
    "memory": ("--budget", "1GiB"),
    "profile": ("--budget", "1GiB", "--out", "profile.json"),
}


@pytest.mark.parametrize("command", RUNNING)
def test_commands_that_run_encoders_say_what_runs_this_store(module_store, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert main([command, str(module_store), *RUNNING[command]]) == 4
    said = capsys.readouterr()
    assert said.out == ""
    last = said.err.splitlines()[-1]
    assert last.startswith("offramp: error: ") and "offramp.stream" in last
    assert "Traceback" not in said.err


@pytest.mark.parametrize("command", ["ls", "verify"])
def test_commands_that_read_any_store_have_no_fault_of_ours(module_store, capsys, command):
    code = main([command, str(module_store)])
    said = capsys.readouterr()
    assert code in (0, 4) and "fault of ours" not in said.err and "Traceback" not in said.err


def test_graphs_cannot_be_added_to_it(module_store, capsys):
    assert main(["divide", "--graphs", str(module_store)]) == 4
    said = capsys.readouterr().err
    assert "that was divided by a run" in said and "divide --method export" in said


def test_a_manifest_that_was_sealed_again_is_still_checked(tmp_path, tree):
    store = write_module(tmp_path / "store")
    flow(tree).update(hidden=7)
    reseal(store, tree)
    refused(DamagedError, lambda: Store(store), "hidden must be an integer")


def test_ls_shows_names_of_a_stranger_as_they_may_be_printed(module_store, tree, tmp_path, capsys):
    flow(tree)["start"]["module"] = "\x1b[31m\nred"
    flow(tree)["values"][0]["dtype"] = "\x1b[2Jfloat32"
    tree["source"]["architecture"] = "\x07Bell"
    store = shutil.copytree(module_store, tmp_path / "store")
    (store / "offramp.json").write_bytes(seal(tree))
    assert main(["ls", str(store), "--graph", str(tmp_path / "stages.svg")]) == 0
    said = capsys.readouterr().out
    assert all(line.isprintable() for line in said.splitlines()) and "\\x1b[31m" in said
    assert "\x1b" not in (tmp_path / "stages.svg").read_text()

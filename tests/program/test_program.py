"""The manifest of a divided module: what is checked of it, and what commands make of such a store."""

import copy
import shutil
from functools import partial

import numpy as np
import pytest

from offramp.cli import main
from offramp.errors import DamagedError, OfframpError, StoreError
from offramp.program.program import Call, Flow, Program, Value
from offramp.store import Shard, Stage, Step, Store, StoreWriter
from offramp.store.manifest import MODULE_FORMAT, ModuleManifest, Source, dumps, seal
from offramp.store.parsing import loads
from tests.store.small import FINGERPRINT, problems, refused, reseal, tree_of
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
    rng = np.random.default_rng(0)
    with StoreWriter(path, FINGERPRINT) as writer:
        shards = {name: add(writer, name, tensors, rng) for name, tensors in TENSORS.items()}
        value = Value("float32", (2, 4))
        flows = (
            Flow(None, (), None),
            Flow(Call("blocks.1", 1), (value, Value("bool", (2,))), 0),
            Flow(Call("blocks.1", 2), (value,), None),
        )
        needs = (("words", "first", "shared"), ("shared",), ("shared", "head"))
        stages = tuple(Stage(f"{i:03d}", "layer", (Step("module", shards),)) for i, shards in enumerate(needs))
        program = Program(
            "some.where.Module", "1" * 64, {"torch": "2.6"}, {"0": Value("int64", (2, 3))}, flows,
            {"norm": ("also.norm",)}, ("shift",), ("kept",), ("head",), ("spare",), 1000,
        )  # fmt: skip
        source = Source(FINGERPRINT, "Module", "module", "eager")
        return writer.finish(ModuleManifest(source, program, stages, shards, {}, (), None, {"examples": []}))


def add(writer, name, tensors, rng) -> Shard:
    data = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in tensors.items()}
    entries = [(key, key, "F32", shape) for key, shape in tensors.items()]
    return writer.add_shard(name, entries, lambda key: [data[key].tobytes()], gathered=name in GATHERED)


@pytest.fixture(scope="module")
def module_store(tmp_path_factory):
    return write_module(tmp_path_factory.mktemp("module") / "store")


@pytest.fixture
def tree(module_store):
    return tree_of(module_store)


def test_write_read_write_gives_the_same_bytes(module_store):
    data = (module_store / "offramp.json").read_bytes()
    manifest = loads(data)
    assert isinstance(manifest, ModuleManifest) and dumps(manifest) == data
    assert b'"format": %d' % MODULE_FORMAT in data


def test_every_key_is_needed_and_no_other_is_known(tree):
    free = [tree[key] for key in ("graphs",)] + [tree["program"][key] for key in ("versions", "inputs", "aliases")]
    count = 0
    for _, found in list(objects(tree)):
        if any(found is each for each in free):
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
                assert dumps(loaded) == seal(tree)
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
        "the first stage, and no other, has no start",
    ),
    "a second beginning": (lambda tree: flow(tree).update(start=None), "the first stage, and no other, has no start"),
    "two stages that begin with one call": (
        lambda tree: flow(tree, 2)["start"].update(number=1),
        "start 'blocks.1, 1' is listed twice",
    ),
    "a call number 0": (lambda tree: flow(tree)["start"].update(number=0), "must be an integer from 1"),
    "a hidden state that does not flow": (lambda tree: flow(tree).update(hidden=2), "hidden must be an integer from 0"),
    "a hidden state of nothing": (lambda tree: flow(tree).update(hidden=0, values=[]), "hidden must be an integer"),
    "a hidden state before the first": (lambda tree: flow(tree).update(hidden=-1), "hidden must be an integer from 0"),
    "rank 65": (lambda tree: flow(tree)["values"][0].update(shape=[1] * 65), "shape has 65 extents"),
    "a negative extent": (lambda tree: flow(tree)["values"][0].update(shape=[-1]), "shape must be an integer from 0"),
    "another role": (lambda tree: tree["stages"][0].update(role="embedding"), "role must be one of ('layer',)"),
    "a stage of two steps": (
        lambda tree: tree["stages"][0]["steps"].append({"kind": "module", "shards": []}),
        "stage '000' must be one step",
    ),
    "a stage of no step": (lambda tree: tree["stages"][0].update(steps=[]), "stage '000' must be one step"),
    "a stage twice": (lambda tree: tree["stages"][1].update(name="000"), "stage '000' is listed twice"),
    "a shard that is not there": (lambda tree: shards_of(tree, 0, ["x"]), "needs shard 'x', which is not listed"),
    "a shard twice in a stage": (
        lambda tree: shards_of(tree, 1, ["shared", "shared"]),
        "in stage '001', shard 'shared' is listed twice",
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
        "program.sliced names 'norm', of whose shard no rows are gathered",
    ),
    "rows that stay": (lambda tree: program(tree, pinned=["head"]), "program.pinned names 'head', of which rows are"),
    "a buffer in a stage": (lambda tree: program(tree, buffers=["norm"]), "program.buffers names 'norm', which is in"),
    "a buffer that is pinned": (lambda tree: program(tree, buffers=["kept"]), "program.buffers names 'kept', which is"),
    "rows of a list": (lambda tree: entry(tree, "words").update(shape=[64 * 16]), "must hold one table"),
    "rows of a cube": (lambda tree: entry(tree, "words").update(shape=[64, 4, 4]), "must hold one table"),
    "a table of no rows": (
        lambda tree: (
            entry(tree, "words").update(shape=[0, 16]),
            next(each for each in tree["shards"] if each["name"] == "words").update(bytes=4096),
        ),
        "must hold one table",
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
    refused(DamagedError, lambda: loads(seal({**tree_of(pristine), "format": 2})), "lacks ['program']")


def test_names_of_modules_are_not_judged_and_cannot_forge_a_line(tree):
    """No path is made of them, and no terminal sees them as they are."""
    for name in ("../../x", "\x1b[31m\nred", "x" * 100_000):
        changed = copy.deepcopy(tree)
        flow(changed)["start"]["module"] = name
        program(changed, module=name)
        assert loads(seal(changed)).program.flows[1].start.module == name
        changed[name] = 1
        refused(DamagedError, partial(loads, seal(changed)), "has unknown keys")


def test_each_kind_of_store_is_refused_where_the_other_is_meant(module_store, pristine):
    with Store(module_store) as store:
        message = refused(
            StoreError, lambda: store.manifest, "this is the store of a Module, which is no encoder of texts"
        )
        assert "offramp.stream" in message
        assert store.module.program.pinned == ("kept",) and store.contents is store.module
    with Store(pristine) as store:
        message = refused(StoreError, lambda: store.module, "store of a SmallModel that was divided by its names")
        assert "offramp.load" in message
        assert store.manifest.encoder is not None and store.contents is store.manifest


def test_rows_of_its_tables_are_gathered(module_store):
    with Store(module_store) as store:
        for name in GATHERED:
            (tensor,) = store.module.shards[name].tensors
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


def test_graphs_cannot_be_added_to_it(module_store, tmp_path):
    from offramp.division import add_graphs

    refused(StoreError, lambda: add_graphs(module_store), "which is no encoder of texts")


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

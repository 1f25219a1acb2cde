import copy
import dataclasses
import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.errors import DamagedError, OfframpError, StoreError, VersionError
from offramp.store import Store, StoreWriter
from offramp.store import manifest as m
from offramp.store.manifest import dumps, require_head, seal
from offramp.store.parsing import loads, parse_labels
from tests.selection import examples
from tests.store.small import problems, refused, reseal, tree_of


@pytest.fixture
def tree(pristine):
    return tree_of(pristine)


def shard(tree, name="layer-00"):
    return next(shard for shard in tree["shards"] if shard["name"] == name)


def test_write_read_write_gives_the_same_bytes(pristine):
    data = (pristine / "offramp.json").read_bytes()
    assert dumps(loads(data)) == data


def test_the_last_key_is_the_sha256_of_all_bytes_before_it(pristine):
    data = (pristine / "offramp.json").read_bytes()
    body = data[: data.index(b'"sha256": "', -80)]
    assert data == body + b'"sha256": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()


@pytest.mark.parametrize("version", [0, 4, -1, 1.0, 3.0, "1", True, None, [1], {}, "\x1b[31m"])
def test_another_format(tree, version):
    message = refused(VersionError, lambda: loads(seal({**tree, "format": version}), "store/offramp.json"))
    assert "this version reads 1, 2, 3 - store/offramp.json - use the offramp that wrote it" in message


def test_no_format(tree):
    del tree["format"]
    refused(VersionError, lambda: loads(seal(tree)), "format None")


def test_another_format_is_named_before_anything_else():
    refused(VersionError, lambda: loads(b'{"format": 4, "what": "else"}'), "format 4")


BAD_NAMES = ["..", "../x", "a/../b", "/etc/passwd", "graphs/../x", "graphs/", "", ".", ".x", "a/b", "graphs//x"]
BAD_NAMES += ["x\0", "x\n", "x\x1b[31m", "\u202ex", "a" * 101, "a b", "\\x", "C:x", "graphs/graphs/x", None, 1, ["x"]]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize(
    "of",
    [
        shard,
        lambda tree: shard(tree, "rows")["blocks"],
        lambda tree: tree["graphs"]["layer"],
        lambda tree: tree["files"][0],
        lambda tree: tree["exits"]["heads"],
        lambda tree: tree["labels"],
    ],
)
def test_a_file_name_that_could_leave_the_store(tree, of, name):
    of(tree)["file"] = name
    refused(DamagedError, lambda: loads(seal(tree)), ".file must be a string like")


FREE = (".graphs", ".inputs", ".lookups", ".kernels", ".reads", ".writes", ".weights", ".constants", ".attributes")
FREE += (".versions", ".aliases", ".values", ".batch", ".look_ups")
"""Objects whose keys are names."""


def objects(tree, path=""):
    """(path, object) of every object whose keys are known."""
    if isinstance(tree, dict) and not path.endswith(FREE):
        yield path, tree
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from objects(value, f"{path}.{key}")


def test_every_key_is_needed_and_no_other_is_known(tree):
    count = 0
    for _, found in list(objects(tree)):
        for key in [key for key in found if key != "format"]:
            value = found.pop(key)
            refused(DamagedError, lambda: loads(seal(tree)), f"lacks ['{key}']")
            found[key] = value
            count += 1
        found["wrong\x1b[31m"] = 1
        refused(DamagedError, lambda: loads(seal(tree)), r"has unknown keys ['wrong\x1b[31m']")
        del found["wrong\x1b[31m"]
    assert count > 100
    loads(seal(tree))


LEAVES = [
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    2**53 + 1,
    2**63,
    2**64,
    "",
    "x\x1b[31m\n",
    "\ud800",
    "\0",
    [],
    [[]],
    {},
    "F64",
]


def leaves(tree):
    """(container, key) of everything in it."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from leaves(value)


@pytest.mark.parametrize("extent", ["some", "all"])
def test_every_value_may_be_wrong(tree, extent):
    """Never another exception; what is taken says the same when written again. `some`: a sixth of the wrong values."""
    taken = set()
    step = 6 if extent == "some" else 1
    for index, (container, key) in enumerate(list(leaves(tree))):
        value = container[key]
        for wrong in LEAVES[index % step :: step]:
            if repr(wrong) == repr(value):
                continue
            container[key] = wrong
            try:
                loaded = loads(seal(tree))
            except OfframpError as error:
                assert error.exit_code == 4 and str(error).isprintable()
            else:
                taken.add(key)
                assert loads(dumps(loaded)) == loaded
                assert dumps(loaded) == seal(tree)
        container[key] = value
    free = {"architecture", "model_type", "method", "fingerprint", "name", "role", "problem", "module"}
    free |= {"widened_from", "pad_token", "num_labels", "vocab_size", "max_length", "num_token_types"}
    free |= {"position_offset", "hidden_size", "bytes", "dtype", "axes", "largest", "keeps_intermediates", "texts"}
    free |= {"reads", "weights", "constants", "shards", "r0", "r1", "r2", "activation_bytes", "example", "stages"}
    free |= {"opset", "exits", "graphs", "files", "file", "proof", "examples", "is_paged", "equal", "inputs", "shape"}
    free |= {"unplanned_loads", "disorders", "peak_weight_bytes", "weight_budget_bytes", "unsaved_buffers_sha256", 0, 1}
    assert taken <= free, taken - free


@settings(max_examples=examples(60), deadline=None)
@given(st.data())
def test_spoilt_bytes_are_refused(pristine, data):
    spoilt = bytearray((pristine / "offramp.json").read_bytes())
    at = data.draw(st.integers(0, len(spoilt) - 1))
    spoilt[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    if bytes(spoilt) != (pristine / "offramp.json").read_bytes():
        with pytest.raises(StoreError):
            loads(bytes(spoilt))


def nested(opening):
    return b'{"format": 3, "proof": ' + opening * 100_000


BAD_JSON = {
    "empty": (b"", "not JSON"),
    "a list": (b"[]", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "cut": (b'{"format": 1', "not JSON"),
    "not UTF-8": (b'{"format": "\xff"}', "not JSON"),
    "byte order mark": (b'\xef\xbb\xbf{"format": 1}', "not JSON"),
    "deep lists": (nested(b"["), "nested too deeply"),
    "deep objects": (nested(b'{"a":'), "nested too deeply"),
    "duplicate key": (b'{"format": 1, "format": 1}', "duplicate key 'format'"),
    "NaN": (b'{"format": NaN}', "NaN is not a finite number"),
    "Infinity": (b'{"format": -Infinity}', "-Infinity is not a finite number"),
    "1e999": (b'{"format": 1e999}', "1e999 is not a finite number"),
    "many digits": (b'{"format": ' + b"1" * 4000 + b"}", "4000 digits"),
    "a pickle": (b"\x80\x04N.", "not JSON"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json(name):
    data, mentions = BAD_JSON[name]
    message = refused(DamagedError, lambda: loads(data, "store/offramp.json"), mentions)
    assert " - store/offramp.json - " in message


def test_many_keys_with_the_last_one_twice():
    keys = ",".join(f'"{i}":0' for i in [*range(100_000), 99_999])
    refused(DamagedError, lambda: loads(b"{" + keys.encode() + b"}"), "duplicate key '99999'")


def stage(tree, index):
    return tree["program"]["stages"][index]


def step(tree, index=1):
    return stage(tree, index)["steps"][0]


def kernel(tree, name):
    return tree["program"]["kernels"][name]


def swap_layers(tree):
    stage(tree, 1)["role"], stage(tree, 3)["role"] = "end", "layer"


def case_fold_twin(tree):
    tree["files"].append({**tree["files"][0], "file": "VOCAB.TXT"})


def overlapping(tree):
    shard(tree)["tensors"][1]["offset"] -= 4


def table(tree, **changes):
    shard(tree, "rows")["tensors"][0].update(changes)


def texts(tree, **changes):
    tree["program"]["texts"].update(changes)


def output(tree, **changes):
    tree["program"]["output"].update(changes)


ORDER = "program.stages must be one begin, the layers and one end, in this order"
CHANGES = {
    "a shard twice": (lambda tree: shard(tree).update(name="layer-01"), "shard 'layer-01' is listed twice"),
    "a tensor twice": (
        lambda tree: shard(tree)["tensors"][0].update(name="head.head.bias"),
        "tensor 'head.head.bias' is listed twice",
    ),
    "a file twice": (
        lambda tree: shard(tree).update(file="layer-01.safetensors"),
        "file 'layer-01.safetensors' is listed twice",
    ),
    "files that differ in case": (case_fold_twin, "file 'vocab.txt' is listed twice"),
    "data off the page": (lambda tree: shard(tree).update(data_start=4100), "data_start 4100 is not a multiple"),
    "data in the header": (lambda tree: shard(tree).update(data_start=0), "data_start must be an integer from 4096"),
    "data after the end": (lambda tree: shard(tree).update(data_start=1 << 40), "data_start must be an integer"),
    "an endless file": (lambda tree: shard(tree).update(bytes=1 << 50), "tensors take"),
    "overlap": (overlapping, "tensor 'layer-00.layer.rest' begins at 1020, not at 1024"),
    "a hole": (lambda tree: shard(tree)["tensors"][1].update(offset=1028), "begins at 1028, not at 1024"),
    "a tensor too few": (lambda tree: shard(tree)["tensors"].pop(), "tensors take 1024 bytes, the file holds"),
    "a product beyond 2^64": (
        lambda tree: shard(tree)["tensors"][1].update(shape=[2**40, 2**40]),
        "tensors take 4835703278458516698825",
    ),
    "rank 65": (lambda tree: shard(tree)["tensors"][1].update(shape=[1] * 65), "shape has 65 elements"),
    "another dtype": (lambda tree: shard(tree)["tensors"][0].update(dtype="F31"), "dtype must be one of"),
    "F16 for F32": (lambda tree: shard(tree)["tensors"][0].update(dtype="F16"), "begins at 1024, not at 512"),
    "a graph of a megabyte": (lambda tree: tree["graphs"]["layer"].update(bytes=(1 << 20) + 1), "is larger than"),
    "a kind that is a path": (lambda tree: tree["graphs"].update({"../x": {}}), "graphs must be a string like"),
    "stages in another order": (swap_layers, ORDER),
    "no beginning": (lambda tree: tree["program"]["stages"].pop(0), ORDER),
    "no end": (lambda tree: tree["program"]["stages"].pop(), ORDER),
    "no layer": (lambda tree: tree["program"].update(stages=[stage(tree, 0), stage(tree, 3)]), ORDER),
    "no stage": (lambda tree: tree["program"].update(stages=[]), "stages is empty"),
    "a stage twice": (lambda tree: stage(tree, 2).update(name="layer.0"), "stage 'layer.0' is listed twice"),
    "a stage whose name is a path": (lambda tree: stage(tree, 2).update(name="../x"), "name must be a string like"),
    "an exit after the last layer": (lambda tree: stage(tree, 2).update(exit="hidden"), "exit must be null"),
    "a layer without an exit": (lambda tree: stage(tree, 1).update(exit=None), "stages[1].exit must be a value"),
    "an exit on what is written later": (
        lambda tree: stage(tree, 1).update(exit="logits"), "exit: 'logits' is not written by then"),
    "an exit on whole numbers": (lambda tree: stage(tree, 1).update(exit="input_ids"), "is no hidden state"),
    "an exit on a vector": (
        lambda tree: step(tree)["writes"]["layer.0.hidden"].update(axes=["batch*tokens"]), "is no hidden state"),
    "an exit of no width": (
        lambda tree: step(tree)["writes"]["layer.0.hidden"].update(axes=["batch", "tokens"]), "is no hidden state"),
    "a value of itself": (lambda tree: step(tree)["reads"].update(r0="layer.0.hidden"), "before it is written"),
    "a value that nothing writes": (lambda tree: step(tree)["reads"].update(r0="x"), "reads 'x' before it is written"),
    "a value written twice": (
        lambda tree: step(tree, 3)["writes"].update({"hidden": {"dtype": "float32", "axes": []}}),
        "writes 'hidden', which is another value already"),
    "an input that is written": (
        lambda tree: step(tree, 3)["writes"].update({"input_ids": {"dtype": "float32", "axes": []}}),
        "writes 'input_ids', which is another value already"),
    "an unknown axis": (
        lambda tree: step(tree, 3)["writes"]["logits"].update(axes=["rows"]), "axes must be one of"),
    "a negative axis": (lambda tree: step(tree, 3)["writes"]["logits"].update(axes=[-1]), "must be an integer"),
    "33 axes": (lambda tree: step(tree, 3)["writes"]["logits"].update(axes=[1] * 33), "at most 32 are read"),
    "sizes of no elements": (
        lambda tree: step(tree, 3)["writes"]["logits"].update(axes=[0, 1 << 40, 1 << 40]), "no array can have"),
    "a table of no elements": (lambda tree: table(tree, shape=[0, 1 << 53]), "no array can have"),
    "a kernel that is not listed": (lambda tree: step(tree).update(kernel="x"), "kernel 'x' is no kernel of steps"),
    "an exit head as a step": (lambda tree: step(tree).update(kernel="exit"), "kernel 'exit' is no kernel of steps"),
    "another exit kernel": (lambda tree: kernel(tree, "layer").update(template="pooled-linear"), "has the template"),
    "a captured exit kernel": (
        lambda tree: kernel(tree, "exit").update(template="captured", attributes={}), "has the template 'captured'"),
    "an unknown template": (lambda tree: kernel(tree, "layer").update(template="exec"), "template must be one of"),
    "attributes of a captured kernel": (
        lambda tree: kernel(tree, "layer").update(attributes={"x": 1}), "takes the attributes [], not ['x']"),
    "attributes that are a list": (
        lambda tree: kernel(tree, "exit")["attributes"].update(activation=["tanh"]), "must be a number or a string"),
    "an attribute too few": (lambda tree: kernel(tree, "exit")["attributes"].pop("activation"), "takes the attributes"),
    "an unknown activation": (
        lambda tree: kernel(tree, "exit")["attributes"].update(activation="exec"), "activation is 'exec'"),
    "a size of nothing": (lambda tree: kernel(tree, "exit")["attributes"].update(hidden_size=0), "hidden_size is 0"),
    "labels that differ": (
        lambda tree: kernel(tree, "exit")["attributes"].update(num_labels=3), "another number of labels"),
    "a shard that is not there": (
        lambda tree: step(tree).update(shards=["layer-99"]), "needs the shard 'layer-99', which is not listed"),
    "a shard twice in a step": (
        lambda tree: step(tree).update(shards=["layer-00", "layer-00"]), "shard 'layer-00' is listed twice"),
    "a weight that is not there": (
        lambda tree: step(tree)["weights"].update({"layer.rest": "x"}), "takes the tensor 'x', which is not listed"),
    "a weight of another shard": (
        lambda tree: step(tree)["weights"].update({"layer.rest": "layer-01.layer.rest"}), "which is not in its shards"),
    "a constant that is not there": (
        lambda tree: step(tree)["constants"].update(c0="x"), "takes the tensor 'x', which is not listed"),
    "a table that is not there": (
        lambda tree: tree["program"]["lookups"]["word"].update(table="x"), "takes the tensor 'x', which is not listed"),
    "a table that is no table": (
        lambda tree: tree["program"]["lookups"]["word"].update(table="norm.norm.weight"),
        "of whose shard no rows are gathered"),
    "rows by no input": (
        lambda tree: tree["program"]["lookups"]["word"].update(input="hidden"), "no input of ids"),
    "rows by numbers": (
        lambda tree: tree["program"].update(
            texts=None,
            inputs={**tree["program"]["inputs"], "input_ids": {"dtype": "float32", "axes": [], "largest": []}}),
        "no input of ids"),
    "rows that are an input": (
        lambda tree: tree["program"]["lookups"].update(input_ids=tree["program"]["lookups"]["word"]),
        "is another value already"),
    "rows of another width": (
        lambda tree: tree["program"]["lookups"]["word"]["value"].update(axes=["batch*tokens", 17]), "of its table are"),
    "rows of another rank": (
        lambda tree: tree["program"]["lookups"]["word"]["value"].update(axes=["batch", 16]), "not rows for the ids"),
    "a vocabulary that is larger than its table": (lambda tree: texts(tree, vocab_size=4097), "has 4096 rows"),
    "positions that the table has not": (lambda tree: texts(tree, position_offset=1), "has 8 rows"),
    "types that the table has not": (lambda tree: texts(tree, num_token_types=3), "has 2 rows"),
    "a table of another type": (lambda tree: table(tree, dtype="I32"), "rows of its table are I32"),
    "a table of rank 1": (lambda tree: table(tree, shape=[4096 * 16]), "must hold tables"),
    "two tables of one role": (lambda tree: table(tree, role="type"), "role 'type' is listed twice"),
    "texts without ids": (lambda tree: tree["program"]["inputs"].pop("input_ids"), "no 'input_ids'"),
    "texts and something else": (
        lambda tree: tree["program"]["inputs"].update(x=tree["program"]["inputs"]["input_ids"]), "'x' where texts"),
    "an input of more sizes than axes": (
        lambda tree: tree["program"]["inputs"]["input_ids"].update(largest=[1]), "largest has 1 sizes for 2 axes"),
    "an output that nothing writes": (lambda tree: output(tree, value="x"), "output must name a value"),
    "no output": (lambda tree: tree["program"].update(output=None), "another number of labels"),
    "an output that is no row of logits": (lambda tree: output(tree, value="hidden"), "no row of logits"),
    "logits of other labels": (
        lambda tree: step(tree, 3)["writes"]["logits"].update(axes=["batch", 3]), "no row of logits"),
    "texts of fixed sizes": (
        lambda tree: tree["program"]["inputs"]["input_ids"].update(axes=["batch", 1 << 40]), "'input_ids' where texts"),
    "texts of other axes": (
        lambda tree: tree["program"]["inputs"]["input_ids"].update(axes=["tokens", "batch"]), "'input_ids' where text"),
    "an unknown problem": (lambda tree: output(tree, problem="x"), "problem must be one of"),
    "a problem without labels": (lambda tree: output(tree, num_labels=0), "problem and num_labels go together"),
    "labels without a problem": (lambda tree: output(tree, problem=None), "problem and num_labels go together"),
    "an output without a file of labels": (lambda tree: tree.update(labels=None), "labels: the output has 2"),
    "an example of three numbers": (lambda tree: tree["program"].update(example=[1, 1, 1]), "must have 2 elements"),
    "a kernel without a graph": (lambda tree: tree["graphs"].pop("layer"), "kernels ['layer'] have no graph"),
    "a description of exits of a megabyte": (
        lambda tree: tree["exits"]["description"].update(bytes=(1 << 20) + 1), "exits.description of more than"),
    "exits without a kernel": (lambda tree: tree["program"]["kernels"].pop("exit"), "exits need the kernel 'exit'"),
    "an unknown key": (lambda tree: tree.update(encoder={}), "has unknown keys ['encoder']"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_cannot_be(tree, name):
    change, mentions = CHANGES[name]
    change(tree)
    refused(DamagedError, lambda: loads(seal(tree)), mentions)


def test_a_change_that_could_be_is_seen_by_the_seal(store):
    """One changed word in an activation, and the answers would be wrong without a word."""
    path = store / "offramp.json"
    path.write_text(path.read_text().replace('"tanh"', '"relu"'))
    refused(DamagedError, lambda: Store(store), "manifest was changed: it does not end in its own sha256")


def test_every_flipped_bit_is_seen(pristine):
    data = (pristine / "offramp.json").read_bytes()
    for bit in range(0, 8 * len(data), 37):
        spoilt = bytearray(data)
        spoilt[bit // 8] ^= 1 << bit % 8
        refused(StoreError, lambda: loads(bytes(spoilt)))  # noqa: B023


def test_another_spacing_is_a_change(store):
    path = store / "offramp.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    refused(DamagedError, lambda: Store(store), "manifest was changed")


def test_two_layers_of_one_shape_that_changed_places(store, tree):
    """Whoever swaps the files in the manifest too is found out by the names of the tensors."""
    one, other = shard(tree, "layer-00"), shard(tree, "layer-01")
    for key in ("file", "sha256"):
        one[key], other[key] = other[key], one[key]
    reseal(store, tree)
    found = problems(store)
    assert found.keys() == {"layer-00.safetensors", "layer-01.safetensors"}
    assert all("tensors differ from the manifest: ['layer-00.layer.rest'" in problem for problem in found.values())


def test_a_manifest_that_is_too_long(store, tree):
    tree["source"]["architecture"] = "x" * m.MAX_MANIFEST_BYTES
    reseal(store, tree)
    refused(DamagedError, lambda: Store(store), "at most 2097152 are read")


def test_nobody_writes_a_manifest_that_cannot_be_read(pristine):
    manifest = loads((pristine / "offramp.json").read_bytes())
    source = dataclasses.replace(manifest.source, architecture="x" * m.MAX_MANIFEST_BYTES)
    refused(StoreError, lambda: dumps(dataclasses.replace(manifest, source=source)), "at most 2097152 are read")


def test_a_manifest_of_a_model_without_a_head(tree):
    output(tree, problem=None, num_labels=0)
    tree["program"]["kernels"].pop("exit")
    tree.update(labels=None, exits=None)
    manifest = loads(seal(copy.deepcopy(tree)))
    refused(StoreError, lambda: require_head(manifest, "store"), "SmallModel has no classification head - store")


def test_names_of_tensors_are_not_judged(tree):
    """No path is made of them."""
    for name in ("../../x", "\0", "\x1b[31m", "x" * 100_000):
        shard(tree)["tensors"][0]["name"] = name
        step(tree)["weights"]["layer.weight"] = name
        assert loads(seal(tree)).shards["layer-00"].tensors[0].name == name


def test_a_module_may_stand_without_stages(tree):
    """Only its own code runs it then."""
    module = {
        "name": "a.Module", "weights_sha256": "0", "versions": {"torch": "2.6"},
        "parts": [{"shards": ["norm"], "start": None, "flows": [], "hidden": None}],
        "aliases": {"norm.norm.weight": ["x"]},
        "buffers": [], "pinned": [], "sliced": [], "unused": [],
    }  # fmt: skip
    tree["shards"].pop(0)
    tree["program"].update(module=module, stages=[], lookups={}, kernels={}, texts=None)
    output(tree, value="")
    tree["exits"] = None
    manifest = loads(seal(tree))
    assert manifest.program.module.parts[0].shards == ("norm",) and manifest.program.problem is not None
    assert dumps(manifest) == seal(tree)
    module["parts"][0]["shards"] = ["x"]
    refused(DamagedError, lambda: loads(seal(tree)), "program.module.parts[0] needs the shard 'x'")


class TestLabels:
    def test_they_are_read_from_their_file_and_verified(self, store):
        with Store(store) as opened:
            assert opened.labels == ("no", "yes")
        path = store / "labels.json"
        path.write_text(path.read_text().replace("yes", "yet"))
        with Store(store) as opened:
            refused(DamagedError, lambda: opened.labels, "sha256 differs from the manifest")
        assert problems(store) == {"labels.json": "sha256 differs from the manifest"}

    @pytest.mark.parametrize(
        ("data", "mentions"),
        [
            (b'["no"]', "1 labels, the output has 2"),
            (b'["no", "yes", "x"]', "3 labels"),
            (b'{"0": "no", "1": "yes"}', "must be a list"),
            (b'["no", 1]', "must be a string"),
            (b'["no", ', "labels: "),
            (b"[" * 100_000, "nested too deeply"),
        ],
    )
    def test_another_content_is_refused(self, store, tree, data, mentions):
        (store / "labels.json").write_bytes(data)
        tree["labels"].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        reseal(store, tree)
        with Store(store) as opened:
            refused(DamagedError, lambda: opened.labels, mentions)

    def test_a_file_that_is_too_large(self, store, tree):
        tree["labels"]["bytes"] = 1 << 40
        reseal(store, tree)
        refused(DamagedError, lambda: Store(store), "labels of more than")

    def test_many_labels_do_not_grow_the_manifest(self, tmp_path):
        labels = [f"a category of products {i:07d}" for i in range(70_000)]
        with StoreWriter(tmp_path / "store", "x") as writer:
            file = writer.add_labels(labels)
        assert file.bytes > m.MAX_MANIFEST_BYTES
        data = (tmp_path / "store.partial" / "labels.json").read_bytes()
        assert parse_labels(data, 70_000, "here") == tuple(labels)

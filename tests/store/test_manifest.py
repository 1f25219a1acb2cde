import copy
import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.errors import DamagedError, OfframpError, StoreError, VersionError
from offramp.store import Store
from offramp.store import manifest as m
from offramp.store.manifest import dumps, require_head, seal
from offramp.store.parsing import loads
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


@pytest.mark.parametrize("version", [0, 3, -1, 1.0, "1", True, None, [1], {}, "\x1b[31m"])
def test_another_format(tree, version):
    message = refused(VersionError, lambda: loads(seal({**tree, "format": version}), "store/offramp.json"))
    assert "this version reads 1 and 2 - store/offramp.json - use the offramp that wrote it" in message


def test_no_format(tree):
    del tree["format"]
    refused(VersionError, lambda: loads(seal(tree)), "format None")


def test_another_format_is_named_before_anything_else():
    refused(VersionError, lambda: loads(b'{"format": 3, "what": "else"}'), "format 3")


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
    ],
)
def test_a_file_name_that_could_leave_the_store(tree, of, name):
    of(tree)["file"] = name
    refused(DamagedError, lambda: loads(seal(tree)), ".file must be a string like")


def objects(tree, path=""):
    """(path, object) of every object but the proof, whose keys are free."""
    if isinstance(tree, dict):
        yield path, tree
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        if key != "proof":
            yield from objects(value, f"{path}.{key}")


def test_every_key_is_needed_and_no_other_is_known(tree):
    count = 0
    for _, found in list(objects(tree)):
        if set(found) == set(tree["graphs"]):
            continue
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
    free = {"architecture", "model_type", "method", "fingerprint", "name", "role", "labels", "problem"}
    free |= {"widened_from", "norm_epsilon", "pad_token", "num_heads", "hidden_size", "intermediate_size", "bytes"}
    free |= {"opset", "exits", "graphs", "files", "file", "shards", "proof", "planned", 0, 1}
    assert taken <= free, taken - free


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_spoilt_bytes_are_refused(pristine, data):
    spoilt = bytearray((pristine / "offramp.json").read_bytes())
    at = data.draw(st.integers(0, len(spoilt) - 1))
    spoilt[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    if bytes(spoilt) != (pristine / "offramp.json").read_bytes():
        with pytest.raises(StoreError):
            loads(bytes(spoilt))


def nested(opening):
    return b'{"format": 1, "proof": ' + opening * 100_000


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


def swap_layers(tree):
    tree["stages"][1]["role"], tree["stages"][3]["role"] = "head", "layer"


def case_fold_twin(tree):
    tree["files"].append({**tree["files"][0], "file": "VOCAB.TXT"})


def overlapping(tree):
    shard(tree)["tensors"][1]["offset"] -= 4


def table(tree, **changes):
    shard(tree, "rows")["tensors"][0].update(changes)


CHANGES = {
    "stages in another order": (swap_layers, "stages must be an embedding, the layers and a head, in this order"),
    "no embedding": (lambda tree: tree["stages"].pop(0), "stages must be an embedding"),
    "no head": (lambda tree: tree["stages"].pop(), "stages must be an embedding, the layers and a head"),
    "missing layer": (lambda tree: tree["stages"].pop(1), "1 layers are listed, the encoder has 2"),
    "extra layer": (lambda tree: tree["stages"].append(tree["stages"][1]), "3 layers are listed, the encoder has 2"),
    "layers by the billion": (lambda tree: tree["encoder"].update(num_layers=1 << 40), "2 layers are listed"),
    "a stage twice": (lambda tree: tree["stages"][2].update(name="layer.0"), "stage 'layer.0' is listed twice"),
    "a stage of nothing": (lambda tree: tree["stages"][1].update(steps=[]), "'layer.0' must have steps"),
    "two embeddings": (
        lambda tree: tree["stages"][0]["steps"].append(tree["stages"][0]["steps"][0]),
        "'embedding' must be one step that gathers rows from one shard",
    ),
    "an embedding without tables": (
        lambda tree: tree["stages"][0]["steps"][0].update(shards=["norm"]),
        "'embedding' must be one step that gathers rows from one shard",
    ),
    "a layer that gathers": (
        lambda tree: tree["stages"][1]["steps"][0].update(shards=["rows"]),
        "'layer.0' must have steps, and gather no rows",
    ),
    "a shard that is not there": (
        lambda tree: tree["stages"][1]["steps"][0].update(shards=["layer-99"]),
        "stage 'layer.0' needs shard 'layer-99', which is not listed",
    ),
    "a shard twice": (lambda tree: shard(tree).update(name="layer-01"), "shard 'layer-01' is listed twice"),
    "a tensor twice": (
        lambda tree: shard(tree)["tensors"][0].update(name="head.head.bias"),
        "tensor 'head.head.bias' is listed twice",
    ),
    "a role twice": (lambda tree: shard(tree)["tensors"][1].update(role="layer.weight"), "two tensors have one role"),
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
    "rank 65": (lambda tree: shard(tree)["tensors"][1].update(shape=[1] * 65), "shape has 65 extents"),
    "another dtype": (lambda tree: shard(tree)["tensors"][0].update(dtype="F31"), "dtype must be one of"),
    "F16 for F32": (lambda tree: shard(tree)["tensors"][0].update(dtype="F16"), "begins at 1024, not at 512"),
    "a table of another height": (lambda tree: tree["encoder"].update(vocab_size=4097), "must hold the tables"),
    "a table of another type": (lambda tree: table(tree, dtype="I32"), "must hold the tables"),
    "a table of rank 1": (lambda tree: table(tree, shape=[4096 * 16]), "must hold the tables"),
    "a table under another role": (lambda tree: table(tree, role="words"), "must hold the tables"),
    "a graph of a megabyte": (lambda tree: tree["graphs"]["layer"].update(bytes=(1 << 20) + 1), "is larger than"),
    "a kind without a graph": (lambda tree: tree["graphs"].pop("layer"), "kinds ['layer'] have no graph"),
    "exits without a graph": (lambda tree: tree["graphs"].pop("exit"), "kinds ['exit'] have no graph"),
    "a kind that is a path": (lambda tree: tree["graphs"].update({"../x": {}}), "graphs must be a string like"),
    "a head without labels": (lambda tree: tree["encoder"].update(labels=[]), "go together"),
    "labels without a head": (lambda tree: tree["encoder"].update(problem=None, head_activation=None), "go together"),
    "heads that do not divide": (lambda tree: tree["encoder"].update(num_heads=3), "not a multiple of num_heads 3"),
    "an unknown activation": (lambda tree: tree["encoder"].update(activation="exec"), "activation must be one of"),
    "a regression of two": (lambda tree: tree["encoder"].update(problem="regression"), "a regression has one label"),
    "an unknown problem": (lambda tree: tree["encoder"].update(problem="x"), "problem must be one of"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_cannot_be(tree, name):
    change, mentions = CHANGES[name]
    change(tree)
    refused(DamagedError, lambda: loads(seal(tree)), mentions)


def test_a_change_that_could_be_is_seen_by_the_seal(store):
    """One flipped bit in a label, and the answers would be wrong without a word."""
    path = store / "offramp.json"
    path.write_text(path.read_text().replace('"yes"', '"yet"'))
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
    tree["proof"] = {"x": "x" * m.MAX_MANIFEST_BYTES}
    reseal(store, tree)
    refused(DamagedError, lambda: Store(store), "at most 2097152 are read")


def test_nobody_writes_a_manifest_that_cannot_be_read(pristine):
    manifest = loads((pristine / "offramp.json").read_bytes())
    manifest.proof["x"] = "x" * m.MAX_MANIFEST_BYTES
    refused(StoreError, lambda: dumps(manifest), "at most 2097152 are read")


def test_a_manifest_of_a_model_without_a_head(tree):
    tree["encoder"].update(problem=None, head_activation=None, labels=[])
    tree["stages"].pop()
    manifest = loads(seal(copy.deepcopy(tree)))
    refused(StoreError, lambda: require_head(manifest, "store"), "SmallModel has no classification head - store")


def test_names_of_tensors_are_not_judged(tree):
    """No path is made of them."""
    for name in ("../../x", "\0", "\x1b[31m", "x" * 100_000):
        shard(tree)["tensors"][0]["name"] = name
        assert loads(seal(tree)).shards["layer-00"].tensors[0].name == name

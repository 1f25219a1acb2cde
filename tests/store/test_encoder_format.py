"""Manifests of format 1, of a text encoder: what is checked, and the program that they become."""

import dataclasses
import json

import pytest

from offramp.errors import DamagedError, OfframpError
from offramp.store.manifest import LABELS_FILE, File, dumps, seal
from offramp.store.parsing import loads
from tests.store.old_formats import encoder_store
from tests.store.small import refused, tree_of
from tests.store.test_manifest import LEAVES, leaves, objects


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return encoder_store(tmp_path_factory.mktemp("golden"))


@pytest.fixture
def tree(path):
    return tree_of(path)


def shard(tree, name="layer-00-up"):
    return next(shard for shard in tree["shards"] if shard["name"] == name)


def test_it_becomes_the_program_of_an_encoder(path, tree):
    manifest, encoder = loads((path / "offramp.json").read_bytes()), tree["encoder"]
    program = manifest.program
    assert [(stage.name, stage.role) for stage in program.stages] == [
        ("embedding", "begin"), ("layer.0", "layer"), ("layer.1", "layer"), ("layer.2", "layer"), ("head", "end"),
    ]  # fmt: skip
    assert [step.kernel for step in program.stages[1].steps] == ["attention", "up", "down"]
    assert [stage.exit for stage in program.layers] == ["layer.0.hidden", "layer.1.hidden", None]
    assert [step.shards for step in program.stages[0].steps] == [(), ("embedding",)]
    assert program.lookups["word"].table.endswith("word_embeddings.weight")
    assert program.texts.vocab_size == encoder["vocab_size"] and program.texts.max_length == encoder["max_length"]
    assert program.output.problem == encoder["problem"] and manifest.inline_labels == tuple(encoder["labels"])
    assert program.kernels["attention"].attributes["num_heads"] == encoder["num_heads"]
    assert program.kernels["up"].keeps_intermediates and program.module is None and not manifest.proof


def test_it_is_written_again_as_format_3_with_its_labels_in_a_file(path):
    manifest = loads((path / "offramp.json").read_bytes())
    with pytest.raises(ValueError, match="labels"):
        dumps(manifest)
    moved = dataclasses.replace(manifest, inline_labels=(), labels=File(LABELS_FILE, 12, "0" * 64))
    assert json.loads(dumps(moved))["format"] == 3 and loads(dumps(moved)) == moved


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


@pytest.mark.parametrize("extent", ["some", "all"])
def test_every_value_may_be_wrong(tree, extent):
    """Never another exception. `some`: each leaf gets a sixth of the wrong values."""
    taken = set()
    only_first_layer(tree)
    step = 6 if extent == "some" else 1
    for index, (container, key) in enumerate(list(leaves(tree))):
        value = container[key]
        for wrong in LEAVES[index % step :: step]:
            if repr(wrong) == repr(value):
                continue
            container[key] = wrong
            try:
                loads(seal(tree))
            except OfframpError as error:
                assert error.exit_code == 4 and str(error).isprintable()
            else:
                taken.add(key)
        container[key] = value
    free = {"architecture", "model_type", "method", "fingerprint", "name", "role", "labels", "problem"}
    free |= {"widened_from", "norm_epsilon", "pad_token", "num_heads", "bytes", "proof", "vocab_size"}
    free |= {"opset", "exits", "graphs", "files", "file", "shards", "activation", "head_activation", 0, 1, 2}
    assert taken <= free, taken - free


def only_first_layer(tree):
    tree["encoder"]["num_layers"] = 1
    tree["stages"][2:4] = []
    tree["shards"] = [each for each in tree["shards"] if not each["name"].startswith(("layer-01", "layer-02"))]


def encoder(tree, **changes):
    tree["encoder"].update(changes)


def swap_layers(tree):
    tree["stages"][1]["role"], tree["stages"][4]["role"] = "head", "layer"


def steps(tree, index=1):
    return tree["stages"][index]["steps"]


def table(tree, **changes):
    shard(tree, "embedding-rows")["tensors"][0].update(changes)


def up(tree, **changes):
    shard(tree)["tensors"][0].update(changes)


CHANGES = {
    "stages in another order": (swap_layers, "stages must be an embedding, the layers and a head, in this order"),
    "no embedding": (lambda tree: tree["stages"].pop(0), "stages must be an embedding"),
    "no head": (lambda tree: tree["stages"].pop(), "stages must be an embedding, the layers and a head"),
    "missing layer": (lambda tree: tree["stages"].pop(1), "2 layers are listed, the encoder has 3"),
    "extra layer": (
        lambda tree: tree["stages"].append({**tree["stages"][1], "name": "x"}),
        "4 layers are listed, the encoder has 3"),
    "layers by the billion": (lambda tree: encoder(tree, num_layers=1 << 40), "3 layers are listed"),
    "a stage twice": (lambda tree: tree["stages"][2].update(name="layer.0"), "stage 'layer.0' is listed twice"),
    "a stage of nothing": (lambda tree: tree["stages"][1].update(steps=[]), "'layer.0' must have steps"),
    "two embeddings": (
        lambda tree: steps(tree, 0).append(steps(tree, 0)[0]),
        "'embedding' must be one step that gathers rows from one shard"),
    "an embedding without tables": (
        lambda tree: steps(tree, 0)[0].update(shards=["embedding"]),
        "'embedding' must be one step that gathers rows from one shard"),
    "a layer that gathers": (
        lambda tree: steps(tree)[0].update(shards=["embedding-rows"]), "'layer.0' must have steps, and gather no rows"),
    "a shard that is not there": (
        lambda tree: steps(tree)[0].update(shards=["layer-99"]),
        "stage 'layer.0' needs shard 'layer-99', which is not listed"),
    "a role twice": (
        lambda tree: shard(tree)["tensors"][1].update(role=shard(tree)["tensors"][0]["role"]),
        "two tensors have one role"),
    "a table of another height": (lambda tree: encoder(tree, vocab_size=4097), "must hold the tables"),
    "a table of another type": (lambda tree: table(tree, dtype="I32"), "must hold the tables"),
    "a table under another role": (lambda tree: table(tree, role="words"), "must hold the tables"),
    "a kind that is a path": (lambda tree: tree["graphs"].update({"../x": {}}), "graphs must be a string like"),
    "a head without labels": (lambda tree: encoder(tree, labels=[]), "go together"),
    "labels without a head": (lambda tree: encoder(tree, problem=None, head_activation=None), "go together"),
    "heads that do not divide": (lambda tree: encoder(tree, num_heads=3), "not a multiple of num_heads 3"),
    "an unknown activation": (lambda tree: encoder(tree, activation="exec"), "activation must be one of"),
    "an unknown problem": (lambda tree: encoder(tree, problem="x"), "problem must be one of"),
    "another kind": (lambda tree: steps(tree)[1].update(kind="down"), "layer.0 has the steps ('attention', 'down'"),
    "kinds in another order": (lambda tree: steps(tree).reverse(), "stage layer.0 has the steps ('down', 'up'"),
    "a kind for the embedding": (lambda tree: steps(tree, 0)[0].update(kind="up"), "embedding has the steps ('up',)"),
    "a transposed weight": (lambda tree: up(tree, shape=up_shape(tree)[::-1]), "stage layer.0, up: up.weight"),
    "a renamed weight": (lambda tree: up(tree, role="up.other"), "stage layer.0, up: up.other is"),
    "another number of labels": (lambda tree: encoder(tree, labels=["a"] * 4), "stage head, head: out.bias"),
    "a proof that is a list": (lambda tree: tree.update(proof=[]), "proof must be an object"),
}  # fmt: skip


def up_shape(tree):
    return shard(tree)["tensors"][0]["shape"]


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_cannot_be(tree, name):
    change, mentions = CHANGES[name]
    change(tree)
    refused(DamagedError, lambda: loads(seal(tree)), mentions)

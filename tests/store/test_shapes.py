"""A store whose manifest is sound and whose tensors, values or attributes are not those of its kernels."""

import dataclasses

import pytest

import offramp
from offramp.errors import DamagedError
from offramp.program import consistency
from offramp.program import program as p
from offramp.program.checks import WrongError, require_shape
from offramp.program.consistency import check_program
from offramp.program.program import BATCH, Value
from offramp.store.manifest import dumps
from offramp.store.parsing import loads
from tests.division.tiny import config_of, write_model
from tests.store.small import refused


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_model(folder / "model")
    return offramp.divide(folder / "model", folder / "store")


def with_tensor(manifest, shard, wanted, **changes):
    old = manifest.shards[shard].tensors
    tensors = [dataclasses.replace(each, **changes) if each.role == wanted else each for each in old]
    spoilt = dataclasses.replace(manifest.shards[shard], tensors=tuple(tensors))
    return dataclasses.replace(manifest, shards={**manifest.shards, shard: spoilt})


def with_step(manifest, stage, number, **changes):
    stages = list(manifest.program.stages)
    steps = list(stages[stage].steps)
    steps[number] = dataclasses.replace(steps[number], **changes)
    stages[stage] = dataclasses.replace(stages[stage], steps=tuple(steps))
    return with_program(manifest, stages=tuple(stages))


def with_program(manifest, **changes):
    return dataclasses.replace(manifest, program=dataclasses.replace(manifest.program, **changes))


def with_attribute(manifest, kernel, **changes):
    kernels, old = manifest.program.kernels, manifest.program.kernels[kernel]
    changed = dataclasses.replace(old, attributes={**old.attributes, **changes})
    return with_program(manifest, kernels={**kernels, kernel: changed})


def of_role(manifest, shard, role):
    return next(each.name for each in manifest.shards[shard].tensors if each.role == role)


def without_weight(manifest, stage, number, role):
    weights = dict(manifest.program.stages[stage].steps[number].weights)
    del weights[role]
    return with_step(manifest, stage, number, weights=weights)


def with_more_kernels(manifest, number):
    """The same program with as many kernels of templates in all."""
    kernels = manifest.program.kernels
    return with_program(manifest, kernels={f"twin{i}": kernels["up"] for i in range(len(kernels), number)} | kernels)


def with_padding(manifest, token):
    return with_program(manifest, texts=dataclasses.replace(manifest.program.texts, pad_token=token))


def swapped(manifest):
    step = manifest.program.stages[1].steps[0]
    weights = {**step.weights, "norm.weight": step.weights["q.weight"]}
    return with_step(manifest, 1, 0, weights=weights)


ATTACKS = {
    "transposed": (lambda m: with_tensor(m, "layer-00-up", "up.weight", shape=(32, 64)), "layer.0, up: up.weight"),
    "narrow": (lambda m: with_tensor(m, "layer-00-up", "up.bias", dtype="BF16", shape=(128,)), "up.bias is ('BF16'"),
    "missing": (lambda m: without_weight(m, 2, 2, "norm.bias"), "layer.1, down: norm.bias is None"),
    "extra": (
        lambda m: with_step(
            m, 1, 1,
            weights={**m.program.stages[1].steps[1].weights, "up.other": of_role(m, "layer-00-up", "up.bias")}),
        "layer.0, up: up.other is ('F32', (64,)), the kernel takes None"),
    "another weight": (swapped, "attention: norm.weight is ('F32', (32, 32)), the kernel takes ('F32', (32,))"),
    "labels": (
        lambda m: with_attribute(m, "head", num_labels=3), "kernels.head has another number of labels than the output"),
    "heads that do not divide": (lambda m: with_attribute(m, "attention", num_heads=3), "a multiple of num_heads 3"),
    "epsilon": (lambda m: with_attribute(m, "attention", norm_epsilon=1), "norm_epsilon is 1"),
    "another width": (lambda m: with_attribute(m, "up", intermediate_size=65), "stage layer.0, up: up.bias"),
    "kernel": (lambda m: with_step(m, 1, 1, kernel="down"), "stage layer.0, down: down.bias is None"),
    "a value of another shape": (
        lambda m: with_step(m, 1, 1, writes={"layer.0.inner": Value("float32", (BATCH, 64))}),
        "stage layer.0, up: 0 is Value(dtype='float32', axes=('batch', 64))"),
    "a value that is not there": (lambda m: with_step(m, 1, 1, reads={}), "up: hidden is None"),
    "a value too many": (
        lambda m: with_step(m, 1, 1, reads={"hidden": "layer.0.attended", "mask": "mask"}), "up: mask is Value"),
    "inner for hidden": (
        lambda m: with_step(m, 1, 2, reads={"inner": "layer.0.attended", "hidden": "layer.0.inner"}),
        "stage layer.0, down: hidden is Value"),
    "a mask of numbers": (
        lambda m: with_step(m, 0, 0, reads={"mask": "word"}),
        "stage embedding, mask: mask is Value"),
    "an exit of another width": (
        lambda m: with_attribute(m, "exit", hidden_size=64), "stage layer.0, exit: hidden is Value"),
    "seventeen kernels": (lambda m: with_more_kernels(m, 17), "has 17 kernels of templates, at most 16"),
    "no token for padding": (lambda m: with_padding(m, 50), "program.texts.pad_token must be an integer from 0 to 49"),
    "a shard that it takes nothing of": (
        lambda m: with_step(m, 1, 1, shards=(*m.program.stages[1].steps[1].shards, "layer-01-up")),
        "stages[1].steps[1] needs the shard 'layer-01-up', of which it takes nothing"),
    "a million heads": (lambda m: with_attribute(m, "attention", num_heads=1 << 20), "a multiple of num_heads 1048576"),
    "no heads": (lambda m: with_attribute(m, "attention", num_heads=0), "num_heads is 0"),
}  # fmt: skip
LEGAL = {
    "other heads": lambda m: with_attribute(m, "attention", num_heads=32),
    "another epsilon": lambda m: with_attribute(m, "down", norm_epsilon=0.5),
    "another activation": lambda m: with_attribute(m, "exit", activation="relu"),
    "sixteen kernels": lambda m: with_more_kernels(m, 16),
    "a twin of a kernel": lambda m: with_step(with_more_kernels(m, 8), 2, 1, kernel="twin7"),
    "the last token for padding": lambda m: with_padding(m, 49),
    "none for padding": lambda m: with_padding(m, None),
}
"""Changes beside the attacks that a reader takes."""


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_kernel_that_gets_other_than_it_takes_is_named(path, attack):
    spoil, mention = ATTACKS[attack]
    manifest = loads((path / "offramp.json").read_bytes())
    refused(DamagedError, lambda: loads(dumps(spoil(manifest))), mention)


@pytest.mark.parametrize("change", LEGAL)
def test_its_legal_twin_is_read(path, change):
    manifest = loads((path / "offramp.json").read_bytes())
    changed = LEGAL[change](manifest)
    assert loads(dumps(changed)) == changed != manifest


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The manifest of a store of 12 heads of 32 elements."""
    folder = tmp_path_factory.mktemp("wide")
    write_model(folder / "model", config_of(hidden_size=384, num_attention_heads=12))
    return loads((offramp.divide(folder / "model", folder / "store") / "offramp.json").read_bytes())


@pytest.mark.parametrize("num_heads", [1, 6, 12, 24, 32, 48, 64, 96, 128, 384])
def test_heads_of_few_elements_are_few(wide, num_heads):
    """No weight tells the number of heads, and each takes memory for every pair of tokens."""
    changed = with_attribute(wide, "attention", num_heads=num_heads)
    if num_heads <= 32:
        assert loads(dumps(changed)) == changed
    else:
        mention = f"num_heads {num_heads} makes heads of {384 // num_heads} elements, more than 32 heads have at least"
        refused(DamagedError, lambda: loads(dumps(changed)), mention)


def with_layers(program, number):
    """The program with its first layer as often, one after another."""
    first, *others = program.stages[1:]
    text = repr(first)
    layers = [first]
    for i in range(1, number):
        renamed = text.replace("embedding.hidden", f"@{i - 1}").replace("layer.0.attended", f"layer.{i}.attended")
        renamed = renamed.replace("layer.0.hidden", f"layer.{i}.hidden").replace("layer.0.inner", f"layer.{i}.inner")
        renamed = renamed.replace(f"@{i - 1}", f"layer.{i - 1}.hidden").replace("'layer.0'", f"'layer.{i}'")
        layers.append(eval(renamed, vars(p)))  # as a dataclass writes itself
    layers[-1] = dataclasses.replace(layers[-1], exit=None)
    head = dataclasses.replace(others[-1].steps[0], reads={"hidden": f"layer.{number - 1}.hidden"})
    end = dataclasses.replace(others[-1], steps=(head,))
    return dataclasses.replace(program, stages=(program.stages[0], *layers, end))


def test_steps_that_share_weights_have_an_end(path, monkeypatch):
    """A repeat of a few bytes would make any number of them."""
    program = loads((path / "offramp.json").read_bytes()).program
    assert consistency.MAX_STEPS == 4096
    monkeypatch.setattr(consistency, "MAX_STEPS", 33)
    check_program(with_layers(program, 10))
    with pytest.raises(WrongError, match="have 36 steps, at most 33 are run"):
        check_program(with_layers(program, 11))


def test_a_shape_of_no_elements_has_sizes_that_an_array_can_have():
    for shape in ((), (0,), (0, 1 << 40), (1 << 50,)):
        require_shape(shape, "it")
    for shape in ((0, 1 << 51), (1 << 40, 0, 1 << 40)):
        with pytest.raises(WrongError, match="no array can have"):
            require_shape(shape, "it")

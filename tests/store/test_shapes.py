"""A store whose manifest is sound and whose tensors, values or attributes are not those of its kernels."""

import dataclasses

import pytest

import offramp
from offramp.backends.onnx import OnnxBackend
from offramp.errors import DamagedError, StoreError
from offramp.program.program import BATCH, Value
from offramp.store import Store
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


def swapped(manifest):
    step = manifest.program.stages[1].steps[0]
    weights = {**step.weights, "norm.weight": step.weights["q.weight"]}
    return with_step(manifest, 1, 0, weights=weights)


ATTACKS = {
    "transposed": (lambda m: with_tensor(m, "layer-00-up", "up.weight", shape=(32, 64)), "layer.0, up: up.weight"),
    "narrow": (lambda m: with_tensor(m, "layer-00-up", "up.bias", dtype="F16", shape=(128,)), "up.bias is ('F16'"),
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
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_kernel_that_gets_other_than_it_takes_is_named(path, attack):
    spoil, mention = ATTACKS[attack]
    manifest = loads((path / "offramp.json").read_bytes())
    refused(DamagedError, lambda: loads(dumps(spoil(manifest))), mention)


def test_graphs_of_another_model_are_refused(path, tmp_path):
    write_model(tmp_path / "model", config_of(hidden_size=64))
    offramp.divide(tmp_path / "model", tmp_path / "other")
    with Store(path) as store, Store(tmp_path / "other") as other:
        store.read_file, own = other.read_file, store.manifest
        store.manifest = dataclasses.replace(own, graphs=other.manifest.graphs)
        with pytest.raises(StoreError, match="takes other weights than its kernel"):
            OnnxBackend(store, 1)

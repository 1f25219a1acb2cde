"""A store whose manifest is sound and whose tensors are not those of its encoder."""

import dataclasses

import pytest
from offramp.store.shapes import require_fitting

import offramp
from offramp.backends import OrtBackend
from offramp.errors import StoreError
from offramp.store import Step, Store
from tests.division.tiny import config_of, write_model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_model(folder / "model")
    return offramp.divide(folder / "model", folder / "store")


def with_tensor(manifest, shard, wanted, also=False, **changes):
    old = manifest.shards[shard].tensors
    tensors = [dataclasses.replace(each, **changes) if each.role == wanted else each for each in old]
    return with_tensors(manifest, shard, [*old, *(each for each in tensors if each not in old)] if also else tensors)


def without_tensor(manifest, shard, role):
    return with_tensors(manifest, shard, [each for each in manifest.shards[shard].tensors if each.role != role])


def with_tensors(manifest, shard, tensors):
    spoilt = dataclasses.replace(manifest.shards[shard], tensors=tuple(tensors))
    return dataclasses.replace(manifest, shards={**manifest.shards, shard: spoilt})


def with_steps(manifest, change):
    stages = [dataclasses.replace(each, steps=change(each.steps)) for each in manifest.stages]
    return dataclasses.replace(manifest, stages=tuple(stages))


ATTACKS = {
    "transposed": (lambda m: with_tensor(m, "layer-00-up", "up.weight", shape=(1, 2)), "stage layer.0, up: up.weight"),
    "narrow": (lambda m: with_tensor(m, "layer-00-up", "up.bias", dtype="F16"), "up.bias is ('F16'"),
    "renamed": (lambda m: with_tensor(m, "layer-00-up", "up.bias", role="up.other"), "up.bias is None"),
    "missing": (lambda m: without_tensor(m, "layer-01-down", "norm.bias"), "layer.1, down: norm.bias is None"),
    "extra": (
        lambda m: with_tensor(m, "layer-00-up", "up.bias", role="up.other", also=True),
        "layer.0, up: up.other is ('F32', (64,)), the encoder promises None",
    ),
    "labels": (
        lambda m: dataclasses.replace(m, encoder=dataclasses.replace(m.encoder, labels=("a", "b", "c"))),
        "stage head, head: out.bias",
    ),
    "kind": (
        lambda m: with_steps(m, lambda steps: tuple(Step("up", each.shards) for each in steps)),
        "stage embedding has the steps ('up',)",
    ),
    "order": (lambda m: with_steps(m, lambda steps: steps[::-1]), "stage layer.0 has the steps ('down', 'up'"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_the_encoder_does_not_promise_is_named(path, attack):
    spoil, mention = ATTACKS[attack]
    with Store(path) as store:
        require_fitting(store.manifest, path)
        store.contents = spoil(store.manifest)
        with pytest.raises(StoreError) as refused:
            OrtBackend(store, 1)
    assert mention in str(refused.value)


def test_graphs_of_another_model_are_refused(path, tmp_path):
    write_model(tmp_path / "model", config_of(hidden_size=64))
    offramp.divide(tmp_path / "model", tmp_path / "other")
    with Store(path) as store, Store(tmp_path / "other") as other:
        store.read_file, own = other.read_file, store.manifest
        store.contents = dataclasses.replace(own, graphs=other.manifest.graphs)
        with pytest.raises(StoreError, match="takes other weights than the encoder promises"):
            OrtBackend(store, 1)

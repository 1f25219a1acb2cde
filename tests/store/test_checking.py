import hashlib
import random
import shutil

import pytest

from offramp.errors import StoreError
from offramp.store import verify
from tests.store.small import flip, problems, refused, reseal, tree_of
from tests.store.test_safetensors import BAD_FILES, file_of


def test_a_sound_store(pristine):
    checks = list(verify(pristine))
    files = {str(path.relative_to(pristine)) for path in pristine.rglob("*") if path.is_file()}
    assert {check.file for check in checks} == files - {"offramp.json"}
    assert [check.file for check in checks[:2]] == ["rows.safetensors", "norm.safetensors"]
    assert all(check.problem is None for check in checks)
    assert all(check.bytes == (pristine / check.file).stat().st_size for check in checks)


def test_every_flipped_bit_of_any_file_is_found(store):
    """Three hundred at random, in every file, header and data."""
    draw = random.Random(0)
    files = sorted(path for path in store.rglob("*") if path.is_file())
    missed = []
    for _ in range(300):
        path = draw.choice(files)
        bit = draw.randrange(8 * path.stat().st_size)
        flip(path, bit)
        if not found(store):
            missed.append((path.name, bit))
        flip(path, bit)
    assert missed == []
    assert not found(store)


def found(store):
    try:
        return problems(store)
    except StoreError as error:
        assert error.exit_code == 4
        return True


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_shard_that_the_manifest_swears_to(store, name):
    """Size and digest are those of the bad file, and the manifest is sealed: only the header gives it away."""
    data, _ = BAD_FILES[name]
    tree = tree_of(store)
    (shard,) = (shard for shard in tree["shards"] if shard["name"] == "layer-00")
    tree["program"]["stages"][1]["steps"][0].update(weights={}, shards=[])  # else the manifest itself is refused
    (store / shard["file"]).write_bytes(data)
    shard.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    if len(data) >= 4096:  # else there is no place where its data could begin, and the manifest itself is refused
        shard.update(data_start=4096)
        shard["tensors"][:] = [{**shard["tensors"][0], "dtype": "U8", "shape": [len(data) - 4096]}]
    reseal(store, tree)
    if len(data) < 4096:
        refused(StoreError, lambda: list(verify(store)), "data_start")
    else:
        assert problems(store).keys() == {shard["file"]}


@pytest.mark.parametrize(
    "change",
    [
        {"b": ("F32", (1, 1)), "a": ("F32", (2,))},
        {"a": ("F32", (2,)), "c": ("F32", (1, 1))},
        {"a": ("F32", (2,)), "b": ("F32", (1,))},
        {"a": ("I32", (2,)), "b": ("F32", (1, 1))},
        {"a": ("F32", (3,))},
    ],
)
def test_a_shard_that_holds_other_tensors_than_the_manifest(store, change):
    tree = tree_of(store)
    (shard,) = (shard for shard in tree["shards"] if shard["name"] == "layer-00")
    tree["program"]["stages"][1]["steps"][0].update(weights={}, shards=[])  # else the manifest itself is refused
    tensors = {"a": ("F32", (2,)), "b": ("F32", (1, 1))}
    for held in (tensors, change):
        data = file_of(held)
        (store / shard["file"]).write_bytes(data)
        shard.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), data_start=4096)
        shard["tensors"] = [
            {"name": "a", "role": "a", "dtype": "F32", "shape": [2], "offset": 0},
            {"name": "b", "role": "b", "dtype": "F32", "shape": [1, 1], "offset": 8},
        ]
        reseal(store, tree)
        says = problems(store)
        if held is tensors:
            assert says == {}
    assert says.keys() == {shard["file"]}
    assert "tensors differ from the manifest" in says[shard["file"]]


def test_what_it_says_can_be_printed(store):
    """The names in a header are a stranger's."""
    tree = tree_of(store)
    (shard,) = (shard for shard in tree["shards"] if shard["name"] == "norm")
    data = file_of({"\x1b[31m\nred": ("F32", (16,))})
    (store / shard["file"]).write_bytes(data)
    shard.update(sha256=hashlib.sha256(data).hexdigest())
    reseal(store, tree)
    (problem,) = problems(store).values()
    assert problem.isprintable()
    assert r"\x1b[31m\nred" in problem


def test_damage_does_not_hide_other_damage(store):
    flip(store / "norm.safetensors", 8 * 4100)
    (store / "layer-00.safetensors").unlink()
    shutil.rmtree(store / "graphs")
    graphs = {f"graphs/{kind}.onnx" for kind in ("embedding", "layer", "head", "exit")}
    assert problems(store).keys() == {"norm.safetensors", "layer-00.safetensors"} | graphs

"""Stores of int8: integers, scales and names in them, and what cannot be divided so."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import offramp
from offramp.checkpoints.source import open_source
from offramp.division import divide
from offramp.division.names.narrow import exact_inputs, quantise
from offramp.errors import DamagedError, SourceError, StageError
from offramp.program.narrow import LARGEST_PAIR, LARGEST_WEIGHT, hadamard, rotation_of
from offramp.store import Store, verify
from tests.division.tiny import CONFIGS, config_of, write_model, write_sharded
from tests.selection import examples
from tests.store.small import problems, read, refused, reprogrammed

PREFIX = "offramp-int8."
NONE = np.empty(0, np.int64)
"""No exact inputs."""


def arrays_of(store, shard):
    """role -> array of a shard."""
    entry, data = store.manifest.shards[shard], read(store, shard)
    dtypes = {"I8": np.int8, "F16": np.float16, "F32": np.float32, "I64": np.int64}
    return {
        each.role: np.frombuffer(data, dtypes[each.dtype], int(np.prod(each.shape)), entry.data_start + each.offset)
        .reshape(each.shape)
        for each in entry.tensors
    }  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    tensors = write_model(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    heads = {"exit.1.weight": np.ones((2, 32), np.float32), "exit.1.bias": np.zeros(2, np.float32)}
    save_file(heads, folder / "exits.safetensors")
    (folder / "exits.json").write_text('{"form": "mean-linear", "exits": [1], "trained": true}')
    return folder, tensors


@pytest.fixture(scope="module")
def divided(model, tmp_path_factory):
    return divide(model[0], tmp_path_factory.mktemp("stores") / "store", dtype="int8")


def same(one, other):
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names if (one / name).is_file()
    )


def pair_sums(integers_IO):
    """Magnitudes of the integers of neighbouring inputs, together, [pairs, O]."""
    magnitudes_IO = np.abs(integers_IO.astype(int))
    return np.add.reduceat(magnitudes_IO, range(0, len(magnitudes_IO), 2), axis=0)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_integers_are_the_nearest_to_each_weight(tmp_path, model_type):
    tensors, rotation = write_model(tmp_path / "model", config_of(model_type)), np.array(hadamard(32))
    with Store(divide(tmp_path / "model", tmp_path / "store", dtype="int8")) as store:
        names = {tensor.name for tensor in store.manifest.tensors().values() for tensor in tensor[:1]}
        assert names == set(store.manifest.shards)
        for shard in (name for name in names if name.startswith("layer")):
            found = arrays_of(store, shard)
            by_role = {each.role: each.name for each in store.manifest.shards[shard].tensors}
            for role in (role.removesuffix(".scale") for role in found if role.endswith(".scale")):
                weight_OI = tensors[by_role[f"{role}.scale"].removeprefix(PREFIX).removesuffix(".scale")].copy()
                if role in ("q", "k", "v", "up"):  # rows of 32 elements
                    weight_OI = weight_OI @ rotation
                if role == "down":
                    chosen = np.sort(np.argsort(-np.abs(weight_OI).max(axis=0), kind="stable")[:4])
                    assert np.array_equal(found["down.channels"], chosen)
                    assert np.array_equal(found["down.exact"], weight_OI[:, chosen].T)
                    weight_OI[:, chosen] = 0
                integers_IO, scale_O = found[f"{role}.weight"], found[f"{role}.scale"]
                assert set(pair_sums(integers_IO).max(axis=0)) <= {LARGEST_PAIR - 2, LARGEST_PAIR - 1, LARGEST_PAIR}
                pairs_O = pair_sums_of_floats(weight_OI).max(axis=0)
                np.testing.assert_allclose(scale_O, pairs_O / (LARGEST_PAIR - 1), rtol=1e-6)
                steps_OI = weight_OI / scale_O[:, None]
                assert np.abs(integers_IO.T - steps_OI).max() < 0.5001
                assert by_role[f"{role}.weight"] + ".scale" == by_role[f"{role}.scale"]
                bias = f"{role}.bias"
                assert np.array_equal(found[bias], tensors[by_role[bias].removeprefix(PREFIX)])
        rows = arrays_of(store, "embedding-rows")
        for tensor in store.manifest.shards["embedding-rows"].tensors:
            assert np.array_equal(rows[tensor.role], tensors[tensor.name.removeprefix(PREFIX)].astype(np.float16))


def pair_sums_of_floats(weight_OI):
    return np.add.reduceat(np.abs(weight_OI.T), range(0, weight_OI.shape[1], 2), axis=0)


@settings(max_examples=examples(60), deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 40), st.sampled_from([1e-44, 1e-39, 1e-3, 1.0, 1e33]), st.integers(0, 1 << 30),
    st.sampled_from([1, 2, 4]), st.integers(0, 5),
)  # fmt: skip
def test_neighbours_never_exceed_their_limit(outputs, inputs, magnitude, seed, rotation, number):
    """Whatever the weights, in chunks of any size: else sums would saturate on some processors."""
    rng = np.random.default_rng(seed)
    inputs *= rotation
    weight_OI = (rng.standard_normal((outputs, inputs)) ** 5 * magnitude).astype(np.float32)
    weight_OI[rng.random(weight_OI.shape) < 0.2] = 0
    chunks = np.array_split(weight_OI.reshape(-1), rng.integers(1, 6))
    exact_K = exact_inputs(chunks, inputs, number)
    found = quantise("w", chunks, weight_OI.shape, None, rotation, exact_K)
    assert pair_sums(found.integers_OI.T).max() <= LARGEST_PAIR and np.isfinite(found.scale_O).all()
    assert not found.integers_OI[:, exact_K].any() and len(exact_K) == min(number, inputs)
    turned_OI = (weight_OI.reshape(-1, rotation) @ np.array(hadamard(rotation))).reshape(weight_OI.shape)
    np.testing.assert_allclose(found.exact_KO.T, turned_OI[:, exact_K], rtol=1e-4, atol=magnitude * 1e-4 + 1e-44)
    if magnitude > 1e-30:
        kept_OI = found.integers_OI * found.scale_O[:, None].astype(float)
        turned_OI[:, exact_K] = 0
        assert (np.abs(kept_OI - turned_OI) <= found.scale_O[:, None] * 0.501).all()


@pytest.mark.parametrize("inputs", [32, 64, 312, 384])
def test_integers_do_not_depend_on_the_size_of_chunks(inputs):
    weight_OI = np.random.default_rng(0).standard_normal((40, inputs)).astype(np.float32)
    whole, *others = (
        quantise("w", np.array_split(weight_OI.reshape(-1), parts), weight_OI.shape, None, rotation_of(inputs), NONE)
        for parts in (1, 3, 7, 40)
    )
    for other in others:
        assert all(np.array_equal(one, same) for one, same in zip(whole, other, strict=True))


def test_the_same_weights_give_the_same_store(model, divided, tmp_path, monkeypatch):
    """Of one file or several, in chunks of any size, from a model folder or from its fp32 store."""
    write_sharded(tmp_path / "sharded")
    full = divide(model[0], tmp_path / "full")
    monkeypatch.setattr("offramp.division.names.build.CHUNK_BYTES", 1000)
    for number, folder in enumerate([tmp_path / "sharded", full, model[0]]):
        other = divide(folder, tmp_path / f"store-{number}", dtype="int8")
        for path in divided.glob("*.safetensors"):
            if path.name != "exits.safetensors" or folder.name != "sharded":
                assert (other / path.name).read_bytes() == path.read_bytes(), (folder, path.name)
    assert same(tmp_path / "store-1", divided) and same(tmp_path / "store-2", divided)


def test_everything_else_travels(model, divided):
    files = {path.name for path in divided.iterdir()}
    assert {"vocab.txt", "exits.safetensors", "exits.json", "labels.json", "config.json"} <= files
    assert "model.safetensors.index.json" not in files
    assert (divided / "exits.safetensors").read_bytes() == (model[0] / "exits.safetensors").read_bytes()
    assert json.loads((divided / "config.json").read_text())["quantization_config"] == {"offramp": "int8"}
    assert all(check.problem is None for check in verify(divided))
    with Store(divided) as store:
        assert store.manifest.precision == "int8" and store.manifest.upcast == {
            each.name for each in store.manifest.shards["embedding-rows"].tensors
        }


def test_heads_of_other_tasks_are_left_out(tmp_path):
    tensors = write_model(tmp_path / "model")
    save_file({**tensors, "cls.a": np.zeros(3, np.float32)}, tmp_path / "model" / "model.safetensors")
    said = []
    store = divide(tmp_path / "model", tmp_path / "store", dtype="int8", say=said.append)
    assert not (store / "other.safetensors").exists() and any("1 tensors left out" in line for line in said)


LOADERS = (transformers.AutoModel, transformers.AutoModelForSequenceClassification, transformers.BertModel)


@pytest.mark.parametrize("loader", LOADERS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("name", [None, "model.safetensors", "pytorch_model.bin"])
def test_transformers_does_not_load_integers_as_floats(divided, tmp_path, loader, name):
    """Nor where a shard is renamed to the name that it looks for."""
    folder = shutil.copytree(divided, tmp_path / "copy")
    if name is not None:
        (folder / "layer-00-attention.safetensors").rename(folder / name)
    for options in ({}, {"ignore_mismatched_sizes": True}, {"dtype": torch.float16}):
        with pytest.raises(ValueError, match="quantization config"):
            loader.from_pretrained(folder, **options)


def test_no_name_in_it_is_that_of_a_weight(divided):
    config = transformers.AutoConfig.from_pretrained(divided)
    assert config.quantization_config == {"offramp": "int8"}
    names = transformers.BertForSequenceClassification(config).state_dict().keys()
    for path in divided.glob("*.safetensors"):
        assert names.isdisjoint(load_file(path))


def test_channels_of_zeros_have_the_scale_zero(tmp_path):
    tensors = write_model(tmp_path / "model")
    (name,) = (each for each in tensors if each.endswith("layer.0.attention.output.dense.weight"))
    tensors[name][3], tensors[name][5] = 0, 1e-44
    tensors[name][5, 0] = -2.0
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with Store(divide(tmp_path / "model", tmp_path / "store", dtype="int8")) as store:
        found = arrays_of(store, "layer-00-attention")
    assert found["o.scale"][3] == 0 and not found["o.weight"][:, 3].any()
    assert found["o.weight"][0, 5] == -LARGEST_WEIGHT and not found["o.weight"][1:, 5].any()


def test_halves_round_to_even_and_tiny_weights_stay_in_range(tmp_path):
    tensors = write_model(tmp_path / "model")
    (name,) = (each for each in tensors if each.endswith("layer.0.attention.output.dense.weight"))
    tensors[name][:] = 0
    tensors[name][0, :8] = np.array([127, 0, 0.5, 1.5, -2.5, 63.5, -64, 63]) * 2.0**-9
    tensors[name][1, :2] = 1e-44, -2e-45
    tensors[name][2, :2] = 3e38, 1e38
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with Store(divide(tmp_path / "model", tmp_path / "store", dtype="int8")) as store:
        integers_IO = arrays_of(store, "layer-00-attention")["o.weight"]
    assert integers_IO[:8, 0].tolist() == [127, 0, 0, 2, -2, 64, -64, 63]
    assert pair_sums(integers_IO).max() <= LARGEST_PAIR
    assert integers_IO[:2, 2].tolist() == [95, 32]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["layer.1.output.dense.weight", "word_embeddings.weight", "layer.0.output.LayerNorm.bias"]
)
def test_numbers_that_have_no_integer_are_refused_by_name(tmp_path, value, name):
    tensors = write_model(tmp_path / "model")
    found = next(each for each in tensors if each.endswith(name) and "attention" not in each)
    tensors[found].reshape(-1)[7] = value
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match="NaN or infinite") as caught:
        divide(tmp_path / "model", tmp_path / "store", dtype="int8")
    assert found in str(caught.value)


def test_finite_numbers_whose_rotation_is_not_are_refused_as_such(tmp_path):
    tensors = write_model(tmp_path / "model")
    (name,) = (each for each in tensors if each.endswith("layer.1.attention.self.key.weight"))
    tensors[name][5] = -3e38
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"has values up to 3e\+38, whose sums are beyond.*--dtype fp32") as caught:
        divide(tmp_path / "model", tmp_path / "store", dtype="int8")
    assert name in str(caught.value)


def test_an_int8_store_is_no_source(divided, tmp_path):
    for dtype in ("fp32", "fp16", "int8"):
        with pytest.raises(SourceError, match="no checkpoint: its matrices are integers"):
            divide(divided, tmp_path / "store", dtype=dtype)
    renamed = shutil.copytree(divided, tmp_path / "renamed")
    (renamed / "layer-00-attention.safetensors").rename(renamed / "model.safetensors")
    with pytest.raises(SourceError, match=r"quantised \(int8\)"):
        divide(renamed, tmp_path / "store")


def test_what_has_no_matrix_product_is_refused(tmp_path):
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()).eval()
    with pytest.raises(StageError, match="no matrix product can have integer weights"):
        offramp.divide(layers, torch.zeros(2, 3, 8, 8), tmp_path / "store", dtype="int8")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=2)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    with pytest.raises(StageError, match="no matrix product can have integer weights"):
        offramp.divide(tmp_path / "resnet", tmp_path / "store", dtype="int8")


def test_a_store_is_a_source_like_the_model_it_came_from(model, tmp_path):
    full = divide(model[0], tmp_path / "full")
    with open_source(full) as store, open_source(model[0]) as folder:
        assert store.entries == folder.entries


def swap_ports(tree):
    for stage in tree["program"]["stages"]:
        for step in stage["steps"]:
            taken = step["weights"]
            if "q.scale" in taken:
                taken["q.weight"], taken["q.scale"] = taken["q.scale"], taken["q.weight"]


def tensors(tree, role):
    return [each for shard in tree["shards"] for each in shard["tensors"] if each["role"] == role]


def unsigned(tree):
    for each in tensors(tree, "up.weight"):
        each["dtype"] = "U8"


def without_transposing(tree):
    for each in tensors(tree, "up.weight"):
        each["shape"].reverse()


def in_full(tree):
    kernel = tree["program"]["kernels"]["up"]
    kernel["template"] = "up"
    del kernel["attributes"]["rotation"]


def set_to(kernel, name, value):
    def change(tree):
        tree["program"]["kernels"][kernel]["attributes"][name] = value

    return change


def without_exact(tree):
    del tree["program"]["kernels"]["down"]["attributes"]["exact"]


@pytest.mark.parametrize(
    ("change", "mentions"),
    [
        (swap_ports, "q.scale is ('I8', (32, 32)), the kernel takes ('F32', (32,))"),
        (unsigned, "up.weight is ('U8', (32, 64)), the kernel takes ('I8', (32, 64))"),
        (without_transposing, "up.weight is ('I8', (64, 32)), the kernel takes ('I8', (32, 64))"),
        (in_full, "up.scale is ('F32', (64,)), the kernel takes None"),
        (set_to("up", "rotation", 64), "rotation is 64"),
        (set_to("up", "rotation", 3), "rotation is 3"),
        (set_to("attention", "rotation", 1 << 40), "rotation is"),
        (set_to("down", "rotation", 32), "takes the attributes"),
        (set_to("down", "exact", 0), "exact is 0"),
        (set_to("down", "exact", 17), "exact is 17"),
        (set_to("down", "exact", 3), "down.channels is ('I64', (4,)), the kernel takes ('I64', (3,))"),
        (without_exact, "down.channels is ('I64', (4,)), the kernel takes None"),
    ],
)
def test_a_store_whose_parts_do_not_fit_is_refused(divided, tmp_path, change, mentions):
    folder = reprogrammed(divided, tmp_path / "copy", change)
    refused(DamagedError, lambda: Store(folder), mentions)


def test_integers_or_scales_that_were_changed_in_the_file_are_found(divided, tmp_path):
    folder = shutil.copytree(divided, tmp_path / "copy")
    with Store(divided) as store:
        shard = store.manifest.shards["layer-00-attention"]
    places = {each.role: shard.data_start + each.offset for each in shard.tensors}
    data = bytearray((folder / shard.file).read_bytes())
    for kind, size in (("weight", 32 * 32), ("scale", 32 * 4)):
        one, other = places[f"q.{kind}"], places[f"k.{kind}"]
        data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]
        (folder / shard.file).write_bytes(data)
        assert problems(folder) == {shard.file: "sha256 differs from the manifest"}
        with Store(folder) as store:
            refused(DamagedError, lambda store=store: read(store, "layer-00-attention"), "sha256 differs")

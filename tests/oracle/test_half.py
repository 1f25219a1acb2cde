"""An fp16 store gives the answers of an fp32 store of the same rounded weights, bit for bit."""

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

import offramp
from offramp.checkpoints.exits import ModelWithExits
from offramp.errors import SourceError, UsageError
from offramp.store import Store, verify
from offramp.store.exits import describe_exits
from tests.oracle.tiny import BACKENDS, Case, Way, logits, make_batch, make_model, run, streamed_shards

CASES = (Case("bert"), Case("roberta", "gelu_new"), Case("electra", embedding_size=32))
LENGTHS = [31, 9, 16, 2]


def is_narrow(name, array):
    """Matrices of layers and tables; the projection of an embedding and heads stay as they are."""
    return array.ndim == 2 and (".layer." in name or name.endswith("embeddings.weight"))


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """case -> (model, fp16 store, fp32 store of the same rounded weights, a batch)."""
    made = {}

    def make(case):
        if case not in made:
            folder, model = tmp_path_factory.mktemp("half"), make_model(case.config())
            model.save_pretrained(folder / "model")
            model.save_pretrained(folder / "rounded")
            file = folder / "rounded" / "model.safetensors"
            tensors = load_file(file)
            for name, array in tensors.items():
                if is_narrow(name, array):
                    tensors[name] = array.astype(np.float16).astype(np.float32)
            save_file(tensors, file, {"format": "pt"})
            half = offramp.divide(folder / "model", folder / "half", dtype="fp16")
            made[case] = (
                model,
                half,
                offramp.divide(folder / "rounded", folder / "full"),
                make_batch(model.config, LENGTHS),
            )
        return made[case]

    return make


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_are_those_of_the_rounded_weights_bit_for_bit(divided, case, backend):
    _, half, full, batch = divided(case)
    resident = frozenset(streamed_shards(half)[::2])
    ways = [Way(), Way(residents=resident, num_slots=3, verify="always"), Way(reads="direct", verify="never")]
    wanted = logits(full, batch, backend=backend)
    for way in ways:
        assert np.array_equal(logits(half, batch, way, backend=backend), wanted), way


def test_matrices_take_half_the_bytes_on_disk_and_all_of_them_in_memory(divided):
    _, half, full, _ = divided(CASES[0])
    with Store(half) as narrow, Store(full) as wide:
        for name, shard in narrow.manifest.shards.items():
            other, layout = wide.manifest.shards[name], narrow.manifest.layouts[name]
            for tensor in shard.tensors:
                assert tensor.dtype == (
                    "F16" if len(tensor.shape) == 2 and name not in ("embedding", "head") else "F32"
                )
                assert layout.tensors[tensor.name].dtype == ("F16" if shard.blocks else "F32")
            if name.startswith("layer"):
                assert shard.bytes - shard.data_start < 0.6 * (other.bytes - other.data_start)
                assert layout.num_bytes >= other.bytes - other.data_start
    assert all(check.problem is None for check in verify(half))


def test_halves_that_two_threads_read_are_put_together(tmp_path, monkeypatch):
    monkeypatch.setattr("offramp.store.reader.READ_CHUNK_BYTES", 4096)
    monkeypatch.setattr("offramp.store.upcasting.STAGING_BYTES", 4096)
    make_model(CASES[0].config()).save_pretrained(tmp_path / "model")
    path = offramp.divide(tmp_path / "model", tmp_path / "store", dtype="fp16")
    wanted = load_file(tmp_path / "model" / "model.safetensors")
    with Store(path, "never") as store:
        for name in streamed_shards(path):
            layout = store.manifest.layouts[name]
            for options in ({}, {"halves": True}, {"direct": True}):
                pages = np.zeros(layout.num_bytes + 2 * 4096, np.uint8)
                buffer = pages[-pages.ctypes.data % 4096 :][: layout.num_bytes + 4096]
                try:
                    assert store.read_shard(name, buffer.data, **options) == (store.manifest.shards[name].bytes, True)
                except OSError:
                    assert options == {"direct": True}
                    continue
                for tensor in layout.tensors.values():
                    found = (
                        buffer[layout.start + tensor.offset :][: tensor.num_bytes]
                        .view(np.float32)
                        .reshape(tensor.shape)
                    )
                    array = wanted[tensor.name]
                    rounded = array.astype(np.float16).astype(np.float32) if is_narrow(tensor.name, array) else array
                    assert np.array_equal(found, rounded), (name, tensor.name, options)


@pytest.mark.parametrize("source", ["F16", "F64", "fp32 store", "fp16 store"])
def test_every_source_gives_the_same_rounded_weights(divided, tmp_path, source):
    _, half, full, batch = divided(CASES[0])
    folder = {"fp32 store": full, "fp16 store": half}.get(source)
    if folder is None:
        folder = half.parent / "rounded"
        tensors = load_file(folder / "model.safetensors")
        dtype = {"F16": np.float16, "F64": np.float64}[source]
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_bytes((folder / "config.json").read_bytes())
        stored = {name: array.astype(dtype) for name, array in tensors.items() if is_narrow(name, array)}
        save_file({**tensors, **stored}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
        folder = tmp_path / "model"
    store = offramp.divide(folder, tmp_path / "store", dtype="fp16")
    assert np.array_equal(logits(store, batch), logits(full, batch))
    back = offramp.divide(store, tmp_path / "back")
    assert np.array_equal(logits(back, batch), logits(full, batch))


def test_exits_and_heads_stay_in_full(tmp_path):
    model = ModelWithExits(make_model(Case("bert").config()), "own").eval()
    model.model.save_pretrained(tmp_path / "model")
    save_torch(model.exit_tensors(), tmp_path / "model" / "exits.safetensors")
    (tmp_path / "model" / "exits.json").write_bytes(describe_exits("own", 3))
    half = offramp.divide(tmp_path / "model", tmp_path / "half", dtype="fp16")
    full = offramp.divide(tmp_path / "model", tmp_path / "full")
    assert (half / "exits.safetensors").read_bytes() == (full / "exits.safetensors").read_bytes()
    assert (half / "head.safetensors").read_bytes() == (full / "head.safetensors").read_bytes()
    batch = make_batch(model.model.config, LENGTHS)
    (outcomes,) = run(half, [batch], exit="stage:1")
    assert [outcome.exit_stage for outcome in outcomes] == [1] * len(LENGTHS)


@pytest.mark.parametrize("keyword", [None, torch.float16, torch.float32])
def test_transformers_loads_the_rounded_weights(divided, keyword):
    _, half, full, _ = divided(CASES[0])
    options = {} if keyword is None else {"dtype": keyword}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(half, **options)
    wanted = transformers.AutoModelForSequenceClassification.from_pretrained(full, **options)
    for (name, found), other in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert found.dtype == other.dtype and torch.equal(found, other), name


@pytest.mark.parametrize("value", [65520.0, -1e30, np.inf, np.nan])
@pytest.mark.parametrize("name", ["word_embeddings.weight", "layer.1.output.dense.weight", "layer.0.output.dense.bias"])
def test_numbers_that_have_no_half_are_refused_by_name(tmp_path, value, name):
    make_model(CASES[0].config()).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    (found,) = (each for each in tensors if each.endswith(name) and "attention" not in each)
    tensors[found].reshape(-1)[-1] = value
    save_file(tensors, file, {"format": "pt"})
    if name.endswith("bias") and np.isfinite(value):
        offramp.divide(tmp_path / "model", tmp_path / "store", dtype="fp16")
        return
    with pytest.raises(SourceError) as caught:
        offramp.divide(tmp_path / "model", tmp_path / "store", dtype="fp16")
    assert found in str(caught.value)
    assert ("--dtype fp32" in str(caught.value)) == np.isfinite(value)
    assert not (tmp_path / "store").exists()


def test_numbers_at_the_edges_round_to_even(tmp_path):
    make_model(CASES[0].config()).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    (name,) = (each for each in tensors if each.endswith("layer.0.output.dense.weight") and "attention" not in each)
    edges = np.array([65519.996, -65504, 2049, 2051, 2.0**-24, 2.0**-25, 3 * 2.0**-26, -0.0, 1e-40], np.float32)
    tensors[name].reshape(-1)[: len(edges)] = edges
    save_file(tensors, file, {"format": "pt"})
    path = offramp.divide(tmp_path / "model", tmp_path / "store", dtype="fp16")
    with Store(path) as store:
        shard, _ = store.manifest.tensors()[name]
        layout = store.manifest.layouts[shard.name]
        buffer = np.zeros(layout.num_bytes, np.uint8)
        store.read_shard(shard.name, buffer.data)
        found = buffer[layout.tensors[name].offset :].view(np.float32)[: len(edges)]
    wanted = np.array([65504, -65504, 2048, 2052, 2.0**-24, 0, 2.0**-24, -0.0, 0], np.float32)
    assert found.tobytes() == wanted.tobytes()


def test_only_text_encoders_by_names_have_narrow_stores(divided, tmp_path):
    _, _, full, _ = divided(CASES[0])
    for options in ({"method": "eager"}, {"method": "export"}):
        with pytest.raises(UsageError, match="divided by the names of their tensors"):
            offramp.divide(full, tmp_path / "store", dtype="fp16", **options)
    with pytest.raises(UsageError, match="it is a module"):
        offramp.divide(torch.nn.Linear(2, 2), torch.zeros(1, 2), tmp_path / "store", dtype="fp16")
    gpt = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=8)
    transformers.GPT2LMHeadModel(gpt).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UsageError, match="BERT family"):
        offramp.divide(tmp_path / "gpt2", tmp_path / "store", dtype="fp16")
    with pytest.raises(ValueError, match="dtype must be one of"):
        offramp.divide(full, tmp_path / "store", dtype="fp8")


def test_a_build_of_another_dtype_is_not_resumed(tmp_path):
    make_model(CASES[0].config()).save_pretrained(tmp_path / "model")

    def stop(line):
        if line.startswith("layer-01-up"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        offramp.divide(tmp_path / "model", tmp_path / "store", say=stop)
    assert (tmp_path / "store.partial" / "layer-00-up.safetensors").exists()
    store = offramp.divide(tmp_path / "model", tmp_path / "store", dtype="fp16")
    clean = offramp.divide(tmp_path / "model", tmp_path / "clean", dtype="fp16")
    assert {path.name: path.read_bytes() for path in store.glob("*.*")} == {
        path.name: path.read_bytes() for path in clean.glob("*.*")
    }

"""A store is still a checkpoint of transformers: loaded in silence, with every weight as it was."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import offramp
from offramp.store import Store
from tests.oracle.tiny import CASES, Case, ask_transformers, logits, make_batch, make_model


def bits(model):
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def shard_digests(store):
    with Store(store) as opened:
        return {name: shard.sha256 for name, shard in opened.manifest.shards.items()}


@pytest.fixture
def said():
    """What transformers logs, from warnings up."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transformers_loads_a_store_silently_and_bit_for_bit(divided, case, said):
    one = divided(case)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(one.store, output_loading_info=True)
    assert said == []
    assert not any(info.values()), info
    assert bits(loaded) == bits(one.model)
    batch = make_batch(one.model.config, [17, 5, 11])
    theirs, ours = ask_transformers(one.model, batch), ask_transformers(loaded.eval(), batch)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", [Case("bert"), Case("electra", embedding_size=32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_narrow_checkpoint_is_widened_exactly(tmp_path, case, dtype, said):
    narrow = make_model(case.config()).to(dtype)
    narrow.save_pretrained(tmp_path / "model")
    messages = []
    store = offramp.divide(tmp_path / "model", tmp_path / "store", say=messages.append)
    assert f"converted from {'F16' if dtype == torch.float16 else 'BF16'} to F32" in messages
    loaded = AutoModelForSequenceClassification.from_pretrained(store)
    assert said == [] and loaded.dtype == torch.float32
    wide = narrow.float()
    assert bits(loaded) == bits(wide)
    batch = make_batch(wide.config, [9, 14])
    np.testing.assert_array_equal(logits(store, batch, backend="torch"), ask_transformers(wide, batch))


def as_sharded(model, source, folder):
    model.save_pretrained(folder, max_shard_size="50KB")
    assert (folder / "model.safetensors.index.json").exists()


def as_pickle(model, source, folder):
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    shutil.copy(source / "config.json", folder)


def as_sharded_pickle(model, source, folder):
    weights, weight_map = model.state_dict(), {}
    for number, name in enumerate(weights):
        weight_map[name] = f"pytorch_model-{number % 2 + 1:05d}-of-00002.bin"
    for file in set(weight_map.values()):
        torch.save({name: weights[name] for name in weights if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copy(source / "config.json", folder)


@pytest.mark.parametrize("save", [as_sharded, as_pickle, as_sharded_pickle])
def test_every_form_of_a_checkpoint_gives_the_same_shards(divided, tmp_path, save):
    one = divided(Case("bert"))
    (tmp_path / "model").mkdir()
    save(one.model, one.source, tmp_path / "model")
    store = offramp.divide(tmp_path / "model", tmp_path / "store")
    assert shard_digests(store) == shard_digests(one.store)

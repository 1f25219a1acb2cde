"""Stores cut into blocks: every number of the source once, refused by transformers, and whole in every other way."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from offramp.cli import main
from offramp.division import config, divide
from offramp.division.names import build
from offramp.division.names.build import INDEX, cut_division, plan_division
from offramp.errors import UsageError
from offramp.program.dtypes import DTYPES
from offramp.store import Store
from offramp.store.reader import tensor_view
from tests.division.tiny import config_of, entries_of, write_model
from tests.store.small import problems, read
from tests.store.test_writer import tree_bytes
from tests.tiny_families import write_classifier

BLOCK = 3000  # of tensors of 32 x 32 to 64 x 32 floats


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(config, "LEAST_BLOCK_BYTES", 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    write_model(folder, config_of(hidden_size=48, intermediate_size=80))
    return folder


def held(store):
    """Name of a tensor of the source -> its parts, put together in the order of their rows."""
    found = {}
    with Store(store) as opened:
        for shard in opened.manifest.shards.values():
            buffer = np.frombuffer(read(opened, shard.name), np.uint8)
            for tensor in shard.tensors:
                name, _, rows = tensor.name.partition(".rows-")
                start = int(rows.partition("-")[0] or 0)
                found.setdefault(name, []).append((start, tensor_view(tensor, buffer, shard.data_start)))
    return {name: np.concatenate([part for _, part in sorted(parts, key=lambda pair: pair[0])])
            for name, parts in found.items()}  # fmt: skip


@pytest.mark.parametrize("block_bytes", [700, 9000])
def test_a_store_with_blocks_holds_every_number_once(model, tmp_path, block_bytes):
    wanted, found = load_file(model / "model.safetensors"), held(divide(model, tmp_path / "s", block_bytes=block_bytes))
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])
    assert problems(tmp_path / "s") == {}


def test_blocks_are_no_larger_and_aligned(model, tmp_path):
    with Store(divide(model, tmp_path / "s", block_bytes=9000)) as store:
        cut = [shard for name, shard in store.manifest.shards.items() if name[-1].isdigit()]
        assert len(cut) > 10 and all(shard.data_bytes <= 9000 for shard in cut)
        for shard in cut:  # heads of 12 outputs are no multiple of 64 bytes
            assert "qkv" in shard.name or all(tensor.offset % 64 == 0 for tensor in shard.tensors)
        assert all(step.kernel != "attention" for step in store.program.steps())


def test_integers_of_blocks_are_those_of_the_whole(model, tmp_path):
    """They are cut by outputs, their last axis, with the other parts of the same outputs; each has all exact inputs."""
    whole, blocks = (divide(model, tmp_path / str(size), dtype="int8", block_bytes=size) for size in (1 << 20, 700))
    with Store(whole) as one, Store(blocks) as other:
        parts = {}
        for shard, tensor in other.manifest.tensors().values():
            name, _, rows = tensor.name.partition(".rows-")
            array = np.frombuffer(other.read_tensor(shard.name, tensor), DTYPES[tensor.dtype].numpy)
            parts.setdefault(name, []).append((int(rows.partition("-")[0] or 0), array.reshape(tensor.shape)))
        for name, (shard, tensor) in one.manifest.tensors().items():
            found = [part for _, part in sorted(parts.pop(name), key=lambda pair: pair[0])]
            if tensor.role.endswith(".channels"):
                assert len(found) > 1 and all(np.array_equal(each, found[0]) for each in found)
                found = found[:1]
            joined = np.concatenate(found, axis=-1 if tensor.dtype == "I8" or tensor.role.endswith(".exact") else 0)
            assert joined.tobytes() == bytes(one.read_tensor(shard.name, tensor)), name
        assert not parts and any(".rows-" in name for name in other.manifest.tensors())


def test_exact_inputs_are_found_once_for_all_blocks_of_a_matrix(model, tmp_path, monkeypatch):
    """They depend on the whole matrix, which is read for them."""
    numbers, exact_inputs = [], build.exact_inputs

    def counted(chunks_N, width, number):
        numbers.append(number)
        return exact_inputs(chunks_N, width, number)

    monkeypatch.setattr(build, "exact_inputs", counted)
    with Store(divide(model, tmp_path / "s", dtype="int8", block_bytes=700)) as store:
        blocks = [tensor for _, tensor in store.manifest.tensors().values() if tensor.role.endswith(".channels")]
        assert len(blocks) > 2, "blocks of the two layers"
    assert [number for number in numbers if number] == [4, 4]


@pytest.mark.parametrize("dtype", [np.float16, np.float64, "pickled"])
def test_rows_of_other_sources(model, tmp_path, dtype):
    tensors, own = load_file(model / "model.safetensors"), shutil.copytree(model, tmp_path / "own")
    if dtype == "pickled":
        (own / "model.safetensors").unlink()
        torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, own / "pytorch_model.bin")
    else:
        tensors = {name: array.astype(dtype) for name, array in tensors.items()}
        save_file(tensors, own / "model.safetensors", {"format": "pt"})
    found = held(divide(own, tmp_path / "s", block_bytes=BLOCK))
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array.astype(np.float32))


def test_transformers_refuses_it_and_the_folder_says_so(tmp_path):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    said = []
    write_classifier(tmp_path / "model", "bert")
    store = divide(tmp_path / "model", tmp_path / "store", block_bytes=BLOCK, say=said.append)
    assert not (store / INDEX).exists() and not list(store.glob("model*.safetensors"))
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        AutoModelForSequenceClassification.from_pretrained(store)
    assert json.loads((store / "config.json").read_text())["offramp_block_bytes"] == BLOCK
    assert AutoConfig.from_pretrained(store).hidden_size == AutoConfig.from_pretrained(tmp_path / "model").hidden_size
    assert [line for line in said if "transformers cannot load" in line] == [
        "cut into blocks of at most 2.93 KiB: transformers cannot load such a store"
    ]


def test_a_model_of_which_nothing_is_cut_stays_a_checkpoint(model, tmp_path):
    said = []
    whole, cut = divide(model, tmp_path / "a"), divide(model, tmp_path / "b", block_bytes=1 << 20, say=said.append)
    assert tree_bytes(whole) == tree_bytes(cut) and (cut / INDEX).exists()
    assert "nothing is cut: no step takes more than 1.00 MiB of weights" in said


def test_equal_sources_give_equal_bytes_and_another_size_starts_again(model, tmp_path):
    for name, size in (("a", 5000), ("b", BLOCK)):
        with pytest.raises(ZeroDivisionError):
            divide(model, tmp_path / name, block_bytes=size, say=lambda line: 1 / ("up-block" not in line))
        divide(model, tmp_path / name, block_bytes=BLOCK)
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")


def test_too_small_blocks_are_refused_and_those_that_are_named_work(model, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    with pytest.raises(ValueError, match="block_bytes must be at least 524288, not 524287"):
        divide(model, tmp_path / "s", block_bytes=(512 << 10) - 1)
    assert main(["divide", str(model), str(tmp_path / "s"), "--block", "4KiB"]) == 2
    assert "blocks of 4.00 KiB would all stay in memory, as small shards do - the smallest block is --block 512KiB" in (
        capsys.readouterr().err
    )
    assert main(["divide", str(model), str(tmp_path / "s"), "--block", "512KiB"]) == 0


def test_too_many_blocks_are_refused_and_those_that_are_named_work():
    settings = config_of(hidden_size=64, num_hidden_layers=24)
    division = plan_division(settings, entries_of(settings))
    with pytest.raises(
        UsageError, match=r"blocks of 100 B make \d+ steps, at most 4096 are run - .*--block (\d+)B"
    ) as e:
        cut_division(division, 100, lambda line: None)
    named = int(e.value.remedy.rpartition(" ")[2].removesuffix("B"))
    assert cut_division(division, named, lambda line: None).block_bytes == named


@pytest.mark.parametrize("method", ["eager", "export"])
def test_models_that_are_divided_by_a_run_have_no_blocks(model, tmp_path, method):
    with pytest.raises(UsageError, match=r"only text encoders .* are cut into blocks - divide it without --block"):
        divide(model, tmp_path / "s", method=method, block_bytes=BLOCK)
    with pytest.raises(UsageError, match=r"only text encoders"):
        divide(torch.nn.Linear(3, 4).eval(), torch.zeros(2, 3), tmp_path / "m", block_bytes=BLOCK)
    assert not (tmp_path / "s").exists() and not (tmp_path / "m").exists()


def test_the_manifest_writes_blocks_once(model, tmp_path):
    """The steps of all layers, and blocks that follow one another, are repeats: only the list of shards grows."""
    sizes = []
    for layers in (5, 10):
        settings = config_of(num_hidden_layers=layers)
        folder = tmp_path / str(layers)
        write_model(folder, settings)
        store = divide(folder, tmp_path / f"s{layers}", block_bytes=BLOCK)
        tree = json.loads((store / "offramp.json").read_text())
        sizes.append(len(json.dumps(tree["program"]["stages"])))
    assert math.isclose(*sizes, rel_tol=0.02)


def test_blocks_of_integers_answer_as_the_whole_and_a_policy_holds_for_both(model, tmp_path):
    folders = [
        divide(model, tmp_path / name, dtype="int8", block_bytes=size) for name, size in (("w", None), ("b", 700))
    ]
    whole, blocked = (Store(folder) for folder in folders)
    with whole, blocked:
        assert any(".rows-" in name for name in blocked.manifest.tensors())
        assert whole.manifest.answering == blocked.manifest.answering != whole.manifest.source.fingerprint

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from offramp.checkpoints import weights
from offramp.checkpoints.source import open_source
from offramp.division import divide
from offramp.errors import DiskFullError, SourceError, UsageError
from offramp.store import Store
from offramp.store.reader import tensor_view
from offramp.tasks.tokenizer_settings import FAST_TOKENIZER, SETTINGS
from tests.division.tiny import config_of, write_model, write_sharded
from tests.store.small import names_in, problems, read
from tests.store.test_writer import tree_bytes


def add_exits(folder, description=b'{"form": "mean-linear", "exits": [1], "trained": true}'):
    save_file(
        {"exit.1.weight": np.zeros((2, 32), np.float32), "exit.1.bias": np.zeros(2, np.float32)},
        folder / "exits.safetensors",
    )
    (folder / "exits.json").write_bytes(description)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    write_model(folder)
    (folder / "train.json").write_text("{}")
    add_exits(folder)
    return folder


@pytest.fixture(scope="module")
def divided(model, tmp_path_factory):
    return divide(model, tmp_path_factory.mktemp("stores") / "store")


@pytest.fixture
def own(model, tmp_path):
    """A copy of the model that a test may spoil."""
    return shutil.copytree(model, tmp_path / "own")


def test_a_store_keeps_the_tokenizer_and_says_where_it_has_no_proof(own, tmp_path):
    (own / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\nc\n")
    said = []
    store = divide(own, tmp_path / "store", say=said.append)
    with Store(store) as opened:
        names = {file.file for file in opened.manifest.files}
    has_proof = json.loads((store / SETTINGS).read_text())["proof"] is not None
    assert {"vocab.txt", SETTINGS} <= names and (FAST_TOKENIZER in names) == has_proof
    assert sum("not proven equal" in line for line in said) == (not has_proof)
    assert has_proof == (importlib.util.find_spec("transformers") is not None)


def test_a_divided_model_holds_every_tensor(model, divided):
    wanted = load_file(model / "model.safetensors")
    found = {}
    with Store(divided) as store:
        for shard in store.manifest.shards.values():
            buffer = np.frombuffer(read(store, shard.name), np.uint8)
            found |= {tensor.name: tensor_view(tensor, buffer, shard.data_start) for tensor in shard.tensors}
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
        assert problems(divided) == {}


def test_the_official_library_reads_every_shard(model, divided):
    wanted = load_file(model / "model.safetensors")
    weight_map = json.loads((divided / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == wanted.keys()
    for name, file in weight_map.items():
        with safe_open(divided / file, "numpy") as opened:
            assert np.array_equal(opened.get_tensor(name), wanted[name])
            assert opened.metadata() == {"format": "pt"}


def test_aligned_tensors_come_first_and_need_no_copy(divided):
    with Store(divided) as store:
        for shard in store.manifest.shards.values():
            whole = [tensor.num_bytes % 64 == 0 for tensor in shard.tensors]
            assert whole == sorted(whole, reverse=True)
            assert shard.data_start % 4096 == 0
            room = np.zeros(shard.bytes + 4096, np.uint8)
            buffer = room[-room.ctypes.data % 4096 :][: shard.bytes]
            for tensor, is_whole in zip(shard.tensors, whole, strict=True):
                view = tensor_view(tensor, buffer, shard.data_start)
                assert view.ctypes.data % 64 == 0
                assert np.shares_memory(view, buffer) or not is_whole
        assert not all(tensor.num_bytes % 64 == 0 for tensor in store.manifest.shards["head"].tensors)


def test_the_manifest_names_everything_and_nothing_else_is_there(divided):
    with Store(divided) as store:
        manifest = store.manifest
    assert manifest.graphs == {}, "they are derived when the store is run"
    assert {file.file for file in manifest.files} == {"config.json", "train.json", "model.safetensors.index.json"}
    named = {shard.file for shard in manifest.shards.values()}
    named |= {file.file for file in manifest.files} | {
        "exits.safetensors",
        "exits.json",
        "embedding-rows.blocks",
        "labels.json",
    }
    assert set(tree_bytes(divided)) == named | {"offramp.json"}


def test_equal_inputs_give_equal_bytes(model, divided, tmp_path):
    """Whatever the folders are called, and however Python shuffles its sets."""
    script = "import sys; from offramp.division import divide; divide(sys.argv[1], sys.argv[2])"
    for seed in ("0", "1"):
        copy = shutil.copytree(model, tmp_path / f"copy-{seed}")
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", script, copy, tmp_path / f"store-{seed}"], check=True, env=env)
        assert tree_bytes(tmp_path / f"store-{seed}") == tree_bytes(divided)


def test_a_model_in_several_files_gives_the_same_shards(divided, tmp_path):
    write_sharded(tmp_path / "sharded")
    store = divide(tmp_path / "sharded", tmp_path / "store")
    shards = [name for name in names_in(divided) if name.endswith(".safetensors") and name != "exits.safetensors"]
    assert len(shards) == 9
    assert all((store / name).read_bytes() == (divided / name).read_bytes() for name in shards)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_narrow_numbers_are_widened_exactly(own, tmp_path, dtype):
    (own / "config.json").write_text(json.dumps({**config_of(), "torch_dtype": "float16", "dtype": "float16"}))
    wanted = narrow(own, dtype)
    said = []
    store = divide(own, tmp_path / "store", say=said.append)
    assert f"converted from {dtype} to F32" in said
    with Store(store) as opened:
        assert opened.manifest.source.widened_from == dtype
        for shard in opened.manifest.shards.values():
            buffer = np.frombuffer(read(opened, shard.name), np.uint8)
            for tensor in shard.tensors:
                assert np.array_equal(tensor_view(tensor, buffer, shard.data_start), wanted[tensor.name])
    config = json.loads((store / "config.json").read_text())
    assert (config["torch_dtype"], config["dtype"]) == ("float32", "float32")


def narrow(folder, dtype):
    """Rewrite the weights in half the bytes. Returns them as float32."""
    arrays = load_file(folder / "model.safetensors")
    if dtype == "F16":
        halves = {name: array.astype(np.float16) for name, array in arrays.items()}
        save_file(halves, folder / "model.safetensors")
        return {name: array.astype(np.float32) for name, array in halves.items()}
    halves = {name: (array.view(np.uint32) >> 16).astype(np.uint16) for name, array in arrays.items()}
    save_file(halves, folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(
        data.replace(b'"dtype":"U16"', b'"dtype":"BF16"').replace(
            data[:8], (int.from_bytes(data[:8], "little") + len(halves)).to_bytes(8, "little"), 1
        )
    )
    return {name: (array.astype(np.uint32) << 16).view(np.float32) for name, array in halves.items()}


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_eight_mebibytes_are_enough(tmp_path, dtype, monkeypatch):
    """A table of 64 MiB, divided in two attempts, the second of which finds it written."""
    monkeypatch.setattr(weights, "MAX_JSON_BYTES", 1 << 20)  # as much address space is reserved, and not used
    vocab_size, bytes_each = 1 << 19, 4 if dtype == "F32" else 2
    write_model(tmp_path / "model")
    arrays = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config_of(vocab_size=vocab_size)))
    write_zeros(tmp_path / "model" / "model.safetensors", arrays, dtype, bytes_each, vocab_size)

    def stop(message):
        if message.startswith("embedding-rows"):
            raise KeyboardInterrupt

    peaks = []
    for say in (stop, lambda _: None):
        tracemalloc.start()
        try:
            divide(tmp_path / "model", tmp_path / "store", say=say)
        except KeyboardInterrupt:
            assert names_in(tmp_path) == ["model", "store.partial"]
        peaks.append(tracemalloc.get_traced_memory()[1] / (1 << 20))
        tracemalloc.stop()
    assert max(peaks) <= 8.5, peaks
    with Store(tmp_path / "store") as store:
        assert store.manifest.shards["embedding-rows"].data_bytes > 64 << 20


def write_zeros(path, arrays, dtype, bytes_each, vocab_size):
    """A checkpoint of zeros, as a file with a hole."""
    header, end = {}, 0
    for name, array in arrays.items():
        shape = (vocab_size, 32) if "word_embeddings" in name else array.shape
        size = int(np.prod(shape)) * bytes_each
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def test_an_interrupted_division_is_resumed(model, divided, tmp_path):
    def stop(message):
        if message.startswith("layer-00-up"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        divide(model, tmp_path / "store", say=stop)
    assert names_in(tmp_path) == ["store.partial"]
    kept = {path.name: path.stat().st_ino for path in (tmp_path / "store.partial").glob("*.safetensors")}
    assert len(kept) == 4
    store = divide(model, tmp_path / "store")
    assert {name: (store / name).stat().st_ino for name in kept} == kept
    assert tree_bytes(store) == tree_bytes(divided)
    assert names_in(tmp_path) == ["store"]


def test_a_source_that_changed_meanwhile_is_not_mixed(own, tmp_path):
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        divide(own, tmp_path / "store", say=stop)
    arrays = load_file(own / "model.safetensors")
    save_file({name: array + 1 for name, array in arrays.items()}, own / "model.safetensors")
    store = divide(own, tmp_path / "store")
    assert tree_bytes(store) == tree_bytes(divide(own, tmp_path / "other"))


def test_the_source_is_not_touched(own, tmp_path):
    def state():
        return {path.name: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in [own, *own.iterdir()]}

    before = state()
    divide(own, tmp_path / "store")
    assert state() == before


def test_a_target_that_exists_is_refused_before_the_source_is_read(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "precious").touch()
    with pytest.raises(UsageError, match=r"target exists and is not a store, .* - .*store - choose another name"):
        divide(tmp_path / "missing", tmp_path / "store")


def test_a_store_is_a_model_but_not_its_own_source(divided, tmp_path):
    store = shutil.copytree(divided, tmp_path / "store")
    before = tree_bytes(store)
    (tmp_path / "link").symlink_to(store)
    for source in (store, tmp_path / "link"):
        with pytest.raises(UsageError, match="model and store are the same folder"):
            divide(source, store, force=True)
    assert tree_bytes(store) == before
    again = divide(store, tmp_path / "again")
    shards = [name for name in names_in(store) if name.endswith((".safetensors", ".blocks"))]
    assert all((again / name).read_bytes() == (store / name).read_bytes() for name in shards)


@pytest.mark.parametrize("description", [b"", b"{", b"[]", b"{}", b'"x"', b"\xff", b"[" * 100_000, b"null"])
def test_exits_that_do_not_say_their_form(own, tmp_path, description):
    add_exits(own, description)
    with pytest.raises(SourceError, match=r"exits.json: .* - .*own - train"):
        divide(own, tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("form", ['"mean\\u001b[31m"', "1", "null", "[]", "{}", '["mean-linear"]'])
def test_exits_of_an_unknown_form(own, tmp_path, form):
    add_exits(own, b'{"form": %s}' % form.encode())
    with pytest.raises(SourceError, match=r"exits.json: form must be one of \('mean-linear', 'cls-linear'") as caught:
        divide(own, tmp_path / "store")
    assert str(caught.value).isprintable()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 10_000))
    with pytest.raises(DiskFullError, match=r" needed, 9\.77 KiB free"):
        divide(model, tmp_path / "store")
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "store").exists()


def test_a_text_encoder_is_divided_without_the_package_onnx(model, divided, tmp_path):
    code = "import sys; sys.modules['onnx'] = None; from offramp.division import divide; divide(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, model, tmp_path / "store"], check=True)
    assert tree_bytes(tmp_path / "store") == tree_bytes(divided)


@pytest.mark.parametrize(
    ("changes", "mention"),
    [
        ({"exit.1.weight": np.zeros((3, 32), np.float32)}, "exit.1.weight is ('F32', (3, 32)), not ('F32', (2, 32))"),
        ({"exit.1.bias": np.zeros(2, np.float16)}, "exit.1.bias is ('F16', (2,))"),
        ({"exit.2.bias": np.zeros(2, np.float32)}, "exit.2.bias is ('F32', (2,)), not None"),
        ({"exit.1.bias": None}, "exit.1.bias is None"),
    ],
)
def test_exits_that_do_not_fit_the_model_are_refused_by_name(own, tmp_path, changes, mention):
    heads = {**load_file(own / "exits.safetensors"), **changes}
    save_file({name: array for name, array in heads.items() if array is not None}, own / "exits.safetensors")
    with pytest.raises(SourceError) as caught:
        divide(own, tmp_path / "store")
    assert mention in str(caught.value)


def test_a_store_of_a_model_without_exits_or_head(tmp_path):
    write_model(tmp_path / "model", config_of(task="Model"))
    store = divide(tmp_path / "model", tmp_path / "store")
    with Store(store) as opened:
        assert opened.manifest.exits is None
        assert set(opened.program.kernels) == {"mask", "embedding", "attention", "up", "down"}
        assert [stage.role for stage in opened.program.stages] == ["begin", "layer", "layer", "end"]
        assert not opened.program.stages[-1].steps and opened.labels == () and opened.manifest.labels is None
    assert problems(store) == {}


def test_tensors_of_another_task_are_kept_and_belong_to_no_stage(own, tmp_path):
    arrays = load_file(own / "model.safetensors")
    arrays |= {f"cls.{name}": np.full((3, 5), number, np.float32) for number, name in enumerate(("a", "b\x1b[31m"))}
    save_file(arrays, own / "model.safetensors")
    with Store(divide(own, tmp_path / "store")) as store:
        other = store.manifest.shards["other"]
        assert [tensor.name for tensor in other.tensors] == ["cls.a", "cls.b\x1b[31m"]
        assert read(store, "other")[other.data_start :] == arrays["cls.a"].tobytes() + arrays["cls.b\x1b[31m"].tobytes()
        assert not any("other" in step.shards for step in store.program.steps())
    assert problems(tmp_path / "store") == {}


def test_the_fingerprint_is_that_of_the_source(model, divided):
    with open_source(model) as source, Store(divided) as store:
        assert store.manifest.source.fingerprint == source.fingerprint()

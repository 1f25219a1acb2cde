import json
import os
import shlex
import sys

import numpy as np
import pytest

from offramp.checkpoints.pickled import CONVERT
from offramp.checkpoints.source import open_source
from offramp.division.names.build import plan_division
from offramp.errors import MissingExtraError, PickleError, SourceError
from tests.division.tiny import config_of, entries_of, random_tensors, write_index, write_model

torch = pytest.importorskip("torch")


def save(folder, tree, name="pytorch_model.bin", **options):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of()))
    torch.save(tree, folder / name, **options)


def tiny_weights():
    return {name: torch.from_numpy(tensor) for name, tensor in random_tensors(entries_of(config_of())).items()}


def data_of(source, name, chunk_bytes=64):
    pieces = list(source.chunks(name, chunk_bytes))
    assert all(0 < len(piece) <= chunk_bytes // 2 for piece in pieces)
    whole = bytearray(b"".join(pieces))
    buffer = bytearray(len(whole))
    source.read_into(name, memoryview(buffer))
    assert buffer == whole
    return bytes(whole)


class Hostile:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.canary))}",)


def test_a_pickle_reads_as_safetensors_would(tmp_path):
    weights = tiny_weights()
    save(tmp_path, weights)
    with open_source(tmp_path) as source:
        assert source.entries == entries_of(config_of())
        assert plan_division(source.config, source.entries).widened_from is None
        assert all(data_of(source, name) == weight.numpy().tobytes() for name, weight in weights.items())
        assert len(source.fingerprint()) == 64


def test_several_pickles_with_an_index(tmp_path):
    weights = tiny_weights()
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    weight_map = {name: files[i % 2] for i, name in enumerate(weights)}
    for file in files:
        save(tmp_path, {name: weights[name] for name in weights if weight_map[name] == file}, file)
    write_index(tmp_path, weight_map, "pytorch_model.bin.index.json")
    with open_source(tmp_path) as source:
        assert source.entries == entries_of(config_of())
        assert data_of(source, "classifier.bias") == weights["classifier.bias"].numpy().tobytes()
    write_index(
        tmp_path,
        {**weight_map, "classifier.bias": files[1 - files.index(weight_map["classifier.bias"])]},
        "pytorch_model.bin.index.json",
    )
    with open_source(tmp_path) as source:  # the files say what they hold
        assert source.entries == entries_of(config_of())


def test_views_shared_storages_and_narrow_dtypes(tmp_path):
    base = torch.arange(7 * 5 * 3, dtype=torch.float32).reshape(7, 5, 3)
    tensors = {
        "transposed": base.permute(2, 0, 1),
        "long rows": base.reshape(3, 35).t().unsqueeze(0),
        "strided": base.reshape(-1)[::2],
        "one of many": base.reshape(-1)[3::90],
        "expanded": torch.tensor([1.5]).expand(4, 6),
        "tied": base,
        "part": base[2:4],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "half": base.half().transpose(0, 2),
        "parameter": torch.nn.Parameter(base),
    }
    save(tmp_path, tensors)
    with open_source(tmp_path) as source:
        for name, tensor in tensors.items():
            assert source.entries[name][1] == tuple(tensor.shape)
            assert data_of(source, name) == np.ascontiguousarray(tensor.detach().numpy()).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int64", "uint8", "bool", "complex64"])
def test_dtypes_are_spelt_as_in_safetensors(tmp_path, dtype):
    save(tmp_path, {"a": torch.ones(3, dtype=getattr(torch, dtype))})
    spelt = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "uint8": "U8"}
    spelt |= {"bool": "BOOL", "complex64": "C64"}
    with open_source(tmp_path) as source:
        assert source.entries["a"] == (spelt[dtype], (3,))
        assert (
            b"".join(source.chunks("a"))
            == torch.ones(3, dtype=getattr(torch, dtype)).view(torch.uint8).numpy().tobytes()
        )


@pytest.mark.parametrize("modern", [True, False])
def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path, modern):
    canary = tmp_path / "canary"
    save(tmp_path, {"a": torch.ones(3), "b": Hostile(canary)}, _use_new_zipfile_serialization=modern)
    with pytest.raises(PickleError) as caught:
        open_source(tmp_path)
    assert not canary.exists()
    assert str(tmp_path / "pytorch_model.bin") in str(caught.value)
    assert "safetensors" in caught.value.remedy
    assert "\n" not in str(caught.value)
    assert "weights_only` set to `False`" not in str(caught.value)


def test_the_refused_call_is_named(tmp_path):
    save(tmp_path, {"b": Hostile(tmp_path / "canary")})
    with pytest.raises(PickleError, match=r"it calls for \w+\.system"):
        open_source(tmp_path)


@pytest.mark.parametrize("cut", [0, 3, 4, 300, -100])
def test_a_truncated_pickle_is_refused(tmp_path, cut):
    save(tmp_path, tiny_weights())
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(PickleError, match=r"pytorch_model\.bin"):
        open_source(tmp_path)


def test_the_old_format_is_refused_with_a_command_that_converts_it(tmp_path, monkeypatch):
    weights = {**tiny_weights(), "classifier.bias": torch.arange(4.0)[::2]}
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]
    save(tmp_path, weights, _use_new_zipfile_serialization=False)
    with pytest.raises(PickleError, match=r"not a zip file of torch\.save") as caught:
        open_source(tmp_path)
    assert CONVERT in caught.value.remedy
    monkeypatch.chdir(tmp_path)
    python, option, code = shlex.split(CONVERT)
    assert (python, option) == ("python", "-c")
    exec(code, {})
    with open_source(tmp_path) as source:
        assert {name: shape for name, (_, shape) in source.entries.items()} == {
            name: tuple(weight.shape) for name, weight in weights.items()
        }
        assert data_of(source, "classifier.bias") == np.array([0, 2], np.float32).tobytes()


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"state_dict": {"a": 1}, "epoch": 3}, "holds 'state_dict', which is not a dense tensor"),
        ({"a": torch.ones(3), "epoch": 3}, "holds 'epoch'"),
        ({"a": torch.ones(3).to_sparse()}, "holds 'a'"),
        ({"a": torch.ones(3, device="meta")}, "holds 'a'"),
        ({1: torch.ones(3)}, "holds a dict, not tensors by name"),
        ([torch.ones(3)], "holds a list, not tensors by name"),
        (torch.ones(3), "holds a Tensor, not tensors by name"),
    ],
)
def test_only_a_flat_dictionary_of_dense_tensors_will_do(tmp_path, tree, named):
    save(tmp_path, tree)
    with pytest.raises(SourceError, match=named):
        open_source(tmp_path)


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
    save(tmp_path, tiny_weights())
    monkeypatch.delitem(sys.modules, "offramp.checkpoints.pickled")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"torch is not installed - pip install 'offramp\[torch\]'"):
        open_source(tmp_path)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_of_the_other_format_is_called_so(tmp_path, is_zip):
    save(tmp_path, tiny_weights(), "model.safetensors", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(SourceError, match=r"of torch\.save, not of safetensors .* rename it to pytorch_model\.bin"):
        open_source(tmp_path)
    write_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"of safetensors, not of torch\.save .* rename it to model\.safetensors"):
        open_source(tmp_path)


def test_safetensors_win_over_pickles(tmp_path):
    save(tmp_path, {"b": Hostile(tmp_path / "canary")})
    write_model(tmp_path)
    with open_source(tmp_path) as source:
        assert source.entries == entries_of(config_of())


def test_a_pickle_that_repeats_a_few_bytes_is_refused(tmp_path):
    """A file of some kilobytes would become a store of terabytes."""
    few, weights = torch.zeros(1 << 10), tiny_weights()
    save(tmp_path / "tied", {**weights, **dict.fromkeys(map(str, range(20)), few)})
    with open_source(tmp_path / "tied") as source:
        assert len(source.entries) == len(weights) + 20, "layers that are one have a name each"
    for name, more in (("one", {"a": few[:1].expand(1 << 40)}), ("many", dict.fromkeys(map(str, range(10**4)), few))):
        save(tmp_path / name, {**weights, **more})
        with pytest.raises(SourceError, match=r"share memory"):
            open_source(tmp_path / name)

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from offramp.checkpoints.source import COMPANIONS, TOKENIZER, open_source
from offramp.errors import DamagedError, SourceError, UsageError
from offramp.store.safetensors import num_bytes
from tests.division.tiny import CONFIGS, config_of, entries_of, random_tensors, write_index, write_model, write_sharded


def test_one_safetensors_file(tmp_path):
    tensors = write_model(tmp_path)
    with open_source(tmp_path) as source:
        assert source.config == config_of()
        assert sorted(source.entries) == sorted(tensors)
        assert dict(source.entries) == entries_of(config_of())
        assert source.entries["classifier.bias"] == ("F32", (2,))
        for name, tensor in tensors.items():
            assert b"".join(source.chunks(name)) == tensor.tobytes() == read_into(source, name)


def test_several_safetensors_files(tmp_path):
    tensors, _ = write_sharded(tmp_path)
    with open_source(tmp_path) as source:
        assert sorted(source.entries) == sorted(tensors)
        for name, tensor in tensors.items():
            assert b"".join(source.chunks(name)) == tensor.tobytes() == read_into(source, name)


def read_into(source, name):
    """All of a tensor at once."""
    dtype, shape = source.entries[name]
    buffer = bytearray(num_bytes(dtype, shape))
    source.read_into(name, memoryview(buffer))
    return bytes(buffer)


def test_chunks_hold_half_of_the_allowance_and_whole_items(tmp_path):
    tensors = write_model(tmp_path)
    with open_source(tmp_path) as source:
        name = "bert.embeddings.word_embeddings.weight"
        chunks = list(source.chunks(name, chunk_bytes=100))
        assert [len(chunk) for chunk in chunks[:-1]] == [48] * (len(chunks) - 1)
        assert b"".join(chunks) == tensors[name].tobytes()
        with pytest.raises(ValueError, match="at least 16, not 15"):
            source.chunks(name, chunk_bytes=15)


def test_links_are_followed_as_in_the_cache_of_the_hub(tmp_path):
    write_model(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    with open_source(snapshot) as source, open_source(tmp_path / "blobs") as plain:
        assert source.entries == plain.entries
        assert source.fingerprint() == plain.fingerprint()


def test_the_fingerprint_depends_on_what_is_read_and_on_nothing_else(tmp_path):
    write_model(tmp_path / "a")
    (tmp_path / "a" / "vocab.txt").write_text("[PAD]\n")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("not read")
    os.utime(tmp_path / "b" / "model.safetensors", (1, 1))
    reference = fingerprint(tmp_path / "a")
    assert fingerprint(tmp_path / "b") == reference
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        path = tmp_path / "b" / name
        data = path.read_bytes()
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:] if name == "model.safetensors" else data + b" ")
        assert fingerprint(tmp_path / "b") != reference
        path.write_bytes(data)
    (tmp_path / "b" / "merges.txt").write_text("")
    assert fingerprint(tmp_path / "b") != reference


def test_the_fingerprint_of_several_files_covers_each_and_the_index(tmp_path):
    _, weight_map = write_sharded(tmp_path)
    seen = {fingerprint(tmp_path)}
    for name in (*sorted(set(weight_map.values())), "model.safetensors.index.json"):
        with open(tmp_path / name, "ab" if name.endswith("json") else "r+b") as file:
            if name.endswith("json"):
                file.write(b" ")
            else:
                file.seek(-1, os.SEEK_END)
                last = file.read(1)[0]
                file.seek(-1, os.SEEK_END)
                file.write(bytes([last ^ 1]))
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 5


def num_open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def fingerprint(folder):
    with open_source(folder) as source:
        return source.fingerprint()


def test_companions_are_the_tokenizer_files_that_are_there(tmp_path):
    write_model(tmp_path)
    for name in ("vocab.json", "merges.txt", "generation_config.json", "training_args.bin"):
        (tmp_path / name).write_text("{}")
    with open_source(tmp_path) as source:
        assert [path.name for path in source.companions()] == ["vocab.json", "merges.txt"]
    assert "config.json" not in TOKENIZER


def test_exits_come_in_pairs(tmp_path):
    write_model(tmp_path)
    with open_source(tmp_path) as source:
        assert source.exits() is None
        (tmp_path / "exits.json").write_text("{}")
        with pytest.raises(SourceError, match=r"exits without exits\.safetensors"):
            source.exits()
        before = (tmp_path / "exits.safetensors").write_bytes(b"one") and source.fingerprint()
        assert source.exits() == (tmp_path / "exits.safetensors", tmp_path / "exits.json")
        (tmp_path / "exits.safetensors").write_bytes(b"two")
        assert source.fingerprint() != before


def test_what_is_no_model_folder_is_told_what_it_lacks(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        open_source(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not a folder"):
        open_source(tmp_path / "file")
    with pytest.raises(UsageError, match=r"not a model folder: no config\.json"):
        open_source(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"not a model folder: no model\.safetensors, no pytorch_model\.bin"):
        open_source(tmp_path)


LACKING = {
    "tf_model.h5": r"its weights are for TensorFlow - .* - save the model with PyTorch as safetensors",
    "flax_model.msgpack": "its weights are for Flax",
    "model-q4.gguf": r"its weights are for llama\.cpp",
    "onnx/model.onnx": "its weights are for ONNX",
    "model.fp16.safetensors": r"but model\.fp16\.safetensors - .* rename it to model\.safetensors",
    "best.pt": r"but best\.pt - .* rename it to pytorch_model\.bin",
    "model.safetensors.index.fp16.json": r"rename it to model\.safetensors\.index\.json",
    "model-00002-of-00003.safetensors": r"a part of the weights - .* - get model\.safetensors\.index\.json of",
    "training_args.bin": r"no index of either - .* - save the model as safetensors",
    "checkpoint-5/model.safetensors": r"name one of its folders: checkpoint-5$",
    "model.safetensors": "is a link to a file that is not there",
}
"""File in a folder without weights that are read -> what is said."""


@pytest.mark.parametrize("name", LACKING)
def test_a_folder_without_weights_says_what_it_has_instead(tmp_path, name):
    for folder in (tmp_path, (tmp_path / name).parent, tmp_path / "1_Pooling"):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
    if name == "model.safetensors":
        (tmp_path / name).symlink_to("../blobs/none")
    else:
        (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(SourceError, match=LACKING[name]) as caught:
        open_source(tmp_path)
    assert "1_Pooling" not in str(caught.value)


def test_the_folder_of_a_model_is_named_from_the_cache_of_the_hub(tmp_path):
    write_model(tmp_path / "snapshots" / "0123abcd")
    (tmp_path / "blobs").mkdir()
    with pytest.raises(UsageError, match=r"name one of its folders: snapshots/0123abcd$"):
        open_source(tmp_path)


def test_another_file_of_weights_that_the_config_names_is_not_passed_over(tmp_path):
    write_model(tmp_path, config_of(transformers_weights="other.safetensors"))
    with pytest.raises(
        SourceError, match=r"names other\.safetensors .* rename that file to model\.safetensors, and re"
    ):
        open_source(tmp_path)
    write_model(tmp_path, config_of(transformers_weights="model.safetensors"))
    open_source(tmp_path).close()


OF_PRETRAINING = {"bert": "ForMaskedLM", "distilbert": "Model", "roberta": "ForCausalLM", "electra": "ForPreTraining"}


@pytest.mark.parametrize("model_type", OF_PRETRAINING)
def test_the_class_of_the_pretraining_is_not_that_of_a_classifier(tmp_path, model_type):
    write_model(tmp_path, config_of(model_type))
    stale = config_of(model_type, OF_PRETRAINING[model_type])
    (tmp_path / "config.json").write_text(json.dumps(stale))
    with open_source(tmp_path) as source:
        assert source.encoder().problem == "single_label_classification"
    other = config_of(model_type, "ForTokenClassification")
    (tmp_path / "config.json").write_text(json.dumps(other))
    with open_source(tmp_path) as source:
        assert source.config == other


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\xff", "[" * 100_000, '{"a": 1'])
def test_a_broken_config_is_named(tmp_path, text):
    write_model(tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(SourceError, match=r"not JSON|not a JSON object") as caught:
        open_source(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_pipe_does_not_hang(tmp_path):
    write_model(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(SourceError, match=r"a pipe, .*config\.json - remove it, or put the file itself there"):
        open_source(tmp_path)


@pytest.mark.parametrize("cut", [0, 4, 200, -1])
def test_a_truncated_file_is_an_error_of_the_source(tmp_path, cut):
    write_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(SourceError, match=r"model\.safetensors") as caught:
        open_source(tmp_path)
    assert not isinstance(caught.value, DamagedError)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    write_model(tmp_path)
    with open_source(tmp_path) as source:
        os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size - 5000)
        with pytest.raises(SourceError, match="file ends inside tensor"):
            for name in source.entries:
                list(source.chunks(name))
        with pytest.raises(SourceError, match="file ends inside tensor"):
            for name in source.entries:
                read_into(source, name)


@pytest.mark.parametrize(
    "file",
    [
        "../model-00001-of-00003.safetensors",
        "/etc/passwd",
        "sub/../../a.safetensors",
        "",
        ".",
        "a.bin",
        "a\0.safetensors",
        None,
    ],
)
def test_an_index_may_only_name_files_in_its_folder(tmp_path, file):
    _, weight_map = write_sharded(tmp_path)
    write_index(tmp_path, {**weight_map, "classifier.bias": file})
    with pytest.raises(SourceError, match="index names the file"):
        open_source(tmp_path)


def test_files_say_which_tensors_they_hold_whatever_the_index_says(tmp_path):
    _, weight_map = write_sharded(tmp_path)
    with open_source(tmp_path) as source:
        entries = dict(source.entries)
    files = sorted(set(weight_map.values()))
    elsewhere = next(file for file in files if file != weight_map["classifier.bias"])
    less = {name: file for name, file in weight_map.items() if name != "classifier.bias"}
    for changed in ({**weight_map, "classifier.bias": elsewhere}, less, {**weight_map, "extra": files[0]}):
        write_index(tmp_path, changed)
        with open_source(tmp_path) as source:
            assert source.entries == entries
    write_index(tmp_path, {**weight_map, "extra": "model-00009-of-00009.safetensors"})
    with pytest.raises(SourceError, match=r"no such file - .*model-00009"):
        open_source(tmp_path)


@pytest.mark.parametrize("tree", [{}, {"weight_map": {}}, {"weight_map": []}, []])
def test_an_index_without_a_map_is_refused(tmp_path, tree):
    write_sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(tree))
    with pytest.raises(SourceError, match=r"weight_map|not a JSON object"):
        open_source(tmp_path)


def test_files_may_lie_in_folders_of_the_folder(tmp_path):
    tensors, weight_map = write_sharded(tmp_path)
    before = fingerprint(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    for file in set(weight_map.values()):
        (tmp_path / file).rename(tmp_path / "a" / "b" / file)
    write_index(tmp_path, {name: f"a/b/{file}" for name, file in weight_map.items()})
    with open_source(tmp_path) as source:
        assert all(read_into(source, name) == tensor.tobytes() for name, tensor in tensors.items())
        assert source.fingerprint() != before


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_config_without_architectures_is_of_the_class_whose_head_is_there(tmp_path, model_type):
    for task, named in (("ForSequenceClassification", True), ("Model", False)):
        config = config_of(model_type, task)
        write_model(tmp_path / task, {key: value for key, value in config.items() if key != "architectures"})
        save_file(random_tensors(entries_of(config)), tmp_path / task / "model.safetensors", {"format": "pt"})
        with open_source(tmp_path / task) as source:
            assert source.config.get("architectures") == (config["architectures"] if named else None)


def test_files_are_closed(tmp_path):
    write_sharded(tmp_path / "good")
    write_sharded(tmp_path / "bad")
    (tmp_path / "bad" / "model-00003-of-00003.safetensors").write_bytes(b"")
    before = num_open_files()
    with open_source(tmp_path / "good") as source:
        assert num_open_files() == before + 3
        source.fingerprint()
    with pytest.raises(SourceError):
        open_source(tmp_path / "bad")
    assert num_open_files() == before


def test_a_folder_of_several_runs_names_them(tmp_path):
    for seed in (2, 1):
        write_model(tmp_path / f"seed-{seed}")
    with pytest.raises(UsageError, match=r"no config.json - .* - name one of its folders: seed-1, seed-2"):
        open_source(tmp_path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 12345\n"
STAND_INS = {POINTER: "a Git LFS pointer", "<!DOCTYPE html>\n<html>": "a web page", "<html><head>": "a web page"}
STAND_INS["\n  <?xml version='1.0'?><Error>"] = "a web page"
STAND_INS['{"error":"Repository not found"}'] = STAND_INS["Entry not found"] = "the answer of a server that refused it"


def whole_folder(folder):
    """A sharded model with every other file that a source may have."""
    write_sharded(folder)
    for name in (*COMPANIONS, "exits.json", "exits.safetensors"):
        (folder / name).write_text("{}")


@pytest.mark.parametrize("text", STAND_INS)
def test_a_file_that_stands_in_for_another_is_called_by_its_name(tmp_path, text):
    whole_folder(tmp_path)
    with open_source(tmp_path):
        pass
    for path in sorted(tmp_path.iterdir()):
        before = path.read_bytes()
        path.write_text(text)
        with pytest.raises(SourceError) as caught:
            open_source(tmp_path)
        assert str(caught.value).startswith(f"{STAND_INS[text]} in place of the file - {path} - ")
        path.write_bytes(before)


def test_a_pickle_that_is_a_pointer_is_called_so(tmp_path):
    write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_text(POINTER)
    before = num_open_files()
    with pytest.raises(SourceError, match=r"a Git LFS pointer .*pytorch_model\.bin - run `git lfs pull`"):
        open_source(tmp_path)
    assert num_open_files() == before


def test_an_adapter_is_never_left_out(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "some/base"}')
    with pytest.raises(
        SourceError, match=r"an adapter, without the model that it changes \(some/base\) - .*divide it where peft is"
    ):
        open_source(tmp_path)
    write_model(tmp_path)
    with pytest.raises(
        SourceError, match=r"an adapter lies beside the weights, and changes them - .*divide it where peft is installed"
    ):
        open_source(tmp_path)
    (tmp_path / "adapter_config.json").unlink()  # as the message advises
    with open_source(tmp_path):
        pass

"""Folders of transformers, divided from disk by a run: the answers are those of `from_pretrained`, bit for bit."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import offramp  # noqa: E402
from offramp.cli import main  # noqa: E402
from offramp.division.checkpoints import example_of, load_inputs  # noqa: E402
from offramp.runtime.weight_plan import smallest_bytes  # noqa: E402
from offramp.store import Store  # noqa: E402
from offramp.streaming.capture import are_equal, tensors_of  # noqa: E402
from offramp.streaming.placement import (  # noqa: E402
    data_bytes,
    sliceable_shards,
    streamed_shards,
)
from tests.store.small import problems  # noqa: E402
from tests.store.test_writer import tree_bytes  # noqa: E402

IDS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
BERT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}
PAIR = {"decoder_start_token_id": 0, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16}
PAIR |= {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "BertForSequenceClassification": ("Bert", {**BERT, **IDS, "num_hidden_layers": 3, "num_labels": 3}),
    "GPT2LMHeadModel": ("GPT2", {**IDS, "n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 2}),
    "ViTForImageClassification": ("ViT", {**TOWER, "image_size": 16, "patch_size": 4}),
    "ResNetForImageClassification": (
        "ResNet",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"},
    ),
    "T5ForConditionalGeneration": (
        "T5",
        {**IDS, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    ),
    "WhisperForConditionalGeneration": (
        "Whisper",
        {**IDS, **PAIR, "max_source_positions": 20, "max_target_positions": 20, "num_mel_bins": 8},
    ),
    "AlbertModel": ("Albert", {**BERT, **IDS, "embedding_size": 8, "num_hidden_layers": 3}),
    "CLIPModel": (
        "CLIP",
        {
            "text_config": {**TOWER, **IDS, "max_position_embeddings": 20},
            "vision_config": {**TOWER, "image_size": 16, "patch_size": 4},
            "projection_dim": 8,
        },
    ),
    "MixtralForCausalLM": (
        "Mixtral",
        {**IDS, **TOWER, "num_key_value_heads": 1, "num_local_experts": 4, "max_position_embeddings": 32},
    ),
    "Wav2Vec2ForSequenceClassification": (
        "Wav2Vec2",
        {
            **TOWER, "conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [10, 3], "vocab_size": 60,
            "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8,
        },
    ),
}  # fmt: skip


class Folders:
    """Writes each model once, and divides it once; nothing of it may be changed."""

    def __init__(self, root):
        self.root, self.stores = root, {}

    def model(self, name):
        folder = self.root / name
        if not folder.exists():
            kind, options = MODELS[name]
            torch.manual_seed(0)
            model = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**options))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            model.save_pretrained(folder)
        return folder

    def store(self, name):
        if name not in self.stores:
            self.stores[name] = offramp.divide(self.model(name), self.root / f"{name}.store", method="eager")
        return self.stores[name]

    def loaded(self, name):
        return getattr(transformers, name).from_pretrained(self.model(name)).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def own(folders, tmp_path):
    """A copy of a BERT's folder that a test may spoil."""
    return shutil.copytree(folders.model("BertForSequenceClassification"), tmp_path / "own")


@pytest.fixture
def refused(capsys, tmp_path):
    """Dividing a folder on the command line must fail with one line and leave nothing behind."""

    def call(folder, mentions, *words, code=4):
        assert main(["divide", str(folder), str(tmp_path / "refused"), "--method", "eager", *map(str, words)]) == code
        said = capsys.readouterr()
        last = said.err.splitlines()[-1]
        assert said.out == "" and "Traceback" not in said.err and "fault of ours" not in said.err
        assert last.startswith("offramp: error: ") and all(mention in last for mention in mentions), last
        assert not (tmp_path / "refused").exists()

    return call


def smallest(store):
    with Store(store) as opened:
        return smallest_bytes(
            streamed_shards(opened), data_bytes(opened), opened.program.module.pinned, sliceable_shards(opened)
        )


def change(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_divided_and_runs_as_from_pretrained(folders, name):
    store, model = folders.store(name), folders.loaded(name)
    example = example_of(model, folders.model(name))
    with torch.no_grad():
        expected = tensors_of(model(**example))
    for given in (folders.loaded(name), type(model)):
        with offramp.stream(given, store, weight_budget=smallest(store)) as stream:
            assert are_equal(tensors_of(stream(**example)), expected)
            assert stream.counts.unplanned_loads == 0
            assert stream.counts.peak_weight_bytes <= smallest(store)
    assert problems(store) == {}


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_and_the_loaded_model_give_the_same_shards(folders, tmp_path, name):
    model, store = folders.loaded(name), folders.store(name)
    other = offramp.divide(model, example_of(model, folders.model(name)), tmp_path / "store", method="eager")
    with Store(store) as one, Store(other) as two:
        assert {key: shard.sha256 for key, shard in one.manifest.shards.items()} == {
            key: shard.sha256 for key, shard in two.manifest.shards.items()
        }
        assert one.program.module.parts == two.program.module.parts
        assert one.program.inputs == two.program.inputs
        assert [each.inputs_sha256 for each in one.manifest.proof.examples] == [
            each.inputs_sha256 for each in two.manifest.proof.examples
        ]


def test_dividing_a_folder_twice_gives_equal_bytes(folders, tmp_path):
    for name in ("BertForSequenceClassification", "MixtralForCausalLM"):
        again = offramp.divide(folders.model(name), tmp_path / name, method="eager")
        assert tree_bytes(again) == tree_bytes(folders.store(name))


def layer_of(name):
    found = re.search(r"\blayers?\.(\d+)\.", name)
    return "ends" if found is None else int(found.group(1))


def layers_in_order(store, needs):
    """The layers, by the names of tensors, in the order of use; tensors of no layer are left out."""
    tensors = [tensor for shards in needs for name in shards for tensor in store.manifest.shards[name].tensors]
    return list(dict.fromkeys(layer for tensor in tensors if (layer := layer_of(tensor.name)) != "ends"))


def test_names_and_a_run_agree_on_the_tensors_of_bert_and_on_the_order_of_its_layers(folders, tmp_path):
    name = "BertForSequenceClassification"
    by_names = offramp.divide(folders.model(name), tmp_path / "names", method="names")
    wanted = load_file(folders.model(name) / "model.safetensors")
    with Store(by_names) as one, Store(folders.store(name)) as two:
        found = []
        for opened, needs in ((one, one.program.steps()), (two, two.program.module.parts)):
            tensors = opened.manifest.tensors()
            assert tensors.keys() == wanted.keys()
            for shard, tensor in tensors.values():
                data = np.frombuffer(opened.read_tensor(shard.name, tensor), np.float32).reshape(tensor.shape)
                assert np.array_equal(data, wanted[tensor.name])
            found.append(layers_in_order(opened, [each.shards for each in needs]))
        assert found[0] == found[1] == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_checkpoints_keep_their_dtype(tmp_path, dtype):
    kind, options = MODELS["GPT2LMHeadModel"]
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(getattr(transformers, f"{kind}Config")(**options)).to(dtype)
    model.save_pretrained(tmp_path / "model")
    store = offramp.divide(tmp_path / "model", tmp_path / "store", method="eager")
    with Store(store) as opened:
        dtypes = {tensor.dtype for shard in opened.manifest.shards.values() for tensor in shard.tensors}
        assert dtypes == {"BF16" if dtype is torch.bfloat16 else "F16"}
        assert opened.manifest.source.widened_from is None
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    example = example_of(loaded, tmp_path / "model")
    with torch.no_grad():
        expected = tensors_of(loaded(**example))
    assert {tensor.dtype for tensor in expected} == {dtype}
    with offramp.stream(transformers.GPT2LMHeadModel, store, weight_budget=smallest(store)) as stream:
        assert are_equal(tensors_of(stream(**example)), expected)


def test_a_checkpoint_in_several_files_gives_the_same_store(folders, tmp_path):
    name = "GPT2LMHeadModel"
    model = folders.loaded(name)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    store = offramp.divide(tmp_path / "sharded", tmp_path / "store", method="eager")
    with Store(store) as one, Store(folders.store(name)) as two:
        assert {key: shard.sha256 for key, shard in one.manifest.shards.items()} == {
            key: shard.sha256 for key, shard in two.manifest.shards.items()
        }


def test_the_companions_of_a_folder_come_along(folders, own, tmp_path):
    (own / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"]) + "\n")
    (own / "preprocessor_config.json").write_text("{}")
    store = offramp.divide(own, tmp_path / "store", method="eager")
    for name in ("config.json", "vocab.txt", "preprocessor_config.json"):
        assert (store / name).read_bytes() == (own / name).read_bytes()
    assert problems(store) == {}


def spoil(folder, **changes):
    """Change tensors of a folder; None takes one out."""
    arrays = {**load_file(folder / "model.safetensors"), **changes}
    save_file(
        {name: array for name, array in arrays.items() if array is not None},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def test_tensors_that_do_not_fit_are_named(own, refused):
    name = "bert.encoder.layer.1.output.dense.weight"
    spoil(own, **{name: None})
    refused(own, ["1 tensors missing", name])
    spoil(own, **{name: np.zeros((3, 3), np.float32)})
    refused(own, ["1 tensors mis-shaped", name, "(3, 3) not (16, 32)"])
    whole = {name: np.zeros((16, 32), np.float32)}
    spoil(own, **whole, **{key: None for key in load_file(own / "model.safetensors") if "layer.0" in key})
    refused(own, ["16 tensors missing", ", ..."])


def test_tensors_of_an_adapter_are_not_left_out(own, refused):
    """A model without its adapter would give other answers."""
    spoil(own, **{"bert.encoder.layer.0.attention.self.query.lora_A.weight": np.zeros((4, 32), np.float32)})
    refused(own, ["1 tensors unexpected", "lora_A", "merge the adapter into the weights"])


NOT_READ = {
    "ResNetForImageClassification": "num_batches_tracked",
    "Wav2Vec2ForSequenceClassification": "masked_spec_embed",
    "BertForSequenceClassification": "token_type_ids",
}


@pytest.mark.parametrize("name", NOT_READ)
def test_tensors_that_no_answer_depends_on_may_be_absent_or_too_many(folders, tmp_path, name):
    own, model = shutil.copytree(folders.model(name), tmp_path / "own"), folders.loaded(name)
    names = load_file(own / "model.safetensors")
    absent = {key: None for key in names if key.endswith(NOT_READ[name])}
    spoil(own, **absent, **{"loss.weight": np.ones(2, np.float32)})
    said = []
    store = offramp.divide(own, tmp_path / "store", method="eager", say=said.append)
    assert any("1 tensors left out" in line and "loss.weight" in line for line in said)
    assert any(f"{len(absent)} tensors missing" in line for line in said) == bool(absent)
    example = example_of(model, own)
    with torch.no_grad():
        expected = tensors_of(model(**example))
    with offramp.stream(type(model), store, weight_budget=smallest(store)) as stream:
        assert are_equal(tensors_of(stream(**example)), expected)


@pytest.mark.parametrize("name", ["ResNetForImageClassification", "MixtralForCausalLM"])
def test_a_buffer_or_a_converted_weight_that_answers_depend_on_may_not_be_absent(folders, tmp_path, refused, name):
    own = shutil.copytree(folders.model(name), tmp_path / "own")
    ending = "running_mean" if name.startswith("ResNet") else "layernorm.weight"
    gone = next(key for key in load_file(own / "model.safetensors") if key.endswith(ending))
    spoil(own, **{gone: None})
    refused(own, ["1 tensors missing", gone])


def test_weights_of_several_dtypes_become_the_widest(folders, tmp_path):
    name = "GPT2LMHeadModel"
    own = shutil.copytree(folders.model(name), tmp_path / "own")
    arrays = load_file(own / "model.safetensors")
    spoil(own, **{key: array.astype(np.float16) for key, array in arrays.items() if array.ndim > 1})
    store = offramp.divide(own, tmp_path / "store", method="eager")
    with Store(store) as opened:
        tensors = opened.manifest.tensors()
        assert {tensor.dtype for _, tensor in tensors.values()} == {"F32"}
        assert opened.manifest.source.widened_from == "F16"
    model = transformers.GPT2LMHeadModel.from_pretrained(own, dtype=torch.float32).eval()
    example = example_of(model, own)
    with torch.no_grad():
        expected = tensors_of(model(**example))
    with offramp.stream(transformers.GPT2LMHeadModel, store, weight_budget=smallest(store)) as stream:
        assert are_equal(tensors_of(stream(**example)), expected)


def test_integers_in_place_of_floats_are_called_quantised(own, refused):
    name = "bert.encoder.layer.1.output.dense.weight"
    spoil(own, **{name: np.ones((16, 32), np.int8)})
    refused(own, [name, "has dtype I8, so the weights are quantised"])
    change(own, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    refused(own, ["the weights are quantised (bitsandbytes)"])


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"architectures": None}, ["config.json names no architecture", "save_pretrained"]),
        ({"architectures": []}, ["config.json names no architecture"]),
        ({"architectures": ["MyOwnModel"]}, ["transformers has no MyOwnModel", "code in a model folder is not run"]),
        ({"architectures": ["AutoConfig"]}, ["transformers has no AutoConfig"]),
        ({"architectures": ["logging"]}, ["transformers has no logging"]),
        ({"architectures": ["BertTokenizer"]}, ["transformers has no BertTokenizer"]),
        ({"architectures": [7]}, ["config.json: architectures must be a string, not 7"]),
        ({"architectures": ["../x\u001b[31m"]}, ["transformers has no ../x\\x1b[31m"]),
        ({"architectures": ["GPT2Model"]}, ["own"]),
        ({"model_type": "nothing-known"}, ["config.json cannot be read"]),
        ({"hidden_size": "many"}, ["config.json"]),
        ({"num_attention_heads": 3}, ["config.json makes no BertForSequenceClassification", "correct its keys"]),
        ({"num_hidden_layers": 4}, ["16 tensors missing"]),
    ],
)
def test_a_config_that_makes_no_model_ends_in_one_line(own, refused, changes, mentions):
    change(own, **changes)
    refused(own, mentions)


def test_a_folder_without_a_model_type_is_told_why_it_is_run(own, tmp_path):
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({key: each for key, each in config.items() if key != "model_type"}))
    with pytest.raises(offramp.errors.UsageError, match=r"stores of fp16 .*: config.json has no model_type"):
        offramp.divide(own, tmp_path / "store", dtype="fp16")


def test_code_in_a_folder_is_never_run(own, refused, tmp_path):
    (own / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    change(own, architectures=["OwnModel"], auto_map={"AutoModel": "modeling_own.OwnModel"}, model_type="own")
    refused(own, [])
    change(own, model_type="bert")
    refused(own, ["transformers has no OwnModel", "not run"])
    assert not (tmp_path / "ran").exists()


def test_broken_folders_end_in_one_line(own, refused):
    data = (own / "model.safetensors").read_bytes()
    (own / "model.safetensors").write_bytes(data[:-10])
    refused(own, ["model.safetensors"])
    (own / "model.safetensors").write_bytes(data)
    (own / "config.json").write_text("{")
    refused(own, ["config.json"])
    (own / "config.json").unlink()
    refused(own, ["config.json"], code=2)


INPUTS = {
    "input_ids": torch.arange(12).reshape(3, 4) % 60,
    "attention_mask": torch.ones(3, 4, dtype=torch.long),
    "token_type_ids": torch.zeros(3, 4, dtype=torch.long),
}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_example_inputs_come_from_a_file(own, tmp_path, suffix, capsys):
    arrays, path = {name: tensor.numpy() for name, tensor in INPUTS.items()}, tmp_path / f"inputs{suffix}"
    np.savez(path, **arrays) if suffix == ".npz" else save_file(arrays, path)
    assert {name: tensor.tolist() for name, tensor in load_inputs(path).items()} == {
        name: tensor.tolist() for name, tensor in INPUTS.items()
    }
    words = [
        "divide",
        own,
        tmp_path / "store",
        "--method",
        "eager",
        "--inputs",
        path,
        "--stage-bytes",
        "20KB",
        "--json",
    ]
    assert main([str(word) for word in words]) == 0
    assert json.loads(capsys.readouterr().out) == {"store": str(tmp_path / "store")}
    with Store(tmp_path / "store") as store:
        assert {name: each.axes for name, each in store.program.inputs.items()} == {
            name: ("batch", *tensor.shape[1:]) for name, tensor in INPUTS.items()
        }
        shapes = [each.inputs["input_ids"].shape for each in store.manifest.proof.examples]
        assert shapes == [(3, 4), (2, 3)]


def test_example_inputs_that_are_none_end_in_one_line(own, refused, tmp_path):
    refused(own, ["no such file"], "--inputs", tmp_path / "none.npz", code=2)
    for name in ("x.npz", "x.safetensors", "x.txt"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        refused(own, ["cannot be read as example inputs"], "--inputs", tmp_path / name, code=2)
    np.savez(tmp_path / "y.npz", input_ids=np.zeros((2, 3)))
    what = "the example inputs do not suit a BertForSequenceClassification (RuntimeError"
    refused(own, [what, "give --inputs FILE.safetensors"], "--inputs", tmp_path / "y.npz", code=2)
    np.savez(tmp_path / "z.npz", input_ids=np.full((2, 3), 60))
    refused(own, ["do not suit", "IndexError"], "--inputs", tmp_path / "z.npz", code=2)


def test_a_model_for_which_no_example_can_be_made_up_asks_for_one(folders):
    class Strange(torch.nn.Module):
        main_input_name, config = "waves", folders.loaded("GPT2LMHeadModel").config

        def forward(self, waves):
            return waves

    with pytest.raises(offramp.OfframpError, match="no example can be made up for a Strange"):
        example_of(Strange(), folders.model("GPT2LMHeadModel"))


def test_a_made_up_example_has_two_rows_one_of_which_is_padded(folders):
    example = example_of(
        folders.loaded("BertForSequenceClassification"), folders.model("BertForSequenceClassification")
    )
    assert example["input_ids"].shape == example["attention_mask"].shape == (2, 16)
    assert example["attention_mask"].sum(1).tolist() == [16, 12]
    pair = example_of(folders.loaded("T5ForConditionalGeneration"), folders.model("T5ForConditionalGeneration"))
    assert set(pair) == {"input_ids", "attention_mask", "decoder_input_ids", "use_cache"}


def test_the_method_is_chosen_and_said(own, tmp_path):
    for options, expected in ({}, "names"), ({"method": "eager"}, "eager"), ({"method": "names"}, "names"):
        said = []
        offramp.divide(own, tmp_path / f"{expected}-{len(options)}", say=said.append, **options)
        assert said[0].startswith(f"method {expected}: ")
    change(own, hidden_act="mish")
    said = []
    store = offramp.divide(own, tmp_path / "mish", say=said.append)
    assert said[0].startswith("method eager: hidden_act is mish: known are gelu") and "takes torch" in said[0]
    with Store(store) as opened:
        assert opened.program.module is not None
    with pytest.raises(offramp.OfframpError, match=r"hidden_act is mish: known are .* --method eager"):
        offramp.divide(own, tmp_path / "none", method="names")
    change(own, position_embedding_type="relative_key")
    with pytest.raises(offramp.OfframpError, match="position_embedding_type is relative_key: only absolute"):
        offramp.divide(own, tmp_path / "none")
    change(own, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    with pytest.raises(offramp.OfframpError, match="unknown architecture"):
        offramp.divide(own, tmp_path / "none", method="names")

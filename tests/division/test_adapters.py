"""Folders of adapters: divided as the model that peft makes of them, or refused for the true reason."""

import json
import re
import time

import pytest
import torch
import transformers as hf

import offramp
from offramp.checkpoints.downloads import DOWNLOADS, Download, downloads_of, to_bytes
from offramp.division import adapters, messages
from offramp.errors import SourceError
from tests.tiny_families import KNOWN, write_classifier

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
TEXTS = ["good film", "bad bad film", "a"]


def adapter_of(model, folder, **changes):
    """Write a LoRA adapter with weights that matter; returns the model with it."""
    torch.manual_seed(1)
    settings = {"task_type": "SEQ_CLS", "r": 4, "target_modules": ["query", "value"], "init_lora_weights": False}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{**settings, **changes})).eval()
    adapted.save_pretrained(folder)
    return adapted


@pytest.fixture
def base(tmp_path):
    return write_classifier(tmp_path / "base", "bert")


def logits_of(model, base):
    with torch.no_grad():
        batch = hf.AutoTokenizer.from_pretrained(base)(TEXTS, padding=True, return_tensors="pt")
        return model(**batch).logits.softmax(-1)


def answers(folder, store):
    offramp.divide(folder, store)
    with offramp.load(store) as classifier:
        results = classifier.predict(TEXTS)
        return [(result.label, result.score) for result in results]


def assert_same(found, wanted, labels):
    for (label, score), row in zip(found, wanted, strict=True):
        assert label == labels[int(row.argmax())]
        assert score == pytest.approx(float(row.max()), abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r".*(query|value)"},
        {"exclude_modules": r".*\.(key|value)", "layers_to_transform": [0], "layers_pattern": "layer"},
    ],
)
def test_an_adapter_whose_modules_are_a_pattern_is_merged(base, tmp_path, changes):
    model = hf.AutoModelForSequenceClassification.from_pretrained(base)
    wanted = logits_of(adapter_of(model, tmp_path / "adapter", **changes), base)
    found = answers(tmp_path / "adapter", tmp_path / "store")
    assert_same(found, wanted, model.config.id2label)


def test_an_adapter_is_merged_into_the_model_that_it_names(base, tmp_path):
    model = hf.AutoModelForSequenceClassification.from_pretrained(base)
    plain = logits_of(model, base)
    adapted = adapter_of(model, tmp_path / "adapter")
    wanted = logits_of(adapted, base)
    assert (wanted - plain).abs().max() > 1e-3  # the adapter matters
    downloads = Download("acme/lora", "a" * 40), Download("acme/tiny", "b" * 40)
    for folder, download in zip((tmp_path / "adapter", base), downloads, strict=True):
        (folder / DOWNLOADS).write_bytes(to_bytes([download]))
    found = answers(tmp_path / "adapter", tmp_path / "store")
    assert_same(found, wanted, model.config.id2label)
    assert downloads_of(tmp_path / "store") == downloads
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_adapter_beside_the_weights_changes_those(base, tmp_path):
    """Its description may name a model elsewhere: transformers takes the weights that lie beside it."""
    model = hf.AutoModelForSequenceClassification.from_pretrained(base)
    wanted = logits_of(adapter_of(model, base), base)
    described = json.loads((base / "adapter_config.json").read_text())
    (base / "adapter_config.json").write_text(json.dumps({**described, "base_model_name_or_path": "none/such"}))
    found = answers(base, tmp_path / "store")
    assert_same(found, wanted, model.config.id2label)


def test_a_new_head_comes_from_the_adapter(tmp_path):
    base = write_classifier(tmp_path / "base", "bert", bare=True)
    model = hf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)
    wanted = logits_of(adapter_of(model, tmp_path / "adapter"), base)
    found = answers(tmp_path / "adapter", tmp_path / "store")
    assert_same(found, wanted, {id: f"LABEL_{id}" for id in range(5)})


def test_what_cannot_be_merged_is_refused(base, tmp_path):
    bare = write_classifier(tmp_path / "bare", "bert", bare=True)
    model = hf.AutoModelForSequenceClassification.from_pretrained(bare)
    adapter_of(model, tmp_path / "headless", task_type=None)
    prompts = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    model = hf.AutoModelForSequenceClassification.from_pretrained(base)
    peft.get_peft_model(model, prompts).save_pretrained(tmp_path / "prompts")
    wide = KNOWN["bert"]().config
    wide.hidden_size = 64
    hf.BertForSequenceClassification(wide).save_pretrained(tmp_path / "wide")
    adapter_of(hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "wide"), tmp_path / "misfit")
    described = json.loads((tmp_path / "misfit" / "adapter_config.json").read_text())
    described["base_model_name_or_path"] = str(base)
    (tmp_path / "misfit" / "adapter_config.json").write_text(json.dumps(described))
    described = json.loads((tmp_path / "headless" / "adapter_config.json").read_text())
    described["task_type"] = "SEQ_CLS"
    (tmp_path / "headless" / "adapter_config.json").write_text(json.dumps(described))
    reasons = {"headless": "neither in the adapter nor in its model", "prompts": "PROMPT_TUNING, which no weights"}
    for name, reason in {**reasons, "misfit": "does not fit the model"}.items():
        with pytest.raises(SourceError, match=reason):
            offramp.divide(tmp_path / name, tmp_path / "store")
        assert not (tmp_path / "store").exists()


SLOW = "(.*.*)*(.*.*)*(.*.*)*x"
HOSTILE = [
    ({"target_modules": SLOW}, None),
    ({"exclude_modules": SLOW}, None),
    ({"layers_pattern": SLOW, "layers_to_transform": [0]}, None),
    ({"layers_pattern": ["layer", SLOW], "layers_to_transform": [0]}, "the pattern"),
    ({"modules_to_save": ["classifier", SLOW]}, "the pattern"),
    ({"modules_to_save": ["*x"]}, "the pattern"),
    ({"modules_to_save": [7]}, "what it cannot ask for"),
    ({"ensure_weight_tying": True, "target_modules": ["query", SLOW]}, "the pattern"),
    ({"target_parameters": ["a.b"], "target_modules": SLOW}, "the pattern"),
    ({"target_parameters": ["a.b"], "exclude_modules": SLOW}, "the pattern"),
    ({"target_parameters": ["a.b"], "layers_pattern": SLOW}, "the pattern"),
    ({"peft_type": "IA3", "feedforward_modules": SLOW}, "the pattern"),
    ({"peft_type": "FOURIERFT", "n_frequency_pattern": {SLOW: 2}}, "the pattern"),
    ({"peft_type": "FOURIERFT", "n_frequency_pattern": ["query"]}, "patterns that are none"),
    ({"rank_pattern": {".?" * 50 + "x": 2}}, "the pattern"),
    ({"rank_pattern": {"(.|..)" * 40 + "x": 2}}, "the pattern"),
    ({"rank_pattern": {"(?x:(.*.*) *)x": 2}}, "the pattern"),
    ({"rank_pattern": {"x" * 301: 2}}, "the pattern"),
    ({"rank_pattern": {"(.*.*)*(.*.*)*x": 2}}, "the pattern"),
    ({"alpha_pattern": {".*.*.*.*x": 2}}, "the pattern"),
    ({"alpha_pattern": ["query"]}, "patterns that are none"),
    ({"r": 3_000_000}, "the rank 3000000"),
    ({"r": True}, "the rank True"),
    ({"rank_pattern": {"query": 3_000_000}}, "the rank 3000000"),
    ({"init_lora_weights": "pissa_niter_100000000"}, "the initialisation"),
    ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 10**9}}, "the initialisation"),
    ({"layer_replication": [[0, 1]] * 100_000}, "layers"),
    ({"layer_replication": [[0, 10**9]]}, "layers"),
    ({"layer_replication": 7}, "what it cannot ask for"),
    ({"megatron_config": {"a": 1}, "megatron_core": "this"}, "modules of another library"),
    ({"peft_type": "XLORA", "adapters": {"0": "../other"}}, "which no weights can hold"),
    ({"peft_type": ["LORA"]}, "which offramp does not merge"),
    ({"peft_type": "\x1b[2J"}, "which offramp does not merge"),
]
LEGAL = [
    {},
    {"rank_pattern": {r"layer\.\d+\.attention.*query": 2}, "alpha_pattern": {"query": 3}},
    {"rank_pattern": {r".*\.(0|1)\.attention.*\.(?:query|value)": 2}},
    {"modules_to_save": ["classifier", "pooler.dense"], "ensure_weight_tying": True},
    {"exclude_modules": r".*vision.*\.attn.*\.(q|k|v)_proj", "layers_pattern": "layer"},
    {"target_parameters": ["a.b"], "target_modules": r".*\.(query|value)", "layers_pattern": ["layer", "blocks?"]},
    {"peft_type": "IA3", "feedforward_modules": r".*\.(output|intermediate)\.dense"},
    {"peft_type": "FOURIERFT", "n_frequency_pattern": {r"layer\.\d+\.query": 500}},
    {"init_lora_weights": "pissa_niter_16"},
    {"layer_replication": [[0, 2]]},
    {"r": 8},
]


def test_settings_of_strangers_take_no_time_memory_or_other_files(base, tmp_path):
    """peft follows them before it compares anything: a pattern takes hours, a rank gigabytes."""
    adapter_of(hf.AutoModelForSequenceClassification.from_pretrained(base), tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    described, weights = json.loads(file.read_text()), adapters._weights_of(tmp_path / "adapter")
    for changes, reason in HOSTILE:
        settings = {**described, **changes}
        if reason is None:  # the weights name the modules
            file.write_text(json.dumps(settings))
            found = adapters._described(file.parent, weights)
            assert found.target_modules == {key.split(".lora_A")[0][17:] for key in weights if "lora_A" in key}
            assert (found.exclude_modules, found.layers_pattern) == (None, None)
            continue
        with pytest.raises(SourceError, match=reason):
            adapters._require_settings(file.parent, settings, weights)
    for twin in LEGAL:
        adapters._require_settings(file.parent, {**described, **twin}, weights)


def test_no_pattern_that_is_taken_needs_more_than_moments():
    name = "bert.encoder.layer.11." + "attention." * 6 + "self.query"
    several = "|".join("." * size for size in range(1, 17))
    for pattern in (f".*.*({several[:140]})({several[:140]})!", f"({several[:60]}.)" * 4 + "!", "(.*)!(.*)"):
        assert not adapters._is_slow(pattern)
        start = time.process_time()
        assert re.match(rf"(.*\.)?({pattern})$", name) is None
        assert time.process_time() - start < 5


RANKS = [
    ("LORA", {"a.lora_A.weight": (128, 64, 3, 3), "a.lora_B.weight": (256, 128, 1, 1)}, {"r": 64}),
    ("LORA", {"a.lora_A.weight": (128, 512, 3, 3), "a.lora_B.weight": (256, 128, 1, 1)}, {"r": 128}),
    ("LORA", {"a.lora_A.weight": (128, 256), "a.lora_B.weight": (256, 128)}, {"r": 8, "rank_pattern": {"a": 128}}),
    ("VERA", {"a.vera_lambda_b": (8,), "a.vera_lambda_d": (256,)}, {"r": 256}),
    ("VERA", {"vera_A": (256, 8), "vera_B": (8, 256), "a.vera_lambda_d": (256,)}, {"r": 256}),
    ("LOHA", {"a.hada_w1_a": (80, 70), "a.hada_w1_b": (70, 80)}, {"r": 70}),
    ("ADALORA", {"a.lora_A": (1, 8)}, {"init_r": 12, "r": 8, "rank_pattern": {"a.lora_E": [True, False, True]}}),
]


@pytest.mark.parametrize("kind, shapes, settings", RANKS)
def test_ranks_are_held_against_the_weights_that_have_them(kind, shapes, settings, tmp_path):
    weights = {f"base_model.model.{name}": torch.empty(shape) for name, shape in shapes.items()}
    settings = {"peft_type": kind, **settings}
    adapters._require_settings(tmp_path, settings, weights)
    for wrong in ({"r": 600}, {"rank_pattern": {"a": 600}}, {"rank_pattern": {"a": [600]}}):
        with pytest.raises(SourceError, match=r"the rank \[?600"):
            adapters._require_settings(tmp_path, {**settings, **wrong}, weights)


def test_a_kind_is_refused_for_the_true_reason(tmp_path):
    for kind in peft.PeftType.__members__:
        model = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
        if kind in messages.MERGED:
            continue
        merges = kind not in adapters.INPUTS
        reason = "offramp does not merge .* - merge the adapter into" if merges else "no weights can hold .* - train an"
        with pytest.raises(SourceError, match=f"an adapter of kind {kind}, which {reason}"):
            adapters._require_settings(tmp_path, {"peft_type": kind}, {})
        assert merges <= hasattr(model, "merge_and_unload"), kind  # the remedy can be carried out


def test_tensors_of_each_kind_are_known_by_the_names_that_peft_gives_them():
    for kind, name in messages.MERGED.items():
        prefix = peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind]
        assert prefix.startswith(f"{name}_"), kind
        own = f"model.dense.{prefix}x.weight"
        assert messages.adapter_tensors([own, f"model.{name}.weight"]) == [own]


@pytest.mark.parametrize("revision", [None, "v1"])
def test_the_model_of_an_adapter_is_of_the_revision_that_it_names(base, tmp_path, monkeypatch, revision):
    adapter_of(hf.AutoModelForSequenceClassification.from_pretrained(base), tmp_path / "adapter")
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    described = {**described, "base_model_name_or_path": "acme/tiny", "revision": revision}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(described))
    asked = []
    monkeypatch.setattr("offramp.division.adapters.resolve", lambda model, offline: asked.append(model) or base)
    offramp.divide(tmp_path / "adapter", tmp_path / "store")
    assert asked == ["acme/tiny" if revision is None else f"acme/tiny@{revision}"]


@pytest.mark.parametrize("content", [None, b"no weights"])
def test_an_adapter_without_its_weights_is_refused(base, tmp_path, content):
    """peft would look for them on the hub, where the path of a folder is no name."""
    model = hf.AutoModelForSequenceClassification.from_pretrained(base)
    adapter_of(model, tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    if content is not None:
        (tmp_path / "adapter/adapter_model.safetensors").write_bytes(content)
    with pytest.raises(SourceError, match=r"weights of the adapter cannot be read .* - get the whole folder of"):
        offramp.divide(tmp_path / "adapter", tmp_path / "store")

import copy
import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import offramp
from offramp.checkpoints.checkpoint import load_classifier
from offramp.checkpoints.exits import ModelWithExits
from offramp.checkpoints.tokenizing import open_text_encoder
from offramp.errors import SourceError, UsageError
from offramp.program.heads import FORMS
from offramp.program.program import Texts
from offramp.training.subjects import FolderModel, load_model, save_model
from tests.training.tiny import LABELS, make_model, write_checkpoint


class Listener(logging.Handler):
    """Collects what transformers warns of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.records = []
        self.emit = self.records.append


@pytest.fixture
def warned():
    listener, logger = Listener(), logging.getLogger("transformers")
    level, disabled = logger.level, logging.root.manager.disable
    logger.setLevel(logging.WARNING)  # another test may have left other settings
    logging.disable(logging.NOTSET)
    logger.addHandler(listener)
    yield listener.records
    logger.removeHandler(listener)
    logger.setLevel(level)
    logging.disable(disabled)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "electra"])
def test_weights_of_a_bare_encoder_come_from_the_checkpoint(model_type, tmp_path, warned):
    encoder = make_model(model_type, seed=1).base_model
    write_checkpoint(tmp_path, encoder)
    model, head_is_new = load_model(tmp_path, LABELS)
    assert head_is_new
    assert warned, "transformers tells of the new head, unless it is told not to"
    loaded = model.base_model.state_dict()
    for name, tensor in encoder.state_dict().items():
        assert name.startswith("pooler.") or torch.equal(loaded[name], tensor), name


def test_labels_and_problem_are_in_the_config(tmp_path):
    write_checkpoint(tmp_path, make_model("bert").base_model)
    config = load_model(tmp_path, ("x", "y"))[0].config
    assert (config.id2label, config.label2id) == ({0: "x", 1: "y"}, {"x": 0, "y": 1})
    assert (config.num_labels, config.problem_type) == (2, "single_label_classification")


def test_a_head_that_fits_is_kept_and_another_is_replaced(tmp_path):
    trained = make_model("bert", seed=1)
    write_checkpoint(tmp_path, trained)
    model, head_is_new = load_model(tmp_path, LABELS)
    assert not head_is_new
    assert torch.equal(model.classifier.weight, trained.classifier.weight)
    model, head_is_new = load_model(tmp_path, ("x", "y"))
    assert head_is_new
    assert model.classifier.weight.shape == (2, 32)


def test_no_labels_are_a_regression(tmp_path):
    write_checkpoint(tmp_path, make_model("bert").base_model)
    config = load_model(tmp_path, ())[0].config
    assert (config.num_labels, config.problem_type, config.id2label) == (1, "regression", {0: "score"})


def test_half_precision_is_widened(tmp_path):
    encoder = make_model("bert").base_model.half()
    write_checkpoint(tmp_path, encoder)
    model, _ = load_model(tmp_path, LABELS)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    query = "encoder.layer.2.attention.self.query.weight"
    assert torch.equal(model.bert.state_dict()[query], encoder.state_dict()[query].float())


@pytest.mark.parametrize("change", ["missing", "mis-shaped"])
def test_a_tensor_of_the_encoder_that_is_not_there_is_named(change, tmp_path):
    write_checkpoint(tmp_path, make_model("bert").base_model)
    name = "encoder.layer.1.output.dense.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    tensor = tensors.pop(name)
    if change == "mis-shaped":
        tensors[name] = tensor[:, :1].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=name):
        load_model(tmp_path, LABELS)


def test_what_could_not_be_trained_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        FolderModel(tmp_path / "absent", 8)
    write_checkpoint(tmp_path, make_model("bert"))
    subject = FolderModel(tmp_path, 24)
    assert (subject.facts.num_exits, len(subject.fingerprint)) == (3, 64)
    with pytest.raises(UsageError, match="max_length 25 exceeds the 24"):
        FolderModel(tmp_path, 25)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(SourceError, match="no tokenizer"):
        FolderModel(tmp_path, 8)


def test_an_architecture_that_cannot_be_divided_is_refused(tmp_path):
    write_checkpoint(tmp_path, make_model("bert"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(SourceError, match="gpt2"):
        FolderModel(tmp_path, 8)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "electra"])
def test_saved_model_loads_silently_and_answers_the_same(model_type, tmp_path, warned):
    model = ModelWithExits(make_model(model_type)).eval()
    save_model(model, tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not warned
    assert not any(info.values())
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.model.state_dict()[name]), name
    aligned = copy.deepcopy(loaded)  # as loaded, tensors lie where the file has them, which changes the last bits
    inputs = {"input_ids": torch.tensor([[5, 9, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(aligned(**inputs).logits, model(**inputs)[-1])


def test_saved_exits(tmp_path):
    model = ModelWithExits(make_model("bert"))
    save_model(model, tmp_path)
    description = json.loads((tmp_path / "exits.json").read_text())
    assert description == {"form": "mean-linear", "exits": [1, 2], "trained": True}
    tensors = load_file(tmp_path / "exits.safetensors")
    assert {(name, tensor.dtype) for name, tensor in tensors.items()} == {
        (f"exit.{number}.{part}", torch.float32) for number in (1, 2) for part in ("weight", "bias")
    }
    for number, head in enumerate(model.heads, 1):
        assert torch.equal(tensors[f"exit.{number}.weight"], head.exit.weight)
        assert torch.equal(tensors[f"exit.{number}.bias"], head.exit.bias)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
@torch.no_grad()
def test_a_saved_classifier_is_read_with_its_exits(model_type, form, tmp_path):
    model = ModelWithExits(make_model(model_type), form).eval()
    save_model(model, tmp_path)
    loaded = load_classifier(tmp_path).cpu().eval()
    inputs = {"input_ids": torch.tensor([[5, 9, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    for of_loaded, of_model in zip(loaded(**inputs), model(**inputs), strict=True):
        torch.testing.assert_close(of_loaded, of_model)


def test_a_classifier_without_exits_is_read_as_it_is(tmp_path):
    save_model(ModelWithExits(make_model("bert")), tmp_path, with_exits=False)
    assert not isinstance(load_classifier(tmp_path), ModelWithExits)


def test_exits_that_do_not_fit_are_refused(tmp_path):
    save_model(ModelWithExits(make_model("bert")), tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "exits.safetensors")
    del tensors["exit.2.bias"]
    save_file(tensors, tmp_path / "run" / "exits.safetensors")
    with pytest.raises(SourceError, match=r"exits do not fit the model: .* - train the exits again"):
        load_classifier(tmp_path / "run")
    whole = (tmp_path / "run" / "exits.safetensors").read_bytes()
    (tmp_path / "run" / "exits.safetensors").write_bytes(whole[:-1])
    with pytest.raises(SourceError, match=r"exits cannot be read .* - train the exits again"):
        load_classifier(tmp_path / "run")
    (tmp_path / "run" / "exits.json").write_text('{"form": "mean-linear", "trained": false}')
    with pytest.raises(SourceError, match="the exits were never trained"):
        load_classifier(tmp_path / "run")


def test_a_store_without_a_tokenizer_is_made_again_from_a_folder_that_has_one(tmp_path):
    """The files were to be copied into the store, which reads no files but those that it lists."""
    make_model("bert").save_pretrained(tmp_path / "model")
    store = offramp.divide(tmp_path / "model", tmp_path / "store")
    (store / "vocab.txt").write_text("the\n")
    for read in (
        lambda folder: FolderModel(folder, 8),
        lambda folder: open_text_encoder(folder, Texts(16, 24, 2, 0), 8, print),
    ):
        with pytest.raises(SourceError, match=r"no tokenizer.* to the model's folder; then divide the model again"):
            read(store)

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import offramp.training.trainer
from offramp.errors import MissingExtraError, NonFiniteError, UsageError
from offramp.models.exits import ModelWithExits
from offramp.training import TrainSettings, train_exits
from offramp.training.encoding import encode_examples, make_collator
from offramp.training.trainer import predict
from tests.training.tiny import LABELS, NUM_LAYERS, examples, make_model, write_checkpoint

TRAIN, TUNE = examples(64), examples(30, seed=1)
FORTY_STEPS = TrainSettings(epochs=10, batch_size=16, learning_rate=1e-2, head_learning_rate=1e-2, max_length=16)
FILES = {
    "config.json",
    "exits.json",
    "exits.safetensors",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module", params=["bert", "distilbert"])
def source(request, tmp_path_factory):
    return write_checkpoint(
        tmp_path_factory.mktemp(request.param), make_model(request.param, initializer_range=0.1).base_model
    )


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """A run folder, its metrics and what was told on the way."""
    out, told = tmp_path_factory.mktemp("runs") / "run", []
    return out, train_exits(source, TRAIN, TUNE, out, labels=LABELS, settings=FORTY_STEPS, progress=told.append), told


@pytest.fixture
def bert(tmp_path):
    return write_checkpoint(tmp_path / "bert", make_model("bert").base_model)


def test_every_exit_learns_a_toy_task_in_forty_steps(trained):
    _, metrics, told = trained
    assert metrics.logits_KNC.shape == (NUM_LAYERS, len(TUNE), len(LABELS))
    assert len(metrics.accuracies) == NUM_LAYERS
    assert min(metrics.accuracies) >= 0.9
    assert sum("of 40: loss" in line for line in told) == 20


def test_run_folder_is_a_plain_folder_of_transformers(trained):
    out, _, _ = trained
    assert {path.name for path in out.iterdir()} == FILES
    assert [path.name for path in out.parent.iterdir()] == ["run"]
    config = AutoModelForSequenceClassification.from_pretrained(out).config
    assert config.id2label == dict(enumerate(LABELS))
    assert config.problem_type == "single_label_classification"


def test_metrics_are_those_of_the_saved_files(trained):
    out, metrics, _ = trained
    model = ModelWithExits(AutoModelForSequenceClassification.from_pretrained(out)).eval()
    for name, tensor in load_file(out / "exits.safetensors").items():
        _, number, part = name.split(".")
        model.heads[int(number) - 1].state_dict()[part].copy_(tensor)
    tokenizer = AutoTokenizer.from_pretrained(out)
    right = torch.zeros(NUM_LAYERS)
    for text, label in TUNE:
        encoded = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            right += torch.stack(
                [logits.argmax() == label for logits in model(encoded.input_ids, encoded.attention_mask)]
            )
    assert tuple((right / len(TUNE)).tolist()) == pytest.approx(metrics.accuracies)


def test_tokenizer_is_saved_as_it_was(source, trained):
    text = "the red rose is " * 10
    assert AutoTokenizer.from_pretrained(trained[0])(text) == AutoTokenizer.from_pretrained(source)(text)


def test_equal_seeds_give_equal_files(source, trained, tmp_path):
    train_exits(source, TRAIN, TUNE, tmp_path / "again", labels=LABELS, settings=FORTY_STEPS)
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (trained[0] / name).read_bytes(), name


def test_another_seed_gives_other_exits(bert, tmp_path):
    files = []
    for seed in (0, 1):
        settings = TrainSettings(epochs=1, max_length=16, seed=seed)
        train_exits(bert, TRAIN[:4], TUNE[:1], tmp_path / str(seed), labels=LABELS, settings=settings)
        files.append((tmp_path / str(seed) / "exits.safetensors").read_bytes())
    assert files[0] != files[1]


def test_dropout_is_off_when_exits_are_measured(bert):
    model = ModelWithExits(make_model("bert", hidden_dropout_prob=0.5)).train()
    tokenizer = AutoTokenizer.from_pretrained(bert)
    rows = encode_examples(examples(60), tokenizer, model.model, 16)
    collate = make_collator(tokenizer)
    inputs = collate(rows)
    labels = inputs.pop("labels")
    assert labels.tolist() == [label for _, label in examples(60)]
    with torch.no_grad():
        assert not torch.equal(model(**inputs)[0], model(**inputs)[0])
        said = predict(model, rows, collate, 7)
        expected = torch.stack(model.eval()(**inputs))
    assert torch.allclose(said, expected, atol=1e-5)


def test_types_go_to_models_that_take_them(bert):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    pair = [(("the rose", "is red"), 0)]
    (row,) = encode_examples(pair, tokenizer, make_model("bert"), 16)
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    (row,) = encode_examples(pair, tokenizer, make_model("distilbert"), 16)
    assert sorted(row) == ["attention_mask", "input_ids", "labels"]


def test_texts_are_cut_to_max_length(bert):
    (row,) = encode_examples([("a rose " * 20, 2)], AutoTokenizer.from_pretrained(bert), make_model("bert"), 10)
    assert len(row["input_ids"]) == 10
    assert row["labels"] == 2


def test_heads_learn_at_their_own_rate(bert, tmp_path):
    settings = TrainSettings(epochs=1, learning_rate=1e-12, head_learning_rate=1e-2, max_length=16)
    train_exits(bert, TRAIN, TUNE[:1], tmp_path / "run", labels=LABELS, settings=settings)
    before, after = load_file(bert / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    query = "encoder.layer.0.attention.self.query.weight"
    torch.testing.assert_close(after["bert." + query], before[query], atol=1e-9, rtol=0)
    assert load_file(tmp_path / "run" / "exits.safetensors")["exit.1.bias"].abs().max() > 1e-3


def test_divergence_names_the_exit_and_leaves_nothing(bert, tmp_path):
    settings = TrainSettings(learning_rate=1e30, head_learning_rate=1e30, batch_size=4, warmup=0.0, max_length=16)
    with pytest.raises(NonFiniteError, match=r"of exit \d is not finite - training step 2 - lower the learning rate"):
        train_exits(bert, TRAIN, TUNE, tmp_path / "run", labels=LABELS, settings=settings)
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]


def test_nothing_is_printed(bert, tmp_path, capfd):
    settings = TrainSettings(epochs=1, max_length=16)
    train_exits(bert, TRAIN[:4], TUNE[:1], tmp_path / "run", labels=LABELS, settings=settings)
    assert capfd.readouterr() == ("", "")


def test_impossible_data_is_refused(bert, tmp_path):
    with pytest.raises(UsageError, match="no examples to train on"):
        train_exits(bert, [], TUNE, tmp_path / "run", labels=LABELS)
    with pytest.raises(UsageError, match="no examples to tune on"):
        train_exits(bert, TRAIN, [], tmp_path / "run", labels=LABELS)
    with pytest.raises(ValueError, match="from 0 to 2, not 3"):
        train_exits(bert, TRAIN, [("a rose", 3)], tmp_path / "run", labels=LABELS)


def test_a_target_that_exists_is_refused_before_training(bert, tmp_path):
    told = []
    (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match="target exists"):
        train_exits(bert, TRAIN, TUNE, tmp_path / "run", labels=LABELS, settings=FORTY_STEPS, progress=told.append)
    assert not told


def test_a_library_that_is_missing_is_named(bert, tmp_path, monkeypatch):
    monkeypatch.setattr("offramp.training.pipeline.find_spec", lambda name: None if name == "accelerate" else object())
    with pytest.raises(MissingExtraError, match=r"accelerate is not installed - pip install 'offramp\[train\]'"):
        train_exits(bert, TRAIN, TUNE, tmp_path / "run", labels=LABELS)


def test_importing_the_room_imports_no_torch():
    code = "import offramp.training, sys; assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    root = Path(offramp.training.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(root)})

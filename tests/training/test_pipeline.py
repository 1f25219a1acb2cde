import json
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import offramp.training.trainer
from offramp.checkpoints.checkpoint import load_classifier, predict, predict_windows, to_tensors
from offramp.checkpoints.downloads import DOWNLOADS, Download, downloads_of, to_bytes
from offramp.checkpoints.exits import ModelWithExits
from offramp.division import divide
from offramp.errors import DiskFullError, MissingExtraError, NonFiniteError, SourceError, UsageError
from offramp.program.heads import FORMS
from offramp.store.trained_rows import read_trained_rows
from offramp.tasks import TextEncoder
from offramp.tasks.digests import row_digests
from offramp.tasks.rows import encode_rows
from offramp.training import TrainSettings, train_exits
from offramp.training.trainer import _save_steps
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
    "train.json",
    "trained-rows.json",
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
    assert len(metrics.scores) == NUM_LAYERS
    assert min(scores["accuracy"] for scores in metrics.scores) >= 90
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
        model.heads[int(number) - 1].exit.state_dict()[part].copy_(tensor)
    tokenizer = AutoTokenizer.from_pretrained(out)
    right = torch.zeros(NUM_LAYERS)
    for text, label in TUNE:
        encoded = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            right += torch.stack([logits.argmax() == label for logits in model(**encoded)])
    assert (100 * right / len(TUNE)).tolist() == pytest.approx([scores["score"] for scores in metrics.scores])


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
        settings = TrainSettings(epochs=1, heads_epochs=1, max_length=16, seed=seed)
        train_exits(bert, TRAIN[:4], TUNE[:1], tmp_path / str(seed), labels=LABELS, settings=settings)
        files.append((tmp_path / str(seed) / "exits.safetensors").read_bytes())
    assert files[0] != files[1]


def rows_of(folder, model, given, max_length=16):
    encoder = ModelWithExits(model).encoder
    return encode_rows(given, TextEncoder.from_folder(folder, encoder, max_length, print), encoder, is_regression=False)


def test_dropout_is_off_when_exits_are_measured(bert):
    model = ModelWithExits(make_model("bert", hidden_dropout_prob=0.5)).train()
    rows = rows_of(bert, model.model, examples(60))
    inputs = to_tensors(rows.batch(range(60)))
    labels = inputs.pop("labels")
    assert labels.tolist() == [label for _, label in examples(60)]
    with torch.no_grad():
        assert not torch.equal(model(**inputs)[0], model(**inputs)[0])
        said = predict(model, rows, 7)
        expected = torch.stack(model.eval()(**inputs))
    assert torch.allclose(torch.from_numpy(said), expected, atol=1e-5)


def test_windows_come_in_the_order_of_the_rows(bert, monkeypatch):
    monkeypatch.setattr("offramp.checkpoints.checkpoint.WINDOW_BATCHES", 2)
    model = ModelWithExits(make_model("bert"))
    rows = rows_of(bert, model.model, examples(23))
    inputs = to_tensors(rows.batch(range(23)))
    del inputs["labels"]
    with torch.no_grad():
        hidden = model.eval().model(**inputs, output_hidden_states=True).hidden_states
    windows = list(predict_windows(model, rows, 4, with_features=True))
    assert [start for start, _, _ in windows] == [0, 8, 16]
    found = torch.cat([torch.from_numpy(features) for _, _, features in windows])
    torch.testing.assert_close(found, torch.stack([layer[:, 0] for layer in hidden[1:]], 1), atol=1e-5, rtol=0)
    assert torch.allclose(torch.from_numpy(predict(model, rows, 4)), torch.stack(model(**inputs)), atol=1e-5)


def test_an_output_that_is_not_finite_is_named(bert):
    model = ModelWithExits(make_model("bert"))
    torch.nn.init.constant_(model.heads[1].exit.bias, float("inf"))
    with pytest.raises(NonFiniteError, match="output of exit 2 is not finite"):
        predict(model, rows_of(bert, model.model, examples(5)), 2)


def test_rows_are_those_of_the_tokenizer_of_transformers(bert):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    given = [(("the rose", "is red"), 0), ("a rose " * 20, 2), ("blue", 1)]
    rows = rows_of(bert, make_model("bert"), given)
    encoded = tokenizer(
        ["the rose", "a rose " * 20, "blue"], truncation=True, max_length=16, padding=True, return_tensors="pt"
    )
    batch = to_tensors(rows.batch([1, 2]))
    assert torch.equal(batch["input_ids"], encoded.input_ids[1:])
    assert torch.equal(batch["attention_mask"], encoded.attention_mask[1:])
    assert batch["labels"].tolist() == [2, 1]
    assert rows.batch([0])["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1]], "pairs have their segments"
    assert rows.lengths_N.tolist() == [7, 16, 3]
    assert "token_type_ids" not in rows_of(bert, make_model("distilbert"), given).batch([0]), "DistilBERT takes none"


def test_heads_learn_at_their_own_rate(bert, tmp_path):
    settings = TrainSettings(epochs=1, heads_epochs=0, learning_rate=1e-12, head_learning_rate=1e-2, max_length=16)
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
    settings = TrainSettings(epochs=1, heads_epochs=1, max_length=16)
    train_exits(bert, TRAIN[:4], TUNE[:1], tmp_path / "run", labels=LABELS, settings=settings)
    assert capfd.readouterr() == ("", "")


def test_impossible_data_is_refused(bert, tmp_path):
    with pytest.raises(UsageError, match="no examples to train on"):
        train_exits(bert, [], TUNE, tmp_path / "run", labels=LABELS)
    with pytest.raises(UsageError, match="no examples to tune on"):
        train_exits(bert, TRAIN, [], tmp_path / "run", labels=LABELS)
    with pytest.raises(ValueError, match="from 0 to 2, got 3"):
        train_exits(bert, TRAIN, [("a rose", 3)], tmp_path / "run", labels=LABELS)
    with pytest.raises(ValueError, match="values of tune must be finite, got nan"):
        train_exits(bert, TRAIN, [("a rose", float("nan"))], tmp_path / "run", labels=())
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]


def test_an_unknown_option_is_refused_with_the_known_ones(bert, tmp_path):
    with pytest.raises(
        ValueError, match="unknown option of train_exits epochs; known: settings, metrics, data, progre"
    ):
        train_exits(bert, TRAIN, TUNE, tmp_path / "run", labels=LABELS, epochs=3)


def test_a_target_that_exists_is_refused_before_training(bert, tmp_path):
    told = []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").touch()
    with pytest.raises(UsageError, match="target exists"):
        train_exits(bert, TRAIN, TUNE, tmp_path / "run", labels=LABELS, settings=FORTY_STEPS, progress=told.append)
    assert not told


def test_a_library_that_is_missing_is_named(bert, tmp_path, monkeypatch):
    monkeypatch.setattr("offramp.training.pipeline.find_spec", lambda name: None if name == "accelerate" else object())
    with pytest.raises(MissingExtraError, match=r"accelerate is not installed - pip install 'offramp\[train\]'"):
        train_exits(bert, TRAIN, TUNE, tmp_path / "run", labels=LABELS)


QUICK = {"epochs": 10, "heads_epochs": 10, "learning_rate": 5e-3, "head_learning_rate": 1e-2, "max_length": 16}
LEARNT = 60
"""Per cent; an exit that learnt nothing has 33."""


@pytest.mark.parametrize("form", FORMS)
def test_every_form_learns(source, form, tmp_path):
    settings = TrainSettings(heads=form, **QUICK)
    metrics = train_exits(source, TRAIN, TUNE, tmp_path / "run", labels=LABELS, settings=settings)
    assert min(scores["accuracy"] for scores in metrics.scores) >= LEARNT
    assert f'"form": "{form}"' in (tmp_path / "run" / "exits.json").read_text()


def test_distilled_exits_learn(source, tmp_path):
    settings = TrainSettings(loss="distill", **QUICK)
    metrics = train_exits(source, TRAIN, TUNE, tmp_path / "run", labels=LABELS, settings=settings)
    assert min(scores["accuracy"] for scores in metrics.scores) >= LEARNT


def test_plain_fine_tuning_leaves_no_exits_and_heads_alone_leave_the_model(source, tmp_path):
    plain = train_exits(
        source, TRAIN, TUNE, tmp_path / "plain", labels=LABELS, settings=TrainSettings(loss="last", **QUICK)
    )
    assert len(plain.scores) == 1
    assert not (tmp_path / "plain" / "exits.json").exists()
    settings = TrainSettings(loss="heads-only", **QUICK)
    heads = train_exits(tmp_path / "plain", TRAIN, TUNE, tmp_path / "heads", labels=LABELS, settings=settings)
    assert min(scores["accuracy"] for scores in heads.scores) >= LEARNT
    np.testing.assert_array_equal(heads.logits_KNC[-1], plain.logits_KNC[0])
    for name, tensor in load_file(tmp_path / "plain" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "heads" / "model.safetensors")[name]), name
    with pytest.raises(SourceError, match=r"it has no head for 3 labels - .* - train a model with --loss last first"):
        train_exits(source, TRAIN, TUNE, tmp_path / "none", labels=LABELS, settings=settings)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["mean-linear", "own-shared"])
def test_heads_are_trained_on_alone_after_the_model(source, form, precision, tmp_path):
    """The model stays as joint training left it, bit for bit, and with it the last exit."""
    losses = []
    for epochs in (0, 30):
        settings = TrainSettings(
            heads=form, precision=precision, heads_epochs=epochs, epochs=1, head_learning_rate=1e-2, max_length=16
        )
        out = tmp_path / str(epochs)
        metrics = train_exits(source, TRAIN, TRAIN, out, labels=LABELS, settings=settings)
        logits = torch.from_numpy(metrics.logits_KNC).double()
        truth = torch.tensor([label for _, label in TRAIN])
        losses.append([torch.nn.functional.cross_entropy(each, truth).item() for each in logits])
    for name, tensor in load_file(tmp_path / "0" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "30" / "model.safetensors")[name]), name
    assert losses[1][-1] == losses[0][-1]
    assert all(after < before for before, after in zip(*(each[:-1] for each in losses), strict=True))


def test_a_model_of_one_layer_has_no_heads_to_train(tmp_path):
    source = write_checkpoint(tmp_path / "one", make_model("bert", num_hidden_layers=1).base_model)
    settings = TrainSettings(epochs=1, max_length=16)
    metrics = train_exits(source, TRAIN, TUNE, tmp_path / "run", labels=LABELS, settings=settings)
    assert len(metrics.scores) == 1


def test_heads_alone_are_trained_on_so_many_rows_at_most(bert, tmp_path, monkeypatch):
    monkeypatch.setattr("offramp.training.job.MAX_HEADS_ROWS", 24)
    told = []
    settings = TrainSettings(epochs=1, heads_epochs=1, max_length=16)
    train_exits(bert, TRAIN, TUNE, tmp_path / "run", labels=LABELS, settings=settings, progress=told.append)
    assert "training 2 heads on a frozen model with 24 rows" in told


def test_exits_of_a_regression_learn_a_value(source, tmp_path):
    def values(given):
        return [(text, float(label)) for text, label in given]

    settings = TrainSettings(loss="mixed", **QUICK)
    out = tmp_path / "run"
    metrics = train_exits(source, values(TRAIN), values(TUNE), out, labels=(), settings=settings)
    assert metrics.logits_KNC.shape == (NUM_LAYERS, len(TUNE), 1)
    assert min(scores["pearson"] for scores in metrics.scores) >= LEARNT
    assert AutoModelForSequenceClassification.from_pretrained(out).config.problem_type == "regression"
    settings = TrainSettings(loss="heads-only", heads_epochs=1, max_length=16)
    heads = train_exits(out, values(TRAIN), values(TUNE), tmp_path / "heads", labels=(), settings=settings)
    np.testing.assert_array_equal(heads.logits_KNC[-1], metrics.logits_KNC[-1])


def test_the_last_exit_is_trained_alone_in_the_first_half_of_mixed(source, tmp_path, monkeypatch):
    asked = []
    forward = ModelWithExits.forward

    def spy(self, *args, last_only=False, **inputs):
        asked.append(last_only)
        return forward(self, *args, last_only=last_only, **inputs)

    monkeypatch.setattr(ModelWithExits, "forward", spy)
    settings = TrainSettings(loss="mixed", epochs=1, heads_epochs=0, batch_size=16, max_length=16)
    train_exits(source, TRAIN[:48], TUNE[:1], tmp_path / "run", labels=LABELS, settings=settings)
    assert asked == [True, True, False], "three steps"


def test_batches_that_are_accumulated_make_the_step_of_a_large_one(bert, tmp_path):
    """Equal texts, so that every half of a batch has the mean of the whole."""
    train, files = [("the red rose", 0)] * 16, []
    for batch_size, accumulate in ((16, 1), (8, 2)):
        settings = TrainSettings(epochs=1, heads_epochs=1, max_length=16, batch_size=batch_size, accumulate=accumulate)
        source = write_checkpoint(
            tmp_path / f"model-{accumulate}",
            make_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).base_model,
        )
        out = tmp_path / f"run-{accumulate}"
        train_exits(source, train, TUNE[:1], out, labels=LABELS, settings=settings)
        files.append(load_file(out / "model.safetensors"))
    for name, tensor in files[0].items():
        torch.testing.assert_close(files[1][name], tensor, atol=1e-6, rtol=0)


def test_bfloat16_trains_weights_of_float32(source, tmp_path):
    settings = TrainSettings(precision="bfloat16", **{**QUICK, "epochs": 5, "heads_epochs": 5})
    metrics = train_exits(source, TRAIN, TUNE, tmp_path / "run", labels=LABELS, settings=settings)
    assert min(scores["accuracy"] for scores in metrics.scores) >= LEARNT
    assert {tensor.dtype for tensor in load_file(tmp_path / "run" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_float16_without_a_gpu_is_refused(bert, tmp_path):
    with pytest.raises(UsageError, match="float16 needs a GPU - use bfloat16"):
        settings = TrainSettings(precision="float16")
        train_exits(bert, TRAIN, TUNE, tmp_path / "run", labels=LABELS, settings=settings)


def test_a_report_that_nobody_takes_is_refused(bert, tmp_path):
    with pytest.raises(UsageError, match="cannot report to 'carrier-pigeon' - installed integrations: "):
        settings = TrainSettings(report_to="carrier-pigeon")
        train_exits(bert, TRAIN, TUNE, tmp_path / "run", labels=LABELS, settings=settings)


def test_importing_the_room_imports_no_torch():
    code = "import offramp.training, sys; assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    root = Path(offramp.training.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(root)})


@contextmanager
def small_files():
    """For the call alone: pytest writes to a file as well, perhaps."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("save_steps", [1, 500])
def test_a_full_disk_is_told(bert, tmp_path, save_steps):
    settings = TrainSettings(epochs=1, max_length=16, save_steps=save_steps)
    match = r"the limit of file sizes is reached - .*run.* - raise it \(ulimit -f unlimited\) and run again$"
    with pytest.raises(DiskFullError, match=match), small_files():
        train_exits(bert, TRAIN[:16], TUNE[:1], tmp_path / "run", labels=LABELS, settings=settings)
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]


def test_a_classifier_keeps_the_order_of_its_labels(tmp_path):
    """Its head knows them so: heads alone would answer permuted labels."""
    model = make_model("bert", seed=1)
    model.config.id2label = {0: "blue", 1: "red", 2: "green"}
    source = write_checkpoint(tmp_path / "source", model)
    settings = TrainSettings(loss="heads-only", heads_epochs=1, max_length=16)
    metrics = train_exits(source, TRAIN, TUNE, tmp_path / "run", labels=LABELS, settings=settings)
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").config
    assert config.id2label == {0: "blue", 1: "red", 2: "green"}
    tokenizer = AutoTokenizer.from_pretrained(source)
    right = 0
    for text, label in TUNE:
        with torch.no_grad():
            best = int(model.eval()(**tokenizer(text, return_tensors="pt")).logits.argmax())
        right += model.config.id2label[best] == LABELS[label]
    assert metrics.scores[-1]["accuracy"] == pytest.approx(100 * right / len(TUNE))
    with pytest.raises(
        SourceError, match="the labels of the model are blue, red, green, those of the data are a, b, c"
    ):
        train_exits(source, TRAIN, TUNE, tmp_path / "other", labels=("a", "b", "c"), settings=settings)


def test_exits_are_measured_in_float32_whatever_they_were_trained_in(source, tmp_path):
    """Autocast would go on in the trained model: scores would hang on how a run came to be measured."""
    settings = TrainSettings(precision="bfloat16", **{**QUICK, "epochs": 1, "heads_epochs": 1})
    first = train_exits(source, TRAIN, TUNE, tmp_path / "run", labels=LABELS, settings=settings)
    again = train_exits(source, TRAIN, TUNE, tmp_path / "run", labels=LABELS, settings=settings)
    np.testing.assert_array_equal(first.logits_KNC, again.logits_KNC)
    model = load_classifier(tmp_path / "run")
    rows = rows_of(tmp_path / "run", model.model, TUNE)
    np.testing.assert_array_equal(predict(model, rows, settings.batch_size), first.logits_KNC)


def test_a_short_training_has_checkpoints_too():
    assert [_save_steps(TrainSettings(epochs=3), num_rows) for num_rows in (1, 160, 1000, 100_000)] == [1, 6, 37, 500]


def test_what_the_data_are_is_kept(bert, tmp_path):
    settings = TrainSettings(epochs=1, max_length=16)
    cut = {"task": "toy", "split_seed": 3}
    train_exits(bert, TRAIN[:8], TUNE[:1], tmp_path / "run", labels=LABELS, settings=settings, data=cut)
    assert json.loads((tmp_path / "run" / "train.json").read_text())["data"] == cut
    with pytest.raises(UsageError, match="another configuration"):
        train_exits(bert, TRAIN[:8], TUNE[:1], tmp_path / "run", labels=LABELS, settings=settings)


def digests_in(folder, examples):
    """For each text, whether the folder records that it was trained on."""
    rows = read_trained_rows(folder)
    return rows.among(row_digests([text for text, _ in examples], rows.salt)).tolist()


COMMIT = Download("acme/tiny", "0123456789abcdef0123456789abcdef01234567")


def test_rows_and_download_of_this_training_and_of_those_before_it_are_recorded(bert, tmp_path):
    rows = [(f"the red rose {number}", number % 3) for number in range(30)]
    options = {"labels": LABELS, "settings": TrainSettings(loss="last", epochs=1, max_length=16)}
    (bert / DOWNLOADS).write_bytes(to_bytes([COMMIT]))
    train_exits(bert, rows[:10], rows[20:], tmp_path / "first", **options)
    assert digests_in(tmp_path / "first", rows) == [True] * 10 + [False] * 20
    assert downloads_of(tmp_path / "first") == (COMMIT,)
    options["settings"] = TrainSettings(loss="heads-only", heads_epochs=1, max_length=16)
    train_exits(tmp_path / "first", rows[5:15], rows[20:], tmp_path / "second", **options)
    assert digests_in(tmp_path / "second", rows) == [True] * 15 + [False] * 15
    assert downloads_of(tmp_path / "second") == (COMMIT,)
    assert digests_in(divide(tmp_path / "second", tmp_path / "store"), rows) == [True] * 15 + [False] * 15


def test_rows_of_tune_that_are_trained_on_are_counted(bert, tmp_path):
    told, settings = [], TrainSettings(loss="last", epochs=1, max_length=16)
    rows = [("a new rose", 0), *TRAIN[:4]]
    train_exits(bert, TRAIN, rows, tmp_path / "run", labels=LABELS, settings=settings, progress=told.append)
    assert any("measuring the exits on 5 rows, 4 of which were trained on" in line for line in told)


def with_keys(folder, **keys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


@pytest.mark.parametrize("keys", [{"output_attentions": True}, {"return_dict": False}, {"output_hidden_states": True}])
def test_keys_about_the_form_of_the_output_change_no_training(bert, tmp_path, keys):
    settings = TrainSettings(epochs=1, heads_epochs=1, max_length=16)
    expected = train_exits(bert, TRAIN, TUNE, tmp_path / "plain", labels=LABELS, settings=settings)
    with_keys(bert, **keys)
    found = train_exits(bert, TRAIN, TUNE, tmp_path / "run", labels=LABELS, settings=settings)
    assert np.array_equal(found.logits_KNC, expected.logits_KNC)


def test_a_config_that_transformers_refuses_is_no_internal_error(bert, tmp_path):
    with_keys(bert, hidden_dropout_prob=None)
    with pytest.raises(SourceError, match=r"config\.json cannot be read .*hidden_dropout_prob"):
        train_exits(bert, TRAIN, TUNE, tmp_path / "run", labels=LABELS, settings=FORTY_STEPS)
    with pytest.raises(SourceError, match=r"config\.json cannot be read .*hidden_dropout_prob"):
        load_classifier(bert)


def test_what_cannot_be_saved_is_refused_before_the_first_step(bert, tmp_path, monkeypatch):
    told = []

    def refuse(self, *args, **kwargs):
        raise ValueError("the key\nsuch cannot be saved")

    monkeypatch.setattr("transformers.PretrainedConfig.save_pretrained", refuse)
    with pytest.raises(SourceError, match=r"the model cannot be saved \(ValueError: the key such cannot be saved\)"):
        train_exits(bert, TRAIN, TUNE, tmp_path / "run", labels=LABELS, settings=FORTY_STEPS, progress=told.append)
    assert told == [] and not list(tmp_path.glob("run*"))

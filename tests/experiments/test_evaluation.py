import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import offramp
from offramp.errors import SourceError, UsageError
from offramp.experiments.evaluation import EvalSettings, evaluate, report
from offramp.policies import parse
from offramp.policies.policy import MemorylessPolicy
from offramp.store.transcript import About, read_transcript
from offramp.tasks.examples import Example, Splits
from tests.cli.conftest import WORDS, write_tiny

LABELS = ("business", "film", "sport")
ABOUT = About("toy", "dev", "single_label_classification", ("a", "b"), ("accuracy",), "", "", 16)


def silent(line):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("evaluation") / "model")


def data(labels=LABELS, num=40, seed=0, **more):
    rng = np.random.default_rng(seed)
    found = [Example(" ".join(rng.choice(WORDS, 4)), int(rng.integers(0, len(labels)))) for _ in range(num)]
    return Splits("toy", labels, ("accuracy",), {"tune": found[:10], "dev": found[10:], **more})


def logits_of(answers_KN):
    """Logits [K, N, 2] of exits that give these answers, and are sure of them."""
    return 9.0 * np.eye(2, dtype=np.float32)[np.array(answers_KN)]


def test_agreement_and_overthinking_are_counted_by_hand():
    truth_N = np.array([0, 0, 1, 1])
    logits_KNC = logits_of([[0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]])
    found = report(ABOUT, truth_N, logits_KNC, [parse("patience:1"), parse("stage:2")])
    assert [row.scores["accuracy"] for row in found.exits] == [50, 50, 50]
    assert [row.agreement for row in found.exits] == [100, 50, 100]
    assert [row.overthought for row in found.exits] == [0, 25, 0]
    assert found.overthinking == 25, "the second row: right at exit 2, wrong at the last"
    assert [(row.policy, row.mean_exit) for row in found.policies] == [("patience:1", 2.5), ("stage:2", 2.0)]


def test_a_regression_is_overthought_where_an_exit_is_nearer():
    about = About("toy", "dev", "regression", (), ("pearson",), "", "", 16)
    values_KN = np.array([[1.0, 2.0, 3.5], [1.5, 2.0, 3.0]], np.float32)
    found = report(about, np.array([1.0, 2.0, 3.0], np.float32), values_KN[:, :, None], [])
    assert found.exits[0].overthought == pytest.approx(100 / 3)
    assert found.exits[1].agreement == pytest.approx(100)


def test_a_run_folder_and_its_store_score_alike(model, tmp_path):
    store = offramp.divide(model, tmp_path / "store")
    policy = [parse("confidence:0.6")]
    of_model = evaluate(model, data(), ["tune", "dev"], EvalSettings(policies=policy), log=silent)
    of_store = evaluate(store, data(), ["tune", "dev"], EvalSettings(policies=policy), log=silent)
    assert of_model == of_store
    assert [(found.split, found.num_rows, len(found.exits)) for found in of_model] == [("tune", 10, 4), ("dev", 30, 4)]


class OfShortTexts(MemorylessPolicy):
    """A policy of the user: texts of at most six tokens leave at once."""

    def update(self, exit_index, evidence):
        return evidence.lengths_B <= 6


def test_policies_are_replayed_with_the_lengths_of_the_texts(model, tmp_path):
    """As they run: from a new transcript, from one that is read again, and without."""
    rows = [*data().examples["dev"], *(Example("the bank " * 5, 0) for _ in range(30))]
    for transcript in (None, tmp_path / "t", tmp_path / "t"):
        settings = EvalSettings(policies=(OfShortTexts(),), transcript=transcript)
        (found,) = evaluate(model, Splits("toy", LABELS, ("accuracy",), {"dev": rows}), ["dev"], settings, log=silent)
        assert found.policies[0].mean_exit == 2.5


def test_the_transcript_holds_what_was_scored(model, tmp_path):
    (scored,) = evaluate(
        model, data(), ["dev"], EvalSettings(transcript=tmp_path / "t", with_features=True, batch_size=4), log=silent
    )
    kept = read_transcript(tmp_path / "t", "dev")
    assert scored.transcript == str(tmp_path / "t" / "dev.json")
    assert (kept.about.task, kept.about.labels, len(kept.about.model_sha256)) == ("toy", LABELS, 64)
    again = report(kept.about, kept.labels_N, kept.logits_NKC.swapaxes(0, 1), [])
    assert again.exits == scored.exits
    assert kept.features(0, 30).shape == (30, 4, 32)
    assert kept.lengths_N.tolist() == [6] * 30
    assert kept.labels_N.tolist() == [example.label for example in data().examples["dev"]]


def test_an_evaluation_that_was_interrupted_reads_what_it_had_written(model, tmp_path, monkeypatch):
    settings, told = EvalSettings(policies=(parse("confidence:0.6"),), transcript=tmp_path / "t"), []
    evaluate(model, data(), ["tune"], settings, log=silent)
    monkeypatch.setattr("offramp.experiments.evaluation._run", lambda *_: pytest.fail("the model runs again"))
    again = evaluate(model, data(), ["tune"], settings, log=told.append)
    monkeypatch.undo()
    assert f"tune: already written to {tmp_path / 't' / 'tune.safetensors'}" in told
    both = evaluate(model, data(), ["tune", "dev"], settings, log=silent)
    whole = evaluate(
        model, data(), ["tune", "dev"], EvalSettings(settings.policies, transcript=tmp_path / "u"), log=silent
    )
    assert again == both[:1]
    assert [dataclasses.replace(found, transcript=None) for found in both] == [
        dataclasses.replace(found, transcript=None) for found in whole
    ]
    for name in ("tune.json", "tune.safetensors", "dev.json", "dev.safetensors"):
        assert (tmp_path / "t" / name).read_bytes() == (tmp_path / "u" / name).read_bytes()


@pytest.mark.parametrize("change", ["rows", "features", "length", "damage"])
def test_a_transcript_of_other_inputs_is_refused_and_kept(model, tmp_path, change):
    folder = tmp_path / "t"
    evaluate(model, data(), ["dev"], EvalSettings(transcript=folder), log=silent)
    if change == "damage":
        with open(folder / "dev.safetensors", "r+b") as file:
            file.truncate(999)
    before = (folder / "dev.safetensors").read_bytes()
    options = {"features": {"with_features": True}, "length": {"max_length": 5}}.get(change, {})
    with pytest.raises(UsageError, match="target exists"):
        seed = int(change == "rows")
        evaluate(model, data(seed=seed), ["dev"], EvalSettings(transcript=folder, **options), log=silent)
    assert (folder / "dev.safetensors").read_bytes() == before


def test_labels_in_another_order_are_those_of_the_model(model):
    straight = evaluate(model, data(), ["dev"], log=silent)
    turned = {name: [Example(text, 2 - label) for text, label in found] for name, found in data().examples.items()}
    assert evaluate(model, Splits("toy", LABELS[::-1], ("accuracy",), turned), ["dev"], log=silent) == straight


def test_labels_without_names_are_taken_by_their_ids(tmp_path):
    names = {str(index): f"LABEL_{index}" for index in range(3)}
    nameless = write_tiny(tmp_path / "model", id2label=names)
    assert evaluate(nameless, data(), ["dev"], log=silent)[0].num_rows == 30


def test_labels_that_differ_in_case_are_those_of_the_model(model):
    straight = evaluate(model, data(), ["dev"], log=silent)
    assert evaluate(model, data(("Business", "FILM", " sport")), ["dev"], log=silent) == straight


def test_a_model_without_names_of_labels_is_named(tmp_path):
    names = {str(index): f"LABEL_{index}" for index in range(3)}
    nameless, lines = write_tiny(tmp_path / "model", id2label=names, exits=False), []
    evaluate(nameless, data(), ["dev"], log=lines.append)
    assert any("read in the order of the data: LABEL_0 = business, LABEL_1 = film, LABEL_2 = sport" in x for x in lines)


def test_metrics_do_not_depend_on_the_order_of_the_labels_of_a_model(tmp_path):
    """F1 is of the second label of the task, whichever id it has in the model."""
    names, found, metrics = ("no", "yes"), [], ("accuracy", "f1", "matthews")
    model = write_tiny(tmp_path / "model", id2label=dict(enumerate(names)), exits=False)
    for turned in (False, True):
        order = names[::-1] if turned else names
        rows = [Example(text, 1 - y if turned else y) for text, y in data(names).examples["dev"]]
        rows[0] = Example(rows[0].text, order.index("yes"))
        (scored,) = evaluate(model, Splits("toy", order, metrics, {"dev": rows}), ["dev"], log=silent)
        found.append(scored.exits[0].scores)
    # The same rows and answers: F1 is of "yes" the first time, and of "no" the second.
    assert found[0]["accuracy"] == found[1]["accuracy"] and found[0]["matthews"] == found[1]["matthews"]
    assert "f1" in found[0] and "f1_of_0" in found[1]


def test_data_of_another_task_are_refused(model):
    with pytest.raises(UsageError, match="the model's labels are business, film, sport, those of the data yes, no"):
        evaluate(model, data(("yes", "no")), ["dev"], log=silent)
    values = Splits("toy", (), ("pearson",), data().examples)
    with pytest.raises(UsageError, match="the model is a classification, the data are for a regression"):
        evaluate(model, values, ["dev"], log=silent)


def test_unknown_splits_and_impossible_policies_are_refused(model):
    with pytest.raises(UsageError, match="unknown split 'test' - known are tune, dev"):
        evaluate(model, data(), ["test"], log=silent)
    with pytest.raises(UsageError, match="patience"):
        evaluate(model, data(), ["dev"], EvalSettings(policies=(parse("patience:9"),)), log=silent)


def test_dev_is_all_that_is_reported(model):
    both = data().examples["dev"]
    splits = Splits("mnli", LABELS, ("accuracy",), {"train": both, "dev_matched": both, "dev_mismatched": both[:5]})
    found = evaluate(model, splits, ["dev"], log=silent)
    assert [(each.split, each.num_rows) for each in found] == [("dev_matched", 30), ("dev_mismatched", 5)]


def test_texts_are_cut_as_in_training(model, tmp_path):
    text = {"tune": [Example("the " * 20, 0)]}
    folder = write_tiny(tmp_path / "model")
    (folder / "train.json").write_text(json.dumps({"max_length": 9}))
    evaluate(folder, data(**text), ["tune"], EvalSettings(transcript=tmp_path / "t"), log=silent)
    assert read_transcript(tmp_path / "t", "tune").lengths_N.tolist() == [9]
    evaluate(folder, data(**text), ["tune"], EvalSettings(max_length=7, transcript=tmp_path / "u"), log=silent)
    assert read_transcript(tmp_path / "u", "tune").lengths_N.tolist() == [7]


def test_a_classifier_without_exits_has_one_row(tmp_path):
    plain = write_tiny(tmp_path / "model", exits=False)
    (found,) = evaluate(plain, data(), ["dev"], EvalSettings(transcript=tmp_path / "t", with_features=True), log=silent)
    assert [row.exit for row in found.exits] == [1]
    assert read_transcript(tmp_path / "t", "dev").features(0, 2).shape == (2, 1, 32)


@pytest.mark.parametrize(
    "name", ["bert.encoder.layer.1.output.dense.weight", "bert.pooler.dense.bias", "classifier.bias"]
)
def test_a_model_that_lacks_a_weight_is_refused_and_a_complete_one_is_not(tmp_path, name):
    folder = write_tiny(tmp_path / "model", exits=False)
    tensors = load_file(folder / "model.safetensors")
    evaluate(folder, data(), ["dev"], EvalSettings(), log=silent)
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(SourceError, match=name.replace(".", "[.]")):
        evaluate(folder, data(), ["dev"], EvalSettings(), log=silent)


def test_a_model_of_several_labels_a_text_is_refused(tmp_path):
    several = write_tiny(tmp_path / "model", problem_type="multi_label_classification")
    with pytest.raises(UsageError, match="the model gives several labels to a text, the data have one"):
        evaluate(several, data(), ["dev"], log=silent)

"""Texts of families that offramp knows nothing of: what a store answers is what transformers does, exits stand between
the blocks, and rows leave where what was trained says.

Shapes: N texts, C labels; K exits, the last of them the model's own head.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import offramp
from offramp.checkpoints.checkpoint import load_classifier, predict, to_tensors
from offramp.checkpoints.inputs import facts_of, rows_of
from offramp.experiments.evaluation import EvalSettings, evaluate
from offramp.policies import parse, replay
from offramp.store import Store
from offramp.store.manifest import seal
from offramp.store.transcript import read_transcript
from offramp.tasks.examples import Example, Splits
from offramp.training import TrainSettings, train_exits
from tests.store.small import refused, reseal, tree_of
from tests.tiny_families import FAMILIES, write_classifier
from tests.training.tiny import LABELS, NUM_LAYERS, examples

QUICK = TrainSettings(epochs=2, heads_epochs=4, batch_size=16, learning_rate=1e-3, max_length=16)
TEXTS = [text for text, _ in examples(24, seed=5)]


@dataclass(frozen=True)
class Divided:
    """A run folder, its store, and what each exit says of TEXTS: [K, N, C]."""

    run: Path
    store: Path
    said_KNC: np.ndarray


@pytest.fixture(scope="module", params=FAMILIES)
def divided(request, tmp_path_factory):
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    place = tmp_path_factory.mktemp(request.param)
    source = write_classifier(place / "model", request.param, bare=request.param == "albert")
    train_exits(source, examples(48), examples(12, seed=1), place / "run", labels=LABELS, settings=QUICK)
    store = offramp.divide(place / "run", place / "store")
    return Divided(place / "run", store, say(place / "run", TEXTS))


def say(run, texts, batch_size=8):
    facts = facts_of(run)
    rows = rows_of(run, facts, [(text, 0) for text in texts], 16, False, print)
    return predict(load_classifier(run), rows, batch_size)


def answers(store, texts, **options):
    with offramp.load(store, threads=1, max_length=16, **options) as classifier:
        return classifier.predict(texts), classifier


def test_exits_stand_behind_each_layer_but_the_last(divided):
    assert divided.said_KNC.shape[0] == NUM_LAYERS
    with Store(divided.store) as store:
        program, texts = store.program, store.program.texts
        assert sum(stage.exit is not None for stage in program.layers) == NUM_LAYERS - 1
        assert store.manifest.exits is not None
    assert texts.max_length == 20  # what the tokenizer says, which is less than the table of positions has


def test_the_last_exit_is_what_transformers_answers(divided):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(divided.run).eval()
    rows = rows_of(divided.run, facts_of(divided.run), [(text, 0) for text in TEXTS], 16, False, print)
    inputs = to_tensors(rows.batch(np.arange(len(TEXTS))))
    del inputs["labels"]
    with torch.no_grad():
        expected_NC = model(**inputs).logits.numpy()
    assert np.abs(divided.said_KNC[-1] - expected_NC).max() < 1e-4


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_the_store_answers_the_same_alone_and_in_batches(divided, backend):
    probabilities_N = torch.from_numpy(divided.said_KNC[-1]).softmax(-1).max(-1).values.numpy()
    for batch in (1, 8, "bulk"):
        results, _ = answers(divided.store, TEXTS, backend=backend, batch=batch)
        assert [result.label for result in results] == [LABELS[index] for index in divided.said_KNC[-1].argmax(-1)]
        assert np.allclose([result.score for result in results], probabilities_N, atol=1e-4)


@pytest.mark.parametrize("kind", ["confidence", "patience"])
def test_rows_leave_where_the_exits_say_whatever_is_padded(divided, kind):
    """Heads take the mean over tokens alone: texts of other lengths in a batch change nothing."""
    sure_N = torch.from_numpy(divided.said_KNC[0]).softmax(-1).max(-1).values.numpy()
    policy = "patience:1" if kind == "patience" else f"confidence:{np.median(sure_N):.4f}"
    exit_N = replay(parse(policy), divided.said_KNC, "single_label_classification")
    assert len(set(exit_N.tolist())) > 1 or kind == "patience"
    for batch in (1, 8):
        results, _ = answers(divided.store, TEXTS, exit=policy, batch=batch)
        assert [result.exit_stage for result in results] == exit_N.tolist()


def test_rows_of_the_word_table_are_read_and_never_the_whole(divided):
    """GPT-2's and the others' are tables by themselves only if they are large: here they are small, or looked up."""
    with Store(divided.store) as store:
        for lookup in store.program.lookups.values():
            assert lookup.input in store.program.inputs


def test_a_store_is_scored_as_the_run_that_it_was_divided_from(divided, tmp_path):
    splits = Splits("toy", LABELS, ("accuracy",), {"tune": [Example(*row) for row in examples(20, seed=7)]})
    both = [evaluate(place, splits, ["tune"],
                     EvalSettings(transcript=tmp_path / place.name, with_features=True, include_training_rows=True),
                     log=print)
            for place in (divided.run, divided.store)]  # fmt: skip
    assert both[0][0].exits == both[1][0].exits
    run, store = (read_transcript(tmp_path / place.name, "tune") for place in (divided.run, divided.store))
    assert run.about == store.about
    assert np.allclose(run.logits_NKC, store.logits_NKC, atol=1e-5)
    assert np.allclose(run.features(0, 20), store.features(0, 20), atol=1e-5)


def test_a_pair_and_a_text_that_is_too_long(divided):
    with pytest.warns(UserWarning, match="was cut"):
        results, _ = answers(divided.store, [("red sky", "the grass"), "blue " * 40])
    assert len(results) == 2


PIXELS = {"dtype": "int64", "axes": ["batch", "tokens"], "largest": []}
ATTACKS = {
    "no ids": (lambda p: p["inputs"].pop("input_ids"), "input_ids"),
    "another input": (
        lambda p: p["inputs"].update(pixels=PIXELS),
        "pixels",
    ),
    "ids that are no numbers of rows": (lambda p: p["inputs"]["input_ids"].update(dtype="float32"), "input_ids"),
    "no vocabulary": (lambda p: p["texts"].update(vocab_size=0), "vocab_size"),
    "no length": (lambda p: p["texts"].update(max_length=0), "max_length"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_said_of_texts_is_checked(divided, attack, tmp_path):
    change, told = ATTACKS[attack]
    tree = tree_of(divided.store)
    change(tree["program"])
    (tmp_path / "offramp.json").write_bytes(seal(tree))
    reseal(tmp_path, tree)
    refused(offramp.OfframpError, lambda: Store(tmp_path), told)

"""Texts in, labels out: `offramp.load` beside transformers' own tokenizer and model."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import offramp
from tests.oracle.tiny import MULTI, REGRESSION, SINGLE, Case, make_model

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "a", "film", "was", "is", "good", "bad", "un", "##ex", "##pected", "##ly", "long", ",", ".", "!"]
TEXTS = ["The film was good.", "unexpectedly long!", ("A bad film", "is a LONG film, is it?"), "", "a " * 30]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """problem -> (model folder, store)."""
    made = {}
    for problem in (SINGLE, MULTI, REGRESSION):
        folder = tmp_path_factory.mktemp("predict")
        config = Case("bert", problem=problem).config()
        config.id2label = dict(enumerate(["poor", "fair", "fine"][: config.num_labels]))
        make_model(config).save_pretrained(folder / "model")
        (folder / "model" / "vocab.txt").write_text("\n".join(SPECIALS + WORDS) + "\n")
        made[problem] = folder / "model", offramp.divide(folder / "model", folder / "store")
    return made


def ask_alone(source, texts):
    """What transformers says of each text by itself: logits [C] each."""
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForSequenceClassification.from_pretrained(source)
    found = []
    for text in texts:
        pair = (text,) if isinstance(text, str) else text
        with torch.no_grad():
            found.append(model(**tokenizer(*pair, return_tensors="pt")).logits[0].double())
    return found


@pytest.mark.parametrize("backend", ["ort", "torch"])
@pytest.mark.parametrize("batch", [1, 3])
def test_labels_and_scores(folders, backend, batch):
    source, store = folders[SINGLE]
    with offramp.load(store, backend=backend, batch=batch, threads=1) as classifier:
        results = classifier.predict(TEXTS)
    for result, logits_C in zip(results, ask_alone(source, TEXTS), strict=True):
        assert result.label == ["poor", "fair", "fine"][int(logits_C.argmax())]
        assert result.score == pytest.approx(float(logits_C.softmax(-1).max()), abs=1e-5)
        assert (result.exit_stage, result.stages_run, result.labels) == (3, 3, None)


def test_several_labels_at_once(folders):
    source, store = folders[MULTI]
    with offramp.load(store, threads=1) as classifier:
        results = classifier.predict(TEXTS)
    for result, logits_C in zip(results, ask_alone(source, TEXTS), strict=True):
        probable = np.array(["poor", "fair", "fine"])[(logits_C.sigmoid() >= 0.5).numpy()]
        assert result.labels == tuple(probable)
        assert result.score == pytest.approx(float(logits_C.sigmoid().max()), abs=1e-5)


def test_a_value(folders):
    source, store = folders[REGRESSION]
    with offramp.load(store, threads=1) as classifier:
        results = classifier.predict(TEXTS)
    for result, logits_C in zip(results, ask_alone(source, TEXTS), strict=True):
        assert result.label is None
        assert result.score == pytest.approx(float(logits_C[0]), abs=1e-5)

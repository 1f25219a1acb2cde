"""What a result says, beside transformers' pipeline and logits, and models that have no token for padding.

Shapes: C labels.
"""

import inspect
import json

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import offramp
from offramp.errors import SourceError, UsageError
from offramp.experiments.evaluation import evaluate
from offramp.store import Store
from offramp.tasks.examples import Example, Splits
from offramp.training import TrainSettings, train_exits
from tests.oracle.tiny import MULTI, REGRESSION, SINGLE
from tests.tiny_families import write_classifier
from tests.training.tiny import LABELS, examples, make_model, write_checkpoint

NAMES = ("zero", "one", "two", "three")
TEXTS = ["the sky is blue", "grass", "a rose is red", "the grass is green of a rose"]
ASKED = [(problem, count) for problem in (SINGLE, MULTI, REGRESSION, None) for count in (1, 2, 4)]
ASKED.remove((SINGLE, 1))  # transformers refuses it
ALONE = {"threads": 1, "max_length": 16}


def write(folder, family, problem, count):
    """A folder whose labels are in no order in its config."""
    labels = {"id2label": {index: NAMES[index] for index in reversed(range(count))}, "problem_type": problem}
    torch.manual_seed(count)
    if family == "bert":
        return write_checkpoint(folder, make_model("bert", num_labels=count, **labels))
    write_classifier(folder, family, num_layers=1)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.update(labels)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def of_transformers(folder):
    """Answers of the pipeline, and logits [C], of each text."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    has_types = "token_type_ids" in inspect.signature(model.forward).parameters
    logits = []
    for text in TEXTS:
        with torch.no_grad():
            logits.append(model(**tokenizer(text, return_tensors="pt", return_token_type_ids=has_types)).logits)
    return [pipe.postprocess({"logits": each}) for each in logits], [each[0].numpy() for each in logits]


def require_alike(folder, store, problem, count):
    """Assert that a store answers as transformers does. One value of a regression has no label."""
    with offramp.load(store, **ALONE) as classifier:
        results = classifier.predict(TEXTS)
    for result, answer, logits_C in zip(results, *of_transformers(folder), strict=True):
        if count == 1 and problem != MULTI:
            assert result.label is None and result.score == pytest.approx(float(logits_C[0]), abs=1e-5)
            continue
        assert (result.label, result.score) == (answer["label"], pytest.approx(answer["score"], abs=1e-5))
        is_likely = zip(NAMES, logits_C >= 0, strict=False)
        assert result.labels == (tuple(name for name, found in is_likely if found) if problem == MULTI else None)
        assert (result.values is None) == (problem != REGRESSION)
        assert result.values is None or np.allclose(result.values, logits_C, atol=1e-5)


@pytest.mark.parametrize(("problem", "count"), ASKED)
def test_a_result_says_what_the_pipeline_says(tmp_path, problem, count):
    folder = write(tmp_path / "m", "bert", problem, count)
    require_alike(folder, offramp.divide(folder, tmp_path / "s"), problem, count)


@pytest.mark.parametrize(("problem", "count"), [(REGRESSION, 4), (MULTI, 1)])
def test_so_does_a_model_that_was_divided_by_a_run(tmp_path, problem, count):
    folder = write(tmp_path / "m", "mpnet", problem, count)
    require_alike(folder, offramp.divide(folder, tmp_path / "s"), problem, count)


def test_several_values_are_not_scored_as_one(tmp_path):
    folder = write(tmp_path / "m", "bert", REGRESSION, 4)
    data = Splits("toy", (), ("pearson",), {"dev": [Example(text, 0.5) for text in TEXTS]})
    with pytest.raises(UsageError, match="the model gives 4 values to a text, the data have one"):
        evaluate(folder, data, ["dev"], log=print)


def test_a_label_of_no_output_is_refused_however_it_is_divided(tmp_path):
    for family in ("bert", "mpnet"):
        folder = write(tmp_path / family, family, None, 2)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "id2label": {"1": "a", "2": "b"}}))
        with pytest.raises(SourceError, match="expected a label for each id from 0 to 1"):
            offramp.divide(folder, tmp_path / "s")


@pytest.fixture(scope="module", params=[None, -1, 10**6])
def unpadded(request, tmp_path_factory):
    """GPT-2 whose config names no token for padding, and its store."""
    folder = tmp_path_factory.mktemp("unpadded") / "m"
    write_classifier(folder, "gpt2", num_layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": request.param}))
    return folder, offramp.divide(folder, folder.parent / "s")


def test_one_text_needs_no_padding(unpadded):
    folder, store = unpadded
    with Store(store) as opened:
        assert opened.program.texts.pad_token is None
    require_alike(folder, store, None, len(LABELS))


@pytest.mark.parametrize("batch", [2, "bulk"])
def test_several_texts_need_padding(unpadded, batch):
    with pytest.raises(UsageError, match=r"cannot be padded, so that each runs alone - .* - use batch 1; if"):
        offramp.load(unpadded[1], batch=batch)


def test_a_model_without_padding_is_scored_text_by_text_and_not_trained(unpadded, tmp_path):
    rows = examples(12)
    data = Splits("toy", LABELS, ("accuracy",), {"dev": [Example(*row) for row in rows]})
    of_folder, of_store = (evaluate(place, data, ["dev"], log=print)[0].exits[-1] for place in unpadded)
    assert of_folder.scores == of_store.scores
    with pytest.raises(SourceError, match="cannot be padded, so that they make no batch to train on"):
        train_exits(unpadded[0], rows, rows, tmp_path / "run", labels=LABELS, settings=TrainSettings(max_length=8))

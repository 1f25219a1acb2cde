"""Problem and labels of a head: every edit of config.json against what transformers makes of it."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from offramp.checkpoints.checkpoint import load_classifier, predict
from offramp.checkpoints.families import family_of
from offramp.checkpoints.inputs import PLAIN_OUTPUT, example_ids, facts_of, padded, read_texts, rows_of, task_of
from offramp.errors import SourceError
from offramp.program.program import TEXT_INPUTS
from tests.division.tiny import config_of
from tests.tiny_families import write_classifier
from tests.training.tiny import VOCABULARY, make_model, write_checkpoint

PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
ABSENT = object()
"""Value of a key that is not written."""
PROBLEM_TYPES = (ABSENT, None, *PROBLEMS, "ranking", 3)
ID2LABELS = (
    ABSENT, None, {}, [], "ab", {"0": "a"}, {"0": "a", "1": "b"}, {"1": "b", "0": "a"}, {"1": "a", "2": "b"},
    {"0": "a", "2": "b"}, {"00": "a", "+1": "b"}, {"0": "a", "1": "a"}, {"0": "a", "one": "b"}, {"0": None, "1": "b"},
    {"0": "", "1": "b"}, {str(index): f"label {index}" for index in range(12)},
)  # fmt: skip
NUM_LABELS = (ABSENT, 1, 2, 3)
EDITS = tuple(itertools.product(PROBLEM_TYPES, ID2LABELS, NUM_LABELS))


class AnyForSequenceClassification(torch.nn.Module):
    """A classifier as a division by a run sees it."""

    def __init__(self, config):
        super().__init__()
        self.config = config


def theirs(config):
    """Problem and labels by the rules of transformers; None for an output without a label, or of unknown meaning."""
    try:
        loaded = AutoConfig.for_model(**config)
    except Exception:  # of whatever class, nobody can load the model
        return None
    labels = loaded.id2label
    if not labels or sorted(labels) != list(range(loaded.num_labels)) or None in labels.values():
        return None
    if loaded.problem_type not in (None, *PROBLEMS):  # loaded, but what the answers mean is not known
        return None
    problem = loaded.problem_type or ("regression" if loaded.num_labels == 1 else "single_label_classification")
    return problem, tuple(labels[index] for index in range(loaded.num_labels))


def by_names(config):
    """What the division by names reads."""
    encoder = family_of(config).encoder(config)
    return encoder.problem, encoder.labels


def by_a_run(config):
    """What a division by a run reads; None where transformers does not make a config of it."""
    try:
        loaded = AutoConfig.for_model(**config)
    except Exception:
        return None
    return task_of(AnyForSequenceClassification(loaded)) if loaded.id2label else None


def test_problem_and_labels_are_those_of_transformers():
    num_alike = 0
    for edit in EDITS:
        keys = zip(("problem_type", "id2label", "num_labels"), edit, strict=True)
        config = {**config_of(), **{key: value for key, value in keys if value is not ABSENT}}
        expected = theirs({key: value for key, value in config.items() if key != "architectures"})
        for read in (by_names, by_a_run):
            try:
                found = read(config)
            except SourceError as error:
                found = None
                assert any(key in str(error) for key in ("id2label", "problem_type", "num_labels")), error
            assert found == expected, (read.__name__, edit)
        num_alike += expected is not None
    assert num_alike > 40


def test_labels_that_do_not_count_from_0_are_refused_with_the_reason():
    with pytest.raises(SourceError) as caught:
        by_names(config_of(id2label={"1": "a", "2": "b"}))
    assert "expected a label for each id from 0 to 1" in str(caught.value)
    assert str(caught.value).endswith("number the labels from 0 to 1 in id2label")
    named = {**config_of(), "id2label": {"0": "a", "1": "b"}}
    assert by_names(named) == by_a_run(named) == (PROBLEMS[0], ("a", "b"))


KEYS = (
    {"return_dict": False}, {"output_attentions": True}, {"output_hidden_states": True}, {"use_cache": False},
    {"torchscript": True}, {"return_dict": None}, {"return_dict": False, "output_hidden_states": True},
)  # fmt: skip
EXAMPLES = [("the sky is blue", 0), ("grass", 1), ("a rose is red", 2)]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Families -> folder, and what it answers: one with known names, and others."""
    found = {"bert": write_checkpoint(tmp_path_factory.mktemp("bert"), make_model("bert"))}
    for family in ("mpnet", "gpt2"):
        found[family] = write_classifier(tmp_path_factory.mktemp(family), family, num_layers=1)
    return {family: (folder, answers(folder)) for family, folder in found.items()}


def answers(folder):
    """Logits of a few texts."""
    facts = facts_of(folder)
    rows = rows_of(folder, facts, EXAMPLES, 12, False, print)
    return predict(load_classifier(folder), rows, 2)


@pytest.mark.parametrize("keys", KEYS, ids=str)
@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2"])
def test_keys_about_the_form_of_the_output_change_no_answer(asked, tmp_path, family, keys):
    folder, expected = asked[family]
    config = json.loads((folder / "config.json").read_text())
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, **keys}))
    assert (answers(tmp_path) == expected).all()
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path, **PLAIN_OUTPUT).config.return_dict


TYPES = {"gpt2": (2, 0), "xlnet": (2, 0), "xlm": (2, 0), "bert": (2, 2), "deberta": (0, 0), "distilbert": (0, 0)}
"""Family -> types that it takes where the tokenizer of BERT gives types, and where it gives none."""


@pytest.mark.parametrize("family", TYPES)
def test_types_are_those_of_the_tokenizer_where_a_config_has_no_number(tmp_path, family):
    with torch.device("meta"):
        module = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, pad_token_id=0))
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    for names, expected in zip((TEXT_INPUTS, TEXT_INPUTS[:2]), TYPES[family], strict=True):
        settings = {"tokenizer_class": "BertTokenizer", "model_input_names": names}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        texts = read_texts(module, tmp_path)
        assert texts.num_token_types == expected
    assert (texts.pad_token is None) == (family == "xlnet")  # whose head reads the last token, and pads on the left


@pytest.mark.parametrize("family", ["bart", "t5", "bert"])
def test_examples_of_an_encoder_with_a_decoder_end_as_texts_do(family):
    config = AutoConfig.for_model(family, vocab_size=9, eos_token_id=5)
    ids = example_ids(config, 9, torch.Generator().manual_seed(0))
    mask = padded(ids)
    if config.is_encoder_decoder:
        assert (ids == 5).sum(1).tolist() == [1] * len(ids)
        assert all(row[keep == 1][-1] == 5 for row, keep in zip(ids, mask, strict=True))
    assert ids.min() >= 2 and ids.max() < 9 and (mask[-1] == 0).any()


def test_a_module_without_a_config_has_no_task():
    assert task_of(torch.nn.Linear(2, 2)) == (None, ())
    assert task_of(AnyForSequenceClassification(SimpleNamespace(id2label=None))) == (None, ())

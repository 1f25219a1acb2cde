"""What silently destroyed the results of earlier code for early exits and lazy layers, one test each.

The names of the tests say what must hold; the comments, what went wrong.
"""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModel

import offramp
from offramp.checkpoints.exits import ModelWithExits
from offramp.errors import UsageError
from offramp.training.subjects import load_model, save_model
from tests.oracle.tiny import BACKENDS
from tests.training.tiny import LABELS, VOCABULARY, make_model, write_checkpoint

NUM_LAYERS = 12
"""More than ten: `layer.10` must not come before `layer.2`."""
TEXTS = ["the red rose", "grass is green of the sky", "blue"]
PAIR = ("the red rose", "grass is green")


def save_run(folder, model):
    save_model(ModelWithExits(model), folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


@pytest.fixture(scope="module", params=["bert", "distilbert"])
def deep(request, tmp_path_factory):
    """(classifier in evaluation mode, its store); dropout would show, were it on."""
    folder = tmp_path_factory.mktemp("deep")
    dropout = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    if request.param == "distilbert":
        dropout = {"dropout": 0.5, "attention_dropout": 0.5}
    model = make_model(request.param, num_hidden_layers=NUM_LAYERS, initializer_range=0.1, **dropout)
    return model.eval(), offramp.divide(save_run(folder / "run", model), folder / "store")


def probabilities(model, text):
    ids = [2, *(VOCABULARY.index(word) for word in text.split()), 3]
    with torch.no_grad():
        return model(torch.tensor([ids])).logits.softmax(-1)[0]


@torch.no_grad()
def test_a_pretrained_encoder_is_the_one_that_is_used(tmp_path):
    """Layers under a name of its own were random, and the pretrained ones dead weight (DistilBERT's `transformer`)."""
    encoder = make_model("distilbert").base_model.eval()
    write_checkpoint(tmp_path, encoder)
    model = ModelWithExits(load_model(tmp_path, LABELS)[0]).eval()
    ids = torch.tensor([[2, 5, 9, 3]])
    found = model.model.base_model(ids).last_hidden_state
    assert torch.equal(found, copy.deepcopy(AutoModel.from_pretrained(tmp_path)).eval()(ids).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_tokens_are_attended_to_and_padding_is_not(model_type):
    """DistilBERT was given BERT's additive mask, and saw the padding alone."""
    model = ModelWithExits(make_model(model_type)).eval()
    ids, mask = torch.tensor([[2, 5, 9, 3, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0, 0]])
    changed_padding, changed_token = ids.clone(), ids.clone()
    changed_padding[0, 5], changed_token[0, 2] = 7, 12
    answers = [model(input_ids=each, attention_mask=mask) for each in (ids, changed_padding, changed_token)]
    for said, same, other in zip(*answers, strict=True):
        torch.testing.assert_close(said, same, atol=1e-6, rtol=0)
        assert (said - other).abs().max() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_streamed_layers_are_the_trained_ones_in_their_order_and_without_dropout(deep, backend):
    """Lazily loaded layers were freshly random, out of order from the tenth on, and in training mode."""
    model, store = deep
    with offramp.load(store, exit="none", backend=backend) as classifier:
        for text, result in zip(TEXTS, classifier.predict(TEXTS), strict=True):
            wanted_C = probabilities(model, text)
            assert result.score == pytest.approx(wanted_C.max().item(), abs=1e-5)
            assert result.label == model.config.id2label[int(wanted_C.argmax())]


def test_the_second_text_of_a_pair_has_its_own_segment(tmp_path):
    """`token_type_ids` were commented out: pair tasks ran without segments."""
    model = make_model("bert", initializer_range=0.5).eval()
    store = offramp.divide(save_run(tmp_path / "run", model), tmp_path / "store")
    first, second = ([VOCABULARY.index(word) for word in text.split()] for text in PAIR)
    ids = torch.tensor([[2, *first, 3, *second, 3]])
    types = torch.tensor([[0] * (len(first) + 2) + [1] * (len(second) + 1)])
    with torch.no_grad():
        with_types = model(ids, token_type_ids=types).logits.softmax(-1).max().item()
        without = model(ids).logits.softmax(-1).max().item()
    with offramp.load(store) as classifier:
        (result,) = classifier.predict([PAIR])
    assert result.score == pytest.approx(with_types, abs=1e-5)
    assert abs(with_types - without) > 1e-3, "the toy tells them apart"


@pytest.mark.parametrize("patience", [NUM_LAYERS, NUM_LAYERS + 3])
def test_a_patience_that_can_never_fire_is_refused(deep, patience):
    """Six layers were evaluated with patience 6: five agreements are the most that there can be."""
    with pytest.raises(UsageError, match=f"patience:{patience} can never fire with 12 exits - use at most 11"):
        offramp.load(deep[1], exit=f"patience:{patience}")
    with offramp.load(deep[1], exit=f"patience:{NUM_LAYERS - 1}") as classifier:
        assert {result.exit_stage for result in classifier.predict(TEXTS)} == {NUM_LAYERS}


def test_exits_of_one_policy_do_not_count_for_the_next(deep):
    """Layers used were never reset: the statistics of several patience values were mixed."""
    _, store = deep

    def depths(policy):
        with offramp.load(store, exit=policy) as classifier:
            first = [result.exit_stage for result in classifier.predict(TEXTS)]
            assert [result.exit_stage for result in classifier.predict(TEXTS)] == first
            return first

    alone = depths("patience:3")
    depths("stage:1")
    assert depths("patience:3") == alone


def test_each_row_of_a_batch_leaves_by_itself(deep):
    """A whole batch left when its slowest row was sure."""
    _, store = deep
    with offramp.load(store, exit="patience:1") as classifier:
        alone = [classifier.predict([text])[0].exit_stage for text in TEXTS]
    with offramp.load(store, exit="patience:1", batch=len(TEXTS)) as classifier:
        assert [result.exit_stage for result in classifier.predict(TEXTS)] == alone


def test_an_exit_has_weights_of_its_own():
    """`[module] * n` made one module of all layers and exits."""
    heads = ModelWithExits(make_model("bert")).heads
    assert len({id(head) for head in heads}) == len(heads)
    assert not np.array_equal(heads[0].exit.weight.detach(), heads[1].exit.weight.detach())

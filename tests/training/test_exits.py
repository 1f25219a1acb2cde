import pytest
import torch

from offramp.models.exits import ModelWithExits, mean_over_tokens
from offramp.training.loss import exit_losses, pabee_loss
from tests.training.tiny import LABELS, MODEL_TYPES, NUM_LAYERS, VOCABULARY, make_model

LENGTHS = (3, 9, 6)


@pytest.fixture(params=MODEL_TYPES)
def model(request):
    return ModelWithExits(make_model(request.param)).eval()


def batch(pad_token=0, seed=0, filler=None):
    """Token ids of three rows, padded; `filler` stands in the padding instead of the padding token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(LENGTHS), max(LENGTHS)), pad_token if filler is None else filler)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(5, len(VOCABULARY), (length,), generator=generator)
        mask[row, :length] = 1
    return ids, mask


def own_batch(model):
    return batch(model.model.config.pad_token_id)


def test_mean_counts_tokens_alone():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [1e6, -1e6]]])
    assert mean_over_tokens(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 4.0]]


@torch.no_grad()
def test_last_exit_is_what_transformers_answers(model):
    ids, mask = own_batch(model)
    logits = model(ids, mask)
    assert len(logits) == NUM_LAYERS
    assert torch.equal(logits[-1], model.model(input_ids=ids, attention_mask=mask).logits)


@torch.no_grad()
def test_exit_k_reads_the_hidden_state_after_layer_k(model):
    ids, mask = own_batch(model)
    hidden = model.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for number, (logits, head) in enumerate(zip(model(ids, mask), model.heads, strict=False), 1):
        means = torch.stack([hidden[number][row, :length].mean(0) for row, length in enumerate(LENGTHS)])
        torch.testing.assert_close(logits, means @ head.weight.T + head.bias)


@torch.no_grad()
def test_padding_changes_no_exit(model):
    """An additive mask handed to DistilBERT would hide its tokens and show it the padding."""
    ids, mask = own_batch(model)
    padded = model(ids, mask)
    for row, length in enumerate(LENGTHS):
        alone = model(ids[row : row + 1, :length], mask[row : row + 1, :length])
        for of_batch, of_row in zip(padded, alone, strict=True):
            torch.testing.assert_close(of_batch[row : row + 1], of_row, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "electra"])
@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(model_type):
    model = ModelWithExits(make_model(model_type)).eval()
    for of_zeros, of_words in zip(model(*batch()), model(*batch(filler=7)), strict=True):
        torch.testing.assert_close(of_zeros, of_words, atol=1e-5, rtol=0)


@torch.no_grad()
def test_each_token_matters_to_each_exit(model):
    ids, mask = own_batch(model)
    for position in range(LENGTHS[0]):
        changed = ids.clone()
        changed[0, position] = 5 + (ids[0, position] - 4) % len(VOCABULARY[5:])
        for before, after in zip(model(ids, mask), model(changed, mask), strict=True):
            assert (before[0] - after[0]).abs().max() > 1e-3
            torch.testing.assert_close(before[1:], after[1:], atol=1e-5, rtol=0)


def test_gradients_reach_every_head_and_the_first_layer(model):
    model.train()
    ids, mask = own_batch(model)
    pabee_loss(exit_losses(model(ids, mask), torch.tensor([0, 1, 2]), "single_label_classification")).backward()
    for head in model.heads:
        assert head.weight.grad.abs().max() > 0
        assert head.bias.grad.abs().max() > 0
    assert model.model.base_model.get_input_embeddings().weight.grad.abs().max() > 0


def test_exit_tensors_are_numbered_from_one(model):
    tensors = model.exit_tensors()
    assert sorted(tensors) == ["exit.1.bias", "exit.1.weight", "exit.2.bias", "exit.2.weight"]
    assert torch.equal(tensors["exit.2.weight"], model.heads[1].weight)
    assert tensors["exit.1.weight"].shape == (len(LABELS), 32)

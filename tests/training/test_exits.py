import pytest
import torch

from offramp.checkpoints.exits import ModelWithExits
from offramp.program.heads import FORMS
from offramp.training.loss import exit_losses, weighted_loss
from tests.training.tiny import LABELS, MODEL_TYPES, NUM_LAYERS, VOCABULARY, make_model

LENGTHS = (3, 9, 6)


@pytest.fixture(params=MODEL_TYPES)
def model(request):
    return ModelWithExits(make_model(request.param)).eval()


@pytest.fixture(params=[(model_type, form) for model_type in MODEL_TYPES for form in FORMS], ids="-".join)
def of_each_form(request):
    return ModelWithExits(make_model(request.param[0]), request.param[1]).eval()


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


def run(model, ids, mask, **options):
    return model(input_ids=ids, attention_mask=mask, **options)


def test_mean_counts_tokens_alone():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [1e6, -1e6]]])
    head = ModelWithExits(make_model("bert")).heads[0]
    assert head.pool(hidden, torch.tensor([[[1.0], [1.0], [0.0]]])).tolist() == [[2.0, 4.0]]


@torch.no_grad()
def test_last_exit_is_what_transformers_answers(model):
    ids, mask = own_batch(model)
    logits = run(model, ids, mask)
    assert len(logits) == NUM_LAYERS
    assert torch.equal(logits[-1], model.model(input_ids=ids, attention_mask=mask).logits)


@torch.no_grad()
def test_exit_k_reads_the_hidden_state_after_layer_k(model):
    ids, mask = own_batch(model)
    hidden = model.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for number, (logits, head) in enumerate(zip(run(model, ids, mask), model.heads, strict=False), 1):
        means = torch.stack([hidden[number][row, :length].mean(0) for row, length in enumerate(LENGTHS)])
        torch.testing.assert_close(logits, means @ head.exit.weight.T + head.exit.bias)


@torch.no_grad()
def test_padding_changes_no_exit(model):
    """An additive mask handed to DistilBERT would hide its tokens and show it the padding."""
    ids, mask = own_batch(model)
    padded = run(model, ids, mask)
    for row, length in enumerate(LENGTHS):
        alone = run(model, ids[row : row + 1, :length], mask[row : row + 1, :length])
        for of_batch, of_row in zip(padded, alone, strict=True):
            torch.testing.assert_close(of_batch[row : row + 1], of_row, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "electra"])
@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(model_type):
    model = ModelWithExits(make_model(model_type)).eval()
    for of_zeros, of_words in zip(run(model, *batch()), run(model, *batch(filler=7)), strict=True):
        torch.testing.assert_close(of_zeros, of_words, atol=1e-5, rtol=0)


@torch.no_grad()
def test_each_token_matters_to_each_exit(model):
    ids, mask = own_batch(model)
    for position in range(LENGTHS[0]):
        changed = ids.clone()
        changed[0, position] = 5 + (ids[0, position] - 4) % len(VOCABULARY[5:])
        for before, after in zip(run(model, ids, mask), run(model, changed, mask), strict=True):
            assert (before[0] - after[0]).abs().max() > 1e-3
            torch.testing.assert_close(before[1:], after[1:], atol=1e-5, rtol=0)


ACTIVATIONS = {"bert": torch.tanh, "distilbert": torch.relu, "roberta": torch.tanh, "electra": torch.nn.functional.gelu}


@torch.no_grad()
def test_other_forms_read_the_first_token(of_each_form):
    """The family's own head has a dense layer, the activation of its family, and one that gives the labels."""
    model = of_each_form
    if model.form == "mean-linear":
        return
    ids, mask = own_batch(model)
    hidden = model.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    activation = ACTIVATIONS[model.model.config.model_type]
    for number, (logits, head) in enumerate(zip(run(model, ids, mask), model.heads, strict=False), 1):
        first, last = hidden[number][:, 0], head.exit
        if model.form != "cls-linear":
            first, last = activation(first @ last.dense.weight.T + last.dense.bias), last.out
        torch.testing.assert_close(logits, first @ last.weight.T + last.bias)


OWN_DENSE = {
    "bert": "bert.pooler.dense",
    "distilbert": "pre_classifier",
    "roberta": "classifier.dense",
    "electra": "classifier.dense",
}


def test_a_shared_layer_is_the_models_own_and_saved_once(model):
    model = ModelWithExits(model.model, "own-shared")
    dense = model.model.get_submodule(OWN_DENSE[model.model.config.model_type])
    assert all(head.exit.dense is dense for head in model.heads)
    assert sum(tensor is dense.weight for tensor in model.state_dict(keep_vars=True).values()) == 1
    tensors = model.exit_tensors()
    assert torch.equal(tensors["exit.dense.weight"], dense.weight)
    assert not any(name.startswith("exit.1.dense") for name in tensors)


def test_exit_tensors_come_back(of_each_form):
    model = of_each_form
    tensors = model.exit_tensors()
    form, shapes = FORMS[model.form], FORMS[model.form].shapes(model.encoder.hidden_size, len(model.encoder.labels))
    numbers = range(1, model.encoder.num_layers)
    wanted = {form.tensor_name(role, number): shape for number in numbers for role, shape in shapes.items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == wanted
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    model.load_exits(changed)
    for name, tensor in model.exit_tensors().items():
        assert torch.equal(tensor, changed[name])
    with pytest.raises(ValueError, match="exits do not fit the model"):
        model.load_exits({**tensors, "exit.9.bias": torch.zeros(1)})


@torch.no_grad()
def test_the_last_exit_alone_costs_no_heads(model):
    ids, mask = own_batch(model)
    (last,) = run(model, ids, mask, last_only=True)
    assert torch.equal(last, run(model, ids, mask)[-1])


@torch.no_grad()
def test_dropout_of_heads_is_that_of_the_models_own_head_and_off_at_inference():
    model = ModelWithExits(make_model("distilbert", seq_classif_dropout=0.5, dropout=0.0, attention_dropout=0.0))
    ids, mask = own_batch(model)
    model.train()
    assert not torch.equal(run(model, ids, mask)[0], run(model, ids, mask)[0])
    model.eval()
    assert torch.equal(run(model, ids, mask)[0], run(model, ids, mask)[0])


def test_gradients_reach_every_head_and_the_first_layer(of_each_form):
    model = of_each_form
    model.train()
    ids, mask = own_batch(model)
    losses = exit_losses(run(model, ids, mask), torch.tensor([0, 1, 2]), "single_label_classification")
    weighted_loss(losses, [1 / 3] * 3).backward()
    for parameter in model.heads.parameters():
        assert parameter.grad.abs().max() > 0
    assert model.model.base_model.get_input_embeddings().weight.grad.abs().max() > 0


def test_exit_tensors_are_numbered_from_one(model):
    tensors = model.exit_tensors()
    assert sorted(tensors) == ["exit.1.bias", "exit.1.weight", "exit.2.bias", "exit.2.weight"]
    assert torch.equal(tensors["exit.2.weight"], model.heads[1].exit.weight)
    assert tensors["exit.1.weight"].shape == (len(LABELS), 32)

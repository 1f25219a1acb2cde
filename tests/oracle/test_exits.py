"""Exits answer what the model that they were trained in answers there, and rows leave when it says so.

Shapes: B rows, C labels; K exits, the last of them the model's own head.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import offramp
from offramp.checkpoints.exits import ModelWithExits
from offramp.program.heads import FORMS
from offramp.store.exits import describe_exits
from tests.oracle.tiny import BACKENDS, MULTI, REGRESSION, Case, inputs_of, logits, make_batch, make_model, run

LENGTHS = [31, 9, 16, 2, 24, 12]
CASES = (Case("bert"), Case("distilbert", problem=MULTI), Case("electra", "relu", REGRESSION, embedding_size=32))


@pytest.fixture(scope="module")
def with_exits(tmp_path_factory):
    """case -> (store with random exits, a batch, the logits of each exit for it: K arrays [B, C])."""

    def make(case, form="mean-linear"):
        folder = tmp_path_factory.mktemp("exits")
        model = ModelWithExits(make_model(case.config()), form).eval()
        with torch.no_grad():
            for parameter in model.heads.parameters():
                parameter.normal_(std=0.3)
        model.model.save_pretrained(folder / "model")
        save_file(model.exit_tensors(), folder / "model" / "exits.safetensors")
        (folder / "model" / "exits.json").write_bytes(describe_exits(form, 3))
        batch = make_batch(model.model.config, LENGTHS)
        with torch.no_grad():
            said = model(**inputs_of(model.model.config, batch))
        store = offramp.divide(folder / "model", folder / "store")
        return store, batch, [logits_BC.numpy() for logits_BC in said]

    return make


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_exit_says_what_the_trained_model_says_there(with_exits, case, form, backend):
    store, batch, said_KBC = with_exits(case, form)
    for exit_stage, said_BC in enumerate(said_KBC, 1):
        (outcomes,) = run(store, [batch], backend=backend, exit=f"stage:{exit_stage}")
        assert [outcome.exit_stage for outcome in outcomes] == [exit_stage] * len(LENGTHS)
        found_BC = np.stack([outcome.logits_C for outcome in outcomes])
        np.testing.assert_allclose(found_BC, said_BC, rtol=0, atol=0 if backend == "torch" else 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_sure_leave_and_the_others_go_on(with_exits, backend):
    store, batch, said_KBC = with_exits(Case("bert"))
    exponents_KBC = np.exp(np.stack(said_KBC))
    confidence_KB = (exponents_KBC / exponents_KBC.sum(-1, keepdims=True)).max(-1)
    ordered = np.sort(confidence_KB[0])
    threshold = (ordered[2] + ordered[3]) / 2
    expected = [next((k for k in (1, 2) if confidence_K[k - 1] >= threshold), 3) for confidence_K in confidence_KB.T]
    assert expected.count(1) == 3
    (outcomes,) = run(store, [batch], backend=backend, exit=f"confidence:{threshold:.7f}")
    assert [outcome.exit_stage for outcome in outcomes] == expected
    for row, outcome in enumerate(outcomes):
        np.testing.assert_allclose(outcome.logits_C, said_KBC[expected[row] - 1][row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", [Case("bert"), CASES[2]], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_patience_is_the_full_model(with_exits, case, backend):
    store, batch, said_KBC = with_exits(case)
    plain = logits(store, batch, backend=backend)
    np.testing.assert_array_equal(logits(store, batch, backend=backend, exit="patience:inf"), plain)
    np.testing.assert_allclose(plain, said_KBC[-1], rtol=0, atol=0 if backend == "torch" else 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_patience_needs_no_exits(divided, backend):
    one = divided(Case("bert"))
    batch = make_batch(one.model.config, LENGTHS)
    plain = logits(one.store, batch, backend=backend)
    np.testing.assert_array_equal(logits(one.store, batch, backend=backend, exit="patience:inf"), plain)

"""The same logits as transformers: within 1e-5 on ONNX Runtime and NumPy, bit for bit on PyTorch."""

import numpy as np
import pytest
import torch

from tests.oracle.tiny import CASES, Case, ask_transformers, logits, make_batch

SHAPES = ([12], [7, 7, 7], [31, 9, 1, 16, 2])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("lengths", SHAPES, ids=str)
@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "texts"])
@pytest.mark.parametrize("backend", ["ort", "numpy"])
def test_onnx_runtime_and_numpy_are_close_to_transformers(divided, case, lengths, pairs, backend):
    one = divided(case)
    batch = make_batch(one.model.config, lengths, pairs)
    theirs = ask_transformers(one.model, batch)
    np.testing.assert_allclose(logits(one.store, batch, backend=backend), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("lengths", SHAPES, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pytorch_equals_transformers_bit_for_bit(divided, case, lengths, attention):
    one = divided(case)
    batch = make_batch(one.model.config, lengths)
    theirs = ask_transformers(one.model, batch, attention)
    np.testing.assert_array_equal(logits(one.store, batch, backend="torch", attention=attention), theirs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pytorch_equals_transformers_on_two_threads(divided, attention):
    one = divided(Case("bert"))
    batch = make_batch(one.model.config, [48, 40, 48, 3, 48, 22])
    torch.set_num_threads(2)
    theirs = ask_transformers(one.model, batch, attention)
    torch.set_num_threads(1)
    ours = logits(one.store, batch, backend="torch", attention=attention, num_threads=2)
    np.testing.assert_array_equal(ours, theirs)


def test_token_types_and_padding_reach_the_model(divided):
    """What the tests above would miss if a model did not care."""
    one = divided(Case("bert"))
    pairs, texts = (make_batch(one.model.config, [31, 9], pairs) for pairs in (True, False))
    plain = logits(one.store, texts)
    assert np.abs(logits(one.store, pairs) - plain).max() > 1e-3
    texts.mask_BS[1, 9:] = 1
    assert np.abs(logits(one.store, texts) - plain)[1].max() > 1e-3


@pytest.mark.parametrize("case", [Case("roberta"), Case("bert")], ids=str)
def test_a_padding_token_inside_a_text_takes_the_position_that_transformers_gives_it(divided, case):
    one = divided(case)
    batch = make_batch(one.model.config, [16, 9], pairs=False)
    plain = logits(one.store, batch)
    batch.ids_BS[0, [3, 4]] = one.model.config.pad_token_id
    theirs = ask_transformers(one.model, batch)
    np.testing.assert_allclose(logits(one.store, batch), theirs, rtol=0, atol=1e-5)
    assert np.abs(theirs - plain)[0].max() > 1e-3

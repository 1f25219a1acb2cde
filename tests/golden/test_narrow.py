"""Stores of narrow weights open, verify and answer as when they were written. Runs on Python 3.8."""

import importlib.util
import json

import numpy as np
import pytest

import offramp
from tests.golden.common import TOLERANCE, unpack
from tests.golden.narrow import ANSWERS, RULES, STORES, predicted

GOLDEN = json.loads(ANSWERS.read_text())
TOLERANCES = {"bert-fp16": TOLERANCE, "bert-int8": 2e-3, "bert-int8-rotated": 2e-3}
"""Largest accepted difference of a score. An activation that lies between two integers may become either of them on
another processor, which moves a score of int8 by some 1e-4."""
LIBRARIES = {"ort": "onnxruntime", "torch": "torch", "numpy": "numpy"}


@pytest.mark.parametrize("name", sorted(GOLDEN))
@pytest.mark.parametrize("backend", sorted(LIBRARIES))
def test_a_narrow_golden_store_answers_as_recorded(tmp_path, name, backend):
    for library in (LIBRARIES[backend], "tokenizers"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(library + " is not installed")
    store = unpack(name, tmp_path, STORES)
    assert all(check.problem is None for check in offramp.verify(store))
    for rule in RULES:
        found, expected = predicted(store, backend, rule), GOLDEN[name][rule]
        assert (found["label"], found["exit_stage"]) == (expected["label"], expected["exit_stage"])
        tolerance = max(TOLERANCES[name], 1e-5 if backend == "numpy" else 0)
        np.testing.assert_allclose(found["score"], expected["score"], rtol=0, atol=tolerance)

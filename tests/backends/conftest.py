"""One small store with exits, divided without torch."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import offramp
from tests.division.tiny import write_model

HIDDEN, NUM_LABELS = 32, 2  # of tests.division.tiny
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film"]


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edge")
    write_model(folder / "model")
    rng = np.random.default_rng(0)
    heads = {"exit.1.weight": rng.standard_normal((NUM_LABELS, HIDDEN)), "exit.1.bias": rng.standard_normal(NUM_LABELS)}
    heads = {name: array.astype(np.float32) for name, array in heads.items()}
    save_file(heads, folder / "model" / "exits.safetensors")
    (folder / "model" / "exits.json").write_text(json.dumps({"form": "mean-linear", "trained": True}))
    (folder / "model" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return offramp.divide(folder / "model", folder / "store")

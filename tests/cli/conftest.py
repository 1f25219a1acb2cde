"""A small model with a tokenizer and exits, and its store, both made once; and the command line as a function."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from safetensors.numpy import save_file

import offramp
from offramp.cli import main
from tests.division.tiny import config_of, write_model

WORDS = ["the", "a", "bank", "film", "match", "shares", "rose", "fell", "won", "lost", "today"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
LABELS = {"0": "business", "1": "film", "2": "sport"}
NUM_LAYERS = 4


def write_tiny(folder, exits=True, **changes):
    """A random BERT classifier over VOCABULARY, with trained-looking exits after layers 1 to 3."""
    shape = {"num_hidden_layers": NUM_LAYERS, "vocab_size": len(VOCABULARY), "id2label": LABELS}
    write_model(folder, config_of(**{**shape, **changes}))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    if exits:
        rng = np.random.default_rng(1)
        heads = {f"exit.{k}.weight": rng.standard_normal((3, 32)).astype(np.float32) for k in range(1, NUM_LAYERS)}
        heads |= {f"exit.{k}.bias": np.zeros(3, np.float32) for k in range(1, NUM_LAYERS)}
        save_file(heads, folder / "exits.safetensors")
        form = {"form": "mean-linear", "exits": list(range(1, NUM_LAYERS)), "trained": True}
        (folder / "exits.json").write_text(json.dumps(form))
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="session")
def store(model):
    return offramp.divide(model, model.parent / "store")


@dataclass
class Said:
    code: int
    out: str
    err: str

    @property
    def lines(self):
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def run(capsys):
    """Run a command in this process: exit code, stdout, stderr."""

    def call(*words):
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return call


@pytest.fixture
def refused(run):
    """Run a command that must fail with `code` and one line that mentions `words`."""

    def call(code, mentions, *words):
        said = run(*words)
        assert said.code == code, said
        assert said.out == ""
        last = said.err.splitlines()[-1]
        assert last.startswith("offramp: error: ")
        assert "Traceback" not in said.err
        for mention in [mentions] if isinstance(mentions, str) else mentions:
            assert mention in last
        return said

    return call

"""Each model is made and divided once."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers

import offramp
from tests.oracle.tiny import make_model


@dataclass(frozen=True)
class Divided:
    """A model of transformers, the folder that it was saved to, and the store that came of it."""

    model: Any
    source: Path
    store: Path


@pytest.fixture(scope="session")
def divided(tmp_path_factory):
    """case -> Divided."""
    transformers.utils.logging.disable_progress_bar()

    @functools.cache
    def make(case):
        folder = tmp_path_factory.mktemp("divided")
        model = make_model(case.config())
        model.save_pretrained(folder / "model")
        return Divided(model, folder / "model", offramp.divide(folder / "model", folder / "store"))

    return make


@pytest.fixture(autouse=True)
def in_one_thread(one_thread):
    """Each test of this folder computes in one thread."""

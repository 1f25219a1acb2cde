"""Classifiers loaded from hostile folders: refused by name, where transformers or torch would fail or take memory."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from offramp.checkpoints.checkpoint import load_classifier
from offramp.errors import SourceError
from tests import tiny_vision


@pytest.fixture
def folder(tmp_path):
    model = tiny_vision.write_model(tmp_path, "resnet")
    tiny_vision.write_exits(tmp_path, tiny_vision.with_exits(model))
    return tmp_path


def edit_exits(folder, change):
    tree = json.loads((folder / "exits.json").read_bytes())
    change(tree["points"])
    (folder / "exits.json").write_text(json.dumps(tree))


def test_a_folder_as_it_was_written_loads_with_its_exits(folder):
    edit_exits(folder, lambda points: None)
    model = load_classifier(folder)
    with torch.no_grad():
        logits = model(pixel_values=torch.from_numpy(tiny_vision.pixels(1)))
    assert len(logits) == len(json.loads((folder / "exits.json").read_bytes())["points"]) + 1


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, "nowhere", "no module 'nowhere'"),
        (0, "\x1b[2J", "no module"),
        (2, 1 << 28, "no head of width 268435456"),
        (2, 1, "no head of width 1"),
    ],
)
def test_exits_at_places_or_of_widths_that_the_model_lacks_are_refused(folder, place, value, said):
    edit_exits(folder, lambda points: points[0].__setitem__(place, value))
    with pytest.raises(SourceError, match=said):
        load_classifier(folder)


def test_weights_that_are_missing_are_not_made_up(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(SourceError, match=f"tensors of the model are missing, the first is '{name}'"):
        load_classifier(folder)


def test_what_transformers_cannot_load_is_refused_in_one_line(folder):
    header = b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(SourceError) as caught:
        load_classifier(folder)
    assert "\n" not in str(caught.value)

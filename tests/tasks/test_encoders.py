import json

import numpy as np
import pytest

from offramp.errors import UsageError
from offramp.program.program import Input, Texts
from offramp.tasks import open_encoder, read_inputs
from offramp.tasks.arrays import ArrayInputs
from offramp.tasks.images import Image
from offramp.tasks.pixels import ImageEncoder, ImageInputs
from offramp.tasks.processors import FILE_NAME
from offramp.tasks.text import TextEncoder
from tests.tasks.test_text import bert_folder

PIXELS = Input("float32", (2, 3, 8, 8))


def test_a_model_of_texts_gets_its_tokenizer(tmp_path):
    folder, warnings = bert_folder(tmp_path / "bert"), []
    encoder = open_encoder(folder, {}, Texts(40_000, 32, 2, 0), 6, warnings.append)
    assert isinstance(encoder, TextEncoder) and encoder.max_length == 6
    assert encoder.encode(["a " * 40]).length == 6 and len(warnings) == 1
    assert open_encoder(folder, {}, Texts(40_000, 32, 2, 0)).max_length == 32


def test_a_model_with_an_image_processor_gets_it(tmp_path):
    (tmp_path / FILE_NAME).write_text(json.dumps(ImageEncoder((8, 8)).to_json()))
    encoder = open_encoder(tmp_path, {"x": PIXELS}, None)
    assert isinstance(encoder, ImageInputs) and (encoder.name, encoder.encoder.size) == ("x", (8, 8))
    assert isinstance(open_encoder(tmp_path, {"x": PIXELS, "y": PIXELS}, None), ArrayInputs)
    assert isinstance(open_encoder(tmp_path, {"x": Input("float32", (2, 3))}, None), ArrayInputs)


def test_any_other_model_takes_arrays_of_its_dtypes(tmp_path):
    encoder = open_encoder(tmp_path, {"x": PIXELS, "i": Input("int64", (2,))}, None)
    arrays = encoder.encode(encoder.sample).arrays
    assert {name: (str(array.dtype), array.shape) for name, array in arrays.items()} == {
        "x": ("float32", (1, 3, 8, 8)),
        "i": ("int64", (1,)),
    }


def test_only_texts_have_a_length_to_cut_to(tmp_path):
    with pytest.raises(UsageError, match="no length to cut to"):
        open_encoder(tmp_path, {"x": PIXELS}, None, 8)


def test_texts_images_and_records_are_read_from_one_place(tmp_path):
    (tmp_path / "t.txt").write_text("a\nb\n")
    (tmp_path / "t.tsv").write_text("x\ty\n1\t2\n")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"-")
    np.savez(tmp_path / "r.npz", x=np.zeros((3, 2)))
    assert list(read_inputs(str(tmp_path / "t.txt"))) == ["a", "b"]
    assert list(read_inputs(tmp_path / "t.tsv", "x", "y")) == [("1", "2")]
    for place in (tmp_path / "images", tmp_path / "images" / "a.png"):
        assert list(read_inputs(place)) == [Image(tmp_path / "images" / "a.png")]
    assert [record.arrays["x"].shape for record in read_inputs(tmp_path / "r.npz")] == [(2,)] * 3
    for place, kind in (("images", "images"), ("r.npz", "arrays")):
        with pytest.raises(UsageError, match=f"are for texts, the inputs are {kind} - .*{place} - leave them out"):
            read_inputs(tmp_path / place, None, "b")

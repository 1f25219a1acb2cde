"""Files of folders and of stores: of a store, those that the manifest lists."""

import pytest

from offramp.errors import DamagedError, SourceError
from offramp.store import Store
from offramp.tasks import has_tokenizer
from offramp.tasks.model_files import ModelFiles, files_of
from offramp.tasks.pixels import ImageEncoder
from offramp.tasks.tokenizer import tokenizer_length
from tests.store.small import write_small


def test_a_folder_has_the_files_that_lie_in_it(tmp_path):
    (tmp_path / "a.json").write_text('{"b": 1}')
    (tmp_path / "folder").mkdir()
    files = files_of(tmp_path)
    assert files_of(files) is files
    assert [files.has(name) for name in ("a.json", "b.json", "folder")] == [True, False, False]
    assert (files.read_object("a.json", ""), files.read_object("b.json", "")) == ({"b": 1}, {})


@pytest.mark.parametrize(
    ("content", "what"), [("{", "not JSON"), ("[]", "not a JSON object"), ("[" * 9999, "not JSON")]
)
def test_a_file_that_is_no_object_is_refused_with_the_remedy(tmp_path, content, what):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(SourceError, match=rf"{what}.*a\.json - save it again"):
        files_of(tmp_path).read_object("a.json", "save it again")


def test_a_store_has_the_files_that_its_manifest_lists(tmp_path):
    path = write_small(tmp_path / "store")
    names = ("vocab.txt", "tokenizer_config.json", "offramp_tokenizer.json", "preprocessor_config.json")
    for name in names[1:]:
        (path / name).write_text('{"model_max_length": 3}')
    with Store(path) as store:
        for files in (files_of(path), files_of(str(path)), ModelFiles(path, store.manifest)):
            assert [files.has(name) for name in names] == [True, False, False, False]
    assert has_tokenizer(path) and tokenizer_length(path) is None
    with pytest.raises(SourceError, match="no image processor"):
        ImageEncoder.from_folder(path)
    (path / "vocab.txt").unlink()
    assert has_tokenizer(path)  # a file that is listed and missing is no reason for another tokenizer
    with pytest.raises(DamagedError, match="file is missing"):
        files_of(path).read("vocab.txt")


def test_a_store_whose_manifest_is_damaged_is_refused(tmp_path):
    path = write_small(tmp_path / "store")
    (path / "offramp.json").write_text("{")
    with pytest.raises(DamagedError, match=r"offramp\.json"):
        has_tokenizer(path)


def test_the_files_of_a_store_are_those_of_the_folder_that_was_opened(tmp_path):
    path = write_small(tmp_path / "store")
    with Store(path) as store:
        files = ModelFiles(path, store.manifest, store.folder)
        before = files.read("vocab.txt")
        path.rename(tmp_path / "moved")
        path.mkdir()
        (path / "vocab.txt").write_text("another")
        assert files.read("vocab.txt") == before
        with files.opened("vocab.txt") as place, open(place, "rb") as file:
            assert file.read() == before

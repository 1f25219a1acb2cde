"""The downloads that a model is, or was made from, and their record in what is made of it."""

import json
import os

import pytest

import offramp
from offramp.checkpoints.downloads import DOWNLOADS, Download, commit_of, downloads_of, to_bytes
from offramp.errors import SourceError
from offramp.store import Store
from offramp.store import manifest as m
from tests.division.tiny import write_model

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


@pytest.fixture
def snapshot(tmp_path):
    """A folder in the cache of the hub."""
    folder = tmp_path / "hub" / "models--acme--tiny" / "snapshots" / COMMIT
    folder.parent.mkdir(parents=True)
    write_model(folder)
    return folder


def recorded(store):
    with Store(store) as opened:
        file = next((each for each in opened.manifest.files if each.file == DOWNLOADS), None)
        return None if file is None else json.loads(opened.read_file(file))


def test_a_store_names_the_download_that_it_was_divided_from(snapshot, tmp_path):
    made = offramp.divide(snapshot, tmp_path / "store")
    assert recorded(made) == [{"repository": "acme/tiny", "revision": COMMIT}]
    assert all(check.problem is None for check in offramp.verify(made))
    again = offramp.divide(os.path.relpath(snapshot), tmp_path / "again")
    assert (again / m.FILE_NAME).read_bytes() == (made / m.FILE_NAME).read_bytes()


def test_what_is_made_from_a_run_folder_or_a_store_keeps_the_record(tmp_path):
    write_model(tmp_path / "run")
    (tmp_path / "run" / DOWNLOADS).write_bytes(to_bytes([Download("acme/tiny", COMMIT)]))
    store = offramp.divide(tmp_path / "run", tmp_path / "store")
    assert downloads_of(store) == downloads_of(tmp_path / "run") == (Download("acme/tiny", COMMIT),)


def test_another_folder_has_no_record(tmp_path):
    write_model(tmp_path / "model")
    assert downloads_of(tmp_path / "model") == ()
    assert recorded(offramp.divide(tmp_path / "model", tmp_path / "store")) is None


def test_a_download_is_known_by_its_folder_and_not_by_what_its_author_wrote_there(snapshot):
    (snapshot / DOWNLOADS).write_bytes(to_bytes([Download("else/where", OTHER)]))
    assert downloads_of(snapshot, snapshot) == (Download("acme/tiny", COMMIT),)


def test_several_downloads_are_kept_in_order(snapshot, tmp_path):
    (tmp_path / DOWNLOADS).write_bytes(to_bytes([Download("acme/lora", OTHER), Download("acme/tiny", COMMIT)]))
    assert [each.repository for each in downloads_of(tmp_path, snapshot)] == ["acme/lora", "acme/tiny"]


@pytest.mark.parametrize("name", ["snapshots/main", f"snapshots/{COMMIT}/inner", f"blobs/{COMMIT}"])
def test_a_folder_of_another_name_has_no_commit(tmp_path, name):
    assert commit_of(tmp_path / "models--acme--tiny" / name) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b'["acme/tiny"]',
        b'[{"repository": "acme/tiny"}]',
        b'[{"repository": "acme/tiny", "revision": "main"}]',
        b'[{"repository": "\\u001b[31m", "revision": "%s"}]' % COMMIT.encode(),
        b"[" * 1000 + b"]" * 1000,
        b" " * (64 << 10) + b"[]",
    ],
)
def test_a_record_of_another_form_is_refused(tmp_path, content):
    (tmp_path / DOWNLOADS).write_bytes(content)
    with pytest.raises(SourceError, match="not the downloads of a model") as caught:
        downloads_of(tmp_path)
    assert "\x1b" not in str(caught.value)

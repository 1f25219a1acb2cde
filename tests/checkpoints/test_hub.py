import errno
import os
import sys
from types import SimpleNamespace

import pytest

from offramp.checkpoints.hub import resolve
from offramp.checkpoints.source import open_source
from offramp.errors import DiskFullError, MissingExtraError, OfframpError, SourceError, UsageError
from tests.division.tiny import config_of, entries_of, write_model

huggingface_hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache as huggingface_hub leaves it: blobs, and a snapshot of links to them."""
    repository = tmp_path / "hub" / "models--acme--tiny"
    write_model(repository / "blobs")
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for blob in (repository / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(os.path.relpath(blob, snapshot))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return snapshot


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """Replaces the download: what it was asked for, and what it shall do."""
    calls = []

    def download(model, **options):
        calls.append((model, options))
        if isinstance(download.outcome, Exception):
            raise download.outcome
        return str(download.outcome)

    download.outcome = tmp_path
    download.calls = calls
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return download


def test_a_folder_is_taken_as_it_is(tmp_path, monkeypatch, downloads):
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    assert str(resolve("acme/tiny")) == "acme/tiny"
    assert resolve(str(tmp_path)) == tmp_path
    assert downloads.calls == []


def test_the_cache_serves_without_a_network(cache):
    folder = resolve("acme/tiny", offline=True)
    assert folder.resolve() == cache.resolve()
    with open_source(folder) as source:
        assert source.entries == entries_of(config_of())


def test_the_environment_may_say_offline(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve("acme/tiny").resolve() == cache.resolve()


def test_what_the_cache_does_not_have_is_an_error_offline(cache):
    with pytest.raises(UsageError, match="no such folder, nor in the cache of the hub - acme/other") as caught:
        resolve("acme/other", offline=True)
    assert "\n" not in str(caught.value)


def test_pickles_are_fetched_only_where_there_is_no_safetensors(downloads):
    write_model(downloads.outcome)
    resolve("acme/tiny")
    assert [model for model, _ in downloads.calls] == ["acme/tiny"]
    asked = downloads.calls[0][1]
    wanted = {"config.json", "adapter_config.json", "vocab.txt", "preprocessor_config.json", "model.safetensors"}
    assert {*wanted, "exits.json"} <= set(asked["allow_patterns"])
    assert not any(pattern.endswith(".bin") for pattern in asked["allow_patterns"])
    assert asked["local_files_only"] is False
    (downloads.outcome / "model.safetensors").unlink()
    resolve("acme/tiny", offline=True)
    assert "pytorch_model.bin" in downloads.calls[-1][1]["allow_patterns"]
    assert "adapter_model.bin" in downloads.calls[-1][1]["allow_patterns"]
    assert [options["local_files_only"] for _, options in downloads.calls[1:]] == [True, True]


def test_pickles_are_of_the_commit_that_the_first_download_found(downloads, cache):
    """Also where the branch has moved on in between."""
    (cache / "model.safetensors").unlink()
    downloads.outcome = cache
    resolve("acme/tiny@v1")
    assert [options["revision"] for _, options in downloads.calls] == ["v1", COMMIT]
    assert {model for model, _ in downloads.calls} == {"acme/tiny"}


def test_a_revision_is_taken_from_the_cache(cache):
    assert resolve(f"acme/tiny@{COMMIT}", offline=True).resolve() == cache.resolve()
    (cache.parents[1] / "refs" / "main").write_text("f" * 40)
    assert resolve(f"acme/tiny@{COMMIT}", offline=True).resolve() == cache.resolve()
    with pytest.raises(UsageError, match="nor in the cache of the hub"):
        resolve("acme/tiny", offline=True)


def test_a_folder_with_an_at_sign_is_a_folder(tmp_path, downloads):
    (tmp_path / "acme@home").mkdir()
    assert str(resolve("acme@home")) == "acme@home"
    resolve("acme/tiny@refs/pr/1")
    assert downloads.calls[0][1]["revision"] == "refs/pr/1"


@pytest.mark.parametrize(
    "model", ["", ".model", "./model", "../model", "/no/such", "~/model", "a/b/c", "model/", "a\\b"]
)
def test_what_looks_like_a_path_is_not_asked_of_the_hub(downloads, model):
    with pytest.raises(UsageError, match="no such folder"):
        resolve(model)
    assert downloads.calls == []


def test_a_file_is_not_a_folder(downloads):
    (downloads.outcome / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"not a folder - model\.safetensors"):
        resolve("model.safetensors")


def http_error(kind):
    return kind("first line\nsecond line", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("kind", "exit_code", "said"),
    [
        ("GatedRepoError", 4, "model is gated - acme/tiny"),
        ("RepositoryNotFoundError", 2, "neither a folder nor a model on the hub - acme/tiny"),
        (
            "RevisionNotFoundError",
            2,
            "the model on the hub has no such revision - acme/tiny - check what follows the @",
        ),
        ("HfHubHTTPError", 4, r"download failed \(HfHubHTTPError: first line\) - acme/tiny"),
    ],
)
def test_answers_of_the_hub_become_one_line(downloads, kind, exit_code, said):
    downloads.outcome = http_error(getattr(errors, kind))
    with pytest.raises(OfframpError, match=said) as caught:
        resolve("acme/tiny")
    assert caught.value.exit_code == exit_code
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "expected", "said"),
    [
        (errors.LocalEntryNotFoundError("x"), UsageError, "the hub cannot be reached"),
        (ConnectionError("reset\nby peer"), SourceError, r"download failed \(ConnectionError: reset\)"),
        (OSError(errno.ENOSPC, "full"), DiskFullError, "no space left - acme/tiny - free some space"),
    ],
)
def test_failures_on_the_way_become_one_line(downloads, error, expected, said):
    downloads.outcome = error
    with pytest.raises(expected, match=said) as caught:
        resolve("acme/tiny")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["acme--tiny", "a b", "-acme/tiny"])
def test_what_can_be_no_id_is_an_error(cache, model):
    with pytest.raises(UsageError, match="neither a folder nor a model on the hub"):
        resolve(model, offline=True)


def test_without_huggingface_hub_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"offramp\[divide\]"):
        resolve("acme/tiny")

import json
import os

import pytest

from offramp.errors import NonFiniteError, UsageError
from offramp.training.folders import await_folder, checkpoints, is_finished, last_checkpoint, run_folder

CONFIG = {"epochs": 3, "loss": "pabee"}


def add_checkpoint(folder, step=5, state="{}", stage="model"):
    path = checkpoints(folder, stage) / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(state)
    return path


def test_a_run_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "deep" / "run"
    umask = os.umask(0o027)
    try:
        with run_folder(out, CONFIG) as folder:
            (folder / "model.safetensors").touch(0o600)
            add_checkpoint(folder)
            assert not out.exists()
    finally:
        os.umask(umask)
    assert [path.name for path in out.parent.iterdir()] == ["run"]
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "train.json"]
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}
    assert is_finished(out, CONFIG)


def test_a_failure_before_the_first_checkpoint_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), run_folder(tmp_path / "run", CONFIG) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["model", "heads"])
def test_an_interruption_after_it_can_be_gone_on_with(tmp_path, stage):
    with pytest.raises(KeyboardInterrupt), run_folder(tmp_path / "run", CONFIG) as folder:
        newest = add_checkpoint(folder, 12, stage=stage)
        add_checkpoint(folder, 5, stage=stage)
        raise KeyboardInterrupt
    with run_folder(tmp_path / "run", CONFIG) as folder:
        assert last_checkpoint(checkpoints(folder, stage)) == newest


def test_what_a_killed_process_left_beside_its_checkpoints_is_removed(tmp_path):
    """A tokenizer that was saved and not yet compared, half a model."""
    with pytest.raises(KeyboardInterrupt), run_folder(tmp_path / "run", CONFIG) as folder:
        add_checkpoint(folder)
        (folder / "model.safetensors").write_text("half")
        (folder / "trial").mkdir()
        raise KeyboardInterrupt
    with run_folder(tmp_path / "run", CONFIG) as folder:
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "train.json"]


def test_checkpoints_that_a_killed_process_left_in_a_finished_run_are_removed(tmp_path):
    with run_folder(tmp_path / "run", CONFIG):
        pass
    add_checkpoint(tmp_path / "run")
    assert is_finished(tmp_path / "run", CONFIG)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["train.json"]


def test_a_training_that_diverged_leaves_nothing(tmp_path):
    with pytest.raises(NonFiniteError), run_folder(tmp_path / "run", CONFIG) as folder:
        add_checkpoint(folder)
        raise NonFiniteError("loss of exit 1 is not finite")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("state", ["", '{"epoch": 1'])
def test_a_torn_checkpoint_is_none(state, tmp_path):
    whole = add_checkpoint(tmp_path, 5)
    add_checkpoint(tmp_path, 10, state)
    (checkpoints(tmp_path, "model") / "checkpoint-15").mkdir()
    assert last_checkpoint(checkpoints(tmp_path, "model")) == whole


def test_another_configuration_is_refused_and_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt), run_folder(tmp_path / "run", CONFIG) as folder:
        add_checkpoint(folder)
        raise KeyboardInterrupt
    other = {**CONFIG, "epochs": 5}
    match = r"belongs to another configuration \(epochs 3 there, 5 here\) - .*run.partial - choose another name"
    with pytest.raises(UsageError, match=match), run_folder(tmp_path / "run", other):
        pass
    with run_folder(tmp_path / "run", CONFIG) as folder:
        assert last_checkpoint(checkpoints(folder, "model")) is not None
    with pytest.raises(UsageError, match=r"belongs to another configuration \(epochs 3 there, 5 here\) - .*run - "):
        is_finished(tmp_path / "run", other)


def test_two_trainings_do_not_share_a_folder(tmp_path):
    with run_folder(tmp_path / "run", CONFIG):
        match = "another training writes here"
        with pytest.raises(UsageError, match=match), run_folder(tmp_path / "run", CONFIG):
            pass


def test_what_is_no_run_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").touch()
    with pytest.raises(UsageError, match=r"target exists and is not a run folder - .*run - "):
        is_finished(tmp_path / "run", CONFIG)
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "precious").touch()
    with pytest.raises(UsageError, match="the folder contains other files"), run_folder(tmp_path / "other", CONFIG):
        pass
    assert [path.name for path in (tmp_path / "other.partial").iterdir()] == ["precious"]
    assert not is_finished(tmp_path / "absent", CONFIG)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_a_configuration_that_cannot_be_read_is_none(text, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.json").write_text(text)
    with pytest.raises(UsageError, match="not a run folder"):
        is_finished(tmp_path / "run", CONFIG)


def test_the_configuration_is_kept_in_the_run(tmp_path):
    with run_folder(tmp_path / "run", CONFIG):
        pass
    assert json.loads((tmp_path / "run" / "train.json").read_text()) == CONFIG


def test_another_process_waits_for_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("offramp.training.folders._WAIT_SECONDS", 0)
    with pytest.raises(UsageError, match="the first process did not create the folder"):
        await_folder(tmp_path / "run")
    with run_folder(tmp_path / "run", CONFIG) as folder:
        assert await_folder(tmp_path / "run") == folder


def test_an_interruption_of_the_last_moments_keeps_what_was_trained(tmp_path, monkeypatch):
    def interrupt(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("offramp.training.folders.fsync_folder", interrupt)
    with pytest.raises(KeyboardInterrupt), run_folder(tmp_path / "run", CONFIG) as folder:
        (folder / "model.safetensors").write_text("precious")
        whole = add_checkpoint(folder)
    assert (tmp_path / "run.partial" / "model.safetensors").read_text() == "precious"
    monkeypatch.undo()
    with run_folder(tmp_path / "run", CONFIG) as folder:
        assert last_checkpoint(checkpoints(folder, "model")) == whole, "the next call needs no training"


def test_a_place_where_no_folder_can_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    match = r"a run cannot be built there \(File exists\) - .*run.partial - choose another folder"
    with pytest.raises(UsageError, match=match), run_folder(tmp_path / "file" / "run", CONFIG):
        pass


def test_an_empty_folder_becomes_the_run_unless_it_is_a_mount_point(tmp_path, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    assert not is_finished(out, CONFIG)
    with run_folder(out, CONFIG):
        pass
    assert is_finished(out, CONFIG)
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "volume")
    with pytest.raises(UsageError, match="target exists and is not a run folder"):
        is_finished(tmp_path / "volume", CONFIG)

"""Run folders: whole or absent, resumed after an interruption, and never mixed with another training.

A run is built in `OUT.partial`, which is locked and holds its configuration (`train.json`: what was trained on what,
and how) and checkpoints; it is renamed when it is whole.
It knows files, and not what is in them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from offramp.checkpoints.source import TRAINING
from offramp.errors import DiskFullError, NonFiniteError, UsageError
from offramp.store.files import disk_full_is_ours, fsync_folder, lock_folder, write_atomic

_CHECKPOINTS = "checkpoints"
_PATIENCE_SECONDS = 300
_FULL = ("os error 28", "os error 122", "os error 27", "inline_container")
"""How safetensors and torch say that a disk is full: in words, not as OSError."""
_ANOTHER = "choose another name, or remove it"


def is_finished(out: Path, config: Mapping[str, Any]) -> bool:
    """Whether `out` is a whole run of this configuration.

    Raises UsageError if it is anything else that exists, naming what differs.
    """
    if not os.path.lexists(out):
        return False
    found = read_config(out)
    if found is None:
        raise UsageError("target exists, and is no run folder", out, _ANOTHER)
    _require_same(found, config, out)
    return True


@contextmanager
def run_folder(out: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """The folder to build a run in: it becomes `out` when the block ends.

    When the block is interrupted, or the process killed, the folder stays if there is a checkpoint in it, and a next
    call with an equal `config` goes on there; a training that diverged leaves nothing. Raises UsageError for a partial
    folder of another configuration or of somebody who still writes, DiskFullError.
    """
    partial = _partial(out)
    with disk_full_is_ours(out):
        lock = lock_folder(partial, "a run cannot be built there", "another training writes here")
        try:
            _claim(partial, config)
            with _left_in_order(partial, config):
                yield partial
            _finish(partial, out)
        finally:
            os.close(lock)


@contextmanager
def _left_in_order(partial: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """If training fails, keep what a next one can go on with, and nothing else."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, NonFiniteError) or not _has_checkpoint(partial):
            _clear(partial, config)
        if any(mark in str(error) for mark in _FULL):
            remedy = "free some space and run again: it goes on at the last checkpoint"
            raise DiskFullError("no space left", partial, remedy) from error
        raise


def await_folder(out: Path) -> Path:
    """The folder that another process makes with `run_folder`, when it is there.

    Raises UsageError after some minutes: that process has a reason of its own then, which it tells.
    """
    partial, deadline = _partial(out), time.monotonic() + _PATIENCE_SECONDS
    while read_config(partial) is None:
        if time.monotonic() > deadline:
            raise UsageError("the first process makes no folder", partial, "see what it says")
        time.sleep(0.05)
    return partial


def await_run(out: Path, config: Mapping[str, Any]) -> None:
    """Return when another process, which is about to, has finished the run. Raises UsageError after some minutes."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not is_finished(out, config):
        if time.monotonic() > deadline:
            raise UsageError("the first process does not finish", out, "see what it says")
        time.sleep(0.05)


def checkpoints(folder: Path, stage: str) -> Path:
    """Where checkpoints of a stage of a run that is being built lie."""
    return folder / _CHECKPOINTS / stage


def last_checkpoint(place: Path) -> Path | None:
    """The newest whole checkpoint; the Trainer writes its state last, so that a torn one has none."""
    found = []
    for path in place.glob("checkpoint-*"):
        with suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_bytes())
            found.append((int(path.name.rpartition("-")[2]), path))
    return max(found)[1] if found else None


def _has_checkpoint(partial: Path) -> bool:
    return any(last_checkpoint(stage) for stage in (partial / _CHECKPOINTS).glob("*"))


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _claim(partial: Path, config: Mapping[str, Any]) -> None:
    found = read_config(partial)
    if found is not None:
        _require_same(found, config, partial)
    elif {path.name for path in partial.iterdir()} - {TRAINING + ".tmp"}:
        raise UsageError("the folder holds something else", partial, _ANOTHER)
    else:
        write_atomic(partial / TRAINING, [json.dumps(config, indent=1).encode() + b"\n"])


def _clear(partial: Path, config: Mapping[str, Any]) -> None:
    """Remove what is ours."""
    if read_config(partial) == config:
        shutil.rmtree(partial, ignore_errors=True)


def _finish(partial: Path, out: Path) -> None:
    """Make files durable, and their modes what the umask says; drop what only a resumption needs last of all."""
    mode = (partial / TRAINING).stat().st_mode  # safetensors lets nobody else read its files
    for path in partial.iterdir():
        if path.is_file():
            path.chmod(mode)
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_folder(partial)
    partial.rename(out)
    fsync_folder(out.parent)
    shutil.rmtree(out / _CHECKPOINTS, ignore_errors=True)


def read_config(folder: Path) -> dict[str, Any] | None:
    """The configuration in a folder, if there is one."""
    try:
        tree = json.loads((folder / TRAINING).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None


def _require_same(found: Mapping[str, Any], config: Mapping[str, Any], where: Path) -> None:
    keys = [key for key in sorted({*found, *config}) if found.get(key) != config.get(key)]
    if keys:
        told = ", ".join(f"{key} {found.get(key)!r} there, {config.get(key)!r} here" for key in keys[:3])
        raise UsageError(f"the folder belongs to another configuration ({told})", where, _ANOTHER)

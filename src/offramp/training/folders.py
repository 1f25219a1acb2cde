"""Run folders: complete or absent, resumable after an interruption, and bound to one configuration.

A run is built in `OUT.partial`, which is locked and holds the configuration (`train.json`) and checkpoints; it is
renamed to `OUT` when it is complete. This module does not know the contents of the files.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from offramp.checkpoints.source import TRAINING
from offramp.checkpoints.weights import read_json
from offramp.errors import DiskFullError, NonFiniteError, SourceError, UsageError, disk_full
from offramp.program.checks import strict_json
from offramp.store.files import fsync, fsync_folder, lock_folder, read_plain, translate_disk_full, write_atomic

_CHECKPOINTS = "checkpoints"
LOGS = "logs"
"""Name of the folder for logs of the training, which are kept."""
_WAIT_SECONDS = 300
"""Seconds to wait for the first process of a distributed training before giving up."""
_UNWRITTEN = "inline_container"
"""Text by which torch reports a file that cannot be written, without a reason."""
_CHOOSE_ANOTHER = "choose another name, or remove it"


def is_finished(out: Path, config: Mapping[str, Any]) -> bool:
    """Return whether `out` is a complete run with this configuration.

    Raises UsageError if `out` exists and is anything else, naming the difference.
    """
    if not os.path.lexists(out) or _is_replaceable(out):
        return False
    found = read_config(out)
    if found is None:
        raise UsageError("target exists and is not a run folder", out, _CHOOSE_ANOTHER)
    _require_same(found, config, out)
    _remove_checkpoints(out)  # of a process that was killed after the rename
    return True


@contextmanager
def run_folder(out: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """Context manager that yields the folder to build a run in; the folder becomes `out` when the block ends.

    After an interruption the folder is kept if it contains a checkpoint, and the next call with an equal `config`
    resumes from it; a diverged training leaves no folder. Raises UsageError for a partial folder of another
    configuration or one that another process writes to, and DiskFullError.
    """
    partial = _partial(out)
    with translate_disk_full(out), ExitStack() as stack:
        stack.callback(lock_folder(partial, "a run cannot be built there", "another training writes here"))
        _claim(partial, config)
        try:
            yield partial
        except BaseException as error:
            _clean_up(partial, config, error)
            raise
        _finish(partial, out)


def _clean_up(partial: Path, config: Mapping[str, Any], error: BaseException) -> None:
    """Keep the folder of a failed training only if it can be resumed from. Raises DiskFullError if that failed it."""
    can_resume = any(last_checkpoint(stage) for stage in (partial / _CHECKPOINTS).glob("*"))
    if (isinstance(error, NonFiniteError) or not can_resume) and read_config(partial) == config:
        shutil.rmtree(partial, ignore_errors=True)
    full = error if isinstance(error, DiskFullError) else disk_full(error, partial)
    if full is None and _UNWRITTEN in str(error):
        full = DiskFullError("no space left", partial, "free some space and run again")
    if full is not None:
        if can_resume:
            full.add_kept("training resumes at the last checkpoint")
        if full is not error:
            raise full from error


def await_folder(out: Path) -> Path:
    """Return the folder that another process creates with `run_folder`, after waiting until it exists.

    Raises UsageError after `_WAIT_SECONDS`; the other process reports the reason.
    """
    partial = _partial(out)
    _await(lambda: read_config(partial) is not None, "create the folder", partial)
    return partial


def await_run(out: Path, config: Mapping[str, Any]) -> None:
    """Wait until another process has finished the run. Raises UsageError after `_WAIT_SECONDS`."""
    _await(lambda: is_finished(out, config), "finish", out)


def _await(is_done: Callable[[], bool], what: str, where: Path) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS
    while not is_done():
        if time.monotonic() > deadline:
            raise UsageError(f"the first process did not {what}", where, "see its output")
        time.sleep(0.05)


def _is_replaceable(folder: Path) -> bool:
    """Return whether a folder is empty and the run folder can be renamed to it: it is no link and no mount point."""
    return folder.is_dir() and not (folder.is_symlink() or os.path.ismount(folder) or any(folder.iterdir()))


def checkpoints(folder: Path, stage: str) -> Path:
    """Return the folder for the checkpoints of one stage of a run under construction."""
    return folder / _CHECKPOINTS / stage


def last_checkpoint(place: Path) -> Path | None:
    """Return the newest complete checkpoint, or None.

    The Trainer writes its state last, so incomplete ones have none.
    """
    found = []
    for path in place.glob("checkpoint-*"):
        with suppress(OSError, ValueError):
            strict_json(read_plain(path / "trainer_state.json"), is_foreign=True)
            found.append((int(path.name.rpartition("-")[2]), path))
    return max(found)[1] if found else None


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _claim(partial: Path, config: Mapping[str, Any]) -> None:
    found = read_config(partial)
    if found is not None:
        _require_same(found, config, partial)
        for path in partial.iterdir():  # the result of a process that was killed while it saved it
            if path.name not in (TRAINING, _CHECKPOINTS, LOGS):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif {path.name for path in partial.iterdir()} - {TRAINING + ".tmp"}:
        raise UsageError("the folder contains other files", partial, _CHOOSE_ANOTHER)
    else:
        write_atomic(partial / TRAINING, [json.dumps(config, indent=1).encode() + b"\n"])


def _finish(partial: Path, out: Path) -> None:
    """Flush the files, set their modes by the umask, and rename the folder. Checkpoints are removed last."""
    mode = (partial / TRAINING).stat().st_mode  # safetensors makes its files private
    for path in partial.iterdir():
        if path.is_file():
            path.chmod(mode)
            with path.open("rb") as file:
                fsync(file.fileno())
    fsync_folder(partial)
    partial.rename(out)
    fsync_folder(out.parent)
    _remove_checkpoints(out)


def _remove_checkpoints(run: Path) -> None:
    shutil.rmtree(run / _CHECKPOINTS, ignore_errors=True)


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the configuration in a folder, or None if there is none."""
    try:
        return read_json(folder / TRAINING)
    except (OSError, SourceError):
        return None


def _require_same(found: Mapping[str, Any], config: Mapping[str, Any], where: Path) -> None:
    keys = [key for key in sorted({*found, *config}) if found.get(key) != config.get(key)]
    if keys:
        changes = ", ".join(f"{key} {found.get(key)!r} there, {config.get(key)!r} here" for key in keys[:3])
        raise UsageError(f"the folder belongs to another configuration ({changes})", where, _CHOOSE_ANOTHER)

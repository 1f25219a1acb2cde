"""GLUE from the hub, by the `datasets` library: `nyu-mll/glue`, or a folder of the same layout."""

from __future__ import annotations

import errno
from typing import Any

from offramp.errors import DiskFullError, MissingExtraError, SourceError
from offramp.tasks.examples import Example, Splits, cut
from offramp.tasks.glue import Task, example_of, splits_of

REPOSITORY = "nyu-mll/glue"
_REMEDY = "check the network and run again: what is whole is kept; or give GLUE's files with --data DIR"


def load_hub(task: Task, seed: int = 0, *, offline: bool = False, repository: str = REPOSITORY) -> Splits:
    """The splits of a task. `offline`: from the cache alone.

    Raises SourceError for a download that failed or was interrupted, UsageError as `load_glue`, MissingExtraError
    without datasets.
    """
    tables = _load(task.name, repository, offline)
    examples = cut(_read(task, tables, "train", repository), True, seed)
    for split in task.dev_splits:
        examples[split] = _read(task, tables, split.replace("dev", "validation"), repository)
    return splits_of(task, examples, repository)


def _load(name: str, repository: str, offline: bool) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "data") from None
    config = datasets.DownloadConfig(local_files_only=offline)
    try:
        return datasets.load_dataset(repository, name, download_config=config)
    except Exception as error:  # the library raises what its file systems and formats raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError("no space left for the data", repository, "free some space and run again") from error
        what = f"GLUE's {name} cannot be had ({type(error).__name__}: {error})"
        raise SourceError(what, repository, _REMEDY) from error


def _read(task: Task, tables: Any, split: str, repository: str) -> list[Example]:
    if split not in tables:
        raise SourceError(f"no split {split!r}, found {', '.join(tables)}", repository, _REMEDY)
    rows = enumerate(tables[split])
    return [
        example_of(task, (f"{repository}:{task.name}:{split}:{number}", {key: str(cell) for key, cell in row.items()}))
        for number, row in rows
    ]

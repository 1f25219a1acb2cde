"""Unlabelled inputs for a model, read from files and standard input."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from offramp.tasks.images import images_at, is_image_source
from offramp.tasks.tables import read_texts


def read_inputs(source: str | Path, text_column: str | None = None, pair_column: str | None = None) -> Iterable[Any]:
    """Return the inputs at `source`, which is a path or `-`.

    Texts of a .txt, .tsv or .jsonl file or of standard input (see `tables.read_texts`, which takes the column names),
    images of a file, a folder or a zip, or records of an .npz file. Raises UsageError.
    """
    if is_image_source(source):
        return images_at(Path(source))
    if str(source).endswith(".npz"):
        from offramp.tasks.arrays import records_at

        return records_at(Path(source))
    return read_texts(source, text_column, pair_column)

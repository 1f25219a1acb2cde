"""Rows of tables in memory: data sets of Hugging Face `datasets`, and frames of pandas. Neither library is imported."""

from __future__ import annotations

import math
from typing import Any, Dict, Iterator, Tuple

import numpy as np

from offramp.errors import UsageError

_LIBRARIES = ("pandas", "datasets")
_NULLS = ("NAType", "NaTType")
"""Types of the null values of pandas."""


def is_frame(source: object) -> bool:
    """Return whether `source` is a table in memory."""
    return type(source).__module__.partition(".")[0] in _LIBRARIES


def is_null(cell: object) -> bool:
    """Return whether a cell is null or NaN, of Python, NumPy or pandas."""
    is_nan = isinstance(cell, (float, np.floating)) and math.isnan(cell)
    return cell is None or is_nan or type(cell).__name__ in _NULLS


def frame_name(source: Any) -> str:
    """Return the name of a table in memory in messages; of a path, itself."""
    return type(source).__name__ if is_frame(source) else str(source)


def frame_rows(source: Any) -> Iterator[Tuple[str, Dict[str, Any]]]:
    """Yield the rows of a table in memory, as `tables.read_table` does. Class labels of `datasets` are their names.

    Raises UsageError for two columns of one name, and for a dictionary of data sets.
    """
    kind = frame_name(source)
    if hasattr(source, "iloc"):
        columns = [str(name) for name in source.columns]
        require_distinct(columns, kind)
        rows: Any = (dict(zip(columns, cells)) for cells in source.itertuples(index=False, name=None))
        classes: Dict[str, Any] = {}
    else:
        rows, features = source, getattr(source, "features", None) or {}
        classes = {name: each.names for name, each in features.items() if type(each).__name__ == "ClassLabel"}
    for number, cells in enumerate(rows, 1):
        if not isinstance(cells, dict):
            raise UsageError(f"a {kind} is no table", None, "give one of its splits, such as data['train']")
        yield f"{kind}:{number}", {name: _plain(cell, classes.get(name)) for name, cell in cells.items()}


def require_distinct(columns: Any, where: object) -> None:
    """Raise UsageError if two columns have one name."""
    twice = next((name for name in columns if name and list(columns).count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two columns are named {twice!r}", where, "rename one of them")


def _plain(cell: Any, names: Any) -> Any:
    """Return a cell as a value of Python; None for a null, and for the class label -1, which means none."""
    value = cell.item() if getattr(cell, "shape", None) == () else cell  # NumPy's, or a tensor of `with_format`
    if type(value).__name__ in _NULLS or (names is not None and value == -1):
        return None
    return value if names is None or not isinstance(value, int) else names[value]

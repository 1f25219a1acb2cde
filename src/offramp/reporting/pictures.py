"""Pictures of a page: SVG without a library, with the data that each shows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Picture:
    """A picture with its caption. `svg` stands alone; `data` is what it shows, as CSV."""

    name: str
    title: str
    svg: str
    data: str
    caption: str = ""

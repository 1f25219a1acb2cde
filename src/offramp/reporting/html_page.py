"""A report as one HTML file that opens offline: no request leaves it, and texts of records stay texts.

The styles and the script are those of templates/; a policy in the page forbids all others.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from offramp import __version__
from offramp.errors import import_error
from offramp.reporting.forms import WRITERS
from offramp.reporting.svg import TEMPLATES, alone
from offramp.reporting.tables import Page, Table

_MIME = {"csv": "text/csv", "md": "text/markdown", "tex": "application/x-tex"}
_NAMES = {"csv": "CSV", "md": "Markdown", "tex": "LaTeX"}


def to_html(page: Page) -> str:
    """Return a page as HTML. Raises MissingExtraError without jinja2."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise import_error(error, "jinja2", "report") from None
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = "".join(_own(name) for name in ("picture.css", "page.css"))
    script = _own("page.js")
    environment.globals.update(
        alone=alone, data_uri=data_uri, outline=_outline, names=_NAMES, table_forms=_table_forms,
        inline=lambda picture: Markup(picture.svg),  # its texts are escaped when it is drawn  # nosec B704
    )  # fmt: skip
    return environment.get_template("page.html").render(
        page=page, version=__version__, style=Markup(style), script=Markup(script),  # nosec B704
        style_hash=_hash(style), script_hash=_hash(script),
    )  # fmt: skip


def _own(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the source of a policy that allows this text only."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def data_uri(mime: str, text: str) -> str:
    """Return an address that holds the text itself."""
    return f"data:{mime};charset=utf-8;base64,{base64.b64encode(text.encode('utf-8', 'replace')).decode()}"


def _table_forms(table: Table) -> list[tuple[str, str, str]]:
    return [(suffix, _MIME[suffix], write(table)) for suffix, write in WRITERS.items()]


def _outline(bins: Sequence[int]) -> str:
    """Return the outline of a histogram as a path in a box of one unit a bin and a height of 10."""
    top = max(bins) or 1
    steps = "".join(f"V{10 - 10 * count / top:.1f}h1".replace(".0h", "h") for count in bins)
    return f"M0 10{steps}V10Z"


def write_assets(page: Page, folder: Path) -> list[Path]:
    """Write the pictures of a page as SVG and CSV, and its tables in all forms, into a folder; return the files."""
    from offramp.store.files import write_atomic

    files = {f"{table.name}.{suffix}": write(table) for table in page.tables for suffix, write in WRITERS.items()}
    for picture in page.pictures:
        files |= {f"{picture.name}.svg": alone(picture.svg), f"{picture.name}.csv": picture.data}
    for name, text in files.items():
        write_atomic(folder / name, [text.encode("utf-8", "replace")])
    return [folder / name for name in files]

"""Forms in which tables and pages are written besides HTML."""

from collections.abc import Callable

from offramp.reporting.latex import latex, to_latex
from offramp.reporting.tables import Page, Table, comma_separated, markdown, to_csv, to_markdown

WRITERS: dict[str, Callable[[Table], str]] = {"csv": comma_separated, "md": markdown, "tex": latex}
"""Suffix of a file -> function that writes one table."""
WRITE_PAGE: dict[str, Callable[[Page], str]] = {"md": to_markdown, "latex": to_latex, "csv": to_csv}
"""Format -> function that writes the tables of a page."""

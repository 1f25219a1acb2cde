"""Report the records of results folders: one page that opens offline, or its tables as Markdown, LaTeX or CSV.

offramp report results/ --out report.html
offramp report results/ --format latex
offramp report results/ --assets pictures/
"""

import argparse
from pathlib import Path

from offramp.cli.options import log, require_writable

SUFFIXES = {".html": "html", ".htm": "html", ".md": "md", ".tex": "latex", ".csv": "csv"}
"""Suffix of a file -> format that is written without --format."""
FORMATS = ("html", "md", "latex", "csv")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of report."""
    add = parser.add_argument
    add("results", nargs="+", metavar="DIR", help="results folders of offramp sweep")
    add("--out", metavar="FILE", help="file to write: .html, .md, .tex or .csv (default: stdout)")
    add("--format", choices=FORMATS, help="format (default: that of the suffix of --out, on stdout md)")
    add("--assets", metavar="DIR", help="also write each picture as SVG and CSV, and each table, into this folder")
    add("--title", default="Report", metavar="TEXT", help="title of the page (default: Report)")
    baseline = "compare with the experiment that has this value of an option (default: without exits, resident)"
    add("--baseline", action="append", default=[], metavar="NAME=VALUE", help=baseline)


def main(args: argparse.Namespace) -> None:
    """Read the records and write the page."""
    from offramp.experiments.report import page_of
    from offramp.experiments.results import read_results
    from offramp.reporting.html_page import to_html, write_assets
    from offramp.reporting.tables import WRITE_PAGE

    if args.out is not None:
        require_writable(args.out, () if args.format else tuple(SUFFIXES), atomic=True)
    form = args.format or ("md" if args.out is None else SUFFIXES[Path(args.out).suffix])
    page = page_of({name: read_results(Path(name), log) for name in args.results}, args.title, args.baseline)
    text = to_html(page) if form == "html" else WRITE_PAGE[form](page)
    if args.assets is not None:
        log(f"{args.assets}: {len(write_assets(page, Path(args.assets)))} files of pictures and tables")
    if args.out is None:
        if args.assets is None or args.format:
            print(text, end="")
        return
    from offramp.store.files import write_atomic

    write_atomic(Path(args.out), [text.encode("utf-8", "replace")])
    log(f"report: {args.out}")

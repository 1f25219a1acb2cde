"""Report the records of results folders: one page that opens offline, or its tables as Markdown, LaTeX or CSV.

offramp report results/ --out report.html
offramp report results/ --format latex
offramp report results/ --assets pictures/
offramp report results/ --only budget=128MiB,resident --out some.html
offramp report results/ --template recipes/glue.md.jinja --out page.md
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offramp.cli.options import log, require_writable
from offramp.errors import UsageError

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
    add("--title", metavar="TEXT", help="title of the page (default: Report)")
    add(
        "--template",
        metavar="FILE",
        help="write what a Jinja2 template makes of the records instead, for a page of your own",
    )
    baseline = (
        "compare with the experiment that has this value of an option (default: its model without exits, resident)"
    )
    add("--baseline", action="append", default=[], metavar="NAME=VALUE", help=baseline)
    only = "report these experiments only"
    add("--only", action="append", default=[], metavar="NAME=VALUE[,VALUE...]", help=only)


def main(args: argparse.Namespace) -> None:
    """Read the records and write the page."""
    from offramp.experiments.results import read_results

    options = ("format", "assets", "title", "baseline", "only")
    given = [f"--{name}" for name in options if getattr(args, name)]
    if args.template is not None and given:
        what = f"a template makes the whole page, and has no use for {', '.join(given)}"
        raise UsageError(what, args.template, f"leave out --template, or {' and '.join(given)}")
    if args.out is not None:
        is_free = args.format is not None or args.template is not None
        require_writable(args.out, () if is_free else tuple(SUFFIXES), atomic=True)
    if args.assets is not None:
        Path(args.assets).mkdir(parents=True, exist_ok=True)
    names: dict[str, str] = {}
    for name in args.results:
        names.setdefault(os.path.realpath(name), name)  # a folder that is named twice counts once
    text = _written(args, {name: read_results(Path(name), log) for name in names.values()})
    if args.out is not None:
        from offramp.store.files import write_atomic

        write_atomic(Path(args.out), [text.encode("utf-8", "replace")])
        log(f"report: {args.out}")
    elif args.assets is None or args.format is not None:
        print(text, end="")


def _written(args: argparse.Namespace, records: Mapping[str, Sequence[Any]]) -> str:
    """Return the text of the report, and write the assets."""
    if args.template is not None:
        from offramp.experiments.comparison import current_records
        from offramp.reporting.pages import page_from

        found = [record for each in records.values() for record in current_records(each)]
        num_earlier = sum(map(len, records.values())) - len(found)
        if num_earlier:
            log(f"{num_earlier} records of other contents of a model, of data or of a file are left out")
        return page_from(Path(args.template), found)
    from offramp.experiments.report import page_of
    from offramp.reporting.forms import WRITE_PAGE
    from offramp.reporting.html_page import to_html, write_assets

    page = page_of(records, args.title or "Report", args.baseline, args.only)
    form = args.format or ("md" if args.out is None else SUFFIXES[Path(args.out).suffix.lower()])
    text = to_html(page) if form == "html" else WRITE_PAGE[form](page)
    if args.assets is not None:
        log(f"{args.assets}: {len(write_assets(page, Path(args.assets)))} files of pictures and tables")
    return text

"""Report the records of results folders: one page that opens offline, or its tables as Markdown, LaTeX or CSV.

offramp report results/ --out report.html
offramp report results/ --format latex
"""

import argparse
from pathlib import Path

from offramp.cli.options import log, require_writable
from offramp.reporting.tables import FORMATS


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of report."""
    add = parser.add_argument
    add("results", nargs="+", metavar="DIR", help="results folders of offramp sweep")
    add("--out", metavar="FILE", help="file to write (default: stdout)")
    add("--format", choices=tuple(FORMATS), default="md", help="format of the tables (default: md)")
    add("--title", default="Report", metavar="TEXT", help="title of the page (default: Report)")
    baseline = "compare with the experiment that has these options (default: without exits, resident)"
    add("--baseline", action="append", default=[], metavar="NAME=VALUE", help=baseline)


def main(args: argparse.Namespace) -> None:
    """Read the records and write the page."""
    from offramp.experiments.report import page_of
    from offramp.experiments.results import read_results

    if args.out:
        require_writable(args.out, atomic=True)
    page = page_of({name: read_results(Path(name), log) for name in args.results}, args.title, args.baseline)
    text = FORMATS[args.format](page)
    if args.out is None:
        print(text, end="")
        return
    from offramp.store.files import write_atomic

    write_atomic(Path(args.out), [text.encode()])
    log(f"report: {args.out}")

"""Count what becomes of edited model folders: `python -m tests.checks.folder_edits --records FILE`.

The edits and their judgement are those of tests/oracle/test_folder_edits.py: each key of config.json removed, null,
and of another type; each tensor removed, renamed, cast, and in another file. Each edit is one line of the records; what
is there is not done again. Prints a table by family, and ends with 1 if an answer or a refusal is wrong.
"""

import argparse
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from bench.records import add_record, read_records
from offramp.cli.options import table
from tests.oracle import test_folder_edits as edited

OUTCOMES = ("same", "refused", "wrong")


def judge(edit: "edited.Edit", own: Path, cls: type, inputs: dict, unedited: object, dtype: str) -> dict:
    """Return the outcome of one edited folder, divided into a store of `dtype`, and what is wrong with it."""
    edit.make(own)
    wanted, got = edited.expected(own, cls, inputs), edited.found(own, own.with_suffix(".store"), dtype)
    wrong = edited.fault(edit, got, wanted, unedited, dtype)
    return {"outcome": "wrong" if wrong else "refused" if isinstance(got, str) else "same", "wrong": wrong}


def main() -> int:
    """Try what is not in the records yet, and print the table."""
    parser = argparse.ArgumentParser(description="Count what becomes of edited model folders.")
    parser.add_argument("--records", type=Path, required=True)
    families = (*edited.KNOWN, *edited.FAMILIES)
    parser.add_argument("--families", type=lambda text: text.split(","), default=families)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th edit of a family alone")
    parser.add_argument("--dtype", choices=edited.TOLERANCES, default="fp32", help="of the stores")
    args = parser.parse_args()
    known = {(each["family"], each["edit"]) for each in read_records(args.records)}
    with tempfile.TemporaryDirectory() as name:
        make = edited.maker(lambda: Path(tempfile.mkdtemp(dir=name)))
        for family in args.families:
            folder, cls, inputs, edits = make(family)
            unedited = edited.expected(folder, cls, inputs)
            for edit in edits[:: args.every]:
                if (family, edit.name) in known:
                    continue
                with tempfile.TemporaryDirectory() as scratch:
                    own = shutil.copytree(folder, Path(scratch) / "own")
                    found = judge(edit, own, cls, inputs, unedited, args.dtype)
                add_record(args.records, {"family": family, "edit": edit.name, **found})
    records = read_records(args.records)
    counts = Counter((each["family"], each["outcome"]) for each in records)
    rows = [
        (family, *(str(counts[family, outcome]) for outcome in OUTCOMES))
        for family in families
        if any(counts[family, outcome] for outcome in OUTCOMES)
    ]
    print(table(("family", *OUTCOMES), rows))
    return int(any(each["wrong"] for each in records))


if __name__ == "__main__":
    raise SystemExit(main())

"""Compare what dividing costs with another commit: `python bench/divide_cost.py --out OUT --against COMMIT`.

A classifier of BERT-base's shape with random weights is divided by the names of its tensors and by a run of it, without
a tokenizer, and by names with its tokenizer, which newer code proves in a child process. Each division is a process of
its own; sides alternate, and every model is in the page cache. Times are wall times of whole processes; a peak is the
largest resident memory of the process or a child of it.
"""

import argparse
import shutil
import sys
from pathlib import Path

from commits import Side, sides_of
from folders import Folders, read_back
from main_job import shown
from processes import failure, offramp, run
from shapes import build

from offramp.cli.options import table
from offramp.measure.statistics import median_interval

ROUNDS = 10
TARGET = 1.15
"""Largest ratio of times, new to old, without a tokenizer."""
DIVISIONS = {
    "by names": ("bare", "--method", "names"),
    "by a run": ("bare", "--method", "eager"),
    "by names, with a tokenizer": ("bert-base", "--method", "names"),
}
TOKENIZER_FILES = ("tokenizer", "vocab", "special_tokens")


def bare(model: Path) -> None:
    """Make a folder of links to a model's files, without those of its tokenizer."""
    folder = model.with_name("bare")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in model.iterdir():
        if not path.name.startswith(TOKENIZER_FILES):
            (folder / path.name).symlink_to(path)


def divide(side: Side, words: tuple[str, ...]) -> tuple[float, int]:
    """Return seconds and peak bytes of one division, whose store is removed."""
    store = side.place / "divided"
    shutil.rmtree(store, ignore_errors=True)
    model, *options = words
    done = run(offramp("divide", side.out / "models" / model, store, *options), side.environment)
    if reason := failure(done):
        raise SystemExit(f"divide {' '.join(words)} ({side.name}): {reason}\n{done.errors}")
    shutil.rmtree(store)
    return done.seconds, done.peak_rss_bytes


def main() -> int:
    """Print the table, and return 1 if a division without a tokenizer exceeds the target."""
    parser = argparse.ArgumentParser(description="Compare what dividing costs with another commit.")
    parser.add_argument("--out", type=Path, required=True, help="models and stores; 2 GB")
    parser.add_argument("--against", metavar="COMMIT", required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    folders = Folders(args.out.resolve())
    sides = sides_of(args.against, folders.out)
    build(folders.models, "bert-base")
    bare(folders.models / "bert-base")
    read_back(folders.models / "bert-base")
    for side in sides.values():
        side.place.mkdir(parents=True, exist_ok=True)
    rows, is_over = [], False
    for name, words in DIVISIONS.items():
        found = {each: [] for each in sides}
        for number in range(args.rounds + 1):  # the first, which imports from disk, does not count
            for each in ("old", "new") if number % 2 else ("new", "old"):
                found[each].append(divide(sides[each], words))
            print(f"{name} {number}/{args.rounds}", file=sys.stderr, flush=True)
        pairs = list(zip(found["old"], found["new"], strict=True))[1:]
        ratio = median_interval([new[0] / old[0] for old, new in pairs])
        seconds = median_interval([new[0] - old[0] for old, new in pairs])
        peak = median_interval([new[1] - old[1] for old, new in pairs])
        is_over |= "tokenizer" not in name and ratio.value > TARGET
        rows.append((name, shown(ratio, 3), shown(seconds, 2), shown(peak, 1, 2**-20)))
    head = ("division", "time new / old [95 % CI]", "difference, s", "difference of peaks, MiB")
    print(table(head, rows))
    return int(is_over)


if __name__ == "__main__":
    raise SystemExit(main())

"""Seconds and peak memory of dividing a model folder by names, and of the process that asks `AutoTokenizer` for its
tokenizer, each by itself and in turns.

    python bench/tokenizing.py MODEL [--rounds 5]

Prints one JSON line a part: the medians of the seconds and of those of the processor, and the highest peak.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from processes import Finished, failure, run

from offramp.checkpoints.tokenizing import OUTCOME
from offramp.measure import median

DIVIDE = """import sys
sys.modules["transformers"] = None
from offramp.cli import main
sys.exit(main(["divide", *sys.argv[1:], "--method", "names"]))"""


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    found: dict[str, list[Finished]] = defaultdict(list)
    computing: dict[str, list[float]] = defaultdict(list)
    for _ in range(asked.rounds):
        with tempfile.TemporaryDirectory() as place:
            store, made = Path(place, "store"), Path(place, "made")
            made.mkdir()
            parts = {
                "division without transformers": ["-c", DIVIDE, str(asked.model), str(store)],
                "tokenizer": ["-m", "offramp.checkpoints.tokenizing", str(asked.model), str(made), str(os.getpid())],
            }
            for part, words in parts.items():
                before = os.times()
                done, after = run([sys.executable, *words], {"HF_HUB_OFFLINE": "1"}), os.times()
                found[part].append(done)
                computing[part].append(sum(after[2:4]) - sum(before[2:4]))
            outcome = json.loads((made / OUTCOME).read_text())
            if outcome != {"refusal": None, "reason": ""}:
                sys.exit(f"no tokenizer was made: {outcome}")
    for part, runs in found.items():
        figures = {"seconds": median([each.seconds for each in runs]), "cpu_seconds": median(computing[part])}
        figures["peak_rss_bytes"] = max(each.peak_rss_bytes for each in runs)
        print(json.dumps({"part": part, **figures, "failures": [reason for reason in map(failure, runs) if reason]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time one process that predicts: `python bench/one_run.py STORE --budget 128MiB`. Prints one JSON object.

The script calls `offramp.load` and `predict` and nothing else of offramp, so that one driver measures any two versions
of the code; PYTHONPATH decides which. Arguments are documented where `main` defines them.
"""

import argparse
import json
import sys
import time
from pathlib import Path

WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "with", "as", "his", "they", "at")
"""Common words, each one token of BERT's vocabulary."""


def text(num_words: int, shift: int) -> str:
    """Return a text of common words. Texts of different shifts differ."""
    return " ".join(WORDS[(index + shift) * 7 % len(WORDS)] for index in range(num_words))


def peak_bytes() -> int:
    """Return the largest resident set of this process so far (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))


def measure(args: argparse.Namespace) -> dict:
    """Open the store, predict, and return latencies (seconds), start (seconds), peak (bytes) and answers."""
    import offramp

    options = {"batch": args.batch, "threads": args.threads, "max_length": args.tokens, "own_process": True}
    latencies, results = [], []
    with offramp.load(args.store, budget=args.budget, exit=args.exit, **options) as classifier:
        ready = time.monotonic()
        for number in range(args.warm + args.passes):
            texts = [text(args.tokens - 2, number + row) for row in range(args.batch)]
            began = time.monotonic()
            results += classifier.predict(texts)
            latencies.append(time.monotonic() - began)
        plan = classifier.describe_plan()
    return {
        "latency_seconds": latencies[args.warm :],
        "ready_seconds": ready - args.began,
        "first_seconds": ready - args.began + latencies[0],
        "peak_bytes": peak_bytes(),
        "num_slots": plan["num_slots"],
        "exit_stages": sorted({result.exit_stage for result in results}),
        "answers": [[result.label, result.score] for result in results[-args.batch :]],
        "code": str(Path(offramp.__file__).parents[1]),
    }


def main() -> None:
    """Read the arguments and print the measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", help="folder of a text classifier")
    parser.add_argument("--budget", help="bytes of the whole process, such as 128MiB (default: no limit)")
    parser.add_argument("--exit", default="none", help="exit rule (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="texts of a pass (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the backend (default: %(default)s)")
    parser.add_argument("--warm", type=int, default=2, help="passes before those that are timed (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=8, help="timed passes (default: %(default)s)")
    parser.add_argument(
        "--began", type=float, default=time.monotonic(),
        help="time.monotonic() of the parent when it started this process (default: now)",
    )  # fmt: skip
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    sys.exit(main())

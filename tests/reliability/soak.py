"""Many requests in one process: `python -m tests.reliability.soak STORE REQUESTS` prints the memory as JSON."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

FIRST = 1000
"""Requests before the first measurement: pools and caches are filled by then."""


def resident_bytes() -> int:
    """Return the resident set of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def main() -> None:
    """Predict, and print what the process holds after FIRST requests and at the end."""
    import offramp

    store, number = sys.argv[1], int(sys.argv[2])
    words = ("red", "green", "blue", "the", "sky", "is", "grass", "of", "a", "rose")
    began, answers, first = time.monotonic(), {}, {}

    def state() -> dict[str, int]:
        return {
            "rss_bytes": resident_bytes(), "threads": threading.active_count(),
            "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        }  # fmt: skip

    with offramp.load(store, threads=1) as classifier:
        for index in range(number):
            text = " ".join(words[(index * step) % 10] for step in range(1, 2 + index % 12))
            (result,) = classifier.predict([text])
            answer = (result.label, result.score, result.exit_stage)
            if answers.setdefault(text, answer) != answer:
                raise SystemExit(f"request {index} has another answer than before")
            if index + 1 == min(FIRST, number):
                first = state()
    last = state()
    print(json.dumps({"requests": number, "texts": len(answers), "first": first, "last": last,
                      "growth_bytes": last["rss_bytes"] - first["rss_bytes"],
                      "seconds": round(time.monotonic() - began, 1)}))  # fmt: skip


if __name__ == "__main__":
    main()

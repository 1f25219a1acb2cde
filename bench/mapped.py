"""Measure mapped reads against copied ones and resident weights: `python bench/mapped.py --store STORE`.

STORE is that of a text classifier, such as bench/main_job.py makes. `--stream MODEL STORE` adds a module divided with
`--method eager` (`python bench/shapes.py OUT vit-base-module` makes the model), under a budget of two stages. Each
rival is a process of its own that stays open; in a round each runs some passes, so that what disturbs the machine
disturbs them alike. Before all that the stores are dropped from the page cache, and `--back` says who reads them back:
`mapped`, passes that are not counted, or `read`, a loop of plain reads. Prints one JSON line a rival, and a table:
median latency, median of the ratios to resident in the same round, peak of the process.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from folders import evict, read_back
from one_run import peak_bytes, text
from shapes import class_of, inputs, two_stages

from offramp.measure import median

THREADS, TOKENS, WARM, PASSES = 2, 128, 3, 5
"""Threads, tokens of a text, passes before the first round, and passes of a round, the first of which is left out."""
BUDGETS = ("192MiB", "128MiB", "96MiB")
RESIDENT = "resident"
OF_RECORD = ("reads", "reads_because", "num_slots", "num_residents")


def serve(run: Callable[[], Any], record: Callable[[], dict[str, Any]]) -> None:
    """Run PASSES passes for each line of stdin and print their seconds; at its end print what was used."""
    for _ in range(WARM):
        run()
    print("[]", flush=True)
    for _ in sys.stdin:
        seconds = []
        for _ in range(PASSES):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        print(json.dumps(seconds[1:]), flush=True)
    kept = {key: value for key, value in record().items() if key in OF_RECORD}
    print(json.dumps({"peak_bytes": peak_bytes(), **kept}))


def classify(store: str, budget: str, reads: str) -> None:
    """Serve predictions of one text under a budget ("": none)."""
    import offramp

    options = {"threads": THREADS, "max_length": TOKENS, "own_process": True, "reads": reads}
    with offramp.load(store, budget=budget or None, **options) as classifier:
        serve(lambda: classifier.predict([text(TOKENS - 2, 0)]), classifier.record)


def run_module(model: str, store: str, reads: str) -> None:
    """Serve passes of a module, resident or streamed in a way to read."""
    import torch

    import offramp

    torch.set_num_threads(THREADS)
    whole = class_of(Path(model)).from_pretrained(model).eval() if reads == RESIDENT else None
    budget = two_stages(Path(store))
    opened = (
        nullcontext(whole) if whole else offramp.stream(class_of(Path(model)), store, weight_budget=budget, reads=reads)
    )
    with torch.no_grad(), opened as ours:
        given = inputs(ours.config, 0)
        serve(lambda: ours(**given), dict if whole else ours.record)


CHILDREN = {"classify": classify, "module": run_module}
"""Commands of the processes that measure."""


class Rival:
    """A process that runs passes when it is asked to."""

    def __init__(self, *words: object) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, __file__, *map(str, words)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment, **pipes)
        self.answer()
        self.seconds: list[list[float]] = []

    def answer(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())

    def ask(self) -> None:
        """Run the passes of one round."""
        assert self._process.stdin
        print(file=self._process.stdin, flush=True)
        self.seconds.append(self.answer())

    def end(self) -> dict[str, Any]:
        """End the process. Return what it used."""
        assert self._process.stdin
        self._process.stdin.close()
        found = self.answer()
        self._process.wait()
        return found


def compare(subject: str, store: Path, rivals: dict[str, tuple], args: argparse.Namespace) -> None:
    """Measure the rivals of a subject, the last of which reads mapped, and print them."""
    evict(store)
    if args.back == "read":
        read_back(store)
    else:
        Rival(*list(rivals.values())[-1]).end()
    running = {name: Rival(*words) for name, words in rivals.items()}
    for _ in range(args.rounds):
        for rival in running.values():
            rival.ask()
    medians = {name: [median(each) for each in rival.seconds] for name, rival in running.items()}
    for name, rival in running.items():
        used = rival.end()
        ratio = median([a / b for a, b in zip(medians[name], medians[RESIDENT], strict=True)])
        line = {"subject": subject, "rival": name, "back": args.back, "ratio": ratio, **used, "seconds": rival.seconds}
        print(json.dumps(line), flush=True)
        latency, peak = median(medians[name]) * 1000, used["peak_bytes"] / (1 << 20)
        print(f"{subject:20} {name:18} {latency:7.1f} ms {ratio:6.3f} {peak:7.1f} MiB", file=sys.stderr)


def main() -> None:
    """Read the arguments and print the measurements."""
    if sys.argv[1:2] and sys.argv[1] in CHILDREN:
        CHILDREN[sys.argv[1]](*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", type=Path, help="store of a text classifier")
    parser.add_argument("--stream", nargs=2, action="append", default=[], metavar=("MODEL", "STORE"))
    parser.add_argument("--budgets", default=",".join(BUDGETS), help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument("--back", choices=("mapped", "read"), default="mapped", help="(default: %(default)s)")
    args = parser.parse_args()
    if args.store:
        ways = [(budget, reads) for budget in args.budgets.split(",") for reads in ("buffered", "mapped")]
        rivals = {f"{budget} {reads}": ("classify", args.store, budget, reads) for budget, reads in ways}
        compare("classifier", args.store, {RESIDENT: ("classify", args.store, "", "auto"), **rivals}, args)
    for model, store in args.stream:
        rivals = {way: ("module", model, store, way) for way in (RESIDENT, "buffered", "mapped")}
        compare(f"stream {Path(model).name}", Path(store), rivals, args)


if __name__ == "__main__":
    main()

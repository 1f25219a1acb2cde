"""Runs whose passes are looked at one by one, through the trace that offramp writes."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from folders import LOOK, Folders
from processes import failure, offramp, run


def run_traced(
    folders: Folders,
    budget: str,
    num_texts: int,
    options: tuple[str, ...] = (),
    around: Callable[[list[str]], list[str]] = list,
    timeout_seconds: float | None = None,
) -> dict[str, Any]:
    """`offramp run` on a file of texts: its record, and every pass by its trace; or why and when it ended too early."""
    trace, texts = folders.out / "trace.jsonl", folders.texts(num_texts)
    command = offramp(
        "run", folders.store, "--budget", budget, *LOOK, "--input", texts, *options, "--trace", trace, "--json"
    )
    done = run(around(command), folders.environment, timeout_seconds)
    reason = failure(done)
    if reason and (done.timed_out or done.returncode < 0):
        return {"unfinished": reason, "line_seconds": [seconds for seconds, _ in done.lines]}
    if reason:
        return {"failed": reason}
    return {"passes": passes_of(trace), "record": json.loads(done.lines[-1][1])["record"]}


def passes_of(trace: Path) -> list[dict[str, float]]:
    """Of each pass: seconds from first read to last result, of computing, of reading; bytes read for it."""
    passes: dict[int, list[dict[str, Any]]] = {}
    for span in spans_of(trace):
        passes.setdefault(span["pass_index"], []).append(span)
    described = [_describe_pass(passes[index]) for index in sorted(passes)]
    return [each for each in described if each is not None]


def spans_of(trace: Path) -> list[dict[str, Any]]:
    """The events of a trace."""
    return [json.loads(line) for line in trace.read_text().splitlines()]


def _describe_pass(spans: list[dict[str, Any]]) -> dict[str, float] | None:
    """None where the loop did nothing: a read that ended after the last pass belongs to none."""
    loop = [span for span in spans if span["thread"] == "loop"]
    if not loop:
        return None
    reads = [span for span in spans if span["kind"] in ("read", "idle_read")]
    return {
        "seconds": max(span["end_seconds"] for span in loop) - min(span["start_seconds"] for span in loop),
        "compute_seconds": _seconds(span for span in spans if span["kind"] in ("compute", "head")),
        "read_seconds": _seconds(reads),
        "bytes": sum(span["bytes"] for span in reads),
    }


def _seconds(spans: Iterable[dict[str, Any]]) -> float:
    return sum(span["end_seconds"] - span["start_seconds"] for span in spans)

"""What is measured: the rivals of each section, and how one round of each is run. What it means, the report says."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jail
from folders import LOOK, THREADS, TOKENS, Folders, words
from processes import failure, json_result, offramp, rival, run, worker
from traces import run_traced, spans_of

from offramp.experiments.groups import drop_caches

PASSES = 10
"""Timed passes of a process, after two to warm up."""
NUM_TEXTS = 12
"""Texts of a traced run, a pass each."""
BUDGETS = ("96MiB", "120MiB", "128MiB", "192MiB")
ENOUGH = "2GiB"
"""A budget in which the whole model fits."""
CGROUP_BUDGET, THROTTLE_BUDGET, EXITS_BUDGET = "120MiB", "128MiB", "128MiB"
MIB = 1 << 20
DISK_BYTES_PER_SECOND = 100_000_000
EXITS = range(1, 12)

Result = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One rival of a section; `settings` tell one measurement from another of the same rival."""

    rival: str
    settings: dict[str, Any]
    measure: Callable[[], Result]


@dataclass(frozen=True)
class Section:
    """`rounds`: None for as many as asked for; 1 where the same bytes come out each time."""

    name: str
    trials: Callable[[Folders], list[Trial]]
    rounds: int | None = None
    missing: Callable[[Path], str | None] = field(default=lambda out: None)
    """What keeps it from being run on this machine."""
    prepare: Callable[[Folders], None] = field(default=lambda folders: None)


# latency --------------------------------------------------------------------------------------------------------------


def latency(folders: Folders) -> list[Trial]:
    models, settings = folders.models, {"threads": THREADS, "tokens": TOKENS, "passes": PASSES}
    rivals = {
        "transformers resident": rival("resident", models / "bert-base", "--passes", PASSES),
        "transformers disk": rival("disk", models / "bert-base", folders.out / "offload", "--passes", PASSES),
        "torch.load a layer": rival("torch-load", models / "bert-base-layers", "--passes", PASSES),
        "offramp resident": _bench(folders, ENOUGH),
        **{f"offramp {budget}": _bench(folders, budget) for budget in BUDGETS},
    }
    return [
        Trial(name, settings, lambda c=command: json_result(c, folders.environment)) for name, command in rivals.items()
    ]


def _bench(folders: Folders, budget: str) -> list[str]:
    return worker("passes", folders.store, {"budget": budget, "threads": THREADS}, passes=PASSES)


def warm_all(folders: Folders) -> None:
    """Everything that the rivals read into the page cache, and every shard verified once."""
    folders.warm(folders.models / "bert-base", folders.models / "bert-base-layers", folders.store)
    run(offramp("run", folders.store, *LOOK, "--budget", ENOUGH, "--text", words(140)), folders.environment)


# start ----------------------------------------------------------------------------------------------------------------


def start(folders: Folders) -> list[Trial]:
    text, settings = words(140), {"threads": THREADS, "tokens": TOKENS}
    rivals = {
        "transformers": rival("first-label", folders.models / "bert-base", "--threads", THREADS, "--text", text),
        "offramp 128MiB": offramp("run", folders.store, "--budget", "128MiB", *LOOK, "--text", text),
    }
    return [Trial(name, settings, lambda c=command: _first_line(c, folders)) for name, command in rivals.items()]


def _first_line(command: list[str], folders: Folders) -> Result:
    done = run(command, folders.environment)
    reason = failure(done)
    return {"failed": reason} if reason else {"first_label_seconds": done.lines[0][0], "total_seconds": done.seconds}


def warm_start(folders: Folders) -> None:
    """One start of each that does not count."""
    warm_all(folders)
    for trial in start(folders):
        trial.measure()


# cgroup ---------------------------------------------------------------------------------------------------------------


def cgroup(folders: Folders) -> list[Trial]:
    settings = {"budget": CGROUP_BUDGET, "threads": THREADS, "tokens": TOKENS, "passes": NUM_TEXTS}
    resident = rival("resident", folders.models / "bert-base", "--passes", PASSES)
    return [
        Trial("free", settings, lambda: _free(folders)),
        Trial("128 MiB", settings, lambda: _jailed(folders, 128, 300, ())),
        Trial("128 MiB buffered", settings, lambda: _jailed(folders, 128, 120, ("--reads", "buffered"))),
        Trial("transformers in 320 MiB", settings, lambda: _transformers_jailed(folders, resident, 320, 60)),
    ]


def _free(folders: Folders) -> Result:
    folders.warm(folders.store)  # the jails of the round before have emptied the cache
    return run_traced(folders, CGROUP_BUDGET, NUM_TEXTS)


def _jailed(folders: Folders, limit_mib: int, timeout_seconds: float, options: tuple[str, ...]) -> Result:
    """The same run in a small memory cgroup; every file, those of Python included, is read from disk again."""
    drop_caches()
    with jail.jail(memory_bytes=limit_mib * MIB) as cell:
        result = run_traced(folders, CGROUP_BUDGET, NUM_TEXTS, options, cell.around, timeout_seconds)
        return {**result, **cell.usage()}


def _transformers_jailed(folders: Folders, command: list[str], limit_mib: int, timeout_seconds: float) -> Result:
    drop_caches()
    with jail.jail(memory_bytes=limit_mib * MIB) as cell:
        done = run(cell.around(command), folders.environment, timeout_seconds)
        reason = failure(done)
        return {**({"unfinished": reason} if reason else json.loads(done.lines[-1][1])), **cell.usage()}


# throttle -------------------------------------------------------------------------------------------------------------


def throttle(folders: Folders) -> list[Trial]:
    settings = {"budget": THROTTLE_BUDGET, "threads": THREADS, "tokens": TOKENS, "passes": NUM_TEXTS}
    options = ("--reads", "direct")
    return [
        Trial("free", settings, lambda: run_traced(folders, THROTTLE_BUDGET, NUM_TEXTS, options)),
        Trial("100 MB/s", {**settings, "limit": DISK_BYTES_PER_SECOND}, lambda: _throttled(folders, options)),
    ]


def _throttled(folders: Folders, options: tuple[str, ...]) -> Result:
    with jail.jail(read_bytes_per_second=DISK_BYTES_PER_SECOND, folder=folders.store) as cell:
        result = run_traced(folders, THROTTLE_BUDGET, NUM_TEXTS, options, cell.around)
        return {**result, "limit_bytes_per_second": DISK_BYTES_PER_SECOND}


# exact ----------------------------------------------------------------------------------------------------------------


def exact(folders: Folders) -> list[Trial]:
    shapes = {"BERT-base": ("bert-base", "store"), "DistilBERT": ("distilbert", "store-distilbert")}
    trials = [
        Trial(f"{backend} {shape}", {"threads": THREADS}, lambda b=backend, n=names: _differences(folders, b, *n))
        for backend in ("ort", "torch")
        for shape, names in shapes.items()
    ]
    return [*trials, Trial("budgets", {"threads": THREADS}, lambda: _same_for_budgets(folders))]


def _differences(folders: Folders, backend: str, model: str, store: str) -> Result:
    """Attention implementation of transformers -> batch -> the largest difference of any logit."""
    found = _logits(folders, store, "--backend", backend, "--budget", ENOUGH)
    if "logits" not in found:
        return found
    result: Result = {}
    for attention in ("sdpa", "eager"):
        command = rival("transformers-logits", folders.models / model, folders.batches, "--attention", attention)
        expected = json_result(command, folders.environment)
        if "failed" in expected:
            return expected
        result[attention] = {
            name: largest_difference(rows, found["logits"][name]) for name, rows in expected["logits"].items()
        }
    return result


def largest_difference(one: list[list[float]], other: list[list[float]]) -> float:
    """Between two arrays [B, C]."""
    pairs = [pair for rows in zip(one, other, strict=True) for pair in zip(*rows, strict=True)]
    return max(abs(left - right) for left, right in pairs)


def _same_for_budgets(folders: Folders) -> Result:
    """The same batches under budgets from the smallest on, with both ways of reading: are all bits equal?"""
    base = _logits(folders, "store", "--budget", ENOUGH)
    if "logits" not in base:
        return base
    runs = []
    for extra_mib in (4, 14, 24, 64, 128):
        for reads in ("buffered", "direct"):
            budget = base["smallest_budget_bytes"] + extra_mib * MIB
            found = _logits(folders, "store", "--budget", budget, "--reads", reads)
            equal = found.get("logits") == base["logits"]
            runs.append({**{key: value for key, value in found.items() if key != "logits"}, "equal": equal})
    return {"runs": runs}


def _logits(folders: Folders, store: str, *options: object) -> Result:
    return json_result(rival("offramp-logits", folders.out / store, folders.batches, *options), folders.environment)


# exits ----------------------------------------------------------------------------------------------------------------


def exits(folders: Folders) -> list[Trial]:
    """Twice: leaving where the policy said beforehand, and leaving where only the exit itself could tell."""
    policies = {f"stage:{k}": k for k in EXITS} | {f"from:{k}>confidence:0.01": k for k in EXITS}
    settings = {"budget": EXITS_BUDGET, "threads": THREADS, "tokens": TOKENS}
    return [
        Trial(policy, {**settings, "stage": k}, lambda p=policy, k=k: _leave(folders, p, k))
        for policy, k in policies.items()
    ]


def _leave(folders: Folders, policy: str, stage: int) -> Result:
    """One text in a new process: what it read, and what it may read at most."""
    store, trace = folders.out / "store-exits", folders.out / "trace.jsonl"
    text = ("--text", words(140))
    command = offramp(
        "run", store, "--budget", EXITS_BUDGET, *LOOK, *text, "--exit", policy, "--trace", trace, "--json"
    )
    done = run(command, folders.environment)
    plan = json_result(offramp("plan", store, "--budget", EXITS_BUDGET, *LOOK, *text, "--json"), folders.environment)
    reason = failure(done) or plan.get("failed")
    if reason:
        return {"failed": reason}
    answer, record = json.loads(done.lines[0][1]), json.loads(done.lines[-1][1])["record"]
    reads = [span for span in spans_of(trace) if span["kind"] in ("read", "idle_read")]
    row_bytes = sum(span["bytes"] for span in reads if span["thread"] == "loop")
    exit_bytes = (store / "exits.safetensors").stat().st_size
    return {
        "exit_stage": answer["exit_stage"],
        "num_slots": record["num_slots"],
        "bytes_read": sum(span["bytes"] for span in reads),  # the record is made before a cancelled read has ended
        "shards_read": len({span["name"] for span in reads if span["thread"] == "reader" and span["bytes"]}),
        "row_bytes": row_bytes,
        **allowed(plan["stages"], stage, record["num_slots"], row_bytes, exit_bytes),
    }


def allowed(
    stages: list[dict[str, Any]], stage: int, num_slots: int, row_bytes: int, exit_bytes: int
) -> dict[str, int]:
    """Of the stages of `plan --json`: embedding, first `stage` layers; with the next `num_slots` shards and heads."""
    needed = [shard["bytes"] for each in stages[: stage + 1] for shard in each["shards"]]
    ahead = [shard["bytes"] for each in stages[stage + 1 :] for shard in each["shards"]][:num_slots]
    heads = exit_bytes + stages[-1]["bytes"]
    return {"needed_bytes": sum(needed) + row_bytes, "allowed_bytes": sum(needed) + sum(ahead) + heads + row_bytes}


def verified(folders: Folders) -> None:
    """Every shard and block hashed once, so that hashing is not counted as reading."""
    for options in ((), ("--exit", "stage:1")):
        command = offramp("run", folders.out / "store-exits", "--budget", ENOUGH, *LOOK, "--text", words(140), *options)
        run(command, folders.environment)


# divide ---------------------------------------------------------------------------------------------------------------


def divide(folders: Folders) -> list[Trial]:
    return [
        Trial(name, {}, lambda m=model: _divide(folders, folders.models / m))
        for name, model in {"safetensors": "bert-base", "pytorch_model.bin": "bert-base-bin"}.items()
    ]


def _divide(folders: Folders, model: Path) -> Result:
    target = folders.out / "divided"
    folders.warm(model)
    shutil.rmtree(target, ignore_errors=True)
    done = run(offramp("divide", model, target), folders.environment)
    shutil.rmtree(target, ignore_errors=True)
    reason = failure(done)
    return {"failed": reason} if reason else {"seconds": done.seconds, "peak_rss_bytes": done.peak_rss_bytes}


SECTIONS = (
    Section("latency", latency, prepare=warm_all),
    Section("start", start, prepare=warm_start),
    Section("cgroup", cgroup, missing=jail.missing, prepare=warm_all),
    Section("throttle", throttle, missing=lambda out: jail.missing(out, disk=True), prepare=warm_all),
    Section("exact", exact, rounds=1),
    Section("exits", exits, rounds=1, prepare=verified),
    Section("divide", divide),
)

"""What exits of a store are worth: accuracy at each, the rule that leaves earliest of those that keep a limit, and what
that rule costs and gains on other rows.

The limit: the 95 % interval of the loss on tune and certify ends at half a point (the best of a hundred on one split is
not as good on the next). Latency is measured by `offramp run`, one input at a time, interleaved with the whole model.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from processes import offramp, run

ROUNDS = 5


def finish(command: list[str], threads: int) -> list[dict[str, Any]]:
    """The JSON lines that a command prints."""
    done = run(command, {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(done.errors)
    return [json.loads(line) for _, line in done.lines if line.startswith("{")]


def measure(store: Path, splits: Any, inputs: Path, num_inputs: int, threads: int) -> dict[str, Any]:
    """Of a store that was divided from a run folder; so many `inputs` are of dev, for the latency."""
    from offramp.experiments.choosing import ALLOWED_LOSS, candidates, try_policies
    from offramp.experiments.evaluation import EvalSettings, answer_at, evaluate
    from offramp.policies import parse, replay
    from offramp.store.transcript import read_transcript
    from offramp.tasks.metrics import answers, paired_interval, score_exits

    transcripts = store.with_name(store.name + "-transcripts")
    names = ("tune", "certify", "dev")
    if not transcripts.exists():
        evaluate(store, splits, names, EvalSettings(transcript=transcripts, batch_size=100), log=print)
    said, found = {}, {}
    for split in names:
        transcript = read_transcript(transcripts, split)
        logits_KNC = np.asarray(transcript.logits_NKC).swapaxes(0, 1)
        said[split] = logits_KNC, np.asarray(transcript.labels_N)
        scores = [each["accuracy"] for each in score_exits(splits.metrics, said[split][1], logits_KNC)]
        found[split] = {"rows": len(said[split][1]), "accuracy": scores}
        problem = transcript.about.problem
    both_KNC = np.concatenate([said["tune"][0], said["certify"][0]], axis=1)
    both_N = np.concatenate([said["tune"][1], said["certify"][1]])
    tried = try_policies(candidates(len(both_KNC), problem), both_KNC, both_N, splits.metrics, problem)

    def gain_of(rule: str, logits_KNC: Any, truth_N: Any) -> tuple[Any, tuple[float, float, float]]:
        exit_N = replay(parse(rule), logits_KNC, problem)
        early_N = answer_at(logits_KNC, exit_N)
        return exit_N, paired_interval(splits.metrics, truth_N, early_N, answers(logits_KNC[-1]))

    earliest = sorted((each for each in tried if each.loss <= ALLOWED_LOSS), key=lambda each: each.mean_exit)
    rules = (each.policy for each in earliest if gain_of(each.policy, both_KNC, both_N)[1][1] >= -ALLOWED_LOSS)
    rule = next(rules)  # confidence 0.995 loses next to nothing
    exit_N, (gain, low, high) = gain_of(rule, *said["dev"])
    found["dev"] |= {"gain": gain, "gain_low": low, "gain_high": high, "mean_exit": float(exit_N.mean())}
    rounds = latency(store, inputs, rule, threads)
    return {
        "exits": len(both_KNC), **found, "rule": rule,
        "latency": {"inputs": num_inputs, "threads": threads, "rounds": rounds},
    }  # fmt: skip


def latency(store: Path, path: Path, rule: str, threads: int) -> list[dict[str, Any]]:
    """Seconds an input, whole and with the rule, on both backends; rounds in which all are interleaved."""
    rounds = []
    for number in range(ROUNDS):
        ways = [(backend, exit) for backend in ("ort", "torch") for exit in ("none", rule)]
        found: dict[str, Any] = {}
        for backend, exit in ways[number % len(ways) :] + ways[: number % len(ways)]:
            words = ("--input", path, "--json", "--threads", threads, "--backend", backend, "--exit", exit)
            *results, last = finish(offramp("run", store, *words), threads)
            record = last["record"]
            found[f"{backend} {'whole' if exit == 'none' else 'exits'}"] = {
                "seconds": record["latency_seconds_median"],
                "mean_seconds": record["seconds_total"] / record["num_inputs"],
                "peak_rss_bytes": record["peak_rss_bytes"],
                "mean_exit": float(np.mean([result["exit_stage"] for result in results])),
                "bytes_read": record["bytes_read_total"],
            }
        rounds.append(found)
    return rounds

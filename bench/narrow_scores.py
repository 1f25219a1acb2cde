"""Scores of narrow stores against the fp32 ones, from transcripts of the same rows.

`offramp eval STORE --task mrpc --data GLUE --split dev --transcript WIDE/mrpc` writes the transcript of an fp32 store,
and `NARROW/mrpc` that of a narrow one. `python bench/narrow_scores.py WIDE NARROW` compares all tasks that both have.
For each policy and task: the scores, their paired difference (95 % bootstrap interval over rows), and the shares of
rows with the same answer and at the same exit. Then for each policy the mean over tasks, the number of tasks that are
significantly below (Holm over tasks), and the share of rows of all tasks that leave at the same exit.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from offramp.measure.statistics import Comparison, holm, judged
from offramp.policies import parse, replay
from offramp.store.transcript import Transcript, read_transcript
from offramp.tasks.metrics import answers, resampled_scores, score

POLICIES = ("none", "patience:1", "patience:2", "patience:3", "confidence:0.8", "confidence:0.9", "entropy:0.3")
NUM_DRAWS = 1000
SIGNIFICANT = 0.05


class Pair(NamedTuple):
    """One policy on both transcripts of a split of a task."""

    name: str
    policy: str
    metrics: tuple[str, ...]
    truth_N: np.ndarray
    answer_2N: np.ndarray
    exit_2N: np.ndarray

    @property
    def scores(self) -> list[float]:
        """Score of each side."""
        return [score(self.metrics, self.truth_N, answer_N)["score"] for answer_N in self.answer_2N]

    def gains(self) -> np.ndarray:
        """Points that the narrow side scores more, in each resample of the rows [D]."""
        wide_D, narrow_D = (resampled_scores(self.metrics, self.truth_N, each, NUM_DRAWS) for each in self.answer_2N)
        return narrow_D - wide_D

    @property
    def shares(self) -> list[float]:
        """Percent of rows with the same answer, and at the same exit."""
        return [100 * float(np.mean(one == other)) for one, other in (self.answer_2N, self.exit_2N)]


def paired(name: str, policy: str, sides: Sequence[Transcript]) -> Pair:
    """What a policy does on both sides, which are of the same rows."""
    exits, found, about = [], [], sides[0].about
    assert about.data_sha256 == sides[1].about.data_sha256, f"{name}: transcripts of other rows"
    for each in sides:
        logits_KNC = each.logits_NKC.swapaxes(0, 1)
        exits.append(replay(parse(policy), logits_KNC, about.problem))
        found.append(answers(logits_KNC[exits[-1] - 1, np.arange(logits_KNC.shape[1])]))
    return Pair(name, policy, about.metrics, sides[0].labels_N, np.stack(found), np.stack(exits))


def show(pairs: Sequence[Pair]) -> str:
    """Print a row of each task, and return that of their mean."""
    gains, p_values = [pair.gains() for pair in pairs], []
    for pair, gains_D in zip(pairs, gains, strict=True):
        wide, narrow = pair.scores
        gain = judged(narrow - wide, gains_D, len(pair.truth_N), 0.0)
        same = " | ".join(f"{share:.1f} %" for share in pair.shares)
        about = f"{pair.policy} | {pair.name} | {len(pair.truth_N)} | {wide:.2f} | {narrow:.2f}"
        print(f"| {about} | {with_interval(gain)} | {same} |")
        p_values.append(1.0 if gain.p is None or gain.value > 0 else gain.p)
    sizes = [len(pair.truth_N) for pair in pairs]
    value = float(np.mean([narrow - wide for wide, narrow in (pair.scores for pair in pairs)]))
    gain = judged(value, np.mean(gains, axis=0), min(sizes), 0.0)
    below = sum(p <= SIGNIFICANT for p in holm(p_values))
    same = [np.average(shares, weights=sizes) for shares in zip(*(pair.shares for pair in pairs), strict=True)]
    return (
        f"| {pairs[0].policy} | {with_interval(gain)} | {below} of {len(pairs)} | {same[0]:.1f} % | {same[1]:.1f} % |"
    )


def with_interval(gain: Comparison) -> str:
    """A difference in points, with its interval if there is one."""
    return f"{gain.value:+.2f}" + ("" if gain.low is None else f" [{gain.low:+.2f}, {gain.high:+.2f}]")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wide", type=Path)
    parser.add_argument("narrow", type=Path)
    parser.add_argument("--split", action="append", help="(default: dev and dev_mismatched)")
    args = parser.parse_args()
    found = {}
    for path in sorted(args.wide.glob("*/*.json")):
        task, split = path.parent.name, path.stem
        if split in (args.split or ("dev", "dev_mismatched")) and (args.narrow / task / path.name).is_file():
            name = task if split == "dev" else f"{task}, {split}"
            found[name] = [read_transcript(side / task, split) for side in (args.wide, args.narrow)]
    if not found:
        parser.error("no task has transcripts in both folders")
    print(
        "| policy | task | rows | fp32 | narrow | narrow - fp32 [95 %] | same answer | same exit |\n" + 8 * "|---" + "|"
    )
    rows = [show([paired(name, policy, sides) for name, sides in found.items()]) for policy in POLICIES]
    print("\n| policy | mean over tasks [95 %] | significantly below | same answer | same exit |\n" + 5 * "|---" + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()

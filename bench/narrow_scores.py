"""Scores of narrow stores against the fp32 ones, from transcripts of the same rows.

`offramp eval STORE --task mrpc --data GLUE --split dev --transcript WIDE/mrpc` writes the transcript of an fp32 store,
and `NARROW/mrpc` that of a narrow one. `python bench/narrow_scores.py WIDE NARROW` compares all tasks that both have.
For each policy and task: the scores, their paired difference (95 % bootstrap interval over rows), and the shares of
rows with the same answer and at the same exit. Then for each policy the mean over tasks, the number of tasks that are
significantly below (Holm over tasks), and the share of rows of all tasks that leave at the same exit.
"""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from offramp.measure.statistics import compared, holm
from offramp.policies import parse, replay
from offramp.store.transcript import Transcript, read_transcript
from offramp.tasks.metrics import answers, score

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

    def scores(self, draw: np.ndarray) -> list[float]:
        """Score of each side on a draw of rows."""
        return [score(self.metrics, self.truth_N[draw], answer_N[draw])["score"] for answer_N in self.answer_2N]

    def gain(self, draw: np.ndarray) -> float:
        """Points that the narrow side scores more."""
        wide, narrow = self.scores(draw)
        return narrow - wide

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


def show_tasks(pairs: Sequence[Pair]) -> list[float]:
    """Print a row for each task, and return the p-values of those that score less, 1 for the others."""
    found = []
    for pair in pairs:
        gain = compared(pair.gain, [len(pair.truth_N)], len(pair.truth_N), 0.0, NUM_DRAWS)
        wide, narrow = pair.scores(np.arange(len(pair.truth_N)))
        same = " | ".join(f"{share:.1f} %" for share in pair.shares)
        interval = f"{gain.value:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]"
        print(
            f"| {pair.policy} | {pair.name} | {len(pair.truth_N)} | {wide:.2f} | {narrow:.2f} | {interval} | {same} |"
        )
        found.append(1.0 if gain.p is None or gain.value > 0 else gain.p)
    return found


def summary(pairs: Sequence[Pair], p_values: Sequence[float]) -> str:
    """A row of the mean over tasks, whose rows are drawn for each task by itself."""
    mean = lambda *draws: float(np.mean([pair.gain(draw) for pair, draw in zip(pairs, draws, strict=True)]))  # noqa: E731
    sizes = [len(pair.truth_N) for pair in pairs]
    gain = compared(mean, sizes, min(sizes), 0.0, NUM_DRAWS)
    below = sum(p <= SIGNIFICANT for p in holm(p_values))
    same = [np.average(shares, weights=sizes) for shares in zip(*(pair.shares for pair in pairs), strict=True)]
    interval = f"{gain.value:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]"
    return f"| {pairs[0].policy} | {interval} | {below} of {len(pairs)} | {same[0]:.1f} % | {same[1]:.1f} % |"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wide", type=Path)
    parser.add_argument("narrow", type=Path)
    parser.add_argument("--split", action="append", help="(default: dev and dev_mismatched)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # a resample may contain a single label
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
    rows = []
    for policy in POLICIES:
        pairs = [paired(name, policy, sides) for name, sides in found.items()]
        rows.append(summary(pairs, show_tasks(pairs)))
    print("\n| policy | mean over tasks [95 %] | significantly below | same answer | same exit |\n" + 5 * "|---" + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()

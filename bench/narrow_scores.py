"""Scores of a narrow store against the fp32 one, from transcripts of the same rows.

`offramp eval STORE --task mrpc --data GLUE --split dev --transcript DIR` writes a transcript of each store, then
`python bench/narrow_scores.py FP32_DIR INT8_DIR` compares them: the score of the last exit and of each policy, paired
(95 % bootstrap interval over rows), and the share of rows that leave at the same exit.
"""

import argparse
from pathlib import Path

import numpy as np

from offramp.policies import parse, replay
from offramp.store.transcript import read_transcript
from offramp.tasks.metrics import answers, paired_interval, score

POLICIES = ("none", "patience:1", "patience:2", "patience:3", "confidence:0.8", "confidence:0.9", "entropy:0.3")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wide", type=Path)
    parser.add_argument("narrow", type=Path)
    parser.add_argument("--split", default="dev")
    args = parser.parse_args()
    wide, narrow = (read_transcript(folder, args.split) for folder in (args.wide, args.narrow))
    assert wide.about.data_sha256 == narrow.about.data_sha256, "transcripts of other rows"
    print(f"{wide.about.task}, {args.split}: {len(wide.labels_N)} rows; {', '.join(wide.about.metrics)}, in percent")
    print("| policy | fp32 | narrow | narrow - fp32 [95 %] | same answer | same exit |\n|---|---|---|---|---|---|")
    for text in POLICIES:
        policy, sides = parse(text), []
        for each in (wide, narrow):
            logits_KNC = each.logits_NKC.swapaxes(0, 1)
            exits_N = replay(policy, logits_KNC, each.about.problem)
            sides.append((exits_N, answers(logits_KNC[exits_N - 1, np.arange(logits_KNC.shape[1])])))
        (exits_N, answer_N), (narrow_exits_N, narrow_N) = sides
        known = wide.about.metrics, wide.labels_N
        scores = [score(*known, found_N)["score"] for found_N in (answer_N, narrow_N)]
        gain = paired_interval(*known, narrow_N, answer_N)
        interval = f"{gain.value:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]"
        same = [100 * np.mean(one == other) for one, other in ((answer_N, narrow_N), (exits_N, narrow_exits_N))]
        print(f"| {text} | {scores[0]:.2f} | {scores[1]:.2f} | {interval} | {same[0]:.1f} % | {same[1]:.1f} % |")


if __name__ == "__main__":
    main()

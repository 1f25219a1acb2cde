"""Does the engine leave where the transcript says? `python bench/glue_agree.py --data GLUE --out glue-out --task sst2`.

For a run of glue.py: what every exit says of dev, kept by `offramp eval --transcript`, is replayed for each policy, and
the store is run over the same sentences under a budget. Prints, for each policy, how many of them left elsewhere, and
adds it to docs/results/glue-agree.jsonl.
"""

import argparse
import json
import sys
from pathlib import Path

import glue
from processes import offramp, run
from records import add_record

from offramp.policies import parse, replay
from offramp.store.transcript import read_transcript
from offramp.tasks.glue import task_of

RESULTS = glue.RESULTS.with_name("glue-agree.jsonl")
BUDGET, MAX_LENGTH = "96MiB", 128
FOR_LABELS = ("confidence:0.9", "entropy:0.6")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("glue-out"))
    parser.add_argument("--task", required=True)
    args = parser.parse_args()
    name, transcripts = glue.Run(args.task, "pabee").name, args.out / "transcripts" / args.task
    split = task_of(args.task).dev_splits[0]
    if not (transcripts / f"{split}.json").exists():
        words = ("--task", args.task, "--data", args.data, "--transcript", transcripts, "--max-length", MAX_LENGTH)
        finish(offramp("eval", args.out / name, *words))
    if not (args.out / "stores" / name).exists():
        finish(offramp("divide", args.out / name, args.out / "stores" / name))
    transcript = read_transcript(transcripts, split)
    texts = args.out / f"{args.task}-dev.jsonl"
    texts.write_text("".join(json.dumps(line) + "\n" for line in inputs(args.task, args.data, split)))
    num_exits = transcript.logits_NKC.shape[1]
    suffix = "" if transcript.about.labels else "@0.5"
    policies = [*(f"patience:{patience}{suffix}" for patience in range(1, num_exits)), "patience:inf"]
    for policy in (*policies, *(FOR_LABELS if transcript.about.labels else ())):
        options = ("--input", texts, "--exit", policy, "--json", "--max-length", MAX_LENGTH, "--budget", BUDGET)
        *results, _ = finish(offramp("run", args.out / "stores" / name, *options))
        wanted_N = replay(parse(policy), transcript.logits_NKC.swapaxes(0, 1), transcript.about.problem)
        elsewhere = sum(int(result["exit_stage"] != wanted) for result, wanted in zip(results, wanted_N, strict=True))
        record = {"task": args.task, "policy": policy, "rows": len(results), "left_elsewhere": elsewhere}
        add_record(RESULTS, record)
        print(json.dumps(record), flush=True)


def inputs(task: str, data: Path, split: str) -> list[dict[str, str]]:
    splits, _, _ = glue.load(task, data)
    texts = [text for text, _ in splits.examples[split]]
    return [{"text": text} if isinstance(text, str) else {"text": text[0], "pair": text[1]} for text in texts]


def finish(command: list[str]) -> list[dict]:
    done = run(command, {})
    if done.returncode:
        sys.exit(done.errors)
    return [json.loads(line) for _, line in done.lines if line.startswith("{")]


if __name__ == "__main__":
    main()

"""Budgets that are kept and named: `python bench/budget_matrix.py --out OUT --records FILE [--sample N]`.

60 settings (stores, backends, batches, lengths, exits) run under five budgets each, from the least that a refusal names
to one that keeps all weights in memory. Each run is a process of `offramp run`, and one line of the records; what is
there is not run again. Prints the figures; ends with 1 if a target was missed. Peaks are those of the whole process.
"""

import argparse
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from folders import WORDS, words
from processes import Finished, offramp, run
from records import add_record, read_records

MIB = 1 << 20
STORES = {"wide": (768, 4, "names"), "deep": (384, 12, "names"), "captured": (384, 6, "export")}
"""Name -> hidden size, layers, and the method of division."""
BACKENDS, EXITS = ("ort", "torch"), ("none", "patience:1")
LOADS = ((1, 16), (1, 128), (1, 512), (8, 128), ("bulk", 128))
"""Batch, and tokens of the longest text."""
SETTINGS = [
    {"store": store, "backend": backend, "batch": batch, "tokens": tokens, "exit": exit}
    for store, backend, (batch, tokens), exit in itertools.product(STORES, BACKENDS, LOADS, EXITS)
]
NUM_BUDGETS, NUM_TEXTS, PLENTY_MIB = 5, 24, 4096
MOST_NAMED = 3
"""Most refusals of budgets that a refusal has named, after which a setting is given up."""
TOLERANCE_BYTES = 4 * MIB
"""Most by which a predicted peak may be above the peak."""
_NAMED = re.compile(r"--budget (\d+)MiB")


def build(out: Path) -> None:
    """Make the stores that are not there yet: random weights, an exit after each layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    from offramp import divide
    from offramp.checkpoints.exits import points_of
    from offramp.program.heads import DEFAULT_FORM
    from offramp.store.exits import describe_exits

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *(f"filler{index}" for index in range(8000))]
    for name, (width, layers, method) in STORES.items():
        folder = out / f"{name}-model"
        if (out / name).exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        shape: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
        config = BertConfig(vocab_size=len(vocabulary), intermediate_size=4 * width, **shape)
        model = BertForSequenceClassification(config).eval()
        model.save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
        BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
        heads = {f"exit.{k}.weight": torch.randn(2, width) for k in range(1, layers)}
        save_file(
            {**heads, **{f"exit.{k}.bias": torch.zeros(2) for k in range(1, layers)}}, folder / "exits.safetensors"
        )
        ids = torch.full((2, 8), 5)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        points = points_of(model, inputs, of_texts=True) if method == "export" else []
        calls = [(call.module, call.number, size) for call, size in points]
        (folder / "exits.json").write_bytes(describe_exits(DEFAULT_FORM, layers, calls))
        divide(folder, out / name, method=method)


class Matrix:
    """Runs of one setting, recorded one by one."""

    def __init__(self, out: Path, records: Path, setting: dict[str, Any]) -> None:
        self._out, self._path, self._setting = out, records, setting
        texts = [words(setting["tokens"] - 2 - index % 3, index) for index in range(NUM_TEXTS)]
        self._input = out / f"texts-{setting['tokens']}.txt"
        self._input.write_text("".join(f"{text}\n" for text in texts))

    def run_all(self) -> None:
        """Run under the budgets from the least that is named to one that keeps all weights in memory."""
        resident = self._run("resident", PLENTY_MIB)
        if resident["code"]:
            return
        named = self._run("refused", 1)["named_mib"]
        for number in range(MOST_NAMED):
            if named is None:
                return
            least = self._run(f"named {number}", named)
            if not least["code"]:
                break
            named = least["named_mib"]
        else:
            return
        most = -(-resident["predicted_bytes"] // MIB)
        for step in range(1, NUM_BUDGETS):
            self._run(f"step {step}", named + (max(most, named) - named) * step // (NUM_BUDGETS - 1))

    def _run(self, kind: str, budget_mib: int) -> dict[str, Any]:
        """Return the record of one run, which may be there already."""
        key = {**self._setting, "kind": kind}
        for record in read_records(self._path):
            if key.items() <= record.items():
                return record
        options = [("--backend", key["backend"]), ("--batch", key["batch"]), ("--exit", key["exit"]), ("--threads", 1)]
        options.append(("--budget", f"{budget_mib}MiB"))
        command = offramp("run", self._out / key["store"], "--input", self._input, "--json", *itertools.chain(*options))
        record = {**key, "budget_mib": budget_mib, **found_in(run(command, {"OMP_NUM_THREADS": "1"}))}
        add_record(self._path, record)
        print(json.dumps(record), file=sys.stderr, flush=True)
        return record


def found_in(done: Finished) -> dict[str, Any]:
    """Return what one process has shown."""
    last = (done.errors.strip().splitlines() or [""])[-1]
    named = _NAMED.search(last)
    own = json.loads(done.lines[-1][1])["record"] if done.returncode == 0 else {}
    return {
        "code": done.returncode,
        "peak_bytes": done.peak_rss_bytes,
        "predicted_bytes": own.get("predicted_peak_bytes"),
        "named_mib": None if named is None else int(named[1]),
        "error": last if done.returncode else None,
    }


def figures(records: list[dict[str, Any]]) -> Iterator[tuple[str, int, int]]:
    """Yield (what, number, target) of each figure. Bulk mode plans for more texts than there are here."""
    ran = [record for record in records if record["code"] == 0]
    margins = [record["predicted_bytes"] - record["peak_bytes"] for record in ran]
    print(f"{len(ran)} runs, predicted - peak: {min(margins) / MIB:.1f} .. {max(margins) / MIB:.1f} MiB")
    yield "runs above their budget", sum(each["peak_bytes"] > each["budget_mib"] * MIB for each in ran), 0
    yield "runs above their prediction", sum(margin < 0 for margin in margins), 0
    measured = [margin for each, margin in zip(ran, margins, strict=True) if each["batch"] != "bulk"]
    yield "predictions too high by more than 4 MiB", sum(margin > TOLERANCE_BYTES for margin in measured), 0
    again = [each for each in records if each["kind"].startswith("named") and each["code"]]
    yield "named budgets that were refused again", len(again), 0
    yield "other failures", sum(each["code"] not in (0, 3) for each in records), 0


def main() -> None:
    """Run the matrix, or build its stores in a process of its own: a child's peak is never below its parent's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for stores and texts")
    parser.add_argument("--records", type=Path, help="file of the results, one JSON line a run")
    parser.add_argument("--sample", type=int, default=len(SETTINGS), help="number of settings (default: all)")
    args = parser.parse_args()
    if args.records is None:
        build(args.out)
        return
    subprocess.run(
        [sys.executable, __file__, "--out", str(args.out)], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    for setting in random.Random(0).sample(SETTINGS, min(args.sample, len(SETTINGS))):
        Matrix(args.out, args.records, setting).run_all()
    missed = 0
    for what, number, target in figures(read_records(args.records)):
        print(f"{what}: {number} (target {target})")
        missed += number > target
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()

"""Time to the first label, of offramp and of a script with transformers: `python bench/start.py --out OUT`.

OUT is that of rivals_page.py, or the model and its store are made there. One text of 128 tokens; all files are in the
page cache, and the first start of each does not count. The time is that of the parent, from the start of a process to
its first line. Prints medians and ranges.
"""

import argparse
import sys
from pathlib import Path

from folders import THREADS, TOKENS, Folders, read_back, words
from processes import failure, offramp, run
from shapes import build

from offramp.cli.options import table
from offramp.measure import median

SCRIPT = """import sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, text, threads, tokens = sys.argv[1:]
torch.set_num_threads(int(threads))
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
batch = tokenizer(text, truncation=True, max_length=int(tokens), return_tensors="pt")
with torch.inference_mode():
    print(model.config.id2label[int(model(**batch).logits.argmax())], flush=True)"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folders = Folders(args.out.resolve())
    model, text, options = folders.models / "bert-base", words(140), ("--threads", THREADS, "--max-length", TOKENS)
    build(folders.models, model.name)
    commands = {"offramp 128MiB": offramp("run", folders.store, "--budget", "128MiB", *options, "--text", text)}
    commands["transformers"] = [sys.executable, "-c", SCRIPT, str(model), text, str(THREADS), str(TOKENS)]
    if not folders.store.exists():
        run(offramp("divide", model, folders.store), folders.environment)
    read_back(model, folders.store)
    found: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(args.rounds + 1):
        for name, command in commands.items():
            done = run(command, folders.environment)
            if reason := failure(done):
                raise SystemExit(f"{name}: {reason}")
            found[name] += [done.lines[0][0]] if number else []
    rows = [(name, *(f"{each(values):.2f} s" for each in (median, min, max))) for name, values in found.items()]
    print(table(("first label", "median", "smallest", "largest"), rows))


if __name__ == "__main__":
    main()

"""Compare offramp with its rivals and write docs/results/rivals.md: `python bench/rivals_page.py --out bench-out`.

It makes what the command needs: a model of BERT-base's shape with random weights, its stores, and an environment for
each rival. `offramp bench --against` measures. Records are in OUT/rivals.jsonl; what is there is not measured again, so
a run that was killed goes on where it was: name another OUT after a change of code.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

from commits import ROOT, git
from folders import THREADS, Folders
from processes import offramp
from shapes import build

PAGE = ROOT / "docs" / "results" / "rivals.md"
BUDGETS = "resident,192MiB,128MiB,96MiB,80MiB"
TORCH = ("torch==2.13.0", "transformers", "accelerate")
PACKAGES = {
    "transformers": None,
    "transformers-bf16": None,
    "disk": None,
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-int8": ("onnxruntime",),
    "ctranslate2": ("ctranslate2", *TORCH),
    "openvino": ("openvino",),
    "llama.cpp": ("xllamacpp", "gguf"),
    "memopro": ("memopro", *TORCH),
}
"""Rival -> what is installed into its environment; None: it runs in this one."""
INTRO = """\
# Rivals

The same classifier of BERT-base's shape (12 layers, hidden size 768, vocabulary 30,522), run by offramp and by other
runtimes. **The weights are random**: times, bytes and memory do not depend on their values, no accuracy is claimed, and
answers are compared only to make sure that all run the same model. Two cores, batch 1, 128 tokens.

What the rivals are: *transformers*, with all weights in memory in float32 or bfloat16 (`-bf16`); *disk*, transformers
with `device_map={{"": "disk"}}`; *onnxruntime*, the plain export by `torch.onnx`; *onnxruntime-int8*, the same after
`quantize_dynamic`; *ctranslate2*, its converter's encoder in int8, with the head in NumPy; *openvino*, the export in
its own format, in the precision that it chooses; *llama.cpp*, Q8_0 through the embeddings of `xllamacpp`, without
pooler and classifier; *memopro*, its `stream_model` with a budget of 192 MiB, which does not include the process. Each
is installed from its published packages and used as documented.

- made by: `make rivals`, commit {commit}
"""


def main() -> int:
    """Build what is missing, measure, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="models, stores, environments and records; 9 GB")
    parser.add_argument("--rounds", default="6", help="processes of each run (default: %(default)s)")
    parser.add_argument("--against", help="rivals and their interpreters (default: all, installed under OUT)")
    parser.add_argument(
        "--group", default="128MiB", help="limit of the memory cgroup; root only (default: %(default)s)"
    )
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    folders = Folders(args.out.resolve())
    folders.models.mkdir(parents=True, exist_ok=True)
    against = args.against or ",".join(installed(folders.out / "venvs"))
    build(folders.models, "bert-base")
    model, found = folders.models / "bert-base", folders.out / "rivals.md"
    words = ["bench", folders.store, "--model", model, *stores(folders, model), "--threads", THREADS]
    words += ["--repeat", args.rounds, "--against", against, "--group", args.group]
    run(offramp(*words, "--records", folders.out / "rivals.jsonl", "--markdown", found), folders)
    facts = (
        found.read_text().partition("\n\n")[2].replace(f"{folders.out}/", "").replace(f" --markdown {found.name}", "")
    )
    args.page.write_text(INTRO.format(commit=git("rev-parse", "--short=12", "HEAD")) + facts)
    print(f"page: {args.page}", file=sys.stderr)
    return 0


def stores(folders: Folders, model: Path) -> list[str]:
    """Divide the model where it is not divided yet; return the options for the budgets and the other store."""
    narrow = folders.out / "store-int8"
    if not folders.store.exists():
        run(offramp("divide", model, folders.store), folders)
    if not narrow.exists():
        run(offramp("divide", model, narrow, "--dtype", "int8"), folders)
    return ["--budget", BUDGETS, "--also", str(narrow)]


def installed(place: Path) -> list[str]:
    """Make an environment for each set of packages, and return the rivals with their interpreters."""
    found = []
    for name, packages in PACKAGES.items():
        if packages is None:
            found.append(name)
            continue
        folder = place / name.removesuffix("-int8")
        python, done = folder / "bin" / "python", folder / "installed"
        if not done.exists():
            print(f"installing {', '.join(packages)}", file=sys.stderr, flush=True)
            venv.create(folder, with_pip=True, clear=True)
            quiet = ("--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt"))
            subprocess.run((python, "-m", "pip", "install", *quiet, *packages), check=True)
            done.touch()
        found.append(f"{name}={python}")
    return found


def run(command: list[str], folders: Folders) -> None:
    """Run a command to its end; its progress is shown."""
    import os

    done = subprocess.run(command, env={**os.environ, **folders.environment}, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    sys.exit(main())

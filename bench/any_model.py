"""Does offramp divide any model, and what does it cost? `python bench/any_model.py --out any-model-out`.

Over the zoo of bench/zoo.py, each model in a process of its own: divided, streamed under two budgets of weights and
compared bit for bit (`zoo`); the same with accelerate's offloading (`accelerate`); stages as graphs (`export`, `onnx`).
Then three ways to divide one checkpoint against one another (`agreement`), the cost of dividing models of the shapes of
BERT-base and ViT-base (`cost`), and of streaming them (`latency`; it wants a quiet machine). Each measurement is one
line of docs/results/any-model.jsonl; what is there is not done again. `--families torchvision,timm` is for an
environment that has them. any_model_report.py writes the page.

`--kinds zoo --sample 60 --records FILE` tries models spread evenly over the zoo, keeps their lines in FILE, and prints
how many are bit-identical and what dividing them costs. Exit code 1 if one is not.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from processes import Finished, failure, json_result, offramp, run
from records import add_record, read_records

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "any-model.jsonl"
RECORDS_VARIABLE = "ANY_MODEL_RECORDS"
"""Environment variable that names another file of records, for the processes of the zoo."""
ZOO, RIVALS = (Path(__file__).with_name(f"any_model_{name}.py") for name in ("zoo", "rivals"))
ZOO_KINDS = ("zoo", "accelerate", "export", "onnx", "agreement")
KINDS = (*ZOO_KINDS, "cost", "latency")
SHAPES = {"bert-base": ("eager", "names"), "vit-base": ("eager",)}
"""Model folders, and the methods that each is divided with."""
COST_ROUNDS, ROUNDS, PASSES, THREADS = 3, 3, 12, 2
SETTINGS = ((1, 2), (4, 2), (1, 1))
"""Rows of a pass and threads, for latency. With a thread for each core, whoever copies weights is in their way."""
LATENCY_RIVALS = ("resident", "streamed", "disk")
LIBRARIES = ("accelerate", "numpy", "offramp", "onnx", "onnxruntime", "onnxscript", "timm", "torch", "torchvision")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("any-model-out"))
    parser.add_argument("--kinds", default=",".join(KINDS), help="these alone (default: all)")
    parser.add_argument("--families", default="transformers", help="of the zoo: transformers,torchvision,timm")
    parser.add_argument("--names", default="", help="these models of the zoo alone")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of latency (default: %(default)s)")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="N models, spread evenly over the zoo")
    parser.add_argument("--records", type=Path, help="file of the lines (default: docs/results/any-model.jsonl)")
    args = parser.parse_args()
    kinds, out = args.kinds.split(","), args.out.resolve()
    if args.records:
        os.environ[RECORDS_VARIABLE] = str(args.records.resolve())
    if unknown := sorted(set(kinds) - set(KINDS)):
        parser.error(f"a kind is one of {', '.join(KINDS)}, not {unknown[0]}")
    out.mkdir(parents=True, exist_ok=True)
    note_environment(out)
    quiet = {"OFFRAMP_CACHE": str(out / "cache"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    os.environ.update({**quiet, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"})
    for kind in kinds:
        if kind in ZOO_KINDS:
            words = (kind, "--out", out, "--families", args.families, "--names", args.names)
            words = (*words, "--sample", args.sample)
            command = [sys.executable, ZOO, *map(str, words)]
            subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    if "cost" in kinds:
        cost(out)
    if "latency" in kinds:
        latency(out, args.rounds)
    if args.records and "zoo" in kinds:
        sys.exit(summary())


def records_path() -> Path:
    """Return the file of records."""
    return Path(os.environ.get(RECORDS_VARIABLE, RESULTS))


def summary() -> int:
    """Print how many models of the zoo are bit-identical, and the cost of dividing. Returns 1 if one is not, else 0."""
    records = [record for record in read_records(records_path()) if record["kind"] == "zoo"]
    runs = {record["name"]: [record.get(run, {}) for run in ("smallest", "twice")] for record in records}
    wrong = sorted(
        name for name, both in runs.items() if not all(run.get("equal") and all(run["equal"]) for run in both)
    )
    seconds = sorted(record["divide_seconds"] for record in records if "divide_seconds" in record)
    print(f"{len(runs)} models, {len(runs) - len(wrong)} bit-identical{': not ' if wrong else ''}{', '.join(wrong)}")
    if seconds:
        print(f"dividing: {sum(seconds):.1f} s in all, median {seconds[len(seconds) // 2]:.3f} s")
    return int(bool(wrong) or not runs)


def note_environment(out: Path) -> None:
    """What the lines that follow were measured with, where it is not what those before were."""
    from importlib import metadata

    from offramp import __version__
    from offramp.measure.hardware import environment

    facts = environment(out)
    installed = {each.metadata["Name"].lower() for each in metadata.distributions()}
    versions = {name: metadata.version(name) for name in (*LIBRARIES, "transformers") if name in installed}
    versions = {**versions, "python": facts["python_version"], "offramp": __version__}
    hardware = {key: facts[key] for key in ("cpu_model", "num_cores", "total_memory_bytes", "platform")}
    record = {"kind": "environment", "versions": dict(sorted(versions.items())), **hardware}
    noted = [each for each in read_records(records_path()) if each["kind"] == "environment"]
    if record not in noted[-1:]:
        keep(record)


def keep(record: dict[str, Any]) -> None:
    print(json.dumps(record)[:300], file=sys.stderr, flush=True)
    add_record(records_path(), record)


def finish(command: list[str], threads: int) -> Finished:
    done = run(command, {"OMP_NUM_THREADS": str(threads)})
    if reason := failure(done):
        sys.exit(f"{' '.join(command)}: {reason}\n{done.errors}")
    return done


def rival(*words: object) -> list[str]:
    """A subcommand of any_model_rivals.py."""
    return [sys.executable, str(RIVALS), *map(str, words)]


def build(out: Path) -> Path:
    """The model folders."""
    finish(rival("build", out / "shapes"), 1)
    return out / "shapes"


def cost(out: Path) -> None:
    """Seconds and peak memory of dividing, by every method, as the command line does it."""
    shapes = build(out)
    known = {(r["model"], r["method"], r["round"]) for r in read_records(records_path()) if r["kind"] == "cost"}
    for number in range(COST_ROUNDS):
        for model, methods in SHAPES.items():
            for method in methods:
                if (model, method, number) in known:
                    continue
                store = out / "stores" / f"{model}-{method}"
                words = ("divide", shapes / model, store, "--method", method, "--force")
                done = finish(offramp(*words), THREADS)
                result = {"seconds": done.seconds, "peak_rss_bytes": done.peak_rss_bytes}
                keep({"kind": "cost", "model": model, "method": method, "round": number, "result": result})


def latency(out: Path, rounds: int) -> None:
    """Passes, streamed and not, each rival in its own process, another one first in each round."""
    shapes = build(out)
    keys = ("model", "rival", "rows", "threads", "round")
    known = {tuple(r[key] for key in keys) for r in read_records(records_path()) if r["kind"] == "latency"}

    def measure(words: tuple[object, ...], *about: object) -> None:
        if about not in known:
            _, name, rows, threads, _ = about
            options = () if name == "compare" else ("--threads", threads, "--passes", PASSES, "--rows", rows)
            result = json_result(rival(name, *words, *options), {"OMP_NUM_THREADS": str(threads)})
            keep({"kind": "latency", **dict(zip(keys, about, strict=True)), "result": result})

    for model in SHAPES:
        folder, store = shapes / model, out / "stores" / f"{model}-eager"
        if not store.exists():
            finish(offramp("divide", folder, store, "--method", "eager"), THREADS)
        words = {"streamed": (folder, store), "resident": (folder,), "disk": (folder, out / "offload" / model)}
        measure((folder, store), model, "compare", 1, THREADS, 0)
        for number in range(rounds):
            first = number % len(LATENCY_RIVALS)
            for rows, threads in SETTINGS:
                for name in (*LATENCY_RIVALS[first:], *LATENCY_RIVALS[:first]):
                    measure(words[name], model, name, rows, threads, number)


if __name__ == "__main__":
    main()

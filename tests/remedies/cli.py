"""Remedies of the command line: options that are missing, contradict each other, or have moved."""

import os
import sys

from offramp.experiments.against import INDEX_FILE
from tests.remedies.entries import TEXT, Entry, closed, named_command, options
from tests.remedies.store import spoilt, undo

SAY = f"--text '{TEXT}'"
LABELS = "--text-column sentence --label-column label"
GOAL = "--profile profile.json --force-profile --latency 1s"


def old_python(w):
    w.patch(sys, "version_info", (3, 8, 10, "final", 0))


def without_record(w):
    """A policy file that does not say how it was tuned."""
    w.edit_json("policy.json", lambda tree: {**tree, "tuned_on": {}})


def tune_again(w, said):
    """Run the command that the message names, with what tuning needs."""
    w.run(f"tune tuned --transcript transcripts {GOAL} --out policy.json")


tune_again.says = f"`offramp tune tuned --transcript transcripts {GOAL} --out policy.json`"


def other_text(command, other):
    def act(w, said):
        w.run(other)

    act.says = f"`offramp {other}`"
    return act


def instead(place, command, says, *others, **more):
    """An entry of a command whose remedy names other words: each of the other commands is run."""

    def run_each(w, said):
        for other in others:
            w.run(other)

    run_each.says = " and ".join(f"`offramp {other}`" for other in others)
    return Entry(place, command, says, run_each, again=False, **more)


def replaced(command, option):
    """Run the command with the option that the message names in place of the old one."""

    def act(w, said):
        new = said.rpartition("use ")[2]
        w.run(command.replace(option, new.split()[0]) if new.startswith("--") else new.replace("offramp ", "", 1))

    act.says = "the command with what the message names"
    return act


COPY = "a copy of the store"


def of_another(w):
    """A transcript of the store itself."""
    w.run("eval store --train mine.tsv --split tune --transcript own --max-length 16")


def tune_own(w, said):
    of_another(w)
    w.run("profile store --out made.json --threads 1 --max-length 16")
    w.run("tune store --transcript own --latency 1s --profile made.json --force-profile")


tune_own.says = "`offramp eval --transcript own` of this store, and tuned on it"


BENCH = "bench store --budget 2GiB --repeat 1 --passes 1 --threads 1"
SHORT = f"tune tuned --transcript transcripts {GOAL.replace(' --latency 1s', '')} --out policy.json"
TABLE_OF_TEXTS = "--input in.csv --text-column sentence"


def table(w):
    (w / "in.csv").write_text("sentence\nthe bank fell\na film won\n")


def pipe(w):
    os.mkfifo(w / "out.csv")


def of_regression(w):
    w.run("divide regression scores")


TABLE = [
    options(
        "cli/run.py: no input",
        "run store",
        "give --text, --pair or --input",
        SAY,
        "--pair 'the bank' 'fell'",
        "--input texts.txt",
    ),
    instead(
        "cli/divide.py: blocks of {} would all stay in memory",
        "divide model another --block 4KiB",
        "the smallest block is --block 512KiB",
        "divide model another --block 512KiB",
    ),
    instead(
        "division/build.py: only text encoders that are divided by the names of their tensors are cut",
        "divide plain another --method eager --block 1MiB",
        "divide it without --block",
        "divide plain another --method eager",
    ),
    instead(
        "cli/tune.py: no {}",
        "tune store",
        "offramp tune STORE --transcript DIR --latency 40ms",
        f"tune tuned --transcript transcripts {GOAL}",
    ),
    Entry(
        "cli/tune.py: policy file that does not record",
        spoilt(without_record, "tune --explain policy.json"),
        "make it again: offramp tune",
        tune_again,
    ),
    Entry(
        "cli/verify.py: {} of {} files",
        spoilt(lambda w: (w.store / "exits.json").unlink(), "verify store"),
        "divide the model again",
        "divide model store --force",
    ),
    Entry(
        "cli/__init__.py: offramp {} needs Python 3.10",
        spoilt(old_python, "divide model another"),
        "use a newer Python",
        undo,
        simulates="python",
    ),
    instead(
        "cli/bench.py: policies leave",
        "bench store --budget 2GiB --repeat 1 --passes 1 --exit patience:1",
        "give --input, or --exit none",
        "bench store --budget 2GiB --repeat 1 --passes 1 --exit patience:1 --input texts.txt",
        "bench store --budget 2GiB --repeat 1 --passes 1 --exit none",
        slow=True,
    ),
    options(
        "cli/bench.py: no budget",
        "bench store --repeat 1 --passes 1",
        "give --budget 128MiB",
        "--budget 2GiB",
        "--budget 2GiB,3GiB",
        slow=True,
    ),
    instead(
        "cli/bench.py: each process reads",
        "bench store --budget 2GiB --repeat 1 --input -",
        "give --input a file",
        "bench store --budget 2GiB --repeat 1 --input texts.txt",
        slow=True,
    ),
    instead(
        "cli/bench.py: labelled data and something else",
        f"bench store --dev mine.tsv {LABELS} --text x",
        "give --task or --dev alone",
        f"bench store --dev mine.tsv {LABELS} --rows 3 --repeat 1",
        slow=True,
    ),
    instead(
        "cli/bench.py: --batch and --profile",
        f"bench store --dev mine.tsv {LABELS} --batch 8",
        "a task is measured at 1, 8 and bulk",
        f"bench store --dev mine.tsv {LABELS} --rows 3 --repeat 1",
        slow=True,
    ),
    instead(
        "cli/bench.py: several budgets",
        f"bench store --dev mine.tsv {LABELS} --budget 2GiB,3GiB",
        "a task is measured under one",
        f"bench store --dev mine.tsv {LABELS} --rows 3 --repeat 1 --budget 2GiB",
        slow=True,
    ),
    instead(
        "cli/bench.py: --model, --also, --group",
        f"{BENCH} --model model",
        "give --against transformers, or more rivals",
        f"{BENCH} --model model --against transformers",
        f"{BENCH} --model model --against transformers,transformers-bf16",
        slow=True,
    ),
    instead(
        "cli/bench.py: rivals and labelled data",
        f"{BENCH} --against transformers --dev mine.tsv {LABELS}",
        "give --against without --task, --data, --train and --dev",
        f"{BENCH} --against transformers",
        slow=True,
    ),
    instead(
        "cli/bench.py: rivals have no exits",
        f"{BENCH} --against transformers --exit patience:1",
        "give --against without --exit, --deadline, --profile and --batch",
        f"{BENCH} --against transformers",
        slow=True,
    ),
    instead(
        "experiments/against.py: the rivals need the model",
        spoilt(lambda w: (w.store / INDEX_FILE).unlink(), f"{BENCH} --against transformers"),
        "give --model FOLDER",
        f"{BENCH} --against transformers --model model",
        slow=True,
    ),
    instead(
        "experiments/rivals.py: not a model folder of transformers",
        f"{BENCH} --against transformers --model transcripts",
        "give --model FOLDER",
        f"{BENCH} --against transformers --model model",
        slow=True,
    ),
    closed("experiments/against.py: the rivals run classifiers of texts", "research", "give a store of such a model"),
    instead(
        "experiments/against.py: not a file of records",
        f"{BENCH} --against transformers --records texts.txt",
        "name another file for --records",
        f"{BENCH} --against transformers --records records.jsonl",
        slow=True,
    ),
    options(
        "cli/eval.py: --features",
        "eval model --train mine.tsv --features",
        "give --transcript DIR",
        "--transcript made",
    ),
    options(
        "cli/profile.py: no file",
        "profile store --max-length 8 --threads 1",
        "give --out profile.json",
        "--out made.json",
        slow=True,
    ),
    Entry(
        "cli/profile.py: profile measures",
        "profile store --out memory.svg",
        "offramp memory STORE --out memory.svg draws",
        named_command("--threads 1", STORE="store"),
        again=False,
    ),
    instead(
        "cli/options.py: cannot write a",
        "memory store --out memory.pdf",
        "use .svg or .png",
        "memory store --out memory.svg --threads 1",
        "memory store --out memory.png --threads 1",
    ),
    instead(
        "cli/options.py: is a folder | no such folder",
        f"run store {SAY} --trace none/trace.json",
        "name a file in a folder that exists",
        f"run store {SAY} --trace trace.json",
    ),
    instead(
        "cli/train.py: {}",
        "train encoder --train mine.tsv --out made --warmup 2",
        "offramp train --help shows",
        "train --help",
    ),
    instead(
        "cli/__init__.py: offramp {} has no {} any more",
        "profile store --passes 3",
        "use offramp memory STORE --passes N",
        "memory store --passes 3 --out memory.svg --threads 1 --max-length 8",
    ),
    instead(
        "cli/options.py: given twice: combine",
        f"run store {SAY} --exit stage:1 --exit patience:1",
        "combine policies with | or &",
        f"run store {SAY} --exit 'confidence:0.9|patience:1'",
        f"run store {SAY} --exit 'confidence:0.9&patience:1'",
    ),
    Entry(
        "cli/tune.py: the transcript is of another model",
        f"tune store --transcript transcripts {GOAL}",
        "offramp eval --transcript writes one for this store",
        tune_own,
        again=False,
        slow=True,
    ),
    instead(
        "cli/tune.py: {}, so the policy file is not replaced",
        spoilt(lambda w: w.copy("policy.json"), f"{SHORT} --deadline 1.48ms"),
        "allow a larger --max-drop or --deadline, or name another file with --out",
        f"{SHORT} --deadline 10s",
        f"{SHORT} --max-drop 20",
        f"{SHORT.replace('policy.json', 'other.json')} --deadline 1.48ms",
    ),
    instead(
        "cli/options.py: is a pipe, a device or a folder",
        spoilt(pipe, f"run store {SAY} --out out.csv"),
        "name another file",
        f"run store {SAY} --out another.csv",
    ),
    instead(
        "cli/run.py: a regression has no classes",
        spoilt(of_regression, f"run scores {SAY} --all-scores"),
        "leave out --all-scores",
        f"run scores {SAY}",
    ),
    instead(
        "cli/options.py: given twice: name",
        spoilt(table, f"run store {TABLE_OF_TEXTS} --input in.csv"),
        "name one file",
        f"run store {TABLE_OF_TEXTS}",
    ),
    instead(
        "cli/options.py: {} and {} are the same file",
        spoilt(table, f"run store {TABLE_OF_TEXTS} --out in.csv"),
        "name another file",
        f"run store {TABLE_OF_TEXTS} --out out.csv",
    ),
    instead(
        "session/outputs.py: {}",
        spoilt(lambda w: w.without("pyarrow"), f"run store {SAY} --out out.parquet"),
        "; .csv and .jsonl need no library",
        f"run store {SAY} --out out.csv",
        f"run store {SAY} --out out.jsonl",
        simulates="library",
    ),
]

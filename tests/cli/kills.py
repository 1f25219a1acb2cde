"""Kills of commands at the calls that change their files, and the same command again. Linux with strace.

A case is a small instance of a verb. An undisturbed run tells its calls; then each call is the last one of a process:
SIGKILL comes when it is entered. The same command must end with 0 and leave what the undisturbed run leaves, except for
what is measured. Calls are counted in each thread, and the thread that comes first to a number is killed there.
"""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.cli.conftest import write_tiny
from tests.golden.common import TUNED, unpack

CALLS = """
    rename renameat renameat2 unlink unlinkat rmdir mkdir mkdirat link linkat symlink symlinkat
    truncate ftruncate fallocate write pwrite64 writev pwritev fsync fdatasync
""".split()  # noqa: SIM905
QUICK = ("--threads", "1")
TUNE = ("--transcript", "@/transcripts", "--profile", "@/profile.json", "--force-profile")
TRAIN = ("--epochs", "1", "--heads-epochs", "1", "--batch", "16", "--max-length", "8", "--save-steps", "2")


@dataclass(frozen=True)
class Case:
    """One command. `@` in a word stands for the folder in which it works."""

    words: tuple[str, ...]
    seconds: int = 120
    follow: bool = True
    """Whether the calls of its workers count, too. A sweep runs a worker that is killed once more."""


CASES = {
    "run": Case(("run", "@/store", "--input", "@/texts.txt", "--out", "@/answers.csv", "--budget", "2GiB", *QUICK)),
    "divide": Case(("divide", "@/model", "@/made")),
    "divide --force": Case(("divide", "@/model", "@/old", "--force")),
    "divide to an empty folder": Case(("divide", "@/model", "@/empty")),
    "divide --method export": Case(("divide", "@/plain", "@/made", "--method", "export")),
    "eval": Case(("eval", "@/store", "--train", "@/data.tsv", "--split", "tune,dev", "--transcript", "@/t")),
    "eval --features": Case(("eval", "@/model", "--dev", "@/data.tsv", "--transcript", "@/t", "--features")),
    "tune": Case(("tune", "@/tuned", *TUNE, "--latency", "2ms", "--out", "@/policy.json")),
    "train": Case(("train", "@/plain", "--train", "@/data.tsv", "--out", "@/trained", *TRAIN)),
    "profile": Case(("profile", "@/store", "--out", "@/own.json", "--max-length", "8", *QUICK)),
    "memory": Case(
        ("memory", "@/store", "--text", "the bank fell", "--out", "@/memory.svg", "--trace", "@/trace.jsonl")
    ),
    "bench": Case(("bench", "@/store", "--budget", "2GiB", "--repeat", "1", "--passes", "2", *QUICK)),
    "sweep": Case(("sweep", "@/recipe.py", "--out", "@/results"), follow=False),
}
_TORCH = ("offramp.checkpoints.checkpoint", "offramp.checkpoints.inputs", "transformers.models.bert.modeling_bert")
MODULES = {
    "run": ("offramp.session.outputs",),
    "divide": ("offramp.checkpoints.auto_tokenizer",),
    "eval": ("offramp.experiments.evaluation", *_TORCH),
    "tune": ("offramp.experiments.tuning",),
    "sweep": ("offramp.experiments.sweep",),
    "train": ("offramp.training", "transformers.trainer", *_TORCH),
}
"""Modules that are imported once for all runs of a verb."""
RECIPE = """from pathlib import Path

from offramp.experiments import Grid


def recipe():
    return Grid(model=str(Path(__file__).with_name("model")), budget="2GiB", passes=1, max_length=8, rounds=1)
"""
"""Recipe of one round whose model is divided first."""
MEASURED = {
    "cache/*": "identities of files: device, inode, times",
    "memory.svg": "memory and times of one run",
    "trace.jsonl": "times of one run",
    "own.json": "latencies of this machine, and what it is",
    "results/made/*/made.json": "seconds",
    "results/records.jsonl": "figures and times; experiments, their inputs and how they ended are compared",
}
"""Files whose contents are measured, by patterns of names. All others are compared byte for byte."""
COMPARED = ("id", "experiment", "inputs", "status", "attempts")
"""Parts of the records of a sweep that are compared."""
OWN = ("out", "err", "tmp")
"""Names in the place that belong to the test."""


def make_place(place):
    """Write all that the cases read."""
    import offramp

    for name, exits in (("model", True), ("plain", False)):
        write_tiny(place / name, exits=exits)
    offramp.divide(place / "model", place / "store")
    shutil.copytree(place / "store", place / "old")
    shutil.copytree(unpack("bert-tuned", place.parent), place / "tuned")
    shutil.copytree(TUNED, place / "transcripts")
    shutil.copy(TUNED / "profile.json", place)
    (place / "empty").mkdir()
    (place / "recipe.py").write_text(RECIPE)
    (place / "texts.txt").write_text("a film won\nthe bank fell\n")
    labels = ("business", "film", "sport")
    rows = [f"the {word} {number}\t{labels[number % 3]}" for number, word in enumerate(["bank", "film", "match"] * 20)]
    (place / "data.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")


def compared(name, data):
    """What is compared of a file: all, or what is not measured."""
    if not any(fnmatch.fnmatch(name, pattern) for pattern in MEASURED):
        return data
    records = [json.loads(line)["record"] for line in data.splitlines()] if name.endswith("records.jsonl") else ()
    return [[record[part] for part in COMPARED] for record in records]


def differences(tree, other):
    """The names of the files that differ."""
    return [name for name in sorted({*tree, *other}) if tree.get(name) != other.get(name)]


class Place:
    """The folder in which commands run, renewed for each; and the process that runs them. A context manager."""

    def __init__(self, work, verbs=tuple(CASES)):
        self.master, self.place, self.log = work / "master", work / "place", work / "calls"
        words = {CASES[verb].words[0] for verb in verbs}
        self._modules = sorted({module for verb in words for module in MODULES.get(verb, ())})

    def __enter__(self):
        self.master.mkdir()
        make_place(self.master)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, Path(__file__).with_name("fault_driver.py"), *self._modules]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._driver = subprocess.Popen(command, env=environment, text=True, **pipes)
        return self

    def __exit__(self, *_):
        self._driver.__exit__(None, None, None)

    def renew(self):
        """Make the place as it was."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.master, self.place)
        (self.place / "tmp").mkdir()

    def run(self, case, **options):
        """How a command ended: its exit code, stdout and stderr; None where it could not be traced."""
        words = [word.replace("@", str(self.place)) for word in case.words]
        job = {"place": str(self.place), "words": words, "seconds": case.seconds, "follow": case.follow, **options}
        self._driver.stdin.write(json.dumps(job) + "\n")
        self._driver.stdin.flush()
        return json.loads(self._driver.stdout.readline())

    def tree(self):
        """The files by name, with their bytes; those that are measured without."""
        found = {}
        tops = [top for top in self.place.iterdir() if top.name not in OWN]
        for path in sorted(path for top in tops for path in (top, *top.rglob("*"))):
            name = str(path.relative_to(self.place))
            found[name] = (path.stat().st_mode, compared(name, path.read_bytes()) if path.is_file() else b"")
        return found

    def undisturbed(self, case):
        """What a command leaves, the paths that it changes, and its calls in order: name and number in a thread.

        None where it cannot be traced.
        """
        self.renew()
        ended = self.run(case, trace=",".join(CALLS), log=str(self.log))
        if ended is None:
            return None
        assert ended["code"] == 0, ended["err"]
        own = tuple(str(self.place / name) for name in OWN)
        paths, numbers, calls = {str(self.place)}, Counter(), {}
        for line in self.log.read_text(errors="replace").splitlines():
            begin = re.match(r"(\d+ +)?(\w+)\(", line)
            named = re.findall(r'[<"]([^<>"]+)[>"]', line)
            named = [path for path in named if path.startswith(str(self.place)) and not path.startswith(own)]
            if begin and named:
                paths.update(named)
                numbers[begin.groups()] += 1
                calls[begin[2], numbers[begin.groups()]] = None
        return self.tree(), sorted(paths), list(calls)

    def in_new_process(self, case, hash_seed):
        """What a command leaves in a process of its own, in which sets have an order of their own."""
        self.renew()
        words = [word.replace("@", str(self.place)) for word in case.words]
        variables = {"OFFRAMP_CACHE": str(self.place / "cache"), "PYTHONHASHSEED": str(hash_seed)}
        variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "offramp", *words]
        settings = {"cwd": self.place, "env": {**os.environ, **variables}}
        done = subprocess.run(command, **settings, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return self.tree()

    def kill(self, case, call, when, paths, tree):
        """Whether the command was killed, or its worker, and what is wrong after the same command."""
        self.renew()
        first = self.run(case, trace=call, inject=f"{call}:signal=KILL:when={when}", paths=paths)
        again = self.run(case)
        if again["code"]:
            return first["code"] != 0, f"exit {again['code']}: {again['err'].strip()[-300:]}"
        names = differences(self.tree(), tree)
        names += [f"tmp/{path.name}" for path in (self.place / "tmp").iterdir()]
        return first["code"] != 0, f"other files: {', '.join(names)}" if names else None

"""Remedies of sweeps and comparisons: recipes, results folders, schedulers."""

import hashlib
import json
import os
import sys
from dataclasses import asdict
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from offramp.experiments import experiment, searching, sweep, tracking
from offramp.experiments.results import RECORDS, line_of, read_results
from offramp.experiments.rivals import INDEX_FILE
from offramp.experiments.specification import INPUTS
from offramp.experiments.steps import take_step
from offramp.policies import parse, replay
from offramp.tasks import DataSpec
from tests.remedies.entries import Entry, closed, corrected, said_by

TOYS = "from offramp.experiments import Grid, Search\ndef recipe():\n    return {}\n"
GOOD = "Grid(job='toy', model='toy', rounds=1)"
MODEL = "model='model', rounds=1, threads=1"
SWEEP = "sweep recipe.py --out out"


def recipe(returned, text=TOYS):
    """Write a recipe, once, and sweep it."""

    def write(w):
        (w / "recipe.py").write_text(text.format(returned))

    def work(w):
        w.once(write)
        w.run(SWEEP)

    return work


def rewritten(returned, words):
    """An action: correct the recipe."""

    def act(w, said=None):
        (w / "recipe.py").write_text(TOYS.format(returned))

    return said_by(act, words)


def planned(w):
    """Plan the recipe; models and data are identified in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "run_worker", lambda job, log: take_step(job.step, log))
        w.run(SWEEP + " --dry-run")


def measured(returned, folder="model"):
    """Write a recipe of a real model, once, and plan it."""

    def write(w):
        (w / "recipe.py").write_text(TOYS.format(returned))

    def work(w):
        w.copy(folder)
        w.copy("mine.tsv")
        w.once(write)
        planned(w)

    return work


def swept(w, out="out"):
    (w / "recipe.py").write_text(TOYS.format(GOOD))
    w.run(f"sweep recipe.py --out {out}")


def spoilt_results(spoil, command=SWEEP):
    """Sweep, spoil the results once, and run a command on them."""

    def work(w):
        w.once(lambda w: (swept(w), spoil(w / "out")))
        w.run(command)

    return work


def elsewhere(w, said=None):
    w.run("sweep recipe.py --out other")


elsewhere.says = "the command with another --out"


def damaged(out):
    lines = (out / RECORDS).read_bytes()
    (out / RECORDS).write_bytes(lines.replace(b"done", b"gone") + lines)


def no_record(out):
    body = b"7"
    line = b'{"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'", "record": ' + body + b"}\n"
    (out / RECORDS).write_bytes(line)


def endless(out):
    with (out / RECORDS).open("r+b") as file:
        file.truncate(1 << 30)


def another_file(out):
    (out / RECORDS).write_text("mine\n")


def other_version(out):
    (out / "results.json").write_text(json.dumps({"format": 99}))


def unreadable(out):
    (out / "results.json").write_text("{")


def no_results(w):
    w.once(lambda w: (w / "out").mkdir())
    w.run("compare out out")


def no_records(w):
    w.once(lambda w: (w / "recipe.py").write_text(TOYS.format("Grid(job='toy', model='toy', device='board')")))
    w.once(lambda w: w.run(SWEEP))
    w.run("compare out out")


def compare_with(figure="latency", first=GOOD, second=GOOD, out="out"):
    def work(w):
        for number, returned in enumerate((first, second)):
            (w / "recipe.py").write_text(TOYS.format(returned))
            w.run(f"sweep recipe.py --out {out}-{number}")
        w.run(f"compare {out}-0 {out}-1 --figure {figure}")

    return work


def report_with(options):
    def work(w):
        swept(w)
        w.run(f"report out {options}")

    return work


def page_by(template, options=""):
    """Make a page of swept toys by a template: text, or bytes that are none."""

    def work(w):
        swept(w)
        (w / "page.jinja").write_bytes(template if isinstance(template, bytes) else template.encode())
        w.run(f"report out --template page.jinja --out page.md {options}")

    return work


def newer_record(out):
    record = read_results(out, print)[0]
    (out / RECORDS).write_bytes(line_of({**record, "experiment": {**record["experiment"], "orbit": 1}}))


def foreign_record(out):
    record = read_results(out, print)[0]
    (out / RECORDS).write_bytes(line_of({**record, "samples": 3}))


def strange_folder(w):
    w.once(lambda w: ((w / "out").mkdir(), (w / "out" / "mine.txt").write_text("x")))
    recipe(GOOD)(w)


def toys_with(options, returned=GOOD):
    def work(w, said=None):
        (w / "recipe.py").write_text(TOYS.format(returned))
        w.run(f"{SWEEP} {options}")

    return work


def write_binary(w):
    (w / "recipe.py").write_bytes(b"\xff")


def binary(w):
    w.once(write_binary)
    w.run(SWEEP)


def identified(train):
    """Read the data of a recipe as its worker process does, here."""

    def work(w, said=None):
        w.copy("mine.tsv")
        if train == "pipe" and not (w / "pipe").exists():
            os.mkfifo(w / "pipe")
        step = {"kind": "identify", "models": [], "data": [asdict(DataSpec(train=train))], "offline": True}
        take_step(step, print)

    return work


def without(text):
    return recipe("", text)


FAILING = """#!/bin/sh
read job
case "$job" in *versions*) echo '{"result": {"torch": "2", "transformers": "5"}}';; *) echo '{"failed": "no"}';; esac
"""
BARE = "#!/bin/sh\necho '{\"result\": {}}'\n"


def without_index(w):
    """A store that transformers does not load, and a recipe of it."""
    (w.store / INDEX_FILE).unlink()
    (w / "recipe.py").write_text(TOYS.format("Grid(model='store', rival='disk', rounds=1)"))


def unloadable(w):
    w.copy("model")
    w.once(without_index)
    planned(w)


def converted(name, program=None):
    """Convert the model for a rival as a worker process does, by a program in place of Python."""

    def work(w, said=None):
        python = w / "python"
        if program is not None:
            python.write_text(program)
            python.chmod(0o755)
        interpreter = sys.executable if program is None else str(python)
        take_step({"kind": "convert", "rival": name, "model": str(w.copy("model")), "python": interpreter}, print)

    return work


def streamed_by(name):
    """Run the job `stream` of a folder whose example inputs have this name."""

    def work(w, said=None):
        folder = w.copy("plain")
        given = {name: torch.ones(2, 8, dtype=torch.int64), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
        save_file(given, folder / INPUTS)
        asked = experiment(model=str(folder), job="stream").to_json()
        take_step({"kind": "stream", "model": str(folder), "experiment": asked}, print)

    return work


plan_of_store = measured("Grid(job='stream', model='store')", "store")


def streams_store(w):
    """Plan the job `stream` of a store, unless the recipe was corrected."""
    w.copy("model")
    plan_of_store(w)


bare, by_this_python = converted("transformers", BARE), said_by(converted("transformers"), "another Python")


def search_with(library):
    """Plan a search with a library in the place of optuna; None: it is not installed."""

    def work(w, said=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "optuna", library)
            patch.setattr(searching.importlib.util, "find_spec", lambda name: name)
            (w / "recipe.py").write_text(TOYS.format(f"Search({GOOD})"))
            w.run(SWEEP + " --dry-run")

    return work


def with_tracker(w):
    """Sweep with a tracker that takes everything."""
    code = "import sys\nfor line in sys.stdin: print('taken', flush=True)"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking.importlib.util, "find_spec", lambda name: name)
        patch.setattr(tracking, "COMMAND", (sys.executable, "-c", code))
        toys_with("--track wandb")(w)


def own(code, name="Mine"):
    """Take a policy from a Python file that is written at first."""

    def write(w):
        (w / "mine.py").write_text(code)

    def work(w):
        w.once(write)
        parse(f"{w / 'mine.py'}:{name}", code=True)

    return work


def rewritten_policy(words):
    """An action: correct the file of the policy."""
    return said_by(lambda w, said=None: (w / "mine.py").write_text(MINE), words)


def taken(rule):
    """Take a policy from a correct Python file; `rule` follows its name."""

    def work(w, said=None):
        (w / "mine.py").write_text(MINE)
        parse(str(w / "mine.py") + rule, code=True)

    return work


def numbers(w):
    """Ask a policy that returns numbers, until its file is corrected."""
    w.once(write_numbers)
    outputs = np.zeros((2, 3, 2))
    replay(parse(f"{w / 'mine.py'}:Mine", code=True), outputs, "single_label_classification")


def write_numbers(w):
    """Write the file of a policy that returns numbers."""
    (w / "mine.py").write_text(MINE.replace(" > 0.9", ""))


def records_of_code(w):
    """Sweep the records of a sweep whose exit is of a Python file."""
    (w / "mine.py").write_text(MINE)
    (w / "recipe.py").write_text(TOYS.format("Grid(job='toy', model='toy', rounds=1, exit='mine.py:Mine')"))
    w.once(lambda w: w.run(SWEEP))
    w.run("sweep out --out again")


MINE = """from offramp.policies import MemorylessPolicy
class Mine(MemorylessPolicy):
    def update(self, exit_index, evidence):
        return evidence.confidence_B > 0.9
"""
LATE = "Grid(job='toy', model='toy', rounds=1, timeout='1ms')"
TWO = "Grid(job='toy', model='toy', rounds=1, seed={})"
DATA = "train='mine.tsv', "
TABLE = [
    corrected("experiments/comparison.py: no figure {}", compare_with("speed"), "give --figure", compare_with()),
    corrected(
        "experiments/comparison.py: no round of both folders has the figure {}",
        compare_with("bytes"), "give --figure latency, score", compare_with("score"),
    ),
    corrected(
        "experiments/comparison.py: no round of both folders has the figure {}",
        compare_with(first=LATE, second=LATE), "offramp report shows why their jobs failed",
        "report out-0 --out failures.md",
    ),
    corrected(
        "experiments/comparison.py: no experiment is in both folders",
        compare_with(first=TWO.format("[1, 2]"), second=TWO.format("[3, 4]")),
        "compare sweeps of one recipe",
        compare_with(first=TWO.format(1), second=TWO.format(3), out="other"),
    ),
    Entry("experiments/grid.py: cannot read a recipe", binary, "name a Python file", rewritten(GOOD, "a Python file")),
    Entry(
        "experiments/grid.py: the recipe has no function recipe()",
        without("x = 1\n"), "define one that returns a Grid", rewritten(GOOD, "define the function"),
    ),
    Entry(
        "experiments/grid.py: the recipe has no experiments",
        recipe("[]"), "return a Grid, and keep some of it where you filter it", rewritten(GOOD, "a Grid"),
    ),
    Entry(
        "experiments/grid.py: the recipe returns {}, not experiments",
        recipe("3"), "return a Grid, an experiment, a list of these, or a Search",
        rewritten(f"[{GOOD}]", "return a list"),
    ),
    Entry(
        "experiments/grid.py: the recipe is wrong: {}",
        recipe("Grid(modell='toy')"), "correct the recipe", rewritten(GOOD, "the recipe with a field that is known"),
    ),
    corrected(
        "experiments/grid.py: {} {}: no option",
        toys_with("--only modl=a"), "give --only NAME=VALUE", toys_with("--only model=toy"),
    ),
    corrected(
        "experiments/grid.py: the records name code",
        records_of_code, "run the recipe again: offramp sweep RECIPE.py", "sweep recipe.py --out again",
    ),
    corrected(
        "policies/own.py: no class {}",
        taken(":Other"), "write FILE.py:CLASS[:ARGUMENTS]: it has Mine", taken(":Mine"),
    ),
    Entry(
        "policies/own.py: no class {}",
        own("x = 1\n"), "derive one from offramp.policies.Policy", rewritten_policy("a class of Policy"),
    ),
    corrected(
        "policies/own.py: the policy was changed since it was named",
        taken("@0123456789abcdef:Mine"), "run the same command again", taken(":Mine"),
    ),
    Entry(
        "policies/own.py: {}, not {} {}",
        numbers, "correct the policy", rewritten_policy("update returns bools"),
    ),
    Entry(
        "policies/own.py: the policy is wrong: {}",
        own("x = y\n"), "correct the policy", rewritten_policy("the file without the error"),
    ),
    corrected(
        "experiments/grid.py: no experiment is left",
        toys_with("--only model=b"), "offramp sweep --dry-run lists all", SWEEP + " --dry-run",
    ),
    corrected(
        "experiments/scheduled.py: not the address of a scheduler",
        toys_with("--scheduler far"), "give tcp://localhost:8786 or tls://HOST:8786", SWEEP,
    ),
    closed("experiments/scheduled.py: no scheduler answers ({})", "research"),
    closed("experiments/scheduled.py: a scheduler on another machine needs TLS", "research"),
    closed("experiments/scheduled.py: no certificates for TLS ({})", "research"),
    closed("experiments/scheduled.py: the scheduler has no worker", "research"),
    closed("experiments/scheduled.py: the scheduler is gone ({})", "research"),
    closed("experiments/scheduled.py: a worker of the scheduler cannot run jobs ({})", "research"),
    closed("experiments/steps.py: {} rows are more than a record holds", "research"),
    Entry(
        "experiments/prerequisites.py: exit {}: no goal",
        measured(f"Grid({DATA}exit='tune:speed=3', {MODEL})"), "give tune:latency=40ms or tune:drop=1",
        rewritten(f"Grid({DATA}exit='tune:drop=1', {MODEL})", "`tune:drop=1`"),
    ),
    Entry(
        "experiments/prerequisites.py: a training without data",
        measured(f"Grid(loss='pabee', {MODEL})"), "give task, train or dev",
        rewritten(f"Grid({DATA}loss='pabee', {MODEL})", "`train`"),
    ),
    Entry(
        "experiments/prerequisites.py: the model has no classification head",
        measured(f"Grid({DATA}model='encoder')", "encoder"), "or give an option of the training",
        rewritten(f"Grid({DATA}model='encoder', loss='pabee')", "a recipe that trains"),
    ),
    Entry(
        "experiments/prerequisites.py: {} needs exits and the model has none",
        measured(f"Grid({DATA}model='plain', exit='oracle')", "plain"), "or give an option of the training",
        rewritten(f"Grid({DATA}model='plain', exit='oracle', epochs=1)", "a recipe that trains"),
    ),
    Entry(
        "experiments/prerequisites.py: {} needs exits, and a training with loss last makes none",
        measured(f"Grid({DATA}loss='last', exit='patience:1', {MODEL})"), "give exit none, or another loss",
        rewritten(f"Grid({DATA}loss='pabee', exit='patience:1', {MODEL})", "`pabee`"),
    ),
    Entry(
        "experiments/prerequisites.py: policies leave at other exits",
        measured(f"Grid(exit='patience:1', {MODEL})"), "give task or dev, or exit none or stage:K",
        rewritten(f"Grid(exit='none', {MODEL})", "`exit='none'`"),
    ),
    Entry(
        "experiments/prerequisites.py: the job {} has no option {}",
        measured(f"Grid(job='stream', batch=8, {MODEL})"), "give it a Grid of its own, without it",
        rewritten(f"Grid(job='stream', {MODEL})", "a recipe without the option"),
    ),
    Entry(
        "experiments/prerequisites.py: the job {} divides a model itself",
        streams_store, "name the model folder", rewritten(f"Grid(job='stream', {MODEL})", "the model folder"),
    ),
    corrected(
        "experiments/bitwise.py: a {} does not take the example inputs ({})",
        streamed_by("words"), "put inputs by name into inputs.safetensors", streamed_by("input_ids"),
    ),
    corrected(
        "experiments/searching.py: optuna is not installed",
        search_with(None), "pip install 'offramp[search]'", search_with(ModuleType("optuna")), simulates="library",
    ),
    Entry(
        "experiments/prerequisites.py: no backend {}",
        measured(f"Grid(backend='onnx', {MODEL})"), "give ort", rewritten(f"Grid(backend='ort', {MODEL})", "`ort`"),
    ),
    Entry(
        "experiments/prerequisites.py: max_length {} exceeds",
        measured(f"Grid(max_length=99999, {MODEL})"), "give max_length=",
        rewritten(f"Grid(max_length=8, {MODEL})", "a smaller length"),
    ),
    corrected(
        "cli/sweep.py: not a folder",
        toys_with("--dry-run --out recipe.py"), "name a new folder with --out", toys_with("--dry-run"),
    ),
    Entry(
        "experiments/prerequisites.py: exit {} in bulk mode",
        measured(f"Grid({DATA}exit='oracle', batch='bulk', {MODEL})"), "give a batch size",
        rewritten(f"Grid({DATA}exit='oracle', batch=4, {MODEL})", "`batch=4`"),
    ),
    corrected(
        "experiments/results.py: not a results folder",
        no_results, "name a folder that offramp sweep wrote", compare_with(),
    ),
    corrected(
        "experiments/report.py: no experiment with figures is such a baseline",
        report_with("--baseline model=b"), "give another --baseline", report_with("--baseline model=toy"),
    ),
    corrected(
        "experiments/report.py: no experiment has these values",
        report_with("--only model=b"), "leave out --only, which reports all", report_with(""),
    ),
    corrected(
        "cli/report.py: a template makes the whole page, and has no use for {}",
        page_by("{{ rows | length }}", "--title T"), "leave out --template, or --title", page_by("{{ rows | length }}"),
    ),
    corrected(
        "reporting/pages.py: cannot read a template ({})",
        page_by(b"\xff\xfe"), "name a text file", page_by("{{ rows | length }}"),
    ),
    corrected(
        "reporting/pages.py: the template is wrong: {}",
        page_by("{{ rows[0].absent }}"), "correct the template", page_by("{{ rows[0].model }}"),
    ),
    Entry(
        "experiments/results.py: no records", no_records, "run offramp sweep first",
        said_by(lambda w, said=None: swept(w), "`offramp sweep`"),
    ),
    Entry(
        "experiments/results.py: the line is damaged",
        spoilt_results(damaged), "name another --out", elsewhere, again=False,
    ),
    Entry(
        "experiments/results.py: no record ({})",
        spoilt_results(no_record), "name another folder", elsewhere, again=False,
    ),
    Entry(
        "experiments/results.py: a line of more than {} bytes",
        spoilt_results(endless), "name another folder", elsewhere, again=False,
    ),
    Entry(
        "experiments/results.py: no file of records",
        spoilt_results(another_file), "name another folder", elsewhere, again=False,
    ),
    closed("experiments/comparison.py: records whose answers have no", "unreachable"),
    Entry(
        "experiments/results.py: unreadable ({})",
        spoilt_results(unreadable), "name another folder", elsewhere, again=False,
    ),
    Entry(
        "experiments/results.py: results of format {}",
        spoilt_results(other_version), "name another --out", elsewhere, again=False,
    ),
    Entry(
        "experiments/results.py: not a results folder: it holds {}",
        strange_folder, "name a new folder with --out", elsewhere, again=False,
    ),
    Entry(
        "experiments/specification.py: a record has a specification that cannot be read ({})",
        spoilt_results(newer_record, "report out"), "or run the sweep again", elsewhere, again=False,
    ),
    Entry(
        "experiments/results.py: record {} has parts that no sweep writes",
        spoilt_results(foreign_record, "report out"), "or run the sweep again", elsewhere, again=False,
    ),
    closed("experiments/steps.py: the transcript has {} rows", "torn"),
    closed("experiments/steps.py: the data have changed since the sweep began", "torn"),
    closed("experiments/steps.py: the model has changed since the sweep began", "torn"),
    closed("experiments/sweep.py: the store has changed since the sweep began", "torn"),
    corrected(
        "experiments/steps.py: each process reads the data again",
        identified("pipe"), "give a file", identified("mine.tsv"),
    ),
    closed("experiments/figures.py: the score is {}", "unreachable"),
    Entry(
        "experiments/grid.py: a search beside other experiments",
        recipe("[Search(Grid(job='toy', model='toy'))]"),
        "return the search alone", rewritten(GOOD, "a recipe without the list"),
    ),
    corrected(
        "experiments/scheduled.py: {}, and a scheduler gives jobs",
        toys_with("--scheduler tcp://localhost:1", "Grid(job='toy', model='toy', device='board')"),
        "run this experiment there, without --scheduler",
        toys_with("--device board", "Grid(job='toy', model='toy', rounds=1, device='board')"),
    ),
    Entry(
        "experiments/prerequisites.py: the rival {} has no option {}",
        measured(f"Grid(rival='disk', budget='1GiB', {MODEL})"), "give rivals a Grid of their own, without it",
        rewritten(f"[Grid(budget='1GiB', {MODEL}), Grid(rival='disk', {MODEL})]", "two grids"),
    ),
    Entry(
        "experiments/prerequisites.py: the rival {} keeps a list of layers",
        measured(f"Grid(rival=['disk', 'lazy-layers'], {MODEL})"), "give it a Grid of its own, with residency fifo",
        rewritten(f"[Grid(rival='disk', {MODEL}), Grid(rival='lazy-layers', residency='fifo', {MODEL})]", "two grids"),
    ),
    Entry(
        "experiments/prerequisites.py: the rival {} reads the model", unloadable, "name the model folder",
        rewritten(f"Grid(rival='disk', {MODEL})", "`model='model'`"),
    ),
    Entry(
        "experiments/rival_steps.py: {}: {} [_versions", bare, "install it, or give --rival transformers=PYTHON",
        by_this_python, again=False,
    ),
    corrected(
        "experiments/rival_steps.py: {}: {} [_converted", converted("lazy-layers", FAILING), "leave this rival out",
        converted("transformers"),
    ),
    closed("experiments/rival_steps.py: it gives {} logits", "unreachable"),
    Entry(
        "experiments/tracking.py: {} is not installed", toys_with("--track wandb"), "pip install wandb",
        said_by(with_tracker, "the tracker is installed"), again=False, simulates="library",
    ),
    closed("experiments/sweep.py: {}", "shared"),
    closed("experiments/sweep.py: {}, and the sweep ends", "shared"),
    corrected(
        "errors.py: not a folder | no such {}",
        "compare none none", "name a folder that offramp sweep wrote", compare_with(),
    ),
]  # fmt: skip

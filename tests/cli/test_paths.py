"""A wrong path has one exit code: of every command, and of every argument that is a path."""

import argparse
import importlib

import pytest

from offramp.cli import COMMANDS, main
from tests.cli.conftest import LABELS

PLACES = ("model", "store", "table.tsv", "said", "policy.json", "recipe.py", "swept")
"""Names in the words below that stand for what the fixture `place` has made."""
WORDS = {
    "divide": ("model", "new"),
    "ls": ("store",),
    "verify": ("store",),
    "plan": ("store",),
    "run": ("store", "--text", "the bank"),
    "memory": ("store",),
    "profile": ("store", "--out", "profile.json"),
    "train": ("model", "--out", "new", "--train", "table.tsv"),
    "eval": ("model", "--dev", "table.tsv"),
    "tune": ("store", "--transcript", "said", "--latency", "1s"),
    "bench": ("store", "--budget", "500MiB", "--repeat", "1", "--passes", "1"),
    "sweep": ("recipe.py", "--out", "new"),
    "compare": ("swept", "swept"),
    "report": ("swept",),
    "demo": (),
    "env": (),
}
"""Arguments that name what there is; a test replaces one of them, or adds a further option."""
WRITTEN = {
    "store of divide",
    "--out",
    "--trace",
    "--graph",
    "--transcript of eval",
    "--records",
    "--markdown",
    "--assets",
}
"""Arguments that name what a command writes."""
FOLDERS = {"model", "store", "--data", "--transcript", "first", "second", "results", "--assets"}
"""Arguments that name a folder."""
_RIVALS = ("--against", "transformers")
ALSO = {"--data": ("--task", "rte"), "--records": _RIVALS, "--markdown": _RIVALS}
"""Argument -> further words with which it is read."""


def arguments(command):
    """The arguments of a command that are paths: an option, or a positional argument by its name."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"offramp.cli.{command}").configure(parser)
    for action in parser._actions:
        metavar = str(action.metavar)
        if not action.option_strings:
            yield action.dest
        elif "FILE" in metavar or "DIR" in metavar or metavar == "POLICY":
            yield action.option_strings[0]


PAIRS = [(command, argument) for command in COMMANDS for argument in arguments(command)]


def is_written(command, argument):
    return bool({argument, f"{argument} of {command}"} & WRITTEN)


@pytest.fixture(scope="module")
def place(model, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("paths")
    (folder / "model").symlink_to(model)
    (folder / "store").symlink_to(store)
    rows = [f"the bank {number}\t{LABELS[str(number % 3)]}\n" for number in range(60)]
    (folder / "table.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    (folder / "file").touch()
    (folder / "folder").mkdir()
    table = ("--train", folder / "table.tsv", "--split", "tune", "--label-column", "label")
    words = ["eval", folder / "store", *table, "--transcript", folder / "said"]
    assert main([str(word) for word in words]) == 0
    toys = "from offramp.experiments import Grid\n\ndef recipe():\n    return Grid(job='toy', model='toy', rounds=1)\n"
    (folder / "recipe.py").write_text(toys)
    assert main(["sweep", str(folder / "recipe.py"), "--out", str(folder / "swept")]) == 0
    return folder


def words_with(place, command, argument, path):
    """The words of a command that works, but for one path."""
    words = [
        str(place / word) if word in PLACES or word in ("new", "profile.json") else word for word in WORDS[command]
    ]
    if argument == "--data":
        words = [word for word in words if word not in ("--train", "--dev", str(place / "table.tsv"))]
    if argument in words:
        words[words.index(argument) + 1] = path
        return words
    if argument.startswith("-"):
        return [*words, argument, path, *ALSO.get(argument, ())]
    position = [name for name in arguments(command) if not name.startswith("-")].index(argument)
    words[position] = path
    return words


def wrong_paths(place, command, argument):
    yield str(place / "file" / "below")
    yield ""
    yield str(place / ("long" * 70))
    if is_written(command, argument):
        is_folder = argument in FOLDERS or command in ("train", "demo", "sweep")
        yield str(place / ("file" if is_folder else "folder"))
        return
    yield str(place / "nothing")
    yield str(place / ("file" if argument in FOLDERS else "folder"))
    if argument in ("--input", "--train", "--dev"):
        yield from (str(place / f"nothing{suffix}") for suffix in (".tsv", ".jpg", ".zip", ".npz"))


@pytest.mark.parametrize(("command", "argument"), PAIRS, ids=map(" ".join, PAIRS))
def test_a_wrong_path_has_one_exit_code(run, place, monkeypatch, command, argument):
    monkeypatch.chdir(place)
    for path in wrong_paths(place, command, argument):
        said = run(command, *words_with(place, command, argument, path))
        last = said.err.splitlines()[-1]
        assert (said.code, last[:16]) == (2, "offramp: error: "), (path, said)
        is_missing = path.rpartition("/")[2].startswith("nothing")
        assert "no such" in last or not is_missing or argument in ("--transcript", "--exit"), (path, last)
    assert not (place / "new").exists()

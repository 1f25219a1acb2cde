"""The pages as a reader follows them: every block of commands and of Python runs verbatim, in order, in one folder,
each in a new process. Only installs are left out, by a list that is closed.

Models of the hub are tiny and lie in a prepared cache; `newcomer.py` writes them, and what a reader brings.
"""

import argparse
import ast
import builtins
import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import offramp
from offramp.cli import COMMANDS
from tests import newcomer

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/all-of-offramp.md")
NOT_RUN = {
    "pip install '.[edge,divide]'": "installs",
    "pip install -c constraints.txt": "installs",
    "make demo": "installs, and trains for minutes",
}
"""First words of a block of commands that no test runs -> why. Each begins exactly one block."""
SLOW = {
    "offramp bench store --budget": "ten processes; tests/cli/test_commands.py does so in CI",
    "offramp bench mail-store --train": "some dozens of processes",
    "offramp sweep my_question": "some dozens of processes",
    "offramp divide openai/whisper-tiny": "imports torch twice; tests/division/test_checkpoints.py divides one in CI",
    "import offramp, torch, transformers": "runs what the block before divides",
    "import offramp, torch\nfrom offramp.tasks": "trains and writes graphs; tests/cli/test_own.py does so in CI",
    "offramp eval own": "runs what the block before divides",
    "offramp eval mail-store": "six processes, and a table of 1,700 rows; tests/cli/test_tune.py does so in CI",
    "offramp train my-vit": "imports torch three times, and writes graphs; tests/cli/test_vision.py does so in CI",
}
"""First words of a block that `make test-all` runs only -> why. No later block of the page needs it."""
MIN_RUN = {"quick": {"README.md": 10}, "whole": {"README.md": 19, "docs/all-of-offramp.md": 5}}
"""Page -> blocks that run, at least. Raise it with the page."""
LANGUAGES = ("bash", "python", "text")
"""Language of a block; `text` is not run. Directly after a block that runs, it is what that block prints."""


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    code: str
    printed: str | None = None

    def __str__(self):
        return f"{self.page}:{self.line} ({self.language})"


def blocks_of(page, text):
    """All blocks of a page that run or are listed in NOT_RUN, in order, with what the page says that they print."""
    found, end = [], None
    for match in re.finditer(r"^```(\w*)\n(.*?)^```\n", text, re.DOTALL | re.MULTILINE):
        language, code = match.groups()
        assert language in LANGUAGES, f"{page}: a block of {language or 'no language'}: {code[:40]!r}"
        if language != "text":
            found.append(Block(page, text.count("\n", 0, match.start()) + 2, language, code))
        elif found and end is not None and not text[end : match.start()].strip():
            found[-1] = Block(**{**vars(found[-1]), "printed": code})
        end = match.end() if language != "text" else None
    return found


BLOCKS = {page: blocks_of(page, (ROOT / page).read_text()) for page in PAGES}


def free_names(code):
    """Names that a block of Python uses and does not define."""
    tree = ast.parse(code)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)} | set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
    return sorted({node.id for node in names} - bound)


def shape(printed):
    """A pattern of what a block prints: words as they are, any numbers and sizes, any widths; `...`: any lines."""
    lines = []
    for line in printed.splitlines():
        words = (re.sub(r"\\?-?\d+(\\\.\d+)?", r"-?\\d+(\\.\\d+)?", re.escape(word)) for word in line.split())
        words = ("([KMG]i)?B" if word == "MiB" else word for word in words)
        lines.append("(.*\n)*?" if line.strip() == "..." else r"[ \t]*" + r"[ \t]+".join(words) + r"[ \t]*\n")
    return "(.*\n)*?" + "".join(lines)


@dataclass(frozen=True)
class Place:
    """The folder of a reader, with `offramp` on the path and a cache of the hub."""

    folder: Path
    environment: dict

    def run(self, block):
        """Run a block and return what is wrong with it, or None."""
        words = ["bash", "-e", "-o", "pipefail", "-c", block.code]
        if block.language == "python":
            unknown = [name for name in free_names(block.code) if name not in newcomer.VARIABLES]
            if unknown:
                return f"{block}: not defined: {', '.join(unknown)}"
            given = "".join(newcomer.VARIABLES[name] for name in free_names(block.code))
            (self.folder / "snippet.py").write_text(given + block.code)
            words = [sys.executable, "snippet.py"]
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        warnings = re.findall(".*warning: .*", done.stdout, re.IGNORECASE)
        if done.returncode or warnings:
            return "\n".join([f"{block}: exit code {done.returncode}", *warnings, done.stdout[-3000:]])
        absent = [name for name in written_by(block.code) if not (self.folder / name).exists()]
        if absent:
            return f"{block}: not written: {', '.join(absent)}"
        if block.printed is not None and not re.match(shape(block.printed), done.stdout):
            return f"{block}: should print\n{block.printed}\nand prints\n{done.stdout[-3000:]}"
        return None


def written_by(code):
    """Files and folders that options of its commands name as results."""
    return re.findall(r"--(?:out|graph|transcript|trace) ([\w./-]+)", code)


@pytest.fixture
def place(tmp_path_factory, extent):
    root = tmp_path_factory.mktemp("reader")
    folder, home, programs = root / "folder", root / "hub", root / "bin"
    folder.mkdir()
    programs.mkdir()
    newcomer.write_hub(home)
    newcomer.write_files(folder, newcomer.NUM_MAIL_ROWS[extent])
    command = programs / "offramp"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m offramp "$@"\n')
    command.chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "HF_HOME": str(home), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(offramp.__file__).parents[1]), "OFFRAMP_CACHE": str(root / "cache"),
    }  # fmt: skip
    return Place(folder, environment)


@pytest.mark.parametrize("extent", ["quick", "whole"])
def test_every_block_runs_as_it_stands(extent, place):
    """`quick`: the README without slow blocks. `whole`: all pages; the others use what the README's commands write."""
    left_out = [*NOT_RUN, *(SLOW if extent == "quick" else ())]
    wrong = []
    for page, least in MIN_RUN[extent].items():
        run = [block for block in BLOCKS[page] if not block.code.startswith(tuple(left_out))]
        assert len(run) >= least
        wrong += [found for found in map(place.run, run) if found]
    assert not wrong, "\n\n".join(wrong)


def test_what_is_left_out_is_listed():
    codes = [block.code for page in PAGES for block in BLOCKS[page]]
    assert [sum(code.startswith(words) for code in codes) for words in (*NOT_RUN, *SLOW)] == [1] * 12


def options_of(command):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"offramp.cli.{command}").configure(parser)
    return {option for action in parser._actions for option in action.option_strings} | {"--debug"}


OPTIONS = {command: options_of(command) for command in COMMANDS}


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_named_options_exist(page):
    """In prose, too: what stands after the name of a command is of that command, any other of some command."""
    text = re.sub(r"`(?:python|pip|torchrun|docker|\./|\.ci/|bench/)[^`]*`", "", (ROOT / page).read_text())
    commands = re.findall(rf"offramp ({'|'.join(COMMANDS)}) ([^`#\n]*)", text)
    wrong = [(name, option) for name, rest in commands for option in _options(rest) if option not in OPTIONS[name]]
    everywhere = set().union(*OPTIONS.values())
    wrong += [option for option in _options(text) if option not in everywhere]
    assert not wrong


def _options(text):
    return re.findall(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*(?![\w-])", text)


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import a.b, c as d\na.e(d, f)", ["f"]),
        ("def g(x):\n    return x + y\nprint(g(1))", ["y"]),
        ("with f() as g:\n    [h for h, _ in g]\nfor i in k: i", ["f", "k"]),
        ("class A(B): pass\nA()", ["B"]),
    ],
)
def test_free_names_are_found(code, names):
    assert free_names(code) == names


@pytest.mark.parametrize(
    ("printed", "is_same"),
    [
        ("a 1\nsports 0.5 exit 6/6\nb", True),
        ("sports   -12  exit 1/12\n", True),
        ("sports 0.5 stage 6/6\n", False),
        ("sports 0.5 exit 6\n", False),
        ("", False),
    ],
)
def test_shapes_are_compared(printed, is_same):
    assert bool(re.match(shape("sports  0.8123  exit 6/6\n"), printed)) is is_same


def test_blocks_are_found_with_what_they_print():
    text = "```bash\na\n```\n\n```text\nb\n```\n```text\nc\n```\n\n```python\nd\n```\nprose\n```text\ne\n```\n"
    assert [(block.line, block.code, block.printed) for block in blocks_of("x", text)] == [
        (2, "a\n", "b\n"),
        (13, "d\n", None),
    ]

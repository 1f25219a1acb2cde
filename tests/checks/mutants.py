"""Change the code in small ways, one at a time, and count the changes that make a test fail.

    python -m tests.checks.mutants                                    # 200 changes of all PARTS
    python -m tests.checks.mutants --sample 50 --seed 3 runtime grammar
    python -m tests.checks.mutants --named                            # with the tests of the changed module alone
    python -m tests.checks.mutants --only store/reader.py:120:8       # some changes by their names

A change is drawn at random from all that the operators below make. The tests of its room are run, those first that are
named after the changed module or import from it, and those of `FURTHER`. With `--named` these alone are run, so that a
survivor may still be found by the others, and the share that is found is a lower bound. Results are appended to
OUT/mutants.jsonl, and changes that are there already are not tried again. A run of tests that takes longer than the
time limit counts as a failed one. Ends with 1 where fewer than 85 % are found.
"""

import argparse
import ast
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np  # noqa: F401 - imported once, for all runs of tests
import onnx  # noqa: F401
import onnxruntime  # noqa: F401
import pytest
import tokenizers  # noqa: F401
import torch  # noqa: F401

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "offramp"
PARTS = {
    "store": ("store",),
    "runtime": ("runtime",),
    "policies": ("policies",),
    "grammar": tuple(
        f"backends/{name}.py"
        for name in (
            *("onnx_captured", "onnx_checks", "onnx_operators", "onnx_reader"),
            *("torch_arguments", "torch_graphs", "torch_limits", "torch_operations"),
        )
    ),
}
"""Part of the program -> folders and files of src/offramp. The grammar is what says which kernels of stores may run."""
LEAST_SHARE = 0.85
SECONDS = 300
"""Time limit of one run of tests."""
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult, ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
"""Operator -> what takes its place."""
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}
ENGINE = tuple(f"runtime/test_{name}.py" for name in ("engine", "engine_faults", "engine_bytes", "schedules"))
"""Tests of the whole engine."""
FURTHER = {
    "store/lifting.py": (
        "store/test_encoder_format.py",
        "store/test_module_format.py",
        "store/test_segments_format.py",
    ),
    "store/policy_file.py": ("session/test_session.py", "cli/test_tune.py"),
    "store/exits.py": ("session/test_classifier.py",),
    "runtime/backend.py": ENGINE,
    "runtime/engine.py": ENGINE,
    "runtime/exits.py": (*ENGINE, "session/test_classifier.py"),
    "runtime/gate.py": (*ENGINE, "runtime/test_guard.py"),
    "runtime/schedule.py": ENGINE,
    "runtime/sweep.py": (*ENGINE, "runtime/test_guard.py"),
    "runtime/run_plan.py": ("session/test_classifier.py",),
    "runtime/ledger.py": ("session/test_classifier.py",),
    "runtime/footprint.py": ("session/test_classifier.py",),
    "policies/codec.py": ("policies/test_learned.py",),
    "backends/onnx_checks.py": ("backends/test_onnx_captured.py",),
    "backends/onnx_operators.py": ("backends/test_onnx_captured.py",),
    "backends/torch_arguments.py": ("backends/test_torch_limits.py", "backends/test_torch_graphs.py"),
    "backends/torch_operations.py": ("backends/test_torch_graphs.py",),
}
"""Module -> tests of it that are not named after it."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file: the characters from `start` to `end` are replaced."""

    file: str
    line: int
    start: int
    end: int
    before: str
    after: str

    @property
    def name(self) -> str:
        """Name of the change: file, line, first character and what takes its place."""
        return f"{self.file}:{self.line}:{self.start}:{self.after[:40]}"


def main() -> int:
    """Try a sample of changes. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=tuple(PARTS), metavar="PART", help=f"default: {' '.join(PARTS)}")
    parser.add_argument("--sample", type=int, default=200, help="number of changes (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="NAME", action="append", help="changes whose names begin so, instead")
    parser.add_argument("--named", action="store_true", help="run the tests of the changed module alone")
    parser.add_argument("--out", type=Path, default=Path("mutants-out"))
    args = parser.parse_args()
    every = [mutant for part in args.parts for mutant in mutants_of(part)]
    if args.only:
        chosen = [mutant for mutant in every if mutant.name.startswith(tuple(args.only))]
    else:
        chosen = random.Random(args.seed).sample(every, min(args.sample, len(every)))
    args.out.mkdir(exist_ok=True)
    results = args.out / "mutants.jsonl"
    known = dict(read(results))
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for part in ("src", "tests"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        for number, mutant in enumerate(chosen, start=1):
            if args.only or mutant.name not in known:
                known[mutant.name] = outcome = try_one(mutant, tree, args.named)
                with results.open("a") as file:
                    file.write(json.dumps({**asdict(mutant), "name": mutant.name, "outcome": outcome}) + "\n")
                what = f"{mutant.before!r} -> {mutant.after!r}"
                print(f"{number}/{len(chosen)} {outcome}  {mutant.file}:{mutant.line}  {what}", flush=True)
    counts = Counter(known[mutant.name] for mutant in chosen)
    share = 1 - counts["survived"] / max(len(chosen), 1)
    print(f"{len(chosen)} of {len(every)} changes, seed {args.seed}: {dict(counts)}, {share:.1%} found")
    return int(share < LEAST_SHARE)


def read(results: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the outcome of each change that was tried."""
    for line in results.read_text().splitlines() if results.exists() else ():
        tree = json.loads(line)
        yield tree["name"], tree["outcome"]


def mutants_of(part: str) -> Iterator[Mutant]:
    """Yield all changes of the files of a part."""
    places = [PACKAGE / place for place in PARTS[part]]
    for path in [path for place in places for path in ([place] if place.is_file() else sorted(place.rglob("*.py")))]:
        text = path.read_text()
        starts = [0]
        for line in text.encode().splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        for node, after in changes(ast.parse(text)):
            span = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            before = text.encode()[slice(*span)].decode()
            yield Mutant(str(path.relative_to(PACKAGE)), node.lineno, *span, before, after)


def changes(tree: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """Yield each node that is changed, with the text that takes its place.

    Annotations, decorators, docstrings and what an error says are left as they are.
    """
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.AnnAssign):
            yield from changes(child.value) if child.value is not None else ()
            yield from expression(child.value) if child.value is not None else ()
            continue
        decorators, kept = getattr(tree, "decorator_list", []), (getattr(tree, "returns", None),)
        if isinstance(child, ast.arg) or child in decorators or child in kept or is_for_types(child):
            continue
        if isinstance(child, ast.Raise):
            yield child, "pass"
            continue
        if isinstance(child, ast.stmt):
            yield from statement(child)
        if isinstance(child, ast.expr):
            yield from expression(child)
        if not is_text(child):
            yield from changes(child)


def is_for_types(node: ast.AST) -> bool:
    """Return whether a statement is only read by a checker of types."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def is_text(node: ast.AST) -> bool:
    """Return whether a statement is a docstring, or a node is text."""
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def statement(node: ast.stmt) -> Iterator[tuple[ast.stmt, str]]:
    """Yield a statement that is left out, or a result that is not returned."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield node, "pass"
    if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)):
        yield node, "pass"
    if isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield node, "return None"


def expression(node: ast.expr) -> Iterator[tuple[ast.expr, str]]:
    """Yield an expression with another operator, another constant, or without its negation."""
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            operators = [*node.ops[:place], SWAPS[type(operator)](), *node.ops[place + 1 :]]
            yield node, f"({ast.unparse(ast.Compare(node.left, operators, node.comparators))})"
    elif isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        yield node, f"({ast.unparse(ast.BinOp(node.left, SWAPS[type(node.op)](), node.right))})"
    elif isinstance(node, ast.BoolOp):
        yield node, f"({ast.unparse(ast.BoolOp(SWAPS[type(node.op)](), node.values))})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node, f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.IfExp):
        yield node, f"({ast.unparse(ast.IfExp(node.test, node.orelse, node.body))})"
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        yield node, repr(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.Name) and node.id in CALLS:
        yield node, CALLS[node.id]


def tests_of(file: str, tests: Path) -> list[str]:
    """Return the files of tests that name a module: first those named after it, then others of its room."""
    path = Path(file)
    module, room = f"offramp.{'.'.join(path.with_suffix('').parts)}", tests / path.parts[0]
    named = sorted(room.glob(f"test_{path.stem}.py"))
    named += [tests / each for each in FURTHER.get(file, ())]
    others = [each for each in sorted(room.glob("test_*.py")) if f"{module} import" in each.read_text()]
    found = dict.fromkeys((*named, *others)) or dict.fromkeys(sorted(room.glob("test_*.py")))
    return [str(each.relative_to(tests.parent)) for each in found]


def try_one(mutant: Mutant, tree: Path, named: bool) -> str:
    """Make one change in the copy, run its tests, and undo it. Returns `killed`, `timeout` or `survived`."""
    source = tree / "src" / "offramp" / mutant.file
    whole = source.read_bytes()
    source.write_bytes(whole[: mutant.start] + mutant.after.encode() + whole[mutant.end :])
    try:
        tests = tests_of(mutant.file, tree / "tests")
        outcome = outcome_of(tree, tests)
        if named:
            return outcome
        room = sorted((tree / "tests" / mutant.file.partition("/")[0]).glob("test_*.py"))
        rest = [each for each in (str(path.relative_to(tree)) for path in room) if each not in tests]
        return outcome_of(tree, rest) if outcome == "survived" and rest else outcome
    finally:
        source.write_bytes(whole)


def outcome_of(tree: Path, tests: list[str]) -> str:
    """Run tests in the copy until one fails, in a fork of this process, which has imported the libraries already."""
    output = tree / "output"
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            os.setsid()
            with output.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            code = run_tests(tree, tests)
        finally:
            os._exit(code)
    deadline = time.monotonic() + SECONDS
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    is_late = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    os.killpg(pid, signal.SIGKILL)  # what it has started, too
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if is_late:
        return "timeout"
    if code not in (0, 1, 2) and code > 0:
        sys.exit(f"pytest ended with {code}:\n{output.read_text(errors='replace')[-2000:]}")
    return "survived" if code == 0 else "killed"


def run_tests(tree: Path, tests: list[str]) -> int:
    """Run tests of the copy in this process, which has imported nothing of offramp but this file."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("offramp", "tests")]:
        del sys.modules[name]
    os.chdir(tree)
    sys.path[:0] = [str(tree / "src"), str(tree)]
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONPATH=str(tree / "src"), PYTHONDONTWRITEBYTECODE="1")
    return pytest.main(["-q", "-x", "--no-header", "-p", "no:cacheprovider", "-m", "not slow and not alone", *tests])


if __name__ == "__main__":
    sys.exit(main())

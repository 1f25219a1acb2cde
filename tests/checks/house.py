"""Count code lines and check the size limits of the house: `python -m tests.checks.house [--against COMMIT]`.

A code line is a line that is not blank, not a comment and not part of a docstring. All sources are formatted by ruff
first, also where they ask not to be, so that counts of two commits compare.
"""

import argparse
import ast
import io
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

MAX_BODY_LINES, MAX_PARAMETERS, MAX_METHODS = 40, 7, 20
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class House:
    """Facts about the sources of one commit."""

    code_lines: dict[str, int] = field(default_factory=dict)
    """File -> code lines."""
    long_functions: list[str] = field(default_factory=list)
    wide_functions: list[str] = field(default_factory=list)
    large_classes: list[str] = field(default_factory=list)
    manifest_checks: list[str] = field(default_factory=list)
    """`isinstance` of a manifest outside the room `store`."""

    @property
    def total(self) -> int:
        """Code lines of all files."""
        return sum(self.code_lines.values())


def docstrings(tree: ast.AST) -> Iterator[ast.Expr]:
    """Yield every string that stands alone as a statement: docstrings, those of attributes included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node


def code_lines(text: str, tree: ast.AST) -> set[int]:
    """Return the numbers of all code lines."""
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in docstrings(tree):
        found -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def num_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of parameters, `self` and `cls` excluded."""
    arguments = node.args
    names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def look(files: Mapping[str, str]) -> House:
    """Return the facts about these files, name -> text."""
    house = House()
    for name, text in sorted(files.items()):
        tree = ast.parse(text)
        lines = code_lines(text, tree)
        house.code_lines[name] = len(lines)
        for node in ast.walk(tree):
            look_at_node(house, name, node, lines)
    return house


def look_at_node(house: House, name: str, node: ast.AST, lines: set[int]) -> None:
    """Add what is to be said of one node."""
    if isinstance(node, FUNCTIONS):
        body = [line for line in lines if node.body[0].lineno <= line <= (node.end_lineno or 0)]
        where = f"{name}:{node.lineno} {node.name}"
        if len(body) > MAX_BODY_LINES:
            house.long_functions.append(f"{where}: {len(body)} lines")
        if num_parameters(node) > MAX_PARAMETERS:
            house.wide_functions.append(f"{where}: {num_parameters(node)} parameters")
    if isinstance(node, ast.ClassDef):
        methods = [each for each in node.body if isinstance(each, FUNCTIONS)]
        if len(methods) > MAX_METHODS:
            house.large_classes.append(f"{name}:{node.lineno} {node.name}: {len(methods)} methods")
    is_check = isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
    if is_check and "Manifest" in ast.unparse(node) and "/store/" not in name:
        house.manifest_checks.append(f"{name}:{node.lineno}")


def formatted(files: Mapping[str, str]) -> dict[str, str]:
    """Return the files as ruff formats them without exceptions."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace("# fmt: skip", "").replace("# fmt: off", ""))
        subprocess.run(
            [sys.executable, "-m", "ruff", "format", "--quiet", "--isolated", "--line-length=120", folder], check=True
        )
        return {name: Path(folder, name).read_text() for name in files}


def checked_out() -> dict[str, str]:
    """Return the sources of the working tree."""
    return {str(path): path.read_text() for path in Path("src").rglob("*.py")}


def committed(commit: str) -> dict[str, str]:
    """Return the sources of a commit."""
    data = subprocess.run(["git", "archive", commit, "src"], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = [member for member in archive.getmembers() if member.name.endswith(".py")]
        return {member.name: archive.extractfile(member).read().decode() for member in members}  # type: ignore[union-attr]


def main(argv: list[str] | None = None) -> int:
    """Print the facts as a Markdown table; end with 1 where a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", metavar="COMMIT", help="compare with the sources of this commit")
    args = parser.parse_args(argv)
    here = look(formatted(checked_out()))
    before = look(formatted(committed(args.against))) if args.against else None
    rows = [("code lines", lambda house: house.total)]
    for title in ("long_functions", "wide_functions", "large_classes", "manifest_checks"):
        rows.append((title.replace("_", " "), lambda house, title=title: len(getattr(house, title))))
    print("| figure | before | now |\n|---|---|---|")
    for title, figure in rows:
        print(f"| {title} | {figure(before) if before else '-'} | {figure(here)} |")
    if before:
        print(f"\ncode lines: {100 * (here.total / before.total - 1):+.1f} %")
    faults = [*here.long_functions, *here.wide_functions, *here.large_classes, *here.manifest_checks]
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

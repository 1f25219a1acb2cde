"""No regular expression of the house takes the square of a text: texts come from anybody."""

import ast
import re
import time
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
SEARCHING = ("search", "sub", "split", "findall", "finditer")
CALLS = ("compile", "match", "fullmatch", *SEARCHING)
LENGTH = 10_000
MOST_SECONDS = 0.1
"""A pattern that is linear takes less than a thousandth of a second, one that is quadratic half of one."""


def patterns():
    """Yield the place, the pattern, its flags and how it is used, of each call of `re` whose pattern is a constant."""
    for path in sorted(SOURCE.rglob("*.py")):
        code = path.read_text()
        tree = ast.parse(code)
        names = {node.value: node.targets[0] for node in ast.walk(tree) if isinstance(node, ast.Assign)}
        for node in ast.walk(tree):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS
            if not is_call or getattr(node.func.value, "id", "") != "re":
                continue
            try:
                text = ast.literal_eval(node.args[0])
            except ValueError:  # put together from parts
                continue
            name = getattr(names.get(node), "id", None)
            uses = {node.func.attr, *(use for use in CALLS if name and f"{name}.{use}" in code)}
            flags = re.MULTILINE if re.search(r"re\.M\b|MULTILINE", ast.unparse(node)) else 0
            use = "search" if uses & {*SEARCHING} else "match" if "match" in uses else "fullmatch"
            yield f"{path.relative_to(SOURCE)}:{node.lineno}", text, flags, use


def hostile_texts():
    """Yield texts of one letter or of two that alternate, alone and between others."""
    for part in (
        " ",
        "\n",
        "\t",
        "1",
        "a",
        "_",
        ".",
        "-",
        '"',
        '""',
        ",",
        "(",
        "=",
        "\\u",
        "1.",
        ". ",
        ", ",
        "a ",
        "[1",
    ):
        run = part * (LENGTH // len(part))
        yield from (run, run + "!", "1" + run + "!", '"' + run, "a" + run + "\0")


@pytest.fixture(scope="module")
def found():
    """All patterns: to read the sources takes seconds, which only the process that runs these tests should spend."""
    return list(patterns())


def test_no_pattern_takes_the_square_of_a_text(found):
    slow = []
    for place, text, flags, use in found:
        work = getattr(re.compile(text, flags), use)
        for hostile in hostile_texts():
            begin = time.process_time()
            work(hostile if isinstance(text, str) else hostile.encode())
            if time.process_time() - begin >= MOST_SECONDS:
                slow.append((place, hostile[:9]))
                break
    assert not slow


def test_the_patterns_are_found_and_a_quadratic_one_is_recognised(found):
    assert len(found) > 40
    begin = time.process_time()
    re.fullmatch(r"\s*[a-z]*\s*", " " * LENGTH + "!")
    assert time.process_time() - begin > MOST_SECONDS

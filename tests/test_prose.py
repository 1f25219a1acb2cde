"""The house language: docstrings that stand alone, and no word of the list in `prose_banned.txt`."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "offramp"
DOCUMENTS = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/*.md",
    "docs/decisions/*.md",
    "docs/results/*.md",
]
"""Documents that follow the rules, relative to the repository."""
MINIMUM_BANNED = 40
"""Lines of the word list. Raise it with the list, which only grows."""

FRAGMENT = re.compile(
    r"(Of|As|What|Who|Whose|Whom|Which|Where|When|Until|Whether|How|Because|If|So|Such|It|Its|They|Their|These|Those"
    r"|This|That|Them|Nobody|Somebody|Nothing|Everything|Others?|Some|Both|Not|Neither|For|With|Without|In|On|At|By|From"
    r"|To|Behind|Beside|Until when|The same|All (are|of|but)|None (are|of))\b"
)
ARTICLE = re.compile(r"(The|A|An)\b")
EXEMPT = "# prose:"


def banned():
    lines = (ROOT / "tests" / "prose_banned.txt").read_text().splitlines()
    return [line.partition(" => ")[0] for line in lines if line and not line.startswith("#")]


BANNED = re.compile(rf"(?<![\w-])({'|'.join(banned())})(?![\w-])", re.IGNORECASE)
BANNED_NAME = re.compile(
    r"(^|_)(saw|sure|sureness|foretold|foretell|lessons?|wayward|doubts?|bells?|nobody|somebody|unsettled|rehearse|settle"
    r"|tried|told|goes_on|may_go_on|give_back|bring_here|far_out|drawn_out|is_ours|lose)(_|$)",
    re.IGNORECASE,
)


def sources():
    return sorted(SOURCE.glob("**/*.py"))


def documents():
    return sorted({path for pattern in DOCUMENTS for path in ROOT.glob(pattern)})


def docstrings(tree):
    """Yield (line, kind, text) of all docstrings: of modules, classes, functions, and below attributes."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for index, statement in enumerate(body if isinstance(body, list) else []):
            text = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                yield statement.lineno, kind_of(node, index), text.value


def kind_of(node, index):
    if index or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return "noun"
    decorators = {
        each.attr if isinstance(each, ast.Attribute) else getattr(each, "id", "") for each in node.decorator_list
    }
    return "noun" if decorators & {"property", "cached_property"} else "verb"


def fragments(code):
    for line, kind, text in docstrings(ast.parse(code)):
        first = text.strip().split("\n")[0]
        if FRAGMENT.match(first):
            yield f"{line}: opens as a fragment: {first}"
        elif kind == "verb" and ARTICLE.match(first):
            yield f"{line}: say what the function does: {first}"


def prose(code):
    """Yield (line, text) of comments and of strings, docstrings and messages alike."""
    exempt = {number for number, line in enumerate(code.splitlines(), 1) if EXEMPT in line}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.lineno not in exempt:
            for offset, line in enumerate(node.value.split("\n")):
                yield node.lineno + offset, line
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT and token.start[0] not in exempt:
            yield token.start[0], token.string


def defined_names(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr


def unquoted(text):
    """A document without blocks of code."""
    return re.sub(r"^```.*?^```", lambda block: "\n" * block.group().count("\n"), text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_docstrings_names_comments_and_messages_are_plain(path):
    code = path.read_text()
    found = list(fragments(code))
    for line, text in prose(code):
        found += [f"{line}: banned: {match.group()!r} in {text.strip()!r}" for match in BANNED.finditer(text)]
    for line, name in defined_names(ast.parse(code)):
        found += [f"{line}: banned name: {name}"] * bool(BANNED_NAME.search(name))
    assert not found, f"{path}:\n" + "\n".join(found)


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_are_plain(path):
    lines = unquoted(path.read_text()).splitlines()
    found = [f"{number}: {match.group()!r}" for number, line in enumerate(lines, 1) for match in BANNED.finditer(line)]
    assert not found, f"{path}:\n" + "\n".join(found)


def test_every_listed_file_exists_and_the_word_list_only_grows():
    assert len(sources()) > 150
    assert all(list(ROOT.glob(pattern)) for pattern in DOCUMENTS)
    assert len(banned()) >= MINIMUM_BANNED


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('"""Of the module."""', "fragment"),
        ('def f():\n    """The same for a file."""', "fragment"),
        ('class A:\n    b = 1\n    """What states take."""', "fragment"),
        ('def f():\n    """Whether it fits."""', "fragment"),
        ('def f():\n    """The middle value."""', "does"),
        ('class A:\n    @property\n    def f(self):\n        """The middle value."""', None),
        ('def f():\n    """Return whether it fits."""', None),
        ('class A:\n    b = 1\n    """Size in bytes."""', None),
    ],
)
def test_the_check_finds_fragments(code, message):
    found = list(fragments(code))
    assert (not found) if message is None else (len(found) == 1 and message in found[0])


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("x = 1  # nobody asks", 1),
        ('raise ValueError(f"{x} is so many bytes elsewhere")', 2),
        ('"""Weights that somebody holds.\n\nIt goes on."""', 2),
        ('x = "sureness"  # prose: a name in old files', 0),
        ("x = 1  # no answer depends on it", 0),
    ],
)
def test_the_check_finds_banned_words(code, count):
    assert sum(len(BANNED.findall(text)) for _, text in prose(code)) == count


def test_the_check_finds_banned_names():
    code = "def saw_layer(sureness_B):\n    self.may_go_on = bells = 1\nclass Tried: ...\nsawtooth = resure = 1"
    found = [name for _, name in defined_names(ast.parse(code)) if BANNED_NAME.search(name)]
    assert sorted(found) == ["Tried", "bells", "may_go_on", "saw_layer", "sureness_B"]

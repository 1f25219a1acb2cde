"""Every place of src/offramp that refuses something, found by the syntax tree, and what it advises.

A place is a call that makes an error: of a class of `offramp.errors`, of a built-in class, or of argparse. Texts are
resolved as far as the tree tells: constants, names assigned in the function or the module, both sides of a condition,
results of functions, and arguments of all callers; `{}` stands for the rest.
"""

import ast
import itertools
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from offramp import errors

SOURCE = Path(errors.__file__).parent
OURS = {name for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, errors.OfframpError)}
BUILT_IN = {"ValueError", "TypeError", "RuntimeError", "AttributeError", "OSError", "ArgumentTypeError"}
BUILT_IN |= {"ArgumentError", "WrongError"}
PASSED_AS = {("errors.py", "kind"), ("store/exits.py", "error")}
"""(file, name) of variables that hold a class of `offramp.errors`."""
_IMPERATIVE = "call|choose|combine|give|install|name|omit|pass|run|set|use|write"
ADVICE = re.compile(rf"(?:^|[:;,] |- |\bor )(?:{_IMPERATIVE})\b|\blike '|--[a-z]|\w\([\w\[\], ]+\)|\binstead\b|\?$")
"""What tells advice from a bare statement in the message of a built-in error, which has no part for a remedy."""
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_MOST = 24
"""Maximum number of texts that one expression is resolved to."""


@dataclass(frozen=True)
class Place:
    """One call that makes an error."""

    file: str
    function: str
    first: int
    last: int
    kind: str
    what: str
    remedies: tuple
    """Texts of the remedy, with {} for what is computed; empty if it advises nothing of its own."""

    @property
    def key(self):
        return f"{self.file}: {self.what}"

    @property
    def room(self):
        return self.file.partition("/")[0].removesuffix(".py")


class Module:
    """One file: its nodes with their parents."""

    def __init__(self, file, text):
        self.file, self.tree, self.parents = file, ast.parse(text), {}
        for node in ast.walk(self.tree):
            for child in ast.iter_child_nodes(node):
                self.parents[child] = node

    def functions_around(self, node):
        """The functions that contain a node, the innermost first."""
        while node in self.parents:
            node = self.parents[node]
            if isinstance(node, _FUNCTIONS):
                yield node

    def block_of(self, node):
        """The list of statements that a node is in, as (its owner, the name of the list)."""
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        owner = self.parents[node]
        return owner, next(name for name, value in ast.iter_fields(owner) if isinstance(value, list) and node in value)

    def blocks_around(self, node):
        """All lists of statements around a node."""
        while node in self.parents:
            if isinstance(node, ast.stmt):
                yield self.block_of(node)
            node = self.parents[node]

    def classes_around(self, node):
        while node in self.parents:
            node = self.parents[node]
            if isinstance(node, ast.ClassDef):
                yield node.name


def name_of(node):
    """The last name of `a.b.c` or `c`, or None."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


class House:
    """All files of a folder, and the places in them."""

    def __init__(self, folder=SOURCE):
        files = sorted(folder.rglob("*.py"))
        self.modules = [Module(str(path.relative_to(folder)), path.read_text()) for path in files]
        self._calls, self._defs, self._constants = defaultdict(list), defaultdict(list), defaultdict(list)
        for module in self.modules:
            for node in ast.walk(module.tree):
                if isinstance(node, ast.Call):
                    self._calls[name_of(node.func)].append((module, node))
                elif isinstance(node, ast.FunctionDef):
                    self._defs[node.name].append((module, node))
            for node in module.tree.body:
                for name, value in _assigned(node):
                    self._constants[name].append((module, value))

    @cached_property
    def places(self):
        """All places, in the order of files and lines."""
        found = [self._place(module, node) for module in self.modules for node in ast.walk(module.tree)]
        found = sorted((place for place in found if place is not None), key=lambda each: (each.file, each.first))
        seen = defaultdict(list)
        for place in found:
            seen[place.key].append(place)
        return [_distinct(place, seen[place.key]) for place in found]

    def _place(self, module, node):
        if not isinstance(node, ast.Call):
            return None
        kind, arguments = name_of(node.func), [each for each in node.args if not isinstance(each, ast.Starred)]
        inside = next((each.name for each in module.functions_around(node) if hasattr(each, "name")), "")
        is_parser = kind == "error" and isinstance(node.func, ast.Attribute) and _is_parser(node.func.value)
        is_ours = kind in OURS or (module.file, kind) in PASSED_AS
        if not (is_ours or is_parser or kind in BUILT_IN) or (not arguments and kind in BUILT_IN):
            return None
        if isinstance(node.func, ast.Name) and inside == "__init__" and kind == "super":
            return None
        if kind == "MissingExtraError":
            what, remedies = "{} is not installed", ("pip install 'offramp[{}]'",)
        elif is_ours:
            what = self._joined(arguments[0], module)
            given = [each.value for each in node.keywords if each.arg == "remedy"] or arguments[2:3]
            remedies = tuple(self.texts(given[0], module)) if given else ()
        else:
            number = 1 if kind == "ArgumentError" else 0
            what = self._joined(arguments[number], module) if len(arguments) > number else "{}"
            remedies = (what,) if ADVICE.search(what) and kind != "WrongError" else ()
        last = node.end_lineno
        return Place(module.file, inside, node.lineno, last, kind, what, tuple(r for r in remedies if r.strip()))

    def _joined(self, node, module):
        """The text of a message; names in f-strings stay `{}`, so that keys are short."""
        return " | ".join(self.texts(node, module, expands=False)) or "{}"

    def texts(self, node, module, expands=True, depth=0):
        """Return the texts that an expression may have, in order."""
        found = list(dict.fromkeys(self._texts(node, module, expands, depth)))
        return found if len(found) <= _MOST else ["{}"]

    def _texts(self, node, module, expands, depth):
        again = (module, expands, depth + 1)
        if depth > 8:
            return ["{}"]
        if isinstance(node, ast.Constant):
            return [] if node.value is None else [str(node.value)]
        if isinstance(node, ast.JoinedStr):
            parts = [self._part(each, *again) for each in node.values]
            return ["".join(each) for each in itertools.islice(itertools.product(*parts), _MOST + 1)]
        if isinstance(node, ast.IfExp):
            return self.texts(node.body, *again) + self.texts(node.orelse, *again)
        if isinstance(node, ast.BoolOp):
            return [text for each in node.values for text in self.texts(each, *again)]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self.texts(node.left, *again), self.texts(node.right, *again)
            return [one + other for one in left for other in right]
        if isinstance(node, ast.Name):
            return self._named(node, module, expands, depth)
        if isinstance(node, ast.Attribute):
            return [] if node.attr == "remedy" else self._constant(node.attr, None, expands, depth)
        if isinstance(node, ast.Call):
            return self._returned(node, expands, depth)
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.value, ast.Name)
            and isinstance(node.slice, ast.Constant)
        ):
            return self._element(node, module, expands, depth)
        return ["{}"]

    def _element(self, node, module, expands, depth):
        """The texts of `name[index]`, where the name is the result of a function that returns tuples."""
        found = []
        for function in module.functions_around(node):
            for value in self._reaching(node.value, function, module):
                for home, each in self._defs[name_of(value.func)] if isinstance(value, ast.Call) else ():
                    returned = (inner.value for inner in ast.walk(each) if isinstance(inner, ast.Return))
                    tuples = (inner for inner in returned if isinstance(inner, ast.Tuple))
                    found += [
                        text
                        for inner in tuples
                        for text in self.texts(inner.elts[node.slice.value], home, expands, depth + 1)
                    ]
        return found or ["{}"]

    def _part(self, node, module, expands, depth):
        if isinstance(node, ast.Constant):
            return [node.value]
        inner = node.value
        if (
            expands
            and node.conversion == -1
            and isinstance(inner, (ast.Name, ast.IfExp))
            and not self._is_given(inner, module)
        ):
            return [text or "" for text in self.texts(inner, module, expands, depth)] or [""]
        return ["{}"]

    def _is_given(self, node, module):
        """Whether a node is the name of a parameter."""
        functions = module.functions_around(node)
        return any(each.arg == getattr(node, "id", "") for function in functions for each in _parameters(function))

    def _named(self, node, module, expands, depth):
        again = (module, expands, depth + 1)
        for function in module.functions_around(node):
            values = self._reaching(node, function, module)
            parameters = [each.arg for each in (*function.args.posonlyargs, *function.args.args)]
            if node.id in (each.arg for each in _parameters(function)):
                given = (
                    [] if not hasattr(function, "name") else self._given(function, parameters, node.id, depth, expands)
                )
                values = [each for value in values for each in _choices(value) if not _uses(each, node.id)]
                found = [text for value in values for text in self.texts(value, *again)]
                return (given + found) or ["{}"]
            if values:
                return [text for value in values for text in self.texts(value, *again)]
        return self._constant(node.id, module, expands, depth)

    def _reaching(self, node, function, module):
        """The values that a name may have where it is used: the last assignment in a block around it, and those in
        other blocks since.
        """
        found = [
            (inner.lineno, module.block_of(inner), value)
            for inner in ast.walk(function)
            for name, value in _assigned(inner)
            if name == node.id and inner.lineno <= node.lineno
            if next(module.functions_around(inner), None) is function
        ]
        around = set(module.blocks_around(node))
        last = max((line for line, block, _ in found if block in around), default=0)
        return [value for line, _, value in found if line >= last]

    def _given(self, function, parameters, name, depth, expands):
        """The texts of an argument: of all calls of functions of this name, and the default."""
        place = parameters.index(name) if name in parameters else None
        is_method = bool(parameters) and parameters[0] in ("self", "cls")
        found, defaults = [], function.args.defaults
        home = next(module for module, each in self._defs[function.name] if each is function)
        if place is not None and place >= len(parameters) - len(defaults):
            found += self.texts(defaults[place - len(parameters)], home, expands, depth + 1)
        called = self._calls[next(home.classes_around(function))] if function.name == "__init__" else ()
        for module, call in called or self._calls[function.name]:
            values = [each.value for each in call.keywords if each.arg == name]
            if not values and place is not None and len(call.args) > place - is_method:
                values = [call.args[place - is_method]]
            found += [text for value in values for text in self.texts(value, module, expands, depth + 1)]
        return found

    def _constant(self, name, module, expands, depth):
        values = [pair for pair in self._constants[name] if module is None or pair[0] is module]
        values = values or self._constants[name]
        homes = {home.file for home, _ in values}
        if len(homes) != 1:
            return ["{}"]
        return [text for home, value in values for text in self.texts(value, home, expands, depth + 1)]

    def _returned(self, node, expands, depth):
        """The texts that the functions of this name return."""
        found = []
        for module, function in self._defs[name_of(node.func)] if isinstance(node.func, ast.Name) else ():
            for inner in ast.walk(function):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    found += self.texts(inner.value, module, expands, depth + 1)
        return found or ["{}"]


def _parameters(function):
    return (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)


def _assigned(node):
    """Yield (name, value) of an assignment; tuples in pairs, and both sides of a condition of tuples."""
    if isinstance(node, ast.AnnAssign) and node.value is not None and isinstance(node.target, ast.Name):
        yield node.target.id, node.value
    for target in node.targets if isinstance(node, ast.Assign) else ():
        if isinstance(target, ast.Name):
            yield target.id, node.value
        for values in _tuples(node.value) if isinstance(target, ast.Tuple) else ():
            unknown = [ast.Tuple([])] * len(target.elts)
            pairs = zip(target.elts, values if len(values) == len(target.elts) else unknown, strict=True)
            yield from ((name_of(each) or "", value) for each, value in pairs)
    if isinstance(node, ast.NamedExpr):
        yield node.target.id, node.value


def _tuples(node):
    if isinstance(node, ast.IfExp):
        yield from (*_tuples(node.body), *_tuples(node.orelse))
    else:
        yield node.elts if isinstance(node, ast.Tuple) else []


def _choices(node):
    return node.values if isinstance(node, ast.BoolOp) else [node]


def _uses(node, name):
    return any(isinstance(each, ast.Name) and each.id == name for each in ast.walk(node))


def _is_parser(node):
    return "parser" in ast.unparse(node).lower()


def _distinct(place, same):
    """Add the function, and the number in it, to a message that several places of a file have."""
    if len(same) == 1:
        return place
    inside = [each for each in same if each.function == place.function]
    number = f" {inside.index(place) + 1}" if len(inside) > 1 else ""
    return Place(**{**vars(place), "what": f"{place.what} [{place.function}{number}]"})

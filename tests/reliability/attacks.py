"""Hostile inputs: what is changed in an honest place, and which answers it may then give."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .sealed import RAW, Sealed

HONEST, FREE = "honest", "free"
"""Answers of a hostile input that is not refused: those of the honest one, or others, where it describes another model
that is as good as the honest one (other weights, another activation)."""


@dataclass(frozen=True)
class Attack:
    """One input: `make` changes a copy of the honest place."""

    kind: str
    """Class of attack."""
    name: str
    base: str
    """Honest place that it changes."""
    make: Callable[[Path], None]
    reads: str = "store"
    """Folder or file that it changes: verbs that read it are tried."""
    verbs: tuple[str, ...] = ()
    """Verbs that read what it changes; empty: those that read `reads`."""
    is_legal: bool = False
    """Whether the edit is a legal twin, which must run with the answers that `answers` names."""
    answers: str = HONEST

    @property
    def key(self) -> str:
        """Name among all attacks."""
        return f"{self.kind}/{self.base}/{self.name}"


def drawn(items: Iterable[Any], number: int, seed: str) -> list[Any]:
    """Return so many items in their order, the same each time; all, if there are not more."""
    found = list(items)
    if len(found) <= number:
        return found
    places = random.Random(zlib.crc32(seed.encode())).sample(range(len(found)), number)
    return [found[place] for place in sorted(places)]


NUMBERS: list[Any] = [
    -1, 0, 1, 2, 7, 1000, 10**6, 2**24, 2**31 - 1, 2**31, 2**40, 2**53, 2**53 + 1, 2**63, 10**18,
    2 * 10**19, 1.5, -0.0, True, None, "1", [], {}, RAW + "1e400", RAW + "NaN", RAW + "-Infinity",
    RAW + "1" + "0" * 5000, RAW + "1e-320",
]  # fmt: skip
STRINGS: list[Any] = [
    "", "x", "x" * 200, "x" * 70000, "9" * 5000, " " * 100_000 + "x.py", "con\x9b2J",
    "../canary/secret.bin", "/etc/passwd", "a/b", "graphs/x", "con\x1b[2J\x07", "\x00",
    "\u202ereversed", "\ud800", "offramp: error: forged\nofframp: error: line", "%s{0}", "NaN", "OFFRAMP.JSON", 7, None,
    ["a"], {"v": "a"}, True,
]  # fmt: skip
LISTS: list[Any] = [None, {}, "text", 7, [], [None], [[]], RAW + "[" * 3000 + "]" * 3000]
OBJECTS: list[Any] = [None, [], "text", 7, {}, {"unknown": 1}, RAW + '{"a":' * 3000 + "1" + "}" * 3000]


def mutations(tree: Any) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
    """Yield (name, path, new value) for each group of places of a tree: its first place and its last.

    A group has the same keys, and any indices.
    """
    groups: dict[str, list[tuple[Any, ...]]] = {}
    for path, _ in nodes(tree):
        groups.setdefault("/".join("*" if isinstance(part, int) else str(part) for part in path), []).append(path)
    for group, paths in groups.items():
        for which, path in {"first": paths[0], "last": paths[-1]}.items():
            if which == "last" and len(paths) == 1:
                continue
            for index, value in enumerate(values_for(at(tree, path))):
                yield f"{group[-80:]}:{which}:{index}", path, value


def nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the path and the value of all parts of a tree but itself."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield (*path, key), value
        yield from nodes(value, (*path, key))


REMOVED = object()
"""A value that stands for the absence of its key."""


def values_for(value: Any) -> list[Any]:
    """Return hostile values in place of a value."""
    if isinstance(value, dict):
        renamed = {f"{key}\u200b": inner for key, inner in value.items()}
        less = dict(list(value.items())[1:])
        return [REMOVED, *OBJECTS, {**value, "unknown": None}, renamed, less]
    if isinstance(value, list):
        return [REMOVED, *LISTS, value * 2, value[::-1], value[:-1], value * 300, [*value, None]]
    if isinstance(value, bool):
        return [REMOVED, not value, None, 0, "true", []]
    return [REMOVED, *(NUMBERS if isinstance(value, (int, float)) else STRINGS)]


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    """Return the part of a tree at a path."""
    for key in path:
        tree = tree[key]
    return tree


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Set, or remove, the part of a tree at a path, in place. Returns the tree."""
    parent = at(tree, path[:-1])
    if value is REMOVED:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return tree


def manifest_edit(path: tuple[Any, ...], value: Any) -> Callable[[Path], None]:
    """Return the edit of a manifest at a path."""

    def make(place: Path) -> None:
        with Sealed(place / "store") as sealed:
            changed(sealed.tree, path, value)

    return make


def json_edit(file: str, path: tuple[Any, ...], value: Any) -> Callable[[Path], None]:
    """Return the edit of a JSON file at a path; of a store's file, with its digests."""
    from .sealed import plain_json

    def make(place: Path) -> None:
        data = plain_json(changed(json.loads((place / file).read_bytes()), path, value))
        replace_file(place, file, data)

    return make


def replace_file(place: Path, file: str, data: bytes) -> None:
    """Write a file of a place; of a store's file, with its digests."""
    if file.startswith("store/"):
        with Sealed(place / "store") as sealed:
            sealed.write(file.partition("/")[2], data)
    else:
        (place / file).write_bytes(data)

"""Hostile model folders: configurations, weights, indexes, pickles, links and pipes."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .attacks import FREE, Attack, drawn, json_edit, mutations
from .side_files import BLOBS, packed

Make = Callable[[Path], None]


def attacks(honest: Path, number: int) -> Iterator[Attack]:
    """Yield the directed folders, and so many edits of single keys for each JSON file."""
    for base in ("names", "captured", "image"):
        for name, make in directed(honest / base):
            yield Attack("model folder", name, base, make, "model", answers=FREE)
        for name, make in LEGAL:
            yield Attack("model folder", name, base, make, "model", is_legal=True, answers=FREE)
        for file in sorted(path.name for path in (honest / base / "model").glob("*.json")):
            tree = json.loads((honest / base / "model" / file).read_bytes())
            for name, path, value in drawn(mutations(tree), number, file):
                make = json_edit(f"model/{file}", path, value)
                yield Attack("model folder key", f"{file} {name}", base, make, "model", answers=FREE)


def directed(folder: Path) -> Iterator[tuple[str, Make]]:
    """Yield the directed changes of a model folder."""
    weights = "model/model.safetensors"
    for file in sorted(path.name for path in (folder / "model").iterdir()):
        for name, place_it in _in_its_place().items():
            yield f"{file} is {name}", _replaced(f"model/{file}", place_it)
        for name, data in BLOBS:
            yield f"{file}: {name}", _replaced(f"model/{file}", lambda path, data=data: path.write_bytes(data))
    for name, facts in HEADERS:
        yield f"weights {name}", _header(weights, facts)
    for name, data in PICKLES():
        yield f"pickle {name}", _pickled(data)
    for name, tree in INDEXES.items():
        yield f"index {name}", _index(tree)
    for name, change in CONFIGS.items():
        yield f"config {name}", _config(change)


def _in_its_place() -> dict[str, Callable[[Path], Any]]:
    """Return what takes the place of a file, by name."""
    return {
        "a pipe": os.mkfifo,
        "a folder": lambda path: path.mkdir(),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a link to a pipe": _link_to_pipe,
        "a link to a device": lambda path: path.symlink_to("/dev/zero"),
        "a link to nothing": lambda path: path.symlink_to("nowhere"),
        "absent": lambda path: None,
    }


def _link_to_pipe(path: Path) -> None:
    os.mkfifo(path.parent.parent / "pipe")
    path.symlink_to("../pipe")


def _replaced(file: str, put: Callable[[Path], Any]) -> Make:
    def make(place: Path) -> None:
        (place / file).unlink()
        put(place / file)

    return make


def _header(file: str, change: Callable[[dict[str, Any]], Any]) -> Make:
    def make(place: Path) -> None:
        data = (place / file).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = change(json.loads(data[8 : 8 + length]))
        (place / file).write_bytes(packed(header, data[8 + length :]))

    return make


def _first(**facts: Any) -> Callable[[dict[str, Any]], Any]:
    def change(header: dict[str, Any]) -> Any:
        header[next(key for key in header if key != "__metadata__")].update(facts)
        return header

    return change


def _renamed(name: str) -> Callable[[dict[str, Any]], Any]:
    def change(header: dict[str, Any]) -> Any:
        key = next(key for key in header if key != "__metadata__")
        return {name if other == key else other: value for other, value in header.items()}

    return change


def _with_more(shape: list[int]) -> Callable[[dict[str, Any]], Any]:
    more = {"more": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    return lambda header: {**more, **header}


HEADERS: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    *(
        (f"first tensor {facts}", _first(**facts))
        for facts in (
            {"shape": [2**40]},
            {"shape": []},
            {"shape": [-1]},
            {"shape": [1.5]},
            {"shape": "x"},
            {"dtype": "X"},
            {"dtype": None},
            {"dtype": "I8"},
            {"data_offsets": [0, 2**40]},
            {"data_offsets": [-8, 8]},
            {"data_offsets": [8, 0]},
            {"data_offsets": []},
            {"unknown": 1},
            {"shape": [1] * 100},
        )
    ),
    *(
        (f"a name {name[:12]!r}", _renamed(name))
        for name in ("", "\x1b[2J", "../x", "x" * 100000, "\ud800", "bert.embeddings", "classifier.weight")
    ),
    *((f"a tensor more of {shape}", _with_more(shape)) for shape in ([0, 1 << 50, 1 << 50], [0] * 33, [0, 1 << 53])),
    ("nothing", lambda header: {}),
    ("a list", lambda header: []),
    ("no JSON", lambda header: b"\xff" * 100),
    ("metadata of numbers", lambda header: {**header, "__metadata__": {"format": 7}}),
    ("open lists", lambda header: b"[" * 100000),
    (
        "10^5 tensors",
        lambda header: {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(10**5)},
    ),
]


class _Evil:
    """An object whose unpickling would write a file."""

    def __init__(self, *call: Any) -> None:
        self._call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call[0], tuple(self._call[1:])


def PICKLES() -> Iterator[tuple[str, bytes]]:
    """Yield pickles that run code, or that are none."""
    yield "that writes", pickle.dumps(_Evil(os.system, "touch canary/pickled"))
    yield "that evaluates", pickle.dumps({"weight": _Evil(eval, "open('canary/pickled', 'w')")})
    yield "that imports", b"cantigravity\nfly\n."
    yield "that opens", pickle.dumps(_Evil(open, "canary/pickled", "w"))
    yield "nested", b"(" * 100000 + b"."
    yield "of memory", b"\x80\x02" + b"]" + b"(" * 10 + b"I99999999999\n." * 3
    yield "that is none", b"hello"


def _pickled(data: bytes) -> Make:
    """Return the change that replaces the weights by a pickle, as torch writes one."""

    def make(place: Path) -> None:
        (place / "model/model.safetensors").unlink()
        with zipfile.ZipFile(place / "model/pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")

    return make


INDEXES: dict[str, Any] = {
    "out of the folder": {"weight_map": {"a": "../canary/secret.safetensors"}},
    "absolute": {"weight_map": {"a": "/etc/passwd"}},
    "itself": {"weight_map": {"a": "model.safetensors.index.json"}},
    "nothing": {"weight_map": {}},
    "no map": {"weight_map": 7},
    "a list": [],
    "numbers": {"weight_map": {"a": 7}},
    "many": {"weight_map": {f"t{n}": "model.safetensors" for n in range(200000)}},
}


def _index(tree: Any) -> Make:
    def make(place: Path) -> None:
        (place / "model/model.safetensors").rename(place / "model/model-00001.safetensors")
        (place / "model/model.safetensors.index.json").write_text(json.dumps(tree))

    return make


CONFIGS: dict[str, dict[str, Any]] = {
    **{
        f"{key} {value}": {key: value}
        for key in ("image_size", "embedding_size", "intermediate_size")
        for value in (10**5, 2**24)
    },
    **{key: {key: 10**6} for key in ("inner_group_num", "num_hidden_groups", "num_hidden_layers", "n_layers")},
    "depths": {"depths": [10**6, 1, 1, 1]},
    "positions": {"max_position_embeddings": 2**24},
    "a vocabulary": {"vocab_size": 2**31 - 1},
}
"""Name -> keys of config.json, to which the weights do not fit."""


def _config(change: dict[str, Any]) -> Make:
    def make(place: Path) -> None:
        path = place / "model/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    return make


def _linked(place: Path) -> None:
    """Put the files elsewhere, with links to them: as the cache of the hub does."""
    (place / "model").rename(place / "blobs")
    (place / "model").mkdir()
    for path in (place / "blobs").iterdir():
        (place / "model" / path.name).symlink_to(f"../blobs/{path.name}")


LEGAL: list[tuple[str, Make]] = [
    ("unchanged", lambda place: None),
    ("of links", _linked),
    ("with a file more", lambda place: (place / "model/README.md").write_text("hello")),
    (
        "with spaces in the header",
        _header("model/model.safetensors", lambda header: json.dumps(header).encode() + b" " * 80),
    ),
]

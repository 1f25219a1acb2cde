"""Edits of a store that fix up what an attacker would: sizes, digests, and the seal of the manifest."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RAW = "\x00raw:"
"""Beginning of a string that is written into the manifest as it stands, without quotation marks."""


class Sealed:
    """Context manager of the manifest of a store, as a tree; written and sealed at the end."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.tree: dict[str, Any] = json.loads((store / "offramp.json").read_bytes())
        self.tree.pop("sha256", None)

    def __enter__(self) -> Sealed:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            write_sealed(self.store, self.tree)

    @property
    def program(self) -> dict[str, Any]:
        """The program of the manifest."""
        return self.tree["program"]

    def steps(self) -> Iterator[dict[str, Any]]:
        """Yield the steps that are not parts of a repeat."""
        for stage in self.program["stages"]:
            yield from (step for step in stage.get("steps", ()) if "kernel" in step)

    def entries(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the objects of the manifest that describe a file."""
        waiting: list[Any] = [self.tree]
        while waiting:
            node = waiting.pop()
            if isinstance(node, dict):
                if node.get("file") == name and "sha256" in node:
                    yield node
                waiting += node.values()
            elif isinstance(node, list):
                waiting += node

    def write(self, name: str, data: bytes) -> None:
        """Replace a file of the store, or its companions, with its size and digest."""
        path = self.store / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        found = list(self.entries(name))
        for entry in found:
            entry.update(facts)
        if not found:
            self.tree["files"].append({"file": name, **facts})

    def read(self, name: str) -> bytes:
        """Return a file of the store."""
        return (self.store / name).read_bytes()

    def shard(self, name: str) -> dict[str, Any]:
        """Return the description of a shard."""
        return next(each for each in self.tree["shards"] if each.get("name") == name)

    def rewrite_header(self, shard: dict[str, Any]) -> None:
        """Write the header of a shard anew from its tensors in the manifest, with the digests of its blocks."""
        old = self.read(shard["file"])
        entries = {
            each["name"]: {
                "dtype": each["dtype"], "shape": each["shape"],
                "data_offsets": [each["offset"], each.get("end", each["offset"])],
            }
            for each in shard["tensors"]
        }  # fmt: skip
        sizes = {name: entry["data_offsets"] for name, entry in safetensors_header(old).items() if name in entries}
        for name, entry in entries.items():
            entry["data_offsets"] = sizes.get(name, entry["data_offsets"])
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
        room = shard["data_start"] - 8
        data = struct.pack("<Q", room) + text[:room].ljust(room) + old[shard["data_start"] :]
        self.write(shard["file"], data)
        if shard.get("blocks"):
            self.write(shard["blocks"]["file"], block_digests(data))


def block_digests(data: bytes) -> bytes:
    """Return the digests of the blocks of a shard from which rows are gathered."""
    size = 64 << 10
    return b"".join(hashlib.sha256(data[start : start + size]).digest() for start in range(0, len(data), size))


def safetensors_header(data: bytes) -> dict[str, Any]:
    """Return the header of a safetensors file without its metadata."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return header


def plain_json(tree: Any) -> bytes:
    """Return JSON with an indentation of one, in which strings that begin with RAW stand as they are."""
    text = json.dumps(tree, indent=1)
    return re.sub(r'"\\u0000raw:((?:[^"\\]|\\.)*)"', lambda found: json.loads(f'"{found[1]}"'), text).encode(
        "utf-8", "surrogatepass"
    )


def write_sealed(store: Path, tree: Any) -> None:
    """Write a manifest with its seal."""
    body = plain_json(tree)[: -len("\n}")] + b",\n "
    seal = b'"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'
    (store / "offramp.json").write_bytes(body + seal)

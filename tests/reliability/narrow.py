"""Hostile stores of integers, of half floats and of blocks: attributes of kernels, and the numbers in their tensors."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .attacks import FREE, HONEST, Attack
from .sealed import RAW, Sealed, block_digests

Edit = Callable[[Sealed], None]
INT8_BASES = ("int8", "rotated", "int8-captured", "int8-blocked")
BASES = (*INT8_BASES, "fp16", "blocked")
"""Stores that `honest` makes for these attacks."""
FLOATS = {
    "NaN": math.nan, "inf": math.inf, "-inf": -math.inf, "zero": 0.0, "negative": -1.0, "subnormal": 1e-42,
    "the largest": 3.4e38, "minus the largest": -3.4e38, "-0": -0.0,
}  # fmt: skip
CHANNELS = {
    "negative": -1,
    "too large": 10**6,
    "beyond 32 bits": 1 << 40,
    "the most": (1 << 63) - 1,
    "the least": -(1 << 63),
}


def attacks() -> Iterator[Attack]:
    """Yield the hostile stores and their legal twins."""
    for name, base, edit, answers in _directed():
        yield Attack("narrow store", name, base, _made(edit), answers=answers)
    for name, base, edit, answers in _legal():
        yield Attack("narrow store", name, base, _made(edit), is_legal=True, answers=answers)


def _made(edit: Edit) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        with Sealed(place / "store") as sealed:
            edit(sealed)

    return make


def _attribute(name: str, value: Any) -> Edit:
    """Return the edit of an attribute of each kernel that has it, or an ending of one."""

    def edit(sealed: Sealed) -> None:
        found = 0
        for kernel in sealed.program["kernels"].values():
            for key in kernel["attributes"]:
                if key == name or key.endswith("." + name):
                    kernel["attributes"][key] = value
                    found += 1
        assert found, f"no attribute {name}"

    return edit


def _added(template: str, **attributes: Any) -> Edit:
    """Return the edit that gives all kernels of a template more attributes."""

    def edit(sealed: Sealed) -> None:
        kernels = [each for each in sealed.program["kernels"].values() if each["template"] == template]
        assert kernels, f"no kernel {template}"
        for kernel in kernels:
            kernel["attributes"].update(attributes)

    return edit


def _filled(ending: str, code: str, value: Any, which: slice = slice(None)) -> Edit:
    """Return the edit that fills tensors whose names or roles end so with one number, and mends the digests."""

    def edit(sealed: Sealed) -> None:
        found = 0
        for shard in sealed.tree["shards"]:
            data = bytearray(sealed.read(shard["file"]))
            for tensor in shard["tensors"]:
                if not (tensor["name"].endswith(ending) or tensor["role"].endswith(ending)):
                    continue
                start, count = shard["data_start"] + tensor["offset"], math.prod(tensor["shape"])
                size = struct.calcsize(code)
                for place in range(count)[which]:
                    struct.pack_into("<" + code, data, start + place * size, value)
                found += 1
            sealed.write(shard["file"], bytes(data))
            if shard.get("blocks"):
                sealed.write(shard["blocks"]["file"], block_digests(bytes(data)))
        assert found, f"no tensor {ending}"

    return edit


def _retyped(ending: str, dtype: str, scale: int) -> Edit:
    """Return the edit of the dtype of tensors whose names or roles end so, with the last axis times 1/scale."""

    def edit(sealed: Sealed) -> None:
        found = 0
        for shard in sealed.tree["shards"]:
            hits = [t for t in shard["tensors"] if t["name"].endswith(ending) or t["role"].endswith(ending)]
            for tensor in hits:
                tensor["dtype"] = dtype
                tensor["shape"][-1] //= scale
                found += 1
            if hits:
                sealed.rewrite_header(shard)
        assert found, f"no tensor {ending}"

    return edit


def _swapped(ending: str) -> Edit:
    """Return the edit that reverses the axes of tensors, whose bytes remain."""

    def edit(sealed: Sealed) -> None:
        for shard in sealed.tree["shards"]:
            for tensor in shard["tensors"]:
                if tensor["role"].endswith(ending) or tensor["name"].endswith(ending):
                    tensor["shape"].reverse()
            sealed.rewrite_header(shard)

    return edit


def _moved(by: int) -> Edit:
    """Return the edit of the offset of the second tensor of each shard: it overlaps the first, or leaves a gap."""

    def edit(sealed: Sealed) -> None:
        for shard in sealed.tree["shards"]:
            for tensor in shard["tensors"][1:2]:
                tensor["offset"] += by

    return edit


def _shaped(shape: list[int]) -> Edit:
    def edit(sealed: Sealed) -> None:
        shard = next(each for each in sealed.tree["shards"] if len(each["tensors"]) > 1)
        shard["tensors"][0]["shape"] = shape

    return edit


def _repeated(count: int, first: list[Any], second: list[Any]) -> Edit:
    """Return the edit that lists a repeat in place of the shards of the first step that has some."""

    def edit(sealed: Sealed) -> None:
        step = next(each for each in sealed.steps() if each["shards"])
        step["shards"] = [{"repeat": count, "first": first, "second": second}]

    return edit


def _nothing(sealed: Sealed) -> None:
    """Change nothing but the seal."""


def _directed() -> Iterator[tuple[str, str, Edit, str]]:
    for base in ("rotated", "int8-captured"):
        for value in (0, -1, 3, 7, 128, 2**20, 2**52, 10**30, 1.5, True, None, "2", [2], RAW + "1e400", 64, 32):
            yield f"rotation {str(value)[:20]}", base, _attribute("rotation", value), FREE
    for value in (-1, 0, 255, 256, 2**40, 1.5, None, True, RAW + "-0", "128"):
        yield f"zero point {value}", "rotated", _attribute("zero_point", value), FREE
    for value in (-1, 0, 1, 2, 15, 17, 2**40, 1.5, None, True):
        yield f"exact {value}", "rotated", _attribute("exact", value), HONEST
    for value in (2, -1, None, True, 0.0):
        yield f"transposed {value}", "int8-captured", _attribute("transposed", value), HONEST
    for name, value in CHANNELS.items():
        yield f"exact inputs {name}", "rotated", _filled(".channels", "q", value), FREE
        yield f"one exact input {name}", "rotated", _filled(".channels", "q", value, slice(0, 1)), FREE
    for base in INT8_BASES:
        for name, value in FLOATS.items():
            yield f"scales {name}", base, _filled(".scale", "f", value), FREE
        yield "scale NaN, one", base, _filled(".scale", "f", math.nan, slice(0, 1)), FREE
        yield "integers of -128", base, _filled(".weight", "b", -128, slice(0, 8)), FREE
        yield "layout reversed", base, _swapped(".weight"), FREE
        yield "scales of F16", base, _retyped(".scale", "F16", 1), HONEST
        yield "integers of U8", base, _retyped(".weight", "U8", 1), HONEST
        yield "floats for integers", base, _retyped(".weight", "F32", 4), HONEST
    for name, value in FLOATS.items():
        if abs(value) < 6e4 or value != value or math.isinf(value):
            yield f"halves {name}", "fp16", _filled("weight", "e", value, slice(0, 32)), FREE
    for base in BASES:
        for by in (-64, 64, 1, 2**40, -(2**40)):
            yield f"second tensor moved by {by}", base, _moved(by), HONEST
        for shape in ([2**32, 2**32], [2**53, 2**53, 2**53], [0, 2**53], [0], [1] * 63, [2**52] * 64):
            yield f"shape {str(shape)[:30]}", base, _shaped(shape), FREE
    for count in (10**5, 10**6, 5 * 10**6, 2**53):
        for first, second in (([0], [0]), ([0], [1]), (["a0"], ["a1"]), ([], []), ([{}], [{}]), ([[]], [[]])):
            yield f"repeat {count} of {first}, {second}", "names", _repeated(count, first, second), HONEST
    for name in ("most_outputs", "outputs", "head_size", "num_inputs", "width"):
        for value in (0, 1, 3, 2**20, 2**52, None):
            for base in ("blocked", "int8-blocked"):
                allowed = FREE if (name, value) == ("head_size", 1) else HONEST  # smaller heads are another model
                if name != "outputs":
                    yield f"{name} {value}", base, _attribute(name, value), allowed
    yield "rows x", "blocked", _attribute("rows", "x"), HONEST
    yield "rows batch", "blocked", _attribute("rows", "batch"), HONEST
    yield "activation of a block", "blocked", _attribute("activation", "exec"), HONEST
    yield "rotation of up", "int8", _added("up-int8", rotation=2), FREE
    yield "rotation of down", "rotated", _added("down-int8", rotation=2), HONEST
    yield "zero point of up", "rotated", _added("up-int8", zero_point=1), HONEST


def _legal() -> Iterator[tuple[str, str, Edit, str]]:
    for base in BASES:
        yield "sealed again", base, _nothing, HONEST
    yield "another zero point", "rotated", _attribute("zero_point", 100), FREE
    yield "a smaller rotation", "rotated", _attribute("rotation", 2), FREE
    for base in INT8_BASES:
        yield "small scales", base, _filled(".scale", "f", 0.001), FREE
    yield "exact inputs, the first", "rotated", _filled(".channels", "q", 0, slice(0, 1)), FREE

"""Hostile manifests, with sizes, digests and seal fixed up: `verify` of files alone would find nothing wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .attacks import FREE, HONEST, Attack, drawn, manifest_edit, mutations
from .sealed import RAW, Sealed

EDITED = ("names", "captured", "image", "arrays", "format1", "format2")
OTHER_MODEL = re.compile(
    r"norm_epsilon|num_heads|activation(:|$)|head_activation|position_offset|pad_token|num_token_types|max_length"
    r"|^program/lookups/[^/]*/(input|table)|/weights/|/constants/|/reads/|problem|/shape:|/offset|exit:|/dtype"
    r"|/exits?(:|/)|labels|^exits|^tensors|attributes|form"
)
"""Keys whose other values can describe another model that is valid."""
ENGINE = (
    "run",
    "run-numpy",
    "run-torch",
    "run-batch",
    "plan",
    "plan-torch",
    "ls",
    "verify",
    "memory",
    "profile",
    "bench",
)
Edit = Callable[[Sealed], None]


def attacks() -> Iterator[Attack]:
    """Yield the directed edits and their legal twins."""
    for name, base, edit, answers in DIRECTED:
        yield Attack("manifest", name, base, _made(edit), answers=answers)
    for name, base, edit, answers in LEGAL:
        verbs = ENGINE if "control characters" in name else ()  # transformers would look for the name
        yield Attack("manifest", name, base, _made(edit), verbs=verbs, is_legal=True, answers=answers)


def drawn_attacks(honest: Path, number: int) -> Iterator[Attack]:
    """Yield edits of single keys: so many of each store."""
    for base in EDITED:
        tree = json.loads((honest / base / "store/offramp.json").read_bytes())
        tree.pop("sha256")
        for name, path, value in drawn(mutations(tree), number, base):
            answers = FREE if OTHER_MODEL.search(name) else HONEST
            yield Attack("manifest key", name, base, manifest_edit(path, value), answers=answers)


def _made(edit: Edit) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        with Sealed(place / "store") as sealed:
            edit(sealed)

    return make


def _kernel(template: str, **attributes: Any) -> Edit:
    """Return the edit of the attributes of all kernels of a template."""

    def edit(sealed: Sealed) -> None:
        for kernel in sealed.program["kernels"].values():
            if kernel["template"] == template:
                kernel["attributes"].update(attributes)

    return edit


def _texts(**facts: Any) -> Edit:
    return lambda sealed: sealed.program["texts"].update(facts)


def _labels(labels: Any) -> Edit:
    def edit(sealed: Sealed) -> None:
        sealed.write("labels.json", labels if isinstance(labels, bytes) else json.dumps(labels).encode())

    return edit


def _layers(sealed: Sealed) -> list[dict[str, Any]]:
    return [stage for stage in sealed.program["stages"] if stage.get("role") == "layer"]


def _repeat(count: Any, group: Any = None, second: Any = None) -> Edit:
    """Return the edit that adds a repeat of stages."""

    def edit(sealed: Sealed) -> None:
        stages = sealed.program["stages"]
        first = group or [{**_layers(sealed)[0], "name": "layer.10"}]
        again = second or json.loads(json.dumps(first).replace("layer.10", "layer.11"))
        stages.insert(2, {"repeat": count, "first": first, "second": again})

    return edit


def _nested_repeat(depth: int, equal: bool = True) -> Edit:
    """Return the edit to repeats within repeats; with equal copies their text doubles with each."""

    def edit(sealed: Sealed) -> None:
        group: list[Any] = [{"x": 0}]
        for _ in range(depth):
            group = [{"repeat": 1000, "first": group, "second": group if equal else [{"x": 0}]}]
        sealed.program["stages"] = group

    return edit


def _first_shard(**facts: Any) -> Edit:
    return lambda sealed: sealed.tree["shards"][0].update(facts)


def _first_tensor(**facts: Any) -> Edit:
    def edit(sealed: Sealed) -> None:
        shard = next(each for each in sealed.tree["shards"] if each["tensors"])
        shard["tensors"][0].update(facts)
        if "name" not in facts:
            sealed.rewrite_header(shard)

    return edit


def _sparse(size: int) -> Edit:
    """Return the edit that makes a shard of the given apparent size: a hole."""

    def edit(sealed: Sealed) -> None:
        shard = sealed.tree["shards"][0]
        with (sealed.store / shard["file"]).open("r+b") as file:
            file.truncate(size)
        shard["bytes"] = size
        shard["tensors"][-1]["shape"] = [size // 4]

    return edit


def _many_steps(count: int) -> Edit:
    def edit(sealed: Sealed) -> None:
        step = _layers(sealed)[0]["steps"][0]
        _layers(sealed)[0]["steps"] += [step] * count

    return edit


def _rename_tensor(name: str) -> Edit:
    """Return the edit that renames a tensor wherever the manifest and its shard name it: names are free."""

    def edit(sealed: Sealed) -> None:
        shard = next(each for each in sealed.tree["shards"] if each["tensors"] and not each["blocks"])
        old = shard["tensors"][0]["name"]
        data = sealed.read(shard["file"])
        text = json.dumps(sealed.tree).replace(json.dumps(old), json.dumps(name))
        sealed.tree = json.loads(text)
        room = 8 + int.from_bytes(data[:8], "little")
        header = data[8:room].replace(json.dumps(old).encode(), json.dumps(name).encode())
        header = header.rstrip().ljust(len(data[8:room]))[: room - 8]
        sealed.write(shard["file"], data[:8] + header + data[room:])

    return edit


def _reorder(sealed: Sealed) -> None:
    sealed.program["stages"].reverse()


def _write_before_read(sealed: Sealed) -> None:
    steps = list(sealed.steps())
    key = next(iter(steps[1]["reads"]))
    steps[1]["reads"][key] = next(iter(steps[-1]["writes"]))


def _largest(sealed: Sealed) -> None:
    for value in sealed.program["inputs"].values():
        value["largest"] = [2**40 for _ in value["axes"]]


def _wide_values(sealed: Sealed) -> None:
    for step in sealed.steps():
        for value in step["writes"].values():
            value["axes"] = [axis if isinstance(axis, str) else 2**30 for axis in value["axes"]]


def _drop(*path: Any) -> Edit:
    def edit(sealed: Sealed) -> None:
        node = sealed.tree
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]

    return edit


def _unlisted_file(sealed: Sealed) -> None:
    (sealed.store / "extra.json").write_text("{}")


def _old_kernels(sealed: Sealed) -> None:
    """Remove the graphs: kernels of text encoders are derived, or run in NumPy and PyTorch."""
    sealed.tree["graphs"] = {}


_WIDE = 4096
DIRECTED: list[tuple[str, str, Edit, str]] = [
    *((f"num_heads {n}", "names", _kernel("attention", num_heads=n), FREE) for n in (0, 3, 8, 16, 384, 2**31, -4)),
    *((f"hidden_size {n}", "names", _kernel("attention", hidden_size=n), HONEST) for n in (0, 8, 17, 2**31, 2**52)),
    *((f"intermediate {n}", "names", _kernel("up", intermediate_size=n), HONEST) for n in (0, 2**20, 2**52)),
    *((f"epsilon {e}", "names", _kernel("attention", norm_epsilon=e), FREE) for e in (0, -1, RAW + "1e308", 1, "0")),
    *((f"activation {a!r}", "names", _kernel("up", activation=a), FREE) for a in ("relu", "exec", "", None, "\x1b[2J")),
    *((f"vocab_size {n}", base, _texts(vocab_size=n), HONEST) for n in (0, 1, 18, 10**9, 2**52) for base in EDITED[:2]),
    *((f"max_length {n}", base, _texts(max_length=n), FREE) for n in (0, 1, 41, 10**9, 2**52) for base in EDITED[:2]),
    *((f"pad_token {n}", base, _texts(pad_token=n), FREE) for n in (1, 16, 17, 10**6, 2**52) for base in EDITED[:2]),
    *((f"token types {n}", "names", _texts(num_token_types=n), FREE) for n in (0, 1, 3, 10**9)),
    *((f"offset {n}", "names", _texts(position_offset=n), FREE) for n in (1, 30, 10**9, 2**52)),
    ("equal labels", "names", _labels(["red", "red", "blue"]), FREE),
    ("empty labels", "names", _labels(["", "", ""]), FREE),
    ("labels that forge lines", "names", _labels(["a\nofframp: error: x", "\x1b[2Jb", "\u202ec"]), FREE),
    ("labels of 8 MiB", "names", _labels(["x" * (8 << 20), "y", "z"]), FREE),
    ("labels that are numbers", "names", _labels([1, 2, 3]), HONEST),
    ("labels nested deeply", "names", _labels(b"[" * 100000 + b"]" * 100000), HONEST),
    ("labels that are an object", "names", _labels({"0": "a", "1": "b", "2": "c"}), HONEST),
    ("labels too many", "names", _labels([str(n) for n in range(200000)]), HONEST),
    ("labels not UTF-8", "names", _labels(b'["\xff\xfe", "b", "c"]'), HONEST),
    *((f"repeat {n}", "names", _repeat(n), HONEST) for n in (-1, 0, 1, 3, 1000, 5000, 10**6, 2**53, 10**30, 1.5, "3")),
    ("repeat unlike copies", "names", _repeat(5, [{"a": 1}], [{"b": 1}]), HONEST),
    ("repeat huge numbers", "names", _repeat(5, [{"a": 10**14}], [{"a": 10**15 - 1}]), HONEST),
    ("repeat text", "names", _repeat(200000, ["x" * 4000], ["x" * 4000]), HONEST),
    *((f"repeats nested {n}", base, _nested_repeat(n), HONEST) for n in (2, 5, 12) for base in EDITED[:2]),
    *((f"unlike repeats nested {n}", "names", _nested_repeat(n, equal=False), HONEST) for n in (50, 300)),
    *((f"steps {n}", base, _many_steps(n), HONEST) for n in (1, 1000, 5000) for base in EDITED[:2]),
    ("stages in reverse", "names", _reorder, HONEST),
    ("stages in reverse", "captured", _reorder, HONEST),
    ("reads before written", "names", _write_before_read, HONEST),
    ("reads before written", "captured", _write_before_read, HONEST),
    *(("largest inputs", base, _largest, HONEST) for base in ("captured", "image", "arrays")),
    *(("wide values", base, _wide_values, HONEST) for base in ("names", "captured", "image", "arrays")),
    *(
        (f"activation bytes {n}", base, lambda sealed, n=n: sealed.program.update(activation_bytes=n), HONEST)
        for n in (0, 2**40, 2**53)
        for base in ("captured", "arrays")
    ),
    *(
        (f"example {n}", base, lambda sealed, n=n: sealed.program.update(example=[n, n]), HONEST)
        for n in (0, 2**26, 2**53)
        for base in ("captured", "arrays")
    ),
    *(
        (f"shard file {name!r}", base, _first_shard(file=name), HONEST)
        for name in ("../canary/secret.bin", "/etc/passwd", "graphs/../offramp.json", "offramp.json", ".hidden", "a\0b")
        for base in ("names", "captured")
    ),
    *((f"shard bytes {n}", "names", _first_shard(bytes=n), HONEST) for n in (0, 8, 4095, 2**40, 2**53)),
    *((f"data start {n}", "names", _first_shard(data_start=n), HONEST) for n in (0, 1, 4097, 8192, 2**21, 2**40)),
    *(
        (f"tensor shape {s}", base, _first_tensor(shape=s), FREE)
        for s in ([2**40], [0], [1] * 64, [1] * 65, [2**31, 2**31], [-1], [])
        for base in ("names", "captured")
    ),
    *(
        (f"tensor dtype {d}", base, _first_tensor(dtype=d), FREE)
        for d in ("I32", "U32", "F16", "F64", "F8_E4M3", "BOOL", "X")
        for base in ("names", "captured")
    ),
    *((f"tensor offset {n}", "names", _first_tensor(offset=n), HONEST) for n in (4, 64, 2**40, -64)),
    ("tensor listed twice", "names", lambda sealed: sealed.tree["shards"].append(sealed.tree["shards"][0]), HONEST),
    *((f"hole of {n >> 30} GiB", "names", _sparse(n), HONEST) for n in (4 << 30, 1 << 42)),
    *(
        (
            f"output {key} {value!r}",
            "names",
            lambda sealed, key=key, value=value: sealed.program["output"].update({key: value}),
            FREE,
        )
        for key, value in (
            ("num_labels", 2),
            ("num_labels", 10**6),
            ("num_labels", 2**52),
            ("value", "mask"),
            ("value", ""),
            ("problem", "regression"),
            ("problem", None),
            ("problem", "x"),
        )
    ),
    *(
        (f"without {'.'.join(path)}", base, _drop(*path), HONEST)
        for path in (("program", "texts"), ("exits",), ("labels",), ("graphs",), ("proof",), ("program", "kernels"))
        for base in ("names", "captured")
    ),
    (
        "graph of two GiB",
        "captured",
        lambda sealed: [g.update(bytes=2 << 30) for g in sealed.tree["graphs"].values()],
        HONEST,
    ),
    (
        "opset of the future",
        "captured",
        lambda sealed: [g.update(opset=10**6) for g in sealed.tree["graphs"].values()],
        HONEST,
    ),
    ("files that differ in case", "names", lambda sealed: sealed.write("CONFIG.json", b"{}"), HONEST),
    ("file named like the manifest", "names", lambda sealed: sealed.write("Offramp.json", b"{}"), HONEST),
    *(
        ("a tensor of control characters, cut", base, _first_tensor(name="\x1b[2J\x07offramp: error"), HONEST)
        for base in ("names", "captured")
    ),
]
"""Name, store, edit, and the answers that it may give."""

LEGAL: list[tuple[str, str, Edit, str]] = [
    *(("sealed again", base, lambda sealed: None, HONEST) for base in EDITED),
    *(
        ("a tensor of control characters", base, _rename_tensor("w\x1b[2J\x07"), HONEST)
        for base in ("names", "captured")
    ),
    *(("a file that is not listed", base, _unlisted_file, HONEST) for base in EDITED),
    *(("a companion more", base, lambda sealed: sealed.write("notes.txt", b"hello"), HONEST) for base in EDITED),
    ("another epsilon", "names", _kernel("attention", norm_epsilon=1e-6), FREE),
    ("another activation", "names", _kernel("up", activation="relu"), FREE),
    ("2 heads", "names", _kernel("attention", num_heads=2), FREE),
    ("other labels", "names", _labels(["a", "b", "c"]), FREE),
    ("long labels", "names", _labels(["a" * 3000, "b", "c"]), FREE),
    ("shorter texts", "names", _texts(max_length=20), HONEST),
    ("a smaller padding", "captured", _texts(pad_token=1), FREE),
    ("other facts on the source", "names", lambda sealed: sealed.tree["source"].update(model_type="xyz"), HONEST),
]
"""Near-identical edits that are legal."""

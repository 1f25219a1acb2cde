"""Hostile files beside the weights: exits, tokenizers, configurations, policies, device profiles and transcripts."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .attacks import FREE, HONEST, Attack, drawn, json_edit, mutations, replace_file
from .sealed import RAW, plain_json

STORED = {
    "names": (
        "exits.json",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "offramp_tokenizer.json",
        "labels.json",
        "trained-rows.json",
    ),
    "captured": ("exits.json", "tokenizer.json", "config.json"),
    "image": ("config.json", "preprocessor_config.json", "exits.json"),
}
"""Kind of model -> JSON files of its store."""
Tree = Any


def attacks(honest: Path, number: int) -> Iterator[Attack]:
    """Yield the directed files and so many drawn edits of single keys for each file."""
    for name, file, change, answers in DIRECTED:
        for base in ("names", "captured") if file != "exits.safetensors" else ("names",):
            yield Attack("side file", f"{file} {name}", base, _changed(f"store/{file}", change), answers=answers)
    for name, file, change, answers in LEGAL:
        yield Attack(
            "side file", f"{file} {name}", "names", _changed(f"store/{file}", change), is_legal=True, answers=answers
        )
    for base, files in STORED.items():
        for file in files:
            for name, make in drawn(_edits(honest / base, f"store/{file}"), number, file):
                yield Attack("side file key", f"{file} {name}", base, make, answers=FREE)
    yield from _beside(honest, number)


def _beside(honest: Path, number: int) -> Iterator[Attack]:
    """Yield hostile policies, profiles and transcripts."""
    for file in ("policy.json", "profile.json"):
        for name, make in drawn(_edits(honest / "names", file), 4 * number, file):
            yield Attack(file, name, "names", make, file, answers=FREE)
        yield Attack(file, "written again", "names", _changed(file, lambda tree: tree), file, is_legal=True)
    for name, make in drawn(_edits(honest / "names", "profile.json"), number, "tune"):
        yield Attack("profile for tune", name, "names", make, verbs=("tune",), answers=FREE)
    for name, make in drawn(_edits(honest / "names", "transcripts/tune.json"), 2 * number, "transcript"):
        yield Attack("transcript", name, "names", make, verbs=("tune",), answers=FREE)
    for name, change in TRANSCRIPTS:
        yield Attack("transcript", name, "names", _transcript(change), verbs=("tune",), answers=FREE)
    yield Attack(
        "transcript", "written again", "names", _transcript(lambda header, data: data), verbs=("tune",), is_legal=True
    )
    for name, data in BLOBS:
        for file, reads in (("policy.json",) * 2, ("profile.json",) * 2, ("transcripts/tune.json", "store")):
            yield Attack(
                "bytes",
                f"{file} {name}",
                "names",
                lambda place, file=file, data=data: (place / file).write_bytes(data),
                reads,
                ("tune",) if reads == "store" else (),
                answers=FREE,
            )
        for base, files in STORED.items():
            for file in files:
                yield Attack(
                    "bytes",
                    f"{file} {name}",
                    base,
                    lambda place, file=file, data=data: replace_file(place, f"store/{file}", data),
                    answers=FREE,
                )


def _edits(folder: Path, file: str) -> Iterator[tuple[str, Callable[[Path], None]]]:
    if not (folder / file).exists():
        return
    for name, path, value in mutations(json.loads((folder / file).read_bytes())):
        yield name, json_edit(file, path, value)


def _changed(file: str, change: Callable[[Tree], Tree]) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        path = place / file
        tree = json.loads(path.read_bytes()) if path.exists() and path.suffix == ".json" else {}
        if file.endswith(".safetensors"):
            replace_file(place, file, change(path.read_bytes()))
        else:
            replace_file(place, file, plain_json(change(tree)))

    return make


def _set(*path: Any, value: Any) -> Callable[[Tree], Tree]:
    def change(tree: Tree) -> Tree:
        node = tree
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        return tree

    return change


def _padding(strategy: Any, multiple: int | None = None) -> Callable[[Tree], Tree]:
    value = {"strategy": strategy, "pad_to_multiple_of": multiple, "direction": "Right"}
    return _set("padding", value={**value, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"})


BLOBS = [
    ("empty", b""),
    ("null", b"null"),
    ("a number", b"7"),
    ("noise", bytes(range(256)) * 8),
    ("spaces", b" " * (4 << 20)),
    ("open lists", b"[" * 500000),
    ("open objects", b'{"a":' * 200000),
    ("a long number", b'{"format": ' + b"9" * 200000 + b"}"),
    ("UTF-16", '{"format": 1}'.encode("utf-16")),
    ("duplicate keys", b'{"format": 1, "format": 2}'),
    ("NaN", b'{"format": NaN}'),
    ("empty lists", b"[" + b"[]," * (3 << 20) + b"0]"),
    ("names", b"{" + b",".join(b'"%x":0' % number for number in range(1 << 20)) + b"}"),
    ("a wide letter", '{"format": "\U0001f600'.encode() + b"a" * (8 << 20) + b'"}'),
]


def _exits(exits: Any) -> tuple[str, str, Callable[[Tree], Tree], str]:
    return f"exits {str(exits)[:30]}", "exits.json", _set("exits", value=exits), HONEST


def _growing(tree: Tree, count: int, content: str = "aa", pattern: str = "a") -> Tree:
    """Give a tokenizer normalisers that each make a text longer."""
    replace = {"type": "Replace", "pattern": {"String": pattern}, "content": content}
    tree["normalizer"] = {"type": "Sequence", "normalizers": [replace] * count}
    return tree


def _nested(kind: str, key: str, depth: int) -> Tree:
    tree: Tree = {"type": "Lowercase"} if kind == "Sequence" and key == "normalizers" else {"type": "Whitespace"}
    for _ in range(depth):
        tree = {"type": kind, key: [tree]}
    return tree


def _template(tree: Tree, count: int) -> Tree:
    """Give a tokenizer a post-processor that adds the text again and again."""
    part = {"Sequence": {"id": "A", "type_id": 0}}
    tree["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [part] * count,
        "pair": [part] * count,
        "special_tokens": {},
    }
    return tree


def _many_tokens(tree: Tree, count: int) -> Tree:
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tree["added_tokens"] = [{"id": 17 + n, "content": f"tok{n}", **token} for n in range(count)]
    return tree


def _file_of_exits(change: Callable[[dict[str, Any], bytes], bytes]) -> Callable[[bytes], bytes]:
    def make(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        return change(json.loads(data[8 : 8 + length]), data[8 + length :])

    return make


def packed(header: Any, data: bytes) -> bytes:
    """Return a safetensors file."""
    text = header if isinstance(header, bytes) else plain_json(header)
    return struct.pack("<Q", len(text)) + text + data


def _with_first(**facts: Any) -> Callable[[bytes], bytes]:
    def change(header: dict[str, Any], data: bytes) -> bytes:
        name = next(key for key in header if key != "__metadata__")
        header[name].update(facts)
        return packed(header, data)

    return _file_of_exits(change)


def _with_more(shape: list[int]) -> Callable[[bytes], bytes]:
    """Return the change that adds a tensor without elements before the others."""
    more = {"more": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    return _file_of_exits(lambda header, data: packed({**more, **header}, data))


EVIL_REGEX = "(a|a)*b|(.*)*x|(?:(?:a{0,99}){0,99}){0,99}"
DIRECTED: list[tuple[str, str, Callable[[Any], Any], str]] = [
    *map(
        _exits,
        (
            [1, 1, 1, 1, 1],
            [-1],
            [1, 2, 3, 4, 99],
            [],
            [2, 1],
            [1.0, 2.0],
            ["1", "2"],
            "12",
            None,
            {},
            list(range(2_000_000)),
            [0, 1],
            [True, 2],
            [1, [2]],
        ),
    ),
    *(
        (f"form {form!r}", "exits.json", _set("form", value=form), FREE if form == "cls-linear" else HONEST)
        for form in ("own", "cls-linear", "x", None, ["own"], {})
    ),
    *(
        (f"trained {value!r}", "exits.json", _set("trained", value=value), HONEST)
        for value in (False, None, "yes", 1, [])
    ),
    *(
        (f"points {str(value)[:30]}", "exits.json", _set("points", value=value), HONEST)
        for value in (
            [["a", 1, 1 << 40]],
            [["a", -1, 1]] * 200000,
            {"a": 1},
            [1],
            [["\x1b[2J", 1, 16]],
            [["a", "1", "16"]],
        )
    ),
    *(
        (f"weights_sha256 {value!r}", "exits.json", _set("weights_sha256", value=value), HONEST)
        for value in ("x", 7, None)
    ),
    *(
        (
            f"growth {count} x {content[:5]}",
            "tokenizer.json",
            lambda tree, count=count, content=content: _growing(tree, count, content),
            HONEST,
        )
        for count, content in ((20, "aa"), (31, "aa"), (40, "aaaa"), (3, "a" * 100000))
    ),
    ("growth of spaces", "tokenizer.json", lambda tree: _growing(tree, 40, "  ", " "), HONEST),
    (
        "growth by Prepend",
        "tokenizer.json",
        _set(
            "normalizer", value={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "x" * 10**6}] * 50}
        ),
        HONEST,
    ),
    (
        "a regular expression of exponential time",
        "tokenizer.json",
        _set("normalizer", value={"type": "Replace", "pattern": {"Regex": EVIL_REGEX}, "content": ""}),
        HONEST,
    ),
    (
        "a split of exponential time",
        "tokenizer.json",
        _set(
            "pre_tokenizer",
            value={"type": "Split", "pattern": {"Regex": "(e+e+)+x"}, "behavior": "Isolated", "invert": False},
        ),
        HONEST,
    ),
    (
        "a broken regular expression",
        "tokenizer.json",
        _set(
            "pre_tokenizer",
            value={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False},
        ),
        HONEST,
    ),
    *(
        (
            f"normalisers nested {depth}",
            "tokenizer.json",
            _set("normalizer", value=_nested("Sequence", "normalizers", depth)),
            HONEST,
        )
        for depth in (5, 60, 120)
    ),
    *(
        (
            f"pre-tokenisers nested {depth}",
            "tokenizer.json",
            _set("pre_tokenizer", value=_nested("Sequence", "pretokenizers", depth)),
            HONEST,
        )
        for depth in (5, 60, 120)
    ),
    (
        "5000 normalisers",
        "tokenizer.json",
        _set("normalizer", value={"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "NFKC"}] * 2500}),
        HONEST,
    ),
    (
        "a precompiled map",
        "tokenizer.json",
        _set("normalizer", value={"type": "Precompiled", "precompiled_charsmap": "AAAA" * 9}),
        HONEST,
    ),
    (
        "padding to 10^9",
        "tokenizer.json",
        _padding({"Fixed": 10**9}),
        HONEST,
    ),
    (
        "padding to a multiple of 10^9",
        "tokenizer.json",
        _padding("BatchLongest", 10**9),
        HONEST,
    ),
    *(
        (
            f"truncation {length} stride {stride}",
            "tokenizer.json",
            _set(
                "truncation",
                value={"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": stride},
            ),
            HONEST,
        )
        for length, stride in ((0, 0), (2, 5), (10**9, 1))
    ),
    *(
        (f"a template of {count}", "tokenizer.json", lambda tree, count=count: _template(tree, count), HONEST)
        for count in (0, 2, 1000, 200000)
    ),
    *(
        (f"{count} added tokens", "tokenizer.json", lambda tree, count=count: _many_tokens(tree, count), FREE)
        for count in (10, 100000)
    ),
    ("a token with the id 2^31", "tokenizer.json", _set("model", "vocab", "red", value=2**31), FREE),
    ("a token with a negative id", "tokenizer.json", _set("model", "vocab", "red", value=-1), FREE),
    ("two tokens with one id", "tokenizer.json", _set("model", "vocab", "red", value=0), FREE),
    (
        "a vocabulary of 10^6",
        "tokenizer.json",
        lambda tree: _set(
            "model", "vocab", value={**tree["model"]["vocab"], **{f"w{n}": n % 17 for n in range(10**6)}}
        )(tree),
        FREE,
    ),
    ("words of any length", "tokenizer.json", _set("model", "max_input_chars_per_word", value=2**60), FREE),
    ("a prefix of 10^6", "tokenizer.json", _set("model", "continuing_subword_prefix", value="#" * 10**6), FREE),
    ("an unknown token that is none", "tokenizer.json", _set("model", "unk_token", value="nowhere"), HONEST),
    (
        "a model without words",
        "tokenizer.json",
        _set("model", value={"type": "WordLevel", "vocab": {}, "unk_token": "x"}),
        HONEST,
    ),
    (
        "a Unigram of odd scores",
        "tokenizer.json",
        _set("model", value={"type": "Unigram", "unk_id": 0, "vocab": [["a", RAW + "1e39"]] * 9}),
        FREE,
    ),
    (
        "a Unigram without words",
        "tokenizer.json",
        _set("model", value={"type": "Unigram", "unk_id": 7, "vocab": []}),
        HONEST,
    ),
    (
        "a BPE of odd merges",
        "tokenizer.json",
        _set("model", value={"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]] * 99}),
        HONEST,
    ),
    *(
        (
            f"auto_map in {file}",
            file,
            _set("auto_map", value={"AutoModel": "evil.Model", "AutoTokenizer": ["evil.T", None]}),
            FREE,
        )
        for file in ("config.json", "tokenizer_config.json")
    ),
    ("model_type of a list", "config.json", _set("model_type", value=["bert"]), HONEST),
    *(
        (f"architectures {str(value)[:20]}", "config.json", _set("architectures", value=value), HONEST)
        for value in ([], None, "Bert", [7], ["\x1b[2J"], ["os.system"])
    ),
    *(
        (f"{key} {str(value)[:12]}", "config.json", _set(key, value=value), FREE)
        for key in (
            "hidden_size",
            "num_hidden_layers",
            "vocab_size",
            "id2label",
            "problem_type",
            "num_labels",
            "torch_dtype",
        )
        for value in (2**40, -1, "x", None, [], {"0": ["x"]}, {str(n): "x" for n in range(50000)})
    ),
    *(
        (f"tokenizer_class {str(value)[:12]}", "tokenizer_config.json", _set("tokenizer_class", value=value), FREE)
        for value in ("os", "BertJapaneseTokenizer", ["x"], 7, "../canary/secret", "x" * 100000)
    ),
    *(
        (f"model_max_length {str(value)[:9]}", "tokenizer_config.json", _set("model_max_length", value=value), FREE)
        for value in (-1, 0, 10**30, "7", None, RAW + "NaN", [])
    ),
    *(
        (f"tokenizer {value!r}", "offramp_tokenizer.json", _set("tokenizer", value=value), FREE)
        for value in ("../canary/secret.json", "/etc/passwd", "offramp.json", "nowhere.json", 7, None, "config.json")
    ),
    *(
        (f"max_length {value!r}", "offramp_tokenizer.json", _set("max_length", value=value), FREE)
        for value in (-1, 0, 1, 2**60, "7", None)
    ),
    *(
        (f"first tensor {facts}", "exits.safetensors", _with_first(**facts), HONEST)
        for facts in (
            {"shape": [2**40, 2**40]},
            {"shape": []},
            {"dtype": "I64"},
            {"dtype": "F64"},
            {"shape": [0, 16]},
            {"data_offsets": [0, 1 << 40]},
            {"data_offsets": [-8, 0]},
            {"data_offsets": [64, 0]},
        )
    ),
    *(
        (f"a tensor more of {shape}", "exits.safetensors", _with_more(shape), HONEST)
        for shape in ([0, 1 << 50, 1 << 50], [0] * 33, [0, 1 << 53])
    ),
    ("no tensors", "exits.safetensors", lambda data: packed({}, b""), HONEST),
    ("a header of 2^60", "exits.safetensors", lambda data: struct.pack("<Q", 1 << 60) + data[8:], HONEST),
    (
        "100000 tensors",
        "exits.safetensors",
        lambda data: packed(
            {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100000)}, b""
        ),
        HONEST,
    ),
]
"""Name, file, change of its tree or bytes, and the answers that it may give."""

LEGAL: list[tuple[str, str, Callable[[Any], Any], str]] = [
    ("written again", "exits.json", lambda tree: tree, HONEST),
    ("with a name more", "config.json", _set("_name_or_path", value="hello"), HONEST),
    ("written again", "tokenizer.json", lambda tree: tree, HONEST),
    (
        "two normalisers",
        "tokenizer.json",
        lambda tree: _set(
            "normalizer", value={"type": "Sequence", "normalizers": [tree["normalizer"], {"type": "NFC"}]}
        )(tree),
        HONEST,
    ),
    (
        "with padding to 128",
        "tokenizer.json",
        _padding({"Fixed": 128}),
        HONEST,
    ),
    (
        "with truncation to 128",
        "tokenizer.json",
        _set("truncation", value={"direction": "Right", "max_length": 128, "strategy": "LongestFirst", "stride": 0}),
        HONEST,
    ),
    ("without a limit", "tokenizer_config.json", _set("model_max_length", value=10**30), HONEST),
    (
        "with spaces",
        "exits.safetensors",
        _file_of_exits(lambda header, data: packed(plain_json(header) + b" " * 64, data)),
        HONEST,
    ),
]
"""Near-identical files that are legal."""


def _transcript(change: Callable[[dict[str, Any], bytes], bytes]) -> Callable[[Path], None]:
    """Return the edit of the data of a transcript, with the digest in its description."""

    def make(place: Path) -> None:
        path = place / "transcripts/tune.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        found = change(json.loads(data[8 : 8 + length]), data)
        path.write_bytes(found)
        about = json.loads(path.with_suffix(".json").read_bytes())
        about["file"] = {"bytes": len(found), "sha256": hashlib.sha256(found).hexdigest()}
        path.with_suffix(".json").write_text(json.dumps(about))

    return make


def _tensor(name: str, **facts: Any) -> Callable[[dict[str, Any], bytes], bytes]:
    def change(header: dict[str, Any], data: bytes) -> bytes:
        header[name].update(facts)
        return packed(header, data[8 + struct.unpack("<Q", data[:8])[0] :])

    return change


def _filled(value: bytes) -> Callable[[dict[str, Any], bytes], bytes]:
    """Return the change of all logits to one number."""

    def change(header: dict[str, Any], data: bytes) -> bytes:
        start, end = header["logits"]["data_offsets"]
        base = 8 + struct.unpack("<Q", data[:8])[0]
        return data[: base + start] + value * ((end - start) // 4) + data[base + end :]

    return change


def _outside(header: dict[str, Any], data: bytes) -> bytes:
    start, end = header["labels"]["data_offsets"]
    base = 8 + struct.unpack("<Q", data[:8])[0]
    return data[: base + start] + struct.pack("<q", 1 << 40) * ((end - start) // 8) + data[base + end :]


def _no_rows(sizes: list[int]) -> Callable[[dict[str, Any], bytes], bytes]:
    """Return the change to tensors without elements, although they have large sizes."""

    def change(header: dict[str, Any], data: bytes) -> bytes:
        names = [name for name in header if name != "__metadata__"]
        shapes = {name: [0, *sizes] if name == "logits" else [0] for name in names}
        return packed({name: {**header[name], "shape": shapes[name], "data_offsets": [0, 0]} for name in names}, b"")

    return change


TRANSCRIPTS: list[tuple[str, Callable[[dict[str, Any], bytes], bytes]]] = [
    *(
        (f"{name} {facts}", _tensor(name, **facts))
        for name in ("logits", "lengths", "labels")
        for facts in (
            {"shape": [2**40]},
            {"shape": [0]},
            {"shape": []},
            {"dtype": "I64"},
            {"dtype": "F64"},
            {"dtype": "BF16"},
            {"data_offsets": [0, 8]},
            {"data_offsets": [-8, 8]},
            {"shape": [1] * 64},
        )
    ),
    *(
        (f"logits of {value.hex()}", _filled(value))
        for value in (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f")
    ),
    ("cut", lambda header, data: data[:100]),
    ("nothing", lambda header, data: b""),
    ("more", lambda header, data: data + bytes(4096)),
    ("a header of 2^60", lambda header, data: struct.pack("<Q", 1 << 60) + data[8:]),
    ("labels outside", _outside),
    *((f"no rows of {sizes}", _no_rows(sizes)) for sizes in ([1 << 50] * 2, [1 << 53], [0] * 30, [0] * 60)),
]

"""Parts of a `tokenizer.json`, checked before the tokenizers library sees them.

The library runs parts as they come: normalizers that double a text thirty times end the process where memory is short,
and regular expressions may take hours. So kinds and number of the parts are those of real tokenizers, and the growth of
a text is bounded by what each part can add.
"""

import binascii
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Mapping, Tuple

import numpy as np

from offramp.program.checks import WrongError, int_of, read, read_used, str_of
from offramp.tasks.regexes import require_bounded

MAX_PARTS = 32
"""Most parts of one role, those that hold others included."""
MAX_GROWTH = 1024
"""Largest ratio of the bytes of a text after all parts to those before, as far as the file decides it."""
MAX_ADDED, MAX_ADDED_CHARACTERS = 1 << 16, 1 << 20
"""Most added tokens, and characters of all of them."""
_MAX_TOKEN_CHARACTERS = 512
_MAX_INSERTED_BYTES = 32
"""Longest text that a part inserts; real ones insert one character."""
_MAX_REPLACED_BYTES = 64
"""Longest replacement in a map of characters; 33 bytes in those of sentencepiece, for one of three bytes."""
_MAX_SPECIALS = 64
"""Most special tokens around a text."""
_INNER = {
    "normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors",
    "decoder": "decoders",
}  # fmt: skip
"""Role -> key of the list in a `Sequence`."""
_KINDS = {
    "normalizer": "BertNormalizer ByteLevel Lowercase NFC NFD NFKC NFKD Nmt Precompiled Prepend Replace Strip "
    "StripAccents",
    "pre_tokenizer": "BertPreTokenizer ByteLevel CharDelimiterSplit Delimiter Digits FixedLength Metaspace Punctuation "
    "Split UnicodeScripts Whitespace WhitespaceSplit",
    "post_processor": "BertProcessing ByteLevel RobertaProcessing TemplateProcessing",
    "decoder": "BPEDecoder ByteFallback ByteLevel CTC Fuse Metaspace Replace Strip WordPiece",
}
Part = Dict[str, Any]


@dataclass(frozen=True)
class Added:
    """One entry of `added_tokens`."""

    id: int
    content: str
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


def growth_of(tree: Mapping[str, Any]) -> int:
    """Return how many times the bytes of a text may grow by the parts of a tokenizer. Raises WrongError."""
    growth = 1
    for role in _INNER:
        for where, part in _flat(tree.get(role), role):
            factor = _CHECKS[part["type"]](part, where) if part["type"] in _CHECKS else 1
            growth *= factor if role in ("normalizer", "pre_tokenizer") else 1
    if growth > MAX_GROWTH:
        raise WrongError(f"the parts may make a text {growth} times as long, at most {MAX_GROWTH} is expected")
    return growth


def added_tokens(tree: Any) -> List[Added]:
    """Return the added tokens of a tokenizer. Raises WrongError."""
    listed = read(Tuple[Any, ...], [] if tree is None else tree, "added_tokens")
    if len(listed) > MAX_ADDED:
        raise WrongError(f"added_tokens has {len(listed)} elements, at most {MAX_ADDED} are read")
    found = [read_used(Added, each, f"added_tokens[{index}]") for index, each in enumerate(listed)]
    require_moderate(token.content for token in found)
    return found


def require_moderate(contents: Any) -> None:
    """Raise WrongError for added tokens that are too many, or too long."""
    sizes = [len(str_of(content, "an added token")) for content in contents]
    if len(sizes) > MAX_ADDED or sum(sizes) > MAX_ADDED_CHARACTERS:
        raise WrongError(
            f"{len(sizes)} added tokens of {sum(sizes)} characters, at most {MAX_ADDED_CHARACTERS} are read"
        )
    if max(sizes, default=0) > _MAX_TOKEN_CHARACTERS:
        raise WrongError(f"an added token of {max(sizes)} characters, at most {_MAX_TOKEN_CHARACTERS} are read")


def _flat(tree: Any, role: str) -> Iterator[Tuple[str, Part]]:
    """Yield the parts of one role with their places, the content of each `Sequence` in its place."""
    waiting, count = [(role, tree)] if tree is not None else [], 0
    while waiting:
        where, part = waiting.pop(0)
        count += 1
        if count > MAX_PARTS:
            raise WrongError(f"{role} has more than {MAX_PARTS} parts")
        kind = str_of(read(Dict[str, Any], part, where).get("type"), f"{where}.type")
        if kind == "Sequence":
            name = _INNER[role]
            inner = read(Tuple[Any, ...], part.get(name), f"{where}.{name}")
            few = enumerate(inner[: MAX_PARTS + 1])
            waiting = [(f"{where}.{name}[{index}]", each) for index, each in few] + waiting
        elif kind not in _KINDS[role].split():
            raise WrongError(f"{where}.type is {kind!r:.60}, known are Sequence {_KINDS[role]}")
        else:
            yield where, part


def _pattern(part: Part, where: str) -> int:
    """Return the length in bytes of the shortest text that a pattern matches."""
    tree = read(Dict[str, str], part.get("pattern"), f"{where}.pattern")
    if list(tree) not in (["String"], ["Regex"]):
        raise WrongError(f"{where}.pattern must have the key String or Regex, not {sorted(tree)!r:.60}")
    ((kind, text),) = tree.items()
    if kind == "Regex":
        require_bounded(text)
        return 0
    if not text:
        raise WrongError(f"{where}.pattern is empty")
    return len(text.encode("utf-8", "replace"))


def _inserted(part: Part, key: str, where: str) -> int:
    size = len(str_of(part.get(key), f"{where}.{key}").encode("utf-8", "replace"))
    if size > _MAX_INSERTED_BYTES:
        raise WrongError(f"{where}.{key} has {size} bytes, at most {_MAX_INSERTED_BYTES} are expected")
    return size


def _replace(part: Part, where: str) -> int:
    replaced, size = _pattern(part, where), _inserted(part, "content", where)
    return max(-(-size // replaced), 1) if replaced else 1 + size  # a regular expression may match nothing, anywhere


def _split(part: Part, where: str) -> int:
    _pattern(part, where)
    return 1


def _byte_level(part: Part, where: str) -> int:
    return 4 if part.get("add_prefix_space", True) else 2  # a byte becomes a letter of up to two


def _fixed_length(part: Part, where: str) -> int:
    int_of(part.get("length", 1), f"{where}.length", 1, 1 << 20)
    return 1


def _template(part: Part, where: str) -> int:
    specials = read(Dict[str, Dict[str, Any]], part.get("special_tokens"), f"{where}.special_tokens")
    ids = (read(Tuple[int, ...], each.get("ids"), f"{where}.special_tokens.ids") for each in specials.values())
    sizes = [sum(map(len, ids)), *(len(read(Tuple[Any, ...], part.get(k), f"{where}.{k}")) for k in ("single", "pair"))]
    if max(sizes) > _MAX_SPECIALS:
        raise WrongError(f"{where} adds more than {_MAX_SPECIALS} tokens to a text")
    return 1


def _precompiled(part: Part, where: str) -> int:
    """Check the map of characters of sentencepiece: a trie over bytes (an array of units), and the replacements."""
    try:
        text = str_of(part.get("precompiled_charsmap"), f"{where}.precompiled_charsmap")
        data = binascii.a2b_base64(text)
        if binascii.b2a_base64(data, newline=False).decode() != text:
            raise ValueError("no base64")
        size = int.from_bytes(data[:4], "little")
        if size % 4 or not 4 <= size <= len(data) - 4:
            raise ValueError(f"a trie of {size} bytes in {len(data)}")
        texts = data[4 + size :]
        texts.decode("utf-8")
        return _map_growth(np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64), texts)
    except ValueError as error:
        raise WrongError(f"{where}.precompiled_charsmap: {error}") from None


def _map_growth(units_U: np.ndarray, texts: bytes) -> int:
    """Return the growth by a map. Raises ValueError for one whose trie leads out of its array, or of the texts.

    Bits of a unit: 0 to 7 the byte that leads to it, 8 whether a key ends there, 9 and above where its successors are.
    """
    is_node_U, ends_U = units_U < 1 << 31, (units_U >> 8) & 1 == 1
    bases_U = np.arange(len(units_U)) ^ ((units_U >> 10) << ((units_U & 512) >> 6))
    letters_T = np.frombuffer(texts + b"\0", np.uint8)
    if ((bases_U | 255) >= len(units_U))[is_node_U].any():
        raise ValueError("its trie leads out of its array")
    values = units_U[bases_U[is_node_U & ends_U]] & 0x7FFFFFFF
    if (values >= len(letters_T)).any() or (letters_T[values] & 0xC0 == 0x80).any():
        raise ValueError("its trie leads out of the replacements")
    ends_T = np.flatnonzero(letters_T == 0)
    longest = int(np.diff(np.concatenate([[-1], ends_T])).max()) - 1
    if longest > _MAX_REPLACED_BYTES:
        raise ValueError(f"a replacement of {longest} bytes, at most {_MAX_REPLACED_BYTES} are expected")
    children = bases_U[0] ^ np.arange(1, 128)  # keys of one byte
    children = children[(units_U[children] & 0x800000FF == np.arange(1, 128)) & ends_U[children]]
    starts = units_U[bases_U[children]] & 0x7FFFFFFF
    lengths = ends_T[np.searchsorted(ends_T, starts)] - starts
    return max(int(lengths.max()) if len(lengths) else 1, -(-longest // 2), 1)


_CHECKS = {
    "Replace": _replace, "Split": _split, "ByteLevel": _byte_level, "FixedLength": _fixed_length,
    "TemplateProcessing": _template, "Precompiled": _precompiled,
    "Prepend": lambda part, where: 1 + _inserted(part, "prepend", where),
    "Metaspace": lambda part, where: 1 + _inserted(part, "replacement", where),
}  # fmt: skip
"""Kind -> check that returns how many times a text may grow."""

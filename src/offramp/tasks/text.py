"""Encoding of texts as token ids with the tokenizer in a model folder. Equal to the fast tokenizers of transformers.

This module truncates texts and adds special tokens itself. The tokenizers library would keep every piece that it cuts
off, for a pair in every combination (360 MiB for two texts of 8,192 exclamation marks), and needs 150 MiB for a text of
1 MB. It encodes one text at a time, so that the library starts no threads and does not warn when the process forks.

It does not know where texts come from, and knows only the `Texts` of the model.

Shapes: B texts, S tokens of the longest text.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any, Callable, Container, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np

from offramp.errors import MissingExtraError, OfframpError, SourceError, UsageError
from offramp.program.inputs import Batch
from offramp.program.program import POSITION_IDS, TEXT_INPUTS, Texts

Text = Union[str, Tuple[str, str]]
"""A text, or a pair of texts that the model reads together."""

_LAYOUTS: Tuple[Tuple[str, ...], ...] = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))
_SENTENCEPIECE = ("sentencepiece.bpe.model", "spiece.model", "tokenizer.model")
_SAVE_FAST = "save a fast tokenizer there: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_WORDPIECE_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
_BYTE_BPE_CLASSES = ("RobertaTokenizer",)
_BERT_SPECIALS = {key + "_token": f"[{key.upper()}]" for key in ("unk", "sep", "pad", "cls", "mask")}
_ROBERTA_SPECIALS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_SURROGATE = re.compile("[\\ud800-\\udfff]")
_CHARACTERS_PER_TOKEN = 8
"""Characters of a long text that are tokenized first, for each token that fits. English has 4 to 5 a token."""
_SEAM_TOKENS = 128
"""Tokens read from a long text in addition to those that fit. The last ones may be wrong, because the text is cut
inside a word; WordPiece splits a word into up to 100 tokens."""

_Piece = Tuple[Optional[int], int, int]
"""Part of a template: index of the text inserted here (None: a special token), special token, token type."""


def has_tokenizer(folder: Union[str, Path]) -> bool:
    """Return whether the folder has the files that `TextEncoder.from_folder` needs."""
    return _layout(Path(folder)) is not None


def tokenizer_length(folder: Union[str, Path]) -> Optional[int]:
    """Return `model_max_length` of `tokenizer_config.json`, or None if it is absent or stands for "unlimited"."""
    found = _read_object(Path(folder) / "tokenizer_config.json").get("model_max_length")
    return int(found) if isinstance(found, (int, float)) and 0 < found < 1 << 20 else None


def token_batch(spec: Texts, ids_BS: np.ndarray, mask_BS: np.ndarray, types_BS: np.ndarray) -> Batch:
    """Return the batch of texts that are token ids already: int64 [B, S], padded on the right.

    `mask_BS` is 1 where there is a token, else 0. `types_BS` is 1 in the second text of a pair, else 0.
    """
    names = (*TEXT_INPUTS, POSITION_IDS)
    arrays: Dict[str, np.ndarray] = dict(zip(names, (ids_BS, mask_BS, types_BS, _positions(spec, ids_BS))))
    return Batch(arrays, ids_BS.shape[0], ids_BS.shape[1], np.asarray(mask_BS).sum(axis=1))


def _positions(spec: Texts, ids_BS: np.ndarray) -> np.ndarray:
    """Return the row of the position table for each token, int64 [B, S].

    Where positions begin after that of padding (RoBERTa), a padding token inside a text takes no position and gets row
    `position_offset - 1`, as in fairseq (`make_positions`).
    """
    if not spec.position_offset:
        return np.tile(np.arange(ids_BS.shape[1], dtype=np.int64), (ids_BS.shape[0], 1))
    is_token_BS = ids_BS != spec.pad_token
    return np.cumsum(is_token_BS, axis=1) * is_token_BS + spec.position_offset - 1


class TextEncoder:
    """Encoder of texts for one model: an `InputEncoder` of texts and pairs of texts. Thread-safe."""

    sample: Tuple[Text, ...] = ("a b",)

    def __init__(
        self,
        tokenizer: Any,
        spec: Texts,
        max_length: int,
        config: Dict[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        """Take ownership of a `tokenizers.Tokenizer`, which `from_folder` reads."""
        side = (tokenizer.truncation or {}).get("direction", "right")
        tokenizer.no_truncation()
        tokenizer.no_padding()  # a tokenizer.json may pad every text to 128 tokens
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._spec = spec
        self._chunk_size = _CHARACTERS_PER_TOKEN * (max_length + _SEAM_TOKENS)
        self._keeps_end = config.get("truncation_side", side) == "left"
        inputs = config.get("model_input_names", ["token_type_ids"])
        self._has_types = spec.num_token_types > 1 and "token_type_ids" in inputs
        self._templates = {num_texts: _template(tokenizer, num_texts) for num_texts in (1, 2)}
        self._warn: Optional[Callable[[str], None]] = warn
        smallest = len(self._templates[2])
        if max_length < smallest:
            raise UsageError(
                f"max_length {max_length} is too short for a pair of texts", None, f"use at least {smallest}"
            )

    @classmethod
    def from_folder(
        cls,
        folder: Union[str, Path],
        spec: Texts,
        max_length: Optional[int] = None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> TextEncoder:
        """Read `tokenizer.json`, else `vocab.txt` (BERT layout), else `vocab.json` with `merges.txt` (RoBERTa layout).

        As in transformers, `tokenizer_config.json` overrides what `tokenizer.json` says about case, accents, Chinese
        characters and the space before the first word.

        Args:
            max_length: longest encoded text in tokens, special tokens included; None: that of the model.
            warn: called once, when the first text is truncated.

        Raises UsageError for a `max_length` that the model does not support, SourceError for a folder without a
        readable tokenizer, MissingExtraError without the tokenizers library.
        """
        folder = Path(folder)
        if max_length is None:
            max_length = spec.max_length
        if max_length > spec.max_length:
            what = f"max_length {max_length} is more than the {spec.max_length} tokens that the model reads"
            raise UsageError(what, None, "use a smaller max_length")
        layout = _layout(folder)
        if layout is None:
            raise _no_tokenizer(folder)
        try:
            config = _read_config(folder)
            return cls(_BUILDERS[layout](folder, config), spec, max_length, config, warn)
        except OfframpError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise SourceError(f"tokenizer cannot be read ({error})", folder / layout[0], _SAVE_FAST) from error

    def encode(self, inputs: Sequence[Text]) -> Batch:
        """Return `input_ids`, `attention_mask`, `token_type_ids` and `position_ids`, int64 [B, S], padded on the right.

        Long texts are truncated at the end, and of a pair the longer text first, as in transformers with
        `truncation=True`. Lone surrogates are read as U+FFFD. An empty list of texts gives arrays of shape (0, 0).

        Raises SourceError for a token outside the model's vocabulary, UsageError for an input that is not text.
        """
        rows = [self._encode(text) for text in inputs]
        lengths_B = np.array([len(ids) for ids, _ in rows], np.int64)
        shape = (len(rows), int(lengths_B.max()) if rows else 0)
        ids_BS, types_BS = np.full(shape, self._spec.pad_token, np.int64), np.zeros(shape, np.int64)
        for row, (ids, types) in enumerate(rows):
            ids_BS[row, : len(ids)] = ids
            if self._has_types:
                types_BS[row, : len(types)] = types
        self._check_vocabulary(int(ids_BS.max()) if ids_BS.size else 0)
        mask_BS = (np.arange(shape[1]) < lengths_B[:, None]).astype(np.int64)
        return token_batch(self._spec, ids_BS, mask_BS, types_BS)

    def lengths(self, inputs: Iterable[Text]) -> Iterator[int]:
        """Yield the number of tokens of each text, truncated to `max_length`. Raises the errors of `encode`."""
        for text in inputs:
            yield self.encode([text]).length

    def encoding_bytes(self, inputs: Iterable[Text]) -> int:
        """Return 0: tokenizing a text takes little memory compared with the headroom of a plan."""
        return 0

    def _encode(self, text: Text) -> Tuple[List[int], List[int]]:
        texts: Sequence[str] = (text,) if isinstance(text, str) else text
        if not isinstance(texts, (tuple, list)):
            raise UsageError("the model takes texts, not this input", str(text), "give --text, or a file of texts")
        template = self._templates[len(texts)]
        num_specials = len(template) - len(texts)
        parts = self._fitting_tokens(texts, self.max_length - num_specials)
        ids: List[int] = []
        types: List[int] = []
        for index, token, token_type in template:
            part = [token] if index is None else parts[index]
            ids += part
            types += [token_type] * len(part)
        return (ids, types) if ids else ([self._spec.pad_token], [0])  # an empty text without special tokens

    def _fitting_tokens(self, texts: Sequence[str], room: int) -> List[List[int]]:
        parts = [self._tokens(text) for text in texts]
        lengths = [len(part) for part in parts]
        if sum(lengths) <= room:
            return parts
        self._warn_once()
        if len(parts) == 2 and min(lengths) > self.max_length:  # both were read in part only: count all tokens
            lengths = [self._num_tokens(text) for text in texts]
        keep = _shares(lengths, room)
        return [part[len(part) - num :] if self._keeps_end else part[:num] for part, num in zip(parts, keep)]

    def _tokens(self, text: str) -> List[int]:
        """Return the tokens of a text; of a long text, its first tokens: `_SEAM_TOKENS` more than fit."""
        end = self._chunk_size
        while end < len(text) and not self._keeps_end:
            ids = self._all_tokens(text[:end])
            if len(ids) > self.max_length + _SEAM_TOKENS:
                return ids
            end *= 2
        return self._all_tokens(text)

    def _num_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, counted in chunks that end at spaces, so that no word is split."""
        num_tokens = start = 0
        while start < len(text):
            end = start + self._chunk_size
            space = text.rfind(" ", start + 1, end) if end < len(text) else -1
            end = end if space < 0 else space
            num_tokens += len(self._all_tokens(text[start:end]))
            start = end
        return num_tokens

    def _all_tokens(self, text: str) -> List[int]:
        return self._tokenizer.encode(_SURROGATE.sub("\ufffd", text), add_special_tokens=False).ids

    def _warn_once(self) -> None:
        warn, self._warn = self._warn, None
        if warn is not None:
            limit = f"{self.max_length} tokens (the model reads up to {self._spec.max_length})"
            warn(f"a text is longer than {limit} and was cut; this warning is given once")

    def _check_vocabulary(self, token: int) -> None:
        if token >= self._spec.vocab_size:
            what = f"the tokenizer gives token {token}, the model's vocabulary has {self._spec.vocab_size}"
            raise SourceError(what, None, "use the tokenizer that the model was trained with")


def _shares(lengths: List[int], room: int) -> List[int]:
    """Return the number of tokens to keep of each text.

    The longer text is cut until both are equal, then both are cut. An odd token goes to the longer text.
    """
    if len(lengths) == 1:
        return [room]
    shorter = min(*lengths, room // 2)
    return [shorter, room - shorter] if lengths[0] <= lengths[1] else [room - shorter, shorter]


def _layout(folder: Path) -> Optional[Tuple[str, ...]]:
    return next((names for names in _LAYOUTS if all((folder / name).is_file() for name in names)), None)


def _no_tokenizer(folder: Path) -> SourceError:
    for name in _SENTENCEPIECE:
        if (folder / name).is_file():
            return SourceError(f"only a sentencepiece tokenizer ({name})", folder, _SAVE_FAST)
    looked_for = ", ".join(" with ".join(names) for names in _LAYOUTS)
    return SourceError(f"no tokenizer (looked for {looked_for})", folder, "copy the tokenizer's files there")


def _read_config(folder: Path) -> Dict[str, Any]:
    config = _read_object(folder / "tokenizer_config.json")
    return {"tokenizer_class": _read_object(folder / "config.json").get("tokenizer_class"), **config}


def _read_object(path: Path) -> Dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"not JSON ({error})", path, _SAVE_FAST) from None
    if not isinstance(tree, dict):
        raise SourceError("not a JSON object", path, _SAVE_FAST)
    return tree


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise MissingExtraError("tokenizers", "edge") from None
    return tokenizers


def _template(tokenizer: Any, num_texts: int) -> List[_Piece]:
    """Return the positions of texts and special tokens, found by encoding an example."""
    encoding = tokenizer.encode(*["a"] * num_texts)
    pieces: List[_Piece] = []
    for index, token, token_type in zip(encoding.sequence_ids, encoding.ids, encoding.type_ids):
        if index is None or not pieces or pieces[-1][0] != index:
            pieces.append((index, token, token_type))
    if sorted(index for index, _, _ in pieces if index is not None) != list(range(num_texts)):
        raise ValueError(f"{num_texts} texts become the tokens {encoding.tokens}")
    return pieces


def _from_tokenizer_json(folder: Path, config: Dict[str, Any]) -> Any:
    library = _library()
    tokenizer = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if config["tokenizer_class"] in _GENERIC_CLASSES:
        return tokenizer
    if isinstance(tokenizer.normalizer, library.normalizers.BertNormalizer):
        keys = {"lowercase": "do_lower_case", "strip_accents": "strip_accents"}
        keys["handle_chinese_chars"] = "tokenize_chinese_chars"
        tokenizer.normalizer = _overridden(tokenizer.normalizer, config, keys)
    if isinstance(tokenizer.pre_tokenizer, library.pre_tokenizers.ByteLevel):
        keys = {"add_prefix_space": "add_prefix_space"}
        tokenizer.pre_tokenizer = _overridden(tokenizer.pre_tokenizer, config, keys)
    return tokenizer


def _overridden(component: Any, config: Dict[str, Any], keys: Dict[str, str]) -> Any:
    for attribute, key in keys.items():
        if key in config:
            setattr(component, attribute, config[key])
    return component


def _from_wordpiece(folder: Path, config: Dict[str, Any]) -> Any:
    library = _library()
    _require_class(folder, config, _WORDPIECE_CLASSES)
    specials = _specials(folder, config, _BERT_SPECIALS)
    unknown = _content(specials["unk_token"])
    tokenizer = library.Tokenizer(library.models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token=unknown))
    tokenizer.normalizer = library.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    _add_specials(tokenizer, folder, specials, required=("unk_token", "cls_token", "sep_token"))
    tokenizer.post_processor = library.processors.BertProcessing(*_separators(tokenizer, specials))
    return tokenizer


def _from_byte_bpe(folder: Path, config: Dict[str, Any]) -> Any:
    library = _library()
    _require_class(folder, config, _BYTE_BPE_CLASSES)
    specials = _specials(folder, config, _ROBERTA_SPECIALS)
    model = library.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = library.Tokenizer(model)
    add_prefix_space = config.get("add_prefix_space", False)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    _add_specials(tokenizer, folder, specials, required=("cls_token", "sep_token"))
    tokenizer.post_processor = library.processors.RobertaProcessing(*_separators(tokenizer, specials))
    return tokenizer


_Builder = Callable[[Path, Dict[str, Any]], Any]
_BUILDERS: Dict[Tuple[str, ...], _Builder] = dict(
    zip(_LAYOUTS, (_from_tokenizer_json, _from_wordpiece, _from_byte_bpe))
)


def _require_class(folder: Path, config: Dict[str, Any], known: Container[str]) -> None:
    """Raise SourceError unless the tokenizer class is known.

    The class says how a vocabulary is applied: `vocab.txt` of Japanese BERT needs a morphological analyser.
    """
    name = config["tokenizer_class"]
    if name is not None and (name[:-4] if name.endswith("Fast") else name) not in known:
        raise SourceError(f"only the vocabulary of a {name}, which does not say how to apply it", folder, _SAVE_FAST)


def _specials(folder: Path, config: Dict[str, Any], defaults: Dict[str, str]) -> Dict[str, Any]:
    """Return the special tokens by name, or by number if they have none. Each is a string or has a key `content`."""
    given = {**defaults, **config}
    if "added_tokens_decoder" not in config:
        given.update(_read_object(folder / "special_tokens_map.json"))
    others = [*(given.get("additional_special_tokens") or []), *(given.get("added_tokens_decoder") or {}).values()]
    others += _read_object(folder / "added_tokens.json")
    named = {key: given[key] for key in defaults if given[key] is not None}
    return {**named, **{str(number): token for number, token in enumerate(others)}}


def _add_specials(tokenizer: Any, folder: Path, specials: Dict[str, Any], required: Container[str]) -> None:
    absent = [key for key, token in specials.items() if tokenizer.token_to_id(_content(token)) is None]
    for key in absent:
        if key in required or key.isdigit():
            raise SourceError(f"vocabulary lacks the token {_content(specials[key])!r}", folder, _SAVE_FAST)
    tokenizer.add_special_tokens([_added_token(token) for key, token in specials.items() if key not in absent])


def _separators(tokenizer: Any, specials: Dict[str, Any]) -> List[Tuple[str, int]]:
    tokens = [_content(specials[key]) for key in ("sep_token", "cls_token")]
    return [(token, tokenizer.token_to_id(token)) for token in tokens]


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _added_token(token: Any) -> Any:
    flags = {"normalized": False}
    if isinstance(token, dict):
        flags.update((name, token[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token)
    return _library().AddedToken(_content(token), **flags)

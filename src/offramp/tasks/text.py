"""Texts to token ids with the tokenizer that lies in a folder, as the fast tokenizers of transformers give them.

Texts are cut and joined with special tokens here, not in the library: that keeps every piece which it cuts off, for a
pair in every combination (360 MiB for two texts of 8,192 exclamation marks), and needs 150 MiB for a text of 1 MB. One
text is encoded at a time: the library then starts no threads, and has nothing to warn of when the process forks.

Knows of the model only its `Encoder` or `Texts`; does not know where texts come from.

Shapes: B texts, S tokens of the longest of them.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Container, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

from offramp.errors import MissingExtraError, OfframpError, SourceError, UsageError
from offramp.program.program import Texts
from offramp.program.encoder import Encoder

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
"""Of a long text, this many characters are first tried for each token; English has 4 to 5."""
_SEAM_TOKENS = 128
"""Of a long text, more tokens than fit are read, by this many: where it is cut inside a word, these may be wrong ones.
WordPiece makes up to 100 of a word."""

_Piece = Tuple[Optional[int], int, int]
"""Of a template: the text that stands here (None: the special token that follows), token, token type."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Token ids of B texts, padded on the right to the longest. All arrays are int64."""

    ids_BS: np.ndarray
    mask_BS: np.ndarray
    """1 where there is a token, 0 where there is padding."""
    types_BS: np.ndarray
    """1 in the second text of a pair where the model tells the two apart, else 0."""
    lengths_B: np.ndarray
    """Tokens of each text, special tokens included."""


def has_tokenizer(folder: Union[str, Path]) -> bool:
    """Whether the folder has the files that `TextEncoder.from_folder` needs."""
    return _layout(Path(folder)) is not None


def tokenizer_length(folder: Union[str, Path]) -> Optional[int]:
    """The most tokens that `tokenizer_config.json` names; None where it names none, or so many that it means none."""
    found = _read_object(Path(folder) / "tokenizer_config.json").get("model_max_length")
    return int(found) if isinstance(found, (int, float)) and 0 < found < 1 << 20 else None


class TextEncoder:
    """Encodes texts for one model. Safe from several threads."""

    def __init__(
        self,
        tokenizer: Any,
        encoder: Union[Encoder, Texts],
        max_length: int,
        config: Dict[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        """Take over a `tokenizers.Tokenizer`; `from_folder` makes one."""
        side = (tokenizer.truncation or {}).get("direction", "right")
        tokenizer.no_truncation()
        tokenizer.no_padding()  # a tokenizer.json may pad every text to 128 tokens
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._chunk_size = _CHARACTERS_PER_TOKEN * (max_length + _SEAM_TOKENS)
        self._keeps_end = config.get("truncation_side", side) == "left"
        inputs = config.get("model_input_names", ["token_type_ids"])
        self._has_types = encoder.num_token_types > 1 and "token_type_ids" in inputs
        self._templates = {num_texts: _template(tokenizer, num_texts) for num_texts in (1, 2)}
        self._warn: Optional[Callable[[str], None]] = warn
        smallest = len(self._templates[2])
        if max_length < smallest:
            raise UsageError(f"max_length {max_length} holds no pair of texts", None, f"take at least {smallest}")

    @classmethod
    def from_folder(
        cls,
        folder: Union[str, Path],
        encoder: Union[Encoder, Texts],
        max_length: Optional[int] = None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> TextEncoder:
        """Read `tokenizer.json`, else `vocab.txt` (as BERT), else `vocab.json` with `merges.txt` (as RoBERTa).

        What `tokenizer_config.json` says of case, accents, Chinese characters and the space before the first word
        overrides `tokenizer.json`, as in transformers. `max_length` counts special tokens and is the model's if None.
        `warn` is called once, when the first text is cut.

        Raises UsageError for a `max_length` that the model cannot take, SourceError for a folder without a tokenizer
        or with one that cannot be read, MissingExtraError without the tokenizers library.
        """
        folder = Path(folder)
        if max_length is None:
            max_length = encoder.max_length
        if max_length > encoder.max_length:
            what = f"max_length {max_length} is more than the {encoder.max_length} tokens that the model reads"
            raise UsageError(what, None, "take a smaller one")
        layout = _layout(folder)
        if layout is None:
            raise _no_tokenizer(folder)
        try:
            config = _read_config(folder)
            return cls(_BUILDERS[layout](folder, config), encoder, max_length, config, warn)
        except OfframpError:
            raise
        except Exception as error:  # the library raises nothing narrower
            raise SourceError(f"tokenizer cannot be read ({error})", folder / layout[0], _SAVE_FAST) from error

    def encode(self, texts: Sequence[Text]) -> Batch:
        """Encode texts and pairs, in order; no texts give arrays of shape (0, 0).

        Texts that are too long lose their end, of a pair the longer one first, as in transformers with
        `truncation=True`. Lone surrogates are read as U+FFFD.

        Raises SourceError for a token that is not in the model's vocabulary, UsageError for what is no text.
        """
        rows = [self._encode(text) for text in texts]
        lengths_B = np.array([len(ids) for ids, _ in rows], np.int64)
        shape = (len(rows), int(lengths_B.max()) if rows else 0)
        ids_BS, types_BS = np.full(shape, self._encoder.pad_token, np.int64), np.zeros(shape, np.int64)
        for row, (ids, types) in enumerate(rows):
            ids_BS[row, : len(ids)] = ids
            if self._has_types:
                types_BS[row, : len(types)] = types
        self._check_vocabulary(int(ids_BS.max()) if ids_BS.size else 0)
        mask_BS = (np.arange(shape[1]) < lengths_B[:, None]).astype(np.int64)
        return Batch(ids_BS, mask_BS, types_BS, lengths_B)

    def _encode(self, text: Text) -> Tuple[List[int], List[int]]:
        texts: Sequence[str] = (text,) if isinstance(text, str) else text
        if not isinstance(texts, (tuple, list)):
            raise UsageError("the model takes texts, and this is none", str(text), "give --text, or a file of texts")
        template = self._templates[len(texts)]
        num_specials = len(template) - len(texts)
        parts = self._fitting_tokens(texts, self.max_length - num_specials)
        ids: List[int] = []
        types: List[int] = []
        for index, token, token_type in template:
            part = [token] if index is None else parts[index]
            ids += part
            types += [token_type] * len(part)
        return (ids, types) if ids else ([self._encoder.pad_token], [0])  # an empty text without special tokens

    def _fitting_tokens(self, texts: Sequence[str], room: int) -> List[List[int]]:
        parts = [self._tokens(text) for text in texts]
        lengths = [len(part) for part in parts]
        if sum(lengths) <= room:
            return parts
        self._warn_once()
        if len(parts) == 2 and min(lengths) > self.max_length:  # which one is longer was not seen yet
            lengths = [self._num_tokens(text) for text in texts]
        keep = _shares(lengths, room)
        return [part[len(part) - num :] if self._keeps_end else part[:num] for part, num in zip(parts, keep)]

    def _tokens(self, text: str) -> List[int]:
        """All tokens of a text, or, of a long one, its first tokens: more than fit, and `_SEAM_TOKENS` to spare."""
        end = self._chunk_size
        while end < len(text) and not self._keeps_end:
            ids = self._all_tokens(text[:end])
            if len(ids) > self.max_length + _SEAM_TOKENS:
                return ids
            end *= 2
        return self._all_tokens(text)

    def _num_tokens(self, text: str) -> int:
        """Tokens of a text, counted in chunks; they end at spaces, so that no word is counted twice."""
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
            limit = f"{self.max_length} tokens (the model reads up to {self._encoder.max_length})"
            warn(f"a text is longer than {limit} and was cut; no further warning for others")

    def _check_vocabulary(self, token: int) -> None:
        if token >= self._encoder.vocab_size:
            what = f"the tokenizer gives token {token}, the model's vocabulary has {self._encoder.vocab_size}"
            raise SourceError(what, None, "use the tokenizer that the model was trained with")


def _shares(lengths: List[int], room: int) -> List[int]:
    """Tokens to keep: the longer text is cut until both are equal, then both; an odd token goes to the longer one."""
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
    """Where texts and special tokens stand, learnt from an example."""
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
    """The class says how a vocabulary is applied: Japanese BERT's `vocab.txt` needs a morphological analyser."""
    name = config["tokenizer_class"]
    if name is not None and (name[:-4] if name.endswith("Fast") else name) not in known:
        raise SourceError(f"only the vocabulary of a {name}, which does not say how to apply it", folder, _SAVE_FAST)


def _specials(folder: Path, config: Dict[str, Any], defaults: Dict[str, str]) -> Dict[str, Any]:
    """The special tokens, each a string or an object with `content`, by name; those without a name by number."""
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

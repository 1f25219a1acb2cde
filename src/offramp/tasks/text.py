"""Encoding of texts as token ids with the tokenizer in a model folder. Equal to the fast tokenizers of transformers.

This module truncates texts and adds special tokens itself. The tokenizers library would keep every piece that it cuts
off, for a pair in every combination (360 MiB for two texts of 8,192 exclamation marks), and needs 150 MiB for a text of
1 MB. It encodes one text at a time, so that the library starts no threads and does not warn when the process forks.
Of a long text, a beginning is tokenized whose first tokens are those of the whole text; where no such beginning is
found, the whole text is.

It does not know where texts come from, and knows only the `Texts` of the model.

Shapes: B texts, S tokens of the longest text.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from contextlib import suppress
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from offramp.errors import OfframpError, SourceError, UsageError
from offramp.program.inputs import Batch
from offramp.program.program import POSITION_IDS, TEXT_INPUTS, Texts
from offramp.tasks.frames import is_null
from offramp.tasks.model_files import AnyFolder, advice_of_stores, files_of
from offramp.tasks.tokenizer import is_of_library, library_errors, read_tokenizer
from offramp.tasks.tokenizer_settings import TokenizerSettings

Text = Union[str, Tuple[str, str]]
"""A text, or a pair of texts that the model reads together."""
Warn = Callable[[str], None]
"""Function that receives a warning."""

ANY = Texts(vocab_size=1 << 31, max_length=1 << 31, num_token_types=2, pad_token=0)
"""Requirements of no model."""
_SURROGATE = re.compile("[\\ud800-\\udfff]")
_CHARACTERS_PER_TOKEN = 8
"""Characters of a long text that are tokenized first, for each token that fits. English has 4 to 5 a token."""
_SEAM_TOKENS = 128
"""Tokens read from a long text in addition to those that fit. The last ones may be wrong, because the text is cut
inside a word; WordPiece splits a word into up to 100 tokens."""
_SEAM_CHARACTERS = 128
"""Characters before the end of a part of a text whose tokens are not used: a special token may be cut there."""
_WHOLE_CHARACTERS = 1 << 16
"""Length up to which a text without a safe place for a cut is tokenized as a whole: at most 10 MiB."""
_LONGEST_PIECE = 16
"""Characters of the longest token that sentencepiece trains by default."""
_GROWN_BYTES, _SLICE_CHARACTERS, _MOST_GROWTH = 1 << 21, 1024, 6
"""Length that a text may grow to without being measured, length of the slices in which others are measured, and how
many times as long they may become: byte-level tokenizers make a letter up to four times as long."""

COPIES = 6
"""Most copies of a text while rows like it are read: lines, their fields, and the rows before and after. Measured: 5.1
of a TSV file whose quotes are guessed.
"""
BYTES_PER_CHARACTER = 150
"""Memory of the tokenizers library for a text that is tokenized as a whole."""

_ONE_TEXT = "give one text, or divide the model with a tokenizer that takes pairs"
_Piece = Tuple[Optional[int], int, int]
"""Part of a template: index of the text inserted here (None: a special token), special token, token type."""


def token_batch(spec: Texts, ids_BS: np.ndarray, mask_BS: np.ndarray, types_BS: np.ndarray) -> Batch:
    """Return the batch of texts that are token ids already: int64 [B, S], padded on the right.

    `mask_BS` is 1 where there is a token, else 0. `types_BS` is 1 in the second text of a pair, else 0.
    """
    if not spec.position_offset:
        positions_BS = np.tile(np.arange(ids_BS.shape[1], dtype=np.int64), (ids_BS.shape[0], 1))
    else:  # RoBERTa: padding inside a text takes no position and gets row offset - 1, as in `make_positions` of fairseq
        is_token_BS = ids_BS != spec.pad_token
        positions_BS = np.cumsum(is_token_BS, axis=1) * is_token_BS + spec.position_offset - 1
    arrays: Dict[str, np.ndarray] = dict(zip((*TEXT_INPUTS, POSITION_IDS), (ids_BS, mask_BS, types_BS, positions_BS)))
    return Batch(arrays, ids_BS.shape[0], ids_BS.shape[1], np.asarray(mask_BS).sum(axis=1))


class TextEncoder:
    """Encoder of texts for one model: an `InputEncoder` of texts and pairs of texts. Thread-safe."""

    sample: Tuple[Text, ...] = ("a b",)

    def __init__(
        self, tokenizer: Any, spec: Texts, max_length: int, settings: TokenizerSettings, warn: Warn, growth: int = 1
    ) -> None:
        """Take ownership of a `tokenizers.Tokenizer`, which `from_folder` reads.

        `growth`: how many times as long a text may become in it.
        """
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._spec, self._padding = spec, spec.pad_token or 0
        self._chunk_size = _CHARACTERS_PER_TOKEN * (max_length + _SEAM_TOKENS)
        self._keeps_end = settings.keeps_end
        self._has_types = spec.num_token_types > 1 and settings.has_types
        self._is_local = type(tokenizer.pre_tokenizer).__name__ == "BertPreTokenizer"
        self._templates = {1: _template(tokenizer, 1)}
        with suppress(ValueError):  # it is made for single texts
            self._templates[2] = _template(tokenizer, 2)
        self._warn: Optional[Warn] = warn
        self._most_characters = _GROWN_BYTES // growth
        for token in (token for pieces in self._templates.values() for index, token, _ in pieces if index is None):
            self._require_known(token)

    @classmethod
    def from_folder(
        cls, folder: AnyFolder, spec: Texts, max_length: Optional[int] = None, warn: Warn = warnings.warn
    ) -> TextEncoder:
        """Read the tokenizer of a model folder or a store (see `tokenizer.read_tokenizer`).

        Args:
            max_length: longest encoded text in tokens, special tokens included; None: that of the tokenizer, or of
                the model where it is less.
            warn: called once, when the first text is truncated.

        Raises UsageError for a `max_length` that the model does not support, SourceError for a folder without a
        readable tokenizer, MissingExtraError without the tokenizers library.
        """
        files = files_of(folder)
        if max_length is not None and max_length > spec.max_length:
            what = f"max_length {max_length} is more than the {spec.max_length} tokens that the model reads"
            raise UsageError(what, None, "use a smaller max_length")
        with advice_of_stores(files), library_errors(files):
            tokenizer, settings, growth = read_tokenizer(files)
            longest = min(spec.max_length, settings.max_length or spec.max_length)
            encoder = cls(tokenizer, spec, longest if max_length is None else max_length, settings, warn, growth)
        if max_length is not None:
            encoder._require_room(max(encoder._templates))
        return encoder

    def encode(self, inputs: Sequence[Text]) -> Batch:
        """Return `input_ids`, `attention_mask`, `token_type_ids` and `position_ids`, int64 [B, S], padded on the right.

        Long texts are truncated at the end, and of a pair the longer text first, as in transformers with
        `truncation=True`. Lone surrogates are read as U+FFFD. An empty list of texts gives arrays of shape (0, 0).

        Raises SourceError for a token outside the model's vocabulary, UsageError for an input that is not text, and for
        texts of several lengths if the model has no token for padding.
        """
        rows = [self._encode(text) for text in inputs]
        lengths_B = np.array([len(ids) for ids, _ in rows], np.int64)
        shape = (len(rows), int(lengths_B.max()) if rows else 0)
        if self._spec.pad_token is None and lengths_B.sum() < shape[0] * shape[1]:
            raise UsageError(
                "the model has no token for padding, and these texts differ in length", None, "use batch 1"
            )
        ids_BS, types_BS = np.full(shape, self._padding, np.int64), np.zeros(shape, np.int64)
        for row, (ids, types) in enumerate(rows):
            ids_BS[row, : len(ids)] = ids
            if self._has_types:
                types_BS[row, : len(types)] = types
        if ids_BS.size:
            self._require_known(int(ids_BS.max()))
        mask_BS = (np.arange(shape[1]) < lengths_B[:, None]).astype(np.int64)
        return token_batch(self._spec, ids_BS, mask_BS, types_BS)

    def _require_known(self, token: int) -> None:
        if token >= self._spec.vocab_size:
            what = f"the tokenizer gives token {token}, the model's vocabulary has {self._spec.vocab_size}"
            raise SourceError(what, None, "use the tokenizer that the model was trained with")

    def lengths(self, inputs: Iterable[Text]) -> Iterator[int]:
        """Yield the number of tokens of each text, truncated to `max_length`. Raises the errors of `encode`."""
        for text in inputs:
            yield self.encode([text]).length

    def encoding_bytes(self, inputs: Iterable[Text]) -> int:
        """Return the bytes of the copies of the largest input, and of all its tokens if the last ones are kept."""
        parts = ((text,) if isinstance(text, str) else text for text in inputs)
        by_character = BYTES_PER_CHARACTER * self._keeps_end
        sizes = (sum(COPIES * sys.getsizeof(part) + by_character * len(part) for part in each) for each in parts)
        return max(sizes, default=0)

    def _encode(self, text: Text) -> Tuple[List[int], List[int]]:
        texts: Sequence[str] = (text,) if isinstance(text, str) else text
        if not isinstance(texts, (tuple, list)):
            raise _no_text(text)
        if len(texts) not in (1, 2) or not all(isinstance(part, str) for part in texts):
            kinds = ", ".join(type(part).__name__ for part in texts) or "nothing"
            raise UsageError("an input is a text or a pair of texts", f"here: {kinds}", "give one or two strings")
        if len(texts) not in self._templates:
            raise UsageError("the tokenizer of the model has no place for the second text of a pair", None, _ONE_TEXT)
        self._require_room(len(texts))
        template = self._templates[len(texts)]
        num_specials = len(template) - len(texts)
        parts = self._fitting_tokens(texts, self.max_length - num_specials)
        ids: List[int] = []
        types: List[int] = []
        for index, token, token_type in template:
            part = [token] if index is None else parts[index]
            ids += part
            types += [token_type] * len(part)
        return (ids, types) if ids else ([self._padding], [0])  # an empty text without special tokens

    def _require_room(self, num_texts: int) -> None:
        """Raise UsageError unless a token of each text fits."""
        smallest = len(self._templates[num_texts])
        if self.max_length < smallest:
            what = f"max_length {self.max_length} is too short for a {'pair of texts' if num_texts == 2 else 'text'}"
            raise UsageError(what, None, f"use at least {smallest}")

    def _fitting_tokens(self, texts: Sequence[str], room: int) -> List[List[int]]:
        parts = [self._tokens(text) for text in texts]
        lengths = [len(part) for part in parts]
        if sum(lengths) <= room:
            return parts
        warn, self._warn = self._warn, None
        if warn is not None:
            limit = f"{self.max_length} tokens (the model reads up to {self._spec.max_length})"
            warn(f"a text is longer than {limit} and was cut; this warning is given once")
        if len(parts) == 2 and min(lengths) > self.max_length:  # both were read in part only: count all tokens
            lengths = [self._num_tokens(text) for text in texts]
        keep = _shares(lengths, room)
        return [part[len(part) - num :] if self._keeps_end else part[:num] for part, num in zip(parts, keep)]

    def _tokens(self, text: str) -> List[int]:
        """Return the tokens of a text; of a long text, its first tokens: more than fit."""
        end, is_long = self._chunk_size, len(text) > _WHOLE_CHARACTERS
        while end < len(text) and not self._keeps_end:
            ids = self._settled_tokens(text[:end])
            if is_long and len(ids) <= self.max_length:
                ids = self._agreed_tokens(text, end)
            if len(ids) > self.max_length:
                return ids
            end = end * 2 if is_long else len(text)
        return self._encoding(text).ids

    def _settled_tokens(self, part: str) -> List[int]:
        """Return the first tokens of the beginning of a text that are its tokens whatever follows.

        They end before white space (anywhere, if words are found as in BERT), and at least one whole word lies between
        them and the end: what follows changes no word but the last, and the white space beside it.
        """
        encoding, seam = self._encoding(part), len(part) - _SEAM_CHARACTERS
        if not self._is_local:
            seam = next((index for index in range(seam - 1, -1, -1) if part[index].isspace()), 0)
        words, offsets, num = encoding.word_ids, encoding.offsets, len(encoding.ids)
        while num and (words[num - 1] is None or words[num - 1] >= words[-1] - 1 or offsets[num - 1][1] > seam):
            num -= 1
        return encoding.ids[:num]

    def _agreed_tokens(self, text: str, end: int) -> List[int]:
        """Return the first tokens that are the same for each of several ends next to one another.

        The best pieces of a text (Unigram) continue the best pieces of one of these beginnings, since no piece is
        longer than all of them are apart.
        """
        encoding = self._encoding(text[:end])
        agreed = encoding.ids[: sum(stop <= end - _SEAM_CHARACTERS for _, stop in encoding.offsets)]
        for missing in range(1, _LONGEST_PIECE + 1):
            ids = self._encoding(text[: end - missing]).ids
            agreed = agreed[: next((i for i, (a, b) in enumerate(zip(agreed, ids)) if a != b), len(ids))]
        return agreed

    def _num_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, counted in chunks that end at spaces, so that no word is split."""
        num_tokens = start = 0
        while start < len(text):
            end = min(start + self._chunk_size, len(text))
            space = text.rfind(" ", start + 1, end) if end < len(text) else end
            if space < 0 and not self._is_local:  # the tokens of a word may depend on its end
                space = text.find(" ", end)
                end = len(text) if space < 0 else space
            end = end if space < 0 else space
            num_tokens += len(self._encoding(text[start:end]).ids)
            start = end
        return num_tokens

    def _encoding(self, text: str) -> Any:
        text = _SURROGATE.sub("\ufffd", text)
        try:
            if len(text) > self._most_characters:
                self._require_moderate(text)
            return self._tokenizer.encode(text, add_special_tokens=False)
        except OfframpError:
            raise
        except BaseException as error:  # of whatever kind: the library raises Exception for a word without a token
            if not is_of_library(error):
                raise
            what = f"the tokenizer has no token for a part of a text ({error})"
            raise SourceError(what, None, "use a tokenizer with an unknown token") from None

    def _require_moderate(self, text: str) -> None:
        """Raise SourceError for a text that the tokenizer makes much longer, as it would need memory for all of it."""
        normalizer, pre_tokenizer, size = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer, 0
        for start in range(0, len(text), _SLICE_CHARACTERS):
            part = text[start : start + _SLICE_CHARACTERS]
            part = part if normalizer is None else normalizer.normalize_str(part)
            words = [(part, None)] if pre_tokenizer is None else pre_tokenizer.pre_tokenize_str(part)
            size += sum(len(word) for word, _ in words)
            if size > _MOST_GROWTH * len(text):
                what = f"the tokenizer makes a text of {len(text)} characters more than {_MOST_GROWTH} times as long"
                raise SourceError(what, None, "use the tokenizer that the model was trained with, or shorter texts")


def _no_text(given: object) -> UsageError:
    """Return the error of an input that is neither a text nor a pair of texts."""
    if is_null(given):
        return UsageError("an input is null or NaN, not a text", None, "leave it out, or give '' for an empty text")
    if isinstance(given, Mapping):
        remedy = "give its text: predict([row['text']]), or predict(table['text']) of a table"
        return UsageError("the model takes texts, not rows of a table", str(given), remedy)
    remedy = "give texts: predict([text]) in Python, --text or a file of texts on the command line"
    return UsageError("the model takes texts, not this input", str(given), remedy)


def _shares(lengths: List[int], room: int) -> List[int]:
    """Return the number of tokens to keep of each text.

    The longer text is cut until both are equal, then both are cut. An odd token goes to the longer text.
    """
    if len(lengths) == 1:
        return [room]
    shorter = min(*lengths, room // 2)
    return [shorter, room - shorter] if lengths[0] <= lengths[1] else [room - shorter, shorter]


def _template(tokenizer: Any, num_texts: int) -> List[_Piece]:
    """Return the positions of texts and special tokens, found by an example of one token, which every model has."""
    library = importlib.import_module("tokenizers")
    example = library.Tokenizer(library.models.WordLevel({"a": 0}, unk_token="a"))
    if tokenizer.post_processor is not None:
        example.post_processor = tokenizer.post_processor
    encoding = example.encode(*["a"] * num_texts)
    pieces: List[_Piece] = []
    for index, token, token_type in zip(encoding.sequence_ids, encoding.ids, encoding.type_ids):
        if index is None or not pieces or pieces[-1][0] != index:
            pieces.append((index, token, token_type))
    if sorted(index for index, _, _ in pieces if index is not None) != list(range(num_texts)):
        raise ValueError(f"{num_texts} texts become the tokens {encoding.tokens}")
    return pieces

"""The tokenizer that `AutoTokenizer` makes from a model folder, written down so that it can be applied without
transformers, and compared with it on probe texts. Imports transformers, and torch only where transformers does.
"""

import hashlib
import os
import shutil
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
import transformers
from transformers import AutoTokenizer

from offramp.checkpoints.source import TOKENIZER
from offramp.errors import SourceError, UsageError
from offramp.program.program import TEXT_INPUTS
from offramp.tasks.model_files import files_of
from offramp.tasks.text import ANY, Text, TextEncoder
from offramp.tasks.tokenizer import LAYOUTS, require_safe
from offramp.tasks.tokenizer_settings import FAST_TOKENIZER, SETTINGS, TokenizerProof, TokenizerSettings, length_of

TOKENIZER_JSON = "tokenizer.json"
_OTHER_CLASS = "save a tokenizer of another class, or report it"
_LEAST_WORDS = 2
"""Tokens beside the special ones, since letters may all be added tokens; classes of sentencepiece begin with one."""
_PARALLEL = "TOKENIZERS_PARALLELISM"
_PADDING = 0
_SHORT = 16
"""A length in tokens to which nearly every probe is truncated, special tokens included."""
_SHORT_CHARACTERS = 60
"""Length of the texts that others are paired with: the library keeps each combination of the parts that it cuts off."""
_NUM_RANDOM, _NUM_WORDS, _NUM_ADDED = 100, 60, 64
"""Probes of random characters, probes of words of the vocabulary, and most added tokens that are probed."""
_TEXTS = (
    "", " ", "a", "The cat's 2 cafés cost £600m, don't they?", "  two  spaces \t and\nlines\r\n ", "UPPER lower MiXeD",
    "Ünïcödé ÀÉÎ straße İstanbul ŒUVRE", "Съешь же ещё этих мягких булок", "中文字符 日本語テキスト 한국어 漢字かな",
    "العَرَبِيَّة עִבְרִית हिन्दी ไทยไม่มีช่องว่าง", "👩‍👩‍👧 😀 🇩🇪 👍🏽 ❤️", "e\u0301 ﬁ ① Ⅷ ½ ｆｕｌｌ \u00a0\u3000",
    "\u0000 zero\u200bwidth \ufeff \ufffd \u2028",
    "http://x.org/z?a=b&c=d#e @user #tag <b>&amp;</b>", "1234567890 3.14 1,000,000 1e-5", "def f(x):\n    x += 2",
    "x" * 130, "!?" * 60, "a" * 2001, "1" * 700, "word " * 1200, "中" * 1500, "no-space," * 300,
)  # fmt: skip


_PROVEN: dict[bytes, int] = {}
"""State of a tokenizer that this process has compared -> number of probes. A training opens its own three times."""
_IN_CONTENT = ("_tokenizer", "_vocab", "_merges")
"""Attributes of a tokenizer of transformers that are the tokenizer of the library, or what it was made from."""
_PLACES = ("name_or_path", "vocab_file", "merges_file", "tokenizer_file")
"""Attributes that tell where its files lie."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings and the log of transformers off standard error, and the library from starting threads."""
    verbosity, parallel = transformers.logging.get_verbosity(), os.environ.get(_PARALLEL)
    transformers.logging.set_verbosity_error()
    os.environ[_PARALLEL] = "false"  # with threads, a later fork of this process would warn
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        os.environ.pop(_PARALLEL)
        os.environ.update({} if parallel is None else {_PARALLEL: parallel})


@_quiet()
def write_tokenizer(folder: Path, out: Path) -> None:
    """Write the settings of a folder's tokenizer, and the tokenizer itself, into an empty folder.

    Where `tokenizer.json` of the folder is that tokenizer, `out` gets a link to it.

    Raises SourceError for a tokenizer that offramp applies in another way, TypeError for one that only transformers
    can apply, and the errors of transformers. One of Python code is compared with that of the folder's files.
    """
    tokenizer = _load(folder)
    if not _is_fast(tokenizer):
        _require_like_files(tokenizer, folder)
        raise _not_fast(tokenizer)
    _require_words(tokenizer, folder)
    content, name, own = _json(tokenizer.backend_tokenizer), FAST_TOKENIZER, folder / TOKENIZER_JSON
    if own.is_file() and _json(tokenizers.Tokenizer.from_file(str(own))) == content:
        name = TOKENIZER_JSON
        (out / name).symlink_to(own.resolve())
    else:
        (out / name).write_text(content, encoding="utf-8")
    settings = replace(_settings(tokenizer), tokenizer=name)
    (out / SETTINGS).write_bytes(settings.to_json())
    state = _state(tokenizer, content)
    if state not in _PROVEN:
        _PROVEN[state] = _compare(tokenizer, out, folder)
    proof = TokenizerProof(_PROVEN[state], transformers.__version__, tokenizers.__version__)
    (out / SETTINGS).write_bytes(replace(settings, proof=proof).to_json())


@_quiet()
def save_tokenizer(folder: Path, out: Path) -> None:
    """Save a folder's tokenizer beside a model in `out`, so that transformers loads the same from there.

    The files are copied where a tokenizer that was saved and loaded again would be another one, or may be.
    """
    before = set(out.iterdir())
    try:
        tokenizer = _load(folder)
        if not _is_fast(tokenizer):
            raise _not_fast(tokenizer)
        tokenizer.save_pretrained(out)
        first, second = ((_settings(each), _json(each.backend_tokenizer)) for each in (tokenizer, _load(out)))
        is_same = first == second
    except Exception:  # transformers raises many classes, also for files that it wrote itself
        is_same = False
    if not is_same:
        for path in set(out.iterdir()) - before:
            path.unlink()
        for path in filter(Path.is_file, (folder / name for name in TOKENIZER)):
            shutil.copyfile(path, out / path.name)


@_quiet()
def types_of_pair(folder: Path) -> int:
    """Return how many token types the tokenizer of a folder gives for a pair of texts; 0: none, or none that works."""
    try:
        tokenizer = _load(folder)
    except Exception:  # transformers raises many classes for files that it cannot read; `write_tokenizer` names it
        return 0
    for texts in ((["a"], ["b"]), (["a"],)):  # some have no place for a second text
        try:
            found = tokenizer(*texts).get(TEXT_INPUTS[2])
        except Exception:  # as above
            continue
        return max(2, 1 + max(found[0], default=0)) if found else 0
    return 0


def _load(folder: Path) -> Any:
    require_safe(files_of(folder))
    tokenizer: Any = AutoTokenizer.from_pretrained(  # a folder  # nosec B615
        folder, local_files_only=True, trust_remote_code=False
    )
    return tokenizer


def _require_words(tokenizer: Any, folder: Path) -> None:
    """Raise SourceError for a tokenizer that transformers made without a vocabulary, since its file is absent.

    A vocab.txt that has no other tokens is taken as it is.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    words, path = set(tokenizer.get_vocab()), folder / "vocab.txt"
    own = set(path.read_bytes().decode(errors="replace").split()) if path.is_file() else set()
    is_from_file = bool(own) and own <= words
    if len(words - special) < _LEAST_WORDS and not is_from_file:
        what = f"transformers makes a {type(tokenizer).__name__} without a vocabulary of this folder"
        raise SourceError(what, folder, "copy the tokenizer's files there, or correct tokenizer_class")


def _is_fast(tokenizer: Any) -> bool:
    return isinstance(getattr(tokenizer, "backend_tokenizer", None), tokenizers.Tokenizer)


def _not_fast(tokenizer: Any) -> TypeError:
    return TypeError(f"{type(tokenizer).__name__} is no fast tokenizer")


def _require_like_files(tokenizer: Any, folder: Path) -> None:
    """Raise SourceError for a tokenizer of Python code where offramp would apply the folder's files in another way.

    The files may be such that offramp applies none, which it says where a text comes.
    """
    try:
        TextEncoder.from_folder(folder, ANY)
    except SourceError:
        return
    _compare(tokenizer, folder, folder)


def _without_files(folder: Path) -> str:
    """Return the remedy for a tokenizer of Python code: its folder without the files that offramp applies."""
    found = [names[0] for names in LAYOUTS if all((folder / name).is_file() for name in names)]
    return f"remove {' and '.join(found)} in a copy of the folder, whose store then takes no texts"


def _settings(tokenizer: Any) -> TokenizerSettings:
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise TypeError(f"model_max_length is {tokenizer.model_max_length!r:.60}, not a number of tokens")
    return TokenizerSettings(
        max_length=length_of(tokenizer.model_max_length),
        keeps_end=tokenizer.truncation_side == "left",
        has_types=TEXT_INPUTS[2] in tokenizer.model_input_names,
        splits_special_tokens=bool(tokenizer.split_special_tokens),
    )


def _json(tokenizer: tokenizers.Tokenizer) -> str:
    """Return a tokenizer as JSON without truncation and padding, which transformers sets at each call."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.to_str()


def _state(tokenizer: Any, content: str) -> bytes:
    """Return a digest of what decides how a tokenizer of transformers encodes, wherever its files lie."""
    held = [*vars(tokenizer).items(), *tokenizer.init_kwargs.items()]
    apart = (*_IN_CONTENT, *_PLACES, "init_kwargs")
    state = sorted(f"{name}={value!r}" for name, value in held if name not in apart)
    return hashlib.sha256(repr((type(tokenizer), state, content)).encode(errors="surrogatepass")).digest()


def _compare(tokenizer: Any, out: Path, folder: Path) -> int:
    """Return the number of probes. Raises SourceError for the first one that offramp encodes in another way."""
    if _ids_of_transformers(tokenizer, "", None) is None:
        raise TypeError(f"{type(tokenizer).__name__} takes more than a text")
    singles = list(_probes(tokenizer))
    short = [text for text in singles if len(text) <= _SHORT_CHARACTERS]
    pairs = [(text, short[index % len(short)]) for index, text in enumerate(singles)]
    probes: list[Text] = [*singles, *pairs, *((second, first) for first, second in pairs[::2])]
    num_probes, own_length = 0, length_of(tokenizer.model_max_length)
    for length in (None, _SHORT):
        ours = TextEncoder.from_folder(out, ANY, length, warn=lambda message: None)
        for text in probes:
            try:
                found = _ids(ours, text)
            except UsageError:  # the tokenizer's own limit has no room for a text, which transformers then ignores
                continue
            num_probes += 1
            if found != _ids_of_transformers(tokenizer, text, length or own_length):
                what = f"the tokenizer of offramp gives other tokens than transformers for {text!r:.200}"
                raise SourceError(what, folder, _OTHER_CLASS if _is_fast(tokenizer) else _without_files(folder))
    return num_probes


def _ids(ours: TextEncoder, text: Text) -> tuple[list[int], list[int]] | None:
    """Return token ids and types, or None for a word that the vocabulary has no token for. Raises UsageError."""
    try:
        arrays = ours.encode([text]).arrays
    except SourceError:
        return None
    ids, types = (arrays[name][0].tolist() for name in (TEXT_INPUTS[0], TEXT_INPUTS[2]))
    return ids, types


def _ids_of_transformers(tokenizer: Any, text: Text, length: int | None) -> tuple[list[int], list[int]] | None:
    lists = [[part] for part in ((text,) if isinstance(text, str) else text)]  # an empty second text counts as one
    try:
        out = tokenizer(*lists, truncation=length is not None, max_length=length, padding=False)
    except Exception:  # the class that the tokenizers library raises for a word without a token
        return None
    ids = out["input_ids"][0]
    types = out[TEXT_INPUTS[2]][0] if TEXT_INPUTS[2] in out else [0] * len(ids)
    return (ids, types) if ids else ([_PADDING], [0])


def _probes(tokenizer: Any) -> Iterator[str]:
    """Yield texts of many scripts, of special tokens, of words of the vocabulary, and of random characters."""
    yield from _TEXTS
    random, added = Random(0), list(tokenizer.added_tokens_encoder)
    for token in random.sample(added, min(_NUM_ADDED, len(added))):
        yield from (token, f"a{token}b", f"the {token} cat {token.lower()}  {token}{token}.")
    vocabulary = sorted(tokenizer.get_vocab())
    for index in range(_NUM_WORDS):
        chosen = random.choices(vocabulary, k=1 + index % 30)
        words = [token.lstrip("#").replace("▁", " ").replace("Ġ", " ") for token in chosen]
        yield (" ", "", ", ")[index % 3].join(words)
    assigned = [char for char in map(chr, range(0x32000)) if unicodedata.category(char) not in ("Cn", "Cs")]
    for index in range(_NUM_RANDOM):
        yield "".join(random.choices(assigned if index % 2 else assigned[:600], k=1 + index))

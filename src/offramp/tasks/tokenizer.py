"""Tokenizer files of a model folder, read as the fast tokenizers of transformers read them."""

import json
import os
import re
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Callable, Container, Dict, Iterable, Iterator, Optional, Tuple

from offramp.errors import OfframpError, SourceError, import_error
from offramp.program.checks import WrongError, parse, read, read_used, str_of, strict_json
from offramp.tasks.model_files import AnyFolder, ModelFiles, files_of
from offramp.tasks.tokenizer_parts import added_tokens, growth_of, require_moderate
from offramp.tasks.tokenizer_settings import FAST_TOKENIZER, TokenizerSettings, length_of, read_settings
from offramp.units import format_duration

LAYOUTS: Tuple[Tuple[str, ...], ...] = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))
_SENTENCEPIECE = ("sentencepiece.bpe.model", "spiece.model", "spm.model", "tokenizer.model")
_CONFIG = "tokenizer_config.json"
_SAVE = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
_SAVE_FAST = f"save a fast tokenizer in the model's folder, if its class has one: {_SAVE}"
_GET_AGAIN = "get the tokenizer's files again, or take another model"
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_WORDPIECE_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
_BYTE_BPE_CLASSES = ("RobertaTokenizer",)
_BERT_SPECIALS = {key + "_token": f"[{key.upper()}]" for key in ("unk", "sep", "pad", "cls", "mask")}
_ROBERTA_SPECIALS = {
    "bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>",
    "pad_token": "<pad>", "mask_token": "<mask>",
}  # fmt: skip
_MODEL_KEY = re.compile(rb'"model"\s*:')
_NO_MODEL = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
_MAX_WORD_CHARACTERS, _MAX_PREFIX_CHARACTERS = 1000, 16
"""Longest word that WordPiece splits, which takes the square of its length, and longest prefix of its pieces."""
_PROBE = (
    "The 2 cats' cafe\u0301 \u0130STANBUL \ufdfa\ufdfb \u4e2d\u6587 \uac00 \U0001f469\u200d\U0001f467 <s> [SEP] \t\r\n "
    "x1,000.5e-7?!" + "a" * 64 + " " * 32 + "0" * 32 + "\u4e00" * 16 + "." * 32 + "\n" * 16
)  # fmt: skip
_BYTES_GROWTH = 4
"""Growth of a text whose bytes become letters, and that gets a space."""
_QUIET = threading.RLock()
_MAX_UNUSED_IDS = 1 << 16
"""Most ids without a token, beyond the number of tokens."""
_MAX_PARTS_BYTES = 8 << 20
"""Largest description of everything but the model; 65,536 added tokens take most of it."""
_MAX_PROBE_SECONDS = 0.25
"""Time in which the probe is encoded; real tokenizers take 0.3 ms."""


@dataclass(frozen=True)
class _Config:
    """The keys of a `tokenizer_config.json` that are used; null is as good as absent."""

    tokenizer_class: Optional[str] = None
    truncation_side: Optional[str] = field(default=None, metadata={"choices": ("left", "right")})
    model_input_names: Optional[Tuple[str, ...]] = None
    split_special_tokens: Optional[bool] = None
    added_tokens_decoder: Optional[Dict[str, Any]] = None
    additional_special_tokens: Optional[Tuple[Any, ...]] = None
    do_lower_case: Optional[bool] = None
    strip_accents: Optional[bool] = None
    tokenize_chinese_chars: Optional[bool] = None
    add_prefix_space: Optional[bool] = None


def has_tokenizer(folder: AnyFolder) -> bool:
    """Return whether the folder has the files that `TextEncoder.from_folder` needs."""
    files = files_of(folder)
    return _layout(files) is not None or read_settings(files) is not None


def has_vocabulary(folder: AnyFolder) -> bool:
    """Return whether the folder has files of a tokenizer, perhaps one that only transformers reads."""
    files = files_of(folder)
    return has_tokenizer(files) or any(map(files.has, _SENTENCEPIECE))


def tokenizer_length(folder: AnyFolder) -> Optional[int]:
    """Return the tokens to which the tokenizer of a folder truncates; None: it names no limit, or no sensible one."""
    files = files_of(folder)
    settings = read_settings(files) or _settings(_read_config(files))
    return settings.max_length


def read_tokenizer(files: ModelFiles) -> Tuple[Any, TokenizerSettings, int]:
    """Read the `tokenizers.Tokenizer` of a model folder or a store, the settings for it, and how many times as long a
    text may become in it.

    A store that was divided where transformers is installed has the tokenizer and the settings of `AutoTokenizer` (see
    `checkpoints.tokenizing`). Otherwise the files are `tokenizer.json`, else `vocab.txt` (BERT layout), else
    `vocab.json` with `merges.txt` (RoBERTa layout). As in transformers, `tokenizer_config.json` then overrides what
    `tokenizer.json` says about case, accents, Chinese characters and the space before the first word, and adds tokens.

    Raises SourceError for a folder without a tokenizer or with one that takes too much memory or time,
    MissingExtraError without the tokenizers library; other errors are those of the library (see `library_errors`).
    """
    settings = read_settings(files)
    if settings is not None:
        tokenizer, growth, _ = load_tokenizer(files, str(settings.tokenizer))
    else:
        tokenizer, growth, config, side = _from_files(files)
        settings = _settings(config, side)
    if settings.splits_special_tokens:
        tokenizer.encode_special_tokens = True
    _probe(tokenizer, files)
    return tokenizer, settings, growth


def load_tokenizer(files: ModelFiles, name: str) -> Tuple[Any, int, str]:
    """Return the tokenizer in a `tokenizer.json`, without truncation and padding; how many times as long a text may
    become in it; and the side on which it would truncate. Raises SourceError for parts that are not allowed.

    The model, which holds nearly all of the file, is read by the library alone; the parts are checked, and then passed
    on as they were read here. So both see the same, and nothing else in the file counts.
    """
    library, data = _library(), files.read(name)
    try:
        tree, model = _read_model(data, library)
        growth, tokens = growth_of(tree), added_tokens(tree.get("added_tokens"))
    except WrongError as wrong:
        raise _refusal(wrong, files.folder / name) from None
    parts = {role: tree.get(role) for role in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
    others = {"truncation": None, "padding": None, "added_tokens": [], "model": _NO_MODEL}
    version = {"version": tree["version"]} if "version" in tree else {}
    tokenizer = library.Tokenizer.from_str(json.dumps({**version, **others, **parts}))
    tokenizer.model = model
    _require_model(tokenizer.model, files.folder / name)  # as its own class, other than `model`
    _add(tokenizer, [(token.special, {**vars(token)}) for token in tokens])
    truncation = tree.get("truncation")
    return tokenizer, growth, str(truncation.get("direction")).lower() if isinstance(truncation, dict) else "right"


def require_safe(files: ModelFiles) -> None:
    """Raise SourceError for a folder with a `tokenizer.json` of any version that takes too much memory or time."""
    _read_config(files)
    for path in (*sorted(files.folder.glob("tokenizer.*json")), files.folder / FAST_TOKENIZER):
        if files.has(path.name):
            with library_errors(files):
                tokenizer = load_tokenizer(files, path.name)[0]
                _probe(tokenizer, files)
                _require_dense(tokenizer.get_vocab(), path)


def _read_model(data: bytes, library: Any) -> Tuple[Dict[str, Any], Any]:
    """Return the parts of a tokenizer, and its model. Raises WrongError, and what the library raises for the model."""
    found, model = _MODEL_KEY.search(data), library.models.BPE()  # a model of any class: this is that of the reader
    if found is not None and found.start() > _MAX_PARTS_BYTES:
        raise WrongError(f"the parts beside the model take more than {_MAX_PARTS_BYTES} bytes")
    if found is not None:  # as the library writes it: the model is last, and not parsed here, which takes as long
        with suppress(Exception):
            head: Dict[str, Any] = strict_json(data[: found.start()] + b'"model":null}')
            model.__setstate__(data[found.end() :].rstrip()[:-1])
            return head, model
    tree = parse(Dict[str, Any], data, "it")
    model.__setstate__(json.dumps(read(Dict[str, Any], tree.get("model"), "model")).encode())
    return tree, model


def _require_dense(vocabulary: Dict[str, int], where: object) -> None:
    """Raise SourceError for ids far beyond the number of tokens: the library visits all below when it writes a file."""
    largest = max(vocabulary.values(), default=0)
    if largest > 2 * len(vocabulary) + _MAX_UNUSED_IDS:
        raise _refusal(f"a token has the id {largest}, of {len(vocabulary)} tokens", where)


def _require_model(model: Any, where: object) -> None:
    """Raise SourceError for a model that takes the square of long words, or gives other tokens each time."""
    long_word, prefix, dropout = (
        getattr(model, name, None) for name in ("max_input_chars_per_word", "continuing_subword_prefix", "dropout")
    )
    for name, value, fine in (
        ("max_input_chars_per_word", long_word, (long_word or 0) <= _MAX_WORD_CHARACTERS),
        ("continuing_subword_prefix", prefix, len(prefix or "") <= _MAX_PREFIX_CHARACTERS),
        ("dropout", dropout, not dropout),
    ):
        if not fine:
            raise _refusal(f"model.{name} is {value!r:.60}", where)


def _probe(tokenizer: Any, files: ModelFiles) -> None:
    """Raise SourceError for a tokenizer that takes long for a short text, and whatever the library raises for it."""
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        try:
            tokenizer.encode(_PROBE, add_special_tokens=False)
        except Exception:  # the vocabulary lacks a part of the text
            return
        seconds.append(time.perf_counter() - begin)
        if seconds[-1] < _MAX_PROBE_SECONDS:
            return
    raise _refusal(f"it takes {format_duration(min(seconds))} for {len(_PROBE)} characters", files.folder)


def _refusal(what: object, where: object) -> SourceError:
    """Return the error of a tokenizer that this module refuses, though the library may read it."""
    return SourceError(f"tokenizer cannot be read ({what})", where, _GET_AGAIN)


def _from_files(files: ModelFiles) -> Tuple[Any, int, Dict[str, Any], str]:
    """Return the tokenizer of the first layout that a folder has, how many times as long a text may become in it, its
    `tokenizer_config.json`, and the side on which `tokenizer.json` truncates.
    """
    layout = _layout(files)
    if layout is None:
        sentencepiece = next((name for name in _SENTENCEPIECE if files.has(name)), None)
        if sentencepiece is not None:
            raise SourceError(f"only a sentencepiece tokenizer ({sentencepiece})", files.folder, _SAVE_FAST)
        looked_for = ", ".join(" with ".join(names) for names in LAYOUTS)
        remedy = "copy the tokenizer's files to the model's folder"
        raise SourceError(f"no tokenizer (looked for {looked_for})", files.folder, remedy)
    own = _read_config(files)
    config = {"tokenizer_class": files.read_object("config.json", _GET_AGAIN).get("tokenizer_class"), **own}
    _check_config(config, files.folder / "config.json")
    if layout == LAYOUTS[0]:
        tokenizer, growth, side = load_tokenizer(files, layout[0])
        return _with_config(tokenizer, files, config), growth, config, side
    build = _from_wordpiece if layout == LAYOUTS[1] else _from_byte_bpe
    return build(files, config), _BYTES_GROWTH, config, "right"


def _read_config(files: ModelFiles) -> Dict[str, Any]:
    """Return the `tokenizer_config.json` of a folder. Raises SourceError for a key of another type."""
    config = files.read_object(_CONFIG, _GET_AGAIN)
    _check_config(config, files.folder / _CONFIG)
    return config


def _check_config(config: Dict[str, Any], where: object) -> None:
    try:
        found = read_used(_Config, config)
        require_moderate(map(_content, (found.added_tokens_decoder or {}).values()))
    except WrongError as wrong:
        raise _refusal(wrong, where) from None


def _settings(config: Dict[str, Any], side: str = "right") -> TokenizerSettings:
    """Return the settings in a `tokenizer_config.json`; `side` is the one of truncation in `tokenizer.json`."""
    return TokenizerSettings(
        max_length=length_of(config.get("model_max_length", config.get("max_len"))),
        keeps_end=(config.get("truncation_side") or side) == "left",
        has_types="token_type_ids" in (config.get("model_input_names") or ["token_type_ids"]),
        splits_special_tokens=bool(config.get("split_special_tokens")),
    )


@contextmanager
def library_errors(files: ModelFiles) -> Iterator[None]:
    """Convert errors of the tokenizers library, which raises plain Exception and panics, to SourceError."""
    with _quiet_panics():
        try:
            yield
        except (OfframpError, MemoryError):
            raise
        except BaseException as error:
            if not is_of_library(error):
                raise
            file = files.folder / (_layout(files) or ("",))[0]
            raise SourceError(f"tokenizer cannot be read ({error})", file, _GET_AGAIN) from error


def is_of_library(error: BaseException) -> bool:
    """Return whether an exception may be one of the tokenizers library; its panics are no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def _quiet_panics() -> Iterator[None]:
    """Keep what the library writes to standard error when it panics off the terminal: its exception says the same."""
    with _QUIET, ExitStack() as stack:  # one thread at a time: it replaces standard error of the whole process
        try:
            written = os.memfd_create("stderr")
            stack.callback(os.close, written)
            saved = os.dup(2)
            stack.callback(os.close, saved)
        except (OSError, AttributeError):  # standard error is closed, or the system is an older one
            yield
            return
        os.dup2(written, 2)
        try:
            yield
        except SourceError:
            os.ftruncate(written, 0)
            raise
        finally:
            os.dup2(saved, 2)
            os.write(2, os.pread(written, 1 << 16, 0))  # a warning of another kind, or another thread's


def _layout(files: ModelFiles) -> Optional[Tuple[str, ...]]:
    return next((names for names in LAYOUTS if all(map(files.has, names))), None)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise import_error(error, "tokenizers", "edge") from None
    return tokenizers


def _with_config(tokenizer: Any, files: ModelFiles, config: Dict[str, Any]) -> Any:
    """Return the tokenizer of a `tokenizer.json` with what `tokenizer_config.json` changes."""
    library = _library()
    _add_tokens(tokenizer, files, config.get("added_tokens_decoder") or {})
    if config["tokenizer_class"] in _GENERIC_CLASSES:
        return tokenizer
    normalizing = {"strip_accents": "strip_accents", "handle_chinese_chars": "tokenize_chinese_chars"}
    for name, kind, keys in (
        ("normalizer", library.normalizers.BertNormalizer, {"lowercase": "do_lower_case", **normalizing}),
        ("pre_tokenizer", library.pre_tokenizers.ByteLevel, {"add_prefix_space": "add_prefix_space"}),
    ):
        component = getattr(tokenizer, name)
        if isinstance(component, kind):
            for attribute in (attribute for attribute, key in keys.items() if key in config):
                setattr(component, attribute, config[keys[attribute]])
            setattr(tokenizer, name, component)
    return tokenizer


def _add_tokens(tokenizer: Any, files: ModelFiles, tokens: Dict[str, Any]) -> None:
    """Add the tokens that `tokenizer_config.json` alone has. Raises SourceError if one would get another id."""
    numbered = sorted(tokens.items(), key=lambda item: int(item[0]))
    lacking = [(int(number), token) for number, token in numbered if tokenizer.token_to_id(_content(token)) is None]
    _add(tokenizer, [(isinstance(token, dict) and bool(token.get("special")), token) for _, token in lacking])
    for number, token in lacking:
        if tokenizer.token_to_id(_content(token)) != number:
            raise SourceError(f"token {_content(token)!r} cannot have the id {number}", files.folder, _SAVE_FAST)


def _add(tokenizer: Any, tokens: Iterable[Tuple[bool, Any]]) -> None:
    """Add tokens in their order, in few calls: each call builds an index. A flag marks special ones."""
    for is_special, group in groupby(tokens, lambda each: each[0]):
        made = [_added_token(token) for _, token in group]
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)(made)


def _from_wordpiece(files: ModelFiles, config: Dict[str, Any]) -> Any:
    library = _library()
    specials = _specials(files, config, _WORDPIECE_CLASSES, _BERT_SPECIALS)
    unknown = _content(specials["unk_token"])
    with files.opened("vocab.txt") as path:
        model = library.models.WordPiece.from_file(path, unk_token=unknown)
    tokenizer = library.Tokenizer(model)
    tokenizer.normalizer = library.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    required = ("unk_token", "cls_token", "sep_token")
    return _with_specials(tokenizer, files, specials, required, library.processors.BertProcessing)


def _from_byte_bpe(files: ModelFiles, config: Dict[str, Any]) -> Any:
    library = _library()
    specials = _specials(files, config, _BYTE_BPE_CLASSES, _ROBERTA_SPECIALS)
    with files.opened("vocab.json") as vocabulary, files.opened("merges.txt") as merges:
        model = library.models.BPE.from_file(vocabulary, merges)
    tokenizer = library.Tokenizer(model)
    add_prefix_space = config.get("add_prefix_space", False)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    required = ("cls_token", "sep_token")
    return _with_specials(tokenizer, files, specials, required, library.processors.RobertaProcessing)


def _specials(
    files: ModelFiles, config: Dict[str, Any], known: Container[str], defaults: Dict[str, str]
) -> Dict[str, Any]:
    """Return the special tokens by name, or by number if they have none. Each is a string or has a key `content`.

    Raises SourceError unless the tokenizer class is known. The class says how a vocabulary is applied: `vocab.txt` of
    Japanese BERT needs a morphological analyser.
    """
    name = config["tokenizer_class"]
    if name is not None and (name[:-4] if name.endswith("Fast") else name) not in known:
        what = f"only the vocabulary of a {name}, which does not say how to apply it"
        raise SourceError(what, files.folder, _SAVE_FAST)
    given = {**defaults, **config}
    if "added_tokens_decoder" not in config:
        given.update(files.read_object("special_tokens_map.json", _GET_AGAIN))
    others = [*(given.get("additional_special_tokens") or []), *(given.get("added_tokens_decoder") or {}).values()]
    others += files.read_object("added_tokens.json", _GET_AGAIN)
    named = {key: given[key] for key in defaults if given[key] is not None}
    try:
        require_moderate(map(_content, (*named.values(), *others)))
    except WrongError as wrong:
        raise _refusal(wrong, files.folder) from None
    return {**named, **{str(number): token for number, token in enumerate(others)}}


def _with_specials(
    tokenizer: Any,
    files: ModelFiles,
    specials: Dict[str, Any],
    required: Container[str],
    processing: Callable[..., Any],
) -> Any:
    """Add special tokens and a post-processor to a tokenizer. Raises SourceError if the vocabulary lacks one."""
    absent = [key for key, token in specials.items() if tokenizer.token_to_id(_content(token)) is None]
    for key in absent:
        if key in required or key.isdigit():
            raise SourceError(f"vocabulary lacks the token {_content(specials[key])!r}", files.folder, _GET_AGAIN)
    tokenizer.add_special_tokens([_added_token(token) for key, token in specials.items() if key not in absent])
    tokens = [_content(specials[key]) for key in ("sep_token", "cls_token")]
    tokenizer.post_processor = processing(*((token, tokenizer.token_to_id(token)) for token in tokens))
    return tokenizer


def _content(token: Any) -> str:
    return str_of(token.get("content") if isinstance(token, dict) else token, "a token")


def _added_token(token: Any) -> Any:
    flags = {"normalized": False}
    if isinstance(token, dict):
        flags.update((name, token[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token)
    return _library().AddedToken(_content(token), **flags)

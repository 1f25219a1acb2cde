"""Tokenizer files of a model folder, read as the fast tokenizers of transformers read them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Callable, Container, Dict, Iterator, Optional, Tuple

from offramp.errors import OfframpError, SourceError, import_error
from offramp.tasks.model_files import AnyFolder, ModelFiles, files_of
from offramp.tasks.tokenizer_settings import TokenizerSettings, length_of, read_settings

_LAYOUTS: Tuple[Tuple[str, ...], ...] = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))
_SENTENCEPIECE = ("sentencepiece.bpe.model", "spiece.model", "tokenizer.model")
_CONFIG = "tokenizer_config.json"
_SAVE_FAST = "save a fast tokenizer there: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_WORDPIECE_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
_BYTE_BPE_CLASSES = ("RobertaTokenizer",)
_BERT_SPECIALS = {key + "_token": f"[{key.upper()}]" for key in ("unk", "sep", "pad", "cls", "mask")}
_ROBERTA_SPECIALS = {
    "bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>",
    "pad_token": "<pad>", "mask_token": "<mask>",
}  # fmt: skip


def has_tokenizer(folder: AnyFolder) -> bool:
    """Return whether the folder has the files that `TextEncoder.from_folder` needs."""
    files = files_of(folder)
    return _layout(files) is not None or read_settings(files) is not None


def tokenizer_length(folder: AnyFolder) -> Optional[int]:
    """Return the tokens to which the tokenizer of a folder truncates; None: it names no limit, or no sensible one."""
    files = files_of(folder)
    settings = read_settings(files) or _settings(files.read_object(_CONFIG, _SAVE_FAST))
    return settings.max_length


def read_tokenizer(files: ModelFiles) -> Tuple[Any, TokenizerSettings]:
    """Read the `tokenizers.Tokenizer` of a model folder or a store, and the settings for it.

    A store that was divided where transformers is installed has the tokenizer and the settings of `AutoTokenizer` (see
    `checkpoints.tokenizing`). Otherwise the files are `tokenizer.json`, else `vocab.txt` (BERT layout), else
    `vocab.json` with `merges.txt` (RoBERTa layout). As in transformers, `tokenizer_config.json` then overrides what
    `tokenizer.json` says about case, accents, Chinese characters and the space before the first word, and adds tokens.

    Raises SourceError for a folder without a tokenizer, MissingExtraError without the tokenizers library; other errors
    are those of the library (see `library_errors`).
    """
    settings = read_settings(files)
    if settings is not None:
        with files.opened(str(settings.tokenizer)) as path:
            tokenizer = _library().Tokenizer.from_file(path)
    else:
        tokenizer, config = _from_files(files)
        settings = _settings(config, (tokenizer.truncation or {}).get("direction", "right"))
    if settings.splits_special_tokens:
        tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()  # a tokenizer.json may pad every text to 128 tokens
    return tokenizer, settings


def _from_files(files: ModelFiles) -> Tuple[Any, Dict[str, Any]]:
    """Return the tokenizer of the first layout that a folder has, and its `tokenizer_config.json`."""
    layout = _layout(files)
    if layout is None:
        sentencepiece = next((name for name in _SENTENCEPIECE if files.has(name)), None)
        if sentencepiece is not None:
            raise SourceError(f"only a sentencepiece tokenizer ({sentencepiece})", files.folder, _SAVE_FAST)
        looked_for = ", ".join(" with ".join(names) for names in _LAYOUTS)
        raise SourceError(f"no tokenizer (looked for {looked_for})", files.folder, "copy the tokenizer's files there")
    own = files.read_object(_CONFIG, _SAVE_FAST)
    config = {"tokenizer_class": files.read_object("config.json", _SAVE_FAST).get("tokenizer_class"), **own}
    return _BUILDERS[_LAYOUTS.index(layout)](files, config), config


def _settings(config: Dict[str, Any], side: str = "right") -> TokenizerSettings:
    """Return the settings in a `tokenizer_config.json`; `side` is the one of truncation in `tokenizer.json`."""
    return TokenizerSettings(
        max_length=length_of(config.get("model_max_length", config.get("max_len"))),
        keeps_end=config.get("truncation_side", side) == "left",
        has_types="token_type_ids" in config.get("model_input_names", ["token_type_ids"]),
        splits_special_tokens=bool(config.get("split_special_tokens")),
    )


@contextmanager
def library_errors(files: ModelFiles) -> Iterator[None]:
    """Convert errors of the tokenizers library, which raises plain Exception, to SourceError."""
    try:
        yield
    except OfframpError:
        raise
    except Exception as error:
        file = files.folder / (_layout(files) or ("",))[0]
        raise SourceError(f"tokenizer cannot be read ({error})", file, _SAVE_FAST) from error


def _layout(files: ModelFiles) -> Optional[Tuple[str, ...]]:
    return next((names for names in _LAYOUTS if all(map(files.has, names))), None)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise import_error(error, "tokenizers", "edge") from None
    return tokenizers


def _from_tokenizer_json(files: ModelFiles, config: Dict[str, Any]) -> Any:
    library = _library()
    with files.opened("tokenizer.json") as path:
        tokenizer = library.Tokenizer.from_file(path)
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
    for number, token in sorted(tokens.items(), key=lambda item: int(item[0])):
        content = _content(token)
        if tokenizer.token_to_id(content) is None:
            add = tokenizer.add_special_tokens if token.get("special") else tokenizer.add_tokens
            add([_added_token(token)])
            if tokenizer.token_to_id(content) != int(number):
                raise SourceError(f"token {content!r} cannot have the id {number}", files.folder, _SAVE_FAST)


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


_BUILDERS = (_from_tokenizer_json, _from_wordpiece, _from_byte_bpe)
"""Builders for the layouts of `_LAYOUTS`, in the same order."""


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
        given.update(files.read_object("special_tokens_map.json", _SAVE_FAST))
    others = [*(given.get("additional_special_tokens") or []), *(given.get("added_tokens_decoder") or {}).values()]
    others += files.read_object("added_tokens.json", _SAVE_FAST)
    named = {key: given[key] for key in defaults if given[key] is not None}
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
            raise SourceError(f"vocabulary lacks the token {_content(specials[key])!r}", files.folder, _SAVE_FAST)
    tokenizer.add_special_tokens([_added_token(token) for key, token in specials.items() if key not in absent])
    tokens = [_content(specials[key]) for key in ("sep_token", "cls_token")]
    tokenizer.post_processor = processing(*((token, tokenizer.token_to_id(token)) for token in tokens))
    return tokenizer


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _added_token(token: Any) -> Any:
    flags = {"normalized": False}
    if isinstance(token, dict):
        flags.update((name, token[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token)
    return _library().AddedToken(_content(token), **flags)

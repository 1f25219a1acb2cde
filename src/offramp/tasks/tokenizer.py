"""Tokenizer files of a model folder, read as the fast tokenizers of transformers read them."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Container, Dict, Iterator, Optional, Tuple, Union

from offramp.errors import OfframpError, SourceError, import_error

_LAYOUTS: Tuple[Tuple[str, ...], ...] = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))
_SENTENCEPIECE = ("sentencepiece.bpe.model", "spiece.model", "tokenizer.model")
_SAVE_FAST = "save a fast tokenizer there: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_WORDPIECE_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
_BYTE_BPE_CLASSES = ("RobertaTokenizer",)
_BERT_SPECIALS = {key + "_token": f"[{key.upper()}]" for key in ("unk", "sep", "pad", "cls", "mask")}
_ROBERTA_SPECIALS = {
    "bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>",
    "pad_token": "<pad>", "mask_token": "<mask>",
}  # fmt: skip


def has_tokenizer(folder: Union[str, Path]) -> bool:
    """Return whether the folder has the files that `TextEncoder.from_folder` needs."""
    return _layout(Path(folder)) is not None


def tokenizer_length(folder: Union[str, Path]) -> Optional[int]:
    """Return `model_max_length` of `tokenizer_config.json`, or None if it is absent or stands for "unlimited"."""
    found = read_object(Path(folder) / "tokenizer_config.json").get("model_max_length")
    return int(found) if isinstance(found, (int, float)) and 0 < found < 1 << 20 else None


def read_tokenizer(folder: Path) -> Tuple[Any, Dict[str, Any]]:
    """Read the `tokenizers.Tokenizer` of a model folder, and its `tokenizer_config.json`.

    The files are `tokenizer.json`, else `vocab.txt` (BERT layout), else `vocab.json` with `merges.txt` (RoBERTa
    layout). As in transformers, `tokenizer_config.json` overrides what `tokenizer.json` says about case, accents,
    Chinese characters and the space before the first word.

    Raises SourceError for a folder without a tokenizer, MissingExtraError without the tokenizers library; other errors
    are those of the library (see `library_errors`).
    """
    layout = _layout(folder)
    if layout is None:
        sentencepiece = next((name for name in _SENTENCEPIECE if (folder / name).is_file()), None)
        if sentencepiece is not None:
            raise SourceError(f"only a sentencepiece tokenizer ({sentencepiece})", folder, _SAVE_FAST)
        looked_for = ", ".join(" with ".join(names) for names in _LAYOUTS)
        raise SourceError(f"no tokenizer (looked for {looked_for})", folder, "copy the tokenizer's files there")
    own = read_object(folder / "tokenizer_config.json")
    config = {"tokenizer_class": read_object(folder / "config.json").get("tokenizer_class"), **own}
    return _BUILDERS[_LAYOUTS.index(layout)](folder, config), config


@contextmanager
def library_errors(folder: Path) -> Iterator[None]:
    """Convert errors of the tokenizers library, which raises plain Exception, to SourceError."""
    try:
        yield
    except OfframpError:
        raise
    except Exception as error:
        file = folder / (_layout(folder) or ("",))[0]
        raise SourceError(f"tokenizer cannot be read ({error})", file, _SAVE_FAST) from error


def _layout(folder: Path) -> Optional[Tuple[str, ...]]:
    return next((names for names in _LAYOUTS if all((folder / name).is_file() for name in names)), None)


def read_object(path: Path, remedy: str = _SAVE_FAST) -> Dict[str, Any]:
    """Read a JSON object of a model folder. Returns {} if the file is absent. Raises SourceError."""
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"not JSON ({error})", path, remedy) from None
    if not isinstance(tree, dict):
        raise SourceError("not a JSON object", path, remedy)
    return tree


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise import_error(error, "tokenizers", "edge") from None
    return tokenizers


def _from_tokenizer_json(folder: Path, config: Dict[str, Any]) -> Any:
    library = _library()
    tokenizer = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
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


def _from_wordpiece(folder: Path, config: Dict[str, Any]) -> Any:
    library = _library()
    specials = _specials(folder, config, _WORDPIECE_CLASSES, _BERT_SPECIALS)
    unknown = _content(specials["unk_token"])
    tokenizer = library.Tokenizer(library.models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token=unknown))
    tokenizer.normalizer = library.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    required = ("unk_token", "cls_token", "sep_token")
    return _with_specials(tokenizer, folder, specials, required, library.processors.BertProcessing)


def _from_byte_bpe(folder: Path, config: Dict[str, Any]) -> Any:
    library = _library()
    specials = _specials(folder, config, _BYTE_BPE_CLASSES, _ROBERTA_SPECIALS)
    model = library.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = library.Tokenizer(model)
    add_prefix_space = config.get("add_prefix_space", False)
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    required = ("cls_token", "sep_token")
    return _with_specials(tokenizer, folder, specials, required, library.processors.RobertaProcessing)


_BUILDERS = (_from_tokenizer_json, _from_wordpiece, _from_byte_bpe)
"""Builders for the layouts of `_LAYOUTS`, in the same order."""


def _specials(folder: Path, config: Dict[str, Any], known: Container[str], defaults: Dict[str, str]) -> Dict[str, Any]:
    """Return the special tokens by name, or by number if they have none. Each is a string or has a key `content`.

    Raises SourceError unless the tokenizer class is known. The class says how a vocabulary is applied: `vocab.txt` of
    Japanese BERT needs a morphological analyser.
    """
    name = config["tokenizer_class"]
    if name is not None and (name[:-4] if name.endswith("Fast") else name) not in known:
        raise SourceError(f"only the vocabulary of a {name}, which does not say how to apply it", folder, _SAVE_FAST)
    given = {**defaults, **config}
    if "added_tokens_decoder" not in config:
        given.update(read_object(folder / "special_tokens_map.json"))
    others = [*(given.get("additional_special_tokens") or []), *(given.get("added_tokens_decoder") or {}).values()]
    others += read_object(folder / "added_tokens.json")
    named = {key: given[key] for key in defaults if given[key] is not None}
    return {**named, **{str(number): token for number, token in enumerate(others)}}


def _with_specials(
    tokenizer: Any, folder: Path, specials: Dict[str, Any], required: Container[str], processing: Callable[..., Any]
) -> Any:
    """Add special tokens and a post-processor to a tokenizer. Raises SourceError if the vocabulary lacks one."""
    absent = [key for key, token in specials.items() if tokenizer.token_to_id(_content(token)) is None]
    for key in absent:
        if key in required or key.isdigit():
            raise SourceError(f"vocabulary lacks the token {_content(specials[key])!r}", folder, _SAVE_FAST)
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

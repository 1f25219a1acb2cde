"""Settings by which transformers applies a tokenizer, and the proof that offramp applies it in the same way.

They lie in `offramp_tokenizer.json` beside the tokenizer: `tokenizers.Tokenizer` keeps none of them.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Optional

from offramp.errors import DamagedError
from offramp.program.checks import NAMED, POSITIVE, WrongError, parse
from offramp.tasks.model_files import ModelFiles

SETTINGS = "offramp_tokenizer.json"
FAST_TOKENIZER = "offramp_fast_tokenizer.json"
"""The tokenizer that transformers made, where `tokenizer.json` of the model is absent or another one."""
UNLIMITED = 1 << 40
"""Number of tokens from which a length stands for "unlimited"; transformers writes 10^30."""


@dataclass(frozen=True)
class TokenizerProof:
    """Result of the comparison with `AutoTokenizer`: all probes had the same token ids and types."""

    num_probes: int
    transformers: str
    """Version of the library."""
    tokenizers: str
    """Version of the library."""


@dataclass(frozen=True)
class TokenizerSettings:
    """Settings of a tokenizer."""

    tokenizer: Optional[str] = field(default=None, metadata=NAMED)
    """Name of the file with the `tokenizers.Tokenizer`; None: it is made from the files of the model."""
    max_length: Optional[int] = field(default=None, metadata=POSITIVE)
    """Tokens to which texts are truncated where no other length is given; None: the length of the model."""
    keeps_end: bool = False
    """Truncation removes the beginning of a text."""
    has_types: bool = True
    """The second text of a pair has token type 1; otherwise all types are 0."""
    splits_special_tokens: bool = False
    """Special tokens within a text are split like other words."""
    proof: Optional[TokenizerProof] = None
    """None where transformers was not installed, or cannot make a fast tokenizer."""

    def to_json(self) -> bytes:
        """Return the content of the file."""
        return json.dumps(asdict(self), indent=1).encode() + b"\n"


def read_settings(files: ModelFiles) -> Optional[TokenizerSettings]:
    """Return the settings in a folder, or None where it has none or they name no tokenizer. Raises DamagedError."""
    if not files.has(SETTINGS):
        return None
    try:
        settings = parse(TokenizerSettings, files.read(SETTINGS))
        if settings.tokenizer is not None and not files.has(settings.tokenizer):
            raise WrongError(f"there is no file {settings.tokenizer}")
    except WrongError as wrong:
        path = files.folder / SETTINGS
        raise DamagedError(f"settings of the tokenizer: {wrong}", path, "divide the model again") from None
    return None if settings.tokenizer is None else settings


def length_of(value: Any) -> Optional[int]:
    """Return `model_max_length` of a tokenizer in tokens, or None if it is absent or stands for "unlimited"."""
    return int(value) if type(value) in (int, float) and 1 <= value < UNLIMITED else None

"""Reads a `config.json` into an `Encoder`, with the keys, defaults and checks of transformers.

A value for which transformers computes something that offramp does not is refused by key and value, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offramp.errors import SourceError
from offramp.program.encoder import ACTIVATIONS, Encoder
from offramp.program.program import PROBLEMS

MAX_LAYERS = 4096
MAX_LABELS = 1 << 20
_MAX_COUNT = 1 << 40


@dataclass(frozen=True)
class Key:
    """The name of a value in config.json, its default, and a second name that transformers understands."""

    name: str
    default: object
    alias: str = ""

    def find(self, config: Mapping[str, Any]) -> Any:
        """Return the value. Raises SourceError if the two names have different values."""
        value = config.get(self.name, config.get(self.alias, self.default))
        if self.alias in config and config[self.alias] != value:
            raise bad_value(self.name, value, f"but {self.alias} is {shown(config[self.alias])}")
        return value


@dataclass(frozen=True)
class Keys:
    """Keys of the values that an Encoder needs; None where a family has no such value."""

    hidden_size: Key
    num_layers: Key
    num_heads: Key
    intermediate_size: Key
    activation: Key
    vocab_size: Key
    pad_token: Key
    max_positions: Key = Key("max_position_embeddings", 512)
    token_types: Key | None = Key("type_vocab_size", 2)
    embedding_size: Key | None = None
    norm_epsilon: Key | None = Key("layer_norm_eps", 1e-12)
    """None: 1e-12, whatever the config says."""
    positions_after_padding: bool = False
    """Positions are counted from `pad_token + 1`, as fairseq does."""


def shown(value: object) -> str:
    """Return an untrusted value as text that is safe for one line of a terminal."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


def bad_value(key: str, value: object, expected: str) -> SourceError:
    """Return the error for a value that is not allowed."""
    return SourceError(f"{key} is {shown(value)}: {expected}", "config.json", "divide a model of a supported form")


def read_encoder(config: Mapping[str, Any], keys: Keys, head_activation: str | None) -> Encoder:
    """Return the Encoder of a config, with labels and problem if it has a head (`head_activation` is not None).

    Raises SourceError naming key and value.
    """
    _refuse_other_forms(config)
    hidden_size = _count(config, keys.hidden_size)
    num_heads = _count(config, keys.num_heads)
    if hidden_size % num_heads:
        raise bad_value(keys.hidden_size.name, hidden_size, f"not a multiple of the number of heads, {num_heads}")
    vocab_size = _count(config, keys.vocab_size)
    pad_token = _pad_token(config, keys, vocab_size)
    offset = pad_token + 1 if keys.positions_after_padding else 0
    labels = _labels(config) if head_activation is not None else ()
    return Encoder(
        hidden_size=hidden_size,
        embedding_size=_count(config, keys.embedding_size) if keys.embedding_size else hidden_size,
        num_layers=_count(config, keys.num_layers, high=MAX_LAYERS),
        num_heads=num_heads,
        intermediate_size=_count(config, keys.intermediate_size),
        activation=_activation(config, keys.activation),
        norm_epsilon=_epsilon(config, keys.norm_epsilon) if keys.norm_epsilon else 1e-12,
        vocab_size=vocab_size,
        max_length=_count(config, keys.max_positions, low=offset + 1) - offset,
        position_offset=offset,
        num_token_types=_count(config, keys.token_types) if keys.token_types else 0,
        pad_token=pad_token,
        head_activation=head_activation,
        problem=_problem(config, len(labels)) if head_activation is not None else None,
        labels=labels,
    )


def _refuse_other_forms(config: Mapping[str, Any]) -> None:
    if config.get("position_embedding_type") not in (None, "absolute"):
        raise bad_value("position_embedding_type", config["position_embedding_type"], "only absolute is supported")
    for key in ("is_decoder", "add_cross_attention", "pruned_heads"):
        if config.get(key):
            raise bad_value(key, config[key], "only whole encoders are supported")


def _count(config: Mapping[str, Any], key: Key, low: int = 1, high: int = _MAX_COUNT) -> int:
    value = key.find(config)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise bad_value(key.name, value, f"expected an integer from {low} to {high}")
    return value


def _pad_token(config: Mapping[str, Any], keys: Keys, vocab_size: int) -> int:
    if keys.pad_token.find(config) is None and not keys.positions_after_padding:
        return 0  # any token will do: padding is masked
    return _count(config, keys.pad_token, low=0, high=vocab_size - 1)


def _activation(config: Mapping[str, Any], key: Key) -> str:
    value = key.find(config)
    if value not in ACTIVATIONS:
        raise bad_value(key.name, value, f"known are {', '.join(ACTIVATIONS)}")
    return value


def _epsilon(config: Mapping[str, Any], key: Key) -> float:
    value = key.find(config)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise bad_value(key.name, value, "expected a small number")
    return float(value)


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    id2label = config.get("id2label")
    if id2label is None:
        num_labels = _count(config, Key("num_labels", 2), high=MAX_LABELS)
        return tuple(f"LABEL_{i}" for i in range(num_labels))
    if not isinstance(id2label, dict) or not 1 <= len(id2label) <= MAX_LABELS:
        raise bad_value("id2label", id2label, "expected an object of labels")
    labels = [id2label.get(str(i)) for i in range(len(id2label))]
    if not all(isinstance(label, (str, int)) for label in labels):
        raise bad_value("id2label", id2label, f"expected a label for each id from 0 to {len(labels) - 1}")
    return tuple(map(str, labels))


def _problem(config: Mapping[str, Any], num_labels: int) -> str:
    problem = config.get("problem_type")
    if problem is None:
        return "regression" if num_labels == 1 else "single_label_classification"
    if problem not in PROBLEMS:
        raise bad_value("problem_type", problem, f"known are {', '.join(PROBLEMS)}")
    if problem == "single_label_classification" and num_labels == 1:
        raise bad_value("problem_type", problem, "it needs at least two labels")
    if problem == "regression" and num_labels != 1:
        raise bad_value("problem_type", problem, f"one value is answered, not {num_labels}")
    return problem

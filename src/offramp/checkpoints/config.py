"""Reads a `config.json` into an `Encoder`, with the keys, defaults and checks of transformers.

A value for which transformers computes something that offramp does not is refused by key and value, never guessed.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from offramp.errors import SourceError
from offramp.program.checks import WrongError, int_of, read_used
from offramp.program.encoder import ACTIVATIONS, Encoder, wrong_heads
from offramp.program.program import PROBLEMS, REGRESSION, SINGLE_LABEL

MAX_LAYERS = 1024
"""Most layers: each has three of the steps that a program may have."""
MAX_LABELS = 1 << 20
_MAX_COUNT, _MAX_DIGITS = 1 << 40, 20
MEANING = ("id2label", "num_labels", "problem_type", "position_embedding_type")
"""Keys that decide what an answer means. A value that is refused would, in a run, give other answers without a word."""


_SIZES = ("hidden_size", "num_attention_heads", "intermediate_size", "n_embd", "n_head", "dim", "n_heads", "hidden_dim")
"""Keys of sizes, which some models give as lists."""
_LAYERS, _POSITIONS = {"high": MAX_LAYERS}, {"low": -1, "high": 1 << 24}


@dataclass(frozen=True)
class _Used:
    """Keys of any config.json that are used before transformers sees it, or that say how much memory it takes then."""

    model_type: str | None = None
    architectures: tuple[str, ...] | None = None
    problem_type: str | None = None
    id2label: dict[str, Any] | None = None
    num_labels: int | None = field(default=None, metadata={"high": MAX_LABELS})
    vocab_size: int | None = field(default=None, metadata={"high": 1 << 31})
    pad_token_id: int | None = field(default=None, metadata={"low": -1})
    type_vocab_size: int | None = field(default=None, metadata={"high": 1 << 24})
    max_position_embeddings: int | None = field(default=None, metadata=_POSITIONS)
    n_positions: int | None = field(default=None, metadata=_POSITIONS)
    num_hidden_layers: int | None = field(default=None, metadata=_LAYERS)
    n_layers: int | None = field(default=None, metadata=_LAYERS)
    n_layer: int | None = field(default=None, metadata=_LAYERS)
    initializer_range: float | None = field(default=None, metadata={"low": 0, "high": 1e3})


_COUNT = re.compile(r"(^|_)(layers?|depths?|blocks?|stages?|groups?|group_num)$")
"""End of the keys that count modules, each of which takes memory and time, whatever weights there are."""
_DEEPEST = 4
"""Configs within configs, as of the parts of a model, that are looked into."""


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Raise SourceError for a config.json with a key of another type, out of range or NaN, which `where` names."""
    try:
        _require_no_nan(config)
        read_used(_Used, config)
        _check_counts(config)
        for key in _SIZES:
            if isinstance(config.get(key), (int, float)):
                int_of(config[key], key, 1, 1 << 31)
    except WrongError as wrong:
        raise SourceError(f"config.json: {wrong}", where, "get the file again, or correct the key") from None


def _require_no_nan(config: Mapping[str, Any]) -> None:
    """Raise WrongError naming a key whose value is NaN, with the keys that it lies in: answers would be NaN."""
    left: list[tuple[str, Any]] = [("", config)]
    while left:
        name, value = left.pop()
        if isinstance(value, float) and math.isnan(value):
            raise WrongError(f"{shown(name)} is NaN")
        inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        left += [(f"{name}.{key}" if name else str(key), each) for key, each in inner]


def _check_counts(config: Mapping[str, Any], depth: int = 0) -> None:
    """Raise WrongError for a number of layers, or a list of such numbers, that no model has."""
    for key, value in config.items():
        if isinstance(value, dict) and depth < _DEEPEST:
            _check_counts(value, depth + 1)
        elif _COUNT.search(key):
            numbers = [each for each in (value if isinstance(value, list) else [value]) if type(each) is int]
            if sum(numbers) > MAX_LAYERS:
                raise WrongError(f"{key} counts {sum(numbers)}, expected at most {MAX_LAYERS}")


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

    def read(self, config: Mapping[str, Any], is_allowed: Callable[[Any], bool], expected: str) -> Any:
        """Return the value. Raises SourceError naming key and value unless it is allowed."""
        value = self.find(config)
        if not is_allowed(value):
            raise bad_value(self.name, value, expected)
        return value

    def count(self, config: Mapping[str, Any], low: int = 1, high: int = _MAX_COUNT) -> int:
        """Return the value, an integer from `low` to `high`."""
        expected = f"expected an integer from {low} to {high}"
        return self.read(config, lambda value: type(value) is int and low <= value <= high, expected)


@dataclass(frozen=True)
class Keys:
    """Keys of the values that an Encoder needs; None where a family has no such value. Defaults are those of BERT."""

    hidden_size: Key = Key("hidden_size", 768)
    num_layers: Key = Key("num_hidden_layers", 12)
    num_heads: Key = Key("num_attention_heads", 12)
    intermediate_size: Key = Key("intermediate_size", 3072)
    activation: Key = Key("hidden_act", "gelu")
    vocab_size: Key = Key("vocab_size", 30522)
    pad_token: Key = Key("pad_token_id", 0)
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


def bad_value(key: str, value: object, expected: str, remedy: str | None = None) -> SourceError:
    """Return the error for a value that is not allowed where a model is divided by names."""
    remedy = remedy or f"divide {'' if key in MEANING else 'with --method eager, or '}a model of a supported form"
    return SourceError(f"{key} is {shown(value)}: {expected}", "config.json", remedy)


def read_encoder(config: Mapping[str, Any], keys: Keys, head_activation: str | None) -> Encoder:
    """Return the Encoder of a config, with labels and problem if it has a head (`head_activation` is not None).

    Raises SourceError naming key and value.
    """
    _refuse_other_forms(config)
    hidden_size, num_heads = keys.hidden_size.count(config), keys.num_heads.count(config)
    if hidden_size % num_heads:
        raise bad_value(keys.hidden_size.name, hidden_size, f"not a multiple of the number of heads, {num_heads}")
    wrong = wrong_heads(hidden_size, num_heads)
    if wrong is not None:
        raise bad_value(keys.num_heads.name, num_heads, wrong)
    vocab_size = keys.vocab_size.count(config)
    takes_any_padding = keys.pad_token.find(config) is None and not keys.positions_after_padding  # it is masked
    pad_token = 0 if takes_any_padding else keys.pad_token.count(config, low=0, high=vocab_size - 1)
    offset = pad_token + 1 if keys.positions_after_padding else 0
    labels = () if head_activation is None else _labels(config)
    return Encoder(
        hidden_size=hidden_size,
        embedding_size=keys.embedding_size.count(config) if keys.embedding_size else hidden_size,
        num_layers=keys.num_layers.count(config, high=MAX_LAYERS),
        num_heads=num_heads,
        intermediate_size=keys.intermediate_size.count(config),
        activation=keys.activation.read(config, ACTIVATIONS.__contains__, f"known are {', '.join(ACTIVATIONS)}"),
        norm_epsilon=_epsilon(config, keys.norm_epsilon) if keys.norm_epsilon else 1e-12,
        vocab_size=vocab_size,
        max_length=keys.max_positions.count(config, low=offset + 1) - offset,
        position_offset=offset,
        num_token_types=keys.token_types.count(config) if keys.token_types else 0,
        pad_token=pad_token,
        head_activation=head_activation,
        problem=None if head_activation is None else _problem(config, len(labels)),
        labels=labels,
    )


def _refuse_other_forms(config: Mapping[str, Any]) -> None:
    if config.get("position_embedding_type") not in (None, "absolute"):
        what = f"position_embedding_type is {shown(config['position_embedding_type'])}: only absolute is supported"
        raise SourceError(
            f"{what}, and transformers 5 ignores the key", "config.json", "use a model of absolute positions"
        )
    for key in ("is_decoder", "add_cross_attention", "pruned_heads"):
        if config.get(key):
            raise bad_value(key, config[key], "only whole encoders are supported")


def _epsilon(config: Mapping[str, Any], key: Key) -> float:
    return float(
        key.read(config, lambda value: type(value) in (int, float) and 0 <= value < 1, "expected a small number")
    )


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    id2label = config.get("id2label")
    if id2label is not None and not isinstance(id2label, dict):
        raise bad_value("id2label", id2label, "expected an object of labels")
    size = len(_by_id(id2label or {}))
    if id2label is None or config.get("num_labels", size) != size:  # transformers prefers num_labels
        num_labels = Key("num_labels", 2).count(config, high=MAX_LABELS)
        return tuple(f"LABEL_{i}" for i in range(num_labels))
    if not 1 <= size <= MAX_LABELS:
        raise bad_value("id2label", id2label, f"expected 1 to {MAX_LABELS} labels")
    return labels_by_id(id2label)


def labels_by_id(id2label: Mapping[Any, Any]) -> tuple[str, ...]:
    """Return the label of each output of a head by its id, as transformers does; a head has as many outputs as labels.

    Raises SourceError for an output without a label: the file may count from 1, or mean another head.
    """
    labels = _by_id(id2label)
    last = len(labels) - 1
    if set(labels) != set(range(last + 1)) or not all(isinstance(label, (str, int)) for label in labels.values()):
        expected = f"expected a label for each id from 0 to {last}, the outputs of the head"
        raise bad_value("id2label", id2label, expected, f"number the labels from 0 to {last} in id2label")
    return tuple(str(labels[index]) for index in range(last + 1))


def _by_id(id2label: Mapping[Any, Any]) -> dict[int, Any]:
    try:
        if any(len(str(key)) > _MAX_DIGITS for key in id2label):  # long numbers take quadratic time
            raise ValueError
        return {int(key): label for key, label in id2label.items()}
    except (TypeError, ValueError):
        raise bad_value("id2label", id2label, "expected ids as keys", "number the labels from 0 in id2label") from None


def problem_of(problem: object, num_labels: int) -> str:
    """Return the kind of answers of a head from `problem_type`, by the rule of transformers where that is None.

    Raises SourceError for another one: transformers would compute probabilities, whatever it means.
    """
    if problem is None:
        return REGRESSION if num_labels == 1 else SINGLE_LABEL
    if not isinstance(problem, str) or problem not in PROBLEMS:
        known = ", ".join(PROBLEMS)
        raise bad_value("problem_type", problem, f"known are {known}", "set problem_type to one of them, or to null")
    return problem


def _problem(config: Mapping[str, Any], num_labels: int) -> str:
    problem, named = problem_of(config.get("problem_type"), num_labels), config.get("id2label")
    is_alone = (num_labels if named is None else len(named)) == 1
    if is_alone and config.get("problem_type") == SINGLE_LABEL:
        raise bad_value("problem_type", problem, "it needs at least two labels")
    return problem

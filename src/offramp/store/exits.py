"""Exits on disk: the heads in `exits.safetensors`, what they are in `exits.json`; in run folders and stores alike.

Exit K, from 1, stands after layer K; the last exit is the model's own head and is not in these files. It opens nothing
itself.

Shapes: H hidden, C labels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Dict, Optional, Sequence, Tuple, Type

from offramp.errors import RefusedError, StoreError
from offramp.store.manifest import Encoder
from offramp.store.reader import Store
from offramp.store.shapes import Shapes, linear_shapes

FORMS = ("mean-linear", "cls-linear", "own", "own-shared")
"""What a head is: the mean over tokens or the first token and one linear layer; two layers of the first token, as the
family's own head; the same with the model's own first layer for all exits, as PABEE has it."""
DEFAULT_FORM = "mean-linear"
_SHARED = {"own-shared": ("exit.dense.weight", "exit.dense.bias")}
_REMEDY = "train the exits again"


@dataclass(frozen=True)
class ExitsDescription:
    """What `exits.json` says."""

    form: str
    """One of FORMS."""
    trained: bool
    points: Tuple[Tuple[str, int, int], ...] = ()
    """Of a model that is no encoder of texts: (module, which of its calls, width) of the call that begins behind each
    exit.
    """
    weights_sha256: str = ""
    """Of a module that is not in the run folder itself: the weights that the exits were trained with."""


def describe_exits(
    form: str, num_exits: int, points: Sequence[Tuple[str, int, int]] = (), weights_sha256: str = ""
) -> bytes:
    """The content of `exits.json` for trained exits; `num_exits` counts the last one, which is not in the files."""
    tree: Dict[str, Any] = {"form": form, "exits": list(range(1, num_exits)), "trained": True}
    if points:
        tree["points"] = [list(point) for point in points]
    if weights_sha256:
        tree["weights_sha256"] = weights_sha256
    return json.dumps(tree).encode() + b"\n"


def parse_exits(data: bytes, where: object, error: Type[RefusedError] = StoreError) -> ExitsDescription:
    """Read `exits.json`. Raises `error` for what is no description, or of a form that this version does not know."""
    try:
        tree = json.loads(data)
        form = tree["form"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise error("exits.json does not name the form of the exits", where, _REMEDY) from None
    if not isinstance(form, str) or form not in FORMS:
        raise error(f"unknown form of exits {form!r}, known: {sorted(FORMS)}", where, _REMEDY)
    try:
        points = tuple((str(module), int(number), int(width)) for module, number, width in tree.get("points", ()))
    except (TypeError, ValueError):
        raise error("exits.json does not say where the exits stand", where, _REMEDY) from None
    return ExitsDescription(form, bool(tree.get("trained")), points, str(tree.get("weights_sha256", "")))


def read_exits(store: Store) -> Optional[ExitsDescription]:
    """What the exits of a store are; None if it has none. Raises StoreError."""
    exits = store.contents.exits
    return None if exits is None else parse_exits(store.read_file(exits.description), store.path)


def exit_shapes(encoder: Encoder, form: str) -> Shapes:
    """Shape of each role of one exit."""
    hidden, num_labels = encoder.hidden_size, len(encoder.labels)
    if form.endswith("linear"):
        return linear_shapes("exit", num_labels, hidden)
    return {**linear_shapes("exit.dense", hidden, hidden), **linear_shapes("exit.out", num_labels, hidden)}


def exit_name(role: str, number: int, form: str) -> str:
    """What a role of exit `number` is called in `exits.safetensors`: `exit.2.weight`; without number where shared."""
    return role if role in _SHARED.get(form, ()) else f"exit.{number}{role[len('exit') :]}"


def exit_tensors(encoder: Encoder, form: str) -> Dict[str, Tuple[int, ...]]:
    """Name and shape of all tensors of `exits.safetensors`, float32 each."""
    shapes = exit_shapes(encoder, form)
    numbers = range(1, encoder.num_layers)
    return {exit_name(role, number, form): shape for number in numbers for role, shape in shapes.items()}

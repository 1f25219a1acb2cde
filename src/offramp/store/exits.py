"""Exits on disk: the heads in `exits.safetensors`, their description in `exits.json`; in run folders and stores alike.

Exit K, from 1, stands after layer K; the last exit is the model's own head and is not in these files.
"""

import json
from dataclasses import dataclass
from typing import Any, Dict, Optional, Sequence, Tuple, Type

from offramp.errors import RefusedError, StoreError
from offramp.program.heads import FORMS, HeadForm
from offramp.program.program import Program
from offramp.store.reader import Store

Point = Tuple[str, int, int]
"""(module, number of its call, width) of the call that begins after an exit."""
_REMEDY = "train the exits again"


@dataclass(frozen=True)
class ExitsDescription:
    """Content of `exits.json`."""

    form: HeadForm
    trained: bool
    points: Tuple[Point, ...] = ()
    """Calls that begin after the exits; empty for text encoders."""
    weights_sha256: str = ""
    """Digest of the module weights that the exits were trained with, where these are not in the run folder itself."""


def describe_exits(form: str, num_exits: int, points: Sequence[Point] = (), weights_sha256: str = "") -> bytes:
    """Return the content of `exits.json` for trained exits.

    Args:
        form: key of FORMS.
        num_exits: number of exits with the last one, which is not in the files.
    """
    tree: Dict[str, Any] = {"form": form, "exits": list(range(1, num_exits)), "trained": True}
    if points:
        tree["points"] = [list(point) for point in points]
    if weights_sha256:
        tree["weights_sha256"] = weights_sha256
    return json.dumps(tree).encode() + b"\n"


def parse_exits(data: bytes, where: object, error: Type[RefusedError] = StoreError) -> ExitsDescription:
    """Return what `exits.json` describes. Raises `error` where it cannot be read or its form is unknown."""
    remedy = f"{_REMEDY}, and divide again" if error is StoreError else _REMEDY
    try:
        tree = json.loads(data)
        form = tree["form"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise error("exits.json does not name the form of the exits", where, remedy) from None
    if not isinstance(form, str) or form not in FORMS:
        raise error(f"unknown form of exits {form!r}, known: {sorted(FORMS)}", where, remedy)
    try:
        points = tuple((str(module), int(number), int(width)) for module, number, width in tree.get("points", ()))
    except (TypeError, ValueError):
        raise error("exits.json does not name the places of the exits", where, remedy) from None
    return ExitsDescription(FORMS[form], bool(tree.get("trained")), points, str(tree.get("weights_sha256", "")))


def read_exits(store: Store) -> Optional[ExitsDescription]:
    """Return the description of a store's exits, or None if it has none. Raises StoreError."""
    exits = store.manifest.exits
    return None if exits is None else parse_exits(store.read_file(exits.description), store.path)


def exit_tensors(program: Program, form: HeadForm) -> Dict[str, Tuple[int, ...]]:
    """Return name -> shape of all tensors of `exits.safetensors`, float32 each."""
    values, output = program.values(), program.output
    places = [stage.exit for stage in program.layers if stage.exit is not None]
    return {
        form.tensor_name(role, number): shape
        for number, place in enumerate(places, start=1)
        for role, shape in form.shapes(values[place].width, output.num_labels if output else 0).items()
    }

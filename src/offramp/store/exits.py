"""Exits on disk: the heads in `exits.safetensors`, their description in `exits.json`; in run folders and stores alike.

Exit K, from 1, stands after layer K; the last exit is the model's own head and is not in these files.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Sequence, Tuple, Type

from offramp.errors import RefusedError, StoreError
from offramp.program.checks import WrongError, parse
from offramp.program.heads import FORMS, HeadForm
from offramp.program.program import Program
from offramp.store.reader import Store

Point = Tuple[str, int, int]
"""(module, number of its call, width) of the call that begins after an exit."""
MAX_EXITS = 4096
"""Most exits of a model: one after each layer."""
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


@dataclass(frozen=True)
class _File:
    """The keys of `exits.json`."""

    form: str = field(metadata={"choices": tuple(FORMS)})
    exits: Optional[Tuple[int, ...]] = field(default=None, metadata={"most": MAX_EXITS})
    trained: bool = False
    points: Tuple[Tuple[str, int, int], ...] = field(default=(), metadata={"low": 1, "most": MAX_EXITS})
    weights_sha256: str = field(default="", metadata={"pattern": re.compile("([0-9a-f]{64})?")})

    def __post_init__(self) -> None:
        if self.exits is not None and self.exits != tuple(range(1, len(self.exits) + 1)):
            raise WrongError("exits must be 1, 2, 3 and so on: one after each layer but the last")
        if self.exits is not None and self.points and len(self.points) != len(self.exits):
            raise WrongError(f"points has {len(self.points)} elements for {len(self.exits)} exits")


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


def parse_exits(
    data: bytes, where: object, error: Type[RefusedError] = StoreError, num_places: Optional[int] = None
) -> ExitsDescription:
    """Return what `exits.json` describes. Raises `error` naming the key that is wrong.

    `num_places`: exits that the model has, without the last one, where that is known.
    """
    try:
        found = parse(_File, data, fills=True)
        if found.exits is not None and num_places not in (None, len(found.exits)):
            raise WrongError(f"exits has {len(found.exits)} elements, the model has {num_places} places for exits")
    except WrongError as wrong:
        remedy = f"{_REMEDY}, and divide again" if error is StoreError else _REMEDY
        raise error(f"exits.json: {wrong}", where, remedy) from None
    return ExitsDescription(FORMS[found.form], found.trained, found.points, found.weights_sha256)


def read_exits(store: Store) -> Optional[ExitsDescription]:
    """Return the description of a store's exits, or None if it has none. Raises StoreError."""
    exits, program = store.manifest.exits, store.program
    if exits is None:
        return None
    places = sum(stage.exit is not None for stage in program.layers) if program.stages else None
    return parse_exits(store.read_file(exits.description), store.path, num_places=places)


def exit_tensors(program: Program, form: HeadForm) -> Dict[str, Tuple[int, ...]]:
    """Return name -> shape of all tensors of `exits.safetensors`, float32 each."""
    values, output = program.values(), program.output
    places = [stage.exit for stage in program.layers if stage.exit is not None]
    return {
        form.tensor_name(role, number): shape
        for number, place in enumerate(places, start=1)
        for role, shape in form.shapes(values[place].width, output.num_labels if output else 0).items()
    }

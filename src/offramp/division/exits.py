"""Exits of a run folder, copied into the store of a divided module."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from offramp.checkpoints.source import EXITS, TRAINING
from offramp.errors import SourceError
from offramp.program.program import REGRESSION, SINGLE_LABEL, Call
from offramp.store import StoreWriter
from offramp.store import manifest as m
from offramp.store.exits import parse_exits


@dataclass(frozen=True)
class TrainedExits:
    """Two files, and the problem and labels of the model that they were trained with."""

    heads: Path
    description: Path
    task: tuple[str | None, tuple[str, ...]]

    @property
    def calls(self) -> tuple[Call, ...]:
        """Calls that begin after an exit. Raises SourceError for a description that cannot be read."""
        points = parse_exits(self.description.read_bytes(), self.description.parent, SourceError).points
        return tuple(Call(module, number) for module, number, _ in points)

    def added_to(self, manifest: m.Manifest, writer: StoreWriter) -> m.Manifest:
        """Copy the exits and return the manifest with them. Raises SourceError unless layers begin where they stand."""
        program = manifest.program
        assert program.module is not None and program.stages, "divided by export"
        steps = accumulate(len(layer.steps) for layer in program.layers[:-1])
        starts = tuple(program.module.parts[index].start for index in steps)
        if starts != self.calls:
            what = f"{len(self.calls)} exits were trained, and the graphs of this division have {len(starts)} places"
            raise SourceError(what, self.description.parent, "train the exits again")
        return replace(manifest, exits=writer.add_exits(self.heads, self.description))


def own_exits(folder: Path, weights_sha256: str) -> TrainedExits:
    """Return the exits that `training.train_exits` wrote for a module that is no checkpoint.

    Raises SourceError for another folder, and where the exits were trained with other weights than the module has.
    """
    heads, description, training = (folder / name for name in (*EXITS, TRAINING))
    missing = next((path.name for path in (heads, description, training) if not path.is_file()), None)
    if missing:
        raise SourceError(f"no run folder with exits: {missing} is missing", folder, "train them with train_exits")
    found = parse_exits(description.read_bytes(), folder, SourceError)
    if not found.trained or found.weights_sha256 != weights_sha256:
        what = "the exits were trained with other weights than the module has"
        raise SourceError(what, folder, "safetensors.torch.load_model(module, FOLDER/model.safetensors)")
    try:
        labels = tuple(map(str, json.loads(training.read_bytes())["labels"]))
    except (ValueError, KeyError, TypeError):
        raise SourceError(f"{TRAINING} does not name the labels", folder, "train the exits again") from None
    return TrainedExits(heads, description, (SINGLE_LABEL, labels) if labels else (REGRESSION, ("score",)))

"""The verb divide: turn a model folder or a module into a store. The source is never changed.

A text encoder of a known family is divided by the names of its tensors (`names/build.py`). Any other model is run once,
and its division proves itself (`modules.py`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from offramp.checkpoints.families import FAMILIES
from offramp.checkpoints.hub import resolve
from offramp.checkpoints.source import open_source
from offramp.division.names.build import divide_by_names, encoder_graphs
from offramp.division.names.kernels import IR, OPSET
from offramp.errors import SourceError, StoreError, UsageError
from offramp.program.program import CAPTURED
from offramp.store import Store
from offramp.store import manifest as m
from offramp.store.exits import read_exits
from offramp.store.files import make_folder, write_atomic

METHODS = ("auto", "names", "eager", "export")


def divide(
    model: Any,
    *rest: Any,
    method: str = "auto",
    stage_bytes: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    more_inputs: Sequence[Any] = (),
    exits: str | os.PathLike | None = None,
    force: bool = False,
    offline: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> Path:
    """Divide a model into a store: `divide(folder, store)`, or `divide(module, example_inputs, store)`.

    Args:
        model: a Hugging Face checkpoint folder, an id on the hub, or any `torch.nn.Module` in evaluation mode.
        rest: for a module its example inputs (a tensor, a tuple, or a dictionary), then the folder to make. An
            interrupted division is resumed.
        method: `names`: by the names of the tensors, without PyTorch, for text encoders of the BERT family;
            `eager`: by a run, for any model of transformers; `stream` then runs the model's own code;
            `export`: like `eager`, and the stages become graphs, which run without that code and can carry exits;
            `auto`: `names` where possible, else `eager`, with graphs if the model is a classifier and can be exported.
        stage_bytes: most bytes of weights that a stage should need, for a division by a run; None: as much as one of
            the model's blocks.
        inputs: example inputs by name, for a folder that is divided by a run; None: made up from its config.
        more_inputs: for a module, further examples to prove the division with.
        exits: for a module, the run folder that `training.train_exits` wrote; a checkpoint folder has its own.
        force: replace an existing store.
        offline: take hub models from the cache only.
        say: called with a line for each shard, and with warnings (conversion to F32, missing graphs).

    Raises SourceError, StageError, PickleError, UsageError (target exists), DiskFullError, MissingExtraError.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, not {method!r}")
    store = Path(rest[-1])
    if not isinstance(model, (str, os.PathLike)):
        from offramp.division.modules import divide_module

        example, _ = rest
        _refuse_existing(store, force)
        return divide_module(
            model,
            example,
            store,
            more_inputs=more_inputs,
            exits=None if exits is None else Path(exits),
            stage_bytes=stage_bytes,
            method=method,
            force=force,
            say=say,
        )
    if exits is not None:
        raise UsageError("a checkpoint folder has its exits beside its weights", exits, "divide that folder")
    _refuse_existing(store, force)
    folder = resolve(str(model), offline)
    _refuse_itself(folder, store)
    if method in ("eager", "export") or (method == "auto" and not _has_known_names(folder)):
        from offramp.division.checkpoints import divide_checkpoint

        why = "requested" if method != "auto" else "not a text classifier of the BERT family, so it is run once"
        say(f"method {'eager' if method == 'auto' else method}: {why}")
        return divide_checkpoint(
            folder, store, example_inputs=inputs, stage_bytes=stage_bytes, method=method, force=force, say=say
        )
    if stage_bytes is not None or inputs is not None:
        raise UsageError("stage sizes and example inputs are for a division by a run", folder, "give --method eager")
    say("method names: a text encoder whose tensors have known names")
    with open_source(folder) as source:
        return divide_by_names(source, store, force, say)


def _has_known_names(folder: Path) -> bool:
    """Return whether the names of the tensors are known, and the model has a classification head or none."""
    with open_source(folder) as source:
        if source.config.get("model_type") not in FAMILIES:
            return False
        try:
            architecture = FAMILIES[source.config["model_type"]].architecture(source.config)
        except SourceError:
            return False
        return architecture.endswith(("Model", "ForSequenceClassification"))


def add_graphs(store: str | os.PathLike) -> Path:
    """Write the ONNX graphs of an encoder's store that was divided without onnx; its manifest becomes format 3.

    Raises MissingExtraError without onnx, StoreError, DiskFullError.
    """
    folder = Path(store)
    with Store(folder, verify="never") as opened:
        manifest, labels = opened.manifest, opened.labels
        if any(kernel.template == CAPTURED for kernel in opened.program.kernels.values()) or not opened.program.stages:
            what = f"this is the store of a {manifest.source.architecture} that was divided by a run"
            raise StoreError(what, folder, "its graphs are written by divide --method export")
        exits = read_exits(opened)
    graphs = encoder_graphs(manifest.program, None if exits is None else exits.form)
    make_folder(folder / "graphs")
    written = {}
    for kernel, data in graphs.items():
        file = write_atomic(folder / "graphs" / f"{kernel}.onnx", [data])
        written[kernel] = m.Graph(f"graphs/{file.file}", file.bytes, file.sha256, OPSET, IR)
    listed = write_atomic(folder / m.LABELS_FILE, [m.labels_bytes(labels)]) if labels else None
    manifest = dataclasses.replace(manifest, graphs=written, labels=listed, inline_labels=())
    write_atomic(folder / m.FILE_NAME, [m.dumps(manifest)])
    return folder


def _refuse_existing(store: Path, force: bool) -> None:
    """Raise UsageError before anything is read or hashed; the writer checks again, under its lock."""
    if os.path.lexists(store) and not force:
        raise UsageError("target exists", store, "choose another name, or --force to replace it")


def _refuse_itself(folder: Path, store: Path) -> None:
    """Raise UsageError where --force would replace the source while it is read: a store is a model folder too."""
    if store.exists() and store.samefile(folder):
        raise UsageError("model and store are the same folder", store, "choose another name for the store")

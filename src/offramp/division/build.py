"""The verb divide: turn a model folder or a module into a store. The source is never changed.

A text encoder of a known family is divided by the names of its tensors (`names/build.py`). Any other model is run once,
and its division proves itself (`modules.py`).
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from offramp.checkpoints.families import FAMILIES
from offramp.checkpoints.hub import resolve
from offramp.checkpoints.source import ADAPTER, Source, open_source
from offramp.division.config import DivisionConfig
from offramp.division.names.build import divide_by_names
from offramp.errors import UsageError
from offramp.program.checks import require_known
from offramp.store.manifest import FP16, FP32
from offramp.store.writer import mark_of, may_fill, require_replaceable


def divide(model: Any, *rest: Any, **options: Any) -> Path:
    """Divide a model into a store: `divide(folder, store)`, or `divide(module, example_inputs, store)`.

    Args:
        model: a Hugging Face checkpoint folder, an id on the hub, or any `torch.nn.Module` in evaluation mode.
        rest: for a module its example inputs (a tensor, a tuple, or a dictionary), then the folder to make. An
            interrupted division is resumed.
        options: fields of `DivisionConfig`: `method`, `stage_bytes`, `block_bytes`, `inputs`, `more_inputs`, `exits`,
            `dtype`, `force`, `offline`, `say`.

    Raises SourceError, StageError, PickleError, UsageError (target exists), DiskFullError, MissingExtraError, and
    ValueError for an unknown option.
    """
    require_known(DivisionConfig, options, "option of divide")
    config = DivisionConfig(**options)
    is_module = not isinstance(model, (str, os.PathLike))
    if is_module:
        _require_graphs(config, "it is a module, which is divided by a run")
    if len(rest) != 1 + is_module:
        raise TypeError("divide(folder, store) or divide(module, example_inputs, store)")
    store = Path(rest[-1])
    if os.path.lexists(store) and not (may_fill(store) or mark_of(store)):  # the writer checks again, under its lock
        require_replaceable(store, config.force)
    if is_module:
        _require_no_blocks(config)
        from offramp.division.modules import divide_module

        return divide_module(model, rest[0], store, config)
    if config.exits is not None:
        raise UsageError("a checkpoint folder has its exits beside its weights", config.exits, "divide that folder")
    folder = resolve(str(model), config.offline)
    if (folder / ADAPTER).is_file() and find_spec("peft") is not None:
        from offramp.division.adapters import merged

        with merged(folder, store, config) as whole:
            return _divide_folder(whole, store, config)
    return _divide_folder(folder, store, config)


def _divide_folder(folder: Path, store: Path, config: DivisionConfig) -> Path:
    """Divide a model folder by the method that is asked for, or fits."""
    if store.exists() and store.samefile(folder):  # --force would replace the source while it is read
        raise UsageError("model and store are the same folder", store, "choose another name for the store")
    with open_source(folder) as source:
        source.require_unquantised()
        why = _why_a_run(source) if config.method == "auto" else None if config.method == "names" else "requested"
        if why is None:
            if config.stage_bytes is not None or config.inputs is not None:
                what = "stage sizes and example inputs are for a division by a run"
                raise UsageError(what, folder, "give --method eager")
            config.say("method names: a text encoder whose tensors have known names")
            return divide_by_names(source, store, config)
    _require_no_blocks(config)
    _require_graphs(config, why if config.method == "auto" else f"--method {config.method} was given")
    from offramp.division.checkpoints import divide_checkpoint

    config.say(f"method {'eager' if config.method == 'auto' else config.method}: {why}")
    return divide_checkpoint(folder, store, config)


def _require_no_blocks(config: DivisionConfig) -> None:
    """Raise UsageError where a model that is divided by a run should be cut into blocks."""
    if config.block_bytes is not None:
        what = "only text encoders that are divided by the names of their tensors are cut into blocks"
        raise UsageError(what, None, "divide it without --block")


def _require_graphs(config: DivisionConfig, why: str) -> None:
    """Raise UsageError for a model that is divided by a run into a store of a dtype that it cannot have."""
    if config.dtype == FP16:
        what = f"stores of {config.dtype} are of text encoders that are divided by the names of their tensors: {why}"
        raise UsageError(what, None, f"divide it with --dtype {FP32}")
    if config.dtype != FP32 and config.method == "eager":
        what = f"stores of {config.dtype} have graphs, and --method eager keeps the model's own code"
        raise UsageError(what, None, "give --method export")


def _why_a_run(source: Source) -> str | None:
    """Return why a folder is divided by a run, with what that costs where its family is known; None: by names."""
    kind = source.config.get("model_type")
    family, misfit = FAMILIES.get(str(kind)), source.misfit()
    other = "not a text classifier of the BERT family, so it is run once"
    if family is None:
        return f"{'config.json has no model_type' if kind is None else f'model_type {kind}'}, {other}"
    if misfit is not None:
        return f"{misfit.what}, so it is run once, which takes torch, transformers, and more time and memory"
    is_known = family.architecture(source.config).endswith(("Model", "ForSequenceClassification"))
    return None if is_known else f"{family.architecture(source.config)}, {other}"

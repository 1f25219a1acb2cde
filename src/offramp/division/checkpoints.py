"""Checkpoint folders of transformers as modules that can be divided: the class without weights, the weights read one by
one, and example inputs.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp.checkpoints.inputs import BATCH, LENGTH, example_texts, padded, task_of, texts_of
from offramp.checkpoints.source import Source, open_source
from offramp.division.config import DivisionConfig
from offramp.division.exits import TrainedExits
from offramp.division.modules import CHUNK_BYTES, Origin, divide_module, in_memory
from offramp.errors import OfframpError, SourceError, UsageError
from offramp.program.program import Texts
from offramp.store import StoreWriter
from offramp.store import manifest as m
from offramp.streaming.placeholders import Weight, weights_of
from offramp.streaming.placement import DTYPES
from offramp.streaming.weightless import class_of_folder, of_class, with_dtypes
from offramp.tasks.pixels import ImageEncoder
from offramp.tasks.processors import FILE_NAME as PROCESSOR

SECONDS = 1
"""Seconds of sound in a made-up example."""
_LISTED = 5


def divide_checkpoint(folder: Path, store: Path, config: DivisionConfig) -> Path:
    """Divide a checkpoint folder of any architecture that transformers has, by a run of it.

    Raises SourceError for what is missing or foreign in the folder, StageError, UsageError.
    """
    with open_source(folder) as source:
        cls = class_of_folder(folder)
        module = of_class(cls, folder)
        names = _names(module, source)
        if names is None:
            config.say("transformers computes weights of this model from several tensors: it is loaded as a whole once")
            module = cls.from_pretrained(folder, local_files_only=True).eval()
        else:
            with_dtypes(module, {name: source.entries[found][0] for name, found in names.items()})
            _fill_buffers(weights_of(module), names, source)
        texts = texts_of(module, folder)
        origin = _origin(module, names, source, texts)
        example = dict(config.inputs) if config.inputs else example_of(module, folder, texts)
        return divide_module(module, example, store, config, origin)


def _names(module: nn.Module, source: Source) -> dict[str, str] | None:
    """Return weight -> its tensor in the checkpoint, by any of its names, as transformers would rename them.

    Returns None where transformers computes weights from several tensors. Raises SourceError naming what does not fit.
    """
    renamed = _renamed(module, source)
    if renamed is None:
        return None
    names: dict[str, str] = {}
    missing, mis_shaped = [], []
    for name, weight in weights_of(module).items():
        found = next((renamed[n] for n in (name, *weight.aliases) if n in renamed), None)
        if found is None:
            missing.append(name)
        elif source.entries[found][1] != tuple(weight.tensor.shape):
            mis_shaped.append(f"{name} {source.entries[found][1]} not {tuple(weight.tensor.shape)}")
        else:
            names[name] = found
    for what, wrong in (("missing", missing), ("mis-shaped", mis_shaped)):
        if wrong:
            more = ", ..." if len(wrong) > _LISTED else ""
            remedy = "load it with transformers, and call offramp.divide(module, example_inputs, store)"
            shown = ", ".join(wrong[:_LISTED])
            raise SourceError(f"{len(wrong)} tensors {what}: {shown}{more}", source.folder, remedy)
    return names


def _renamed(module: nn.Module, source: Source) -> dict[str, str] | None:
    """Return name in the module -> name in the checkpoint, or None where one weight is made from several tensors."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(module)  # type: ignore[arg-type]
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    known = module.state_dict()
    prefix = str(getattr(module, "base_model_prefix", "") or "") or None
    found = {}
    for name in source.entries:
        new, converter = rename_source_key(name, renamings, converters, prefix, known)
        if converter is not None and name not in known:
            return None
        found[name if name in known else new] = name
    return found


def _origin(module: nn.Module, names: Mapping[str, str] | None, source: Source, texts: Texts | None) -> Origin:
    """Return the origin in the checkpoint's tensors, or in the module where it holds its weights (`names` is None)."""

    def write_files(writer: StoreWriter) -> list[m.File]:
        paths = [source.folder / "config.json", *source.companions()]
        return [writer.add_copy(path.name, path) for path in paths]

    kind = str(getattr(module.config, "model_type", "module"))
    described = m.Source(source.fingerprint(), type(module).__name__, kind, "eager")
    if names is None:
        found = in_memory(module, weights_of(module))
        return replace(found, source=described, write_files=write_files, exits=_exits_of(module, source), texts=texts)
    return Origin(
        lambda name: _read(source, names[name]),
        lambda name: source.chunks(names[name], CHUNK_BYTES),
        described,
        write_files,
        _exits_of(module, source),
        texts,
    )


def _exits_of(module: nn.Module, source: Source) -> TrainedExits | None:
    """Return the exits of a run folder, or None."""
    found = source.exits()
    return None if found is None else TrainedExits(*found, task_of(module))


def _read(source: Source, name: str) -> Tensor:
    dtype, shape = source.entries[name]
    data = torch.empty(shape, dtype=DTYPES[dtype])
    source.read_into(name, data.view(-1).view(torch.uint8).numpy().data)
    return data


def _fill_buffers(weights: Mapping[str, Weight], names: Mapping[str, str], source: Source) -> None:
    for name, weight in weights.items():
        if weight.is_buffer:
            weight.put(_read(source, names[name]))


def example_of(module: nn.Module, folder: Path, texts: Texts | None = None) -> dict[str, Any]:
    """Return made-up inputs of a model of transformers: those of tokens, pixels and sound that its `forward` names.

    Sizes are those of its config and image processor. Raises UsageError where `forward` names none of them.
    """
    if texts is not None:
        return example_texts(module, texts)
    config, taken = module.config, inspect.signature(module.forward).parameters
    generator = torch.Generator().manual_seed(0)
    vocabulary = _first(config, "vocab_size", 100)
    ids = torch.randint(3, max(vocabulary, 4), (BATCH, LENGTH), generator=generator)
    size = _pixels(folder) or _first(config, "image_size", 224)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = torch.randn(BATCH, _first(config, "num_channels", 3), height, width, generator=generator)
    made: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": padded(ids),
        "decoder_input_ids": ids[:, : LENGTH // 2],
        "pixel_values": pixels,
        "input_values": torch.randn(BATCH, 16_000 * SECONDS, generator=generator),
        "input_features": torch.randn(
            BATCH,
            _first(config, "num_mel_bins", 80),
            2 * _first(config, "max_source_positions", 1500),
            generator=generator,
        ),
    }
    main = str(getattr(module, "main_input_name", "input_ids"))
    wanted = {main, *(name for name in ("pixel_values", "input_ids") if name in taken)} & made.keys() & taken.keys()
    if "input_ids" in wanted:
        wanted |= {"attention_mask"} & taken.keys()
    if getattr(config, "is_encoder_decoder", False):
        wanted |= {"decoder_input_ids"} & taken.keys()
    if not wanted:
        raise UsageError(
            f"no example can be made up for a {type(module).__name__}", None, "give --inputs FILE.safetensors"
        )
    example = {name: made[name] for name in made if name in wanted}
    return {**example, **({"use_cache": False} if "use_cache" in taken else {})}


def _pixels(folder: Path) -> tuple[int, int] | None:
    """Return height and width of the images that the folder's image processor makes, if it has a known one."""
    if not (folder / PROCESSOR).is_file():
        return None
    try:
        return ImageEncoder.from_folder(folder).shape
    except OfframpError:
        return None


def _first(config: Any, name: str, default: Any) -> Any:
    """Return a setting of a config, or of one of the configs within it."""
    for part in (config, *(getattr(config, inner, None) for inner in ("text_config", "vision_config", "encoder"))):
        found = getattr(part, name, None)
        if found is not None:
            return found
    return default


def load_inputs(path: Path) -> dict[str, Tensor]:
    """Return example inputs by name from a safetensors file or an .npz. Raises UsageError."""
    if not path.is_file():
        raise UsageError("no such file", path, "save the inputs with numpy.savez or safetensors")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        if importlib.util.find_spec("safetensors") is None:
            raise UsageError("safetensors is not installed", path, "save the inputs with numpy.savez as .npz")
        from safetensors.torch import load_file

        return load_file(path)
    except UsageError:
        raise
    except Exception as error:  # NumPy, zip files and safetensors raise classes of their own
        raise UsageError(f"cannot be read as example inputs ({error})", path, "save them with numpy.savez") from None

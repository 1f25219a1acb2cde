"""Checkpoint folders of transformers as modules that can be divided: the class without weights, the weights read one by
one, and example inputs.
"""

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
from offramp.checkpoints.tokenizing import Say, store_tokenizer
from offramp.division.config import DivisionConfig
from offramp.division.messages import listed
from offramp.division.modules import CHUNK_BYTES, Origin, TrainedExits, divide_module, in_memory
from offramp.errors import OfframpError, SourceError, UsageError
from offramp.program.program import Texts
from offramp.store import StoreWriter
from offramp.store import manifest as m
from offramp.streaming.placeholders import weights_of
from offramp.streaming.placement import DTYPES
from offramp.streaming.weightless import class_of_folder, of_class, with_dtypes
from offramp.tasks.pixels import ImageEncoder
from offramp.tasks.processors import FILE_NAME as PROCESSOR

SECONDS = 1
"""Seconds of sound in a made-up example."""


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
            for name, weight in weights_of(module).items():
                if weight.is_buffer:
                    weight.put(_read(source, names[name]))
        texts = texts_of(module, folder)
        example = dict(config.inputs) if config.inputs else example_of(module, folder, texts)
        return divide_module(module, example, store, config, _origin(module, names, source, texts, config.say))


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
            remedy = "load it with transformers, and call offramp.divide(module, example_inputs, store)"
            raise SourceError(f"{len(wrong)} tensors {what}: {listed(wrong)}", source.folder, remedy)
    return names


def _renamed(module: nn.Module, source: Source) -> dict[str, str] | None:
    """Return name in the module -> name in the checkpoint, or None where one weight is made from several tensors."""
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms = get_model_conversion_mapping(module)  # type: ignore[arg-type]
    renamings = [each for each in transforms if isinstance(each, loading.WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, loading.WeightConverter)]
    known = module.state_dict()
    prefix = str(getattr(module, "base_model_prefix", "") or "") or None
    found = {}
    for name in source.entries:
        new, converter = loading.rename_source_key(name, renamings, converters, prefix, known)
        if converter is not None and name not in known:
            return None
        found[name if name in known else new] = name
    return found


def _origin(
    module: nn.Module, names: Mapping[str, str] | None, source: Source, texts: Texts | None, say: Say
) -> Origin:
    """Return the origin in the checkpoint's tensors, or in the module where it holds its weights (`names` is None)."""

    def write_files(writer: StoreWriter) -> list[m.File]:
        paths = [source.folder / "config.json", *source.companions()]
        made = [] if texts is None else store_tokenizer(source.folder, writer, say)
        return [*(writer.add_copy(path.name, path) for path in paths), *made]

    kind = str(getattr(module.config, "model_type", "module"))
    described = m.Source(source.fingerprint(), type(module).__name__, kind, "eager")
    files = source.exits()
    exits = None if files is None else TrainedExits(*files, task_of(module))
    if names is None:
        found = in_memory(module, weights_of(module))
        return replace(found, source=described, write_files=write_files, exits=exits, texts=texts)
    return Origin(
        lambda name: _read(source, names[name]),
        lambda name: source.chunks(names[name], CHUNK_BYTES),
        described,
        write_files,
        exits,
        texts,
    )


def _read(source: Source, name: str) -> Tensor:
    dtype, shape = source.entries[name]
    data = torch.empty(shape, dtype=DTYPES[dtype])
    source.read_into(name, data.view(-1).view(torch.uint8).numpy().data)
    return data


def example_of(module: nn.Module, folder: Path, texts: Texts | None = None) -> dict[str, Any]:
    """Return made-up inputs of a model of transformers: those of tokens, pixels and sound that its `forward` names.

    Sizes are those of its config and image processor. Raises UsageError where `forward` names none of them.
    """
    if texts is not None:
        return example_texts(module, texts)
    config, taken = module.config, inspect.signature(module.forward).parameters.keys()
    wanted = {str(getattr(module, "main_input_name", "input_ids")), "pixel_values", "input_ids"} & taken
    if "input_ids" in wanted:
        wanted.add("attention_mask")
    if getattr(config, "is_encoder_decoder", False):
        wanted.add("decoder_input_ids")
    example = {name: tensor for name, tensor in _made_up(config, folder).items() if name in wanted & taken}
    if not example:
        what = f"no example can be made up for a {type(module).__name__}"
        raise UsageError(what, None, "give --inputs FILE.safetensors")
    return {**example, **({"use_cache": False} if "use_cache" in taken else {})}


def _made_up(config: Any, folder: Path) -> dict[str, Tensor]:
    """Return random inputs of every kind, by the names that models of transformers use."""

    def size(name: str, default: int) -> Any:
        """Return a setting of the config, or of one of the configs within it."""
        inner = (getattr(config, part, None) for part in ("text_config", "vision_config", "encoder"))
        found = (getattr(part, name, None) for part in (config, *inner))
        return next((value for value in found if value is not None), default)

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, max(size("vocab_size", 100), 4), (BATCH, LENGTH), generator=generator)
    shape = _pixels(folder) or size("image_size", 224)
    height, width = shape if isinstance(shape, (list, tuple)) else (shape, shape)
    frames = (size("num_mel_bins", 80), 2 * size("max_source_positions", 1500))
    return {
        "input_ids": ids,
        "attention_mask": padded(ids),
        "decoder_input_ids": ids[:, : LENGTH // 2],
        "pixel_values": torch.randn(BATCH, size("num_channels", 3), height, width, generator=generator),
        "input_values": torch.randn(BATCH, 16_000 * SECONDS, generator=generator),
        "input_features": torch.randn(BATCH, *frames, generator=generator),
    }


def _pixels(folder: Path) -> tuple[int, int] | None:
    """Return height and width of the images that the folder's image processor makes, if it has a known one."""
    try:
        return ImageEncoder.from_folder(folder).shape if (folder / PROCESSOR).is_file() else None
    except OfframpError:
        return None


def load_inputs(path: Path) -> dict[str, Tensor]:
    """Return example inputs by name from a safetensors file or an .npz. Raises UsageError."""
    if not path.is_file():
        raise UsageError("no such file", path, "save the inputs with numpy.savez or safetensors")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        from safetensors.torch import load_file

        return load_file(path)
    except Exception as error:  # NumPy, zip files and safetensors raise classes of their own
        raise UsageError(f"cannot be read as example inputs ({error})", path, "save them with numpy.savez") from None

"""Checkpoint folders of transformers as modules that can be divided: the class without weights, the weights read one by
one, and example inputs.
"""

import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp.checkpoints.downloads import store_downloads
from offramp.checkpoints.inputs import (
    BATCH,
    CLASSIFIERS,
    LENGTH,
    example_ids,
    example_texts,
    padded,
    set_to_answer,
    task_of,
    texts_of,
)
from offramp.checkpoints.source import Source, open_source
from offramp.checkpoints.tokenizing import Say, store_tokenizer
from offramp.division.config import DivisionConfig
from offramp.division.messages import MERGE, adapter_tensors, advice, listed
from offramp.division.modules import CHUNK_BYTES, Origin, TrainedExits, divide_module, in_memory
from offramp.division.names.build import FLOATS
from offramp.errors import OfframpError, SourceError, UsageError, missing
from offramp.program.dtypes import FLOAT
from offramp.program.program import Texts
from offramp.store import StoreWriter
from offramp.store import manifest as m
from offramp.store.files import open_plain
from offramp.streaming.placeholders import Weight, pieces, weights_of
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
        # the engine computes in F32, as do the kernels of models that are divided by names
        has_graphs = cls.__name__.endswith(CLASSIFIERS) or config.dtype != m.FP32
        dtype = "float32" if has_graphs and config.method != "eager" else None
        module = of_class(cls, folder, dtype)
        found = _found(module, source, dtype)
        if found is None:
            config.say("transformers computes weights of this model from several tensors: it is loaded as a whole once")
            module = _loaded(cls, source, dtype)
        else:
            found.prepare(module, config)
        texts = texts_of(set_to_answer(module), folder)
        example = dict(config.inputs) if config.inputs else example_of(module, folder, texts)
        origin = _origin(module, found, source, texts, config.say, is_config_copied=dtype in (None, source.dtype))
        return divide_module(module, example, store, config, origin)


def _loaded(cls: Any, source: Source, dtype: str | None) -> nn.Module:
    """Return the module as transformers loads it. Raises SourceError for weights that it would make up."""
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    module, said = cls.from_pretrained(source.folder, local_files_only=True, output_loading_info=True, **options)
    if said["missing_keys"]:
        raise _missing(sorted(said["missing_keys"]), source)
    return module.eval()


@dataclass(frozen=True)
class _Found:
    """Weights of a module in the tensors of a checkpoint."""

    source: Source
    names: Mapping[str, str]
    """Weight -> its tensor in the checkpoint."""
    dtypes: Mapping[str, str]
    """Weight -> the dtype that it has in the store."""
    absent: Mapping[str, Tensor]
    """Weights that the checkpoint lacks: constants of the module, and NaN for parameters, which nothing may use."""
    left_out: tuple[str, ...]
    """Tensors of the checkpoint that are of no weight, and that transformers ignores."""

    @property
    def widened_from(self) -> str | None:
        """The first dtype that is converted to F32, if any is."""
        pairs = ((self.source.entries[self.names[name]][0], dtype) for name, dtype in self.dtypes.items())
        return next((found for found, dtype in pairs if found != dtype == FLOAT), None)

    def prepare(self, module: nn.Module, config: DivisionConfig) -> None:
        """Give the module the dtypes of the store, and its buffers; say what was converted, left out or lacks."""
        with_dtypes(module, dict(self.dtypes))
        for name, weight in weights_of(module).items():
            if weight.is_buffer and name in self.names:
                weight.put(self.read(name))
        if self.widened_from is not None:
            config.say(f"converted from {self.widened_from} to {FLOAT}")
        if self.left_out:
            what = f"tensors left out, which a {type(module).__name__} does not have"
            config.say(f"{len(self.left_out)} {what}: {listed(self.left_out)}")
        if self.absent:
            config.say(f"{len(self.absent)} tensors missing, which must not be used: {listed([*self.absent])}")

    def fetch(self, name: str) -> Tensor:
        """Return the data of a weight that is used. Raises SourceError for one that the checkpoint lacks."""
        if name in self.absent:
            raise _missing(list(self.absent), self.source)
        return self.read(name)

    def read(self, name: str) -> Tensor:
        """Return the data of a weight that the checkpoint has, as they are in the store."""
        dtype, shape = self.source.entries[self.names[name]]
        data = torch.empty(shape, dtype=DTYPES[dtype])
        self.source.read_into(self.names[name], data.view(-1).view(torch.uint8).numpy().data)
        return data.to(DTYPES[self.dtypes[name]])

    def chunks(self, name: str) -> Iterator[bytes | memoryview]:
        """Yield the data of a weight as they are in the store."""
        if name in self.absent:
            yield from pieces(self.absent[name], CHUNK_BYTES)
            return
        found, dtype = self.source.entries[self.names[name]][0], self.dtypes[name]
        for chunk in self.source.chunks(self.names[name], CHUNK_BYTES):
            if found == dtype:
                yield chunk
            else:
                data = torch.frombuffer(bytearray(chunk), dtype=DTYPES[found]).to(DTYPES[dtype])
                yield from pieces(data, CHUNK_BYTES)


def _found(module: nn.Module, source: Source, dtype: str | None) -> _Found | None:
    """Return weights and their tensors in the checkpoint, by any of their names, as transformers would rename them.

    Returns None where transformers computes weights from several tensors. Raises SourceError naming what does not fit.
    """
    renamed = _renamed(module, source)
    if renamed is None:
        return None
    names: dict[str, str] = {}
    absent: dict[str, Tensor] = {}
    known: set[str] = set()
    missing, mis_shaped = [], []
    for name, weight in weights_of(module).items():
        known |= {name, *weight.aliases}
        found = next((renamed[n] for n in (name, *weight.aliases) if n in renamed), None)
        if found is None and weight.is_buffer and weight.tensor.is_floating_point():
            missing.append(name)  # such as the mean of a norm, which no trace of a run shows
        elif found is None:
            absent[name] = _absent(weight)
        elif source.entries[found][1] != tuple(weight.tensor.shape):
            mis_shaped.append(f"{name} {source.entries[found][1]} not {tuple(weight.tensor.shape)}")
        else:
            names[name] = found
    for what, wrong in (("missing", missing), ("mis-shaped", mis_shaped)):
        if wrong:
            remedy = advice(missing, renamed)
            raise SourceError(f"{len(wrong)} tensors {what}: {listed(wrong)}", source.folder, remedy)
    left_out = tuple(found for name, found in renamed.items() if name not in known)
    if adapter_tensors(left_out):
        what = f"{len(left_out)} tensors unexpected: {listed(left_out)}"
        raise SourceError(what, source.folder, MERGE)
    dtypes = _dtypes(module, {name: source.entries[found][0] for name, found in names.items()}, dtype, source.folder)
    return _Found(source, names, dtypes, absent, left_out)


def _absent(weight: Weight) -> Tensor:
    """Return the value of a weight that a checkpoint lacks: a NaN that is used after all shows in the answer."""
    if weight.is_buffer:
        return weight.tensor
    kind = weight.tensor.dtype
    return torch.full(weight.tensor.shape, torch.nan if kind.is_floating_point else 0, dtype=kind)


def _missing(names: list[str], source: Source) -> SourceError:
    """Return the error for a checkpoint without weights that are used: transformers would make them up."""
    return SourceError(f"{len(names)} tensors missing: {listed(names)}", source.folder, advice(names, source.entries))


def _dtypes(module: nn.Module, found: Mapping[str, str], dtype: str | None, folder: Path) -> dict[str, str]:
    """Return weight -> its dtype in the store, given those in the checkpoint.

    Floats of several dtypes become the widest of them, unless the class keeps some in F32. Raises SourceError for other
    dtypes in place of floats: such weights are quantised.
    """
    floats = {name: found[name] for name, weight in weights_of(module).items() if name in found and _is_float(weight)}
    for name, kind in floats.items():
        if kind not in FLOATS:
            what = f"tensor {name} has dtype {kind}, so the weights are quantised"
            raise SourceError(what, folder, f"divide a model of {', '.join(FLOATS)}")
    widest = "F64" if dtype is None and "F64" in floats.values() else FLOAT
    kept = [getattr(module, f"_keep_in_fp32_modules{end}", None) or () for end in ("", "_strict")]
    mixed = {kind for name, kind in floats.items() if not any(part in name for part in (*kept[0], *kept[1]))}
    if dtype is None and len(mixed) == 1:
        return dict(found)
    return {**found, **dict.fromkeys(floats, widest)}


def _is_float(weight: Weight) -> bool:
    return weight.tensor.is_floating_point()


def _renamed(module: nn.Module, source: Source) -> dict[str, str] | None:
    """Return name in the module -> name in the checkpoint, or None where one weight is made from several tensors."""
    import transformers.core_model_loading as loading
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
    module: nn.Module, found: _Found | None, source: Source, texts: Texts | None, say: Say, *, is_config_copied: bool
) -> Origin:
    """Return the origin in the checkpoint's tensors, or in the module where it holds its weights (`found` is None)."""
    widened_from = None if found is None else found.widened_from

    def write_files(writer: StoreWriter) -> list[m.File]:
        path = source.folder / "config.json"
        copied = writer.add_copy(path.name, path) if is_config_copied else None
        config = copied or writer.add_file(path.name, source.config_in_float32())
        made = [] if texts is None else store_tokenizer(source.folder, writer, say)
        made += store_downloads(source.folder, writer)
        return [config, *(writer.add_copy(path.name, path) for path in source.companions()), *made]

    kind = str(getattr(module.config, "model_type", "module"))
    described = m.Source(source.fingerprint(), type(module).__name__, kind, "eager", widened_from)
    files = source.exits()
    exits = None if files is None else TrainedExits(*files, task_of(module))
    if found is None:
        held = in_memory(module, weights_of(module))
        return replace(held, source=described, write_files=write_files, exits=exits, texts=texts)
    return Origin(found.fetch, found.chunks, described, write_files, exits, texts)


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
    ids = example_ids(config, size("vocab_size", 100), generator)
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
    if not path.exists():
        raise missing(path)
    try:
        with os.fdopen(open_plain(path), "rb") as file:
            if path.suffix == ".npz":
                with np.load(file, allow_pickle=False) as arrays:
                    return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
            from safetensors.torch import load

            return load(file.read())
    except Exception as error:  # NumPy, zip files and safetensors raise classes of their own
        raise UsageError(f"cannot be read as example inputs ({error})", path, "save them with numpy.savez") from None

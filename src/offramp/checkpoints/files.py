"""Names of the files of a model folder, and what lies in a folder that has none of those with weights."""

import re
from pathlib import Path

from offramp.errors import SourceError

CONFIG = "config.json"
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
"""Suffix of the index of several files, after the name of a single one."""
WEIGHTS = tuple(name + end for name in (SAFETENSORS, PICKLE) for end in ("", INDEX))
"""Files of which a model folder has one."""
_SHARD = re.compile(r"(model|pytorch_model)-\d{5}-of-\d{5}\.(safetensors|bin)")
_VARIANT_INDEX = re.compile(r"(model\.safetensors|pytorch_model\.bin)\.index\.[\w-]+\.json")
"""Index of weights of another dtype, such as fp16, which `from_pretrained(variant="fp16")` reads."""
_SAFE, _PICKLES = (".safetensors",), (".bin", ".pt", ".pth", ".ckpt")
_NO_WEIGHTS = re.compile("training_args|optimizer|scheduler|scaler|rng_state|random_states|exits|adapter_|openvino")
"""Files of a training, of exits, of an adapter, and of OpenVINO, which have endings of weights."""
_FOREIGN = {
    "*.h5": "TensorFlow",
    "*.msgpack": "Flax",
    "*.ckpt.index": "TensorFlow 1",
    "*.gguf": "llama.cpp",
    "*.onnx": "ONNX",
    "onnx/*.onnx": "ONNX",
    "openvino_model.xml": "OpenVINO",
}
"""Pattern of files -> what alone reads the weights in them."""
_DEPTH = 2
"""Folders that are between that of a model in the cache of the hub and its files: snapshots, and the commit."""
_MOST = 5
"""Most folders that are named."""


def inner_models(folder: Path) -> list[str]:
    """Return the folders in a folder, or in those, that have a config.json; those with weights, where some have."""
    patterns = ["/".join([*["*"] * depth, CONFIG]) for depth in range(1, _DEPTH + 1)]
    found = sorted(path.parent for pattern in patterns for path in folder.glob(pattern))
    whole = [each for each in found if _has_weights(each)]
    return [each.relative_to(folder).as_posix() for each in whole or found][:_MOST]


def without_weights(folder: Path) -> SourceError:
    """Return the error for a folder with a config.json and no file of `WEIGHTS`, which says what it has instead."""
    what = f"not a model folder: no {SAFETENSORS}, no {PICKLE}, and no index of either"
    names = sorted(path.name for path in folder.iterdir() if not path.is_dir())
    broken = next((name for name in WEIGHTS if name in names), None)
    if broken is not None:
        return SourceError(f"{broken} is a link to a file that is not there", folder, "get the whole model again")
    inner = [each for each in inner_models(folder) if _has_weights(folder / each)]
    if inner:
        return SourceError(what, folder, f"name one of its folders: {', '.join(inner)}")
    shard, own = next(filter(_SHARD.fullmatch, names), None), _other_weights(names)
    if shard is not None:
        index = _SHARD.sub(r"\1.\2", shard) + INDEX
        return SourceError(f"{what}, but {shard}, a part of the weights", folder, f"get {index} of the model, too")
    if own is not None:
        return SourceError(f"{what}, but {own[0]}", folder, f"if that has the weights, rename it to {own[1]}")
    maker = next((maker for pattern, maker in _FOREIGN.items() if any(folder.glob(pattern))), None)
    if maker is not None:
        return SourceError(f"{what}: its weights are for {maker}", folder, "save the model with PyTorch as safetensors")
    return SourceError(what, folder, "save the model as safetensors")


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in WEIGHTS)


def _other_weights(names: list[str]) -> tuple[str, str] | None:
    """Return a file that may hold weights, or an index of several, and the name under which they would be found."""
    index = next(filter(_VARIANT_INDEX.fullmatch, names), None)
    if index is not None:
        return index, _VARIANT_INDEX.sub(r"\1", index) + INDEX
    found = [name for name in names if name.endswith((*_SAFE, *_PICKLES)) and not _NO_WEIGHTS.match(name)]
    first = next((name for name in found if name.endswith(_SAFE)), found[0] if found else None)
    return None if first is None else (first, SAFETENSORS if first.endswith(_SAFE) else PICKLE)

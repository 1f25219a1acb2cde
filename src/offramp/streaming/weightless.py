"""Modules without their weights, into which the weights of a store are put.

Parameters are on the meta device until a placeholder or a weight replaces them. Buffers are made by the module itself,
since some are in no checkpoint (rotary tables, position ids).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from offramp.errors import OfframpError, SourceError, StageError, UsageError, import_error
from offramp.streaming.placeholders import weights_of
from offramp.streaming.placement import DTYPES

_MOST_SAID = 300
"""Longest message of another library that is repeated."""


def weightless(build: Callable[[], nn.Module]) -> nn.Module:
    """Return the module that `build` builds, in evaluation mode, with parameters without data.

    Raises StageError for a buffer without data that no store or checkpoint has.
    """
    with register_module_parameter_registration_hook(_emptied):  # type: ignore[arg-type]
        module = build()
    if not isinstance(module, nn.Module):
        what = f"it builds a {type(module).__name__}, which is no module"
        raise UsageError(what, None, "give the torch.nn.Module that was divided, or its class")
    if hasattr(module, "tie_weights"):
        module.tie_weights()  # type: ignore[operator]
    module.eval()
    require_buffers(module)
    return module


def require_buffers(
    module: nn.Module, remedy: str = "give a module that is built already instead of its class"
) -> None:
    """Raise StageError for a buffer without data that no store or checkpoint has."""
    saved = {id(weight.tensor) for weight in weights_of(module).values()}
    for name, buffer in module.named_buffers():
        if buffer.is_meta and id(buffer) not in saved:
            raise StageError(f"buffer {name} has no data", type(module).__name__, remedy)


def _emptied(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    """Return a parameter without its data as soon as it is registered. One that is registered twice stays one:
    accelerate's `init_empty_weights` would untie it.
    """
    if parameter.is_meta:
        return parameter
    empty = type(parameter)(parameter.to("meta"), requires_grad=parameter.requires_grad)
    vars(empty).update(vars(parameter))
    return empty


def of_class(cls: Any, folder: Path, dtype: str | None = None) -> nn.Module:
    """Return a module of a class without its weights; transformers classes take the config in a folder.

    `cls` may be a function that builds a module. `dtype`: replaces the dtype of the config. Raises UsageError for
    another object.
    """
    if not callable(cls):
        what = f"a {type(cls).__name__} is no module"
        raise UsageError(what, None, "give the torch.nn.Module that was divided, or its class")
    build: Any = cls
    if not hasattr(build, "from_pretrained"):
        return weightless(build)
    config = config_of_folder(folder)
    if dtype is not None:
        config.dtype = dtype
    build = getattr(build, "_from_config", None) or build.from_config
    try:
        return weightless(lambda: build(config))
    except OfframpError:
        raise
    except Exception as error:  # whatever the class says of a config that is none of its kind
        what = f"config.json makes no {cls.__name__} ({_said(error)})"
        if isinstance(config, getattr(cls, "config_class", None) or ()):
            raise SourceError(what, folder, "correct its keys, or get the model again") from None
        raise SourceError(what, folder, "give a folder or a store of this class") from None


def class_of_folder(folder: Path) -> Any:
    """Return the transformers class that a folder names. Raises SourceError for none, and for code in the folder."""
    import transformers

    config = config_of_folder(folder)
    names = getattr(config, "architectures", None)
    if not isinstance(names, list) or not names:
        what = f"config.json names no architecture: the key architectures is {names or 'missing'!r}"
        raise SourceError(what, folder, 'add "architectures": [CLASS] to it, or save the model with save_pretrained')
    found = getattr(transformers, str(names[0]), None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        if not isinstance(config, found.config_class or object):
            what = f"config.json is of a {config.model_type}, and its architecture is {names[0]}"
            raise SourceError(what, folder, "get the model again")
        return found
    for kind in ("", "ForImageClassification", "ForSequenceClassification", "ForCausalLM"):
        own = getattr(transformers, f"AutoModel{kind}")._model_mapping.get(type(config), None)
        if getattr(own, "__name__", "") == names[0]:  # registered by the program that divides
            return own
    remedy = "build the module yourself and call offramp.divide(module, example_inputs, store)"
    raise SourceError(f"transformers has no {names[0]}, and code in a model folder is not run", folder, remedy)


def config_of_folder(folder: Path) -> Any:
    """Return the config of a folder as transformers reads it. Raises SourceError where transformers refuses it."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise import_error(error, "transformers", "train") from None
    try:
        return AutoConfig.from_pretrained(  # a folder  # nosec B615
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # of whatever kind: its fields are checked by their own classes
        why = _said(error).replace("model type", "model_type")  # the key, as it stands in the file
        raise SourceError(f"config.json cannot be read ({why})", folder, "correct it, or use another model") from None


def _said(error: Exception) -> str:
    """Return a message in one line. Of a long one, which may begin with a whole module, the end says what is wrong."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MOST_SAID else f"{text[: _MOST_SAID // 2]} ... {text[-_MOST_SAID // 2 :]}"


def with_dtypes(module: nn.Module, dtypes: dict[str, str]) -> None:
    """Give weights without data, and buffers, the dtypes, as safetensors spells them, of what will take their place."""
    for weight in weights_of(module).values():
        tensor = weight.tensor
        spelled = next((dtypes[name] for name in (weight.name, *weight.aliases) if name in dtypes), None)
        dtype = DTYPES.get(str(spelled), tensor.dtype)
        if weight.is_buffer:
            weight.put(tensor.to(dtype))
        elif tensor.is_meta and dtype != tensor.dtype:
            learns = tensor.requires_grad and (dtype.is_floating_point or dtype.is_complex)
            weight.put(nn.Parameter(torch.empty(tensor.shape, dtype=dtype, device="meta"), requires_grad=learns))

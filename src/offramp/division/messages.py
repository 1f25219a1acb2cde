"""Wording that refusals of divisions share."""

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile

from offramp.errors import StageError


def listed(items: Sequence[str], num_shown: int = 5) -> str:
    """Return the first items, separated by commas."""
    return ", ".join(items[:num_shown]) + (", ..." if len(items) > num_shown else "")


MERGED = {
    "LORA": "lora", "ADALORA": "lora", "IA3": "ia3", "LOHA": "hada", "LOKR": "lokr", "OFT": "oft", "BOFT": "boft",
    "HRA": "hra", "VERA": "vera", "FOURIERFT": "fourierft", "LN_TUNING": "ln_tuning",
}  # fmt: skip
"""Kind of adapter that offramp has peft merge -> how the names that peft gives to its tensors begin."""
ADAPTER_TENSOR = re.compile(rf"\.(?:{'|'.join(sorted(set(MERGED.values())))})_")
"""Part of the name of a tensor that an adapter holds."""
_AROUND = (".base_layer.", ".modules_to_save.")
"""Parts of the names that peft gives to tensors of the model beside those."""


def adapter_tensors(names: Iterable[str]) -> list[str]:
    """Return the names of tensors of an adapter of peft: a model without them gives other answers."""
    return [name for name in names if ADAPTER_TENSOR.search(name) or any(part in name for part in _AROUND)]


MERGE = "merge the adapter into the weights: merge_and_unload() of peft, then save_pretrained"
"""Remedy for a checkpoint with tensors of an adapter."""


def advice(missing: Sequence[str], found: Collection[str]) -> str:
    """Return what to do about a checkpoint that lacks tensors, from the names that it has instead."""
    if adapter_tensors(found):
        return MERGE
    if not missing:
        return "get the whole model again"
    wrapped = next((name for name in found if name.endswith("." + missing[0])), None)
    if wrapped is not None:  # a wrapper may be around a part of the model alone
        prefix = _common_prefix(found) or wrapped.removesuffix(missing[0])
        return f"take {prefix!r} off the names of its tensors, or save the model without its wrapper"
    last = max(map(_layer, found), default=-1)
    if min(map(_layer, missing)) > last >= 0:
        return (
            f"config.json has more layers than the file, whose last is {last}: correct it, or get the whole model again"
        )
    return "get the whole model again"


def _common_prefix(names: Collection[str]) -> str:
    """Return the modules with which all names begin, with a dot at the end, or an empty text."""
    parts = list(
        takewhile(lambda each: len(set(each)) == 1, zip(*(name.split(".")[:-1] for name in names), strict=False))
    )
    return "".join(f"{each[0]}." for each in parts)


def _layer(name: str) -> int:
    """Return the number of the layer that a tensor belongs to, or -1."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else -1


def no_graph(what: str, where: object = None) -> StageError:
    """Return the error for a module that can be divided, but not into graphs."""
    return StageError(what, where, "use --method eager")

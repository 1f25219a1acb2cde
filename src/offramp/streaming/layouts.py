"""Layouts of tensors in memory. A store keeps the data of a tensor row by row; products with a transposed weight end in
other last bits than with a copy of it, so a weight in any other layout is described in a file of the store.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.errors import DamagedError
from offramp.program.checks import WrongError, parse, require_listed
from offramp.store import Store

FILE_NAME = "layouts.json"
_LAYOUTS: Any = dict[str, tuple[tuple[int, ...], bool]]
MAX_GAPS = 4
"""Largest accepted ratio of the memory that a tensor spans to its size."""


@dataclass(frozen=True)
class Layout:
    """Strides of a tensor in elements, and whether its data are conjugated as they are read."""

    strides: tuple[int, ...]
    is_conj: bool = False

    def span(self, shape: tuple[int, ...]) -> int:
        """Return the number of elements from the first one in memory to the last one."""
        steps = zip(shape, self.strides, strict=True)
        return 1 + sum((size - 1) * step for size, step in steps) if all(shape) else 0

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether a tensor of this shape can be laid out so: no two elements overlap, but for repeated axes."""
        if len(shape) != len(self.strides) or self.span(shape) > MAX_GAPS * max(_numel(shape), 1):
            return False
        reach = 1
        for step, size in sorted((step, size) for step, size in zip(self.strides, shape, strict=True) if size > 1):
            if step and step < reach:
                return False
            reach = max(reach, step * size)
        return True

    def apply(self, data: Tensor) -> Tensor:
        """Return a copy of a tensor in this layout."""
        with torch.no_grad():
            made = torch.empty_strided(data.shape, self.strides, dtype=data.dtype)
            once = tuple(slice(None) if step else slice(0, 1) for step in self.strides)
            made[once].copy_((data.conj() if self.is_conj else data)[once])
            return made.conj() if self.is_conj else made


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def layout_of(tensor: Tensor) -> Layout | None:
    """Return the layout of a tensor, or None where it lies row by row."""
    plain = torch.empty(tensor.shape, device="meta").stride()
    found = Layout(tuple(tensor.stride()), tensor.is_conj())
    return None if found == Layout(plain) else found


def copied(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor in the same layout."""
    layout = layout_of(tensor)
    return tensor.detach().clone() if layout is None else layout.apply(tensor.detach())


def dumps(layouts: Mapping[str, Layout]) -> bytes:
    """Return layouts as the content of `layouts.json`: tensor -> strides, is_conj."""
    return json.dumps({name: [list(each.strides), each.is_conj] for name, each in layouts.items()}).encode()


def layouts_of(store: Store) -> dict[str, Layout]:
    """Return the layouts of the tensors that do not lie row by row. Raises DamagedError."""
    file = next((file for file in store.manifest.files if file.file == FILE_NAME), None)
    if file is None:
        return {}
    shapes = {name: entry.shape for name, (_, entry) in store.manifest.tensors().items()}
    try:
        found = {name: Layout(*each) for name, each in parse(_LAYOUTS, store.read_file(file)).items()}
        require_listed(found, shapes, "layout of the tensor")
        for name, each in found.items():
            if not each.fits(shapes[name]):
                raise WrongError(f"{name!r} of shape {shapes[name]} has the strides {each.strides}")
    except WrongError as wrong:
        what = f"layouts of tensors that a division cannot write ({wrong})"
        raise DamagedError(what, store.path / FILE_NAME, "divide again") from None
    return found

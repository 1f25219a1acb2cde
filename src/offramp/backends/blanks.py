"""Inputs and weights of warm-up passes, which run every kernel before the memory of a process is planned.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

from typing import Dict, Mapping, Optional

import numpy as np

from offramp.program.dtypes import DTYPES
from offramp.program.program import ATTENTION_MASK, BATCH_TOKENS, Program, Value
from offramp.runtime.slots import Slot
from offramp.store.manifest import Tensor


def blank_mask(num_rows: int, length: int) -> np.ndarray:
    """Return a mask int64 [B, S] in which half of the last row is padding, so that kernels use their mask."""
    mask_BS = np.ones((num_rows, length), np.int64)
    mask_BS[-1, (length + 1) // 2 :] = 0
    return mask_BS


def blank_inputs(program: Program, num_rows: int, length: int, mask_BS: Optional[np.ndarray]) -> Dict[str, np.ndarray]:
    """Return zeros for the inputs of a program, ones for its looked-up rows: pages of zeros would take no memory."""
    found = {}
    for name, each in program.inputs.items():
        found[name] = np.zeros(Value(each.dtype, each.axes).shape(num_rows, length), each.dtype)
        if name == ATTENTION_MASK and mask_BS is not None:
            found[name] = mask_BS.astype(each.dtype)
    for name, lookup in program.lookups.items():
        shape = lookup.value.shape(num_rows, length)
        if BATCH_TOKENS not in lookup.value.axes:  # axes are those of the example
            shape = (*found[lookup.input].shape, shape[-1])
        found[name] = np.ones(shape, lookup.value.dtype)
    return found


class ZeroWeights:
    """Arrays of zeros in place of the weights of any step.

    All of them are views of one mapping that is never written, so its pages are the kernel's zero page and take no
    memory.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._zeros = Slot(max((tensor.num_bytes for tensor in tensors.values()), default=0) or 1).array

    def of(self, weights: Mapping[str, str]) -> Dict[str, np.ndarray]:
        """Return input of a kernel -> zeros, from input of a kernel -> tensor."""
        found = {}
        for role, name in weights.items():
            tensor = self._tensors[name]
            dtype = np.dtype(DTYPES[tensor.dtype].numpy)
            found[role] = self._zeros[: tensor.num_bytes].view(dtype).reshape(tensor.shape)
        return found

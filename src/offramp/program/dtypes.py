"""The table of dtypes that a store can hold. Nothing else in the house lists them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Optional


@dataclass(frozen=True)
class Dtype:
    """One dtype: its names, and the bytes of an element."""

    name: str
    """Name in safetensors."""
    numpy: Optional[str]
    """None where NumPy has no such dtype: such tensors are handled as bytes."""
    item_bytes: int
    computes: bool = False
    """Backends take tensors of this dtype as inputs of kernels."""
    torch_only: str = ""
    """PyTorch's name, where NumPy has none or another."""

    @property
    def torch(self) -> str:
        """PyTorch's name."""
        return self.torch_only or self.numpy or ""


_ALL = (
    Dtype("F32", "float32", 4, computes=True),
    Dtype("F16", "float16", 2),
    Dtype("BF16", None, 2, torch_only="bfloat16"),
    Dtype("F64", "float64", 8),
    Dtype("I64", "int64", 8, computes=True),
    Dtype("I32", "int32", 4, computes=True),
    Dtype("U8", "uint8", 1, computes=True),
    Dtype("BOOL", "bool", 1, computes=True),
    Dtype("C64", None, 8, torch_only="complex64"),
    Dtype("U64", "uint64", 8),
    Dtype("U32", "uint32", 4),
    Dtype("I16", "int16", 2),
    Dtype("U16", "uint16", 2),
    Dtype("I8", "int8", 1),
    Dtype("F8_E5M2", None, 1, torch_only="float8_e5m2"),
    Dtype("F8_E4M3", None, 1, torch_only="float8_e4m3fn"),
)
DTYPES: Dict[str, Dtype] = {dtype.name: dtype for dtype in _ALL}
"""By the name that safetensors uses."""
BY_NUMPY: Dict[str, Dtype] = {dtype.numpy: dtype for dtype in _ALL if dtype.numpy is not None}
"""By NumPy's name."""

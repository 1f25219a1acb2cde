"""The table of dtypes that a store can hold. Nothing else in the house lists them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Optional

ALIGNMENT_BYTES = 64
"""Alignment in bytes of the tensors that kernels read: at other addresses the last bits of a result differ."""


@dataclass(frozen=True)
class Dtype:
    """One dtype: its names, and the bytes of an element."""

    name: str
    """Name in safetensors."""
    numpy: Optional[str]
    """None where NumPy has no such dtype: such tensors are handled as bytes."""
    torch: str
    """PyTorch's name. Early versions of PyTorch lack some of them."""
    item_bytes: int
    computes: bool = False
    """Backends take tensors of this dtype as inputs of kernels."""
    upcasts: bool = False
    """Every value is a float32, so that checkpoints of text encoders are stored as F32 exactly."""


_ALL = (
    Dtype("F32", "float32", "float32", 4, computes=True, upcasts=True),
    Dtype("F16", "float16", "float16", 2, upcasts=True),
    Dtype("BF16", None, "bfloat16", 2, upcasts=True),
    Dtype("F64", "float64", "float64", 8),
    Dtype("I64", "int64", "int64", 8, computes=True),
    Dtype("I32", "int32", "int32", 4, computes=True),
    Dtype("U8", "uint8", "uint8", 1, computes=True),
    Dtype("BOOL", "bool", "bool", 1, computes=True),
    Dtype("C64", None, "complex64", 8),
    Dtype("U64", "uint64", "uint64", 8),
    Dtype("U32", "uint32", "uint32", 4),
    Dtype("I16", "int16", "int16", 2),
    Dtype("U16", "uint16", "uint16", 2),
    Dtype("I8", "int8", "int8", 1, computes=True),
    Dtype("F8_E5M2", None, "float8_e5m2", 1),
    Dtype("F8_E4M3", None, "float8_e4m3fn", 1),
    Dtype("F8_E5M2FNUZ", None, "float8_e5m2fnuz", 1),
    Dtype("F8_E4M3FNUZ", None, "float8_e4m3fnuz", 1),
    Dtype("F8_E8M0", None, "float8_e8m0fnu", 1),
)
DTYPES: Dict[str, Dtype] = {dtype.name: dtype for dtype in _ALL}
"""Dtypes by the name that safetensors uses."""
FLOAT = _ALL[0].name
"""Dtype that kernels compute in, and that checkpoints of text encoders are stored in."""
HALF = _ALL[1].name
"""Dtype of narrow floats, which are upcast to FLOAT when they are read."""
PACKED = ("F4", "F6_E2M3", "F6_E3M2")
"""Dtypes of safetensors whose values share bytes. A store cannot hold them."""
BY_NUMPY: Dict[str, Dtype] = {dtype.numpy: dtype for dtype in _ALL if dtype.numpy is not None}
"""Dtypes by NumPy's name."""
OF_ARRAYS = (*BY_NUMPY, "complex64", "complex128")
"""NumPy's names of the dtypes that inputs of graphs, and values between them, may have where a backend runs them."""
OF_VALUES = tuple(dict.fromkeys((*OF_ARRAYS, *(dtype.torch for dtype in _ALL))))
"""Names of the dtypes that values of a program may have: those of PyTorch as well, for modules that are streamed."""

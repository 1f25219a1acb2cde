"""Tensors in `pytorch_model.bin`: a pickle, read as far as `torch.load(weights_only=True)` goes, and never further.

The file is mapped, so that tensors are paged in as they are copied; the process grows by what was read, and a file that
is truncated meanwhile kills it.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from offramp.checkpoints.weights import ZIP_MAGIC, Rows, open_file
from offramp.errors import PickleError, SourceError
from offramp.program.dtypes import DTYPES
from offramp.units import format_size

CONVERT = (
    "python -c '"
    "import glob, torch; from safetensors.torch import save_file; "
    'parts = [torch.load(f, "cpu", weights_only=True) for f in glob.glob("pytorch_model*.bin")]; '
    "weights = {k: v.clone().contiguous() for part in parts for k, v in part.items()}; "
    'save_file(weights, "model.safetensors", {"format": "pt"})'
    "'"
)
"""Run in the model's folder, writes model.safetensors beside the pickles."""

_DTYPES = {f"torch.{dtype.torch}": dtype.name for dtype in DTYPES.values()}
"""Name of a dtype in torch -> in safetensors."""


_MOST_SHARED = 32
"""Largest ratio of the bytes of all tensors to those of their file. Layers that are one have a name each."""


class PickledWeights:
    """Tensors in files of `torch.save`.

    Raises PickleError for a file that cannot be read safely, and SourceError for one that is not a flat dictionary of
    dense tensors.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        for path in files:
            found = _flat_dict(_load(path), path)
            _require_own_memory(found, path)
            self._tensors |= found
        self.entries = {name: (_dtype(tensor), tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def pieces(self, name: str, piece_bytes: int, rows: Rows = None) -> Iterator[memoryview]:
        """Yield the data of one tensor, as views of the mapped file if it is contiguous there."""
        tensor = self._tensors[name] if rows is None else self._tensors[name][slice(*rows)]
        for piece in _flat_pieces(tensor, piece_bytes // tensor.element_size()):
            yield piece.view(torch.uint8).numpy().data

    def close(self) -> None:
        """Drop the mapped files."""
        self._tensors.clear()


def _load(path: Path) -> object:
    with os.fdopen(open_file(path), "rb") as file:
        beginning = file.read(10)
        if beginning[8:] in (b'{"', b"{ "):  # after the size of a header
            raise SourceError("a file of safetensors, not of torch.save", path, "rename it to model.safetensors")
        if not beginning.startswith(ZIP_MAGIC):
            what, remedy = "not a zip file of torch.save (before torch 1.6, or damaged)", "convert it in its folder"
            raise PickleError(what, path, f"{remedy}: {CONVERT}")
        try:  # by its descriptor: nothing else can have taken its place
            opened = f"/proc/self/fd/{file.fileno()}"
            return torch.load(opened, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a hostile pickle may raise anything; all of it means: not readable safely
            what, author = f"pickle cannot be read safely ({_reason(error)})", "ask its author for safetensors"
            remedy = f"get the file again, or {author} (model.save_pretrained): a pickle can run any code"
            raise PickleError(what, path, remedy) from None


def _reason(error: Exception) -> str:
    """Return the reason in one line, without torch's advice to load the file unsafely."""
    text = re.sub(r"[^!-~]+", " ", str(error))
    forbidden = re.search(r"GLOBAL ([\w.]+)", text)
    return f"it calls for {forbidden[1]}" if forbidden else f"{type(error).__name__}: {text.partition('. ')[0][:120]}"


def _flat_dict(tree: object, path: Path) -> dict[str, torch.Tensor]:
    remedy = "save model.state_dict() alone"
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise SourceError(f"pickle holds a {type(tree).__name__}, not tensors by name", path, remedy)
    for name, value in tree.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise SourceError(f"pickle holds {name!r}, which is not a dense tensor", path, remedy)
    return {name: value.detach() for name, value in tree.items()}


def _require_own_memory(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise SourceError for tensors that are larger than the file: a pickle may repeat a few bytes without end."""
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    if total_bytes > _MOST_SHARED * path.stat().st_size:
        what = f"pickle holds tensors of {format_size(total_bytes)}, most of which share memory"
        raise SourceError(what, path, "save each as tensor.clone()")


def _dtype(tensor: torch.Tensor) -> str:
    return _DTYPES.get(str(tensor.dtype), str(tensor.dtype))


def _flat_pieces(tensor: torch.Tensor, num_items: int) -> Iterator[torch.Tensor]:
    """Yield one-dimensional pieces of at most `num_items`, row by row; non-contiguous data are copied piecewise."""
    if tensor.numel() == 0:
        return
    if tensor.is_contiguous():
        yield from _flat(tensor).split(num_items)
    elif (row_items := tensor[0].numel()) > num_items:
        for row in tensor:
            yield from _flat_pieces(row, num_items)
    else:
        for rows in tensor.split(num_items // row_items):
            yield _flat(rows.contiguous())


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor in one dimension. `view(-1)` would keep an odd stride for a single item."""
    return tensor.as_strided((tensor.numel(),), (1,))

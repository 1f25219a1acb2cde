"""Compute backends: ONNX Runtime (default), PyTorch, NumPy. Importing the room imports none of them.

A new backend is one file and one line of `BACKENDS`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Dict

from offramp.errors import MissingExtraError

if TYPE_CHECKING:
    from offramp.runtime.backend import Backend
    from offramp.store import Store

BACKENDS = {
    "ort": "offramp.backends.onnx:OnnxBackend",
    "torch": "offramp.backends.torch:TorchBackend",
    "numpy": "offramp.backends.numpy:NumpyBackend",
}
"""Name of a backend -> its module and class."""
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "OMP_NUM_THREADS")
"""Environment variables from which BLAS libraries read their number of threads while NumPy is imported."""


def open_backend(name: str, store: Store, num_threads: int, trust_kernels: bool = False) -> Backend:
    """Return a backend that runs the program of a store.

    `trust_kernels`: captured kernels may contain operations outside the table of their backend.

    Raises ValueError for an unknown name, MissingExtraError where the library of the backend is not installed,
    StoreError for a program or weights that the backend does not run.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {tuple(BACKENDS)}, not {name!r}")
    module, _, implementation = BACKENDS[name].partition(":")
    try:
        found = getattr(importlib.import_module(module), implementation)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("offramp"):
            raise
        raise MissingExtraError(error.name, name) from None
    return found(store, num_threads, trust_kernels=trust_kernels)


def thread_variables(name: str, num_threads: int) -> Dict[str, str]:
    """Return the environment variables that must be set before NumPy is imported, so that a backend has these threads.

    Only NumPy needs any: its BLAS starts its threads while it is imported. Other backends start their own.
    """
    return dict.fromkeys(THREAD_VARIABLES, str(num_threads)) if name == "numpy" else {}

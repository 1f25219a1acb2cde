"""The NumPy backend: every kernel of a text encoder in NumPy alone. Slower than ONNX Runtime; needs nothing else.

Matrix products are those of NumPy's BLAS, on `weight.T` as a view. Everything else works in place: a pass is then
bound by the products. Captured kernels are graphs of operations and are not run.

Shapes: B rows, S tokens of the longest row, T = B S, H hidden, I intermediate, N heads, D = H / N, C labels.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from functools import lru_cache, partial
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import numpy as np

from offramp.backends import THREAD_VARIABLES
from offramp.backends.base import BLOCKS, LoadedKernel, ProgramBackend, first, is_alone, join, most_bytes
from offramp.backends.numpy_narrow import integers, num_temporary
from offramp.program.heads import HeadForm
from offramp.program.narrow import SUFFIX, plain
from offramp.program.program import Kernel
from offramp.runtime.backend import State
from offramp.store import Store

Inputs = Mapping[str, Any]
LinearOf = Callable[[np.ndarray, Inputs, Inputs], Callable[[str], np.ndarray]]
"""Function (rows [T, inputs], inputs of the kernel, attributes of the kernel) that prepares the rows once and returns a
function of a role that computes the linear layer of that role."""
BLOCK = 1 << 15
"""Elements that an activation handles at a time, so that its three temporaries stay in the cache of a core."""
PACKED = 512
"""Elements of each token that a BLAS copies at a time to multiply them. OpenBLAS takes 240 to 512, by processor."""
_MASKED = np.float32(np.finfo(np.float32).min)


class NumpyBackend(ProgramBackend):
    """Runs the encoder templates on NumPy.

    `num_threads` is the number that NumPy's BLAS uses. Where that BLAS has no function to set it, it is the number that
    the BLAS read from the environment when NumPy was imported (`offramp.backends.thread_variables`).
    """

    name = "numpy"
    scratch_bytes = 1 << 20
    """Bytes for each thread: packed weights of matrix products (448 x 384 elements on x86-64), buffers of reductions.
    With it BERT-base took from 0.1 to 2.5 MiB less than is promised, for 1 to 8 rows of 8 to 512 tokens."""

    def __init__(self, store: Store, num_threads: int, *, trust_kernels: bool = False) -> None:
        super().__init__(store, set_blas_threads(num_threads), trust_kernels=trust_kernels)

    def load(self, name: str, kernel: Kernel) -> LoadedKernel:
        """Return the function of a template with the attributes of the kernel."""
        if kernel.template == "exit":
            assert self.exit_form is not None, "loaded where there are exits"
            return partial(_exit, kernel.attributes, self.exit_form)
        return partial(_TEMPLATES[kernel.template], kernel.attributes)

    def begin(self, arrays: Mapping[str, np.ndarray], mask_BS: Optional[np.ndarray], shape: Tuple[int, int]) -> State:
        """Return the state of a batch."""
        set_blas_threads(self.num_threads)  # at every pass, because other code may have set it since
        return super().begin(arrays, mask_BS, shape)

    def num_elements(self, kernel: Kernel, num_rows: int, length: int) -> int:
        """Return the elements of the arrays that live at once, as counted in the functions below."""
        tokens, template = num_rows * length, plain(kernel.template)
        sizes: Mapping[str, Any] = kernel.attributes
        hidden, inner = tokens * sizes.get("hidden_size", 0), tokens * sizes.get("intermediate_size", 0)
        packed = min(max(hidden, inner), tokens * PACKED)
        if template in BLOCKS:
            return self._block_elements(kernel, tokens, length)
        if template != kernel.template:
            width, other = sizes["hidden_size"], sizes.get("intermediate_size", sizes["hidden_size"])
            packed += num_temporary(tokens, *((other, width) if template == "down" else (width, other)), sizes)
        if template == "embedding":  # rows of three tables, their sum, its projection
            return 4 * tokens * sizes["embedding_size"] + hidden + packed
        if template == "attention":  # residual, query, key, value, output; scores of one row and their maxima
            return 5 * hidden + sizes["num_heads"] * length * (length + 1) + packed
        if template == "up":
            return hidden + inner + 3 * BLOCK + packed
        return 2 * hidden + inner + tokens + packed  # `down`: residual, inner, output; heads and masks take less

    def _block_elements(self, kernel: Kernel, tokens: int, length: int) -> int:
        """Return the elements as `num_elements` does, of a template of blocks."""
        sizes: Mapping[str, Any] = kernel.attributes
        template = plain(kernel.template)
        hidden, most = tokens * sizes.get("hidden_size", 0), sizes.get("most_outputs", 0)
        inputs, block = sizes.get("num_inputs", sizes.get("hidden_size", 0)), tokens * most
        narrow = 0 if template == kernel.template else num_temporary(tokens, inputs, most, sizes)
        if template == "heads":  # as `attention`, for the heads of a block
            scores = most // sizes["head_size"] * length * (length + 1)
            return narrow + hidden + 3 * block + scores + min(hidden, tokens * PACKED)
        if template == "product":
            return narrow + tokens * inputs + block + 3 * BLOCK + min(max(tokens * inputs, block), tokens * PACKED)
        if template == "join":
            return 2 * tokens * sizes["width"]
        return 3 * hidden + tokens  # `join-norm`: blocks, residual, output

    def returned_bytes(self, num_rows: int, length: int) -> int:
        """Return the bytes of arrays. A BLAS keeps its buffers of packed operands."""

        def num_arrays(kernel: Kernel, num_rows: int, length: int) -> int:
            return self.num_elements(kernel, num_rows, length) - _num_packed(kernel, num_rows * length)

        return most_bytes(self, num_arrays, num_rows, length)

    @property
    def is_measured(self) -> bool:
        """Return whether the buffers of the BLAS serve this backend alone."""
        return is_alone(self)

    def mask_bytes(self, num_rows: int, length: int) -> int:
        """Return the bytes of the float mask of attention."""
        return num_rows * length * _MASKED.itemsize

    def close(self) -> None:
        """Do nothing: arrays are freed with the state of a batch."""


def _num_packed(kernel: Kernel, tokens: int) -> int:
    """Return the elements of packed operands that are among those of a kernel, at least."""
    sizes: Mapping[str, Any] = kernel.attributes
    template = plain(kernel.template)
    if template == "embedding" or template in BLOCKS:
        return 0
    return tokens * min(max(sizes.get("hidden_size", 0), sizes.get("intermediate_size", 0)), PACKED)


def _linear(x: np.ndarray, inputs: Inputs, role: str) -> np.ndarray:
    out = np.matmul(x, inputs[role + ".weight"].T)
    out += inputs[role + ".bias"]
    return out


def _floats(x: np.ndarray, inputs: Inputs, sizes: Inputs) -> Callable[[str], np.ndarray]:
    return partial(_linear, x, inputs)


def _mask(sizes: Inputs, state: State, inputs: Inputs) -> Tuple[Optional[np.ndarray]]:
    """Return the mask [B, 1, 1, S] that attention adds to its scores, or None where there is no padding."""
    keep_BS = inputs["mask"] > 0
    return (None if keep_BS.all() else np.where(keep_BS[:, None, None, :], np.float32(0), _MASKED),)


def _embedding(sizes: Inputs, state: State, inputs: Inputs) -> Tuple[np.ndarray]:
    total_TE = inputs["word"] + inputs["position"]
    if "type" in inputs:
        total_TE += inputs["type"]
    _norm(total_TE, inputs, sizes)
    return (_linear(total_TE, inputs, "project") if "project.weight" in inputs else total_TE,)


def _attention(sizes: Inputs, state: State, inputs: Inputs, linear_of: LinearOf = _floats) -> Tuple[np.ndarray]:
    hidden_TH = inputs["hidden"]
    context_TH = _context(
        hidden_TH.shape[1] // sizes["num_heads"], state, inputs, linear_of(inputs["hidden"], inputs, sizes)
    )
    output_TH = linear_of(context_TH, inputs, {})("o")
    output_TH += hidden_TH
    return (_norm(output_TH, inputs, sizes),)


def _context(head_size: int, state: State, inputs: Inputs, linear: Callable[[str], np.ndarray]) -> np.ndarray:
    """Return the context [T, R] of the heads that the outputs of q, k and v are."""
    mask = inputs["mask"]
    query_TR, key_TR, value_TR = map(linear, "qkv")
    query_TR *= np.float32(head_size**-0.5)
    shape = (state.num_rows, state.length, -1, head_size)
    query, key, value = (each.reshape(shape).transpose(0, 2, 1, 3) for each in (query_TR, key_TR, value_TR))
    scores_NSS = np.empty((query.shape[1], state.length, state.length), np.float32)
    for row in range(state.num_rows):  # one row at a time: its scores stay in the cache
        np.matmul(query[row], key[row].transpose(0, 2, 1), out=scores_NSS)
        if mask is not None:
            scores_NSS += mask[row]
        scores_NSS -= scores_NSS.max(axis=-1, keepdims=True)
        np.exp(scores_NSS, out=scores_NSS)
        scores_NSS /= scores_NSS.sum(axis=-1, keepdims=True)
        np.matmul(scores_NSS, value[row], out=query[row])  # the context takes the place of the query
    return query_TR


def _up(sizes: Inputs, state: State, inputs: Inputs, linear_of: LinearOf = _floats) -> Tuple[np.ndarray]:
    return (_activate(linear_of(inputs["hidden"], inputs, sizes)("up"), sizes["activation"]),)


def _down(sizes: Inputs, state: State, inputs: Inputs, linear_of: LinearOf = _floats) -> Tuple[np.ndarray]:
    output_TH = linear_of(inputs["inner"], inputs, sizes)("down")
    output_TH += inputs["hidden"]
    return (_norm(output_TH, inputs, sizes),)


def _head(sizes: Inputs, state: State, inputs: Inputs) -> Tuple[np.ndarray]:
    return (_two_layers(_first(state, inputs["hidden"]), inputs, sizes, ""),)


def _exit(sizes: Inputs, form: HeadForm, state: State, inputs: Inputs) -> Tuple[np.ndarray]:
    """Return logits [B, C] of an exit head: pool the tokens of each row, then one linear layer or two."""
    if form.pool == "mean":
        assert state.mask_BS is not None, "encoders read texts"
        keep_B1S = state.mask_BS[:, None, :].astype(np.float32)
        hidden_BSH = inputs["hidden"].reshape(state.num_rows, state.length, -1)
        pooled_BH = np.matmul(keep_B1S, hidden_BSH)[:, 0] / keep_B1S.sum(axis=2)
    else:
        pooled_BH = _first(state, inputs["hidden"])
    if form.depth == 2:
        return (_two_layers(pooled_BH, inputs, sizes, "exit."),)
    return (_linear(pooled_BH, inputs, "exit"),)


def _heads(sizes: Inputs, state: State, inputs: Inputs, linear_of: LinearOf = _floats) -> Tuple[np.ndarray]:
    return (_context(sizes["head_size"], state, inputs, linear_of(inputs["hidden"], inputs, sizes)),)


def _product(sizes: Inputs, state: State, inputs: Inputs, linear_of: LinearOf = _floats) -> Tuple[np.ndarray]:
    result = linear_of(inputs["x"], inputs, sizes)("product")
    return (result if sizes["activation"] is None else _activate(result, sizes["activation"]),)


def _join(sizes: Inputs, state: State, inputs: Inputs) -> Tuple[np.ndarray]:
    return join(state, inputs)


def _first_rows(sizes: Inputs, state: State, inputs: Inputs) -> Tuple[np.ndarray]:
    return first(state, inputs)


def _join_norm(sizes: Inputs, state: State, inputs: Inputs) -> Tuple[np.ndarray]:
    (joined_TH,) = join(state, inputs)
    joined_TH += inputs["hidden"]
    return (_norm(joined_TH, inputs, sizes),)


_NARROW: Dict[str, Callable[..., Tuple[np.ndarray]]] = {
    "attention": _attention, "up": _up, "down": _down, "heads": _heads, "product": _product,
}  # fmt: skip
"""Templates that have a twin with integer weights."""
_TEMPLATES: Dict[str, Callable[..., Any]] = {
    "mask": _mask, "embedding": _embedding, **_NARROW, "head": _head,
    "join-norm": _join_norm, "join": _join, "first": _first_rows,
    **{name + SUFFIX: partial(kernel, linear_of=integers) for name, kernel in _NARROW.items()},
}  # fmt: skip
NumpyBackend.templates = (*_TEMPLATES, "exit")


def _norm(x: np.ndarray, inputs: Inputs, sizes: Inputs) -> np.ndarray:
    """Normalise the last axis of [T, H] in place."""
    x -= x.mean(axis=-1, keepdims=True)
    variance_T = np.einsum("th,th->t", x, x) / np.float32(x.shape[1])
    x /= np.sqrt(variance_T + np.float32(sizes["norm_epsilon"]))[:, None]
    x *= inputs["norm.weight"]
    x += inputs["norm.bias"]
    return x


def _first(state: State, hidden_TH: np.ndarray) -> np.ndarray:
    """Return a copy of the first token of each row, [B, H]."""
    return np.ascontiguousarray(hidden_TH[:: state.length])


def _two_layers(pooled_BH: np.ndarray, inputs: Inputs, sizes: Inputs, prefix: str) -> np.ndarray:
    return _linear(_activate(_linear(pooled_BH, inputs, prefix + "dense"), sizes["activation"]), inputs, prefix + "out")


def _activate(x: np.ndarray, name: str) -> np.ndarray:
    """Apply an activation in place, block by block."""
    flat, activation = x.reshape(-1), ACTIVATIONS[name]
    for start in range(0, flat.size, BLOCK):
        activation(flat[start : start + BLOCK])
    return x


def gelu(x: np.ndarray) -> None:
    """Apply x (1 + erf(x / sqrt 2)) / 2 in place, within 4e-7 of the exact value.

    With z = |x| / sqrt 2 it is max(x, 0) - |x| erfc(z) / 2, which loses no digits for large x. For erfc it takes
    formula 7.1.26 of Abramowitz and Stegun, Handbook of Mathematical Functions: a polynomial in
    t = 1 / (1 + 0.3275911 z), times exp(-z z).
    """
    z = np.abs(x)
    z *= np.float32(math.sqrt(0.5))
    t = z * np.float32(0.3275911)
    t += np.float32(1)
    np.reciprocal(t, out=t)
    tail = t * np.float32(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail += np.float32(coefficient)
        tail *= t
    tail *= z
    z *= z
    np.negative(z, out=z)
    tail *= np.exp(z, out=z)
    tail *= np.float32(math.sqrt(0.5))
    np.maximum(x, np.float32(0), out=x)
    x -= tail


def _gelu_tanh(x: np.ndarray) -> None:
    inner = x * x
    inner *= np.float32(0.044715)
    inner += np.float32(1)
    inner *= x
    inner *= np.float32(math.sqrt(2 / math.pi))
    _scale_by_sigmoid(x, inner)


def _silu(x: np.ndarray) -> None:
    _scale_by_sigmoid(x, x * np.float32(0.5))


def _scale_by_sigmoid(x: np.ndarray, half: np.ndarray) -> None:
    """Multiply x by sigmoid(2 half) = (1 + tanh(half)) / 2, which overflows for no argument."""
    np.tanh(half, out=half)
    half += np.float32(1)
    half *= np.float32(0.5)
    x *= half


ACTIVATIONS: Dict[str, Callable[[np.ndarray], Any]] = {
    "gelu": gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda x: np.maximum(x, np.float32(0), out=x),
    "silu": _silu,
    "swish": _silu,
    "tanh": lambda x: np.tanh(x, out=x),
}


def set_blas_threads(num_threads: int) -> int:
    """Set the number of threads of NumPy's BLAS in the whole process, if it can be set, and return the true number."""
    functions = _thread_functions()
    if functions is not None:
        get, set_to = functions
        set_to(num_threads)
        return int(get())
    found = [os.environ[name] for name in THREAD_VARIABLES if os.environ.get(name, "").isdigit()]
    return int(found[0]) if found else 1  # NumPy's own products and the reference BLAS have one thread


@lru_cache(maxsize=1)
def _thread_functions() -> Optional[Tuple[Any, Any]]:
    """Return the functions (get, set) of the BLAS that NumPy is linked with, or None if it has none."""
    core = next(sys.modules[name] for name in _CORES if name in sys.modules)
    library = ctypes.CDLL(core.__file__)  # finds symbols of the libraries that it needs as well
    for names in _THREAD_FUNCTIONS:
        if all(hasattr(library, name) for name in names):
            return getattr(library, names[0]), getattr(library, names[1])
    return None


_CORES = ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath")
_OPENBLAS = [f"{prefix}openblas_%s_num_threads{suffix}" for prefix in ("scipy_", "") for suffix in ("64_", "")]
_THREAD_FUNCTIONS = [
    *((name % "get", name % "set") for name in _OPENBLAS),
    ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
]
"""Names (get, set) in builds of OpenBLAS, which the wheels of NumPy contain, and in MKL."""

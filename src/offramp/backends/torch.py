"""The PyTorch backend: modules of encoder kernels, and captured graphs. Weights are views of the slots for one call.

It needs no transformers. Equal operations, shapes, threads, attention and alignment of weights (64 bytes) give the same
bits as transformers and as the captured module itself. It does not promise a small process: torch alone takes some
220 MiB before the first weight.

Shapes: B rows, S tokens of the longest row, T = B S, H hidden, C labels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.backends.base import (
    BLOCKS,
    CAPTURED_FACTOR,
    CAPTURED_SCRATCH_BYTES,
    REMEDY,
    LoadedKernel,
    ProgramBackend,
    is_alone,
    lines_of,
    lived_bytes,
    most_bytes,
)
from offramp.backends.torch_blocks import block_kernel
from offramp.backends.torch_graphs import CapturedGraph
from offramp.backends.torch_limits import Allowance, BoundedGraph, ClaimError, Spec, TooLargeError
from offramp.backends.torch_modules import (
    ATTENTIONS,
    FLOAT,
    NARROW,
    Attention,
    Down,
    Embedding,
    ExitHead,
    Head,
    Up,
    make_mask,
    pool,
)
from offramp.backends.torch_narrow import widened
from offramp.errors import StoreError, is_out_of_memory
from offramp.measure import read_memory
from offramp.program.dtypes import DTYPES
from offramp.program.narrow import ROTATION, SCALE, option, plain, turned_of
from offramp.program.program import CAPTURED, Kernel, Value
from offramp.runtime.backend import State
from offramp.store import Store
from offramp.store.manifest import captured_file

_OF_OPERATIONS = (RuntimeError, ValueError, IndexError, TypeError, KeyError, ArithmeticError)
"""Classes of errors that operations raise for inputs that they do not take."""
_MODULES: dict[str, Callable[[Mapping], nn.Module]] = {
    "embedding": Embedding, "up": Up, "down": Down, "head": Head,
    "up-int8": partial(Up, linear=NARROW), "down-int8": partial(Down, linear=NARROW),
}  # fmt: skip
"""Template -> module that needs nothing but the attributes of the kernel."""
_FUSED_BYTES = 640 << 10
"""Bytes for each thread that fused attention takes while it runs: scores of 256 queries by 512 keys, and the results of
as many queries for heads of 128, as float32."""


class TorchBackend(ProgramBackend):
    """Runs a store on PyTorch. `attention`: `sdpa`, which transformers takes by default, or `eager`.

    Sets the number of threads of torch in the whole process when a pass begins. Raises StoreError for kernels or
    weights that it does not run.
    """

    name = "torch"
    templates = (
        *_MODULES, "mask", "attention", "attention-int8", "exit", "pooled-linear", CAPTURED,
        *BLOCKS, "heads-int8", "product-int8",
    )  # fmt: skip
    scratch_bytes = 2 << 20
    """Bytes for each thread: buffers of fused attention and matrix products, and the heap around them. BERT-base took
    from 11 MiB less to 2 MiB more than is promised with it, for 1 to 8 rows of 16 to 512 tokens."""

    def __init__(self, store: Store, num_threads: int, attention: str = "sdpa", *, trust_kernels: bool = False) -> None:
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {tuple(ATTENTIONS)}, not {attention!r}")
        self.attention = attention
        self.skeletons: dict[str, Skeleton] = {}
        self._is_warming_up = self._is_cut = False
        self._trials: dict[tuple[int, int], Trial] = {}
        self._last_allowance: Allowance | None = None
        super().__init__(store, num_threads, trust_kernels=trust_kernels)
        used = {name for step in self.program.steps() for name in (*step.weights.values(), *step.constants.values())}
        weights = [self._tensors[name][1] for name in used]
        tokens = self.program.example[1]
        shapes = {name: Value(each.dtype, each.axes).shape(1, tokens) for name, each in self.program.inputs.items()}
        self._proven = {name: max(math.prod(shape), 1) for name, shape in shapes.items()}
        self._weights = sum(math.prod(each.shape) for each in weights), sum(each.num_bytes for each in weights)

    def load(self, name: str, kernel: Kernel) -> LoadedKernel:
        """Build the module of a template on the meta device, or parse a captured graph."""
        run = self._load(name, kernel)

        @torch.inference_mode()
        def guarded(state: State, inputs: dict[str, Any]) -> Sequence[Tensor]:
            try:
                return run(state, inputs)
            except TooLargeError as error:
                remedy = "give fewer or shorter inputs at a time: --batch 1, --max-length 128"
                raise StoreError(f"graph {name!r} takes {error}", self.store.path, remedy) from None
            except _OF_OPERATIONS as error:
                if is_out_of_memory(error):  # PyTorch raises RuntimeError where memory is short
                    raise MemoryError(str(error)) from error
                raise self.wrong_inputs(name, lines_of(error)[0]) from error

        return guarded

    def _load(self, name: str, kernel: Kernel) -> LoadedKernel:
        if kernel.template == CAPTURED:
            files, file = {each.file: each for each in self.store.manifest.files}, captured_file(name)
            if file not in files:
                raise StoreError(f"the store has no {file}", self.store.path, REMEDY)
            where = self.store.path / file
            graph = CapturedGraph(self.store.read_file(files[file]), where, trusted=self.trust_kernels)
            bounded, turned = BoundedGraph(graph, self._weights_of(name, graph.inputs)), turned_of(kernel.attributes)

            def run(state: State, inputs: dict[str, Any]) -> Sequence[Tensor]:
                if turned:
                    wide = {port: widened(inputs[port], inputs[port + SCALE], form) for port, form in turned.items()}
                    inputs = {**inputs, **wide}
                return bounded([inputs[each] for each in bounded.inputs], state.allowance)

            return run
        if kernel.template == "mask":
            return lambda state, inputs: (make_mask(torch.from_numpy(inputs["mask"].numpy() > 0), self.attention),)
        if kernel.template == "pooled-linear":
            return _pooled_linear
        if plain(kernel.template) in BLOCKS:
            return block_kernel(kernel, ATTENTIONS[self.attention])
        with torch.device("meta"):
            if plain(kernel.template) == "attention":
                linear = FLOAT if kernel.template == "attention" else NARROW
                module: nn.Module = Attention(kernel.attributes, ATTENTIONS[self.attention], linear)
            elif kernel.template == "exit":
                assert self.exit_form is not None, "loaded where there are exits"
                module = ExitHead(kernel.attributes, self.exit_form)
            else:
                module = _MODULES[kernel.template](kernel.attributes)
        self.skeletons[name] = Skeleton(module)
        return self.skeletons[name]

    def begin(self, arrays: Mapping[str, np.ndarray], mask_BS: np.ndarray | None, shape: tuple[int, int]) -> State:
        """Return the state of a batch."""
        torch.set_num_threads(self.num_threads)  # at every pass, because other code may have set it since
        state = super().begin(arrays, mask_BS, shape)
        if self.is_captured:
            state.allowance = self._last_allowance = self._allowance(arrays, shape)
        return state

    def _allowance(self, arrays: Mapping[str, np.ndarray], shape: tuple[int, int]) -> Allowance:
        """Return the limits of a pass with these inputs. Values grow with the rows, and at most with the square of the
        other sizes.
        """
        inputs = [(array, self._proven[name]) for name, array in arrays.items() if name in self._proven]
        sizes = [array.size / (shape[0] * proven) for array, proven in inputs]
        growth = max(shape[0] / self.program.example[0], 1) * max([1, *sizes]) ** 2
        places = shape[0] * shape[1] if self.program.texts else max((array.size for array, _ in inputs), default=0)
        planned = CAPTURED_FACTOR * self.program.activation_bytes * growth
        input_bytes = sum(array.nbytes for array, _ in inputs)
        return Allowance(places, input_bytes, self._weights, planned, is_warm_up=self._is_warming_up)

    def warm_up(self, num_rows: int, length: int) -> None:
        """Run each kernel once. A pass whose inputs the store claims to be large ends where it would take much."""
        before, shape = read_memory(), (num_rows, length)
        self._is_warming_up = True
        try:
            super().warm_up(num_rows, length)
        except ClaimError:
            self._is_cut = True
        finally:
            self._is_warming_up = False
        peak_bytes, trial = read_memory().peak_bytes, self._trials.get(shape, Trial(before.rss_bytes))
        if self._last_allowance is not None:
            trial = trial._replace(step_bytes=self._last_allowance.most_bytes)
        self._trials[shape] = trial._replace(peak_bytes=peak_bytes) if peak_bytes > before.peak_bytes else trial

    @property
    def is_measured(self) -> bool:
        """Return whether captured steps ran to their end in trials, and what torch keeps of them serves them alone."""
        return self.is_captured and not self._is_cut and is_alone(self)

    def trial_bytes(self, num_rows: int, length: int) -> int | None:
        """Return the most bytes of a trial of captured steps, whose operations take buffers that no prediction knows.

        The kernel knows them if the trial has raised the peak of the process.
        """
        trial = self._trials.get((num_rows, length))
        return trial.most_bytes if trial is not None and self.is_measured else None

    def _weights_of(self, kernel: str, inputs: Sequence[str]) -> list[list[Spec]]:
        """Return the shapes and dtypes of the weights of a captured kernel, of each step that calls it."""
        found = []
        for step in self.program.steps():
            if step.kernel == kernel:
                names = {**step.weights, **step.constants}
                tensors = {role: self._tensors[names[role]][1] for role in inputs if role in names}
                specs = {role: (t.shape, (), getattr(torch, DTYPES[t.dtype].torch)) for role, t in tensors.items()}
                for port, form in turned_of(self.program.kernels[kernel].attributes).items():
                    shape = tensors[port].shape
                    specs[port] = (shape[::-1] if form.is_transposed else shape, (), torch.float32)
                found.append([*specs.values()])
        return found

    def wrap(self, array: np.ndarray) -> Tensor:
        """Return a view, or a copy of a read-only array: torch has no read-only tensors."""
        return torch.from_numpy(array) if array.flags.writeable else torch.tensor(array)

    def unwrap(self, value: Tensor) -> np.ndarray:
        """Return a view."""
        return value.numpy()

    @torch.inference_mode()
    def take(self, value: Tensor, rows_B: np.ndarray, axis: int) -> Tensor:
        """Return a copy of some rows."""
        return value.index_select(axis, torch.from_numpy(rows_B))

    def num_elements(self, kernel: Kernel, num_rows: int, length: int) -> int:
        """Return the elements of the tensors that live at once, as counted in the modules."""
        tokens, template = num_rows * length, plain(kernel.template)
        sizes: Mapping[str, Any] = kernel.attributes
        if template in BLOCKS:
            return self._block_elements(kernel, tokens, length)
        hidden, inner = tokens * sizes.get("hidden_size", 0), tokens * sizes.get("intermediate_size", 0)
        narrow = 0
        if template != kernel.template:  # rotated rows, rows before rounding, their integers, sums as int32
            narrow = 5 * (inner if template == "down" else hidden) // 4 + max(inner, hidden)
            narrow += hidden * (option(sizes, ROTATION) > 1)
        if template == "embedding":  # rows of three tables, two sums, the normalisation with its mean and scale
            return 7 * tokens * sizes["embedding_size"] + hidden
        if template == "attention":  # residual, query, key, value, context, output, sum; and scores
            square = tokens * length
            scores = square if self.attention == "sdpa" else 2 * sizes["num_heads"] * square
            return narrow + 7 * hidden + scores
        if template == "up":  # `gelu_new` is spelt out and keeps four temporaries
            return narrow + hidden + (4 if sizes["activation"] == "gelu_new" else 2) * inner
        if template == "down":
            return narrow + 4 * hidden + inner
        return 0  # heads and masks take less than any of these

    def _block_elements(self, kernel: Kernel, tokens: int, length: int) -> int:
        """Return the elements as `num_elements` does, of a template of blocks."""
        sizes: Mapping[str, Any] = kernel.attributes
        template, most = plain(kernel.template), sizes.get("most_outputs", 0)
        inputs = sizes.get("num_inputs", sizes.get("hidden_size", 0))
        narrow = 0 if template == kernel.template else tokens * (5 * inputs // 4 + most)
        narrow += tokens * inputs * (option(sizes, ROTATION) > 1)
        if template == "heads":  # as `attention`, for the heads of a block
            scores = tokens * length * (1 if self.attention == "sdpa" else 2 * most // sizes["head_size"])
            return narrow + tokens * (inputs + 5 * most) + scores
        if template == "product":
            return narrow + tokens * (inputs + (4 if sizes["activation"] == "gelu_new" else 2) * most)
        if template == "join":
            return 2 * tokens * sizes["width"]
        return 5 * tokens * sizes["hidden_size"]  # `join-norm`: blocks, joined, residual, sum, normalisation

    def activation_bytes(self, num_rows: int, length: int) -> int:
        """Return the bytes as other backends do, with weights of one captured step that are made of integers."""
        return super().activation_bytes(num_rows, length) + self._widened_bytes()

    def _widened_bytes(self) -> int:
        """Return the bytes of the weights of one captured step that are made of integers: as floats, and the largest
        once more while it is rotated."""
        most = 0
        for step in self.program.steps() if self.is_captured else ():
            ports = turned_of(self.program.kernels[step.kernel].attributes)
            sizes = [math.prod(self._tensors[step.weights[port]][1].shape) for port in ports]
            most = max(most, torch.float32.itemsize * (sum(sizes) + max(sizes, default=0)))
        return most

    def returned_bytes(self, num_rows: int, length: int) -> int:
        """Return the bytes of tensors. Captured programs: as a trial has counted them, or in proportion to the example
        where they depend on data."""
        if not self.is_captured:
            return most_bytes(self, self.num_elements, num_rows, length)
        if not self.is_measured:
            return 0
        trial = self._trials.get((num_rows, length))
        if trial is not None and math.isfinite(trial.step_bytes):
            thread_bytes = self.num_threads * _FUSED_BYTES
            return self.state_bytes(num_rows, length) + int(trial.step_bytes) + self._widened_bytes() + thread_bytes
        return lived_bytes(self.program, num_rows, length) + self.num_threads * CAPTURED_SCRATCH_BYTES

    def mask_bytes(self, num_rows: int, length: int) -> int:
        """Return the bytes of a float mask for each pair of tokens, the most that attention expands it to."""
        return num_rows * length * length * torch.float32.itemsize

    def renew(self) -> None:
        """Compute in one thread: OpenMP waits for the others, which are not in the child."""
        self.num_threads = 1

    def close(self) -> None:
        """Drop the kernels, with the references to the slots that their last calls used. They load again when they are
        used.
        """
        for skeleton in self.skeletons.values():
            skeleton.drop_weights()
        self.kernels.clear()
        self.skeletons.clear()


class Trial(NamedTuple):
    """Resident memory before the first trial of a shape, and the peak of trials that raised that of the process."""

    start_bytes: int
    peak_bytes: int | None = None
    step_bytes: float = math.inf
    """Bytes of values within the step that takes most, and of buffers of its operations; infinite: not known."""

    @property
    def most_bytes(self) -> int | None:
        """Bytes that the trials took at most, or None if other parts of the process had taken more before."""
        return None if self.peak_bytes is None else self.peak_bytes - self.start_bytes


class Skeleton:
    """A module without weights of its own: its parameters are set for each call, by the names of the inputs."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._places: dict[str, tuple[dict[str, Any], str]] = {
            f"{path}.{name}": (inner._parameters, name)
            for path, inner in module.named_modules()
            for name in inner._parameters
        }

    def __call__(self, state: State, inputs: dict[str, Any]) -> tuple[Tensor]:
        """Set the parameters and run the module on [B, S, H]; results over tokens are [T, H]."""
        given = {}
        for name, tensor in inputs.items():
            if name in self._places:
                parameters, place = self._places[name]
                parameters[place] = tensor
            else:
                given[name] = tensor if name == "mask" else tensor.view(state.num_rows, state.length, -1)
        if isinstance(self.module, ExitHead):
            given["keep"] = torch.from_numpy(state.keep_BS1())
        return (self.module(**given).flatten(0, -2),)

    def drop_weights(self) -> None:
        """Move the parameters back to the meta device."""
        for parameters, name in self._places.values():
            parameters[name] = parameters[name].to("meta")


def _pooled_linear(state: State, inputs: dict[str, Any]) -> tuple[Tensor]:
    """Return logits [B, C], with the operations of training: equal bits."""
    pooled = pool(inputs["hidden"], None if state.mask_BS is None else torch.from_numpy(state.keep_BS1()))
    return (functional.linear(pooled, inputs["exit.weight"], inputs["exit.bias"]),)

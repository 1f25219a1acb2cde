"""The PyTorch backend: one skeleton a kind, whose parameters are views of the slots for the length of a call.

It needs a store's weights and no graphs, and no transformers. Same shapes, threads and attention implementation as
transformers: same bits, where its weights too begin on 64-byte boundaries. It does not promise a small process: torch
alone takes some 220 MiB before the first weight.

Shapes: B rows, S tokens of the longest row, T = B S, H hidden, I intermediate, E embedding width, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from offramp.backends.torch_modules import ATTENTIONS, build_skeletons, make_mask
from offramp.runtime.backend import Backend, State, Weights
from offramp.store import Store
from offramp.store.exits import read_exits
from offramp.store.shapes import require_fitting

_FLOAT_BYTES = 4
_SCRATCH_BYTES = 2 << 20
"""For each thread: its own buffers in fused attention and matrix products, and the heap around them."""


class TorchBackend(Backend):
    """Runs a store on PyTorch. `attention`: `sdpa`, which transformers takes by default, or `eager`.

    Sets the number of threads of torch in the whole process, as a pass begins. Raises StoreError for a form of exits
    that it does not know, and for tensors that are not those of the encoder.
    """

    name = "torch"
    unsettled = frozenset({"up"})

    def __init__(self, store: Store, num_threads: int, attention: str = "sdpa") -> None:
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {tuple(ATTENTIONS)}, not {attention!r}")
        manifest = store.manifest
        require_fitting(manifest, store.path)
        self.encoder, self.num_threads, self.attention = manifest.encoder, num_threads, attention
        exits = read_exits(store)
        self._skeletons = build_skeletons(manifest.encoder, attention, None if exits is None else exits.form)
        self._places = {kind: _places(skeleton) for kind, skeleton in self._skeletons.items()}

    def rehearse(self, num_rows: int, length: int) -> None:
        """Run each kind on [B, S] tokens, some of them padded, with zeros for weights."""
        zeros = {kind: _zeros(skeleton) for kind, skeleton in self._skeletons.items()}
        shape_TE = (num_rows * length, self.encoder.embedding_size)
        rows = {role: np.zeros(shape_TE, np.float32) for role in ("word", "position", "type")}
        mask_BS = np.ones((num_rows, length), np.int64)
        mask_BS[-1, (length + 1) // 2 :] = 0
        state = self.begin(rows, mask_BS, zeros["embedding"])
        for kind in ("attention", "up", "down"):
            self.step(state, kind, zeros[kind])
        if "exit" in zeros:
            self.exit_logits(state, zeros["exit"])
        if "head" in zeros:
            self.head_logits(state, zeros["head"])

    def activation_bytes(self, num_rows: int, length: int) -> int:
        """The most that lives at once in any step: tensors as counted in the skeletons, and what the libraries add.

        BERT-base took from 11 MiB less to 2 MiB more, for 1 to 8 rows of 16 to 512 tokens.
        """
        encoder, tokens = self.encoder, num_rows * length
        hidden = tokens * encoder.hidden_size * _FLOAT_BYTES
        inner = tokens * encoder.intermediate_size * _FLOAT_BYTES
        square = num_rows * length * length * _FLOAT_BYTES
        scores = square if self.attention == "sdpa" else 2 * encoder.num_heads * square
        embedding = 7 * tokens * encoder.embedding_size * _FLOAT_BYTES + hidden
        activated = 4 if encoder.activation == "gelu_new" else 2
        steps = max(embedding, 7 * hidden + scores, hidden + activated * inner, 4 * hidden + inner)
        return steps + self.num_threads * _SCRATCH_BYTES

    def state_bytes(self, num_rows: int, length: int) -> int:
        """Hidden states, and a mask, which `eager` has for each pair of tokens."""
        return num_rows * length * (self.encoder.hidden_size + length) * _FLOAT_BYTES

    @torch.inference_mode()
    def begin(self, rows: Mapping[str, np.ndarray], mask_BS: np.ndarray, weights: Weights) -> State:
        """Sum, normalise and project the gathered rows."""
        torch.set_num_threads(self.num_threads)  # at every pass: others may have set it since
        num_rows, length = mask_BS.shape
        wanted = ("word", "position", "type") if self.encoder.num_token_types else ("word", "position")
        rows_BSE = {role: torch.from_numpy(rows[role]).view(num_rows, length, -1) for role in wanted}
        keep_BS = torch.from_numpy(mask_BS > 0)
        hidden_BSH = self._run("embedding", weights, rows_BSE)
        arrays = {"hidden": hidden_BSH, "keep": keep_BS, "mask": make_mask(keep_BS, self.attention)}
        return State(num_rows, length, arrays)

    @torch.inference_mode()
    def step(self, state: State, kind: str, weights: Weights) -> None:
        """One third of a layer."""
        arrays = state.arrays
        if kind == "attention":
            arrays["hidden"] = self._run(kind, weights, arrays["hidden"], arrays["mask"])
        elif kind == "up":
            arrays["inner"] = self._run(kind, weights, arrays["hidden"])
        else:
            arrays["hidden"] = self._run(kind, weights, arrays.pop("inner"), arrays["hidden"])

    @torch.inference_mode()
    def exit_logits(self, state: State, weights: Weights) -> np.ndarray:
        """Logits of an exit head."""
        keep_BS1 = state.arrays["keep"][:, :, None].to(torch.float32)
        return self._run("exit", weights, state.arrays["hidden"], keep_BS1).numpy()

    @torch.inference_mode()
    def head_logits(self, state: State, weights: Weights) -> np.ndarray:
        """Logits of the model's head."""
        return self._run("head", weights, state.arrays["hidden"]).numpy()

    @torch.inference_mode()
    def keep(self, state: State, mask_B: np.ndarray) -> None:
        """Gather the rows that stay."""
        stays_B = torch.from_numpy(mask_B)
        state.arrays = {name: array if array is None else array[stays_B] for name, array in state.arrays.items()}
        state.num_rows = int(mask_B.sum())

    def close(self) -> None:
        """Let go of the slots that the last calls saw."""
        for places in self._places.values():
            for parameters, name in places.values():
                parameters[name] = parameters[name].to("meta")

    def _run(self, kind: str, weights: Weights, *inputs: object) -> Tensor:
        for role, (parameters, name) in self._places[kind].items():
            parameters[name] = _tensor(weights[role])
        return self._skeletons[kind](*inputs)


def _places(skeleton: nn.Module) -> dict[str, tuple[dict, str]]:
    """role -> where its parameter is set: the dictionary of its module, and its name there."""
    return {
        f"{path}.{name}": (module._parameters, name)
        for path, module in skeleton.named_modules()
        for name in module._parameters
    }


def _tensor(array: np.ndarray) -> Tensor:
    """A view. What must not be written to (the small weights of an exit) is copied: torch has no read-only tensors."""
    return torch.from_numpy(array) if array.flags.writeable else torch.tensor(array)


def _zeros(skeleton: nn.Module) -> dict[str, np.ndarray]:
    return {role: np.zeros(parameter.shape, np.float32) for role, parameter in skeleton.named_parameters()}

"""Classifiers and their exits, loaded from a run folder or a store, and the logits of every exit for many rows.

Rows are taken a window at a time to bound memory. No gradients.

Shapes: N rows of a window, B of a batch, S tokens, H width, C labels; K exits.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedModel

from offramp.backends.onnx import OnnxBackend
from offramp.backends.torch import TorchBackend
from offramp.backends.torch_modules import pool
from offramp.checkpoints.exits import ModelWithExits, ModuleWithExits, Point, WithExits, widened
from offramp.checkpoints.inputs import PLAIN_OUTPUT, AnyRows, has_known_names, taken_by, takes_images
from offramp.checkpoints.source import open_source
from offramp.checkpoints.weights import read_small
from offramp.errors import NonFiniteError, OfframpError, SourceError, UsageError, said, system_error
from offramp.measure import default_threads
from offramp.policies import parse
from offramp.program.inputs import Batch
from offramp.program.program import BATCH_TOKENS, POSITION_IDS, TEXT_INPUTS, Call
from offramp.runtime.backend import State
from offramp.runtime.exits import exit_widths, load_exits
from offramp.runtime.inputs import InputReader, not_finite
from offramp.store import Store
from offramp.store.exits import ExitsDescription, parse_exits
from offramp.store.manifest import INT8, MAX_EXITS_BYTES
from offramp.store.reader import tensor_view
from offramp.streaming.weightless import config_of_folder
from offramp.tasks.text import token_batch

MAX_HEADS_BYTES = 4 << 30
"""Size up to which the heads of exits are read; a larger file is refused as incomplete."""
WINDOW_BATCHES = 64
"""Rows of this many batches are sorted by length, so that those of a batch are about equally long."""


def auto_class(folder: Path) -> Any:
    """Return the auto class of transformers that loads the classifier of a folder.

    Raises SourceError for a config that transformers refuses.
    """
    config_of_folder(folder)
    return AutoModelForImageClassification if takes_images(folder) else AutoModelForSequenceClassification


def load_classifier(folder: Path) -> WithExits | PreTrainedModel:
    """Return the classifier of a folder in float32, with its exits if it has any, on the GPU if there is one.

    Raises SourceError for a folder that lacks weights, and for exits that do not fit.
    """
    with open_source(folder) as source:
        exits = source.exits()
    with quiet_libraries(), refusing(folder):
        options = {"dtype": torch.float32, "output_loading_info": True, **PLAIN_OUTPUT}
        model, info = auto_class(folder).from_pretrained(folder, local_files_only=True, **options)
    if info["missing_keys"]:  # transformers has initialised them
        what = (
            f"{len(info['missing_keys'])} tensors of the model are missing, the first is {min(info['missing_keys'])!r}"
        )
        raise SourceError(what, folder, "get the whole model again")
    if exits is None:
        return model.to(device())
    tensors, file = exits
    data = read_small(file, MAX_EXITS_BYTES)
    description = parse_exits(data, folder, SourceError)
    if not description.trained:
        raise SourceError("the exits were never trained", folder, "train them, or remove their two files")
    try:
        heads = load(read_small(tensors, MAX_HEADS_BYTES))
        if has_known_names(folder):
            with_exits = ModelWithExits(model, description.form.name)
        else:
            points = _points(description, heads, model)
            with_exits = ModuleWithExits(model, points, of_texts=not takes_images(folder))
        parse_exits(data, folder, SourceError, len(with_exits.heads))  # again: only the model tells their number
        with_exits.load_exits(heads)
    except (ValueError, SafetensorError) as error:
        raise SourceError(f"exits cannot be read ({error})", tensors, "train the exits again") from None
    return with_exits.to(device())


def _points(description: ExitsDescription, heads: Mapping[str, Tensor], model: nn.Module) -> list[Point]:
    """Return the points of exits. Raises ValueError for those of another model, and for widths that no head has."""
    modules = {name for name, _ in model.named_modules()}
    for number, (module, _, width) in enumerate(description.points, start=1):
        if module not in modules:
            raise ValueError(f"the model has no module {module!r}")
        head = heads.get(description.form.tensor_name("exit.weight", number))
        if head is None or head.ndim != 2 or head.shape[1] != width:
            raise ValueError(f"no head of width {width} for exit {number}")
    return [(Call(module, number), width) for module, number, width in description.points]


def device() -> str:
    """Return the device that models run on: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence progress bars of transformers, and its warning that a bare encoder gets a new head."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Translate the errors of transformers and safetensors for a folder that they cannot load to SourceError."""
    try:
        yield
    except OfframpError:
        raise
    except Exception as error:  # they raise any class
        if system_error(error) is not None:
            raise
        raise SourceError(
            f"transformers cannot load the model ({said(error)})", folder, "get the whole model again"
        ) from error


class StoredWithExits(nn.Module):
    """The exits of a divided module, or of an int8 store: its steps run with all weights in memory.

    Raises StoreError where the stages of the store are no graphs.
    """

    def __init__(self, store: Store, *, trust_kernels: bool = False) -> None:
        """`trust_kernels`: captured kernels may contain operations outside the table of PyTorch."""
        super().__init__()
        self._program, self._inputs = store.program, InputReader(store)
        # Integers of captured kernels are multiplied by ONNX Runtime alone: its answers are those of `run`.
        is_integers = store.program.module is not None and store.manifest.precision == INT8
        backend = OnnxBackend if is_integers else TorchBackend
        self._backend = backend(store, default_threads().number, trust_kernels=trust_kernels)
        has_exits = store.manifest.exits is not None
        self._exits = load_exits(store, parse("none"), needs_all=has_exits) if has_exits else {}
        self.heads = range(len(self._exits))
        self._width = max(exit_widths(self._program), default=1)
        self._weights: dict[str, np.ndarray] = {}
        tensors = store.manifest.tensors()
        for name in {name for step in self._program.steps() for name in step.weights.values()}:
            shard, tensor = tensors[name]
            data = np.frombuffer(store.read_tensor(shard.name, tensor), np.uint8)
            weight = tensor_view(replace(tensor, offset=0), data)
            self._weights[name] = weight.astype(np.float32) if name in store.manifest.upcast else weight

    def with_hidden(self, **inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits [B, C] of each exit, and the hidden states [B, S, H] of an encoder where it stands.

        Of a module it is the pooled value that the exit reads, as one token [B, 1, H]. Narrower values are filled up
        with zeros. The last exit has no value of its own and repeats the one before.
        """
        batch = self._batch({name: tensor.numpy() for name, tensor in inputs.items()})
        shape, mask_BS = (batch.num_rows, batch.length), self._inputs.mask(batch)
        state = self._backend.begin(self._inputs.read(batch)[0], mask_BS, shape)
        logits, hidden, last = [], [], self._program.layers[-1]
        for index, stage in enumerate(self._program.stages):
            for step in stage.steps:
                self._backend.run(state, step, {role: self._weights[name] for role, name in step.weights.items()})
            if stage.exit is not None and index in self._exits:
                logits.append(torch.from_numpy(self._backend.exit_logits(state, stage.exit, self._exits[index])))
                hidden.append(self._hidden(state, stage.exit, mask_BS))
            elif stage is last and self._program.module is None:
                hidden.append(self._hidden(state, next(iter(stage.steps[-1].writes)), mask_BS))
        are_all = len(hidden) == len(logits) + 1
        return [*logits, torch.from_numpy(self._backend.logits(state))], hidden if are_all else [*hidden, *hidden[-1:]]

    def _hidden(self, state: State, value: str, mask_BS: np.ndarray | None) -> Tensor:
        """Return the hidden states of an encoder [B, S, H], or the pooled value of a module as one token [B, 1, H]."""
        found = torch.as_tensor(state.values[value])
        if self._program.values()[value].axes[0] == BATCH_TOKENS:
            return found.reshape(state.num_rows, state.length, -1)
        keep = None if mask_BS is None else torch.from_numpy(mask_BS[:, :, None].astype(np.float32))
        return widened(pool(found, keep), self._width)[:, None]

    def _batch(self, arrays: dict[str, np.ndarray]) -> Batch:
        """Return the batch of a model's inputs; texts without token types have zeros."""
        num_rows, length, texts = len(next(iter(arrays.values()))), 1, self._program.texts
        if texts is not None:
            length = arrays[TEXT_INPUTS[0]].shape[1]
            arrays = {TEXT_INPUTS[2]: np.zeros((num_rows, length), np.int64), **arrays}
        if texts is not None and POSITION_IDS in self._program.inputs:
            ids_BS, mask_BS, types_BS = (arrays[name] for name in TEXT_INPUTS)
            return token_batch(texts, ids_BS, mask_BS, types_BS)
        known = {*self._program.inputs, *TEXT_INPUTS}
        taken = {name: array for name, array in arrays.items() if name in known}
        return Batch(taken, num_rows, length, np.full(num_rows, length, np.int64))


Classifier = WithExits | StoredWithExits | PreTrainedModel
"""A classifier with exits or without."""


def predict(model: Classifier, rows: AnyRows, batch_size: int) -> np.ndarray:
    """Return the logits of each exit for all rows, float32 [K, N, C]; K is 1 for a model without exits."""
    windows = [logits_NKC for _, logits_NKC, _ in predict_windows(model, rows, batch_size)]
    return np.ascontiguousarray(np.concatenate(windows).swapaxes(0, 1))


def predict_windows(
    model: Classifier, rows: AnyRows, batch_size: int, *, with_features: bool = False
) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    """Yield windows of rows: index of the first row, logits [N, K, C], and, if requested, features [N, K, H].

    A feature is the first token's hidden state where an exit stands. Raises NonFiniteError naming the exit.
    """

    def outputs(inputs: dict[str, Tensor]) -> list[list[Tensor]]:
        if isinstance(model, (WithExits, StoredWithExits)):
            logits, hidden = model.with_hidden(**inputs)
        else:
            known = {name: tensor for name, tensor in inputs.items() if name in taken_by(model)}
            output = model(**known, **({"output_hidden_states": True} if with_features else {}))
            logits, hidden = [output.logits], (getattr(output, "hidden_states", None) or ())[-1:]
            if with_features and not hidden:
                what = f"a {type(model).__name__} returns no hidden states"
                raise UsageError(what, None, "leave out --features")
        return [logits, [hidden_BSH[:, 0] for hidden_BSH in hidden]] if with_features else [logits]

    for start, logits_NKC, *features in _run_windows(model, outputs, rows, batch_size):
        _require_finite(logits_NKC, rows, start)
        yield start, logits_NKC, features[0] if with_features else None


def _require_finite(logits_NKC: np.ndarray, rows: AnyRows, start: int) -> None:
    """Raise NonFiniteError that names an input, or else the exit, if an output of the rows from `start` is not."""
    is_finite_NK = np.isfinite(logits_NKC).all(axis=-1)
    if is_finite_NK.all():
        return
    number = start + int(is_finite_NK.all(axis=-1).argmin())
    arrays = {name: array for name, array in rows.batch(np.array([number])).items() if name != "labels"}
    if not_finite(arrays, [0]) is not None:
        where = f"row {number + 1} of the data"
        raise NonFiniteError("an input has NaN or infinite numbers", where, "replace these numbers, or drop the row")
    what = f"output of exit {int(is_finite_NK.all(axis=0).argmin()) + 1} is not finite"
    raise NonFiniteError(what, "the trained model", "lower the learning rate")


def pooled_windows(model: WithExits, rows: AnyRows, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield windows of the pooled values that the heads read, [N, K - 1, H]."""
    return _run_windows(model, lambda inputs: [model.pooled(**inputs)], rows, batch_size)


@torch.inference_mode()
def _run_windows(
    model: Classifier, call: Callable[[dict[str, Tensor]], list[list[Tensor]]], rows: AnyRows, batch_size: int
) -> Iterator[Any]:
    """Yield windows in the order of the rows: index of the first row, and an array for each list of tensors that `call`
    returns for the inputs of a batch. Dropout is off.
    """
    model.eval()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    for start in range(0, len(rows), WINDOW_BATCHES * batch_size):
        indices = np.arange(start, min(start + WINDOW_BATCHES * batch_size, len(rows)))
        order = indices[np.argsort(rows.lengths_N[indices], kind="stable")]
        parts = []
        for first in range(0, len(order), batch_size):
            inputs = to_tensors(rows.batch(order[first : first + batch_size]), device)
            del inputs["labels"]
            parts.append([torch.stack([t.float().cpu() for t in tensors], 1).numpy() for tensors in call(inputs)])
        back = np.argsort(order, kind="stable")
        yield start, *(np.concatenate(arrays)[back] for arrays in zip(*parts, strict=True))


def to_tensors(batch: dict[str, np.ndarray], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return a batch of rows as tensors for a model."""
    return {name: torch.from_numpy(array).to(device) for name, array in batch.items()}

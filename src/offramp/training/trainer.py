"""Trainer of transformers with a loss at every exit. Writes checkpoints; independent of the type of the inputs.

The composition and order of batches are determined by the seed and the epoch alone. The inputs of heads on a frozen
model, the pooled hidden states of each row, are computed once and cached on disk.

Shapes: N rows, B rows of a batch, H hidden, C labels; K exits.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from offramp.checkpoints.checkpoint import WithExits, pooled_windows, to_tensors
from offramp.checkpoints.inputs import AnyRows
from offramp.errors import UsageError
from offramp.tasks.rows import Labelled
from offramp.training.folders import LOGS
from offramp.training.loss import distillation_losses, exit_losses, require_finite, weighted_loss
from offramp.training.settings import TrainSettings
from offramp.units import format_duration

MEGABATCH = 50
"""Number of batches whose rows are sorted by length together."""
MIXED_SHARE = 0.5
"""Fraction of the steps in which `mixed` trains the last exit alone."""
_LOGS = "TENSORBOARD_LOGGING_DIR"


@dataclass(frozen=True, eq=False)
class PooledRows(Labelled):
    """Head inputs of N rows, memory-mapped from a file."""

    pooled_NKH: np.ndarray
    """Input of each head, [N, K - 1, H]."""
    labels_N: np.ndarray
    """Label id or value of each row."""

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Return `pooled` [B, K - 1, H] and `labels` of the given rows."""
        return {"pooled": self.pooled_NKH[indices], "labels": self.labels_N[indices]}


def pool_rows(model: WithExits, rows: AnyRows, batch_size: int, path: Path) -> PooledRows:
    """Return the head inputs of all rows, running the model once. A complete file of an earlier attempt is reused."""
    if not path.is_file():
        partial = path.with_name(path.name + ".tmp")
        pooled_NKH = open_memmap(partial, "w+", np.float32, (len(rows), len(model.heads), model.pooled_size))
        with partial.open("r+b") as file:  # otherwise a full disk would kill the process (SIGBUS)
            os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        for start, window_NKH in pooled_windows(model, rows, batch_size):
            pooled_NKH[start : start + len(window_NKH)] = window_NKH
        pooled_NKH.flush()
        partial.replace(path)
    return PooledRows(np.load(path, mmap_mode="r", allow_pickle=False), rows.labels_N)


class Heads(nn.Module):
    """The heads of a model as a module of their own, applied to pooled hidden states."""

    def __init__(self, model: WithExits) -> None:
        super().__init__()
        self.heads = model.heads
        self._classify, self._owner = model.classify, [model]  # in a list, so that it is not registered as a submodule

    def train(self, mode: bool = True) -> "Heads":
        """Set the mode of the heads; their dropout follows the mode of the owner."""
        self._owner[0].training = mode
        return super().train(mode)

    def forward(self, pooled: Tensor) -> list[Tensor]:
        """Return the logits [B, C] of each exit except the last, from `pooled` [B, K - 1, H]."""
        return self._classify(list(pooled.unbind(1)))


class LengthGroupedBatches(Sampler[list[int]], TrainerCallback):
    """Batches of rows of similar length, in a random order that differs between epochs.

    The order depends only on the seed and the epoch number, so a resumed training sees the same batches. It is a
    callback because two wrappers hide a sampler from the Trainer when several processes resume.
    """

    drop_last = False  # accelerate reads this attribute

    def __init__(self, lengths_N: np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths_N, self.batch_size, self.seed, self.epoch = lengths_N, batch_size, seed, 0

    def __len__(self) -> int:
        return math.ceil(len(self.lengths_N) / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch number; the Trainer calls this before each epoch."""
        self.epoch = epoch

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the epoch number from the state of the Trainer."""
        self.set_epoch(int((state.epoch or 0) + 1e-6))

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order_N = generator.permutation(len(self.lengths_N))
        size, batches = MEGABATCH * self.batch_size, []
        for begin in range(0, len(order_N), size):
            rows = order_N[begin : begin + size]
            rows = rows[np.argsort(self.lengths_N[rows], kind="stable")]
            batches += [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        num_full = len(order_N) // self.batch_size  # a short batch comes last: accelerate distributes only full ones
        for index in (*generator.permutation(num_full), *range(num_full, len(batches))):
            yield batches[index].tolist()


def fit(
    model: WithExits,
    rows: AnyRows | PooledRows,
    settings: TrainSettings,
    folder: Path,
    checkpoint: Path | None,
    progress: Callable[[str], None],
) -> None:
    """Train `model` in place, from `checkpoint` if given; the Trainer writes checkpoints to `folder`.

    `heads-only` trains the heads on `PooledRows`, other losses train the whole model. Seeds the generators of random,
    numpy and torch. On the CPU, equal inputs and thread counts give bitwise equal weights, with or without
    interruption. Raises NonFiniteError that names the exit.
    """
    with _logs_beside(folder):
        trainer = ExitTrainer(model, rows, settings, folder)
        trainer.remove_callback(PrinterCallback)  # it prints to stdout
        trainer.add_callback(_Progress(progress))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


@contextmanager
def _logs_beside(folder: Path) -> Iterator[None]:
    """Move the TensorBoard logs out of the checkpoint folder, which is removed at the end.

    No argument sets their place.
    """
    was_set = _LOGS in os.environ
    os.environ.setdefault(_LOGS, str(folder.parent.with_name(LOGS) / folder.name))
    try:
        yield
    finally:
        if not was_set:
            del os.environ[_LOGS]


def require_possible(settings: TrainSettings) -> None:
    """Raise UsageError for settings that this machine does not support."""
    if settings.precision == "float16" and not torch.cuda.is_available():
        raise UsageError("float16 needs a GPU", None, "use bfloat16 or float32")
    known = get_available_reporting_integrations()
    if settings.report_to not in ("none", *known):
        what = f"cannot report to {settings.report_to!r}"
        raise UsageError(what, None, f"installed integrations: {', '.join(known) or 'none'}")


class ExitTrainer(Trainer):
    """Trainer that minimises the loss of `settings`.

    Heads have their own learning rate; batches are grouped by length.
    """

    def __init__(self, model: WithExits, rows: AnyRows | PooledRows, settings: TrainSettings, folder: Path) -> None:
        trained = Heads(model) if settings.loss == "heads-only" else model
        indices = cast(Dataset, range(len(rows)))
        super().__init__(trained, _arguments(settings, len(rows), folder), train_dataset=indices)
        self.exits_model, self.rows, self.settings = model, rows, settings
        self.problem = model.problem
        self.weights = settings.weights(len(model.heads) + 1)
        self.model_accepts_loss_kwargs = False  # losses are means over a batch, not scaled for accumulation

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch, with the logits of each exit if requested."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        objective, state = self.settings.loss, self.state
        is_first_half = state.global_step < MIXED_SHARE * state.max_steps
        last_only = objective == "last" or (objective == "mixed" and is_first_half)
        logits = model(**inputs, last_only=True) if last_only else model(**inputs)
        losses = exit_losses([logits_BC.float() for logits_BC in logits], labels, self.problem)
        where = f"training step {state.global_step + 1}"
        given = {} if objective == "heads-only" else inputs
        require_finite(losses, "loss", where, len(self.weights) if last_only else 1, given)
        if objective == "distill":
            losses = distillation_losses(losses, logits, self.problem)
        weights = self.weights
        if last_only or objective == "heads-only":  # the last exit alone, or all but the last, which is frozen
            weights = [1 / len(losses)] * len(losses)
        loss = weighted_loss(losses, weights)
        return (loss, logits) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save tied weights under one of their names.

        Safetensors rejects shared memory, and loading one name loads all.
        """
        tensors = cast(nn.Module, self.model).state_dict() if state_dict is None else state_dict
        first = {(tensor.data_ptr(), tensor.shape, tensor.dtype): name for name, tensor in reversed(tensors.items())}
        once = {name: tensor for name, tensor in tensors.items() if not tensor.numel() or name in first.values()}
        super()._save(output_dir, state_dict=once)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return AdamW with separate learning rates for pretrained weights and heads."""
        settings = self.settings
        encoder = {id(parameter) for parameter in self.exits_model.backbone.parameters()}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for parameter in cast(nn.Module, self.model).parameters():
            groups.setdefault((id(parameter) in encoder, parameter.ndim > 1), []).append(parameter)
        rates = {True: settings.learning_rate, False: settings.head_learning_rate}
        options = [
            {"params": parameters, "lr": rates[in_encoder], "weight_decay": is_matrix * settings.weight_decay}
            for (in_encoder, is_matrix), parameters in groups.items()
        ]
        self.optimizer = torch.optim.AdamW(options, fused=True)
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches, in an order determined by the seed and the epoch."""
        sampler = LengthGroupedBatches(self.rows.lengths_N, self.settings.batch_size, self.settings.seed)
        self.add_callback(sampler)
        indices = cast(Dataset, self.train_dataset)
        loader = DataLoader(indices, batch_sampler=sampler, collate_fn=lambda rows: to_tensors(self.rows.batch(rows)))
        return self.accelerator.prepare(loader)


class _Progress(TrainerCallback):
    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress, self._began = progress, (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = (state.global_step, time.monotonic())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:  # the last call passes a summary instead
            first, began = self._began
            seconds_per_step = (time.monotonic() - began) / max(state.global_step - first, 1)
            remaining = format_duration(seconds_per_step * (state.max_steps - state.global_step))
            line = f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.3f}"
            self._progress(f"{line}, {remaining} remaining")


def _arguments(settings: TrainSettings, num_rows: int, folder: Path) -> TrainingArguments:
    use_cpu = not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        seed=settings.seed,
        report_to=settings.report_to,
        disable_tqdm=True,
        use_cpu=use_cpu,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup,  # below 1: a fraction of the steps
        bf16=settings.precision == "bfloat16",
        fp16=settings.precision == "float16",
        logging_steps=0.05,  # of all steps
        save_strategy="steps",
        save_steps=settings.save_steps or _save_steps(settings, num_rows),
        save_total_limit=1,
        eval_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=settings.loss in ("last", "mixed"),
    )
    if arguments.n_gpu > 1:  # DataParallel copies the model for each batch; torchrun uses all GPUs
        arguments._n_gpu = 1
    return arguments


def _save_steps(settings: TrainSettings, num_rows: int) -> int:
    """Return the steps between checkpoints: at most 500, with at least five checkpoints per training."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    num_steps = settings.epochs * num_rows // (settings.batch_size * settings.accumulate * num_processes)
    return max(1, min(500, num_steps // 5))

"""Trainer of transformers with a loss at every exit. Writes checkpoints; independent of the type of the inputs.

Shapes: B rows of a batch, C labels; K exits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from offramp.checkpoints.checkpoint import WithExits, to_tensors
from offramp.errors import UsageError
from offramp.training.batches import LengthGroupedBatches
from offramp.training.frozen import Heads
from offramp.training.loss import distillation_losses, exit_losses, require_finite, weighted_loss
from offramp.training.settings import TrainSettings

_LOGS = "TENSORBOARD_LOGGING_DIR"
MIXED_SHARE = 0.5
"""Fraction of the steps in which `mixed` trains the last exit alone."""


class Batches(Protocol):
    """Protocol of rows that are read in batches: token ids, pixels, or head inputs."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    @property
    def lengths_N(self) -> np.ndarray:
        """Number of tokens of each row."""
        ...

    def batch(self, indices: Any) -> dict[str, np.ndarray]:
        """Return the arguments of the model, and `labels`."""
        ...


def fit(
    model: WithExits,
    rows: Batches,
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
    if _LOGS in os.environ:
        yield
        return
    os.environ[_LOGS] = str(folder.parent.with_name("logs") / folder.name)
    try:
        yield
    finally:
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

    def __init__(self, model: WithExits, rows: Batches, settings: TrainSettings, folder: Path) -> None:
        trained = Heads(model) if settings.loss == "heads-only" else model
        super().__init__(
            trained, _arguments(settings, len(rows), folder), train_dataset=cast(Dataset, range(len(rows)))
        )
        self.exits_model, self.rows, self.settings = model, rows, settings
        self.problem = model.problem
        self.weights = settings.weights(len(model.heads) + 1)
        self.model_accepts_loss_kwargs = False  # losses are means over a batch, not scaled for accumulation

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch, with the logits of each exit if requested."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        last_only = self._last_only()
        logits = model(**inputs, last_only=True) if last_only else model(**inputs)
        losses = exit_losses([logits_BC.float() for logits_BC in logits], labels, self.problem)
        where = f"training step {self.state.global_step + 1}"
        require_finite(losses, "loss", where, first_exit=len(self.weights) if last_only else 1)
        loss = losses[0] if last_only else self._joint(losses, logits)
        return (loss, logits) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save tied weights under one of their names.

        Safetensors rejects shared memory, and loading one name loads all.
        """
        tensors = cast(nn.Module, self.model).state_dict() if state_dict is None else state_dict
        first = {(tensor.data_ptr(), tensor.shape, tensor.dtype): name for name, tensor in reversed(tensors.items())}
        once = {name: tensor for name, tensor in tensors.items() if not tensor.numel() or name in first.values()}
        super()._save(output_dir, state_dict=once)

    def _last_only(self) -> bool:
        loss, state = self.settings.loss, self.state
        return loss == "last" or (loss == "mixed" and state.global_step < MIXED_SHARE * state.max_steps)

    def _joint(self, losses: list[Tensor], logits: list[Tensor]) -> Tensor:
        if self.settings.loss == "distill":
            losses = distillation_losses(losses, logits, self.problem)
        if self.settings.loss == "heads-only":  # the last exit is frozen
            return weighted_loss(losses, [1 / len(losses)] * len(losses))
        return weighted_loss(losses, self.weights)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return AdamW with separate learning rates for pretrained weights and heads."""
        settings = self.settings
        encoder = {id(parameter) for parameter in self.exits_model.backbone.parameters()}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for parameter in cast(nn.Module, self.model).parameters():
            groups.setdefault((id(parameter) in encoder, parameter.ndim > 1), []).append(parameter)
        options = [
            {
                "params": parameters,
                "lr": settings.learning_rate if in_encoder else settings.head_learning_rate,
                "weight_decay": settings.weight_decay if is_matrix else 0.0,
            }
            for (in_encoder, is_matrix), parameters in groups.items()
        ]
        self.optimizer = torch.optim.AdamW(options, fused=True)
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches, in an order determined by the seed and the epoch."""
        sampler = LengthGroupedBatches(self.rows.lengths_N, self.settings.batch_size, self.settings.seed)
        self.add_callback(_Epochs(sampler))

        def collate(indices: list[int]) -> dict[str, Tensor]:
            return to_tensors(self.rows.batch(indices))

        loader = DataLoader(cast(Dataset, self.train_dataset), batch_sampler=sampler, collate_fn=collate)
        return self.accelerator.prepare(loader)


class _Epochs(TrainerCallback):
    """Sets the epoch of the batches. When several processes resume, two wrappers hide the sampler from the Trainer."""

    def __init__(self, batches: LengthGroupedBatches) -> None:
        self._batches = batches

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._batches.set_epoch(int((state.epoch or 0) + 1e-6))


class _Progress(TrainerCallback):
    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress, self._began = progress, (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = (state.global_step, time.monotonic())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:  # the last call passes a summary instead
            first, began = self._began
            seconds_per_step = (time.monotonic() - began) / max(state.global_step - first, 1)
            minutes = seconds_per_step * (state.max_steps - state.global_step) / 60
            line = f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.3f}"
            self._progress(f"{line}, {minutes:.1f} minutes remaining")


def _arguments(settings: TrainSettings, num_rows: int, folder: Path) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        warmup_steps=settings.warmup,  # below 1: a fraction of the steps
        lr_scheduler_type="linear",
        use_cpu=not torch.cuda.is_available(),
        bf16=settings.precision == "bfloat16",
        fp16=settings.precision == "float16",
        seed=settings.seed,
        remove_unused_columns=False,
        logging_steps=0.05,  # of all steps
        save_strategy="steps",
        save_steps=settings.save_steps or _save_steps(settings, num_rows),
        save_total_limit=1,
        eval_strategy="no",
        report_to=settings.report_to,
        disable_tqdm=True,
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

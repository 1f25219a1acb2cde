"""Gradients: transformers' Trainer with a loss at every exit. Writes nothing, and knows neither files nor texts.

Shapes: B rows of a batch, N rows in all, C labels; K exits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from offramp.models.exits import ModelWithExits
from offramp.training.encoding import Collator, Row
from offramp.training.loss import exit_losses, pabee_loss, require_finite
from offramp.training.settings import TrainSettings


def fit(
    model: ModelWithExits,
    rows: list[Row],
    collate: Collator,
    settings: TrainSettings,
    folder: Path,
    progress: Callable[[str], None],
) -> None:
    """Train `model` in place on one device; the Trainer insists on a `folder`, and leaves nothing in it.

    Seeds the generators of random, numpy and torch. On the CPU equal inputs give equal weights, bit for bit, with the
    same number of threads. Raises NonFiniteError naming the exit.
    """
    trainer = ExitTrainer(model, rows, collate, settings, folder)
    trainer.remove_callback(PrinterCallback)  # it prints to stdout
    trainer.add_callback(_Progress(progress))
    trainer.train()


class ExitTrainer(Trainer):
    """Minimises the PABEE loss; heads learn at their own rate, and rows of about equal length share a batch."""

    def __init__(
        self, model: ModelWithExits, rows: list[Row], collate: Collator, settings: TrainSettings, folder: Path
    ) -> None:
        super().__init__(model, _arguments(settings, len(rows), folder), collate)
        self.exits_model, self.rows, self.collate, self.settings = model, rows, collate, settings
        self.problem = str(model.model.config.problem_type)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, and the logits of each exit if asked for."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        logits = model(**inputs)
        losses = exit_losses(logits, labels, self.problem)
        require_finite(losses, "loss", f"training step {self.state.global_step + 1}")
        loss = pabee_loss(losses)
        return (loss, logits) if return_outputs else loss

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with two rates: what the checkpoint brought, and the heads."""
        settings = self.settings
        encoder = {id(parameter) for parameter in self.exits_model.model.base_model.parameters()}
        groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
        for parameter in self.exits_model.parameters():
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
        """Batches of about equal length, in an order that only the seed decides."""
        rows = cast(Dataset, self.rows)  # a list has all that a loader needs
        lengths = [len(row["input_ids"]) for row in self.rows]
        generator = torch.Generator().manual_seed(self.settings.seed)
        sampler = LengthGroupedSampler(self.settings.batch_size, lengths=lengths, generator=generator)
        return DataLoader(rows, self.settings.batch_size, sampler=sampler, collate_fn=self.collate)


@torch.no_grad()
def predict(model: ModelWithExits, rows: list[Row], collate: Collator, batch_size: int) -> Tensor:
    """What each exit says of the rows, in their order: logits [K, N, C]. Raises NonFiniteError naming the exit."""
    model.eval()
    device = model.model.device
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    logits_KNC = torch.empty(len(model.heads) + 1, len(rows), cast(int, model.model.config.num_labels))
    for start in range(0, len(rows), batch_size):
        indices = order[start : start + batch_size]
        inputs = {name: tensor.to(device) for name, tensor in collate([rows[index] for index in indices]).items()}
        inputs.pop("labels")
        logits = model(**inputs)
        require_finite(logits, "output", "the trained model")
        logits_KNC[:, indices] = torch.stack([logits_BC.float().cpu() for logits_BC in logits])
    return logits_KNC


class _Progress(TrainerCallback):
    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:  # the last call carries a summary instead
            self._progress(f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.3f}")


def _arguments(settings: TrainSettings, num_rows: int, folder: Path) -> TrainingArguments:
    num_steps = settings.epochs * math.ceil(num_rows / settings.batch_size)
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        warmup_steps=math.ceil(settings.warmup * num_steps),
        lr_scheduler_type="linear",
        use_cpu=not torch.cuda.is_available(),
        bf16=settings.bfloat16,
        seed=settings.seed,
        remove_unused_columns=False,
        logging_steps=0.05,  # of all steps
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )

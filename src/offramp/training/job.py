"""One training from validated examples to a run folder, and the measurement of its exits."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import set_seed

from offramp.checkpoints.checkpoint import WithExits, device, predict, quiet_libraries
from offramp.checkpoints.inputs import AnyRows
from offramp.errors import OfframpError, SourceError
from offramp.store.files import write_atomic
from offramp.store.trained_rows import FILE_NAME as TRAINED_ROWS
from offramp.store.trained_rows import TrainedRows
from offramp.tasks.arrays import Record
from offramp.tasks.digests import row_digests
from offramp.tasks.examples import digest, label_ids, spread
from offramp.tasks.metrics import default_metrics, metrics_of_ids, score_exits
from offramp.training import folders
from offramp.training.settings import Examples, ExitMetrics, TrainOptions, TrainSettings, is_first_process
from offramp.training.subjects import FolderModel, OwnModule
from offramp.training.trainer import fit, pool_rows, require_possible

MAX_HEADS_ROWS = 50_000
"""Maximum number of rows for training heads on a frozen model. Linear heads need no more; the cache is kilobytes per
row."""


class Job:
    """One training: its subject, data and settings. Labels are numbered as in the model."""

    def __init__(
        self, model: Any, train: Examples, tune: Examples, labels: Sequence[str], options: TrainOptions
    ) -> None:
        """Check the arguments. Raises SourceError for a model that cannot be trained, UsageError for the settings."""
        self.settings, self.progress = options.settings or TrainSettings(), options.progress
        require_possible(self.settings)
        if isinstance(model, (str, os.PathLike)):
            self.subject = FolderModel(Path(model), self.settings.max_length)
            if self.settings.loss == "heads-only" and self.subject.facts.problem is None:
                raise self._headless(len(labels))
        else:  # digests and batches use arrays, whatever the type of the inputs
            train, tune = ([(Record.of(item), label) for item, label in part] for part in (train, tune))
            self.subject = OwnModule(model, train, labels)
        ids = self._label_ids(labels)
        self.labels = tuple(labels[ids.index(number)] for number in range(len(ids)))
        self.train, self.tune = ([(item, ids[int(y)] if ids else y) for item, y in part] for part in (train, tune))
        self.metrics = metrics_of_ids(tuple(options.metrics) or default_metrics(labels), ids)
        self.config = self._config(options.data or {})
        self.trained_rows = self._trained_rows()

    def _label_ids(self, labels: Sequence[str]) -> list[int]:
        """Return the id of each label in the model.

        A classifier with the same set of labels keeps its own order, because its head was trained with it. Otherwise
        labels are numbered as given. Raises SourceError if the head is kept and its labels differ.
        """
        own = self.subject.facts.labels
        ids = label_ids(labels, own)
        if ids is None and own and self.settings.loss == "heads-only":
            what = f"the labels of the model are {', '.join(own)}, those of the data are {', '.join(labels)}"
            raise SourceError(what, self.subject.name, "train a model with --loss last first")
        return list(range(len(labels))) if ids is None else ids

    def _config(self, data: Any) -> dict[str, Any]:
        """Return the configuration that identifies the training, as JSON."""
        left_out = ("exit_weights", "report_to", "save_steps")
        return {
            "format": 1,
            "model_sha256": self.subject.fingerprint,
            "data": dict(data),
            "train_sha256": digest(self.train),
            "labels": list(self.labels),
            "exit_weights": self.settings.weights(self.subject.facts.num_exits),
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            **{key: value for key, value in asdict(self.settings).items() if key not in left_out},
        }

    def _trained_rows(self) -> TrainedRows:
        """Return the rows of this training, and those that the model was trained on before, as its folder tells."""
        before, first = self.subject.trained_rows, self.train[0][0]
        salt = self.config["train_sha256"][:32] if before is None else before.salt
        arguments = tuple(sorted(first.arrays)) if isinstance(first, Record) else ()
        digests_N = row_digests((item for item, _ in self.train), salt, arguments)
        earlier = [] if before is None else [before.digests_N]
        return TrainedRows(salt, arguments, np.unique(np.concatenate([digests_N, *earlier])))

    def run(self, out: Path) -> ExitMetrics:
        """Train unless `out` is complete, and measure the exits. A module is then on the CPU, in evaluation mode."""
        try:
            with quiet_libraries():
                if folders.is_finished(out, self.config):
                    self.progress(f"already trained: {out}")
                elif is_first_process():
                    with folders.run_folder(out, self.config) as folder:
                        self._train(folder)
                else:
                    self._train(folders.await_folder(out))
                    folders.await_run(out, self.config)
                rows = self._rows(self.tune)
                self.progress(f"measuring the exits on {len(rows)} rows{self._shared_rows()}")
                # saved and loaded again: autocast would remain active in the model that was trained with it
                logits_KNC = predict(self.subject.saved(out), rows, self.settings.batch_size)
                return ExitMetrics(tuple(score_exits(self.metrics, rows.labels_N, logits_KNC)), logits_KNC)
        finally:
            if isinstance(self.subject, OwnModule):
                self.subject.module.cpu().eval()

    def _train(self, folder: Path) -> None:
        settings = self.settings
        set_seed(settings.seed)  # the heads are initialised next
        classifier, head_is_new = self.subject.load(self.labels)
        if head_is_new and settings.loss == "heads-only":
            raise self._headless(len(self.labels))
        model = self.subject.with_exits(classifier, settings.heads)
        if is_first_process():
            self._require_savable(model, folder)
        if head_is_new:
            self.progress(f"the model has no head for {_outputs(len(self.labels))}: a new one is trained")
        self.progress(f"phases: {', '.join(self._phases(len(model.heads)))}")
        if settings.loss != "heads-only":
            self._fit_model(model, folder)
        if settings.loss != "last" and settings.heads_epochs and len(model.heads):
            self._fit_heads(model, folder)
        if is_first_process():
            self.subject.save(model, folder, with_exits=settings.loss != "last")
            write_atomic(folder / TRAINED_ROWS, [self.trained_rows.to_bytes()])

    def _phases(self, num_heads: int) -> Iterator[str]:
        """Yield the parts of the training, with their numbers of epochs."""
        settings = self.settings
        if settings.loss != "heads-only":
            what = "model" if settings.loss == "last" or not num_heads else f"model with {num_heads} heads"
            yield f"{what} (epochs: {settings.epochs})"
        if settings.loss != "last" and settings.heads_epochs and num_heads:
            yield f"heads alone (epochs: {settings.heads_epochs})"
        yield "measuring the exits"

    def _shared_rows(self) -> str:
        """Return how many rows of tune were trained on, for a message; "" if none was."""
        rows = self.trained_rows
        num_seen = int(rows.among(row_digests((item for item, _ in self.tune), rows.salt, rows.arguments)).sum())
        return f", {num_seen} of which were trained on: their scores say little about other rows" if num_seen else ""

    def _headless(self, num_labels: int) -> SourceError:
        what = f"heads-only keeps the model as it is, but it has no head for {_outputs(num_labels)}"
        return SourceError(what, self.subject.name, "train a model with --loss last first")

    def _require_savable(self, model: WithExits, folder: Path) -> None:
        """Save the untrained model once, for what refuses to be saved should do so before the first step.

        Raises SourceError with the reason of the library that saves it.
        """
        trial = folder / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        trial.mkdir()
        try:
            self.subject.save(model, trial, with_exits=self.settings.loss != "last")
        except (OfframpError, OSError):
            raise
        except Exception as error:  # transformers and safetensors raise many classes
            what = f"the model cannot be saved ({type(error).__name__}: {' '.join(str(error).split())})"
            raise SourceError(what, self.subject.name, "change what it names before training") from None
        finally:
            shutil.rmtree(trial, ignore_errors=True)

    def _fit_model(self, model: WithExits, folder: Path) -> None:
        rows = self._rows(self.train)
        place = folders.checkpoints(folder, "model")
        done = folders.last_checkpoint(place)
        self.progress(f"training {len(model.heads) + 1} exits on {len(rows)} rows{_resumed(done)}")
        fit(model, rows, self.settings, place, done, self.progress)

    def _fit_heads(self, model: WithExits, folder: Path) -> None:
        rows = self._rows(spread(self.train, MAX_HEADS_ROWS))
        place = folders.checkpoints(folder, "heads")
        done = folders.last_checkpoint(place)
        self.progress(f"training {len(model.heads)} heads on a frozen model with {len(rows)} rows{_resumed(done)}")
        place.mkdir(parents=True, exist_ok=True)
        model.to(device())  # the Trainer would move only the heads
        pooled = pool_rows(model, rows, self.settings.batch_size, place / f"pooled-{os.environ.get('RANK', '0')}.npy")
        set_seed(self.settings.seed)  # the same state whether the file existed or not
        settings = replace(self.settings, loss="heads-only", epochs=self.settings.heads_epochs)
        fit(model, pooled, settings, place, done, self.progress)

    def _rows(self, examples: Examples) -> AnyRows:
        return self.subject.rows(examples, self.settings.max_length, not self.labels, self.progress)


def _outputs(num_labels: int) -> str:
    return f"{num_labels} labels" if num_labels else "a number"


def _resumed(checkpoint: Path | None) -> str:
    return f", resumed from {checkpoint.name}" if checkpoint else ""

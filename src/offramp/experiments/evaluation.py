"""Evaluation of every exit of a model, and of exit policies, on splits of labelled data; optionally with a transcript
of the outputs of every exit.

Shapes: N rows, K exits, C outputs of a head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offramp.checkpoints.source import folder_of_store, open_source, read_training
from offramp.errors import SourceError, StoreError, UsageError
from offramp.experiments.children import Log
from offramp.experiments.held_out import held_out
from offramp.policies import Policy, replay
from offramp.policies.evidence import MULTI_LABEL, REGRESSION
from offramp.store import Store
from offramp.store.checking import require_whole
from offramp.store.reader import is_store, read_manifest_bytes
from offramp.store.transcript import About, TranscriptWriter, find_transcript
from offramp.tasks.examples import Example, Splits, digest, label_ids, label_notice
from offramp.tasks.lines import silent
from offramp.tasks.metrics import answers, metrics_of_ids, score, score_exits
from offramp.tasks.tokenizer import tokenizer_length

if TYPE_CHECKING:
    from offramp.checkpoints.inputs import AnyRows, Facts


@dataclass(frozen=True)
class ExitRow:
    """Results of one exit on one split; shares in percent."""

    exit: int
    scores: dict[str, float]
    """Each metric, and `score`, their mean."""
    agreement: float
    """Share of rows with the label of the last exit; for a regression Pearson's correlation with the last exit."""
    overthought: float
    """Share of rows correct at this exit and wrong at the last (Kaya et al., ICML 2019); for a regression, of rows
    where this exit is nearer to the truth."""


@dataclass(frozen=True)
class PolicyRow:
    """Replayed results of a policy. `mean_exit` counts layers and does not predict latency."""

    policy: str
    scores: dict[str, float]
    mean_exit: float


@dataclass(frozen=True)
class SplitReport:
    """Results on one split. `overthinking`: percent of rows that are correct at some exit and wrong at the last."""

    split: str
    num_rows: int
    """Number of rows that were evaluated."""
    training_rows: int | None
    """Number of rows of the split that the model was trained on; None: unknown."""
    includes_training_rows: bool
    """False if these rows were left out."""
    exits: tuple[ExitRow, ...]
    overthinking: float
    policies: tuple[PolicyRow, ...]
    transcript: str | None


@dataclass(frozen=True)
class EvalSettings:
    """Options of an evaluation. Raises ValueError for features without a transcript."""

    policies: tuple[Policy, ...] = ()
    """Policies that are replayed on the outputs of the exits."""
    batch_size: int = 32
    max_length: int | None = None
    """Number of tokens to which texts are truncated; None: as in training, else the limit of the model."""
    transcript: Path | None = None
    """Folder for `store.transcript`."""
    with_features: bool = False
    """True if transcripts hold the hidden states of the first token."""
    include_training_rows: bool = False
    """True to evaluate rows that the model was trained on; False: they are left out, and many are refused."""
    trust_kernels: bool = False
    """True to run captured kernels of a store with operations outside the table of PyTorch."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.with_features and self.transcript is None:
            raise ValueError("with_features needs a transcript")


DEFAULT_SETTINGS = EvalSettings()


def evaluate(
    folder: Path, data: Splits, names: Sequence[str], settings: EvalSettings = DEFAULT_SETTINGS, *, log: Log
) -> list[SplitReport]:
    """Run every exit of a run folder or a store on the splits called `names`.

    A transcript of equal inputs that exists is read instead, so that an evaluation that was interrupted continues.

    Raises UsageError for an unknown split, for labels that the model does not have, for a split with many rows that the
    model was trained on, and where another transcript exists; SourceError for the model, NonFiniteError naming the
    exit, DiskFullError.
    """
    from offramp.checkpoints.inputs import rows_of

    chosen, digest_before = data.named(names), _digest(folder)
    facts = classifier_facts(folder)
    ids = model_label_ids(data.labels, facts.problem, facts.labels, folder, log)
    for policy in settings.policies:
        policy.check(facts.num_exits, str(facts.problem))
    max_length = settings.max_length or _usual_length(folder, facts)
    runs_singly = facts.texts is not None and facts.texts.pad_token is None
    batch_size, transcript = 1 if runs_singly else settings.batch_size, settings.transcript
    fingerprint, reports = _fingerprint(folder) if transcript else "", []
    splits = held_out(folder, chosen, settings.include_training_rows, log, fingerprint[:32])
    with _classifier(folder, settings.trust_kernels) as model:
        for split, kept in splits.items():
            log(f"{split}: {len(kept.examples)} rows")
            renamed = [Example(text, ids[int(label)] if ids else label) for text, label in kept.examples]
            about = About(
                data.name,
                split,
                str(facts.problem),
                facts.labels if data.labels else (),
                metrics_of_ids(data.metrics, ids),
                fingerprint,
                digest(renamed) if transcript else "",
                max_length,
                kept.salt,
                kept.training_rows,
                kept.includes_training_rows,
            )
            feature_size = facts.hidden_size if settings.with_features else 0
            known = transcript and find_transcript(transcript, about, feature_size)
            if known:
                log(f"{split}: already written to {known.path}")
                rows, logits_KNC, path = known, known.logits_NKC.swapaxes(0, 1), known.path
            else:
                rows = rows_of(folder, facts, renamed, max_length, not data.labels, log)
                _require_same(folder, digest_before)
                logits_KNC, path = _run(model, rows, batch_size, about, transcript, feature_size, kept.digests_N)
            where = path and path.with_suffix(".json")
            reports.append(report(about, rows.labels_N, logits_KNC, settings.policies, where, rows.lengths_N))
    return reports


def report(
    about: About,
    truth_N: np.ndarray,
    logits_KNC: np.ndarray,
    policies: Sequence[Policy],
    path: Path | None = None,
    lengths_N: np.ndarray | None = None,
) -> SplitReport:
    """Return the tables of one split, computed from the outputs of its exits [K, N, C] and the tokens of its rows."""
    answer_KN = np.stack([answers(logits_NC) for logits_NC in logits_KNC])
    if about.problem == REGRESSION:
        distance_KN = np.abs(answer_KN - truth_N)
        beats_KN, metric = distance_KN < distance_KN[-1], "pearson"
    else:
        beats_KN, metric = (answer_KN == truth_N) & (answer_KN[-1] != truth_N), "accuracy"
    overthought_K, exits, replayed = 100 * beats_KN.mean(1), [], []
    for index, scores in enumerate(score_exits(about.metrics, truth_N, logits_KNC)):
        agreement = score([metric], answer_KN[-1], answer_KN[index])["score"]
        exits.append(ExitRow(index + 1, scores, agreement, overthought_K[index]))
    for policy in policies:
        exit_N = replay(policy, logits_KNC, about.problem, lengths_N)
        scores = score(about.metrics, truth_N, answer_at(logits_KNC, exit_N))
        replayed.append(PolicyRow(str(policy), scores, float(exit_N.mean())))
    overthinking = 100 * float(beats_KN.any(0).mean())
    known = (about.training_rows, about.includes_training_rows)
    tables = (tuple(exits), overthinking, tuple(replayed))
    return SplitReport(about.split, len(truth_N), *known, *tables, path and str(path))


def answer_at(logits_KNC: np.ndarray, exit_N: np.ndarray) -> np.ndarray:
    """Return the answers [N] of rows that leave at the exits `exit_N`, which start at 1."""
    return answers(logits_KNC[exit_N - 1, np.arange(len(exit_N))])


def classifier_facts(folder: Path) -> Facts:
    """Return the inputs and outputs of a model folder or a store. Raises SourceError for one without a head."""
    from offramp.checkpoints.inputs import facts_of, facts_of_store

    if is_store(folder):
        with Store(folder, verify="never") as store:
            facts = facts_of_store(store)
    else:
        facts = facts_of(folder)
    if facts.problem is None:
        raise SourceError("the model has no classification head", folder, "offramp train gives it one")
    return facts


@contextmanager
def _classifier(folder: Path, trust_kernels: bool) -> Iterator[Any]:
    """Load a model with its exits; for a store that transformers cannot load its kernels."""
    from offramp.checkpoints.checkpoint import StoredWithExits, load_classifier

    if not is_store(folder):
        yield load_classifier(folder)
        return
    with Store(folder) as store:
        if not store.manifest.is_checkpoint:
            yield StoredWithExits(store, trust_kernels=trust_kernels)
            return
        require_whole(store)
        with folder_of_store(store) as links:
            yield load_classifier(links)


def _digest(folder: Path) -> str:
    """Return the digest of a store's manifest; "" for a model folder."""
    return hashlib.sha256(read_manifest_bytes(folder)).hexdigest() if is_store(folder) else ""


def _require_same(folder: Path, digest: str) -> None:
    if _digest(folder) != digest:
        raise StoreError("the store was replaced while it was read", folder, "run again")


def _usual_length(folder: Path, facts: Facts) -> int:
    """Return the tokens to which texts were truncated in training, else those of the tokenizer or of the model."""
    own_length = None if facts.texts is None else tokenizer_length(folder)
    return trained_length(folder) or min(own_length or facts.max_length, facts.max_length)


def _fingerprint(folder: Path) -> str:
    """Return the fingerprint of a model folder; for a store of the same weights that of its source, so that both have
    the same transcripts.
    """
    if is_store(folder):
        with Store(folder, verify="never") as store:
            return store.manifest.answering
    with open_source(folder) as source:
        return source.fingerprint()


def trained_length(folder: Path) -> int | None:
    """Return the number of tokens to which texts were truncated in training, if the folder records it."""
    found = read_training(folder)
    return None if found is None else found.max_length


def model_label_ids(
    labels: Sequence[str], problem: str | None, model_labels: Sequence[str], folder: Path, log: Log = silent
) -> list[int]:
    """Return the id in the model of each label of the data; empty for a regression. `log`: receives what is assumed.

    Raises UsageError for labels, or a kind of task, that the model does not have.
    """
    if problem == MULTI_LABEL:
        raise UsageError("the model gives several labels to a text, the data have one", folder, "score another model")
    if (problem == REGRESSION) != (not labels):
        kinds = ("a regression", "a classification")
        has, wants = kinds if problem == REGRESSION else kinds[::-1]
        raise UsageError(f"the model is {has}, the data are for {wants}", folder, "take a model of this task")
    if problem == REGRESSION and len(model_labels) > 1:
        what = f"the model gives {len(model_labels)} values to a text, the data have one"
        raise UsageError(what, folder, "score another model")
    ids, notice = label_ids(labels, model_labels), label_notice(labels, model_labels)
    if notice is not None:
        log(f"{folder}: {notice}")
    if ids is not None:
        return ids
    what = f"the model's labels are {', '.join(model_labels)}, those of the data {', '.join(labels)}"
    raise UsageError(what, folder, "take a model of this task")


def _run(
    model: Any,
    rows: AnyRows,
    batch_size: int,
    about: About,
    folder: Path | None,
    feature_size: int,
    digests_N: np.ndarray,
) -> tuple[np.ndarray, Path | None]:
    """Return the logits [K, N, C], and the path of the transcript if one is written."""
    from offramp.checkpoints.checkpoint import predict, predict_windows

    if folder is None:
        return predict(model, rows, batch_size), None
    num_exits = len(model.heads) + 1 if hasattr(model, "heads") else 1
    num_outputs = max(len(about.labels), 1)
    found_NKC = np.empty((len(rows), num_exits, num_outputs), np.float32)
    with TranscriptWriter(folder, about, len(rows), num_exits, num_outputs, feature_size) as writer:
        windows = predict_windows(model, rows, batch_size, with_features=feature_size > 0)
        for start, logits_NKC, features_NKH in windows:
            part = slice(start, start + len(logits_NKC))
            found_NKC[part] = logits_NKC
            kept = {"logits": logits_NKC, "lengths": rows.lengths_N[part], "labels": rows.labels_N[part]}
            kept["rows"] = digests_N[part]
            writer.write(start, **kept, **({} if features_NKH is None else {"features": features_NKH}))
        return found_NKC.swapaxes(0, 1), writer.finish()

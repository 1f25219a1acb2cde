"""What a model folder takes and gives: texts by its tokenizer, or images by its image processor, and which labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from offramp.checkpoints.families import FAMILIES
from offramp.checkpoints.points import Point, points_of
from offramp.checkpoints.source import open_source
from offramp.errors import SourceError
from offramp.policies.evidence import REGRESSION, SINGLE_LABEL
from offramp.program.program import TEXT_INPUTS, Texts
from offramp.runtime.course import course_of
from offramp.runtime.segments import exit_widths
from offramp.store import Encoder, Store
from offramp.store.exits import parse_exits
from offramp.store.manifest import Manifest
from offramp.streaming.weightless import class_of_folder, of_class
from offramp.tasks import TextEncoder, has_tokenizer
from offramp.tasks.arrays import Record
from offramp.tasks.images import Image
from offramp.tasks.pixels import ImageEncoder
from offramp.tasks.processors import FILE_NAME as PROCESSOR
from offramp.tasks.rows import ArrayRows, ImageRows, Rows, encode_rows
from offramp.tasks.tokenizer import tokenizer_length

CLASSIFIERS = ("ForImageClassification", "ForSequenceClassification", "ForAudioClassification")
"""How classes of transformers end whose first output are logits of a batch."""
BATCH, LENGTH = 2, 16
"""Of made-up texts."""
DEFAULT_LENGTH = 512
"""Where nothing says how many tokens a model reads."""
Examples = Iterable[tuple[Any, int | float]]
AnyRows = Rows | ImageRows | ArrayRows


@dataclass(frozen=True)
class Facts:
    """Of a classifier, or of a model that can become one."""

    problem: str | None
    """None: it has no head."""
    labels: tuple[str, ...]
    num_exits: int
    hidden_size: int
    max_length: int
    """In tokens; 1 of what has no length."""
    texts: Encoder | Texts | None = None
    """What is asked of texts; None: the model takes images."""


def takes_images(folder: Path) -> bool:
    """Whether a model folder is for images: it has an image processor and no tokenizer."""
    return (folder / PROCESSOR).is_file() and not has_tokenizer(folder)


def has_known_names(folder: Path) -> bool:
    """Whether a model folder is of texts, and of a family whose tensors offramp knows by name, so that it is never run
    to be divided. Exits stand after each layer there, else where a run tells.
    """
    if takes_images(folder):
        return False
    with open_source(folder) as source:
        return source.config.get("model_type") in FAMILIES


def facts_of(folder: Path) -> Facts:
    """Of a model folder. Raises SourceError for one that can have no exits."""
    if has_known_names(folder):
        with open_source(folder) as source:
            encoder = source.encoder()
        sizes = (encoder.num_layers, encoder.hidden_size, encoder.max_length)
        return Facts(encoder.problem, encoder.labels, *sizes, encoder)
    with open_source(folder) as source:
        exits = source.exits()
    module = of_class(class_of_folder(folder), folder)
    texts = None if takes_images(folder) else read_texts(module, folder)
    problem, labels = task_of(module)
    if exits is not None:
        widths = [width for *_, width in parse_exits(exits[1].read_bytes(), folder, SourceError).points]
    else:
        widths = [width for _, width in points_of_folder(module, folder)]
    length = 1 if texts is None else texts.max_length
    return Facts(problem, labels, len(widths) + 1, max(widths, default=1), length, texts)


def facts_of_store(store: Store) -> Facts:
    """Of a store whose stages are graphs, whatever is in it."""
    if isinstance(store.contents, Manifest):
        return facts_of(store.path)
    course = course_of(store)
    widths = exit_widths(store.module.program)
    num_exits = len(course.layers) if store.contents.exits else 1
    length = 1 if course.texts is None else course.texts.max_length
    return Facts(course.problem, course.labels, num_exits, max(widths, default=1), length, course.texts)


def points_of_folder(module: nn.Module, folder: Path) -> list[Point]:
    """Where exits can stand in a model of a folder that is for images or for texts."""
    if takes_images(folder):
        return points_of(module, example_pixels(folder))
    return points_of(module, example_texts(module, read_texts(module, folder)), of_texts=True)


def rows_of(
    folder: Path, facts: Facts, examples: Examples, max_length: int, is_regression: bool, say: Callable[[str], None]
) -> AnyRows:
    """One row an example, in order: texts as tokens, images by where they are."""
    if facts.texts is not None:
        text_encoder = TextEncoder.from_folder(folder, facts.texts, max_length, say)
        return encode_rows(examples, text_encoder, facts.texts, is_regression=is_regression)
    pairs = list(examples)
    labels_N = np.array([label for _, label in pairs], np.float32 if is_regression else np.int64)
    if pairs and all(isinstance(item, Record) for item, _ in pairs):
        return ArrayRows([item for item, _ in pairs], labels_N)
    foreign = next((item for item, _ in pairs if not isinstance(item, Image)), None)
    if foreign is not None:
        raise SourceError("the model takes images, the data are texts", folder, "give a folder or a zip of images")
    return ImageRows([item for item, _ in pairs], labels_N, ImageEncoder.from_folder(folder))


def task_of(module: nn.Module) -> tuple[str | None, tuple[str, ...]]:
    """Problem and labels of a classifier of transformers; None and none of any other module."""
    config: Any = getattr(module, "config", None)
    if not getattr(config, "id2label", None) or not type(module).__name__.endswith(CLASSIFIERS):
        return None, ()
    labels = tuple(str(config.id2label[index]) for index in sorted(config.id2label))
    problem = getattr(config, "problem_type", None) or (REGRESSION if len(labels) == 1 else SINGLE_LABEL)
    return str(problem), labels


def example_pixels(folder: Path) -> dict[str, torch.Tensor]:
    """Two images of random pixels, of the size that the folder's image processor makes. Raises SourceError."""
    shape = ImageEncoder.from_folder(folder).shape
    if shape is None:
        what = "the image processor keeps the shape of an image, so that a batch has none"
        raise SourceError(what, folder / PROCESSOR, "resize to height and width, or crop")
    return {"pixel_values": torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))}


def texts_of(module: nn.Module, folder: Path) -> Texts | None:
    """What a classifier in a folder with a tokenizer asks of texts; None where it is none."""
    is_classifier = task_of(module)[0] is not None and not takes_images(folder) and has_tokenizer(folder)
    return read_texts(module, folder) if is_classifier and TEXT_INPUTS[0] in _taken(module) else None


def read_texts(module: nn.Module, folder: Path) -> Texts:
    """What a model of transformers asks of texts, by its config and its tokenizer's. Raises SourceError for one that
    reads no tokens.
    """
    config: Any = module.config
    vocab_size = getattr(config, "vocab_size", None)
    if not isinstance(vocab_size, int) or TEXT_INPUTS[0] not in _taken(module):
        raise SourceError(f"a {type(module).__name__} reads neither texts nor images", folder, "take another model")
    if not isinstance(getattr(config, "pad_token_id", None), int):
        remedy = "set pad_token_id in config.json to that of its tokenizer"
        raise SourceError("the config names no token for padding, so that texts make no batch", folder, remedy)
    types = int(getattr(config, "type_vocab_size", 0) or 0) if TEXT_INPUTS[2] in _taken(module) else 0
    return Texts(vocab_size, _longest(module, folder), types, config.pad_token_id)


def _longest(module: nn.Module, folder: Path) -> int:
    """Tokens that a model reads: rows of its table of positions that stand for one, and what its tokenizer says."""
    config: Any = module.config
    rows = getattr(config, "max_position_embeddings", None)
    limits = [rows, tokenizer_length(folder)]
    if isinstance(rows, int):
        tables = [part for part in module.modules() if isinstance(part, nn.Embedding) and part.num_embeddings == rows]
        # positions that begin behind that of padding
        limits += [rows - table.padding_idx - 1 for table in tables if table.padding_idx is not None]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=DEFAULT_LENGTH)


def example_texts(module: nn.Module, texts: Texts) -> dict[str, Any]:
    """Two texts of random tokens, one of them padded, as the module's `forward` takes them."""
    ids = torch.randint(3, max(texts.vocab_size, 4), (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    types = (torch.arange(LENGTH) >= LENGTH // 2).long().expand(BATCH, -1).contiguous()
    made = dict(zip(TEXT_INPUTS, (ids, padded(ids), types), strict=True))
    wanted = TEXT_INPUTS if texts.num_token_types > 1 else TEXT_INPUTS[:2]
    taken = _taken(module)
    return {name: made[name] for name in wanted if name in taken} | (
        {"use_cache": False} if "use_cache" in taken else {}
    )


def padded(ids: torch.Tensor) -> torch.Tensor:
    """A mask with padding at the end of the last row, so that a run goes the way of padded texts."""
    mask = torch.ones_like(ids)
    mask[-1, -LENGTH // 4 :] = 0
    return mask


def _taken(module: nn.Module) -> Collection[str]:
    return inspect.signature(module.forward).parameters.keys()

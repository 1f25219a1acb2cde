"""What a model folder takes and gives: texts by its tokenizer, or images by its image processor, and which labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from offramp.division import open_source
from offramp.errors import SourceError
from offramp.models.points import points_of
from offramp.models.weightless import class_of_folder, of_class
from offramp.policies.evidence import REGRESSION, SINGLE_LABEL
from offramp.store import Encoder
from offramp.store.exits import parse_exits
from offramp.tasks import TextEncoder, has_tokenizer
from offramp.tasks.image_rows import ImageRows
from offramp.tasks.images import Image
from offramp.tasks.pixels import ImageEncoder
from offramp.tasks.processors import FILE_NAME as PROCESSOR
from offramp.tasks.rows import Rows, encode_rows

CLASSIFIERS = ("ForImageClassification", "ForSequenceClassification", "ForAudioClassification")
"""How classes of transformers end whose first output are logits of a batch."""
Examples = Iterable[tuple[Any, int | float]]
AnyRows = Rows | ImageRows


@dataclass(frozen=True)
class Facts:
    """Of a classifier, or of a model that can become one."""

    problem: str | None
    """None: it has no head."""
    labels: tuple[str, ...]
    num_exits: int
    hidden_size: int
    max_length: int
    """In tokens; 1 of images."""
    encoder: Encoder | None = None
    """Of texts."""


def takes_images(folder: Path) -> bool:
    """Whether a model folder is for images: it has an image processor and no tokenizer."""
    return (folder / PROCESSOR).is_file() and not has_tokenizer(folder)


def facts_of(folder: Path) -> Facts:
    """Of a model folder. Raises SourceError for one that can have no exits."""
    if takes_images(folder):
        return _of_images(folder)
    with open_source(folder) as source:
        encoder = source.encoder()
    sizes = (encoder.num_layers, encoder.hidden_size, encoder.max_length)
    return Facts(encoder.problem, encoder.labels, *sizes, encoder)


def rows_of(
    folder: Path, facts: Facts, examples: Examples, max_length: int, is_regression: bool, say: Callable[[str], None]
) -> AnyRows:
    """One row an example, in order: texts as tokens, images by where they are."""
    if facts.encoder is not None:
        text_encoder = TextEncoder.from_folder(folder, facts.encoder, max_length, say)
        return encode_rows(examples, text_encoder, facts.encoder, is_regression=is_regression)
    pairs = list(examples)
    foreign = next((item for item, _ in pairs if not isinstance(item, Image)), None)
    if foreign is not None:
        raise SourceError("the model takes images, the data are texts", folder, "give a folder or a zip of images")
    labels_N = np.array([label for _, label in pairs], np.float32 if is_regression else np.int64)
    return ImageRows([item for item, _ in pairs], labels_N, ImageEncoder.from_folder(folder))


def _of_images(folder: Path) -> Facts:
    with open_source(folder) as source:
        exits = source.exits()
    module = of_class(class_of_folder(folder), folder)
    problem, labels = task_of(module)
    if exits is not None:
        points = [width for *_, width in parse_exits(exits[1].read_bytes(), folder, SourceError).points]
    else:
        points = [width for _, width in points_of(module, example_pixels(folder))]
    return Facts(problem, labels, len(points) + 1, max(points, default=1), 1)


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

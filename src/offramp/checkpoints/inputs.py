"""Facts about the classifier in a model folder or a store: its inputs, labels and exits; and examples of its inputs."""

import inspect
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from offramp.checkpoints.config import labels_by_id, problem_of
from offramp.checkpoints.exits import Point, points_of
from offramp.checkpoints.source import PROCESSOR, folder_of_store, open_source
from offramp.checkpoints.tokenizing import num_token_types, open_text_encoder
from offramp.checkpoints.weights import read_small
from offramp.errors import SourceError, StoreError
from offramp.program.program import TEXT_INPUTS, Texts
from offramp.runtime.exits import exit_widths
from offramp.store import Store
from offramp.store.exits import parse_exits
from offramp.store.manifest import MAX_EXITS_BYTES
from offramp.streaming.weightless import class_of_folder, of_class
from offramp.tasks import has_tokenizer
from offramp.tasks.arrays import Record
from offramp.tasks.images import Image
from offramp.tasks.model_files import files_of
from offramp.tasks.pixels import ImageEncoder
from offramp.tasks.rows import ArrayRows, ImageRows, Rows, encode_rows
from offramp.tasks.tokenizer import has_vocabulary, tokenizer_length

CLASSIFIERS = ("ForImageClassification", "ForSequenceClassification", "ForAudioClassification")
"""Suffixes of transformers classes whose first output is the logits of a batch."""
BATCH, LENGTH = 2, 16
"""Shape of example texts: rows, tokens."""
PLAIN_OUTPUT = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""Keys of a config that decide in which form a model returns its logits, and what beside them; the values that this
room reads. With `output_attentions`, transformers cannot save most models."""
NO_TOKEN = -1
"""Id that no token has."""
DEFAULT_LENGTH = 512
"""Longest input in tokens of a model that names no limit."""
Examples = Iterable[tuple[Any, int | float]]
AnyRows = Rows | ImageRows | ArrayRows


@dataclass(frozen=True)
class Facts:
    """Facts about a classifier, or about a model that can become one."""

    problem: str | None
    """None if the model has no head."""
    labels: tuple[str, ...]
    num_exits: int
    hidden_size: int
    max_length: int
    """Longest input in tokens; 1 for inputs without a length."""
    texts: Texts | None = None
    """Requirements for texts; None if the model takes images."""


def takes_images(folder: Path) -> bool:
    """Return whether a model folder is for images: it has an image processor and no tokenizer."""
    files = files_of(folder)
    return files.has(PROCESSOR) and not has_tokenizer(files)


def has_known_names(folder: Path) -> bool:
    """Return whether a model folder is for texts and of a family whose tensors offramp knows by name.

    Such a model is divided without being run, and an exit can stand after each layer. For others a run finds places.
    """
    if takes_images(folder):
        return False
    with open_source(folder) as source:
        return source.misfit() is None


def facts_of(folder: Path) -> Facts:
    """Return the facts about a model folder. Raises SourceError for a model that can have no exits."""
    if has_known_names(folder):
        with open_source(folder) as source:
            encoder = source.encoder()
        sizes = (encoder.num_layers, encoder.hidden_size, encoder.max_length)
        return Facts(encoder.problem, encoder.labels, *sizes, encoder.texts)
    with open_source(folder) as source:
        exits = source.exits()
    module = set_to_answer(of_class(class_of_folder(folder), folder))
    texts = None if takes_images(folder) else read_texts(module, folder)
    if exits is not None:
        widths = [width for *_, width in parse_exits(read_small(exits[1], MAX_EXITS_BYTES), folder, SourceError).points]
    else:
        widths = [width for _, width in points_of_folder(module, folder)]
    length = 1 if texts is None else texts.max_length
    return Facts(*task_of(module), len(widths) + 1, max(widths, default=1), length, texts)


def facts_of_store(store: Store) -> Facts:
    """Return the facts about a store. Raises StoreError for one that only `offramp.stream` can run."""
    program = store.program
    if store.manifest.is_checkpoint:
        for file in store.manifest.files:
            store.read_file(file)  # verified before a library reads it
        with folder_of_store(store) as folder:
            return facts_of(folder)
    if not program.stages:
        remedy = "divide with --method export, or run it with offramp.stream"
        raise StoreError("the stages of this store are no graphs of their own", store.path, remedy)
    width = max(exit_widths(program), default=1)
    num_exits = len(program.layers) if store.manifest.exits else 1
    length = 1 if program.texts is None else program.texts.max_length
    return Facts(program.problem, store.labels, num_exits, width, length, program.texts)


def points_of_folder(module: nn.Module, folder: Path) -> list[Point]:
    """Return the places for exits in the model of a folder for images or for texts."""
    if takes_images(folder):
        return points_of(module, example_pixels(folder))
    return points_of(module, example_texts(module, read_texts(module, folder)), of_texts=True)


def rows_of(
    folder: Path, facts: Facts, examples: Examples, max_length: int, is_regression: bool, say: Callable[[str], None]
) -> AnyRows:
    """Return one row for each example, in order: texts as tokens, images by their places."""
    if facts.texts is not None:
        text_encoder = open_text_encoder(folder, facts.texts, max_length, say)
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
    """Return problem and labels of a transformers classifier; (None, ()) for any other module.

    Raises SourceError for an output without a label.
    """
    config: Any = getattr(module, "config", None)
    if not getattr(config, "id2label", None) or not type(module).__name__.endswith(CLASSIFIERS):
        return None, ()
    labels = labels_by_id(config.id2label)
    return problem_of(getattr(config, "problem_type", None), len(labels)), labels


def example_pixels(folder: Path) -> dict[str, torch.Tensor]:
    """Return two images of random pixels of the size that the folder's image processor makes. Raises SourceError."""
    shape = ImageEncoder.from_folder(folder).shape
    if shape is None:
        what = "the image processor keeps the shape of an image, so that a batch has none"
        raise SourceError(what, folder / PROCESSOR, "resize to height and width, or crop")
    return {"pixel_values": torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))}


def texts_of(module: nn.Module, folder: Path) -> Texts | None:
    """Return what a classifier in a folder with a tokenizer requires of texts, or None for any other model."""
    is_classifier = task_of(module)[0] is not None and not takes_images(folder) and has_vocabulary(folder)
    return read_texts(module, folder) if is_classifier and TEXT_INPUTS[0] in taken_by(module) else None


def read_texts(module: nn.Module, folder: Path) -> Texts:
    """Return what a transformers model requires of texts, from its config and its tokenizer.

    Raises SourceError for a model that reads no tokens.
    """
    config: Any = module.config
    vocab_size, pad_token = getattr(config, "vocab_size", None), getattr(config, "pad_token_id", None)
    if not isinstance(vocab_size, int) or TEXT_INPUTS[0] not in taken_by(module):
        if "pixel_values" in taken_by(module) and not (folder / PROCESSOR).is_file():
            raise SourceError(f"no image processor (looked for {PROCESSOR})", folder, "copy the file there")
        raise SourceError(f"a {type(module).__name__} reads neither texts nor images", folder, "take another model")
    has_padding = isinstance(pad_token, int) and 0 <= pad_token < vocab_size
    if getattr(config, "summary_type", None) == "last":  # XLNet: of a padded text, the answer would be of its padding
        has_padding = False
    return Texts(vocab_size, _longest(module, folder), _num_types(module, folder), pad_token if has_padding else None)


def _num_types(module: nn.Module, folder: Path) -> int:
    """Return how many token types a model takes from its tokenizer.

    Where its config gives no number, it is that of the tokenizer: XLNet tells two texts apart by them, and GPT-2 adds
    rows of its table of words for them, so that no types and types of 0 have different answers.
    """
    config: Any = module.config
    if TEXT_INPUTS[2] not in taken_by(module):
        return 0
    if hasattr(config, "type_vocab_size"):
        return int(config.type_vocab_size or 0)
    return num_token_types(folder)


def set_to_answer(module: nn.Module) -> nn.Module:
    """Return a module of transformers after its config was set: a classifier gives its logits first, for several rows.

    Where the config names no token for padding, classifiers of decoders refuse several rows. With NO_TOKEN they take
    the last token of each row, as they do of one.
    """
    config: Any = getattr(module, "config", None)
    if task_of(module)[0] is not None:
        for key, value in PLAIN_OUTPUT.items():
            setattr(config, key, value)
    if getattr(config, "pad_token_id", NO_TOKEN) is None:
        config.pad_token_id = NO_TOKEN
    return module


def _longest(module: nn.Module, folder: Path) -> int:
    """Return the longest input in tokens: rows of the position table, and the limit of the tokenizer."""
    config: Any = module.config
    rows = getattr(config, "max_position_embeddings", None)
    limits = [rows, tokenizer_length(folder)]
    if isinstance(rows, int):
        tables = [part for part in module.modules() if isinstance(part, nn.Embedding) and part.num_embeddings == rows]
        # positions that begin behind that of padding
        limits += [rows - table.padding_idx - 1 for table in tables if table.padding_idx is not None]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=DEFAULT_LENGTH)


def example_texts(module: nn.Module, texts: Texts) -> dict[str, Any]:
    """Return two texts of random tokens, one of them padded, as arguments of the module's `forward`."""
    ids = example_ids(module.config, texts.vocab_size, torch.Generator().manual_seed(0))
    types = (torch.arange(LENGTH) >= LENGTH // 2).long().expand(BATCH, -1).contiguous()
    made = dict(zip(TEXT_INPUTS, (ids, padded(ids), types), strict=True)) | {"use_cache": False}
    unwanted = () if texts.num_token_types > 1 else TEXT_INPUTS[2:]
    return {name: value for name, value in made.items() if name in taken_by(module) and name not in unwanted}


def example_ids(config: Any, vocab_size: int, generator: torch.Generator) -> torch.Tensor:
    """Return random tokens of two texts. Those of an encoder with a decoder end as texts do: classifiers of the kind of
    BART read the state of the token that ends a text, and refuse rows with different numbers of it.
    """
    ids = torch.randint(3, max(vocab_size, 4), (BATCH, LENGTH), generator=generator)
    end = getattr(config, "eos_token_id", None)
    if getattr(config, "is_encoder_decoder", False) and isinstance(end, int) and 0 <= end < vocab_size:
        ids[ids == end] = 2 if end != 2 else 3
        ids[torch.arange(BATCH), padded(ids).sum(1) - 1] = end
    return ids


def padded(ids: torch.Tensor) -> torch.Tensor:
    """Return a mask with padding at the end of the last row, so that a run takes the code path of padded texts."""
    mask = torch.ones_like(ids)
    mask[-1, -LENGTH // 4 :] = 0
    return mask


def taken_by(module: nn.Module) -> Collection[str]:
    """Return the names of the arguments of a module's `forward`."""
    return inspect.signature(module.forward).parameters.keys()

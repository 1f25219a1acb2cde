"""A model folder: its config, its tensors a few megabytes at a time, and its companion files.

The folder is only read. Links are followed, since the cache of the hub consists of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from offramp.checkpoints.families import family_of
from offramp.checkpoints.pickled import PickledWeights
from offramp.checkpoints.weights import SafetensorsWeights, Weights, open_file, read_index, read_json
from offramp.errors import SourceError
from offramp.program.encoder import Encoder
from offramp.store.files import sha256_of

CONFIG = "config.json"
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
EXITS = ("exits.safetensors", "exits.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
)
PROCESSOR = "preprocessor_config.json"
TRAINING = "train.json"
"""File that describes the training in a run folder; a store keeps it."""
CHUNK_BYTES = 8 << 20


class Source:
    """An open model folder; a context manager."""

    def __init__(self, folder: Path, config: dict[str, Any], weights: Weights) -> None:
        self.folder, self.config, self._weights = folder, config, weights

    @property
    def entries(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Tensor name -> (dtype in safetensors, shape)."""
        return self._weights.entries

    def entry(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return dtype and shape of one tensor."""
        return self.entries[name]

    def chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes | memoryview]:
        """Yield the data of one tensor, little-endian and row by row, in pieces of whole items.

        A piece has at most half of `chunk_bytes`, so that no more than `chunk_bytes` are held while the caller still
        has the piece before. Raises ValueError below 16 bytes, SourceError if the file has become shorter.
        """
        if chunk_bytes < 16:
            raise ValueError(f"chunk_bytes must be at least 16, not {chunk_bytes}")
        return self._weights.pieces(name, chunk_bytes // 16 * 8)

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Read the data of one tensor into a buffer of its size. Raises SourceError if the file has become shorter."""
        self._weights.read_into(name, buffer)

    def companions(self) -> list[Path]:
        """Return the present files of the tokenizer, the image processor, and the training of a run folder."""
        return _present(self.folder, (*TOKENIZER, PROCESSOR, TRAINING))

    def exits(self) -> tuple[Path, Path] | None:
        """Return `exits.safetensors` and `exits.json`, or None. Raises SourceError if only one of them exists."""
        found = _present(self.folder, EXITS)
        if len(found) == 1:
            missing = next(name for name in EXITS if name != found[0].name)
            raise SourceError(
                f"exits without {missing}", self.folder, "get the whole run folder again, or remove the other"
            )
        return (found[0], found[1]) if found else None

    def encoder(self) -> Encoder:
        """Return the sizes and settings of the model. Raises SourceError for a config that offramp cannot run."""
        return family_of(self.config).encoder(self.config)

    def fingerprint(self) -> str:
        """Return the sha256 of everything that a division reads. Equal files have equal fingerprints in any folder.

        Reads every file once, 1 MiB at a time.
        """
        digest = hashlib.sha256()
        files = [self.folder / CONFIG, *self._weights.files, *self.companions(), *(self.exits() or ())]
        for path in sorted(files, key=lambda path: path.name):
            digest.update(json.dumps([path.name, *_size_and_sha256(path)]).encode() + b"\n")
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files."""
        self._weights.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_source(folder: Path) -> Source:
    """Open a model folder: `config.json`, and weights as safetensors, else as pickle; one file, else several by index.

    Raises SourceError saying what is missing or damaged, PickleError, and MissingExtraError for a pickle without torch.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SourceError("no such folder", folder, "give a folder with config.json and weights")
    if not (folder / CONFIG).is_file():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        remedy = (
            f"name one of its folders: {', '.join(inner)}" if inner else "give a folder with config.json and weights"
        )
        raise SourceError(f"not a model folder: no {CONFIG}", folder, remedy)
    return Source(folder, read_json(folder / CONFIG), _open_weights(folder))


def _open_weights(folder: Path) -> Weights:
    if (folder / SAFETENSORS).is_file():
        return SafetensorsWeights({folder / SAFETENSORS: None})
    if (folder / SAFETENSORS_INDEX).is_file():
        return SafetensorsWeights(read_index(folder / SAFETENSORS_INDEX, ".safetensors"), folder / SAFETENSORS_INDEX)
    if (folder / PICKLE).is_file():
        return PickledWeights({folder / PICKLE: None})
    if (folder / PICKLE_INDEX).is_file():
        return PickledWeights(read_index(folder / PICKLE_INDEX, ".bin"), folder / PICKLE_INDEX)
    raise SourceError(
        f"not a model folder: no {SAFETENSORS}, no {PICKLE}, and no index of either",
        folder,
        "save the model as safetensors",
    )


def _present(folder: Path, names: Iterable[str]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def _size_and_sha256(path: Path) -> tuple[int, str]:
    fd = open_file(path)
    try:
        return os.fstat(fd).st_size, sha256_of(fd)
    finally:
        os.close(fd)

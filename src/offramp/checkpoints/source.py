"""A model folder: its config, its tensors a few megabytes at a time, and its companion files.

The folder is only read. Links are followed, since the cache of the hub consists of them.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from offramp.checkpoints.families import family_of
from offramp.checkpoints.weights import Owned, SafetensorsWeights, Weights, open_file, read_index, read_json
from offramp.errors import MissingExtraError, SourceError
from offramp.program.encoder import Encoder
from offramp.store.files import sha256_of

CONFIG = "config.json"
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
"""Suffix of the index of several files, after the name of a single one."""
EXITS = ("exits.safetensors", "exits.json")
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "bpe.codes"),
    *("sentencepiece.bpe.model", "spiece.model", "spm.model", "tokenizer.model"),
)
PROCESSOR = "preprocessor_config.json"
TRAINING = "train.json"
"""File that describes the training in a run folder; a store keeps it."""
CHUNK_BYTES = 8 << 20
WANTED = "give a folder with config.json and weights"
"""Remedy for a path that is no model folder."""


class Source(AbstractContextManager):
    """An open model folder; a context manager."""

    def __init__(self, folder: Path, config: dict[str, Any], weights: Weights, files: Iterable[Path]) -> None:
        """`files`: those that the weights are in."""
        self.folder, self.config, self._weights, self._files = folder, config, weights, files
        self.entries = weights.entries
        """Tensor name -> (dtype in safetensors, shape)."""

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
        done = 0
        for piece in self._weights.pieces(name, CHUNK_BYTES // 4):
            buffer[done : done + len(piece)] = piece
            done += len(piece)

    def companions(self) -> list[Path]:
        """Return the present files of the tokenizer, the image processor, and the training of a run folder."""
        return _present(self.folder, (*TOKENIZER, PROCESSOR, TRAINING))

    def exits(self) -> tuple[Path, Path] | None:
        """Return `exits.safetensors` and `exits.json`, or None. Raises SourceError if only one of them exists."""
        found = _present(self.folder, EXITS)
        if len(found) == 1:
            (missing,) = set(EXITS) - {found[0].name}
            what, remedy = f"exits without {missing}", "get the whole run folder again, or remove the other"
            raise SourceError(what, self.folder, remedy)
        return (found[0], found[1]) if found else None

    def encoder(self) -> Encoder:
        """Return the sizes and settings of the model. Raises SourceError for a config that offramp cannot run."""
        return family_of(self.config).encoder(self.config)

    def fingerprint(self) -> str:
        """Return the sha256 of everything that a division reads. Equal files have equal fingerprints in any folder.

        Reads every file once, 1 MiB at a time.
        """
        digest = hashlib.sha256()
        files = [self.folder / CONFIG, *self._files, *self.companions(), *(self.exits() or ())]
        for path in sorted(files, key=lambda path: path.name):
            with os.fdopen(open_file(path), "rb") as file:
                facts = [path.name, os.fstat(file.fileno()).st_size, sha256_of(file.fileno())]
            digest.update(json.dumps(facts).encode() + b"\n")
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files."""
        self._weights.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def open_source(folder: Path) -> Source:
    """Open a model folder: `config.json`, and weights as safetensors, else as pickle; one file, else several by index.

    Raises SourceError saying what is missing or damaged, PickleError, and MissingExtraError for a pickle without torch.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SourceError("no such folder", folder, WANTED)
    if not (folder / CONFIG).is_file():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        remedy = f"name one of its folders: {', '.join(inner)}" if inner else WANTED
        raise SourceError(f"not a model folder: no {CONFIG}", folder, remedy)
    config = read_json(folder / CONFIG)
    for name, open_weights in ((SAFETENSORS, SafetensorsWeights), (PICKLE, _open_pickles)):
        file, index = folder / name, folder / (name + INDEX)
        if file.is_file():
            return Source(folder, config, open_weights({file: None}), [file])
        if index.is_file():
            owned = read_index(index, file.suffix)
            return Source(folder, config, open_weights(owned), [*owned, index])
    what = f"not a model folder: no {SAFETENSORS}, no {PICKLE}, and no index of either"
    raise SourceError(what, folder, "save the model as safetensors")


def _open_pickles(files: Owned) -> Weights:
    try:
        from offramp.checkpoints.pickled import PickledWeights
    except ImportError:
        raise MissingExtraError("torch", "torch") from None
    return PickledWeights(files)


def _present(folder: Path, names: Iterable[str]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]

"""A model folder: its config, its tensors a few megabytes at a time, and its companion files.

The folder is only read. Links are followed, since the cache of the hub consists of them.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offramp.checkpoints.config import MEANING, check_config
from offramp.checkpoints.families import FAMILIES, family_of, shown
from offramp.checkpoints.files import CONFIG, INDEX, PICKLE, SAFETENSORS, inner_models, without_weights
from offramp.checkpoints.weights import Rows, SafetensorsWeights, Weights, open_file, read_index, read_json
from offramp.errors import SourceError, UsageError, import_error, require_folder
from offramp.program.checks import POSITIVE, read_used, strict_json
from offramp.program.encoder import Encoder
from offramp.store import Store
from offramp.store import manifest as m
from offramp.store.files import sha256_of
from offramp.store.reader import is_store
from offramp.store.scratch import scratch_folder
from offramp.store.trained_rows import FILE_NAME as TRAINED_ROWS
from offramp.tasks.model_files import MAX_OBJECT_BYTES, files_of

EXITS = ("exits.safetensors", "exits.json")
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "bpe.codes"),
    *("sentencepiece.bpe.model", "spiece.model", "spm.model", "tokenizer.model"),
)
PROCESSOR = "preprocessor_config.json"
ADAPTER = "adapter_config.json"
"""Description of an adapter of peft, whose weights transformers adds to those of the model if peft is installed."""
TRAINING = "train.json"
"""File that describes the training in a run folder; a store keeps it."""
COMPANIONS = (*TOKENIZER, PROCESSOR, TRAINING, TRAINED_ROWS)
"""Files that a store keeps as they are."""
MAKER = "offramp"
"""Key of `quantization_config` in the stores of offramp, in place of a method that transformers knows."""
CHUNK_BYTES = 8 << 20
WANTED = "give a folder with config.json and weights"
"""Remedy for a path that is no model folder."""


@dataclass(frozen=True)
class Training:
    """The keys of `train.json` that others than the training itself use."""

    labels: tuple[str, ...] | None = None
    max_length: int | None = field(default=None, metadata=POSITIVE)
    """Number of tokens to which texts were truncated."""
    data: dict[str, Any] | None = None
    """Description of the data, see `experiments.held_out`."""


def read_training(folder: Path) -> Training | None:
    """Return what `train.json` of a run folder or a store says, or None if there is none. Raises SourceError."""
    files = files_of(folder)
    if not files.has(TRAINING):
        return None
    try:
        return read_used(Training, strict_json(files.read(TRAINING, MAX_OBJECT_BYTES)))
    except ValueError as wrong:
        raise SourceError(
            f"{TRAINING}: {wrong}", folder / TRAINING, "get the folder again, or remove the file"
        ) from None


class Source(AbstractContextManager):
    """An open model folder; a context manager."""

    def __init__(self, folder: Path, config: dict[str, Any], weights: Weights, files: Iterable[Path]) -> None:
        """`files`: those that the weights are in."""
        self.folder, self._weights, self._files = folder, weights, files
        self.config = _with_architecture(config, weights.entries)
        """Content of config.json, with the class that the tensors tell where a known family's config names none."""
        self.entries = weights.entries
        """Tensor name -> (dtype in safetensors, shape)."""

    def chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES, rows: Rows = None) -> Iterator[bytes | memoryview]:
        """Yield the data of one tensor, or of some of its rows, little-endian and row by row, in pieces of whole items.

        A piece has at most half of `chunk_bytes`, so that no more than `chunk_bytes` are held while the caller still
        has the piece before. Raises ValueError below 16 bytes, SourceError if the file has become shorter.
        """
        if chunk_bytes < 16:
            raise ValueError(f"chunk_bytes must be at least 16, not {chunk_bytes}")
        return self._weights.pieces(name, chunk_bytes // 16 * 8, rows)

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Read the data of one tensor into a buffer of its size. Raises SourceError if the file has become shorter."""
        done = 0
        for piece in self._weights.pieces(name, CHUNK_BYTES // 4):
            buffer[done : done + len(piece)] = piece
            done += len(piece)

    def companions(self) -> list[Path]:
        """Return the present files of the tokenizer, the image processor, and the training of a run folder."""
        return _present(self.folder, COMPANIONS)

    def exits(self) -> tuple[Path, Path] | None:
        """Return `exits.safetensors` and `exits.json`, or None. Raises SourceError if only one of them exists."""
        found = _present(self.folder, EXITS)
        if len(found) == 1:
            (missing,) = set(EXITS) - {found[0].name}
            what, remedy = f"exits without {missing}", "get the whole run folder again, or remove the other"
            raise SourceError(what, self.folder, remedy)
        return (found[0], found[1]) if found else None

    @property
    def dtype(self) -> str:
        """Name in PyTorch of the dtype that the config gives to the weights."""
        return str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32")

    def config_in_float32(self, **more: Any) -> bytes:
        """Return config.json with F32 as the dtype of the weights: transformers would convert them back.

        `more`: further keys.
        """
        config = {**self.config, **more, **{key: "float32" for key in ("torch_dtype", "dtype") if key in self.config}}
        return (json.dumps(config, indent=2) + "\n").encode()

    def require_unquantised(self) -> None:
        """Raise SourceError for a config with a method of quantisation, which names what the weights stand for."""
        settings = self.config.get("quantization_config")
        if settings is not None:
            method = settings.get("quant_method", settings.get(MAKER)) if isinstance(settings, dict) else settings
            what = f"the weights are quantised ({shown(method or 'quantization_config')})"
            raise SourceError(what, self.folder, "divide the model that was quantised")

    def misfit(self) -> SourceError | None:
        """Return why offramp cannot run the model by the names of its tensors, as far as config.json tells, or None.

        Raises SourceError for a value that is refused in a run, too.
        """
        try:
            self.encoder()
        except SourceError as error:
            if error.what.startswith(MEANING):
                raise
            return error
        return None

    def encoder(self) -> Encoder:
        """Return the sizes and settings of the model. Raises SourceError for a config that offramp cannot run."""
        return family_of(self.config).encoder(self.config)

    def fingerprint(self) -> str:
        """Return the sha256 of everything that a division reads. Equal files have equal fingerprints in any folder.

        Reads every file once, 1 MiB at a time.
        """
        digest = hashlib.sha256()
        files = [self.folder / CONFIG, *self._files, *self.companions(), *(self.exits() or ())]
        for name, path in sorted((path.relative_to(self.folder).as_posix(), path) for path in files):
            with os.fdopen(open_file(path), "rb") as file:
                facts = [name, os.fstat(file.fileno()).st_size, sha256_of(file.fileno())]
            digest.update(json.dumps(facts).encode() + b"\n")
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files."""
        self._weights.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def open_source(folder: Path) -> Source:
    """Open a model folder: `config.json`, and weights as safetensors, else as pickle; one file, else several by index.

    Raises UsageError for a path without a model folder, SourceError saying what is missing or damaged, PickleError, and
    MissingExtraError for a pickle without torch.
    """
    require_folder(folder, "folder", WANTED)
    folder = Path(folder)
    require_files(folder)
    _refuse_adapter(folder)
    if not (folder / CONFIG).is_file():
        inner = inner_models(folder)
        remedy = f"name one of its folders: {', '.join(inner)}" if inner else WANTED
        raise UsageError(f"not a model folder: no {CONFIG}", folder, remedy)
    config = read_json(folder / CONFIG)
    check_config(config, folder / CONFIG)
    for path in _present(folder, (*COMPANIONS, *EXITS)):
        os.close(open_file(path))  # libraries read most of them, and would call a pointer damaged
    named = config.get("transformers_weights")
    if named not in (None, SAFETENSORS):  # which transformers reads instead
        what = f"transformers_weights in {CONFIG} names {shown(named)} as the file of the weights"
        raise SourceError(what, folder, f"rename that file to {SAFETENSORS}, and remove the key")
    for name, open_weights in ((SAFETENSORS, SafetensorsWeights), (PICKLE, _open_pickles)):
        file, index = folder / name, folder / (name + INDEX)
        if file.is_file():
            return Source(folder, config, open_weights([file]), [file])
        if index.is_file():
            files = read_index(index, file.suffix)
            return Source(folder, config, open_weights(files), [*files, index])
    if is_store(folder):
        what = "a store that is no checkpoint: its matrices are integers, or cut into blocks"
        raise SourceError(what, folder, "give the model folder, or the fp32 store, that it was divided from")
    raise without_weights(folder)


@contextmanager
def folder_of_store(store: Store) -> Iterator[Path]:
    """Yield a temporary folder with links to the files that an open store lists, as a model folder.

    transformers would read other files that lie beside them, and those of another store that takes its place.
    """
    place = f"/proc/self/fd/{store.folder.fd}"
    with scratch_folder("offramp-links-") as folder:
        for file in m.all_files(store.manifest):
            if "/" not in file.file:
                (folder / file.file).symlink_to(f"{place}/{file.file}")
        yield folder


def _with_architecture(config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the config with the class of a classifier, where its family is known and the tensors have its head, but
    the config names no class, or that of the model that was trained on, without whose own head the tensors are.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or not family.holds_head(names) or not family.may_be_stale(config.get("architectures"), names):
        return config
    return {**config, "architectures": [family.classes[0] + "ForSequenceClassification"]}


def _refuse_adapter(folder: Path) -> None:
    """Raise SourceError for a folder with an adapter: without it the model gives other answers."""
    if (folder / ADAPTER).is_file():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        merge = "divide it where peft is installed, which merges the two"
        if (folder / CONFIG).is_file():
            remedy = f"{merge}; or remove {ADAPTER}, for the model without it"
            raise SourceError("an adapter lies beside the weights, and changes them", folder, remedy)
        raise SourceError(f"an adapter, without the model that it changes ({base})", folder, merge)


def _open_pickles(files: Iterable[Path]) -> Weights:
    try:
        from offramp.checkpoints.pickled import PickledWeights
    except ImportError as error:
        raise import_error(error, "torch", "torch") from None
    return PickledWeights(files)


def _present(folder: Path, names: Iterable[str]) -> list[Path]:
    return [folder / name for name in names if os.path.lexists(folder / name) and not (folder / name).is_dir()]


def require_files(folder: Path) -> None:
    """Raise SourceError for a pipe, a device or a socket in a model folder, or a link to one.

    The libraries that read the folder open files of many names, and would wait for a pipe.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            if not entry.name.startswith(".") and path.exists() and not (path.is_file() or path.is_dir()):
                what = "a pipe, a device or a socket in a model folder"
                raise SourceError(what, path, "remove it, or put the file itself there")

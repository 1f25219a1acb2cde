"""Digests of the rows that a model was trained on, which a run folder keeps, and every store that is divided from it.

A digest has 64 bits and is salted (`tasks.digests`). It recognises a row and does not contain it, but a guessed row can
be tested.
"""

import base64
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import numpy as np

from offramp.errors import StoreError, VersionError
from offramp.program.checks import WrongError, read, require_distinct, strict_json
from offramp.store.files import read_plain
from offramp.store.reader import Store, is_store

FILE_NAME = "trained-rows.json"
FORMAT = 1
_MOST_OTHER_BYTES = 8 << 20
"""Memory of the names of arguments while the file is parsed. That of the digests is in proportion to its length."""
_DIGEST = np.dtype("<u8")
_REMEDY = "get the folder again, or remove the file: the rows of the training are unknown then"


@dataclass(frozen=True, eq=False)
class TrainedRows:
    """Digests of rows, with what is needed to compute those of other rows."""

    salt: str
    """16 bytes in hexadecimal digits."""
    arguments: Tuple[str, ...]
    """Names of the arrays of a row; empty for texts and images."""
    digests_N: np.ndarray
    """Distinct digests, sorted, uint64."""

    def among(self, digests_N: np.ndarray) -> np.ndarray:
        """Return for each of these digests whether the model was trained on its row, bool [N]."""
        return np.isin(digests_N, self.digests_N)

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        digests = base64.b64encode(self.digests_N.astype(_DIGEST).tobytes()).decode()
        tree = {"format": FORMAT, "salt": self.salt, "arguments": list(self.arguments), "digests": digests}
        return json.dumps(tree, indent=1).encode() + b"\n"


@dataclass(frozen=True)
class _Described:
    """Content of the file."""

    format: int
    salt: str = field(metadata={"pattern": re.compile("[0-9a-f]{32}")})
    arguments: Tuple[str, ...]
    digests: str


def read_trained_rows(folder: Path) -> Optional[TrainedRows]:
    """Return the rows that the model of a run folder or a store was trained on, or None where this is not recorded.

    Raises StoreError for a file with other contents, VersionError for another format; DamagedError for a store.
    """
    path = folder / FILE_NAME
    if is_store(folder):
        with Store(folder, verify="never") as store:
            file = next((each for each in store.manifest.files if each.file == FILE_NAME), None)
            return None if file is None else parse_trained_rows(store.read_file(file), path)
    try:
        return parse_trained_rows(read_plain(path), path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"the record of the training cannot be read ({error.strerror})", path, _REMEDY) from None


def parse_trained_rows(data: bytes, where: object) -> TrainedRows:
    """Return what a file contains. Raises StoreError, VersionError."""
    try:
        tree: Dict[str, Any] = read(
            Dict[str, Any], strict_json(data, most_bytes=3 * len(data) + _MOST_OTHER_BYTES), "it"
        )
        version = tree.get("format", FORMAT)
        if type(version) is not int or version != FORMAT:
            raise VersionError(f"digests of rows of format {version!r}, only {FORMAT} is supported", where, _REMEDY)
        found = read(_Described, tree, "")
        require_distinct(found.arguments, "argument")
        digests_N = np.frombuffer(base64.b64decode(found.digests, validate=True), _DIGEST)
        if (digests_N[:-1] >= digests_N[1:]).any():
            raise WrongError("digests must be sorted and distinct")
    except ValueError as error:
        raise StoreError(f"not the digests of the rows of a training ({error})", where, _REMEDY) from None
    return TrainedRows(found.salt, found.arguments, digests_N)

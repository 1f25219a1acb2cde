"""Repositories of the hub, with their commits, that a model was downloaded from, or made from.

huggingface_hub keeps a download in `models--OWNER--NAME/snapshots/COMMIT`, so the path of the folder tells both. What
is made from a download (a run folder, a merged adapter, a store) keeps them in a file.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from offramp.checkpoints.weights import open_file
from offramp.errors import SourceError
from offramp.program.checks import read, strict_json
from offramp.store.manifest import File
from offramp.store.writer import StoreWriter

DOWNLOADS = "offramp_downloads.json"
MAX_BYTES = 64 << 10
"""Largest file that is read."""
COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(rf"models--([^/]+)/snapshots/({COMMIT.pattern})")


@dataclass(frozen=True)
class Download:
    """A download from the hub."""

    repository: str = field(metadata={"pattern": re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")})
    revision: str = field(metadata={"pattern": COMMIT})


def downloads_of(*folders: Path) -> tuple[Download, ...]:
    """Return the downloads that model folders are, or were made from, each once. Raises SourceError."""
    return tuple(dict.fromkeys(each for folder in folders for each in _downloads_of(folder)))


def to_bytes(downloads: Iterable[Download]) -> bytes:
    """Return the content of the file."""
    return json.dumps([asdict(each) for each in downloads], indent=1).encode() + b"\n"


def store_downloads(folder: Path, writer: StoreWriter) -> list[File]:
    """Write the downloads that a model folder is, or was made from, to a store, if they are known."""
    found = downloads_of(folder)
    return [writer.add_file(DOWNLOADS, to_bytes(found))] if found else []


def commit_of(folder: Path) -> str | None:
    """Return the commit of a folder in the cache of the hub, or None for another folder."""
    match = _match(folder)
    return None if match is None else match[2]


def _downloads_of(folder: Path) -> Iterable[Download]:
    match, path = _match(folder), folder / DOWNLOADS
    if match is not None:  # a file in it is a claim of its author
        return [Download(match[1].replace("--", "/"), match[2])]
    if not path.is_file():
        return []
    with os.fdopen(open_file(path), "rb") as file:
        data = file.read(MAX_BYTES + 1)
    try:
        if len(data) > MAX_BYTES:
            raise ValueError("too long")
        return read(tuple[Download, ...], strict_json(data), "downloads")
    except ValueError as error:
        remedy = "get the folder again, or remove the file: its origin is unknown then"
        raise SourceError(f"not the downloads of a model ({error})", path, remedy) from None


def _match(folder: Path) -> re.Match[str] | None:
    return _SNAPSHOT.fullmatch("/".join(Path(folder).resolve().parts[-3:]))

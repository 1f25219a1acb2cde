"""Files by which the inputs of a model are encoded: those of a model folder, or those that a store lists."""

import os
from pathlib import Path
from typing import Any, Container, Dict, Optional, Union

from offramp.errors import SourceError
from offramp.program.checks import strict_json
from offramp.store.files import MAX_SMALL_BYTES
from offramp.store.manifest import FILE_NAME, Manifest
from offramp.store.parsing import loads
from offramp.store.reader import read_manifest_bytes


class ModelFiles:
    """Files of a folder by name. Of a store, only those exist that its manifest lists: no other changes an answer."""

    def __init__(self, folder: Union[str, os.PathLike], manifest: Optional[Manifest] = None) -> None:
        self.folder = Path(folder)
        self._listed: Optional[Container[str]] = None
        if manifest is not None:
            self._listed = {file.file for file in manifest.files}

    def has(self, name: str) -> bool:
        """Return whether the folder has a file."""
        return (self._listed is None or name in self._listed) and (self.folder / name).is_file()

    def require_small(self, name: str) -> None:
        """Raise SourceError for a file of more than 64 MiB."""
        path = self.folder / name
        if path.stat().st_size > MAX_SMALL_BYTES:
            raise SourceError(f"file of more than {MAX_SMALL_BYTES} bytes", path, "get the file again")

    def read(self, name: str) -> bytes:
        """Return the content of a file. Raises SourceError for one of more than 64 MiB, and OSError."""
        self.require_small(name)
        with (self.folder / name).open("rb") as file:
            return file.read(MAX_SMALL_BYTES)

    def read_object(self, name: str, remedy: str) -> Dict[str, Any]:
        """Read a JSON object. Returns {} if the file is absent. Raises SourceError."""
        path = self.folder / name
        if not self.has(name):
            return {}
        try:
            tree = strict_json(self.read(name), is_foreign=True)
        except ValueError as error:
            raise SourceError(f"not JSON ({error})", path, remedy) from None
        if not isinstance(tree, dict):
            raise SourceError("not a JSON object", path, remedy)
        return tree


AnyFolder = Union[str, os.PathLike, ModelFiles]
"""A model folder or a store, by path or as its files."""


def files_of(folder: AnyFolder) -> ModelFiles:
    """Return the files of a model folder or a store. Raises the errors of reading a manifest."""
    if isinstance(folder, ModelFiles):
        return folder
    path = Path(folder)
    if not (path / FILE_NAME).is_file():
        return ModelFiles(path)
    return ModelFiles(path, loads(read_manifest_bytes(path), path / FILE_NAME))

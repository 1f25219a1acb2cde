"""Files by which the inputs of a model are encoded: those of a model folder, or those that a store lists."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Union

from offramp.errors import SourceError
from offramp.program.checks import strict_json
from offramp.store.files import MAX_SMALL_BYTES, open_plain, open_regular, read_plain, read_small
from offramp.store.folders import Folder
from offramp.store.manifest import FILE_NAME, File, Manifest
from offramp.store.parsing import loads
from offramp.store.reader import is_store, read_manifest_bytes

MAX_OBJECT_BYTES = 16 << 20
"""Largest file of JSON that is read as a whole, other than that of a tokenizer."""
_REMEDY = "put a file there that can be read"


class ModelFiles:
    """Files of a folder by name. Of a store, only those exist that its manifest lists: no other changes an answer.

    Those of a store are regular files, found by the descriptor of its folder; those of a model folder may be links to
    regular files.
    """

    def __init__(
        self, folder: Union[str, os.PathLike], manifest: Optional[Manifest] = None, opened: Optional[Folder] = None
    ) -> None:
        """`opened`: the folder of the store from which the manifest was read; None: it is opened again."""
        self.folder = Path(folder)
        self._listed: Optional[Dict[str, File]] = None
        if manifest is not None:
            self._listed = {file.file: file for file in manifest.files}
            self._opened = opened or Folder(folder)

    @property
    def is_of_store(self) -> bool:
        """True if other files in the folder count for nothing."""
        return self._listed is not None

    def has(self, name: str) -> bool:
        """Return whether the folder has a file, which may be none that can be read, such as a pipe."""
        path = self.folder / name
        return name in self._listed if self._listed is not None else os.path.lexists(str(path)) and not path.is_dir()

    def read(self, name: str, most_bytes: int = MAX_SMALL_BYTES) -> bytes:
        """Return the content of a file of at most `most_bytes`, verified where it is of a store.

        Raises SourceError for what is no regular file in a model folder, DamagedError for a store.
        """
        if self._listed is not None:
            self._require_small(name, self._listed[name].bytes, most_bytes)
            return read_small(self.folder, self._listed[name], dir_fd=self._opened.fd)
        with self._errors(name):
            data = read_plain(self.folder / name, most_bytes + 1)
        self._require_small(name, len(data), most_bytes)
        return data

    @contextmanager
    def opened(self, name: str) -> Iterator[str]:
        """Context manager of a path by which a library opens a file that was checked to be a regular one.

        It has at most 64 MiB. A file of a store is not verified here. Raises as `read`.
        """
        if self._listed is not None:
            fd = open_regular(self.folder, name, dir_fd=self._opened.fd)
        else:
            with self._errors(name):
                fd = open_plain(self.folder / name)
        try:
            self._require_small(name, os.fstat(fd).st_size, MAX_SMALL_BYTES)
            path = Path(f"/proc/self/fd/{fd}")
            yield str(path if path.exists() else self.folder / name)
        finally:
            os.close(fd)

    def _require_small(self, name: str, size: int, most_bytes: int) -> None:
        if size > most_bytes:
            raise SourceError(f"file of more than {most_bytes} bytes", self.folder / name, "get the file again")

    def read_object(self, name: str, remedy: str) -> Dict[str, Any]:
        """Read a JSON object. Returns {} if the file is absent. Raises SourceError, and as `read`."""
        path = self.folder / name
        if not self.has(name):
            return {}
        try:
            tree = strict_json(self.read(name, MAX_OBJECT_BYTES), is_foreign=True)
        except ValueError as error:
            raise SourceError(f"not JSON ({error})", path, remedy) from None
        if not isinstance(tree, dict):
            raise SourceError("not a JSON object", path, remedy)
        return tree

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SourceError(f"file cannot be read ({error.strerror})", self.folder / name, _REMEDY) from None


@contextmanager
def advice_of_stores(files: ModelFiles) -> Iterator[None]:
    """Add to what is advised for a model's folder that a store is made from it again."""
    try:
        yield
    except SourceError as error:
        if files.is_of_store:
            raise SourceError(error.what, error.where, f"{error.remedy}; then divide the model again") from error
        raise


AnyFolder = Union[str, os.PathLike, ModelFiles]
"""A model folder or a store, by path or as its files."""


def files_of(folder: AnyFolder) -> ModelFiles:
    """Return the files of a model folder or a store. Raises the errors of reading a manifest."""
    if isinstance(folder, ModelFiles):
        return folder
    path = Path(folder)
    if not is_store(path):
        return ModelFiles(path)
    opened = Folder(path)
    return ModelFiles(path, loads(read_manifest_bytes(path, opened), path / FILE_NAME), opened)

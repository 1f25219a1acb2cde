"""Image files in folders and zips. In labelled data each class has a folder, as in `train/cat/1.jpg` or `cat/1.jpg`.

Images are read on demand, and zips are not unpacked to disk. Decoding is in `tasks.pixels`.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Dict, FrozenSet, Iterator, List, Optional, Sequence

from offramp.errors import UsageError, missing
from offramp.store.files import read_plain
from offramp.tasks.examples import Example
from offramp.units import format_size

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""Suffixes of image files, in lower or upper case. Other files are ignored."""
MAX_FILE_BYTES = 128 << 20
"""Largest size of an image file, after unpacking. Reading stops there, which makes zip bombs harmless."""
_MAX_LISTED = 8
"""Number of class names that an error message lists."""
_LAYOUT = "give a folder or a zip that has one folder of images for each class"
_AGAIN = "get the data again"
_NAMED = f"give files that end in {', '.join(SUFFIXES)}"


@dataclass(frozen=True)
class Image:
    """An image on disk: a file, or a member of a zip."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}/{self.member}"

    def read(self) -> bytes:
        """Return the bytes of the image file. Raises UsageError if it cannot be read, is encrypted or is too large."""
        with _read_errors(self):
            if self.member is not None:
                return _read_member(self)
            data = read_plain(self.path, MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise _too_large(self)
        return data


def is_image_source(source: str | Path) -> bool:
    """Return whether images are expected at `source`: it is a folder, or its suffix is that of a zip or an image."""
    return source != "-" and (Path(source).is_dir() or str(source).lower().endswith((".zip", *SUFFIXES)))


def images_at(place: Path) -> list[Image]:
    """Return an image file, or all images of a folder or a zip, at any depth, sorted by name.

    Raises UsageError if there are none, or if one is encrypted, damaged or too large.
    """
    if place.is_file() and _is_image(place.name):
        return [Image(place)]
    names = _names(place)
    if names is None:
        raise UsageError("neither an image, a folder nor a zip", place, _NAMED)
    found = [_image_at(place, name) for name in sorted(names) if _is_image(name) and _is_visible(name)]
    if not found:
        raise UsageError("no images", place, _NAMED)
    return found


def class_names(place: Path) -> list[str]:
    """Return the classes of a folder or zip, sorted. Raises UsageError for fewer than two, and for another layout."""
    found = sorted(_classes(place))
    if len(found) < 2:
        raise UsageError(f"the only class is {found[0]!r}", place, "a classifier needs at least two")
    return found


def labelled_images(place: Path, labels: Sequence[str]) -> Iterator[Example]:
    """Yield the images of a folder or zip, with the index of their class in `labels`.

    The class of an image is the name of its folder. Hidden files, `__MACOSX` and files without the suffix of an image
    are ignored. Raises UsageError for another layout, for a class that has no images or is not in `labels`, and for an
    image that is encrypted, damaged or too large.
    """
    classes = _classes(place)
    unknown = sorted(set(classes) - set(labels))
    if unknown:
        known = ", ".join(labels[:_MAX_LISTED]) + (", ..." if len(labels) > _MAX_LISTED else "")
        raise UsageError(f"class {unknown[0]!r} is none of {known}", place, "rename its folder, or leave it out")
    ids = {label: number for number, label in enumerate(labels)}
    for label, names in classes.items():
        for name in names:
            yield Example(_image_at(place, name), ids[label])


def _image_at(place: Path, name: str) -> Image:
    return Image(place, name) if place.is_file() else Image(place / name)


def _classes(place: Path) -> Dict[str, List[str]]:
    """Return the names of the images of each class, sorted. Raises UsageError for another layout."""
    found = _names(place)
    if found is None:
        raise UsageError("neither a folder nor a zip", place, _LAYOUT)
    names = sorted(filter(_is_visible, found))
    folders: Dict[str, List[str]] = {}
    for name in filter(_is_image, names):
        folders.setdefault(name.rpartition("/")[0], []).append(name)
    if not folders:
        raise UsageError(f"no images ({', '.join(SUFFIXES)})", place, _LAYOUT)
    if "" in folders:
        raise UsageError(f"image {folders[''][0]} lies in no folder of a class", place, _LAYOUT)
    parents = {folder.rpartition("/")[0]: folder for folder in reversed(list(folders))}
    if len(parents) > 1:
        first, second = list(parents.values())[:2]
        what = f"folders of classes lie in different places ({first}, {second})"
        raise UsageError(what, place, "give the folder that they lie in; train and dev need separate folders")
    classes = {folder.rpartition("/")[2]: images for folder, images in folders.items()}
    (parent,) = parents
    start = f"{parent}/" if parent else ""
    below = [name[len(start) :] for name in names if name.startswith(start)]
    empty = sorted({name.split("/")[0] for name in below if "/" in name} - set(classes))
    if empty:
        raise UsageError(f"class {empty[0]!r} has no images", place, "add some, or remove its folder")
    return classes


def _is_visible(name: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _names(place: Path) -> Optional[List[str]]:
    """Return the paths in a folder or zip, with slashes; that of a folder ends with one. None for neither.

    Raises UsageError for an image in a zip that `Image.read` would refuse.
    """
    with _read_errors(place):
        if place.is_dir():
            return list(_walk(place, "", frozenset()))
        place.stat()
        if not place.is_file():
            return None
        members = {member.filename: member for member in _archive(place).infolist()}
        for name, member in members.items():
            if _is_image(name) and _is_visible(name):
                _require_readable(member, Image(place, name))
        return list(members)


def _walk(folder: Path, start: str, above: FrozenSet[str]) -> Iterator[str]:
    """Yield the names of all folders and files below a folder, as in a zip. Links to a parent folder are skipped."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.is_dir(), entry.is_file()) for entry in entries if _is_visible(entry.name)]
    for name, is_folder, is_file in found:
        if is_folder:
            yield f"{start}{name}/"
            yield from _walk(folder / name, f"{start}{name}/", above | {real})
        elif is_file:
            yield start + name


def _require_readable(member: zipfile.ZipInfo, image: Image) -> None:
    if member.flag_bits & 1:
        raise UsageError("image is encrypted", image, "give a zip without a password")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # only these bound their output
        what = f"image is packed by method {member.compress_type}"
        raise UsageError(what, image, "pack it with deflate, or store it")
    if member.file_size > MAX_FILE_BYTES:
        raise _too_large(image)


def _read_member(image: Image) -> bytes:
    archive = _archive(image.path)
    member = archive.getinfo(image.member or "")
    _require_readable(member, image)
    with archive.open(member) as file:
        return file.read(member.file_size + 1)  # bounded even if the zip's directory is wrong


def _too_large(image: Image) -> UsageError:
    return UsageError(f"image has more than {format_size(MAX_FILE_BYTES)}", image, "make it smaller, or leave it out")


def _archive(path: Path) -> zipfile.ZipFile:
    """Return the open zip at this path. A changed file is reopened, and so is a file that a parent process opened,
    because processes would share its file position.
    """
    found = path.stat()
    return _opened(path, os.getpid(), found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=4)
def _opened(path: Path, *_identity: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@contextmanager
def _read_errors(where: object) -> Iterator[None]:
    """Convert errors of the file system and of zipfile to UsageError."""
    try:
        yield
    except FileNotFoundError:
        raise missing(where) from None
    except zipfile.BadZipFile as error:
        what = "image is damaged" if isinstance(where, Image) else "not a whole zip"
        raise UsageError(f"{what} ({error})", where, _AGAIN) from None
    except (OSError, EOFError, KeyError, NotImplementedError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UsageError(f"images cannot be read ({reason})", where, _AGAIN) from None

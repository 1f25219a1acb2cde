"""Labelled images: a folder or a zip in which each class has a folder of its own, as `train/cat/1.jpg` or `cat/1.jpg`.

Images are read when they are wanted, and of a zip nothing is unpacked to disk. What decodes them is `tasks.pixels`.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from offramp.errors import UsageError
from offramp.tasks.examples import Example, Splits, cut
from offramp.tasks.metrics import default_metrics

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""Of files that are images, in small or capital letters; others are passed over."""
MAX_FILE_BYTES = 128 << 20
"""Of one image, unpacked: more is not read, so that a zip bomb costs nothing."""
_MANY = 8
"""Names that a message lists."""
_LAYOUT = "give a folder or a zip that has one folder of images for each class"
_AGAIN = "get the data again"
_NAMED = f"give files that end in {', '.join(SUFFIXES)}"
_Classes = dict[str, list[str]]
"""Class -> names of its images, in order."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image on disk: a file, or a member of a zip."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}/{self.member}"

    def read(self) -> bytes:
        """Its file, as it was encoded. Raises UsageError for what cannot be read, is encrypted or too large."""
        with _told(self):
            data = _read_file(self.path) if self.member is None else _read_member(self)
        if len(data) > MAX_FILE_BYTES:
            raise _too_large(self)
        return data


def load_images(
    train: Path | None, dev: Path | None, labels: Sequence[str] | None = None, split_seed: int = 0
) -> Splits[Image]:
    """Cut the images of `train` into train, tune and certify, and, without `dev`, into dev as well.

    Where an image goes depends on the bytes of its file and the seed alone, so that copies are never in two splits.

    Args:
        train: a folder or a zip; the class of an image is the name of the folder that it lies in. May be None where
            `labels` are given: then there is dev alone.
        labels: the name of each label id, as the model has them. None: the classes of the data, sorted by name.

    Hidden files, `__MACOSX` and whatever is no image by its name are passed over. The score is accuracy. Raises
    UsageError for what is neither a folder nor a zip, for images that lie otherwise, a class without images or that is
    none of `labels`, fewer than two classes, an empty split, an image that is encrypted, damaged or too large.
    """
    first = train or dev
    if first is None:
        raise UsageError("no images", None, "name a folder or a zip")
    if labels is None:
        labels = _labels(first)
    examples = {} if train is None else cut(_examples(train, labels), dev is not None, split_seed)
    if dev is not None:
        examples["dev"] = list(_examples(dev, labels))
    splits = Splits(first.absolute().stem, tuple(labels), default_metrics(labels), examples, cuts_dev=dev is None)
    return splits.require_examples(first)


def images_at(place: Path) -> list[Image]:
    """An image file, or all images of a folder or a zip, sorted by name, wherever they lie in it.

    Raises UsageError where there is none, and as `load_images`.
    """
    with _told(place):
        if place.is_file() and _is_image(place.name):
            return [Image(place)]
        if place.is_dir():
            return [Image(place / name) for name in sorted(_images(_walk(place, "", frozenset())))] or _none(place)
        if place.is_file():
            return [Image(place, name) for name in sorted(_images(_members(place)))] or _none(place)
    raise UsageError("neither an image, a folder nor a zip", place, _NAMED)


def _none(place: Path) -> list[Image]:
    raise UsageError("no images", place, _NAMED)


def _images(names: Iterable[str]) -> list[str]:
    return [name for name in names if _is_image(name) and _is_visible(name)]


def _labels(place: Path) -> list[str]:
    found = sorted(_classes(place))
    if len(found) < 2:
        raise UsageError(f"the only class is {found[0]!r}", place, "a classifier needs at least two")
    return found


def _examples(place: Path, labels: Sequence[str]) -> Iterator[Example[Image]]:
    classes = _classes(place)
    unknown = sorted(set(classes) - set(labels))
    if unknown:
        known = ", ".join(labels[:_MANY]) + (", ..." if len(labels) > _MANY else "")
        raise UsageError(f"class {unknown[0]!r} is none of {known}", place, "rename its folder, or leave it out")
    is_zip = place.is_file()
    ids = {label: number for number, label in enumerate(labels)}
    for label, names in classes.items():
        for name in names:
            yield Example(Image(place, name) if is_zip else Image(place / name), ids[label])


def _classes(place: Path) -> _Classes:
    with _told(place):
        if place.is_dir():
            return _by_class(list(_walk(place, "", frozenset())), place)
        if place.is_file():
            return _by_class(_members(place), place)
    raise UsageError("neither a folder nor a zip", place, _LAYOUT)


def _by_class(names: Iterable[str], place: Path) -> _Classes:
    """Sort images by class. `names` are parts joined by slashes; a folder's ends with one."""
    names = sorted(filter(_is_visible, names))
    folders: dict[str, list[str]] = {}
    for name in filter(_is_image, names):
        folders.setdefault(name.rpartition("/")[0], []).append(name)
    if not folders:
        raise UsageError(f"no images ({', '.join(SUFFIXES)})", place, _LAYOUT)
    if "" in folders:
        raise UsageError(f"image {folders[''][0]} lies in no folder of a class", place, _LAYOUT)
    classes = {folder.rpartition("/")[2]: found for folder, found in folders.items()}
    _require_images(classes, _parent(list(folders), place), names, place)
    return classes


def _parent(folders: Sequence[str], place: Path) -> str:
    """Where the folders of classes lie. Raises UsageError if not all lie there."""
    parents = {folder.rpartition("/")[0]: folder for folder in reversed(folders)}
    if len(parents) > 1:
        first, second = list(parents.values())[:2]
        what = f"folders of classes lie in different places ({first}, {second})"
        raise UsageError(what, place, "give the folder that they lie in, and of train and dev each its own")
    return next(iter(parents))


def _require_images(classes: Iterable[str], parent: str, names: Sequence[str], place: Path) -> None:
    """Raise UsageError if a folder that lies beside those of the classes has no images."""
    start = f"{parent}/" if parent else ""
    below = [name.removeprefix(start) for name in names if name.startswith(start)]
    empty = sorted({name.split("/")[0] for name in below if "/" in name} - set(classes))
    if empty:
        raise UsageError(f"class {empty[0]!r} has no images", place, "add some, or remove its folder")


def _is_visible(name: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _walk(folder: Path, start: str, above: frozenset[str]) -> Iterator[str]:
    """Names of all folders and files below a folder, as a zip has them. A link to a folder above leads nowhere."""
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


def _members(path: Path) -> list[str]:
    """Names in a zip, each once. Raises UsageError for an image that `Image.read` would refuse."""
    members = {member.filename: member for member in _archive(path).infolist()}
    for name, member in members.items():
        if _is_image(name) and _is_visible(name):
            _require_readable(member, Image(path, name))
    return list(members)


def _require_readable(member: zipfile.ZipInfo, image: Image) -> None:
    if member.flag_bits & 1:
        raise UsageError("image is encrypted", image, "give a zip without a password")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile bounds no other one's output
        raise UsageError(f"image is packed by method {member.compress_type}", image, "pack it with deflate, or not")
    if member.file_size > MAX_FILE_BYTES:
        raise _too_large(image)


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


def _read_member(image: Image) -> bytes:
    archive = _archive(image.path)
    member = archive.getinfo(image.member or "")
    _require_readable(member, image)
    with archive.open(member) as file:
        return file.read(member.file_size + 1)  # never more than this is unpacked, even if the zip lies


def _too_large(image: Image) -> UsageError:
    return UsageError(f"image has more than {MAX_FILE_BYTES >> 20} MiB", image, "make it smaller, or leave it out")


def _archive(path: Path) -> zipfile.ZipFile:
    """The open zip at this path, as it is now: a fork must not share the position in the file."""
    found = path.stat()
    return _opened(path, os.getpid(), found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=4)
def _opened(path: Path, *_identity: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@contextmanager
def _told(where: object) -> Iterator[None]:
    """Turn what the file system and zipfile raise into an error that names the file."""
    try:
        yield
    except zipfile.BadZipFile as error:
        what = "image is damaged" if isinstance(where, Image) else "not a whole zip"
        raise UsageError(f"{what} ({error})", where, _AGAIN) from None
    except (OSError, EOFError, KeyError, NotImplementedError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UsageError(f"images cannot be read ({reason})", where, _AGAIN) from None

"""The choice of the encoder for the inputs of a model, and of the reader of a file of inputs.

Only the chosen one is imported.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, Optional, Tuple, Union

from offramp.errors import UsageError
from offramp.program.inputs import InputEncoder
from offramp.program.program import Input, Texts
from offramp.tasks.model_files import AnyFolder, files_of
from offramp.tasks.text import TextEncoder


def open_encoder(
    folder: AnyFolder,
    inputs: Mapping[str, Input],
    texts: Optional[Texts],
    max_length: Optional[int] = None,
    warn: Callable[[str], None] = warnings.warn,
) -> InputEncoder:
    """Return the encoder of the inputs of a model.

    Args:
        folder: the store, which holds the tokenizer or the image processor.
        inputs: inputs of the program; sizes are those of the example that it was divided with.
        texts: requirements for texts; None: the model takes images, if it has an image processor and a single input
            with four axes, or else records of arrays.
        max_length: longest text in tokens; None: that of the model.
        warn: called once, when the first text is truncated.

    Raises UsageError for a `max_length` that the model does not support, SourceError for a tokenizer or an image
    processor that cannot be read.
    """
    files = files_of(folder)
    if texts is not None:
        return TextEncoder.from_folder(files, texts, max_length, warn)
    if max_length is not None:
        raise UsageError(
            "the model takes no texts, so there is no length to cut to", files.folder, "leave out max_length"
        )
    from offramp.tasks.processors import FILE_NAME

    name, first = next(iter(inputs.items()))
    if len(inputs) == 1 and len(first.axes) == 4 and files.has(FILE_NAME):
        from offramp.tasks.pixels import ImageEncoder, ImageInputs

        return ImageInputs(ImageEncoder.from_folder(files), name, _largest_image(first))
    from offramp.tasks.arrays import ArrayInputs

    shapes = {name: tuple(axis for axis in each.axes[1:] if isinstance(axis, int)) for name, each in inputs.items()}
    return ArrayInputs({name: (each.dtype, shapes[name]) for name, each in inputs.items()})


def _largest_image(pixels: Input) -> Optional[Tuple[int, int]]:
    """Return the largest height and width that a model takes, or None if they are not known."""
    largest = pixels.largest[2:] or (None, None)
    height, width = (axis if most is None else most for axis, most in zip(pixels.axes[2:], largest))
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def read_inputs(source: Union[str, Path], *columns: Any, **options: Any) -> Iterable[Any]:
    """Return the inputs at `source`, which is a path or `-`.

    Texts of a file, a pipe or standard input (see `tables.read_texts`, which takes `columns` and `options`), images of
    a file, a folder or a zip, or records of an .npz file. Raises UsageError.
    """
    from offramp.tasks import images, tables

    are_images, are_arrays = images.is_image_source(source), str(source).endswith(".npz")
    if any(columns) and (are_images or are_arrays):
        kind = "images" if are_images else "arrays"
        raise UsageError(
            f"--text-column and --pair-column are for texts, the inputs are {kind}", source, "leave them out"
        )
    if are_images:
        return images.images_at(Path(source))
    if are_arrays:
        from offramp.tasks.arrays import records_at

        return records_at(Path(source))
    return tables.read_texts(source, *columns, **options)

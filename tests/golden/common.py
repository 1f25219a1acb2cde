"""Golden stores, and the inputs of `answers.json` as `Classifier.predict` takes them. Runs on Python 3.8."""

import base64
import json
import re
import zipfile
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
STORES, TUNED, ANSWERS = FOLDER / "stores", FOLDER / "tuned", FOLDER / "answers.json"
BACKENDS = ("ort", "torch")
TOLERANCE = 1e-6
"""Largest accepted difference of a score. Kernels of other processors and library versions differ in the last bits."""


def read_answers():
    """Return the content of `answers.json`."""
    return json.loads(ANSWERS.read_text())


def pack(store, archive):
    """Write the files of a store into a zip archive, without times: equal stores give equal archives."""
    with zipfile.ZipFile(str(archive), "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(path for path in store.rglob("*") if path.is_file()):
            info = zipfile.ZipInfo(path.relative_to(store).as_posix(), (1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(info, path.read_bytes())


def unpack(name, folder, stores=STORES):
    """Unpack a golden store of `stores` into `folder/name`, unless that exists. Returns the path of the store."""
    store = Path(folder) / name
    if not store.exists():
        with zipfile.ZipFile(str(stores / (name + ".zip"))) as file:
            file.extractall(str(store))
    return store


def to_array(tree):
    """Return the array that `{"dtype", "shape", "values"}` describes."""
    return np.array(tree["values"], tree["dtype"]).reshape(tree["shape"])


def to_input(tree):
    """Return one input for `predict`: a text, a pair of texts, the bytes of an image file, or arrays by name."""
    kind, value = next(iter(tree.items()))
    if kind == "pair":
        return tuple(value)
    if kind == "image":
        return base64.b64decode(value)
    if kind == "arrays":
        return {name: to_array(array) for name, array in value.items()}
    return value


def smallest_budget(message):
    """Return the budget that the message of a BudgetError recommends, such as "83MiB"."""
    return re.findall(r"[0-9]+ ?MiB", message)[-1].replace(" ", "")

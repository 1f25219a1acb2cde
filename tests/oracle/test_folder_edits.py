"""Folders with one thing changed in them: the answer is that of transformers, or one line says what is in the way.

The edits are generated: each key of config.json removed, null and of another type; each tensor removed, renamed, of
another dtype, and in another file than the index says; and what can be done to all tensors at once.
"""

import json
import random
import shutil
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import offramp
from tests.tiny_families import FAMILIES, KNOWN, write_classifier

PARTS = tuple(f"part{number}" for number in range(240))
"""The edits of a family in random order are dealt to so many tests."""
TEXT = "the red rose is a rose"
WEIGHTS, DTYPES = "model.safetensors", (torch.float16, torch.bfloat16, torch.float64, torch.int32)
QUIET_KEYS = ("transformers_version",)
SHARDS = ("one.safetensors", "sub/two.safetensors")
NOTHING = ("no refusal is right",)
TOLERANCES = {"fp32": 1e-5, "fp16": 2e-3, "int8": 5e-2}
"""How far a probability may be from that of transformers, by the dtype of the store."""


@dataclass(frozen=True)
class Edit:
    """One change of a folder: of a key of its config to a value (`...` removes it), or of its tensors."""

    name: str
    subjects: tuple[str, ...]
    """What a refusal of a folder that transformers loads must name one of; `NOTHING` where it must be answered."""
    config: dict[str, Any] | None = None
    tensors: dict[str, torch.Tensor] | None = None
    moved: str | None = None
    """Tensor that is in another file than the index says."""

    def make(self, folder):
        if self.config is not None:
            (folder / "config.json").write_text(json.dumps(self.config))
        if self.moved is not None:
            self.shard(folder)
        elif self.tensors is not None:
            save_file(self.tensors, folder / WEIGHTS, {"format": "pt"})

    def shard(self, folder):
        """Two files, one of them in a folder of its own, and an index with one tensor in the wrong file."""
        (folder / WEIGHTS).unlink()
        (folder / "sub").mkdir()
        parts = {name: SHARDS[number % 2] for number, name in enumerate(self.tensors)}
        for file in SHARDS:
            held = {name: tensor for name, tensor in self.tensors.items() if parts[name] == file}
            save_file(held, folder / file, {"format": "pt"})
        parts[self.moved] = SHARDS[parts[self.moved] == SHARDS[0]]
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))


def another_type(value):
    if isinstance(value, (str, bool)):
        return 7
    return str(value) if isinstance(value, (int, float)) else "red"


def edits_of(folder):
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / WEIGHTS)
    for key in config.keys() - set(QUIET_KEYS):
        less = {name: value for name, value in config.items() if name != key}
        yield Edit(f"{key} removed", (key,), less)
        yield Edit(f"{key} null", (key,), {**less, key: None})
        yield Edit(f"{key} of another type", (key,), {**less, key: another_type(config[key])})
    for number, (name, tensor) in enumerate(tensors.items()):
        less = {other: value for other, value in tensors.items() if other != name}
        dtype = DTYPES[number % len(DTYPES)]
        yield Edit(f"{name} removed", (name,), tensors=less)
        yield Edit(f"{name} renamed", (name,), tensors={**less, f"old.{name}": tensor})
        named = NOTHING if dtype.is_floating_point else (name,)
        yield Edit(f"{name} of {dtype}", named, tensors={**less, name: tensor.to(dtype)})
        yield Edit(f"{name} in another file", NOTHING, tensors=tensors, moved=name)
    for dtype in DTYPES:
        named = NOTHING if dtype.is_floating_point else ("dtype I32",)
        yield Edit(f"all of {dtype}", named, tensors={name: each.to(dtype) for name, each in tensors.items()})
    bare = {name.partition(".")[2] if name.count(".") > 2 else name: each for name, each in tensors.items()}
    yield Edit("no prefix", NOTHING, tensors={name: each.clone() for name, each in bare.items()})
    extra = {"loss.weight": torch.ones(3), "position_ids": torch.arange(24)[None]}
    yield Edit("tensors of nothing", NOTHING, tensors={**tensors, **extra})


def maker(place):
    """A function: family -> (folder, class, inputs of the text, its edits), made once; `place()` is a new folder."""
    made = {}

    def make(family):
        if family not in made:
            transformers.utils.logging.disable_progress_bar()
            transformers.utils.logging.set_verbosity_error()
            layers = {} if family in KNOWN else {"num_layers": 2}
            folder = write_classifier(place() / family, family, **layers)
            model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
            inputs = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")
            if family == "distilbert":
                inputs.pop("token_type_ids", None)
            edits = sorted(edits_of(folder), key=lambda edit: edit.name)
            random.Random(family).shuffle(edits)
            made[family] = folder, type(model), inputs, edits
        return made[family]

    return make


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return maker(lambda: tmp_path_factory.mktemp("models"))


def expected(folder, cls, inputs):
    """Label and probability by transformers, or the reason why it has no right answer."""
    try:
        model, said = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if said["missing_keys"] or said["mismatched_keys"]:
            return f"weights made up: {said['missing_keys']}"
        with torch.no_grad():
            logits_C = model.eval()(**inputs, return_dict=True).logits[0].float()
        label = int(logits_C.argmax())
        return str(model.config.id2label[label]), float(logits_C.softmax(-1)[label])
    except Exception as error:  # whatever transformers says of such a folder
        return f"{type(error).__name__}: {error}"


def found(folder, store, dtype="fp32"):
    try:
        with offramp.load(offramp.divide(folder, store, dtype=dtype), threads=1) as classifier:
            result = classifier.predict([TEXT])[0]
        return result.label, result.score
    except offramp.OfframpError as error:
        return str(error)


def fault(edit, got, wanted, unedited, dtype="fp32"):
    """What is wrong with an answer or a refusal of a store of `dtype`, or None."""
    if isinstance(got, str):
        is_named = isinstance(wanted, str) or any(each in got for each in edit.subjects)
        return None if is_named and "\n" not in got and "fault of ours" not in got else f"refused: {got}"
    if isinstance(wanted, str):  # a key that no answer depends on may be wrong
        wanted = unedited if edit.config is not None and not wanted.startswith("weights made up") else ("", 2.0)
    same = got[0] == wanted[0] and abs(got[1] - wanted[1]) <= TOLERANCES[dtype]
    return None if same else f"{got}, not {wanted}"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", (*KNOWN, *FAMILIES))
def test_an_edited_folder_answers_as_in_transformers_or_is_refused(folders, tmp_path, family, part):
    folder, cls, inputs, edits = folders(family)
    unedited, faults = expected(folder, cls, inputs), {}
    for number, edit in enumerate(edits[PARTS.index(part) :: len(PARTS)]):
        own = shutil.copytree(folder, tmp_path / f"{number}")
        edit.make(own)
        wanted = expected(own, cls, inputs)
        faults[edit.name] = fault(edit, found(own, tmp_path / f"{number}.store"), wanted, unedited)
    assert {name: each for name, each in faults.items() if each} == {}

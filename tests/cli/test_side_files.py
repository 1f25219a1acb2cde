"""Every small JSON file that a verb reads beside the weights: each key absent, of other types, out of range, huge,
nested or given twice ends as the documentation says, and the untouched file is read.
"""

import hashlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from offramp.checkpoints.source import open_source, read_training
from offramp.checkpoints.weights import read_index
from offramp.errors import OfframpError
from offramp.policies.codec import to_json
from offramp.policies.costs import Costs
from offramp.policies.evidence import FEATURES
from offramp.policies.learned import Stopping
from offramp.program import checks
from offramp.program.program import Texts
from offramp.runtime.profile import DeviceProfile, load_profile, save_profile
from offramp.session.policy_files import policy_of
from offramp.store.exits import parse_exits
from offramp.store.manifest import labels_bytes
from offramp.store.parsing import parse_labels
from offramp.store.policy_file import MeasuredOn, PolicyFile, Prediction, read_policy, write_policy
from offramp.store.trained_rows import TrainedRows, read_trained_rows
from offramp.store.transcript import About, TranscriptWriter, read_transcript
from offramp.tasks.pixels import ImageEncoder
from offramp.tasks.text import TextEncoder
from offramp.tasks.tokenizer_settings import TokenizerSettings
from tests.cli.conftest import VOCABULARY
from tests.store.small import reseal, tree_of

SPEC = Texts(vocab_size=len(VOCABULARY), max_length=32, num_token_types=2, pad_token=0)
SECONDS = 1.0
HELD = {}
"""`model`: the folder of a model with a tokenizer and exits."""
VALUES = {
    "null": None, "true": True, "minus one": -1, "zero": 0, "one": 1, "a fraction": 1.5, "much": 1e300,
    "a large number": 10**19, "text": "x", "long text": "x" * 100_000, "control characters": "\x1b[2J\n\r", "list": [],
    "object": {}, "long list": [1] * 10_000, "lists in lists": [[[[[[[[1]]]]]]]], "objects": {"a": {"b": {"c": []}}},
    "list of texts": ["x", "y"],
}  # fmt: skip
"""Values in place of the one of a key."""
INNER = ("null", "minus one", "much", "text", "list", "object")
"""Values in place of one within the value of a key."""
TEXTS = {
    "NaN": "NaN", "infinity": "-Infinity", "1e400": "1e400", "digits": "9" * 5000, "deep": "[" * 9000 + "]" * 9000,
    "deep objects": '{"a":' * 9000 + "1" + "}" * 9000,
}  # fmt: skip
"""JSON in place of the one of a key, which Python reads in one way or another."""
WHOLE = {"empty": b"", "no JSON": b"{", "a list": b"[]", "a text": b'"x"', "null": b"null", "bytes": b"\xff\xfe{}"}
WHOLE |= {"deep": b"[" * 100_000, "zeros": b"\0" * 1000, "much": b"[" + b"1," * 100_000 + b"1]"}


def written(tree):
    return lambda path: path.write_text(json.dumps(tree))


def stopping():
    rows = ((0.1,) * len(FEATURES),) * 2
    return Stopping(rows, rows, rows, Costs((8, 16), ((0.1, 0.2, 0.3), (0.2, 0.3, 0.4))), 0.5)


def policy(path):
    measured = MeasuredOn("Linux", "a CPU", 2, 7.5, "ort", 2, 8, "0" * 64, 3, 1, "buffered", 1 << 27)
    predicted = Prediction(90.0, 1.0, 0.01, 2.0, 1e6, (1.0, 0.5))
    certificate = {"kind": "certified", "epsilon": 0.01, "delta": 0.05}
    file = PolicyFile(to_json(stopping()), "0" * 64, 0.5, predicted, certificate, {"task": "x"}, measured, [{"a": 1}])
    write_policy(path, file)


def profile(path):
    row, heads = (1.0, 2.0, 3.0), (0.1, 0.1)
    rest = ((row,), (row,), (heads,), 0.0, (row,), row, row, row, (row,), (heads,), (0.0,), 0.0, 1.0, 3)
    save_profile(
        DeviceProfile(MeasuredOn(batch=8, threads=2), (8,), (row,), *rest, (row,), (heads,), 0.1, 1 << 27), path
    )


def transcript(path):
    about = About("sst2", "dev", "single_label_classification", ("a", "b"), ("accuracy",), "1" * 64, "2" * 64, 64)
    with TranscriptWriter(path.parent, about, 3, 2, 2) as writer:
        logits = np.ones((3, 2, 2), np.float32)
        writer.write(0, logits=logits, lengths=np.array([3, 4, 5]), labels=np.array([0, 1, 1]))
        writer.finish()


def model_file(path):
    """The file as it lies in a model folder, with the rest of the folder."""
    shutil.copytree(HELD["model"], path.parent, dirs_exist_ok=True)


def beside_the_model(tree):
    return lambda path: (model_file(path), written(tree)(path))


def text_encoder(path):
    return TextEncoder.from_folder(path.parent, SPEC, warn=lambda line: None).encode(["the film", ("a bank", "rose")])


def tokenizer_config(path):
    model_file(path)
    added = {"0": {"content": "[PAD]", "special": True}}
    tree = {
        "tokenizer_class": "BertTokenizer",
        "model_max_length": 20,
        "truncation_side": "left",
        "do_lower_case": True,
    }
    tree |= {"model_input_names": ["input_ids"], "added_tokens_decoder": added, "strip_accents": None}
    written(tree)(path)


def settings(path):
    from tokenizers import Tokenizer, models

    model = models.WordLevel({word: number for number, word in enumerate(VOCABULARY)}, "[UNK]")
    Tokenizer(model).save(str(path.parent / "tokenizer.json"))
    path.write_bytes(TokenizerSettings("tokenizer.json", 16).to_json())


def opened(path):
    with open_source(path.parent) as source:
        return source.encoder() if source.misfit() is None else None


def index(path):
    model_file(path)
    (path.parent / "model.safetensors").rename(path.parent / "model-1.safetensors")
    written({"metadata": {"total_size": 1}, "weight_map": {"a": "model-1.safetensors"}})(path)


def read_policy_file(path):
    return policy_of(read_policy(path), path)


PROCESSOR = ImageEncoder((8, 8), (4, 4), 2, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).to_json()
TRAINING = {"format": 1, "labels": ["a", "b"], "max_length": 64, "data": {"task": "sst2", "split_seed": 0}, "seed": 0}
ROWS = TrainedRows("0" * 32, ("x",), np.arange(3, dtype="<u8"))
EXITS = {"form": "mean-linear", "exits": [1, 2], "trained": True, "points": [["a", 1, 8], ["b", 1, 8]]}
FILES = {
    "exits.json": (written({**EXITS, "weights_sha256": "0" * 64}), lambda path: parse_exits(path.read_bytes(), path)),
    "labels.json": (lambda path: path.write_bytes(labels_bytes(["a", "b"])),
                    lambda path: parse_labels(path.read_bytes(), 2, path)),
    "policy.json": (policy, read_policy_file),
    "profile.json": (profile, load_profile),
    "dev.json": (transcript, lambda path: read_transcript(path.parent, "dev")),
    "trained-rows.json": (lambda path: path.write_bytes(ROWS.to_bytes()), lambda path: read_trained_rows(path.parent)),
    "train.json": (written(TRAINING), lambda path: read_training(path.parent)),
    "config.json": (model_file, opened),
    "model.safetensors.index.json": (index, lambda path: read_index(path, ".safetensors")),
    "tokenizer_config.json": (tokenizer_config, text_encoder),
    "special_tokens_map.json": (beside_the_model({"cls_token": "[CLS]", "sep_token": {"content": "[SEP]"}}),
                                text_encoder),
    "added_tokens.json": (beside_the_model({"[MASK]": 4}), text_encoder),
    "offramp_tokenizer.json": (settings, text_encoder),
    "preprocessor_config.json": (written(PROCESSOR), lambda path: ImageEncoder.from_folder(path.parent)),
}  # fmt: skip
"""Name -> how it is written, and the function by which verbs read it."""
FREE = {
    "policy.json": {("tuned_on",), ("certificate",), ("front",)},
    "train.json": {("data",)},
    "model.safetensors.index.json": {("metadata",)},
}
"""Keys whose content is not read."""


class Parsing:
    """A function that parses, and the lengths of the texts that it was given."""

    def __init__(self, parse):
        self._parse, self.lengths = parse, []

    def __call__(self, text, **more):
        self.lengths.append(len(text))
        return self._parse(text, **more)


@pytest.fixture(scope="module", autouse=True)
def keep_model(model):
    HELD["model"] = model


def places_of(tree, before=()):
    """Yield the paths of all keys, and of the first element of each list, three levels deep."""
    inner = tree.items() if isinstance(tree, dict) else list(enumerate(tree))[:1] if isinstance(tree, list) else ()
    for key, value in inner:
        yield (*before, key)
        if len(before) < 2:
            yield from places_of(value, (*before, key))


def replaced(tree, place, value):
    """The tree with a marker in place of one value, as text, and the marker then replaced by `value`."""
    tree = json.loads(json.dumps(tree))
    part = tree
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = "\0marker"
    return json.dumps(tree).replace('"\\u0000marker"', value)


def without(tree, place):
    tree = json.loads(json.dumps(tree))
    part = tree
    for key in place[:-1]:
        part = part[key]
    del part[place[-1]]
    return json.dumps(tree)


def doubled(tree, place):
    """The text with one key twice."""
    tree = json.loads(json.dumps(tree))
    part = tree
    for key in place[:-1]:
        part = part[key]
    value = part.pop(place[-1])
    pair = f"{json.dumps(place[-1])}: {json.dumps(value)}"
    part["\0marker"] = 0
    return json.dumps(tree).replace('"\\u0000marker": 0', f"{pair}, {pair}")


def spoilt(tree):
    """Yield (what is wrong, content) for every key of a file and every kind of fault."""
    yield from ((what, data) for what, data in WHOLE.items())
    for place in places_of(tree):
        for what, value in VALUES.items():
            if len(place) > 1 and what not in INNER:
                continue
            yield f"{place} is {what}", replaced(tree, place, json.dumps(value)).encode()
        for what, value in TEXTS.items() if len(place) == 1 else ():
            yield f"{place} is {what}", replaced(tree, place, value).encode()
        yield f"{place} is absent", without(tree, place).encode()
        if isinstance(place[-1], str):
            yield f"{place} twice", doubled(tree, place).encode()
    if isinstance(tree, dict):
        yield "an unknown key", json.dumps({**tree, "\x1b[2J": 1}).encode()


def outcome(read, path):
    """How reading a file ends: "" or the fault in it."""
    begin = time.process_time()
    try:
        read(path)
        found = ""
    except OfframpError as error:
        text = str(error)
        is_documented = error.exit_code == 4 or "is too short for a" in text  # a length of one token is legal
        found = "" if is_documented and text.isprintable() and len(text) < 4000 else f"{error.exit_code}: {text}"
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    seconds = time.process_time() - begin
    return found or ("" if seconds < SECONDS else f"{seconds:.1f} s")


@pytest.mark.parametrize("name", FILES)
def test_a_spoilt_file_is_refused_or_harmless(tmp_path, name):
    write, read = FILES[name]
    path = tmp_path / "place" / name
    path.parent.mkdir()
    write(path)
    read(path)  # as it is, it is read
    good = path.read_bytes()
    faults = {}
    for what, data in spoilt(json.loads(good)):
        path.write_bytes(data)
        found = outcome(read, path)
        if found:
            faults[what] = found
    assert faults == {}
    path.write_bytes(good)
    read(path)


@pytest.mark.parametrize("name", FILES)
def test_a_key_that_is_given_twice_or_no_number_is_refused(tmp_path, name):
    write, read = FILES[name]
    path = tmp_path / "place" / name
    path.parent.mkdir()
    write(path)
    tree = json.loads(path.read_bytes())
    is_foreign = name in ("config.json", "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json")
    is_foreign |= name.startswith(("tokenizer", "model."))
    for place in places_of(tree):
        texts = (
            []
            if is_foreign or place[:1] in FREE.get(name, ())
            else [replaced(tree, place, each) for each in ("NaN", "1e400")]
        )
        for text in [*texts, *([doubled(tree, place)] if isinstance(place[-1], str) else [])]:
            path.write_text(text)
            with pytest.raises(OfframpError) as caught:
                read(path)
            assert caught.value.exit_code == 4, text[:200]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_many_values_is_refused_before_they_take_memory(tmp_path, monkeypatch, name):
    write, read = FILES[name]
    path = tmp_path / "place" / name
    path.parent.mkdir()
    write(path)
    path.write_bytes(b"[" + b"[]," * 450_000 + b"0]")
    monkeypatch.setattr(checks.json, "loads", parsing := Parsing(json.loads))
    with pytest.raises(OfframpError, match=r"B of memory|more than") as caught:
        read(path)
    assert caught.value.exit_code == 4 and max(parsing.lengths, default=0) < 1 << 20


@pytest.mark.parametrize("exits", [[1, 1, 1], [-1], [1, 2, 99], [0], [3, 2, 1], [1, 2], [1, 2, 3, 4], [True, 2, 3], [],
                                   list(range(1, 100_000))])  # fmt: skip
def test_exits_that_the_model_has_no_places_for_are_refused(store, refused, tmp_path, exits):
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    tree, path = tree_of(copy), copy / "exits.json"
    data = json.dumps({**json.loads(path.read_text()), "exits": exits}).encode()
    path.write_bytes(data)
    tree["exits"]["description"].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    reseal(copy, tree)
    for words in (["run", "--text", "a film"], ["plan", "--exit", "confidence:0.5"]):
        refused(4, "exits.json: exits", words[0], str(copy), *words[1:])


def in_manifest(store, place, change):
    copy = Path(shutil.copytree(store, place))
    tree = tree_of(copy)
    change(tree["program"])
    reseal(copy, tree)
    return str(copy)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda program: program["texts"].update(pad_token=10**6),
            "pad_token must be an integer from 0 to 15, not 1000000",
        ),
        (lambda program: program["texts"].update(pad_token=16), "pad_token must be an integer from 0 to 15, not 16"),
        (lambda program: program["kernels"]["attention"]["attributes"].update(num_heads=64), "num_heads"),
        (lambda program: program["output"].update(num_labels=2), "another number of labels"),
    ],
)
def test_numbers_of_a_program_that_fit_nothing_are_refused_when_a_store_is_opened(
    store, refused, tmp_path, change, says
):
    copy = in_manifest(store, tmp_path / "store", change)
    for words in (["run", copy, "--text", "a film"], ["plan", copy], ["verify", copy]):
        refused(4, says, *words)


@pytest.mark.parametrize(
    "change",
    [
        lambda program: program["texts"].update(pad_token=15),
        lambda program: program["kernels"]["attention"]["attributes"].update(num_heads=8),
    ],
)
def test_numbers_that_fit_are_read(store, run, tmp_path, change):
    assert run("run", in_manifest(store, tmp_path / "store", change), "--text", "a film").code == 0


@pytest.mark.parametrize("name", ["exits.json", "labels.json"])
def test_verify_reads_the_content_of_side_files(store, run, tmp_path, name):
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    assert run("verify", str(copy)).code == 0
    data, tree = b'["one"]', tree_of(copy)
    (copy / name).write_bytes(data)
    described = tree["exits"]["description"] if name == "exits.json" else tree["labels"]
    described.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    reseal(copy, tree)
    said = run("verify", str(copy))
    assert said.code == 4 and name in said.out + said.err

"""A pipe, a device, a socket, a folder or nothing in place of each file that is read by its name: one error, at once.

A link to a regular file is as good as the file, outside of a store.
"""

import errno
import gc
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from offramp.checkpoints.source import COMPANIONS, EXITS, open_source, read_training
from offramp.checkpoints.weights import open_file, read_index, read_json
from offramp.division.checkpoints import load_inputs
from offramp.errors import OfframpError, RefusedError, UsageError
from offramp.program.program import Texts
from offramp.store import StoreWriter
from offramp.store.files import open_plain, read_plain
from offramp.store.memory import VerifiedMemory
from offramp.store.policy_file import read_json as read_policy_json
from offramp.store.trained_rows import TrainedRows, read_trained_rows
from offramp.tasks.arrays import records_at
from offramp.tasks.glue import load_files, task_of
from offramp.tasks.images import Image
from offramp.tasks.model_files import ModelFiles
from offramp.tasks.text import TextEncoder
from offramp.training.folders import last_checkpoint, read_config
from tests.cli.conftest import VOCABULARY, write_tiny
from tests.odd_files import absent, dangling, fifo, folder, link, link_to_device, no_hang, unix_socket
from tests.store.small import FINGERPRINT, names_in


@pytest.fixture(autouse=True)
def nothing_hangs():
    with no_hang(10):
        yield


def link_to_pipe(path):
    fifo(path)
    path.rename(path.with_name(".moved"))
    path.symlink_to(".moved")


NO_FILES = (fifo, link_to_pipe, link_to_device, unix_socket)
ATTACKS = (*NO_FILES, folder, dangling, absent)


def hard_link(path):
    os.link(path, path.with_name(".other"))


TWINS = (link, hard_link)


@dataclass(frozen=True)
class Reading:
    """A file, how it is read, and the error for what is none."""

    name: str
    write: Callable
    read: Callable
    error: type = RefusedError
    is_optional: bool = False
    """Without the file, or with a folder of its name, something else is read, or nothing."""


def text(content):
    return lambda path: path.write_text(content)


def array(path):
    np.savez(path, x=np.zeros((2, 3)))


def tensors(path):
    save_file({"x": np.zeros(3, np.float32)}, path)


def policy(path):
    return read_policy_json(path, "policy file", "make it again")


def trained(path):
    path.write_bytes(TrainedRows("ab" * 16, (), np.zeros(0, np.uint64)).to_bytes())


def glue(path):
    (path.parent / "RTE").mkdir(exist_ok=True)
    lines = ["index\tsentence1\tsentence2\tlabel"] + [f"{n}\ta{n}\tb\tentailment" for n in range(60)]
    path.write_text("\n".join(lines))


def library_reads(path):
    files = ModelFiles(path.parent)
    with files.opened(path.name) as place, open(place, "rb") as file:
        return file.read()


def encode(path):
    encoder = TextEncoder.from_folder(path.parent, Texts(len(VOCABULARY), 16, 2, 0), warn=lambda message: None)
    return encoder.encode(["the bank fell"]).arrays["input_ids"].tolist()


READINGS = (
    Reading("file", text("x"), read_plain, OSError),
    Reading("policy.json", text('{"format": 1}'), policy, UsageError),
    Reading("trained-rows.json", trained, lambda path: read_trained_rows(path.parent), is_optional=True),
    Reading("config.json", text("{}"), read_json),
    Reading("model.safetensors", tensors, lambda path: os.close(open_file(path))),
    Reading("model.index.json", text('{"weight_map": {"a": "b.bin"}}'), lambda path: read_index(path, ".bin")),
    Reading("vocab.json", text("{}"), lambda path: ModelFiles(path.parent).read(path.name)),
    Reading("merges.txt", text("a b"), library_reads),
    Reading("tokenizer_config.json", text("{}"), lambda path: ModelFiles(path.parent).read_object(path.name, ""),
            is_optional=True),
    Reading("vocab.txt", text("\n".join(VOCABULARY)), encode),
    Reading("train.json", text('{"max_length": 7}'), lambda path: read_training(path.parent), is_optional=True),
    Reading("inputs.safetensors", tensors, load_inputs, UsageError),
    Reading("inputs.npz", array, load_inputs, UsageError),
    Reading("records.npz", array, lambda path: [str(each) for each in records_at(path)], UsageError),
    Reading("image.png", text("no image"), lambda path: Image(path).read(), UsageError),
    Reading("train.tsv", glue, lambda path: load_files(task_of("rte"), path.parent), UsageError),
)  # fmt: skip


def outcome(reading, path):
    found = reading.read(path)
    return {name: value.tolist() for name, value in found.items()} if reading.read is load_inputs else repr(found)


@pytest.mark.parametrize("reading", READINGS, ids=lambda reading: reading.name)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch, reading, attack):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / reading.name
    reading.write(path)
    attack(path)
    gc.collect()  # what tests before have left is closed now, not in between
    descriptors = names_in("/proc/self/fd")
    if reading.is_optional and attack in (folder, dangling, absent):
        with_nothing(reading, path)
    else:
        with pytest.raises((reading.error, UsageError)) as caught:
            reading.read(path)
        if attack in NO_FILES and isinstance(caught.value, OfframpError):
            assert str(caught.value).isprintable() and str(path) in str(caught.value)
        del caught  # its traceback holds what is closed when nobody refers to it
    assert names_in("/proc/self/fd") == descriptors


def with_nothing(reading, path):
    try:
        assert not reading.read(path)
    except OfframpError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("reading", READINGS, ids=lambda reading: reading.name)
@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.__name__)
def test_a_link_to_a_file_is_as_good_as_the_file(tmp_path, reading, twin):
    path = tmp_path / reading.name
    reading.write(path)
    before = outcome(reading, path)
    twin(path)
    assert outcome(reading, path) == before


FOLDER_FILES = (
    "config.json",
    "model.safetensors",
    *EXITS,
    *COMPANIONS,
    "generation_config.json",
    "chat_template.jinja",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model", num_hidden_layers=1, exits=False)


@pytest.mark.parametrize("name", FOLDER_FILES)
@pytest.mark.parametrize("attack", NO_FILES, ids=lambda attack: attack.__name__)
def test_a_model_folder_with_what_is_no_file_is_refused(tiny, tmp_path, monkeypatch, name, attack):
    """Also under names that only transformers reads."""
    monkeypatch.chdir(tmp_path)
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    (model / name).touch()
    attack(model / name)
    with pytest.raises(RefusedError, match=f"model/{name} - remove it, or put the file itself there"):
        open_source(model)


def test_a_model_folder_of_links_is_as_good_as_the_files(tiny, tmp_path):
    """The cache of the hub consists of them; hidden files and folders are nobody's business."""
    (tmp_path / "model").mkdir()
    for path in tiny.iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
    os.mkfifo(tmp_path / "model" / ".hidden")
    (tmp_path / "model" / "onnx").mkdir()
    (tmp_path / "model" / "README.md").symlink_to("nowhere")
    with open_source(tiny) as files, open_source(tmp_path / "model") as links:
        assert links.entries == files.entries and links.fingerprint() == files.fingerprint()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_the_mark_of_a_build_that_is_no_file(tmp_path, monkeypatch, attack):
    """The build is begun again; what a link names stays as it is."""
    monkeypatch.chdir(tmp_path)
    with StoreWriter(tmp_path / "store", FINGERPRINT) as writer:
        writer.add_file("vocab.txt", b"x")
    attack(tmp_path / "store.partial" / ".building")
    if attack is absent:
        with (
            pytest.raises(UsageError, match="was not created by offramp"),
            StoreWriter(tmp_path / "store", FINGERPRINT),
        ):
            pass
        return
    with StoreWriter(tmp_path / "store", FINGERPRINT):
        assert names_in(tmp_path / "store.partial") == [".building", "graphs"]
        assert (tmp_path / "store.partial" / ".building").read_text() == FINGERPRINT


@pytest.mark.parametrize("attack", NO_FILES, ids=lambda attack: attack.__name__)
def test_a_cache_of_what_is_no_file_is_none(tmp_path, monkeypatch, attack):
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def remembered():
        return VerifiedMemory(tmp_path / "store", b"manifest")

    before = remembered()
    before.remember("shard", "identity")
    before.save()
    (path,) = (tmp_path / "verified").iterdir()
    assert remembered().knows("shard", "identity")
    attack(path)
    assert not remembered().knows("shard", "identity")


@pytest.mark.parametrize("attack", NO_FILES, ids=lambda attack: attack.__name__)
def test_a_checkpoint_of_a_training_that_is_no_file_is_none(tmp_path, monkeypatch, attack):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text("{}")
    (tmp_path / "train.json").write_text("{}")
    assert (last_checkpoint(tmp_path).name, read_config(tmp_path)) == ("checkpoint-2", {})
    attack(tmp_path / "checkpoint-2" / "trainer_state.json")
    attack(tmp_path / "train.json")
    assert (last_checkpoint(tmp_path).name, read_config(tmp_path)) == ("checkpoint-1", None)


def test_a_pipe_in_place_of_a_file_between_two_looks(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    real = Path.stat

    def stat(path, **options):
        found = real(path, **options)
        if path.name == "file":
            fifo(path)
        return found

    before = names_in("/proc/self/fd")
    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(OSError, match="a pipe, not a regular file") as caught:
        open_plain(tmp_path / "file")
    assert caught.value.errno == errno.ENXIO
    del caught
    assert names_in("/proc/self/fd") == before


def test_no_more_is_read_than_was_asked_for(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(200)))
    assert read_plain(tmp_path / "file", 100) == bytes(range(100))
    assert read_plain(tmp_path / "file") == bytes(range(200))
    assert json.loads(read_plain("/proc/sys/kernel/pid_max")) > 0  # its size is said to be 0

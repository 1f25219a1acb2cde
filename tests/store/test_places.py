"""An open store does not depend on the working folder, on its own name, or on many descriptors."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from offramp.errors import DamagedError
from offramp.store import Store, reader
from tests.store.small import flip, names_in, read, use


def everything(opened):
    """All bytes that a run reads, in one text for each file."""
    found = {file.file: opened.read_file(file) for file in (*opened.manifest.files, *opened.manifest.graphs.values())}
    found |= {name: read(opened, name) for name in opened.manifest.shards}
    rows = np.arange(0, 4096, 7)
    return found | {"word": opened.gather("rows", "word", rows)[0].tobytes()}


def change_folder(store, monkeypatch):
    monkeypatch.chdir("/")


def delete_the_working_folder(store, monkeypatch):
    (store.parent / "gone").mkdir()
    monkeypatch.chdir(store.parent / "gone")
    (store.parent / "gone").rmdir()


def rename_the_store(store, monkeypatch):
    store.rename(store.with_name("moved"))


def rename_the_parent(store, monkeypatch):
    store.parent.rename(store.parent.with_name("elsewhere"))


def put_another_store_there(store, monkeypatch):
    store.rename(store.with_name("moved"))
    shutil.copytree(store.with_name("moved"), store)
    for name in ("layer-00", "norm"):
        flip(store / f"{name}.safetensors", 8 * 4100)


CHANGES = [change_folder, delete_the_working_folder, rename_the_store, rename_the_parent, put_another_store_there]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("stay_open", [0, 64])
def test_an_open_store_reads_what_it_read(store, monkeypatch, change, stay_open):
    monkeypatch.setattr(reader, "MOST_OPEN", stay_open)
    (store.parent / "deep").mkdir()
    store = store.rename(store.parent / "deep" / "store")
    monkeypatch.chdir(store.parent)
    with Store("store", "always") as opened:
        before = everything(opened)
        change(store, monkeypatch)
        assert everything(opened) == before


def test_a_file_that_is_replaced_is_verified_again(store, monkeypatch):
    monkeypatch.setattr(reader, "MOST_OPEN", 0)
    with Store(store) as opened:
        read(opened, "norm")
        shutil.copy(store / "norm.safetensors", store / "copy")
        flip(store / "copy", 8 * 4100)
        (store / "copy").rename(store / "norm.safetensors")
        with pytest.raises(DamagedError, match="sha256 differs"):
            read(opened, "norm")


def read_with_few_descriptors(store, verify):
    """Read everything with a limit of open files that leaves room for a few more than this process has."""
    most = max(map(int, names_in("/proc/self/fd"))) + 4
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    assert most // 4 < 64
    use(store, verify)
    with Store(store, verify) as opened:
        wanted = everything(opened)
        assert everything(opened) == wanted


@pytest.mark.parametrize("verify", ["always", "first", "never"])
def test_few_descriptors_are_enough(store, verify):
    """In a process of its own, since files that other tests keep open count."""
    call = f"from tests.store.test_places import *; read_with_few_descriptors({str(store)!r}, {verify!r})"
    subprocess.run([sys.executable, "-c", call], cwd=Path(__file__).parents[2], check=True)


def test_no_more_descriptors_stay_open_than_a_quarter(store, monkeypatch):
    with Store(store) as opened:
        before = len(names_in("/proc/self/fd"))
        for limit, kept in ((0, 0), (2, 2), (64, 5)):
            monkeypatch.setattr(reader, "MOST_OPEN", limit)
            everything(opened)
            assert len(names_in("/proc/self/fd")) == before + kept

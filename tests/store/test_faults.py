"""A build that is killed, or whose disk is full, at system call after system call: the target is absent or whole.

Linux with strace, which injects the faults; without it the tests are skipped and say so.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from offramp.division import divide
from offramp.errors import DiskFullError
from offramp.store import verify
from tests.division.tiny import config_of, write_model
from tests.store.small import names_in
from tests.store.test_writer import tree_bytes

WHEN, WHEN_OPENAT = 400, 3000
"""More calls of one kind than a division makes, and more than the driver makes to import what it needs."""
PATH = re.compile(r'"([^"]*)"|<(/[^>]*)>')
SYSCALLS = "write|fsync|openat|mkdir|mkdirat|rename|renameat|renameat2|unlink|unlinkat|rmdir"
NUM_KILLS = 30
NUM_FULL = 16


class Call(NamedTuple):
    """One line of a trace. `paths` are those of its descriptors and arguments."""

    pid: int
    name: str
    text: str
    paths: tuple


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    write_model(folder, config_of(num_hidden_layers=1))
    (folder / "train.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def old_store(tmp_path_factory):
    """What --force replaces."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "old", config_of(num_hidden_layers=1, hidden_size=64))
    return divide(folder / "old", folder / "store")


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory):
    return tree_bytes(divide(model, tmp_path_factory.mktemp("stores") / "store"))


def drive(model, out, faults, *options):
    """Run the driver under strace. Returns fault -> (process id, how it ended)."""
    command = [sys.executable, Path(__file__).with_name("drive.py"), model, out, str(WHEN), str(WHEN_OPENAT), *faults]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([*options, *command], capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    return {fault: (int(pid), int(status)) for fault, pid, status in lines}


def strace(*options):
    return ["strace", "-f", "-y", "-qq", "-s", "0", *options, f"-etrace=/^({SYSCALLS})$"]


@pytest.fixture(scope="module")
def calls(model, old_store, tmp_path_factory):
    """fault -> the calls of a division that nothing disturbs; skips where system calls cannot be traced."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: faults of the system are not tested")
    out = tmp_path_factory.mktemp("calls")
    probe = subprocess.run(["strace", "-f", "-o", out / "probe", "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip("this user may not trace: faults of the system are not tested")
    shutil.copytree(old_store, out / "force:plain:0" / "store")
    ended = drive(model, out, ["plain:0", "force:plain:0"], *strace("-o", out / "log"))
    assert [status for _, status in ended.values()] == [0, 0]
    log = [parsed(line) for line in (out / "log").read_text().splitlines() if "(" in line and " = " in line]
    return {fault: [call for call in log if call.pid == pid] for fault, (pid, _) in ended.items()}


def parsed(line):
    pid, text = line.split(maxsplit=1)
    name = text.partition("(")[0]
    arguments = text.rpartition(" = ")[0]
    return Call(int(pid), name, text, tuple(quoted or shown for quoted, shown in PATH.findall(arguments)))


def faults_of(found):
    """The fault that hits each of these calls: its name, and the how manieth of that name it is."""
    numbers = Counter()
    for call in found:
        numbers[call.name] += 1
        yield f"{call.name}:{numbers[call.name]}"


def spread(faults, count):
    """So many of them at equal distances, the first and the last among them."""
    return [faults[round(place * (len(faults) - 1) / (count - 1))] for place in range(count)]


def inject(what, out):
    others = SYSCALLS.replace("|openat", "")
    every = ["-e", f"inject=/^({others})$:{what}:when={WHEN}", "-e", f"inject=openat:{what}:when={WHEN_OPENAT}"]
    return [*strace("-o", out / "log"), *every]


def assert_absent_or_whole(target):
    if target.exists():
        assert [check.problem for check in verify(target) if check.problem] == []


def assert_finishes(model, folder, reference):
    """The same command again ends with the same bytes, and with nothing beside them."""
    if not (folder / "store").exists():
        divide(model, folder / "store")
    assert tree_bytes(folder / "store") == reference
    assert names_in(folder) == ["store"]


def test_killed_at_any_call(model, reference, calls, tmp_path):
    faults = spread(list(faults_of(calls["plain:0"])), NUM_KILLS)
    ended = drive(model, tmp_path, faults, *inject("signal=SIGKILL", tmp_path))
    assert [ended[fault][1] for fault in faults] == [-9] * NUM_KILLS
    for fault in faults:
        assert_absent_or_whole(tmp_path / fault / "store")
        assert_finishes(model, tmp_path / fault, reference)


def test_killed_while_a_store_is_replaced(model, old_store, reference, calls, tmp_path):
    """The old store is there, or the new one, or for one call neither, and the old one beside. Never a mixture."""
    found = calls["force:plain:0"]
    start = next(number for number, call in enumerate(found) if call.text.endswith("/.retired>"))
    late = [f"force:{fault}" for fault in faults_of(found)][start:]
    faults = late[:6] + late[6:-3:4] + late[-3:]
    for fault in faults:
        shutil.copytree(old_store, tmp_path / fault / "store")
    old = tree_bytes(old_store)
    ended = drive(model, tmp_path, faults, *inject("signal=SIGKILL", tmp_path))
    assert [ended[fault][1] for fault in faults] == [-9] * len(faults)
    for fault in faults:
        target = tmp_path / fault / "store"
        assert_absent_or_whole(target)
        found_there = target if target.exists() else target.with_name("store.retired")
        left = {name: data for name, data in tree_bytes(found_there).items() if name != ".retired"}
        assert left in (old, reference) if target.exists() else left == old
        divide(model, target, force=True)
        assert tree_bytes(target) == reference
        assert names_in(tmp_path / fault) == ["store"]


def test_a_disk_that_is_full_at_any_call(model, reference, calls, tmp_path):
    kinds = ("write", "fsync", "mkdir", "rename")
    faults = spread([fault for fault in faults_of(calls["plain:0"]) if fault.startswith(kinds)], NUM_FULL)
    ended = drive(model, tmp_path, faults, *inject("error=ENOSPC", tmp_path))
    for fault in faults:
        assert ended[fault][1] == 10 + DiskFullError.exit_code, fault
        assert_absent_or_whole(tmp_path / fault / "store")
        assert_finishes(model, tmp_path / fault, reference)


def test_a_limit_on_the_size_of_files(model, reference, tmp_path):
    assert drive(model, tmp_path, ["limit:8192"])["limit:8192"][1] == 10 + DiskFullError.exit_code
    assert_finishes(model, tmp_path / "limit:8192", reference)


FULL_DISK = """
import os, sys
from offramp.errors import DiskFullError
from offramp.division import divide
from offramp.store import StoreWriter

def attempt():
    try:
        divide(sys.argv[1], sys.argv[2] + "/store")
    except DiskFullError as error:
        print(error, "|", *sorted(os.listdir(sys.argv[2])))

attempt()
StoreWriter.require_space = lambda *_: None
attempt()
"""


def test_a_small_disk(model, tmp_path):
    """A real one, of 40 KB: once the free space is asked for, once it is not and the disk says it."""
    mount = 'mount -t tmpfs -o size=40k none "$1" && shift && exec "$@"'
    shell = ["unshare", "-rm", "sh", "-c", mount, "sh", tmp_path]
    if shutil.which("unshare") is None or subprocess.run([*shell, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount: a real full disk is not tested")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*shell, sys.executable, "-c", FULL_DISK, model, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stderr
    asked, full = run.stdout.splitlines()
    assert re.fullmatch(r"\S+ \S+ needed, \S+ \S+ free - .* - free some space or .* \| store.partial", asked)
    assert re.fullmatch(
        r"no space left - .* - free some space and run again: finished shards are kept \| store.partial", full
    )


def test_every_rename_is_durable(calls):
    """Power may be lost at any time: bytes reach the disk before their name, and names before the name of the whole."""
    found = calls["plain:0"]
    renames = [number for number, call in enumerate(found) if call.name.startswith("rename")]
    assert len(renames) > 12
    for number in renames[:-1]:
        temporary, final = found[number].paths[-2:]
        about = [call.name for call in found[:number] if temporary in call.paths and call.name in ("write", "fsync")]
        assert about[-1] == "fsync" and "write" in about[:-1]
        assert any(is_fsync(call, Path(final).parent) for call in found[number:])
    partial, target = found[renames[-1]].paths[-2:]
    assert (Path(partial).name, Path(target).name) == ("store.partial", "store")
    changes = [n for n, call in enumerate(found) if call.name.startswith(("rename", "unlink")) and n < renames[-1]]
    assert found[changes[-2]].paths[-1].endswith("store.partial/offramp.json")
    assert any(is_fsync(call, Path(partial)) for call in found[changes[-1] : renames[-1]])
    assert any(is_fsync(call, Path(target).parent) for call in found[renames[-1] :])


def is_fsync(call, folder):
    return call.name == "fsync" and call.paths == (str(folder),)

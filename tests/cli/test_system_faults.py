"""Every error of the operating system, at every kind of call on offramp's own files, ends with a true sentence.

Linux with strace, which injects the errors; without it the tests are skipped and say so. A command that ends well in
spite of an error must have done what it does without one.
"""

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from offramp.store import verify

CALLS = """
    openat read pread64 preadv write fsync close lseek fstat newfstatat getdents64 flock mkdir rename unlink rmdir
    statfs readlink fadvise64 mmap
""".split()  # noqa: SIM905
ERRORS = """
    EIO EACCES EPERM ENOENT ENOSPC EDQUOT EROFS EMFILE ENFILE ENOMEM EINVAL EBADF ENOSYS EOPNOTSUPP ENOLCK ESTALE
    ELOOP ENOTDIR EISDIR EBUSY EXDEV EEXIST ENAMETOOLONG ETIMEDOUT EFBIG EAGAIN EINTR
""".split()  # noqa: SIM905
TEXTS = ["--text", "the bank fell today", "--budget", "2GiB", "--threads", "1"]
COMMANDS = {
    "run": ["run", "store", *TEXTS, "--trace", "trace.jsonl"],
    "table": ["run", "store", "--input", "texts.txt", *TEXTS[2:], "--json"],
    "ls": ["ls", "store", "--graph", "stages.svg"],
    "plan": ["plan", "store", *TEXTS],
    "verify": ["verify", "store"],
    "divide": ["divide", "model", "made"],
    "fill": ["divide", "model", "empty"],
}
SAMPLE = 21
"""Number of faults that CI tries, at equal distances among all."""


@pytest.fixture(scope="module")
def workplace(model, store, tmp_path_factory):
    """A folder with what the commands read, to be copied for each."""
    folder = tmp_path_factory.mktemp("faults") / "place"
    shutil.copytree(model, folder / "model")
    shutil.copytree(store, folder / "store")
    (folder / "empty").mkdir()
    (folder / "texts.txt").write_text("a film won\nthe bank fell\n")
    return folder


def paths_of(place):
    """All files of the workplace, and those that the commands may create."""
    names = ["", *(str(path.relative_to(place / "store")) for path in (place / "store").rglob("*")), ".building"]
    made = [place / folder / name for folder, name in product(("made", "made.partial", "empty"), names)]
    made += [path.with_name(path.name + ".tmp") for path in made]
    outputs = [place / name for name in ("trace.jsonl", "stages.svg", "cache", "cache/verified")]
    return sorted({str(path) for path in (place, *place.rglob("*"), *made, *outputs)})


@pytest.fixture(scope="module")
def spoil(workplace):
    """Run faults (command, system call, error, how manieth call); yields each with how its command ended."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: faults of the system are not tested")

    def run(faults, folder):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, Path(__file__).with_name("fault_driver.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, env=environment, text=True, **pipes) as driver:
            for number, (name, call, error, when) in enumerate(faults):
                place = folder / str(number)
                shutil.copytree(workplace, place)
                inject = f"{call}:error={error}:when={when}" if call else "getpid:error=EIO:when=9"
                job = {"place": str(place), "words": COMMANDS[name], "inject": inject, "paths": paths_of(place)}
                driver.stdin.write(json.dumps(job) + "\n")
                driver.stdin.flush()
                ended = json.loads(driver.stdout.readline())
                if ended is None:
                    pytest.skip("this user may not trace: faults of the system are not tested")
                yield (name, call, error, when), place, ended
                shutil.rmtree(place)
            driver.stdin.close()

    return run


@pytest.fixture(scope="module")
def wanted(spoil, tmp_path_factory):
    """What each command prints where nothing fails."""
    plain = [(name, "", "", 0) for name in COMMANDS]
    folder = tmp_path_factory.mktemp("plain")
    return {fault[0]: answers(ended["out"]) for fault, _, ended in spoil(plain, folder) if ended["code"] == 0}


def answers(out):
    """The lines without what differs between two runs, such as seconds and peaks."""
    lines = [line.partition(', "bytes_read"')[0] for line in out.splitlines()]
    return [line for line in lines if "budget" not in line and "slots" not in line]


def problem_of(fault, place, ended, wanted):
    """What is wrong with how a command ended, or None."""
    name, code, err = fault[0], ended["code"], ended["err"]
    if "Traceback" in err or "internal error" in err or code not in (0, 2, 3, 4, 5):
        return f"{fault}: exit {code}: {err[-400:]}"
    if code and not err.splitlines()[-1].startswith("offramp: error: ") and name != "verify":
        return f"{fault}: no sentence: {err[-400:]}"
    if code == 0 and answers(ended["out"]) != wanted[name]:
        return f"{fault}: another answer: {ended['out'][-400:]}"
    for target in ("made", "empty"):
        if (place / target / "offramp.json").exists() and any(check.problem for check in verify(place / target)):
            return f"{fault}: a damaged store"
    return None


def check(spoil, wanted, faults, folder):
    problems, codes = [], set()
    for fault, place, ended in spoil(faults, folder):
        problems.append(problem_of(fault, place, ended, wanted))
        codes.add(ended["code"])
    assert len(problems) == len(faults)
    assert "\n".join(filter(None, problems)) == ""
    assert {0, 2, 4} <= codes  # the errors do reach the commands


ALL = [(*fault, when) for when in (1, 2, 4, 9) for fault in product(COMMANDS, CALLS, ERRORS)]


def test_the_commands_end_well_where_nothing_fails(wanted):
    assert wanted.keys() == COMMANDS.keys()
    assert all(wanted[name] for name in ("run", "table", "ls", "plan", "verify"))


def test_some_errors_at_some_calls(spoil, wanted, tmp_path):
    check(spoil, wanted, ALL[:: len(ALL) // SAMPLE], tmp_path)


@pytest.mark.slow
def test_many_errors_at_every_call(spoil, wanted, tmp_path):
    check(spoil, wanted, ALL[::17], tmp_path)

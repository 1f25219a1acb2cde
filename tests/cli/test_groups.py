"""Real memory cgroups (version 1, as root): what a run does in one, says of it, and where it is too small."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

MEMORY = Path("/sys/fs/cgroup/memory")
MIB = 1 << 20
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0 or not (MEMORY / "memory.limit_in_bytes").exists(),
    reason="needs root and memory cgroups of version 1",
)


@pytest.fixture
def group():
    """A memory cgroup; what still runs in it at the end is killed."""
    folder = MEMORY / f"offramp-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    for _ in range(200):
        for process in (folder / "cgroup.procs").read_text().split():
            os.kill(int(process), 9)
        try:
            return folder.rmdir()
        except OSError:
            time.sleep(0.05)


def started(group, limit_bytes, *words):
    """Start a command in the group."""
    (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
    script = f'echo $$ > {group}/cgroup.procs; exec "$@"'
    command = ["/bin/sh", "-c", script, "group", sys.executable, "-m", "offramp", *map(str, words)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, text=True, **pipes)


def test_a_budget_that_is_left_to_the_container_keeps_its_limit(store, group):
    words = ("run", store, "--text", "the bank fell", "--json", "--budget", "auto")
    out, errors = started(group, 160 * MIB, *words).communicate(timeout=60)
    record = json.loads(out.splitlines()[-1])["record"]
    assert record["config"]["budget"] == "auto" and record["limited_by"] == "container", errors
    assert record["group_limit_bytes"] == 160 * MIB >= record["group_peak_bytes"] > 0
    assert record["budget_bytes"] == 160 * MIB - (2 * MIB + 160 * MIB // 256)


def test_a_container_below_the_floor_is_refused_at_once_with_the_number_for_it(store, group):
    began = time.monotonic()
    _, errors = (process := started(group, 40 * MIB, "run", store, "--text", "a film")).communicate(timeout=60)
    assert process.returncode == 3, errors
    assert time.monotonic() - began < 20
    named = int(re.search(r"raise the memory limit of the container to (\d+)MiB", errors)[1])
    out, errors = started(group, named * MIB, "run", store, "--text", "a film").communicate(timeout=60)
    assert out.count("exit 4/4") == 1, errors


def test_a_limit_that_is_lowered_while_it_runs_ends_with_an_answer_or_a_reason(store, group):
    process = started(group, 160 * MIB, "run", store, "--input", "-", "--json", "--budget", "auto")
    process.stdin.write("the bank fell\n")
    process.stdin.flush()
    first = json.loads(process.stdout.readline())
    (group / "memory.limit_in_bytes").write_text(str(72 * MIB))
    time.sleep(1.1)
    out, errors = process.communicate("the bank fell\n", timeout=60)
    if process.returncode == 3:
        assert "container of 72.0 MiB is too small" in errors
    else:
        assert process.returncode == 0, errors
        assert json.loads(out.splitlines()[0])["score"] == first["score"]

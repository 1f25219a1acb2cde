from __future__ import annotations

import errno
import fcntl
import os
import signal
import time

import pytest

from offramp.store import leases
from offramp.store.leases import LeasedFile, lease_obstacle
from tests.leases import CUT, num_leases, start


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 8192)
    return path


@pytest.fixture
def file(path):
    file = LeasedFile(os.open(path, os.O_RDONLY))
    obstacle = lease_obstacle(file.fd)
    if obstacle:
        pytest.skip(obstacle)
    yield file
    file.end_lease()
    file.close()


def test_a_lease_is_held_until_it_is_given_back(file):
    before = num_leases()
    for _ in range(2):
        assert file.take() is None and file.is_held
        assert num_leases() == before + 1
        file.end_lease()
        assert not file.is_held and num_leases() == before
        file.end_lease()


def test_a_file_that_is_not_closed_is_closed_with_the_object(path):
    fd = os.open(path, os.O_RDONLY)
    file = LeasedFile(fd)
    assert os.fstat(fd).st_size == 8192
    del file
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(fd)


def test_a_process_that_cuts_the_file_waits_and_no_signal_disturbs(file, path):
    seen = []
    before = {each: signal.signal(each, lambda *given: seen.append(given)) for each in (signal.SIGURG, signal.SIGIO)}
    try:
        assert file.take() is None
        cutting = start(CUT, path)
        deadline = time.monotonic() + 20
        while file.is_held and time.monotonic() < deadline:
            time.sleep(0.005)
        assert not file.is_held and cutting.poll() is None and path.stat().st_size == 8192
        file.end_lease()
        assert cutting.wait(20) == 0 and path.stat().st_size == 4096
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert seen == []


def test_a_file_that_is_open_for_writing_has_no_lease(file, path):
    with path.open("r+b"):
        assert file.take() == "a file is open for writing"
    assert file.take() is None


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.EACCES, "the store belongs to another user"), (errno.EINVAL, "gives no read leases")]
)
def test_a_refusal_says_why(file, monkeypatch, code, reason):
    def refuse(fd, command, *_):
        if command == fcntl.F_SETLEASE:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert reason in file.take()


@pytest.mark.parametrize(
    ("seconds", "reason"), [("0", None), ("45", None), ("10", None), ("9", "is 9 s"), ("soon", "cannot be read")]
)
def test_a_system_that_breaks_leases_soon_is_an_obstacle(file, tmp_path, monkeypatch, seconds, reason):
    told = tmp_path / "lease-break-time"
    told.write_text(seconds)
    monkeypatch.setattr(leases, "_BREAK_TIME", str(told))
    found = lease_obstacle(file.fd)
    assert found is None if reason is None else reason in found
    told.unlink()
    assert "cannot be read" in lease_obstacle(file.fd)


def test_file_systems_of_servers_and_unknown_ones_are_an_obstacle(file, monkeypatch):
    assert leases._type_of(file.fd) in leases._LOCAL
    monkeypatch.setattr(leases, "_type_of", lambda _: 0x6969)  # NFS
    assert "may change files in spite of a read lease" in lease_obstacle(file.fd)


def test_a_system_without_leases_is_an_obstacle(file, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delattr(fcntl, "F_SETLEASE")
        assert lease_obstacle(file.fd) == "this system has no read leases"
        file.end_lease()

"""What may lie in place of a regular file. Each function puts it there, and removes the file."""

import os
import signal
import socket
from contextlib import contextmanager

import pytest


def fifo(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def link(path):
    path.rename(path.with_name(".moved"))
    path.symlink_to(".moved")


def link_to_device(path):
    """A device that never ends, and that anybody may name."""
    path.unlink()
    path.symlink_to("/dev/zero")


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


def folder(path):
    path.unlink()
    path.mkdir()


def unix_socket(path):
    path.unlink()
    folder = os.open(path.parent, os.O_DIRECTORY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{folder}/{path.name}")  # an address has room for 107 bytes only
    os.close(folder)


def absent(path):
    path.unlink()


@contextmanager
def no_hang(seconds):
    """Fail a test that takes longer: some libraries wait for a pipe without returning to Python."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

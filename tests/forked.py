"""A forked child in which a test goes on for a while."""

import contextlib
import os
import signal
import traceback
import warnings


def in_child(act, seconds=20):
    """Exit status of a forked child that calls `act`: 0, 1 after an error, or minus the signal that ended it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # later Pythons warn where there are threads
        child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        code = 1
        try:
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


CHANGES = ("rename", "replace", "unlink", "rmdir", "mkdir", "ftruncate", "write", "fsync")
"""Functions of `os` that change files."""


@contextlib.contextmanager
def changing(before):
    """Call `before` at each call that changes files. Nothing waits for the disk."""
    real = {name: getattr(os, name) for name in CHANGES}

    def wrapped(function):
        def call(*args, **kwargs):
            before()
            return None if function is real["fsync"] else function(*args, **kwargs)

        return call

    for name, function in real.items():
        setattr(os, name, wrapped(function))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def num_changes(act):
    """How often `act` changes files."""
    calls = []
    with changing(lambda: calls.append(None)):
        act()
    return len(calls)


def die_at(number, act):
    """Call `act` in a forked child that dies when it would change files for the `number`-th time, from 0.

    Nothing is cleaned up, as after SIGKILL. Returns whether it died, else it has ended well.
    """
    left = [number]

    def count_down():
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)

    with changing(count_down):
        code = in_child(act)
    assert code in (0, 9), code
    return code == 9

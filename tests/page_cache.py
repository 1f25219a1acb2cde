"""Control over what the page cache holds of a file, so that a test does not depend on other processes."""

import contextlib
import ctypes
import mmap
import os

import numpy as np


@contextlib.contextmanager
def held(*paths):
    """Keep all pages of the files in the page cache: mapped pages are not dropped, locked pages are not reclaimed."""
    mlock = ctypes.CDLL(None, use_errno=True).mlock
    mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    with contextlib.ExitStack() as stack:
        for path in paths:
            with open(path, "rb") as file:
                pages = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            stack.enter_context(pages)
            array = np.frombuffer(pages, np.uint8)
            if mlock(array.ctypes.data, array.size):  # a limit of locked memory: mapped pages must do
                array[:: mmap.PAGESIZE].sum()
            del array  # the mapping cannot be closed while an array refers to it
        yield


def drop(path):
    """Remove the pages of one file from the page cache, unless a process maps them."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)  # dirty pages cannot be removed
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)

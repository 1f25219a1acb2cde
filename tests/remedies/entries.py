"""Entries of the table message -> action -> result, and the place in which they are carried out.

An entry names a place (`store/reader.py: no such store`, or enough of it to be unique), work that fails there, words of
its remedy, and the action that these words name. Afterwards the same work passes; `again=False` where the action is
itself the corrected work. `work` and `act` are functions, or command lines.
"""

import argparse
import contextlib
import io
import json
import re
import shlex
import shutil
import sys
import warnings
from dataclasses import dataclass

from offramp import errors
from offramp.cli import main
from offramp.store.manifest import seal
from tests.remedies.places import SOURCE

TEXT = "the bank fell today"
SIMULATED = {
    "memory": "the allocation fails by a replaced function or limit, which the action takes away or raises",
    "disk space": "the write fails with ENOSPC, which the action takes away",
    "permission": "the call fails with EACCES where the user is root, which the action takes away",
    "library": "the import fails by an entry in sys.modules, which the action takes away",
    "python": "sys.version_info is replaced, and put back",
    "network": "the library that downloads is replaced by one that fails, and put back",
    "processes": "the other process is one that this test starts, or a lock that it holds",
    "device": "the call fails with its error number, which the action takes away",
}
"""What cannot be had in a test -> how it is stood in for."""
CLOSED = {
    "research": "asks for a model, a processor or a task of another kind: the choice is the reader's, not a call",
    "torn": "only where a file changes between two reads of one command; the remedy is that of its twin",
    "unreachable": "guards what only files of another program, another library or a GPU break; no input of a test does",
    "shared": "the same words, chosen by the same function, are carried out in another entry",
}
"""Remedies that are not carried out: kind -> reason."""


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    place: str
    work: object
    says: str
    act: object
    again: bool = True
    slow: bool = False
    simulates: str | None = None
    closed: str | None = None

    def __post_init__(self):
        assert self.closed is None or self.closed in CLOSED
        assert self.simulates is None or self.simulates in SIMULATED

    @property
    def id(self):
        return re.sub(r"[^a-z0-9]+", "-", f"{self.place} {self.says}".lower()).strip("-")[:90]

    def places(self, places):
        """Those of the places that the entry names, and that give its remedy: by the whole key, or by its beginning."""
        found = [place for place in places if place.key == self.place]
        found = found or [place for place in places if place.key.startswith(self.place)]
        return [place for place in found if any(map(self.covers, place.remedies))]

    def covers(self, remedy):
        """Whether the words of the entry are those of a remedy, as far as the tree tells it."""
        pieces = [piece for piece in remedy.split("{}") if len(piece.strip()) > 3]
        if not pieces:
            return True
        return self.says in remedy or any(piece.strip() in self.says or self.says in piece for piece in pieces)

    @property
    def action(self):
        """The action in words."""
        act = self.act
        return f"`offramp {act}`" if isinstance(act, str) else getattr(act, "says", act.__name__).replace("_", " ")


def corrected(place, wrong, says, right, **options):
    """An entry whose action is the corrected call."""
    return Entry(place, wrong, says, said_by(right, "the corrected call"), again=False, **options)


def said_by(work, words):
    """Give a function or a command the words that the table prints for it."""
    if isinstance(work, str):
        return work

    def act(w, said):
        work(w)

    act.says = words
    return act


def closed(place, kind, says=""):
    """An entry of a remedy that is not carried out."""
    return Entry(place, None, says, None, closed=kind)


def options(place, command, says, *additions, **more):
    """An entry of a command that lacks an option: every option that the remedy names is tried, by itself."""

    def try_each(w, said):
        remedy = said.rpartition(" - ")[2]
        named, tried = set(re.findall(r"--[a-z-]+", remedy)), set(re.findall(r"--[a-z-]+", " ".join(additions)))
        assert named <= tried, named - tried
        for addition in additions:
            w.run(f"{command} {addition}")

    try_each.says = f"`offramp {command}` with {', '.join(f'`{each}`' for each in additions)}"
    return Entry(place, command, says, try_each, again=False, **more)


def named_command(more="", **given):
    """An action: the command that the message names, with its placeholders replaced, and `more` words."""

    def run_it(w, said):
        found = re.search(r"offramp ([a-z]+)((?: (?:--[a-z-]+|[A-Z][A-Za-z_.]*|\S*[\d=,./]\S*))*)", said)
        assert found, said
        words = [given.get(word, word) for word in (found[1], *found[2].split())]
        w.run(f"{' '.join(words)} {more}")

    run_it.says = "the command that the message names"
    return run_it


class CommandError(Exception):
    """A command that ended with an error."""


class Bench:
    """A folder of its own as the working folder, with copies of what was made once for all entries."""

    def __init__(self, folder, made, monkeypatch):
        self.folder, self.made, self._monkeypatch = folder, made, monkeypatch
        self._done, self._kept = set(), []
        monkeypatch.chdir(folder)

    def __truediv__(self, name):
        return self.folder / name

    def copy(self, name):
        """Copy what was made once into the working folder. Returns its path."""
        target = self.folder / name
        if not target.exists():
            source = getattr(self.made, name)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        return target

    @property
    def model(self):
        """A folder of a tiny BERT with exits and a tokenizer."""
        return self.copy("model")

    @property
    def store(self):
        """Its store."""
        return self.copy("store")

    def run(self, line):
        """Run a command. Folders that it names are copied here if they are not here. Returns stdout."""
        words = shlex.split(line)
        for name in {word.partition("/")[0] for word in words[1:]} & set(self.made.NAMES):
            self.copy(name)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(words)
            except SystemExit as stop:
                code = stop.code
        if code:
            raise CommandError(f"exit {code}: {err.getvalue()}")
        return out.getvalue()

    def once(self, spoil):
        """Call a function, unless it was called before."""
        if spoil not in self._done:
            self._done.add(spoil)
            spoil(self)

    def keep(self, release):
        """Remember a function that `let_go` calls."""
        self._kept.append(release)

    def let_go(self):
        """Call what was kept."""
        while self._kept:
            self._kept.pop()()

    def patch(self, owner, name, value):
        """Replace an attribute until `undo`."""
        self._monkeypatch.setattr(owner, name, value)

    def without(self, *libraries):
        """Let the import of libraries fail until `undo`."""
        for library in libraries:
            for name in [each for each in sys.modules if f"{each}.".startswith(f"{library}.")]:
                self._monkeypatch.delitem(sys.modules, name)
            if not library.startswith("offramp."):
                self._monkeypatch.setitem(sys.modules, library, None)

    def undo(self):
        """Undo `patch` and `without`."""
        self._monkeypatch.undo()
        self._monkeypatch.chdir(self.folder)

    def edit(self, change, name="store"):
        """Change the manifest of a store, and seal it again."""
        file = self.copy(name) / "offramp.json"
        tree = json.loads(file.read_text())
        del tree["sha256"]
        changed = change(tree)
        file.write_bytes(seal(tree if changed is None else changed))

    def edit_json(self, name, change):
        """Change a JSON file of the working folder."""
        place = name.partition("/")[0]
        file = (self.copy(place) if place in self.made.NAMES else self.folder / place).parent / name
        tree = json.loads(file.read_text())
        changed = change(tree)
        file.write_text(json.dumps(tree if changed is None else changed))

    def carry_out(self, work, *said):
        """Do work that is a function or a command."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.run(work) if isinstance(work, str) else work(self, *said)


@dataclass(frozen=True)
class Seen:
    """An error that was made: where, and its message."""

    file: str
    line: int
    message: str

    def is_at(self, place):
        return self.file == str(SOURCE / place.file) and place.first <= self.line <= place.last


@contextlib.contextmanager
def watched(seen):
    """Append to `seen` all errors of offramp and argparse that are made, and built-in ones that end the block."""
    before, before_argument = errors.OfframpError.__init__, argparse.ArgumentError.__init__

    def make(self, *args, **kwargs):
        before(self, *args, **kwargs)
        frame = sys._getframe(1)
        while frame.f_locals.get("self") is self:  # constructors of its classes
            frame = frame.f_back
        seen.append(Seen(frame.f_code.co_filename, frame.f_lineno, str(self)))

    def make_argument(self, argument, message):
        before_argument(self, argument, message)
        frame = sys._getframe(1)
        seen.append(Seen(frame.f_code.co_filename, frame.f_lineno, message))

    errors.OfframpError.__init__, argparse.ArgumentError.__init__ = make, make_argument
    try:
        yield
    except Exception as error:
        seen += _traced(error)
        raise
    finally:
        errors.OfframpError.__init__, argparse.ArgumentError.__init__ = before, before_argument


def _traced(error):
    """The innermost line of every traceback of an error and those before it."""
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename.startswith(str(SOURCE)):
                yield Seen(trace.tb_frame.f_code.co_filename, trace.tb_lineno, str(error))
            trace = trace.tb_next
        error = error.__cause__ or error.__context__


def provoke(entry, w):
    """Do the work of an entry, which must fail. Returns the errors seen."""
    seen = []
    try:
        with watched(seen):
            w.carry_out(entry.work)
    except (Exception, SystemExit):
        return seen
    raise AssertionError(f"{entry.place}: the work does not fail")

"""Remedies of the rooms store, backends and errors: damaged stores, full disks, taken targets."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np

import offramp
from offramp.checkpoints.weights import SafetensorsWeights
from offramp.store import Store, files, folders
from tests.remedies.entries import TEXT, Entry, closed
from tests.store.small import flip

DIVIDE = "divide model store --force"
AGAIN = "divide the model again"


def use(w, **options):
    """Classify one text with exits."""
    with offramp.load(w.store, **{"exit": "confidence:0.5", "threads": 1, "verify": "always", **options}) as classifier:
        return classifier.predict([TEXT])


def spoilt(spoil, use=use):
    """Work that first spoils something, once."""

    def work(w):
        w.once(spoil)
        return w.carry_out(use)

    return work


def failing(owner, name, error, when=lambda *args, **kwargs: True):
    """Spoil a function until `undo`: it raises an error."""

    def spoil(w):
        before = getattr(owner, name)

        def fail(*args, **kwargs):
            if when(*args, **kwargs):
                raise error
            return before(*args, **kwargs)

        w.patch(owner, name, fail)

    return spoil


def undo(w, said):
    """take the fault away"""
    w.undo()


undo.says = "the fault is taken away"


def os_error(name):
    number = getattr(errno, name)
    return OSError(number, os.strerror(number))


def damaged(place, spoil, use=use):
    """An entry of a damaged store, which is divided again."""
    return Entry(place, spoilt(spoil, use), AGAIN, DIVIDE)


def edited(place, change):
    """An entry of a store whose manifest somebody changed and sealed."""
    return damaged(place, lambda w: w.edit(change))


def write(name, data):
    """Spoil a file by writing others bytes."""
    return lambda w: (w.store / name).write_bytes(data)


def shard(w, end=".safetensors"):
    return sorted(path for path in w.store.glob(f"*{end}") if not path.name.startswith("exits"))[0]


def cut(w):
    """Shorten the first shard."""
    os.truncate(shard(w), shard(w).stat().st_size - 1)


def named_file(name, change, store="store"):
    """Change a file of a store together with its description in the manifest."""

    def spoil(w):
        from hashlib import sha256

        path = w.copy(store) / name
        data = change(path.read_bytes())
        path.write_bytes(data)

        def described(tree):
            if isinstance(tree, dict):
                if tree.get("file") == name:
                    tree.update(bytes=len(data), sha256=sha256(data).hexdigest())
                for each in tree.values():
                    described(each)
            elif isinstance(tree, list):
                for each in tree:
                    described(each)

        w.edit(described, store)

    return spoil


def exits_json(tree):
    """Spoil the description of the exits of a store; training writes it again, here the folder that was divided."""
    return named_file("exits.json", lambda data: json.dumps(tree(json.loads(data))).encode())


def exit_heads(w):
    """Let the heads of a store have another width."""
    from safetensors.numpy import load, save

    def narrow(data):
        return save({name: array[..., :-1].copy() for name, array in load(data).items()})

    named_file("exits.safetensors", narrow)(w)


def full(w):
    """A disk without space for the store."""
    failing(
        os,
        "write",
        os_error("ENOSPC"),
        lambda fd, *rest: str(Path(f"/proc/self/fd/{fd}").readlink()).startswith(str(w.folder)),
    )(w)


def link(w):
    """Put a link in the place of a file."""
    file = w.store / "config.json"
    file.rename(w / "elsewhere")
    file.symlink_to(w / "elsewhere")


def copy_the_file(w, said):
    """Put the file itself in place of the link."""
    file = w.store / "config.json"
    file.unlink()
    shutil.copy(w / "elsewhere", file)


def read_config(w):
    with Store(w.store) as store:
        return [store.read_file(file) for file in store.manifest.files]


def rename_target(w, said):
    w.run("divide model another")


def then(act, line):
    """Follow an action by a command."""

    def both(w, said):
        act(w, said)
        w.run(line)

    both.says = f"{act.says}, then `offramp {line}`"
    return both


rename_target.says = "`offramp divide model another`"


def move_away(name):
    def act(w, said):
        (w / name).rename(w / "moved")

    act.says = f"`mv {name} moved`"
    return act


def folder_with(name, file="notes.txt"):
    def spoil(w):
        (w / name).mkdir()
        (w / name / file).write_text("mine")

    return spoil


def locked(w):
    """Another process builds the store."""
    w.keep(files.lock_folder(w / "another.partial", "", ""))


def release(w, said):
    """wait until the other process has finished"""
    w.let_go()


release.says = "the other process ends"


def written(w, name="out.csv"):
    files.write_atomic(w / name, [b"x"])


def writing(w):
    """Another process writes the file."""
    file = files.NewFile(w / "out.csv")
    file.__enter__()
    w.keep(file.__exit__)


def taken_temporary(w):
    (w / "out.csv.tmp").symlink_to(w / "dear")


def remove_temporary(w, said):
    """it is removed"""
    (w / "out.csv.tmp").unlink()


remove_temporary.says = "it is removed"


def write_another(w, said):
    """the file gets another name"""
    written(w, "another.csv")


write_another.says = "the file gets another name"


def no_locks(w):
    failing(files.fcntl, "flock", os_error("ENOLCK"))(w)
    (w / "another.partial.lock").touch()


def remove_owner(w, said):
    (path,) = [word for word in said.split(" - ") if word.endswith(".lock")]
    Path(path).unlink()


remove_owner.says = "the file that the message names is removed"


def gone(w):
    """Delete the working folder."""
    (w / "gone").mkdir()
    os.chdir(w / "gone")
    (w / "gone").rmdir()


def to_a_folder(w, said):
    os.chdir(w.folder)


to_a_folder.says = "`cd` to a folder that exists"


def gather_while_cut(w):
    """Read rows of a file that another process cuts between two reads, once."""
    with Store(w.store, "never") as store:
        shard = next(shard for shard in store.manifest.shards.values() if shard.blocks is not None)
        role, height = shard.tensors[0].role, shard.tensors[0].shape[0]
        store.gather(shard.name, role, np.array([0]))
        w.once(cut_tables)
        store.gather(shard.name, role, np.array([height - 1]))


def cut_tables(w):
    os.truncate(next(w.store.glob("*rows.safetensors")), 4100)


def half_replaced(w):
    """A division was stopped between two renames."""
    w.patch(folders, "WAIT_SECONDS", 0.05)
    (w.store / folders.RETIRED).touch()
    w.store.rename(w / f"another{folders.RETIRED}")


def read_after_close(w):
    """Read from a store that was closed before another one took its place, once."""
    with Store(w.store) as store:
        store.close()
        w.once(another_store)
        store.read_file(store.manifest.files[0])


def another_store(w):
    w.edit(lambda tree: tree["source"].update(fingerprint="1" * 64))


def nothing_to_do(w, said):
    """the work is done again, which opens it"""


nothing_to_do.says = "the store is opened again"


def mounted(w):
    """The store lies on a mount point."""
    w.patch(os.path, "ismount", lambda path: str(path) == str(w.store))


def remove_files(w, said):
    for path in w.store.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


remove_files.says = "`rm -r store/*`"


def packed(w):
    """A weight of half a byte a value, which safetensors can hold."""
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (w.model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0")


def as_halves(w, said):
    """Convert the weights to F16, as the message says."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(w.made.model / "model.safetensors")
    halves = {name: array.astype(np.float16) for name, array in tensors.items()}
    save_file(halves, w.model / "model.safetensors", {"format": "pt"})


as_halves.says = "the weights are converted to F16"


def headers(w):
    """Read what the files of a model say of its tensors."""
    SafetensorsWeights(sorted(w.model.glob("*.safetensors"))).close()


def fragments(w, first, last):
    """Write a file of that many tensors without values."""
    tensors = (f'"t{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(first, last))
    header = f"{{{','.join(tensors)}}}".encode()
    (w.model / f"model-{first}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def in_several_files(w, said):
    """Save the tensors in several files"""
    (w.model / "model-0.safetensors").unlink()
    for first in (0, 30_000):
        fragments(w, first, first + 30_000)


def unrecorded(content):
    return spoilt(
        lambda w: (w.model / "trained-rows.json").write_bytes(content),
        "eval model --train mine.tsv --split dev --max-length 16",
    )


def record_again(w, said):
    """The folder has the record of its training."""
    from offramp.store.trained_rows import TrainedRows

    (w.model / "trained-rows.json").unlink()
    (w.model / "trained-rows.json").write_bytes(TrainedRows("ab" * 16, (), np.zeros(0, np.uint64)).to_bytes())


record_again.says = "the folder is put back whole"


def pipe_of_rows(w):
    os.mkfifo(w.model / "trained-rows.json")


def read_rows(w):
    from offramp.store.trained_rows import read_trained_rows

    return read_trained_rows(w.model)


def remove_record(w, said):
    (w.model / "trained-rows.json").unlink()


remove_record.says = "`rm trained-rows.json`"


BUSY = (
    "another sweep writes to this folder | another process uses this temporary folder"
    " | another process is building this store | another training writes here"
)


TABLE = [
    damaged("store/parsing.py: manifest is not JSON", write("offramp.json", b"{")),
    damaged("store/parsing.py: manifest is not a JSON object", write("offramp.json", b"[]")),
    edited("store/parsing.py: manifest: {}", lambda tree: tree.update(program={})),
    damaged("store/parsing.py: manifest was changed", lambda w: flip(w.store / "offramp.json", 8 * 60)),
    damaged("store/parsing.py: labels: {}", named_file("labels.json", lambda data: b'["one"]')),
    Entry(
        "store/parsing.py: manifest has format",
        spoilt(lambda w: w.edit(lambda tree: {**tree, "format": 99})),
        "divide again",
        DIVIDE,
    ),
    damaged("store/files.py: file is missing", lambda w: (w.store / "exits.json").unlink()),
    damaged("store/files.py: file has {} bytes", cut),
    damaged("store/files.py: sha256 differs", lambda w: flip(w.store / "exits.json", 9)),
    damaged("store/files.py: file ends inside a tensor", lambda w: None, gather_while_cut),
    damaged("store/reader.py: sha256 differs", lambda w: flip(shard(w), 8 * 5000)),
    damaged("store/reader.py: manifest of {} bytes", write("offramp.json", b" " * (3 << 20))),
    Entry("store/files.py: not a regular file", spoilt(link, read_config), "copy the file itself", copy_the_file),
    Entry(
        "store/files.py: file cannot be read",
        spoilt(failing(os, "open", os_error("EACCES"), lambda path, *rest, **more: str(path).startswith("layer")), use),
        "check permissions and disk",
        undo,
        simulates="permission",
    ),
    Entry(
        "store/files.py: the working folder was deleted",
        spoilt(gone, lambda w: files.absolute("x")),
        "change to a folder that exists",
        to_a_folder,
    ),
    Entry(
        "errors.py: {} ({})",
        spoilt(full, "divide model another"),
        "free some space and run again",
        undo,
        simulates="disk space",
    ),
    *(
        Entry("store/folders.py: the store is being replaced", spoilt(half_replaced, "ls another"), says, rename_target)
        for says in ("run again when the division has finished", "divide again if it was killed")
    ),
    Entry("store/reader.py: another store has taken the place", read_after_close, "open it again", nothing_to_do),
    Entry(
        "store/writer.py: {} needed, {} free",
        spoilt(
            lambda w: w.patch(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1)),
            "divide model another",
        ),
        "free some space",
        undo,
        simulates="disk space",
    ),
    Entry(
        "store/files.py: {} ({})",
        spoilt(lambda w: (w / "file").write_text(""), "divide model file/store"),
        "choose another folder",
        rename_target,
        again=False,
    ),
    Entry(
        f"store/files.py: {BUSY}",
        spoilt(locked, "divide model another"),
        "wait until it has finished",
        release,
        simulates="processes",
    ),
    Entry(
        f"store/files.py: {BUSY} | {{}}",
        spoilt(no_locks, "divide model another"),
        "remove this file if it was killed",
        remove_owner,
        simulates="processes",
    ),
    Entry(
        "store/files.py: another process is writing this file",
        spoilt(writing, written),
        "wait until it has finished",
        release,
        simulates="processes",
    ),
    Entry(
        "store/files.py: another process is writing this file",
        spoilt(writing, written),
        "or name another file",
        write_another,
        again=False,
        simulates="processes",
    ),
    Entry(
        "store/files.py: is a link, a pipe, a device or a folder",
        spoilt(taken_temporary, written),
        "remove it",
        remove_temporary,
    ),
    Entry(
        "store/files.py: is a link, a pipe, a device or a folder",
        spoilt(taken_temporary, written),
        "or name another file",
        write_another,
        again=False,
    ),
    Entry(
        "errors.py: not a folder | no such {}",
        "ls another",
        "offramp divide MODEL STORE makes one",
        rename_target,
        again=True,
    ),
    Entry(
        "store/reader.py: not a store",
        spoilt(folder_with("mine"), "ls mine"),
        "offramp divide MODEL STORE makes one under a new name",
        then(rename_target, "ls another"),
        again=False,
    ),
    Entry(
        "store/writer.py: target exists",
        spoilt(lambda w: w.store, "divide model store"),
        "choose another name, or",
        rename_target,
        again=False,
    ),
    Entry(
        "store/writer.py: target exists",
        spoilt(lambda w: w.store, "divide model store"),
        "or --force to replace it",
        DIVIDE,
        again=False,
    ),
    Entry(
        "store/writer.py: target exists and is not a store",
        spoilt(folder_with("mine"), "divide model mine --force"),
        "choose another name",
        rename_target,
        again=False,
    ),
    Entry(
        "store/writer.py: --force needs this name",
        spoilt(lambda w: (w.store, folder_with("store.retired")(w)), DIVIDE),
        "move it away",
        move_away("store.retired"),
    ),
    Entry(
        "store/writer.py: a folder with this name exists",
        spoilt(folder_with("another.partial"), "divide model another"),
        "move it away",
        move_away("another.partial"),
    ),
    closed("store/manifest.py: manifest of {} bytes", "research"),
    Entry(
        "store/writer.py: a mount point cannot be replaced", spoilt(mounted, DIVIDE), "remove its files", remove_files
    ),
    Entry(
        "store/writer.py: a mount point cannot be replaced",
        spoilt(mounted, DIVIDE),
        "or choose another name",
        rename_target,
        again=False,
    ),
    Entry(
        "store/safetensors.py: tensor {} is {}, whose values",
        spoilt(packed, "divide model another"),
        "convert it to a dtype of whole bytes, such as F8_E4M3 or F16",
        as_halves,
    ),
    Entry(
        "store/safetensors.py: header of more than {} values",
        spoilt(lambda w: fragments(w, 0, 60_000), headers),
        "save the tensors in several files, each with fewer of them",
        in_several_files,
    ),
    *(
        Entry("store/trained_rows.py: the record", spoilt(pipe_of_rows, read_rows), says, act)
        for says, act in (("get the folder again", record_again), ("or remove the file", remove_record))
    ),
    *(
        Entry(f"store/trained_rows.py: {place}", unrecorded(content), says, act)
        for place, content in (("digests of rows", b'{"format": 9}'), ("not the digests", b"{}"))
        for says, act in (("get the folder again", record_again), ("or remove the file", remove_record))
    ),
]

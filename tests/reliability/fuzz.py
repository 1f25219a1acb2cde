"""Fuzzing of the parsers: `python -m tests.reliability.fuzz TARGET HONEST RUNS CORPUS`.

Each execution must end with a value or an error of the documentation. With atheris installed, coverage of offramp
guides the mutations, and inputs that reach new code are kept in CORPUS; without it, mutations of the seeds are drawn
at random.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import atheris  # type: ignore[import-not-found]
except ImportError:
    atheris = None

Parse = Callable[[bytes], Any]
MOST_SECONDS = 10


@dataclass(frozen=True)
class Target:
    """One parser, and valid inputs in the honest folder to begin with."""

    make: Callable[[Path], Parse]
    """Import the parser and return it; the argument is a scratch folder."""
    seeds: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()


def _manifest(scratch: Path) -> Parse:
    from offramp.store.parsing import loads

    return loads


def _header(scratch: Path) -> Parse:
    from offramp.store.safetensors import read_header

    path = scratch / "x.safetensors"

    def parse(data: bytes) -> Any:
        path.write_bytes(data)
        fd = os.open(path, os.O_RDONLY)
        try:
            return read_header(fd, len(data), path)
        finally:
            os.close(fd)

    return parse


def _exits(scratch: Path) -> Parse:
    from offramp.store.exits import parse_exits

    return lambda data: parse_exits(data, "exits.json")


def _labels(scratch: Path) -> Parse:
    from offramp.store.parsing import parse_labels

    return lambda data: parse_labels(data, 3, "labels.json")


def _of_file(name: str, get: Callable[[], Callable[[Path], Any]]) -> Callable[[Path], Parse]:
    """Return the maker of a parser of files."""

    def make(scratch: Path) -> Parse:
        read, path = get(), scratch / name

        def parse(data: bytes) -> Any:
            path.write_bytes(data)
            return read(path)

        return parse

    return make


def _policy_file() -> Callable[[Path], Any]:
    from offramp.session.policy_files import policy_of
    from offramp.store.policy_file import read_policy

    return lambda path: policy_of(read_policy(path), path)


def _profile() -> Callable[[Path], Any]:
    from offramp.runtime.profile import load_profile

    return load_profile


def _transcript() -> Callable[[Path], Any]:
    from offramp.store.transcript import _read_description

    return _read_description


def _settings() -> Callable[[Path], Any]:
    from offramp.tasks.model_files import ModelFiles
    from offramp.tasks.tokenizer_settings import read_settings

    def read(path: Path) -> Any:
        (path.parent / "tokenizer.json").touch()  # it must be there
        return read_settings(ModelFiles(path.parent))

    return read


def _source() -> Callable[[Path], Any]:
    from offramp.checkpoints.families import family_of
    from offramp.checkpoints.source import open_source

    def read(path: Path) -> Any:
        weights = path.with_name("model.safetensors")
        if path.name == "config.json" and not weights.exists():
            weights.symlink_to(path.parent / "honest/names/model/model.safetensors")
        config = open_source(path.parent).config
        return family_of(config).encoder(config)

    return read


def _rows() -> Callable[[Path], Any]:
    from offramp.store.trained_rows import parse_trained_rows

    return lambda path: parse_trained_rows(path.read_bytes(), path)


def _inputs(name: str) -> Callable[[], Callable[[Path], Any]]:
    def get() -> Callable[[Path], Any]:
        from offramp.session.inputs import InputSource

        return lambda path: list(InputSource((), (), str(path)).read(lambda line: None))

    return get


def _grammar(scratch: Path) -> Parse:
    from offramp.policies import parse

    return lambda data: parse(data.decode(errors="replace"))


def _units(scratch: Path) -> Parse:
    from offramp.units import parse_duration, parse_size

    def parse(data: bytes) -> Any:
        text = data.decode(errors="replace")
        for each in (parse_size, parse_duration):
            with contextlib.suppress(ValueError):  # the command line reports these as wrong arguments
                each(text)

    return parse


def _torch_graph(scratch: Path) -> Parse:
    from offramp.backends.torch_graphs import CapturedGraph

    return lambda data: CapturedGraph(data, "graph")


TARGETS = {
    "manifest": Target(
        _manifest,
        tuple(f"{base}/store/offramp.json" for base in ("names", "captured", "image", "arrays", "format1", "format2")),
    ),
    "safetensors header": Target(_header, ("names/store/exits.safetensors", "names/store/layer-01-up.safetensors")),
    "exits.json": Target(_exits, ("names/store/exits.json", "captured/store/exits.json")),
    "labels.json": Target(_labels, ("names/store/labels.json",)),
    "policy file": Target(_of_file("policy.json", _policy_file), ("names/policy.json", "captured/policy.json")),
    "device profile": Target(_of_file("profile.json", _profile), ("names/profile.json",)),
    "transcript": Target(_of_file("tune.json", _transcript), ("names/transcripts/tune.json",)),
    "tokenizer settings": Target(
        _of_file("offramp_tokenizer.json", _settings), ("names/store/offramp_tokenizer.json",)
    ),
    "exit grammar": Target(
        _grammar,
        texts=(
            "confidence:0.9",
            "patience:3",
            "stage:2 | margin:0.5",
            "(entropy:0.2 & patience:2)",
            "none",
            "votes:2@0.5",
        ),
    ),
    "sizes and durations": Target(_units, texts=("128MiB", "40ms", "1.5GiB", "2 s", "100us")),
    "graph for PyTorch": Target(_torch_graph, ("captured/store/graphs/*.json", "arrays/store/graphs/*.json")),
    "config.json": Target(_of_file("config.json", _source), ("names/model/config.json",)),
    "safetensors index": Target(
        _of_file("model.safetensors.index.json", _source),
        texts=('{"weight_map": {"a": "model-1.safetensors"}, "metadata": {}}',),
    ),
    "digests of rows": Target(_of_file("trained-rows.json", _rows), ("names/model/trained-rows.json",)),
    "table .csv": Target(_of_file("x.csv", _inputs("csv")), texts=('text,label\na,b\n"c\nd",e\n',)),
    "table .tsv": Target(_of_file("x.tsv", _inputs("tsv")), ("names/rows.tsv",)),
    "table .jsonl": Target(
        _of_file("x.jsonl", _inputs("jsonl")), texts=('{"text": "a", "pair": "b"}\n{"text": "c"}\n',)
    ),
    "arrays .npz": Target(_of_file("x.npz", _inputs("npz")), ("arrays/arrays.npz",)),
}


def mutated(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Return a mutation: of bytes, of a number, of a part of the tree, or a splice of two inputs."""
    kind = rng.randrange(7)
    if kind == 0:
        return _of_tree(data, rng)
    body = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(body) + 1)
        if kind == 1 and body:
            body[place - 1] ^= 1 << rng.randrange(8)
        elif kind == 2:
            body[place:place] = rng.choice(TOKENS)
        elif kind == 3:
            del body[place : place + rng.choice((1, 2, 8, 64))]
        elif kind == 4:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            body[place : place + rng.randrange(64)] = other[start : start + rng.randrange(64)]
        elif kind == 5:
            body[place:place] = body[place : place + rng.choice((1, 4, 64, 1024))]
        else:
            body[place : place + 8] = rng.choice((rng.randbytes(8), (1 << rng.randrange(64)).to_bytes(8, "little")))
    return bytes(body)


TOKENS = [
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"99999999999999999999",
    b"9007199254740993",
    b'""',
    b"[]",
    b"{}",
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b":",
    b'"',
    b"\\u0000",
    b"\\ud800",
    b"\x00",
    b"\xff",
    b"|",
    b"&",
    b"(",
    b")",
    b"inf",
]


def _of_tree(data: bytes, rng: random.Random) -> bytes:
    """Return JSON with one part replaced by a hostile value."""
    from .attacks import changed, nodes, values_for
    from .sealed import plain_json

    try:
        tree = json.loads(data)
        paths = [path for path, _ in nodes(tree)]
        path = rng.choice(paths)
        parent: Any = tree
        for key in path[:-1]:
            parent = parent[key]
        value = rng.choice(values_for(parent[path[-1]]))
        return plain_json(changed(tree, path, value))[: 1 << 20]
    except (ValueError, IndexError, RecursionError):
        return data[::-1]


class Judge:
    """Executes a parser and counts how it ends; keeps the first inputs of each fault."""

    def __init__(self, parse: Parse, faults: Path) -> None:
        from offramp.errors import OfframpError

        self._parse, self._faults, self._documented = parse, faults, OfframpError
        self.counts = {"executions": 0, "read": 0, "refused": 0}
        self.faults: dict[str, str] = {}
        self.most_seconds = 0.0

    def __call__(self, data: bytes) -> None:
        """Execute the parser on one input."""
        began = time.perf_counter()
        self.counts["executions"] += 1
        try:
            self._parse(data)
            self.counts["read"] += 1
        except self._documented as error:
            self.counts["refused"] += 1
            if error.exit_code == 1 or "\n" in str(error):
                self._note(f"refused with exit {error.exit_code}: {error}", data)
        except Exception as error:
            self._note(f"{type(error).__name__} in {_place(error)}", data)
        seconds = time.perf_counter() - began
        self.most_seconds = max(self.most_seconds, seconds)
        if seconds > MOST_SECONDS:
            self._note("slow", data)

    def _note(self, what: str, data: bytes) -> None:
        if what not in self.faults:
            path = self._faults / f"fault-{len(self.faults)}.bin"
            path.write_bytes(data)
            self.faults[what] = str(path)


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    place = ""
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "offramp" in name:
            place = f"{Path(name).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def main() -> None:
    """Fuzz one parser and print the counts as JSON."""
    name, honest, runs, corpus = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    target = TARGETS[name]
    corpus.mkdir(parents=True, exist_ok=True)
    faults = corpus.parent / "faults" / corpus.name
    faults.mkdir(parents=True, exist_ok=True)
    seeds = [path.read_bytes() for pattern in target.seeds for path in sorted(honest.glob(pattern))]
    seeds += [text.encode() for text in target.texts]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        (Path(scratch) / "honest").symlink_to(honest)
        if atheris is not None:
            with atheris.instrument_imports(include=["offramp"]):
                parse = target.make(Path(scratch))
        else:
            parse = target.make(Path(scratch))
        judge = Judge(parse, faults)
        guided = atheris is not None and os.environ.get("OFFRAMP_FUZZ") != "random"

        def report() -> None:
            facts = {"target": name, "guided": guided, **judge.counts, "faults": judge.faults}
            more = {"most_seconds": round(judge.most_seconds, 3), "seconds": round(time.monotonic() - began, 1)}
            print(json.dumps({**facts, **more}), flush=True)

        if guided:
            _guided(judge, seeds, runs, corpus, report)
        else:
            rng, pool = random.Random(1), list(seeds)
            for _ in range(runs):
                judge(mutated(rng.choice(pool), pool, rng))
            report()


def _guided(judge: Judge, seeds: list[bytes], runs: int, corpus: Path, report: Callable[[], None]) -> None:
    """Let libFuzzer choose the inputs; half of the mutations are those of `mutated`. Ends the process."""
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        return (atheris.Mutate(data, most) if rng.random() < 0.5 else mutated(data, seeds, rng))[:most]

    def execute(data: bytes) -> None:
        judge(data)
        if judge.counts["executions"] >= runs:
            report()
            os._exit(0)  # libFuzzer would end the process without a report

    atheris.Setup(
        [sys.argv[0], "-max_len=65536", "-verbosity=0", "-seed=1", str(corpus)], execute, custom_mutator=mutate
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()

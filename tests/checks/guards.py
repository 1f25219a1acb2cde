"""Remove guards one by one and check that a test fails for each.

    python -m tests.checks.guards            # all guards
    python -m tests.checks.guards seal deadline

A guard is removed by an exact replacement of text in a copy of the tree, so a guard whose text changed must be changed
here too: the script then ends with an error that names it. Prints one line a guard; ends with 1 if a guard was missed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 600
"""Time after which a run of tests counts as failed: without a guard, a thread may wait forever."""


@dataclass(frozen=True)
class Guard:
    """A check in `src`, how it is removed, and the tests that must then fail."""

    name: str
    text: str
    """Text that occurs once in all of `src`."""
    without: str
    """Replacement for the text."""
    tests: tuple[str, ...]
    """Files of tests, by name without folder and suffix."""


GUARDS = (
    Guard("split of a transcript", "if found.about.split != split:", "if False:", ("test_transcript",)),
    Guard("labels as texts", "if spec.label_column in columns:", "if False:", ("test_data",)),
    Guard("ways to read files", "return digest_of([sha256, {**options, **roles}])", "return sha256", ("test_sweep",)),
    Guard("changed inputs of a sweep", 'if reason["kind"] == CHANGED:', "if False:", ("test_sweep",)),
    Guard("rows of changed contents", "if has_changed(first, second):", "if False:", ("test_report",)),
    Guard("order of a table", "(_shuffled(loss_N) + 1)", "(loss_N + 1)", ("test_certify",)),
    Guard("NaN in a config", "_require_no_nan(config)", "pass", ("test_config",)),
    Guard("graph size", "if graph.bytes > m.MAX_GRAPH_BYTES:", "if False:", ("test_manifest",)),
    Guard(
        "graphs of templates",
        "if kernel.template == CAPTURED:\n            return self._captured(name)",
        "if name in self.store.manifest.graphs:\n            return self._captured(name)",
        ("test_derived",),
    ),
    Guard("values between kernels", "if held > spare_bytes:", "if False:", ("test_onnx_captured",)),
    Guard("integer divisors", "np.isin(divisor.numbers, (0, -1)).any()", "False", ("test_onnx_captured",)),
    Guard(
        "strides", "call.require(min(*kernel, *strides, *dilations) > 0,", "call.require(True,", ("test_onnx_captured",)
    ),
    Guard(
        "fields of graphs",
        '            elif name in found and inner != "skip":',
        "            elif False:",
        ("test_onnx_reader",),
    ),
    Guard("full arena", "    shrink_arena()\n    try:", "    try:", ("test_onnx_session",)),
    Guard("stopped kernels", "self._options.terminate = True", "pass", ("test_onnx_session",)),
    Guard("heads", "if num_heads > MAX_HEADS and", "if False and", ("test_shapes",)),
    Guard("kernels of templates", "if num_templates > MAX_TEMPLATE_KERNELS:", "if False:", ("test_shapes",)),
    Guard("values of a header", " > MAX_HEADER_VALUES:", " < 0:", ("test_safetensors",)),
    Guard(
        "memory of JSON",
        "if len(data) > _HARMLESS_BYTES and parsed_bytes(data) > most_bytes:",
        "if False:",
        ("test_checks",),
    ),
    Guard(
        "shapes without elements",
        "if math.prod(size for size in sizes if size) > _MOST_ELEMENTS:",
        "if False:",
        ("test_shapes",),
    ),
    Guard("parts of records", "        require_parts(found)\n", "        pass\n", ("test_results",)),
    Guard("another file of records", "_require_cut(self._fd, good_bytes, folder / RECORDS)", "pass", ("test_results",)),
    Guard(
        "links to written files",
        "flags |= os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK",
        "flags |= os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK",
        ("test_results",),
    ),
    Guard("numbers of modules", "if sum(numbers) > MAX_LAYERS:", "if False:", ("test_config",)),
    Guard("lines of the terminal", "print(escaped(message), ", "print(message, ", ("test_terminal",)),
    Guard("tensor offsets", "if start != end:", "if False:", ("test_manifest",)),
    Guard("seal", "if not m.is_sealed(data):", "if False:", ("test_manifest",)),
    Guard("file names", '_FILE = re.compile(r"(graphs/)?[A-Za-z0-9]', '_FILE = re.compile(r".*', ("test_manifest",)),
    Guard("links", "os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW", "os.O_RDONLY | os.O_CLOEXEC", ("test_files",)),
    Guard("lock of readers", "flock(fd, fcntl.LOCK_SH)", "pass", ("test_replacing",)),
    Guard("mark of a replaced store", "and is_deletable(folder)", "", ("test_replacing",)),
    Guard("size of files", "if size != file_bytes:", "if False:", ("test_files", "test_reader")),
    Guard(
        "digest of small files",
        "if hashlib.sha256(data).hexdigest() != file.sha256:",
        "if False:",
        ("test_reader",),
    ),
    Guard("digest of shards", "digest.hexdigest() == shard.sha256, shard", "True, shard", ("test_reader",)),
    Guard("digest of mapped shards", "_require(is_same, shard", "_require(True, shard", ("test_mapping",)),
    Guard("cancelled reads", "lambda: self._epoch != epoch", "lambda: False", ("test_ring",)),
    Guard(
        "slots still in use",
        "(self._pool.discard if discard else self._pool.release)",
        "self._pool.release",
        ("test_ring",),
    ),
    Guard("budget", "return self.predicted_peak_bytes <= self.budget_bytes", "return True", ("test_planner",)),
    Guard(
        "rows of the training",
        "if num_seen > MOST_SHARE * len(examples) and not include:",
        "if False:",
        ("test_held_out",),
    ),
    Guard("deadline", "return elapsed_seconds + step <= self.deadline_seconds", "return True", ("test_guard",)),
    Guard(
        "files that a store does not list",
        "name in self._listed if self._listed is not None else ",
        "",
        ("test_model_files",),
    ),
    Guard(
        "tokens of transformers",
        "if found != _ids_of_transformers(tokenizer, text, length or own_length):",
        "if False:",
        ("test_tokenizing",),
    ),
    Guard("a parent that has ended", "if is_orphan(int(parent)):", "if False:", ("test_tokenizing",)),
    Guard("steps of a program", "if num_steps > MAX_STEPS:", "if False:", ("test_shapes",)),
    Guard("output of a program", "if not p.fits_output(logits, output):", "if False:", ("test_manifest",)),
    Guard("shards that a step takes nothing of", "if shard not in taken:", "if False:", ("test_shapes",)),
    Guard(
        "number of exits",
        "if self.exits is not None and self.exits != tuple(range(1, len(self.exits) + 1)):",
        "if False:",
        ("test_side_files",),
    ),
    Guard(
        "places of exits",
        "if found.exits is not None and num_places not in (None, len(found.exits)):",
        "if False:",
        ("test_side_files",),
    ),
    Guard(
        "token of padding",
        'int_of(texts.pad_token, "program.texts.pad_token", 0, texts.vocab_size - 1)',
        "pass",
        ("test_captured", "test_side_files", "test_manifest"),
    ),
    Guard(
        "size of a policy",
        'if len(data) > MAX_BYTES:\n            raise ValueError(f"more than',
        'if False:\n            raise ValueError(f"more than',
        ("test_side_files",),
    ),
    Guard(
        "digests of rows",
        "if (digests_N[:-1] >= digests_N[1:]).any():",
        "if False:",
        ("test_side_files", "test_trained_rows"),
    ),
    Guard("ways of a pattern", "if ways > most or degree > _MAX_DEGREE:", "if False:", ("test_tokenizer_parts",)),
    Guard("growth of a text", "if size > _MOST_GROWTH * len(text):", "if False:", ("test_tokenizer_parts",)),
    Guard("kind of a file", "if not stat.S_ISREG(found.st_mode):", "if False:", ("test_odd_files", "test_no_files")),
    Guard(
        "deletion under a lock",
        "if not (_is_at(fd, folder) and is_deletable(folder)):",
        "if False:",
        ("test_replacing",),
    ),
    Guard(
        "a store that was replaced",
        "    try:\n        if is_same:\n            yield opened.fd",
        "    try:\n        if True:\n            yield opened.fd",
        ("test_replacing",),
    ),
    Guard("operations of PyTorch", "if self.unlisted and not trusted:", "if False:", ("test_torch_graphs",)),
    Guard(
        "operations that write to inputs",
        "if not isinstance(tensor, Tensor) or storage_of(tensor) in self._given:",
        "if False:",
        ("test_torch_graphs",),
    ),
    Guard("memory of a graph in PyTorch", "if self._made_bytes < 0:", "if False:", ("test_torch_limits",)),
    Guard("work of a graph in PyTorch", "if self._work < 0:", "if False:", ("test_torch_limits",)),
    Guard(
        "operators of ONNX",
        "        if lacks:\n            raise UnlistedError",
        "        if False:\n            raise UnlistedError",
        ("test_onnx_captured",),
    ),
    Guard(
        "number of operators of a graph",
        "if len(nodes) > MOST_NODES:",
        "if False:",
        ("test_onnx_captured", "test_onnx_reader"),
    ),
    Guard("memory of a graph in ONNX Runtime", "if sizes.num_bytes > allowed:", "if False:", ("test_onnx_captured",)),
    Guard(
        "work of a graph in ONNX Runtime",
        "    if work > MOST_FREE_WORK:\n        raise",
        "    if False:\n        raise",
        ("test_onnx_captured",),
    ),
    Guard("depth of messages", "if depth > _MAX_MESSAGES or self._left < 0:", "if False:", ("test_onnx_reader",)),
)


def main() -> int:
    """Remove the guards named on the command line, or all. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="GUARD", help=", ".join(guard.name for guard in GUARDS))
    names = parser.parse_args().names
    unknown = set(names) - {guard.name for guard in GUARDS}
    if unknown:
        parser.error(f"unknown guards: {', '.join(sorted(unknown))}")
    guards = [guard for guard in GUARDS if not names or guard.name in names]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for part in ("src", "tests"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        sources = [source_of(guard, tree) for guard in guards]
        if not tests_pass(tree, sorted({test for guard in guards for test in guard.tests})):
            sys.exit("the tests fail before any guard is removed")
        missed = [
            guard.name for guard, source in zip(guards, sources, strict=True) if not is_caught(guard, source, tree)
        ]
    print(f"{len(guards) - len(missed)} of {len(guards)} removed guards made a test fail")
    return 1 if missed else 0


def source_of(guard: Guard, tree: Path) -> Path:
    """Return the file that holds the text of a guard. Exits where the text does not occur exactly once."""
    found = [path for path in tree.glob("src/**/*.py") for _ in range(path.read_text().count(guard.text))]
    if len(found) != 1:
        sys.exit(f"guard {guard.name!r}: {guard.text!r} occurs {len(found)} times in src: adapt tests/checks/guards.py")
    return found[0]


def is_caught(guard: Guard, source: Path, tree: Path) -> bool:
    """Remove a guard, run its tests, put it back. Returns whether a test failed."""
    whole, began = source.read_text(), time.monotonic()
    source.write_text(whole.replace(guard.text, guard.without))
    try:
        caught = not tests_pass(tree, guard.tests)
    finally:
        source.write_text(whole)
    seconds = time.monotonic() - began
    print(
        f"{'caught' if caught else 'MISSED'}  {guard.name}  ({source.relative_to(tree)}, {seconds:.0f} s)", flush=True
    )
    return caught


def tests_pass(tree: Path, names: tuple[str, ...] | list[str]) -> bool:
    """Run files of tests in the copy until one test fails. Exits where pytest fails for another reason."""
    paths = [str(path.relative_to(tree)) for name in names for path in sorted(tree.glob(f"tests/**/{name}.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-m", "not slow", *paths]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1):
        sys.exit(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())

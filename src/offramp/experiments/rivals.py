"""Rivals of offramp: other ways to run the same classifier, each in a process of its own environment.

A rival reads the original model folder, or a form that is converted from it once and kept in the cache. Its process is
`rival_process.py`, started by path: the interpreter may be another one, which has no offramp. Nothing that a process
prints is trusted: a rival that crashes, hangs or prints something else has a reason instead of a result.
"""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offramp.errors import UsageError, shown
from offramp.experiments.children import Log
from offramp.reporting.comparison import TOLERANCES
from offramp.store.files import iter_chunks
from offramp.store.memory import cache_folder
from offramp.store.scratch import scratch_folder
from offramp.units import format_duration

SCRIPT = Path(__file__).with_name("rival_process.py")
MEASURE_SECONDS, PREPARE_SECONDS, VERSION_SECONDS = 300.0, 1800.0, 60.0
"""Time limits of a process that measures, that converts a model, and that lists versions."""
TIMED_OUT = "timeout"
"""`kind` of the message of a process that was killed at its time limit."""
MAX_OUTPUT_BYTES = 16 << 20
"""Most bytes of a process's output that are read: its last line is the result."""
MEMOPRO_BUDGET = "192MiB"
"""Budget given to memopro, whose budget does not include the process itself."""
MOST = float(1 << 53)
"""Largest number that a process may print."""
WEIGHT_FILES = ("*.safetensors", "*.bin", "config.json", "tokenizer.json")
"""Files of a model folder that decide what is converted."""
LISTED = "lazy-layers"
"""Rival that keeps layers in a list: `residency` and `resident_layers` are its options."""
INDEX_FILE = "model.safetensors.index.json"
"""File by which transformers finds the weights of a store."""
Inputs = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Token ids and token types [S] of each input; the first ones warm up."""


@dataclass(frozen=True)
class Form:
    """A converted model. It is a folder, in the cache."""

    distributions: tuple[str, ...]
    """Distributions that convert it."""
    source: str | None = None
    """Form that it is made from; None: the model folder."""
    by_this_python: bool = False
    """True: it is made by the interpreter that runs offramp, False: by that of the rival."""


@dataclass(frozen=True)
class Rival:
    """One way to run the model."""

    distributions: tuple[str, ...]
    """Distributions that must be installed; the first is the rival itself."""
    precision: str
    """`fp32`, `bf16` or `int8`; decides how closely the answers must agree."""
    form: str | None = None
    """Form that it reads; None: the model folder."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """More keys of its job."""
    maps_files: bool = False
    """True: it maps files while it runs, so that the bytes that it reads are not known."""


FORMS = {
    "onnx": Form(("torch", "transformers", "onnx"), by_this_python=True),
    "onnx-int8": Form(("onnxruntime", "onnx"), "onnx", by_this_python=True),
    "openvino": Form(("openvino",), "onnx"),
    "ctranslate2": Form(("ctranslate2", "transformers", "torch")),
    "gguf": Form(("gguf", "numpy")),
    "layers": Form(("torch", "transformers")),
}
RIVALS = {
    "transformers": Rival(("transformers", "torch"), "fp32"),
    "transformers-bf16": Rival(("transformers", "torch"), "bf16"),
    "disk": Rival(("accelerate", "transformers", "torch"), "fp32", maps_files=True),
    "disk-offload": Rival(("accelerate", "transformers", "torch"), "fp32", maps_files=True),
    "lazy-layers": Rival(("torch", "transformers"), "fp32", "layers"),
    "onnxruntime": Rival(("onnxruntime", "numpy"), "fp32", "onnx"),
    "onnxruntime-int8": Rival(("onnxruntime", "numpy"), "int8", "onnx-int8"),
    "ctranslate2": Rival(("ctranslate2", "numpy"), "int8", "ctranslate2"),
    "openvino": Rival(("openvino", "numpy"), "bf16", "openvino"),
    "llama.cpp": Rival(("xllamacpp",), "int8", "gguf"),
    "memopro": Rival(("memopro", "transformers", "torch"), "fp32", options={"budget": MEMOPRO_BUDGET}),
}
"""Name in `--against` -> rival."""


@dataclass(frozen=True)
class Chosen:
    """A rival and the interpreter that runs it."""

    name: str
    python: str = sys.executable

    @property
    def rival(self) -> Rival:
        """The rival of this name."""
        return RIVALS[self.name]


def parse_against(text: str) -> tuple[Chosen, ...]:
    """Return the rivals that a text names: `NAME` or `NAME=PYTHON`, separated by commas.

    Raises ValueError for a name that is unknown or given twice, and for an interpreter that is no program.
    """
    found: dict[str, Chosen] = {}
    for part in text.split(","):
        name, mark, python = (word.strip() for word in part.partition("="))
        if name not in RIVALS:
            raise ValueError(f"unknown rival {shown(name)!r}; known: {', '.join(RIVALS)}")
        if name in found:
            raise ValueError(f"rival {name} is given twice")
        if mark and not (os.path.isfile(python) and os.access(python, os.X_OK)):  # noqa: PTH113  # Path may raise
            raise ValueError(f"{shown(python)!r} is no Python interpreter for {name}")
        found[name] = Chosen(name, os.path.abspath(python)) if mark else Chosen(name)  # noqa: PTH100  # keep links
    return tuple(found.values())


def run_process(python: str, job: Mapping[str, Any], seconds: float, within: Sequence[str] = ()) -> dict[str, Any]:
    """Run `rival_process.py` and return its message: `{"result": tree}`, or `{"failed": reason}`.

    `within` is put before the command. The process and all that it starts end with its time limit.
    """
    environment = _environment(python, job.get("threads"))
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        given.write(json.dumps({**job, "parent": os.getpid()}).encode())
        given.seek(0)
        pipes: dict[str, Any] = {"stdin": given, "stdout": output, "stderr": errors}
        command = [*within, python, str(SCRIPT)]
        try:
            with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as child:
                returncode = _wait(child, seconds)
        except OSError as error:
            return {"failed": f"{shown(python)} does not start: {error.strerror}"}
        return _message(returncode, seconds, _tail(output), _tail(errors))


def _environment(python: str, num_threads: int | None) -> dict[str, str]:
    """Return the environment of a rival: no network, no progress bars, its own modules, and its number of threads."""
    kept = {key: value for key, value in os.environ.items() if python == sys.executable or not key.startswith("PYTHON")}
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    threads = {} if num_threads is None else {"OMP_NUM_THREADS": str(num_threads)}
    return {**kept, **quiet, **threads, "TOKENIZERS_PARALLELISM": "false"}


def _wait(child: subprocess.Popen, seconds: float) -> int | None:
    """Return how the process ended; None: it was killed at its time limit."""
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if child.returncode is None:  # also where this process is interrupted
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _tail(file: Any) -> str:
    """Return the end of what a process wrote."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - MAX_OUTPUT_BYTES))
    return file.read().decode("utf-8", "replace")


def _message(returncode: int | None, seconds: float, output: str, errors: str) -> dict[str, Any]:
    """Return the message of a process that ended."""
    if returncode is None:
        return {"failed": f"did not finish in {format_duration(seconds)}", "kind": TIMED_OUT}
    if returncode < 0:
        return {"failed": f"killed by signal {-returncode}"}
    lines = [line for line in output.splitlines() if line.strip()]
    try:
        found = json.loads(lines[-1]) if lines else None
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and isinstance(found.get("failed"), str):
        return {"failed": shown(found["failed"])}
    if isinstance(found, dict) and isinstance(found.get("result"), dict) and not returncode:
        return {"result": found["result"]}
    said = [line.strip() for line in errors.splitlines() if line.strip()]
    last = f": {shown(said[-1][:200])}" if said else ""
    return {"failed": f"exit {returncode}{last}" if returncode else "printed no result"}


def versions(chosen: Chosen) -> dict[str, str] | str:
    """Return the versions of what a rival needs, or why it cannot be run."""
    found = _versions(chosen.python, chosen.rival.distributions)
    if isinstance(found, str) or chosen.rival.form is None:
        return found
    for form in _chain(chosen.rival.form):
        made_by = _versions(_maker(chosen, form), form.distributions)
        if isinstance(made_by, str):
            return f"its model cannot be converted: {made_by}"
    return found


def _versions(python: str, distributions: Sequence[str]) -> dict[str, str] | str:
    message = run_process(python, {"act": "versions", "distributions": list(distributions)}, VERSION_SECONDS)
    if "failed" in message:
        return message["failed"]
    found = {name: message["result"].get(name) for name in distributions}
    missing = [name for name, version in found.items() if not isinstance(version, str)]
    where = "" if python == sys.executable else f" for {shown(python)}"
    return f"{', '.join(missing)} is not installed{where}" if missing else found


def _chain(name: str | None) -> list[Form]:
    """Return a form and those that it is made from, the first to be made first."""
    return [] if name is None else [*_chain(FORMS[name].source), FORMS[name]]


def _maker(chosen: Chosen, form: Form) -> str:
    return sys.executable if form.by_this_python else chosen.python


def model_digest(model: Path) -> str:
    """Return the sha256 of the files of a model folder that decide its answers. Raises UsageError for others."""
    digest = hashlib.sha256()
    names = sorted({path.name for pattern in WEIGHT_FILES for path in model.glob(pattern)})
    if "config.json" not in names or len(names) < 2:
        raise UsageError("not a model folder of transformers", model, "give --model FOLDER")
    for name in names:
        with (model / name).open("rb") as file:  # folders of the hub hold links
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{name}:{size}\n".encode())
            for chunk in iter_chunks(file.fileno(), size):
                digest.update(chunk)
    return digest.hexdigest()


def prepared(chosen: Chosen, model: Path, digest: str, log: Log) -> Path | str | None:
    """Return the folder of what a rival reads, converting it if the cache does not have it; None: the model itself.

    Returns the reason as a text where it cannot be converted.
    """
    return None if chosen.rival.form is None else _form(chosen, chosen.rival.form, model, digest, log)


def _form(chosen: Chosen, name: str, model: Path, digest: str, log: Log) -> Path | str:
    form = FORMS[name]
    source = None if form.source is None else _form(chosen, form.source, model, digest, log)
    if isinstance(source, str):
        return source
    python = _maker(chosen, form)
    made_by = _versions(python, form.distributions)
    if isinstance(made_by, str):
        return made_by
    key = hashlib.sha256(json.dumps([digest, made_by, SCRIPT.read_text()]).encode()).hexdigest()[:16]
    place = cache_folder().absolute() / "rivals"
    folder = place / f"{name}-{key}"
    if folder.exists():
        return folder
    log(f"converting the model for {chosen.name} (kept in {folder})")
    place.mkdir(parents=True, exist_ok=True)
    with scratch_folder("converting-", place) as scratch:
        job = {"act": "prepare", "form": name, "model": str(model), "out": str(scratch / "model")}
        message = run_process(python, {**job, "source": None if source is None else str(source)}, PREPARE_SECONDS)
        if "failed" in message:
            return f"its model was not converted: {message['failed']}"
        if not folder.exists():  # another process may have been faster
            (scratch / "model").rename(folder)
    return folder


@dataclass(frozen=True)
class RivalJob:
    """The measurement of one rival."""

    chosen: Chosen
    model: Path
    prepared: Path | None
    inputs: Inputs
    num_warm: int
    threads: int
    options: Mapping[str, Any] = field(default_factory=dict)
    """More keys of its job: how many layers `lazy-layers` keeps, and by which rule."""

    def to_json(self) -> dict[str, Any]:
        """Return the job that its process reads."""
        paths = {"model": str(self.model), "prepared": None if self.prepared is None else str(self.prepared)}
        counts = {"inputs": self.inputs, "warm": self.num_warm, "threads": self.threads}
        about = {"rival": self.chosen.name, "precision": self.chosen.rival.precision, **self.chosen.rival.options}
        return {"act": "measure", **about, **self.options, **paths, **counts}

    def run(self, seconds: float = MEASURE_SECONDS, within: Sequence[str] = ()) -> dict[str, Any]:
        """Measure: `{"result": tree}`, whose numbers are checked, or `{"failed": reason}`."""
        with scratch_folder("offramp-rival-") as scratch:
            message = run_process(self.chosen.python, {**self.to_json(), "scratch": str(scratch)}, seconds, within)
        counts = len(self.inputs) - self.num_warm, len(self.inputs)
        if "result" in message and not is_measurement(message["result"], "logits", *counts):
            return {"failed": "printed a result without the numbers of a measurement"}
        return message


def is_measurement(result: Any, answers: str, num_timed: int | None = None, num_inputs: int | None = None) -> bool:
    """Return whether a tree has the numbers of a measurement: latencies of `num_timed` passes, sizes, and under the key
    `answers` equally many finite numbers for each of `num_inputs` inputs. None: any number of them, at least one.
    """
    if not isinstance(result, dict) or result.get("precision") not in (None, *TOLERANCES):
        return False
    seconds, rows = result.get("latencies_seconds"), result.get(answers)
    if not (_are_numbers(seconds, num_timed, least=1e-9) and isinstance(rows, list) and rows):
        return False
    width = len(rows[0]) if isinstance(rows[0], list) else 0
    fine = num_inputs in (None, len(rows)) and all(
        _is_number(result.get(key), 0) for key in ("peak_rss_bytes", "bytes_read_per_input")
    )
    return bool(fine and width and all(_are_numbers(row, width) for row in rows))


def _are_numbers(values: Any, count: int | None, least: float = -math.inf) -> bool:
    """Return whether `values` is a list of `count` numbers (None: at least one), each at least `least`."""
    fine = isinstance(values, list) and len(values) == (count or len(values) or -1)
    return fine and all(_is_number(value, least) for value in values)


def _is_number(value: Any, least: float) -> bool:
    """Return whether `value` is a number from `least` on; not NaN, and of a size that a measurement may have."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and max(least, -MOST) <= value <= MOST

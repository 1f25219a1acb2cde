"""Records of a sweep for a tracker, through accelerate, in a process of its own.

Plain records are first: a tracker that fails, or does not answer, loses none. The parent waits until each record is
taken, so that no tracker runs while a job is measured. A record is a run of the tracker: options of the experiment,
and figures at the step that is its round.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from offramp.errors import UsageError, said
from offramp.experiments.children import Log
from offramp.experiments.results import Record
from offramp.experiments.specification import Experiment, digest_of

TRACKERS = ("trackio", "tensorboard", "mlflow", "wandb")
COMMAND = (sys.executable, "-m", "offramp.experiments.tracking")
MOST_SECONDS, END_SECONDS = 120.0, 10.0
"""Seconds after which a tracker is killed: one that does not take a record (with the first it also loads the library),
and one that has taken all records and does not end."""
MOST_BYTES = 255
"""Length in bytes of the longest name of a folder."""
FOLDER = "tracking"
"""Folder in the results for trackers that write files."""
_PLACES = {"TRACKIO_DIR": "{}/trackio", "WANDB_DIR": "{}", "MLFLOW_TRACKING_URI": "sqlite:///{}/mlflow.db"}
"""Variable that says where a tracker writes -> its value unless the caller sets it: by themselves, they choose the
working folder."""


def require_tracker(tracker: str) -> None:
    """Raise UsageError where accelerate or the library of the tracker is not installed."""
    for library in (tracker, "accelerate"):
        if importlib.util.find_spec(library) is None:
            raise UsageError(f"{library} is not installed", f"--track {tracker}", f"pip install {library}")


class Tracking:
    """A tracker of the records of one results folder. A context manager.

    Raises UsageError where accelerate or the library of the tracker is not installed.
    """

    def __init__(self, tracker: str, folder: Path, log: Log) -> None:
        require_tracker(tracker)
        self._log, self._answers, about = log, queue.SimpleQueue(), [tracker, folder.absolute().name]
        self._child: subprocess.Popen[str] | None = subprocess.Popen(
            [*COMMAND, *about, str(folder / FOLDER)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            encoding="utf-8", errors="replace",
        )  # fmt: skip
        self._listener = threading.Thread(target=self._listen, args=[self._child.stdout], daemon=True)
        self._listener.start()

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def add(self, record: Record, name: str) -> None:
        """Give the tracker a record, and wait until it has it. After a failure nothing more is tracked."""
        if self._child is None:
            return
        options = {key: str(value) for key, value in Experiment.from_json(record["experiment"]).flat().items()}
        figures = {key: value for key, value in record["figures"].items() if value is not None}
        tree = {"name": f"{name}, round {record['round']}", "options": options, "figures": figures}
        try:
            assert self._child.stdin is not None
            self._child.stdin.write(json.dumps({**tree, "status": record["status"], "round": record["round"]}) + "\n")
            self._child.stdin.flush()
            answer = self._answers.get(timeout=MOST_SECONDS)
        except (OSError, queue.Empty) as error:
            answer = f"it does not take a record ({said(error)})"
        if answer:
            self._log(f"offramp: warning: the tracker failed: {answer}; records are kept, and no more are tracked")
            self._child.kill()
            self._end()

    def _listen(self, pipe: Any) -> None:
        try:
            with pipe:
                for line in pipe:
                    self._answers.put(line.strip() if line.strip() != "taken" else "")
        finally:
            self._answers.put("its process has ended")

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            assert child.stdin is not None
            try:
                child.stdin.close()
                child.wait(END_SECONDS)
            except (OSError, subprocess.TimeoutExpired):
                child.kill()
                child.wait()
            self._listener.join(1.0)  # a process that the tracker started may hold the pipe


def main() -> int:
    """Track the records on stdin, one JSON line each, and answer `taken` or the reason of a failure."""
    from offramp.measure.processes import die_with_parent

    die_with_parent()
    tracker, project, folder = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        try:
            track(tracker, project, Path(folder), json.loads(line))
            answer = "taken"
        except Exception as error:
            answer = said(error)
        print(answer, file=answers, flush=True)
    return 0


def track(tracker: str, project: str, folder: Path, record: dict[str, Any]) -> None:
    """Make a run of a tracker for a record."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=True)  # some trackers log by its state
    folder.mkdir(exist_ok=True)
    for option, value in _PLACES.items():
        os.environ.setdefault(option, value.format(folder.absolute()))
    kind, name = LOGGER_TYPE_TO_CLASS[tracker], record["name"]
    made = {
        "tensorboard": lambda: kind(_file_name(name), logging_dir=folder),
        # accelerate looks the experiment up by a filter that a quote would end.
        "mlflow": lambda: kind(experiment_name=project.replace("'", "_"), run_name=name),
    }.get(tracker, lambda: kind(project, name=name))()
    made.start()
    made.store_init_configuration({**record["options"], "status": record["status"]})
    if record["figures"]:
        made.log(record["figures"], step=record["round"])
    made.finish()


def _file_name(name: str) -> str:
    """Return a run's name as that of a folder; of a longer name the beginning, and a digest of all of it."""
    name = name.replace("/", "_")
    raw = name.encode("utf-8", "surrogatepass")
    return name if len(raw) <= MOST_BYTES else f"{raw[:200].decode('utf-8', 'ignore')} {digest_of(name)}"


if __name__ == "__main__":
    sys.exit(main())

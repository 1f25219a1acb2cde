"""A worker process whose toys fail in ways that are named by their models: `python -m tests.experiments.toy_worker`."""

import os
import signal
import sys
import time

from offramp.errors import UsageError
from offramp.experiments import steps, worker
from offramp.experiments.rivals import run_process

COMMAND = (sys.executable, "-m", "tests.experiments.toy_worker")
RIVAL = (
    *(sys.executable, "-c"),
    "import os, pathlib, runpy, sys, time\n"
    "main = runpy.run_path(sys.argv[-1])['main']\n"
    "def measure(job): pathlib.Path('rival').write_text(str(os.getpid())); time.sleep(60)\n"
    "main.__globals__['measure'] = measure\n"
    "main()",
)
"""Command of the process of a rival that measures for a minute, after it has written its process id to a file."""
compute = steps._STEPS["toy"]


def toy(step, log):
    model = step["experiment"]["model"]
    if model == "toy-refuses":
        raise UsageError("this toy refuses", model, "take another toy")
    if model == "toy-is-killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if model == "toy-hangs":
        time.sleep(3600)
    if model == "toy-has-a-rival":
        run_process(sys.executable, {"act": "measure"}, 60, within=RIVAL)
    if model == "toy-fills-memory":
        raise MemoryError
    found = compute(step, log)
    if model == "toy-without-score":
        found["figures"]["score"] = float("nan")
    return found


if __name__ == "__main__":
    steps._STEPS["toy"] = toy
    sys.exit(worker.main())

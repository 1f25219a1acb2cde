"""A worker process whose toys fail in ways that are named by their models: `python -m tests.experiments.toy_worker`."""

import os
import signal
import sys
import time

from offramp.errors import UsageError
from offramp.experiments import steps, worker

COMMAND = (sys.executable, "-m", "tests.experiments.toy_worker")
compute = steps._STEPS["toy"]


def toy(step, log):
    model = step["experiment"]["model"]
    if model == "toy-refuses":
        raise UsageError("this toy refuses", model, "take another toy")
    if model == "toy-is-killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if model == "toy-hangs":
        time.sleep(3600)
    if model == "toy-fills-memory":
        raise MemoryError
    found = compute(step, log)
    if model == "toy-without-score":
        found["figures"]["score"] = float("nan")
    return found


if __name__ == "__main__":
    steps._STEPS["toy"] = toy
    sys.exit(worker.main())

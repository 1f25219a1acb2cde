"""Runs commands in children, each with one system call of offramp's own files spoilt by a tracer.

`python fault_driver.py [MODULE...]` imports the modules for all children, and reads lines of JSON: {"place", "words",
"inject", "paths"}. A child is forked, strace is attached to it with `-e inject=INJECT` for calls that name or hold one
of the paths, and the command runs in `place`. `trace` names the traced calls, `log` the file of their record; with
neither `inject` nor `trace` there is no tracer. With `follow` false, other threads and processes are not traced. The
temporary folder of the child is `place/tmp`, if that exists. Prints one line for each: how it ended, and its stdout and
stderr; `null` where strace could not be attached.
"""

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx  # noqa: F401 - imported once, for all children
import onnxruntime  # noqa: F401
import tokenizers  # noqa: F401

import offramp.cli.divide
import offramp.cli.ls
import offramp.cli.plan
import offramp.cli.run
import offramp.cli.verify
import offramp.division.build
import offramp.session  # noqa: F401
from offramp.cli import main

SECONDS = 30
PR_SET_PTRACER = 0x59616D61


def child(fault, gate):
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)
    signal.alarm(fault.get("seconds", SECONDS))
    os.chdir(fault["place"])
    os.environ["OFFRAMP_CACHE"] = str(Path(fault["place"], "cache"))
    if Path("tmp").is_dir():
        tempfile.tempdir = os.environ["TMPDIR"] = str(Path(fault["place"], "tmp"))
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.read(gate, 1)
    code = main(fault["words"])
    sys.stdout.flush()
    return code


def tracer_of(fault):
    """The command of strace for a fault, or for a record of calls."""
    words = ["strace", *(["-f"] if fault.get("follow", True) else [])]
    words += ["-y", "-s", "0", "-o", fault["log"]] if "log" in fault else ["-o", os.devnull]
    words += ["-e", "trace=" + fault.get("trace", fault.get("inject", "").partition(":")[0])]
    words += ["-e", "inject=" + fault["inject"]] if "inject" in fault else []
    return words + [word for path in fault.get("paths", ()) for word in ("-P", path)]


def run(fault):
    gate, opener = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = child(fault, gate)
        finally:
            os._exit(code)
    said = ""
    if "inject" in fault or "trace" in fault:
        with subprocess.Popen([*tracer_of(fault), "-p", str(pid)], stderr=subprocess.PIPE, text=True) as tracer:
            said = tracer.stderr.readline()
            os.write(opener, b"x")
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            tracer.stderr.read()
    else:
        os.write(opener, b"x")
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(gate)
    os.close(opener)
    if said and "attached" not in said:
        return None
    said = [Path(fault["place"], each).read_text(errors="replace") for each in ("out", "err")]
    return {"code": status, "out": said[0], "err": said[1]}


if __name__ == "__main__":
    for module in sys.argv[1:]:
        importlib.import_module(module)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(json.loads(line))) + "\n")
        sys.stdout.flush()

"""A training that was killed goes on, and ends in the same files, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from offramp.errors import UsageError
from offramp.training import TrainSettings, train_exits
from tests.training.tiny import LABELS, examples, make_model, write_checkpoint

TRAIN, TUNE = examples(60), examples(12, seed=1)
SETTINGS = {"epochs": 2, "heads_epochs": 3, "batch_size": 8, "max_length": 16, "save_steps": 3}
"""Eight steps an epoch: checkpoints lie in the middle of epochs."""
MODEL, HEADS = 16, 24
"""Steps of the two stages."""
FORKS = """
import json, os, socket, sys, traceback
import accelerate, offramp.training.job, offramp.training.trainer as trainer, torch, transformers
from offramp.cli import main
from offramp.training import TrainSettings, train_exits
from tests.training.test_resume import SETTINGS, TRAIN, TUNE
from tests.training.tiny import LABELS

class Killed(trainer._Progress):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 17:
            os._exit(9)

def forked(name, act, *args):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}.{kind}", os.O_WRONLY | os.O_CREAT, 0o600), number)
        code = act(*args)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)

def ended(children):
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

def interrupted(source, out, loss, signal, step, threads):
    def progress(line):
        if line.startswith(f"step {step}:"):
            os.kill(os.getpid(), signal)

    torch.set_num_threads(threads)
    settings = TrainSettings(loss=loss, **SETTINGS)
    train_exits(source, TRAIN, TUNE, out, labels=LABELS, settings=settings, progress=progress)
    return 0

def worker(rank, port, words, is_killed):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=port, CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    if is_killed:
        trainer._Progress = Killed
    return main(words)

def pair(name, *args):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return ended([forked(f"{name}.{rank}", worker, rank, port, *args) for rank in range(2)])

for line in sys.stdin:
    act, name, *args = json.loads(line)
    print(json.dumps(pair(name, *args) if act == "pair" else ended([forked(name, interrupted, *args)])), flush=True)
"""
"""Trains in forked children: one that sends itself a signal at a step, or pairs as torchrun starts them. Libraries are
imported once, for all of them."""


@pytest.fixture(scope="module")
def forks():
    """A function: what a child does, the beginning of the paths of its stdout and stderr, arguments -> exit codes."""
    command, pipes = [sys.executable, "-c", FORKS], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(), text=True, **pipes) as process:

        def call(*words):
            process.stdin.write(json.dumps([word if isinstance(word, (int, list)) else str(word) for word in words]))
            process.stdin.write("\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield call
        process.stdin.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A classifier with dropout: the state of the generators must go on as well."""
    return write_checkpoint(tmp_path_factory.mktemp("bert"), make_model("bert", initializer_range=0.1))


def train(source, out, loss, told=None):
    progress = (lambda line: None) if told is None else told.append
    settings = TrainSettings(loss=loss, **SETTINGS)
    return train_exits(source, TRAIN, TUNE, out, labels=LABELS, settings=settings, progress=progress)


@pytest.mark.parametrize(
    ("loss", "number", "stage", "step", "begins_at"),
    [
        ("pabee", signal.SIGKILL, MODEL, 11, 9),
        ("pabee", signal.SIGKILL, HEADS, 2, MODEL),
        ("pabee", signal.SIGINT, HEADS, 14, 12),
        ("mixed", signal.SIGKILL, MODEL, 14, 12),
        ("heads-only", signal.SIGKILL, HEADS, 14, 12),
        ("distill", signal.SIGINT, MODEL, 8, 6),
    ],
)
def test_the_continuation_is_the_same_bit_for_bit(forks, source, tmp_path, loss, number, stage, step, begins_at):
    said = tmp_path / "said"
    said.mkdir()
    whole = train(source, tmp_path / "whole", loss)
    words = (source, tmp_path / "run", loss, int(number), f"{step} of {stage}", torch.get_num_threads())
    assert forks("interrupted", said / "run", *words) != [0], "the training was to be interrupted"
    if number == signal.SIGINT:
        assert "KeyboardInterrupt" in (said / "run.err").read_text()
    shutil.rmtree(said)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["run.partial", "whole"]
    told = []
    resumed = train(source, tmp_path / "run", loss, told)
    assert any(line.endswith(f"from checkpoint-{begins_at}") for line in told)
    trained = [line for line in told if line.startswith("step ")]
    assert stage == MODEL or not any(f" of {MODEL}:" in line for line in trained), "the first stage is done"
    assert (resumed.logits_KNC == whole.logits_KNC).all()
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    for name in names:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_killed_training_of_another_configuration_is_refused(forks, source, tmp_path):
    words = (source, tmp_path / "run", "pabee", int(signal.SIGKILL), f"10 of {MODEL}", torch.get_num_threads())
    assert forks("interrupted", tmp_path / "said", *words) == [-signal.SIGKILL]
    match = r"another configuration \(loss 'pabee' there, 'mixed' here\)"
    with pytest.raises(UsageError, match=match):
        train(source, tmp_path / "run", "mixed")
    train(source, tmp_path / "run", "pabee")


def test_a_run_that_is_whole_is_measured_again_and_not_trained(source, tmp_path):
    first = train(source, tmp_path / "run", "pabee")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    told = []
    again = train(source, tmp_path / "run", "pabee", told)
    assert told[0].startswith("already trained")
    assert (again.logits_KNC == first.logits_KNC).all()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before
    with pytest.raises(UsageError, match=r"another configuration \(loss 'pabee' there, 'last' here\)"):
        train(source, tmp_path / "run", "last")


def options_of(table, loss):
    settings = "--max-length 16 --epochs 3 --heads-epochs 1 --batch 4 --save-steps 3"
    return ["--train", table, "--loss", loss, *settings.split()]


def environment():
    """That of processes which find the modules of this one, and train with one thread."""
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{LABELS[label]}\n" for text, label in examples(90)))
    return path


needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")


@needs_gloo
def test_two_processes_train_one_run(source, table, tmp_path):
    """As on two GPUs, by torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "offramp"]
    command = [*launch, "train", source, "--out", tmp_path / "run", *options_of(table, "heads-only")]
    alone = {**environment(), "CUDA_VISIBLE_DEVICES": ""}  # two cannot share a GPU
    done = subprocess.run(list(map(str, command)), env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the tune split") == 1, "one of them speaks"
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.safetensors", "exits.safetensors", "train.json"} <= names
    assert not (tmp_path / "run.partial").exists()
    assert '"processes": 2' in (tmp_path / "run" / "train.json").read_text()


@needs_gloo
def test_two_processes_that_were_killed_go_on_with_the_same_rows(forks, source, table, tmp_path):
    """In the third epoch: on resumption two wrappers hid from the batches which epoch it is."""
    words = ["train", str(source), *map(str, options_of(table, "mixed"))]
    killed = forks("pair", tmp_path / "killed", [*words, "--out", str(tmp_path / "run")], True)
    assert 0 not in killed
    for out in ("run", "whole"):
        assert forks("pair", tmp_path / out, [*words, "--out", str(tmp_path / out)], False) == [0, 0]
        said = {kind: (tmp_path / f"{out}.0.{kind}").read_text() for kind in ("out", "err")}
        assert ("from checkpoint-15" in said["err"]) == (out == "run")
        both = said["out"] + (tmp_path / f"{out}.1.out").read_text()
        assert both.count("the tune split") == 1, "one of them speaks"
        assert not (tmp_path / f"{out}.partial").exists()
        assert '"processes": 2' in (tmp_path / out / "train.json").read_text()
    for name in ("model.safetensors", "exits.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

"""The command line as a process of its own: its budget is that process, and Ctrl-C and a closed pipe end it cleanly."""

import json
import os
import re
import resource
import signal
import subprocess
import sys

import pytest

from offramp.division import divide
from tests.cli.conftest import write_tiny
from tests.golden.common import read_answers, to_input, unpack

OFFRAMP = [sys.executable, "-m", "offramp"]


def test_the_measured_peak_stays_within_the_prediction_and_the_budget(store, tmp_path):
    (tmp_path / "t.txt").write_text("the bank fell today\na film won\n" * 50)
    plan = subprocess.run([*OFFRAMP, "plan", str(store), "--json"], capture_output=True, text=True, check=True)
    budget = json.loads(plan.stdout)["smallest_budget_bytes"] + (2 << 20)
    command = [*OFFRAMP, "run", str(store), "--input", str(tmp_path / "t.txt"), "--json", "--exit", "patience:2"]
    done = subprocess.run([*command, "--budget", f"{budget}B"], capture_output=True, text=True, check=True)
    record = json.loads(done.stdout.splitlines()[-1])["record"]
    assert record["peak_rss_bytes"] <= record["predicted_peak_bytes"] <= budget


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_the_measured_peak_of_images_stays_within_the_budget(tmp_path, backend):
    """Under the smallest budget, and half a headroom for what differs from run to run."""
    store, images = unpack("resnet-export", tmp_path), tmp_path / "images"
    images.mkdir()
    for number, given in enumerate(read_answers()["stores"]["resnet-export"]["inputs"] * 2):
        (images / f"{number}.png").write_bytes(to_input(given))
    words = ["--input", str(images), "--backend", backend, "--batch", "4", "--threads", "1", "--json"]
    plan = subprocess.run([*OFFRAMP, "plan", str(store), *words], capture_output=True, text=True, check=True)
    budget = json.loads(plan.stdout)["smallest_budget_bytes"] + (2 << 20)
    command = [*OFFRAMP, "run", str(store), *words, "--exit", "confidence:0.4", "--budget", f"{budget}B"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    record = json.loads(done.stdout.splitlines()[-1])["record"]
    assert record["num_inputs"] >= 4 and record["peak_rss_bytes"] <= record["budget_bytes"] == budget


@pytest.mark.parametrize("suffix", ["jsonl", "tsv"])
def test_rows_of_megabytes_are_in_the_plan(store, tmp_path, suffix):
    """Python holds lines and their fields, four bytes a character."""
    text, file = f"{'the bank ' * 400_000}\U0001f600", tmp_path / f"t.{suffix}"
    rows = (
        [json.dumps({"text": text}, ensure_ascii=False)] * 2 if suffix == "jsonl" else ["text\tid", *[f"{text}\t1"] * 2]
    )
    file.write_text("\n".join(rows) + "\n")
    command = [*OFFRAMP, "run", str(store), "--input", str(file), "--text-column", "text", "--json", "--budget"]
    refused = subprocess.run([*command, "1MiB"], capture_output=True, text=True, check=False)
    named = refused.stderr.split()[-1]
    done = subprocess.run([*command, named], capture_output=True, text=True, check=True)
    record = json.loads(done.stdout.splitlines()[-1])["record"]
    assert record["peak_rss_bytes"] <= record["budget_bytes"]


@pytest.mark.parametrize("closed", ["2>&-", "2>&- <&-", "<&-"])
def test_closed_descriptors_change_no_answer(store, closed):
    command = [*OFFRAMP, "run", str(store), "--budget", "500MiB", "--text", "the bank fell", "--json"]
    open_ends = subprocess.run(command, capture_output=True, text=True, check=True)
    script = f'exec "$@" {closed}'
    done = subprocess.run(["sh", "-c", script, "sh", *command], stdout=subprocess.PIPE, text=True, check=True)
    first, wanted = (each.stdout.splitlines()[0] for each in (done, open_ends))
    assert len(done.stdout.splitlines()) == 2 and json.loads(first) == json.loads(wanted)
    failed = ["sh", "-c", script, "sh", *command, "--max-length", "0"]
    assert subprocess.run(failed, stdout=subprocess.PIPE, check=False).stdout == b""


@pytest.mark.parametrize("option", ["--input", "--train", "--dev"])
def test_data_that_are_named_twice_are_not_dropped(tmp_path, option):
    command = "run" if option == "--input" else "eval"
    words = [*OFFRAMP, command, str(tmp_path), option, "a.tsv", option, "b.tsv"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"argument {option}: given twice: name one file" in done.stderr


def test_a_text_on_stdin_is_answered_before_the_next_one_comes(store):
    with subprocess.Popen(
        [*OFFRAMP, "run", str(store), "--budget", "500MiB", "--input", "-", "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        process.stdin.write("the bank fell\n")
        process.stdin.flush()
        first = json.loads(process.stdout.readline())
        process.stdin.write("a film won\n")
        process.stdin.close()
        rest = process.stdout.read().splitlines()
    assert "label" in first
    assert len(rest) == 2
    assert process.returncode == 0


def test_ctrl_c_ends_with_130_and_one_line(store):
    with subprocess.Popen(
        [*OFFRAMP, "run", str(store), "--budget", "500MiB", "--input", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdin.write("the bank fell\n")
        process.stdin.flush()
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "offramp: error: interrupted"


def test_a_reader_that_goes_away_is_no_error(store, tmp_path):
    (tmp_path / "t.txt").write_text("the bank fell today\n" * 200)
    command = f"{sys.executable} -m offramp run {store} --budget 500MiB --input {tmp_path}/t.txt 2>err | head -n 1"
    bash = ["bash", "-c", f"set -o pipefail; {command}"]
    done = subprocess.run(bash, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in (tmp_path / "err").read_text()
    assert "Exception" not in (tmp_path / "err").read_text()


BUFFERED = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
"""As at a user's: the interpreter flushes stdout when it ends, and says so if it cannot."""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["run", "STORE", "--budget", "500MiB", "--text", "the bank", "--json"], 5, "no space left"),
        (["ls", "STORE"], 5, "no space left"),
        (["run", "--help"], 5, "no space left"),
        (["plan", "STORE", "--budget", "1MiB"], 3, "budget of 1.00 MiB"),
    ],
)
def test_a_full_disk_ends_with_5_unless_an_error_came_first(store, words, code, said):
    command = [*OFFRAMP, *(str(store) if word == "STORE" else word for word in words)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=BUFFERED)
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].startswith(f"offramp: error: {said}")
    assert "Exception" not in done.stderr


def test_an_error_is_told_though_the_reader_has_gone(store):
    read, write = os.pipe()
    os.close(read)
    command = [*OFFRAMP, "plan", str(store), "--budget", "1MiB"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False, env=BUFFERED)
    os.close(write)
    assert done.returncode == 3
    assert done.stderr.startswith("offramp: error: budget of 1.00 MiB")
    assert len(done.stderr.splitlines()) == 1


def test_a_closed_stdout_is_no_error(store):
    command = f"{sys.executable} -m offramp run {store} --budget 500MiB --text 'the bank' >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "error" not in done.stderr


def test_telemetry_is_off_and_no_connection_is_open_after_a_run(store):
    """ONNX Runtime reports to its makers unless told not to."""
    code = (
        "import os\n"
        "from offramp.cli import main\n"
        f"assert main(['run', {str(store)!r}, '--budget', '500MiB', '--text', 'the bank']) == 0\n"
        "import psutil\n"
        "assert psutil.Process().net_connections(kind='inet') == []\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "ORT_DISABLE_TELEMETRY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "1"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_of_any_encoding_shows_every_label(model, tmp_path, encoding):
    """Letters that it does not have are escaped: for programs as JSON escapes them, for people with backslashes."""
    labels = {"0": "größer", "1": "模型", "2": "\U0001f600"}
    store = divide(write_tiny(tmp_path / "model", id2label=labels), tmp_path / "store")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [*OFFRAMP, "run", str(store), "--budget", "500MiB", "--text", "größer"]
    for more in ([], ["--json"]):
        done = subprocess.run([*command, *more], capture_output=True, env=environment, check=False)
        assert (done.returncode, b"error" in done.stderr) == (0, False), done.stderr
        first = done.stdout.decode(encoding).splitlines()[0]
        if more:
            assert json.loads(first)["label"] in labels.values()
        elif encoding == "utf-8":
            assert first.split()[0] in labels.values()
            assert first.endswith("größer")


def test_an_argument_is_utf8_in_every_locale(store):
    def scores(**changes):
        command = [*OFFRAMP, "run", str(store), "--budget", "500MiB", "--text", "bänk 模型", "--json"]
        done = subprocess.run(command, capture_output=True, env={**os.environ, **changes}, check=True)
        return json.loads(done.stdout.splitlines()[0])["score"]

    assert scores(LC_ALL="C", PYTHONUTF8="0") == scores(PYTHONUTF8="1")


@pytest.mark.parametrize("words", [["divide", "MODEL", "made"], ["run", "store", "--text", "a"], ["ls", "store"]])
def test_a_working_folder_that_was_deleted(model, tmp_path, words):
    (tmp_path / "gone").mkdir()
    line = " ".join(str(model) if word == "MODEL" else word for word in words)
    shell = f"cd {tmp_path}/gone && rmdir {tmp_path}/gone && exec {sys.executable} -m offramp {line}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("offramp: error: the working folder was deleted")


def test_few_open_files_are_enough(store):
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))  # noqa: E731
    command = [*OFFRAMP, "run", str(store), "--budget", "500MiB", "--text", "the bank"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert (done.returncode, "error" in done.stderr) == (0, False), done.stderr


@pytest.mark.parametrize("kib", range(100_000, 400_000, 100_000))
def test_a_limit_of_the_address_space_is_not_called_a_missing_library(store, kib):
    shell = f"ulimit -v {kib}; exec {sys.executable} -m offramp run {store} --budget 500MiB --text bank"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert "not installed" not in done.stderr
    assert "internal error" not in done.stderr


def test_plan_names_a_length_of_texts_that_fits(tmp_path):
    """The store reads 2,048 tokens, whose attention takes more than all else; of 16 tokens it takes nearly nothing."""
    store = divide(write_tiny(tmp_path / "model", max_position_embeddings=2048), tmp_path / "store")

    def plan(*words):
        command = [*OFFRAMP, "plan", str(store), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert "activations are those of 2048 tokens a text: --max-length 1024 would save " in plan().stdout
    assert "--max-length" not in plan("--max-length", "16").stdout
    whole, short = (json.loads(plan("--json", *words).stdout) for words in ((), ("--max-length", "16")))
    budget = f"{(whole['smallest_budget_bytes'] + short['smallest_budget_bytes']) // 2}B"
    refused = plan("--budget", budget)
    length = re.search(r"MiB, and --max-length (\d+) works with this one$", refused.stderr)
    assert (refused.returncode, length is None) == (3, False), refused.stderr
    assert int(length[1]) >= 256
    assert plan("--budget", budget, "--max-length", length[1]).returncode == 0
    assert "--max-length" not in plan("--budget", "1MiB").stderr


@pytest.mark.parametrize("megabytes", [100, 200, 300, 400, 500, 700, 4000])
def test_a_limit_of_the_address_space_is_kept_or_refused_in_one_line(store, megabytes):
    """At each, there is too little of it for something else: a library, a thread, a buffer, nothing."""
    run = f"{sys.executable} -m offramp run {store} --threads 1 --budget 2GiB --text bank --json"
    limited = f"ulimit -v {megabytes * 1000}; exec {run}"
    done = subprocess.run(["bash", "-c", limited], env=BUFFERED, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), done.stderr
    assert not any(words in done.stderr for words in ("internal error", "Traceback", "not installed"))
    if done.returncode == 0:
        record = json.loads(done.stdout.splitlines()[-1])["record"]
        assert record["peak_rss_bytes"] <= record["budget_bytes"] <= 2 << 30
        assert record["limited_by"] in ("address space", "budget", "available memory", "container")
    else:
        assert done.stderr.splitlines()[-1].startswith("offramp: error: ")
        assert "ulimit -v" in done.stderr.splitlines()[-1]

"""The command line as a process of its own: its budget is that process, and Ctrl-C and a closed pipe end it cleanly."""

import json
import os
import signal
import subprocess
import sys

OFFRAMP = [sys.executable, "-m", "offramp"]


def test_the_measured_peak_stays_within_the_prediction_and_the_budget(store, tmp_path):
    (tmp_path / "t.txt").write_text("the bank fell today\na film won\n" * 50)
    plan = subprocess.run([*OFFRAMP, "plan", str(store), "--json"], capture_output=True, text=True, check=True)
    budget = json.loads(plan.stdout)["smallest_budget_bytes"] + (2 << 20)
    command = [*OFFRAMP, "run", str(store), "--input", str(tmp_path / "t.txt"), "--json", "--exit", "patience:2"]
    done = subprocess.run([*command, "--budget", str(budget)], capture_output=True, text=True, check=True)
    record = json.loads(done.stdout.splitlines()[-1])["record"]
    assert record["peak_rss_bytes"] <= record["predicted_peak_bytes"] <= budget


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


def test_a_full_disk_ends_with_5(store):
    with open("/dev/full", "w") as full:
        command = [*OFFRAMP, "run", str(store), "--budget", "500MiB", "--text", "the bank", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1].startswith("offramp: error: no space left")
    assert "Exception" not in done.stderr


def test_a_run_tells_no_telemetry_and_opens_no_internet_socket(store):
    """ONNX Runtime reports to its makers unless told not to."""
    code = (
        "import os\n"
        "from offramp.cli import main\n"
        f"main(['run', {str(store)!r}, '--budget', '500MiB', '--text', 'the bank'])\n"
        "import psutil\n"
        "assert psutil.Process().net_connections(kind='inet') == []\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "ORT_DISABLE_TELEMETRY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "1"

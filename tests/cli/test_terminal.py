"""Texts of files reach the terminal as printable letters: control characters could move the cursor or forge a line."""

import json
import sys
import zipfile
from pathlib import Path

from offramp.cli.options import emit, log, table
from offramp.store.policy_file import MeasuredOn, PolicyFile, Prediction, write_policy
from tests.store.small import reseal, tree_of

HOSTILE = "a\x1b[2J\x9b2J\u202e\nofframp: error: forged\r\x7f\ud800"
CAPTURED = Path(__file__).parents[1] / "store" / "format3" / "captured.zip"


def is_printable(text):
    return text.endswith("\n") and all(line.isprintable() for line in text.split("\n"))


def test_lines_tables_and_json_are_printable(capsys):
    log(HOSTILE)
    emit({HOSTILE: [HOSTILE]})
    sys.stdout.write(table(("name",), [(HOSTILE,)]) + "\n")
    said = capsys.readouterr()
    assert is_printable(said.out) and is_printable(said.err)
    assert (said.err.count("\n"), said.out.count("\n")) == (1, 3)
    assert json.loads(said.out.splitlines()[0]) == {HOSTILE: [HOSTILE]}


def test_a_policy_file_is_explained_in_printable_letters(run, tmp_path):
    certificate = {"kind": "certified", "epsilon": 0.01, "delta": 0.1, "risk": 0.0}
    certificate |= {"method": HOSTILE, "num_samples": HOSTILE}
    front = [{"policy": HOSTILE, "score": 1.0, "loss": 0.0, "seconds": 0.001, "mean_exit": 1.0}]
    about = {"task": HOSTILE, "num_samples": 3, "training_rows": HOSTILE}
    policy, predicted = {"kind": "rule", "text": "patience:1"}, Prediction(90.0, 0.5, 0.01, 1.5, 10.0)
    measured = MeasuredOn(cpu_model=HOSTILE, backend=HOSTILE)
    write_policy(tmp_path / "p.json", PolicyFile(policy, "0", None, predicted, certificate, about, measured, front))
    said = run("tune", "--explain", tmp_path / "p.json")
    assert said.code == 0 and is_printable(said.out) and said.out.count("forged") == 7


def test_a_store_is_listed_in_printable_letters(run, tmp_path):
    with zipfile.ZipFile(CAPTURED) as file:
        file.extractall(tmp_path / "store")
    tree = tree_of(tmp_path / "store")
    tree["source"].update(method=HOSTILE, architecture=HOSTILE)
    reseal(tmp_path / "store", tree)
    said = run("ls", tmp_path / "store")
    assert said.code == 0 and is_printable(said.out) and said.out.count("forged") == 2

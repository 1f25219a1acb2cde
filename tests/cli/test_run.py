"""What programs rely on: the lines of `offramp run`, its exit codes, and its errors."""

import io
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import offramp
from offramp import Result
from tests.cli.conftest import LABELS, NUM_LAYERS, write_tiny

BUDGET = ("--budget", "2GiB")  # of this process, which has pytest in it


def test_one_json_line_an_input_and_the_record_last(run, store):
    said = run(
        "run", store, *BUDGET, "--exit", "patience:1", "--text", "the bank fell", "--text", "a film won", "--json"
    )
    *results, last = said.lines
    assert said.code == 0
    assert len(results) == 2
    for result in results:
        assert set(result) == {field.name for field in fields(Result)}
        assert {"label", "score", "exit_stage", "stages_run", "bytes_read"} < set(result)
        assert result["labels"] is None
        assert result["label"] in LABELS.values()
        assert 1 / 3 <= result["score"] <= 1
        assert 2 <= result["exit_stage"] == result["stages_run"] <= NUM_LAYERS
    record = last["record"]
    assert list(last) == ["record"]
    assert {"model", "backend", "budget_bytes", "predicted_peak_bytes", "peak_rss_bytes", "num_inputs"} <= set(record)
    assert {"seconds_total", "latency_seconds_median", "bytes_read_total", "bound_seconds"} <= set(record)
    assert record["num_inputs"] == 2
    assert record["budget_bytes"] == 2 << 30
    assert sum(result["bytes_read"] for result in results) + record["bytes_read_idle"] == record["bytes_read_total"]


def test_a_person_sees_a_line_an_input_and_the_peak(run, store):
    said = run("run", store, *BUDGET, "--text", "the bank fell")
    (line,) = said.out.splitlines()
    assert line.split()[0] in LABELS.values()
    assert f"exit {NUM_LAYERS}/{NUM_LAYERS}" in line
    assert line.endswith("the bank fell")
    assert said.err.splitlines()[-1].startswith("predicted peak ")
    assert " / measured peak " in said.err
    assert said.err.splitlines()[-1].endswith(" / budget 2048.0 MiB")


def test_pairs_files_and_stdin_give_what_texts_give(run, store, tmp_path, monkeypatch):
    def results(*words):
        lines = run("run", store, *BUDGET, "--json", *words).lines[:-1]
        return [(line["label"], line["score"]) for line in lines]

    texts = ["the bank fell", "a film won today"]
    wanted = results(*(word for text in texts for word in ("--text", text)))
    (tmp_path / "t.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "t.tsv").write_text("id\tbody\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(texts)))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert results("--input", tmp_path / "t.txt") == wanted
    assert results("--input", tmp_path / "t.tsv", "--text-column", "body") == wanted
    assert results("--input", tmp_path / "t.jsonl") == wanted
    stdin = io.TextIOWrapper(io.BytesIO("\n".join(texts).encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert results("--input", "-") == wanted
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": "the bank", "pair": "fell today"}) + "\n")
    assert results("--pair", "the bank", "fell today") == results("--input", tmp_path / "p.jsonl")
    assert results("--pair", "the bank", "fell today") != results("--text", "the bank")


def test_there_is_a_result_for_each_line_and_row_and_what_was_taken_is_said(run, store, tmp_path):
    def results(*words):
        said = run("run", store, *BUDGET, "--json", "--input", *words)
        return len(said.lines) - 1, said.err

    (tmp_path / "t.txt").write_text("the bank\n\na film\n\n")
    number, err = results(tmp_path / "t.txt")
    assert number == 4 and "blank texts, each answered as an empty one: 2" in err
    for suffix, mark in (("tsv", "\t"), ("csv", ",")):
        table = tmp_path / f"t.{suffix}"
        table.write_text(f"sentence{mark}label\nthe bank{mark}x\n\na film{mark}y\n")
        number, err = results(table)
        assert number == 2 and "this line is the header" in err and "column 'sentence'" in err
        assert "blank lines were skipped: 1" in err
        number, err = results(table, "--header", "no", "--text-column", "1")
        assert number == 3 and "header" not in err


@pytest.mark.parametrize(
    "options",
    [["--batch", "3"], ["--reads", "direct"], ["--reads", "buffered"], ["--verify", "always"], ["--threads", "1"]],
)
def test_options_do_not_change_answers(run, store, options):
    texts = [word for text in ("the bank fell", "a film", "match won lost") for word in ("--text", text)]
    plain = run("run", store, *BUDGET, *texts, "--json").lines[:-1]
    other = run("run", store, *BUDGET, *texts, "--json", *options).lines[:-1]
    assert [line["label"] for line in other] == [line["label"] for line in plain]
    assert [line["score"] for line in other] == pytest.approx([line["score"] for line in plain], abs=1e-5)


def test_stage_runs_no_more_layers_than_asked(run, store):
    (result, last) = run("run", store, *BUDGET, "--exit", "stage:2", "--text", "the bank", "--json").lines
    assert (result["exit_stage"], result["stages_run"]) == (2, 2)
    assert last["record"]["exit"] == "stage:2"


def test_a_text_that_is_too_long_is_cut_with_one_warning(run, store):
    said = run("run", store, *BUDGET, "--text", "the bank " * 40, "--text", "a film " * 40)
    assert said.code == 0
    assert said.err.count("offramp: warning:") == 1


def test_the_trace_opens_in_perfetto(run, store, tmp_path):
    run("run", store, *BUDGET, "--text", "the bank", "--trace", tmp_path / "t.json")
    run("run", store, *BUDGET, "--text", "the bank", "--trace", tmp_path / "t.jsonl")
    names = {event["name"] for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"]}
    assert "layer.0 attention" in names
    kinds = {json.loads(line)["kind"] for line in (tmp_path / "t.jsonl").read_text().splitlines()}
    assert {"wait", "read", "compute", "head"} <= kinds


def test_usage_errors_end_with_2(refused, store, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "t.tsv").write_text("id\tbody\n1\tthe bank\n")
    refused(2, "no input", "run", store)
    refused(2, "--budget", "run", store, "--budget", "12XB", "--text", "a")
    refused(2, "got '128': 128MiB?", "run", store, "--budget", "128", "--text", "a")
    refused(2, "got '40': 40ms?", "run", store, "--deadline", "40", "--text", "a")
    twice = ("--exit", "patience:1", "--exit", "stage:2")
    refused(2, "given twice: combine policies with | or &", "run", store, *twice, "--text", "a")
    refused(2, "patience:4", "run", store, "--exit", "patience:4", "--text", "a")
    refused(2, "perhaps", "run", store, "--exit", "perhaps", "--text", "a")
    refused(2, "empty.txt", "run", store, "--input", tmp_path / "empty.txt")
    refused(2, ["title", "body"], "run", store, "--input", tmp_path / "t.tsv", "--text-column", "title")
    refused(2, "--header: yes or no", "run", store, "--input", tmp_path / "t.tsv", "--header", "perhaps")
    refused(2, "none.txt", "run", store, "--input", tmp_path / "none.txt")
    refused(2, "unknown command 'frobnicate'", "frobnicate")
    refused(2, "--threads", "run", store, "--threads", "0", "--text", "a")


@pytest.mark.parametrize("column", ["--text-column", "--pair-column"])
@pytest.mark.parametrize("command", ["run", "plan", "memory", "bench"])
def test_columns_of_no_file_are_refused(refused, store, command, column):
    refused(2, "name columns of a file", command, store, "--budget", "2GiB", "--text", "a", column, "body")


def test_output_that_could_not_be_written_is_refused_before_the_run(refused, store, tmp_path):
    trace, picture = ("--trace", tmp_path / "none" / "t.jsonl"), ("--out", tmp_path / "m.svg")
    for folder in (store, tmp_path / "nothing"):  # told before the store is opened
        refused(2, "no such folder", "run", folder, *BUDGET, "--text", "a", *trace)
        refused(2, "is a folder", "run", folder, *BUDGET, "--text", "a", "--trace", tmp_path)
        refused(2, "no such folder", "memory", folder, *BUDGET, *picture, *trace)
        refused(2, "no such folder", "memory", folder, *BUDGET, "--out", tmp_path / "none" / "m.svg")
        refused(2, ".svg or .png", "memory", folder, *BUDGET, "--out", tmp_path / "m.gif")
    assert not (tmp_path / "m.svg").exists()


@pytest.mark.parametrize("folder", ["/proc/self/fdinfo", "/sys", "/dev/null"])
def test_a_folder_that_takes_no_files_is_told_before_the_run(run, tmp_path, folder):
    if not Path(folder).exists():
        pytest.skip(f"no {folder} here: a folder that takes no files is not tested")
    for words in (("run", "--text", "a", "--trace", f"{folder}/x.json"), ("ls", "--graph", f"{folder}/x.svg")):
        said = run(words[0], tmp_path / "nothing", *words[1:])
        assert said.code == 2
        assert f"{folder}/x." in said.err.splitlines()[-1]


def test_asking_whether_a_file_can_be_written_changes_nothing(refused, tmp_path):
    (tmp_path / "old.json").write_text("old")
    for name in ("old.json", "new.json"):
        refused(4, "no such store", "run", tmp_path / "nothing", *BUDGET, "--text", "a", "--trace", tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"


def test_what_is_not_printable_is_escaped_for_a_person(run, store, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "the \\ud83d bank \\u001b[31m fell"}\n')
    said = run("run", store, *BUDGET, "--input", tmp_path / "t.jsonl")
    assert said.code == 0
    assert said.out.endswith("the \\ud83d bank \\x1b[31m fell\n")


@pytest.mark.parametrize(("label", "escaped"), [("red\x1b[31m\n", "red\\x1b[31m\\n"), ("half \ud83d", "half \\ud83d")])
def test_labels_of_strangers_are_escaped(tmp_path, label, escaped):
    model = write_tiny(tmp_path / "model", id2label=dict.fromkeys("012", label))
    command = ["run", str(offramp.divide(model, tmp_path / "store")), "--budget", "500MiB", "--text", "the bank"]
    for options in ([], ["--json"]):  # in a process: stdout must be UTF-8
        words = [sys.executable, "-m", "offramp", *command, *options]
        out = subprocess.run(words, capture_output=True, check=True, encoding="utf-8").stdout
        first = out.splitlines()[0]
        assert first.isprintable()
        assert json.loads(first)["label"] == label if options else first.startswith(escaped)


def test_an_impossible_budget_ends_with_3_and_names_the_smallest(refused, store):
    said = refused(3, "the smallest budget that works is", "run", store, "--budget", "1MiB", "--text", "the bank")
    assert "--budget " in said.err


def test_what_is_damaged_or_foreign_ends_with_4(refused, store, tmp_path):
    refused(4, "no such store", "run", tmp_path / "nothing", "--text", "a")
    refused(4, "not a store", "run", tmp_path, "--text", "a")


def test_a_failure_of_ours_ends_with_1_and_shows_the_traceback_on_demand(run, store, monkeypatch):
    monkeypatch.setattr("offramp.cli.run._show", lambda *_: 1 / 0)
    said = run("run", store, *BUDGET, "--text", "a")
    assert said.code == 1
    assert "Traceback" not in said.err
    assert "ZeroDivisionError" in said.err.splitlines()[-1]
    assert "Traceback" in run("run", store, *BUDGET, "--text", "a", "--debug").err


def test_ctrl_c_ends_with_130(run, store, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("offramp.cli.run._show", interrupt)
    said = run("run", store, *BUDGET, "--text", "a")
    assert (said.code, said.err.splitlines()[-1]) == (130, "offramp: error: interrupted")


def test_direct_reads_that_are_not_to_be_had_are_told(run, store, monkeypatch):
    monkeypatch.setattr("offramp.session.classifier.choose_direct", lambda *_: False)
    said = run("run", store, *BUDGET, "--reads", "direct", "--text", "the bank", "--json")
    assert said.code == 0
    assert said.lines[-1]["record"]["reads"] == "buffered"
    assert "offramp: warning: this file system does not support direct reads" in said.err

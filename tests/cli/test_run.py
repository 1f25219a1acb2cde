"""What programs rely on: the lines of `offramp run`, its exit codes, and its errors."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import offramp
from offramp import Result
from offramp.policies import parse
from offramp.policies.codec import to_json
from offramp.store import Store
from offramp.store.policy_file import MeasuredOn, PolicyFile, Prediction, write_policy
from offramp.tasks.tables import read_table
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


class Terminal(io.StringIO):
    """A stream that is taken for a terminal."""

    def isatty(self):
        return True


def test_a_run_on_a_terminal_closes_with_one_line(run, store, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    texts = ("--text", "the bank fell", "--text", "a film won", "--text", "a match")
    said = run("run", store, *BUDGET, *texts, "--exit", "stage:2", "--json")
    (line,) = terminal.getvalue().splitlines()
    record = said.lines[-1]["record"]
    number = r"\d+(\.\d+)?"
    form = rf"3 texts, median {number} ms and p95 {number} ms, {number} [KM]iB read, mean exit 2\.00 of {NUM_LAYERS}, "
    assert re.fullmatch(rf"{form}peak {number} MiB of 2048\.0 MiB", line), line
    assert record["stages_run_total"] == 6 and record["late"] == 0
    assert record["latency_seconds_median"] <= record["latency_seconds_p95"] <= record["latency_seconds_p99"]
    for more, ending in (
        (("--quiet",), ""),
        (("--deadline", "99s"), ", 0 late for the deadline of 99.0 s (p99 "),
        (("--batch", "3"), " ms a batch of 3, "),
    ):
        terminal.truncate(0)
        run("run", store, *BUDGET, *texts, *more)
        assert ending in terminal.getvalue() and bool(ending) == bool(terminal.getvalue())


def test_late_answers_are_counted_and_an_impossible_deadline_is_named_at_the_start(run, store):
    words = ("--text", "the bank fell", "--text", "a film won")
    said = run("run", store, *BUDGET, *words, "--deadline", "1us", "--json")
    assert said.code == 0
    first, *_, late, peak = said.err.splitlines()
    assert first.startswith("offramp: warning: no input meets a deadline of 1 us: the first exit takes ")
    assert late.startswith("2 late for the deadline of 1 us (p99 ") and peak.startswith("predicted peak ")
    assert said.lines[-1]["record"]["late"] == 2
    assert [line["exit_stage"] for line in said.lines[:-1]] == [1, 1], "answered nevertheless"
    said = run("run", store, *BUDGET, *words, "--deadline", "99s", "--json")
    assert "warning" not in said.err and said.lines[-1]["record"]["late"] == 0
    assert "0 late for the deadline of 99.0 s" in said.err


def test_all_scores_are_probabilities_by_label(run, store):
    words = ("run", store, *BUDGET, "--text", "the bank fell", "--text", "a film won")
    plain, found = run(*words, "--json").lines[:-1], run(*words, "--all-scores", "--json").lines[:-1]
    ranking = sorted(found[0]["scores"].items(), key=lambda item: -item[1])
    for before, result in zip(plain, found, strict=True):
        scores = result.pop("scores")
        assert before.pop("scores") is None and result == before
        assert list(scores) == list(LABELS.values()) and sum(scores.values()) == pytest.approx(1)
        assert scores[result["label"]] == result["score"] == max(scores.values())
    line = run(*words, "--all-scores").out.splitlines()[0].partition("  exit ")[0]
    assert line == "  ".join(f"{name}  {score:.4f}" for name, score in ranking)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [(".csv", []), (".jsonl", ["--batch", "bulk"]), (".parquet", ["--all-scores", "--batch", "2"])],
)
def test_out_has_the_answers_that_are_printed(run, store, tmp_path, suffix, options):
    (tmp_path / "t.txt").write_text("the bank\n\na film, 'won'\n")
    words = ("run", store, *BUDGET, "--input", tmp_path / "t.txt", *options)
    printed, out = run(*words, "--json").lines[:-1], tmp_path / f"answers{suffix}"
    said = run(*words, "--out", out)
    assert (said.code, said.out) == (0, ""), said.err
    rows = [row for _, row in read_table(out)]
    assert [row["input"] for row in rows] == ["the bank", "", "a film, 'won'"]
    assert [row["label"] for row in rows] == [line["label"] for line in printed]
    assert [float(row["score"]) for row in rows] == pytest.approx([line["score"] for line in printed], abs=1e-6)
    has_scores = any(name.startswith("scores") and row[name] for row in rows for name in row)
    assert has_scores == ("--all-scores" in options)
    (line,) = run(*words, "--out", out, "--json").lines
    assert line["record"]["num_inputs"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, "t.txt"]


def test_an_output_that_cannot_be_written_is_refused_before_the_store_is_opened(refused, tmp_path):
    nothing, texts = tmp_path / "nothing", tmp_path / "t.csv"
    texts.write_text("text\na\n")
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "taken.csv.tmp").mkdir()
    (tmp_path / "loop.csv").symlink_to("texts.csv")
    (tmp_path / "texts.csv").symlink_to("t.csv")
    words = ("run", nothing, *BUDGET, "--input", texts, "--out")
    refused(2, ".csv or .jsonl or .parquet", *words, tmp_path / "out.txt")
    refused(2, "no such folder", *words, tmp_path / "none" / "out.csv")
    refused(2, "is a pipe, a device or a folder", *words, tmp_path / "pipe.csv")
    refused(2, "taken.csv.tmp", *words, tmp_path / "taken.csv")
    for name in ("t.csv", "loop.csv"):
        refused(2, "--out and --input are the same file", *words, tmp_path / name)
        refused(2, "--trace and --input are the same file", *words, tmp_path / "out.csv", "--trace", tmp_path / name)
    refused(2, "--trace and --out are the same file", *words, tmp_path / "a.csv", "--trace", tmp_path / "a.csv")
    refused(2, "--trace and --out are the same file", "memory", nothing, "--out", tmp_path / "a.svg",
            "--trace", tmp_path / "a.svg")  # fmt: skip
    refused(2, "no such store", *words, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists() and texts.read_text() == "text\na\n"


def test_a_failed_run_leaves_the_file_of_an_earlier_one(refused, run, store, tmp_path):
    out, table = tmp_path / "out.csv", tmp_path / "t.jsonl"
    assert run("run", store, *BUDGET, "--text", "the bank", "--out", out).code == 0
    before = out.read_bytes()
    table.write_text('{"text": "the bank"}\n{"text": 3}\n')
    refused(2, "t.jsonl:2", "run", store, *BUDGET, "--input", table, "--out", out)
    refused(3, "too small", "run", store, "--budget", "1MiB", "--text", "a", "--out", out)
    assert out.read_bytes() == before and sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "t.jsonl"]


def test_quiet_prints_results_and_warnings(run, store, tmp_path):
    (tmp_path / "t.csv").write_text("body\n" + "the bank " * 40 + "\n\n")
    words = ("run", store, *BUDGET, "--input", tmp_path / "t.csv", "--text-column", "body")
    said, quiet = run(*words), run(*words, "--quiet")
    assert len(said.err.splitlines()) > 1 and quiet.out == said.out
    (warning,) = quiet.err.splitlines()
    assert warning.startswith("offramp: warning: a text is longer than")
    assert run("run", store, *BUDGET, "--text", "a", "--quiet").err == ""


def test_resident_is_a_budget(run, store):
    said = run("run", store, "--budget", "resident", "--text", "the bank", "--text", "a film", "--json")
    record = said.lines[-1]["record"]
    assert (record["config"]["budget"], record["num_slots"]) == ("resident", 0)
    plan = run("plan", store, "--budget", "resident", "--json").lines[0]
    assert all(shard["resident"] for stage in plan["stages"] for shard in stage["shards"])
    said = run(
        "bench", store, "--budget", "resident,1GiB", "--repeat", "1", "--passes", "1", "--threads", "1", "--json"
    )
    assert said.code == 0, said.err
    assert [line["config"]["budget"] for line in said.lines] == ["resident", 1 << 30]
    assert [line["num_inputs"] for line in said.lines] == [1, 1], "warm-up passes are not counted"
    with offramp.load(store, budget="resident") as classifier:
        assert classifier.plan.num_slots == 0 and len(classifier.predict(["a"])) == 1


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
    [
        ["--batch", "3"],
        *(["--reads", reads] for reads in ("direct", "buffered", "mapped")),
        ["--verify", "always"],
        ["--threads", "1"],
    ],
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


def test_a_policy_that_was_tuned_on_shorter_texts_is_reported_where_texts_are_longer(run, store, tmp_path):
    with Store(store, "never") as opened:
        known = PolicyFile(
            to_json(parse("confidence:0.9")), opened.manifest.answering, None, Prediction(), None, {"max_length": 8},
            MeasuredOn(), [],
        )  # fmt: skip
    write_policy(tmp_path / "policy.json", known)
    words = ("run", store, *BUDGET, "--exit", tmp_path / "policy.json", "--text")
    short, long = "the bank fell", "the bank " * 9
    for more, says in (
        ((short,), None),
        ((long,), "tuned on texts of at most 8 tokens, and these have up to 20: its scores"),
        ((long, "--max-length", "8"), None),
        ((short, "--max-length", "6"), None),
        ((long, "--max-length", "6"), "and these are truncated to 6: its scores"),
    ):
        said = run(*words, *more)
        assert said.code == 0 and (says in said.err if says else "its scores" not in said.err), said.err
    assert "--max-length 8" in run(*words, long).err


def test_texts_in_standard_input_are_not_read_unasked_which_is_said(refused, store, tmp_path):
    (tmp_path / "texts.txt").write_text("the bank fell\n")
    opened = [*os.pipe(), os.open(tmp_path / "texts.txt", os.O_RDONLY), os.open(os.devnull, os.O_RDONLY)]
    kept = os.dup(0)
    try:
        for descriptor, kind in zip(opened[::2], ("a pipe", "a file"), strict=True):
            os.dup2(descriptor, 0)
            says = ["no input", f"standard input is {kind}, which --input - reads", "give --text, --pair or --input"]
            refused(2, says, "run", store)
        os.dup2(opened[-1], 0)
        assert "standard input" not in refused(2, "no input - give", "run", store).err
    finally:
        os.dup2(kept, 0)
        for descriptor in (kept, *opened):
            os.close(descriptor)


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
        refused(2, "no such store", "run", tmp_path / "nothing", *BUDGET, "--text", "a", "--trace", tmp_path / name)
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


def test_a_place_without_a_store_ends_with_2(refused, store, tmp_path):
    refused(2, "no such store", "run", tmp_path / "nothing", "--text", "a")
    refused(2, "not a store", "run", tmp_path, "--text", "a")


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
    monkeypatch.setattr("offramp.runtime.run_plan.direct_works", lambda _: False)
    said = run("run", store, *BUDGET, "--reads", "direct", "--text", "the bank", "--json")
    assert said.code == 0
    assert said.lines[-1]["record"]["reads"] == "buffered"
    assert "offramp: warning: this file system does not support direct reads" in said.err


def test_mapped_reads_that_are_not_to_be_had_are_told(run, store, monkeypatch):
    monkeypatch.setattr("offramp.runtime.run_plan.mapping_obstacle", lambda *_: "a file is open for writing")
    said = run("run", store, *BUDGET, "--reads", "mapped", "--text", "the bank", "--json")
    assert said.code == 0
    assert [said.lines[-1]["record"][key] for key in ("reads", "reads_because")] == [
        "buffered",
        "a file is open for writing",
    ]

"""The commands around `run`: each does its work, says it in text and in JSON, and fails in one line."""

import csv
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ET

import pytest
from safetensors.numpy import load_file, save_file

import offramp
from offramp.cli import COMMANDS, NEEDS_NEWER_PYTHON
from tests.cli.conftest import NUM_LAYERS, write_tiny

BUDGET = ("--budget", "2GiB")


def test_divide_makes_a_store_and_refuses_to_do_it_twice(run, refused, model, tmp_path):
    said = run("divide", model, tmp_path / "store")
    assert said.code == 0
    assert (tmp_path / "store" / "offramp.json").is_file()
    refused(2, "target exists", "divide", model, tmp_path / "store")
    assert run("divide", model, tmp_path / "store", "--force", "--json").lines == [{"store": str(tmp_path / "store")}]


def test_divide_says_where_a_store_that_is_read_is_kept(run, store, model, tmp_path):
    again, old = ("divide", model, tmp_path / "store", "--force"), tmp_path / "store.retired"
    shutil.copytree(store, tmp_path / "store")
    with offramp.Store(tmp_path / "store"):
        assert f"still being read; {old} keeps it" in run(*again).err and old.is_dir()
    assert "still being read" not in run(*again).err and not old.exists()


def test_divide_says_what_it_cannot_read(refused, run, tmp_path):
    folder = write_tiny(tmp_path / "foreign", exits=False)
    config = json.loads((folder / "config.json").read_text())

    def becomes(**changes):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    becomes(model_type="gpt2", architectures=["GPT2Model"])
    refused(4, ["tensors missing", "wte.weight"], "divide", folder, tmp_path / "store")
    refused(
        4, ["unknown architecture", "gpt2", "distilbert"], "divide", folder, tmp_path / "store", "--method", "names"
    )
    becomes(model_type="nothing-known")
    refused(4, "cannot be read", "divide", folder, tmp_path / "store")
    becomes(architectures=["MyOwnModel"])
    refused(4, ["no MyOwnModel", "code in a model folder is not run"], "divide", folder, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    refused(2, "no such folder", "divide", tmp_path / "nothing", tmp_path / "store")
    refused(2, "MODEL and STORE", "divide", tmp_path / "store")


def test_graphs_of_text_encoders_need_not_be_added(run, refused, model, tmp_path):
    """The option is that of earlier versions, whose command lines stay right."""
    assert "onnx" not in run("divide", model, tmp_path / "store").err
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    said = run("divide", "--graphs", tmp_path / "store", "--json")
    assert said.code == 0 and "nothing to add" in said.err and said.lines == [{"store": str(tmp_path / "store")}]
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before
    refused(2, "no such store", "divide", "--graphs", tmp_path / "missing")
    refused(2, "MODEL and STORE", "divide", "--graphs", model, tmp_path / "store")


def test_a_model_without_a_head_divides_but_does_not_run(run, refused, tmp_path):
    folder = write_tiny(tmp_path / "model", exits=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: each for name, each in tensors.items() if "classifier" not in name}, folder / "model.safetensors")
    assert run("divide", folder, tmp_path / "store").code == 0
    words = ("--input", tmp_path / "none.txt")  # never read
    mentions = ["BertModel", "no classification head", "ForSequenceClassification", "offramp.stream"]
    for command in (("run",), ("plan",), ("memory", "--out", tmp_path / "m.svg")):
        refused(4, mentions, *command, tmp_path / "store", *BUDGET, *words)


def test_a_model_without_exits_runs_whole(run, refused, tmp_path):
    run("divide", write_tiny(tmp_path / "model", exits=False), tmp_path / "store")
    assert run("run", tmp_path / "store", *BUDGET, "--text", "the bank").code == 0
    refused(2, "this store has none", "run", tmp_path / "store", *BUDGET, "--exit", "patience:1", "--text", "a")


def test_ls_lists_every_shard(run, store):
    lines = run("ls", store, "--json").lines
    assert [line["shard"] for line in lines if line["stage"] == "layer.0"] == [
        "layer-00-attention",
        "layer-00-up",
        "layer-00-down",
    ]
    text = run("ls", store).out
    assert "head.safetensors" in text
    assert f"exits after layers 1 to {NUM_LAYERS - 1}" in text


def test_verify_names_the_damaged_file(run, store, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    path = tmp_path / "store" / "layer-01-up.safetensors"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    said = run("verify", tmp_path / "store")
    assert said.code == 4
    assert said.out.startswith("layer-01-up.safetensors: sha256 differs")
    bad = [line["file"] for line in run("verify", tmp_path / "store", "--json").lines if not line["ok"]]
    assert bad == ["layer-01-up.safetensors"]
    assert run("verify", store).code == 0


def test_a_damaged_shard_stops_a_run(refused, store, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    path = tmp_path / "store" / "layer-02-down.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(4, "layer-02-down.safetensors", "run", tmp_path / "store", *BUDGET, "--text", "the bank")


def test_plan_tells_what_would_stay(run, store):
    (plan,) = run("plan", store, *BUDGET, "--json").lines
    assert plan["feasible"] is True
    assert plan["predicted_peak_bytes"] <= plan["budget_bytes"] == 2 << 30
    assert [stage["stage"] for stage in plan["stages"]] == [
        "embedding",
        *(f"layer.{i}" for i in range(NUM_LAYERS)),
        "head",
    ]
    assert all(shard["resident"] for stage in plan["stages"] for shard in stage["shards"])
    assert "predicted peak" in run("plan", store, *BUDGET).out


def test_an_impossible_plan_is_told_and_ends_with_3(run, store):
    said = run("plan", store, "--budget", "1MiB", "--json")
    assert said.code == 3
    assert said.lines[0]["feasible"] is False
    assert said.lines[0]["smallest_budget_bytes"] > 1 << 20
    assert said.err.startswith("offramp: error: budget of 1.00 MiB is too small")
    assert run("plan", store, "--budget", "1MiB").code == 3


def test_bench_measures_each_budget_in_its_own_process(run, store):
    budgets = "600MiB,500MiB"
    lines = run(
        "bench", store, "--budget", budgets, "--repeat", "1", "--passes", "2", "--max-length", "8", "--json"
    ).lines
    assert [line["budget_bytes"] for line in lines] == [600 << 20, 500 << 20]
    for line in lines:
        assert {"latency_seconds_median", "latency_seconds_p95", "bound_seconds", "bytes_read_per_input"} <= set(line)
        assert 0 < line["peak_rss_bytes"] <= line["budget_bytes"]


def test_bench_ends_as_its_processes_do(refused, store, tmp_path):
    refused(3, "the smallest budget that works is", "bench", store, "--budget", "1MiB", "--repeat", "1")
    refused(2, "none.txt", "bench", store, "--budget", "500MiB", "--repeat", "1", "--input", tmp_path / "none.txt")


def test_bench_spends_no_round_if_a_budget_is_impossible(refused, store):
    said = refused(3, "budget of 1.00 MiB", "bench", store, "--budget", "500MiB,1MiB", "--repeat", "1", "--passes", "1")
    assert "round" not in said.err


def test_random_input_is_no_longer_than_the_model_reads(run, refused, store, tmp_path):
    assert run("memory", store, *BUDGET, "--out", tmp_path / "m.svg").code == 0
    assert run("bench", store, "--budget", "500MiB", "--repeat", "1", "--passes", "1").code == 0
    too_long = ("--max-length", "999")
    refused(2, "max_length 999", "memory", store, *BUDGET, "--out", tmp_path / "m.svg", *too_long)
    refused(2, "max_length 999", "bench", store, "--budget", "500MiB", "--repeat", "1", *too_long)


def test_bench_refuses_exits_on_random_input(refused, store):
    refused(2, "give --input", "bench", store, "--budget", "500MiB", "--exit", "patience:1")


def test_memory_draws_a_picture(run, store, tmp_path):
    said = run("memory", store, *BUDGET, "--out", tmp_path / "m.svg", "--max-length", "8", "--json")
    assert said.code == 0
    assert said.lines[0]["picture"] == str(tmp_path / "m.svg")
    assert ET.parse(tmp_path / "m.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize("form", ["table", "md", "csv"])
def test_memory_tells_the_bytes_and_milliseconds_of_each_stage(run, store, tmp_path, form):
    words = ("memory", store, *BUDGET, "--out", tmp_path / "m.svg", "--passes", 3, "--format", form)
    said = run(*words)
    assert said.code == 0, said.err
    stages = ["embedding", *(f"layer.{number}" for number in range(NUM_LAYERS)), "head"]
    first, *rows = said.out.splitlines()
    if form == "csv":
        table = list(csv.DictReader(said.out.splitlines()))
        assert [row["stage"] for row in table] == stages
        sizes = {line["shard"]: line["bytes"] for line in run("ls", store, "--json").lines}
        layers = sum(size for name, size in sizes.items() if name.startswith("layer-"))
        assert sum(int(row["weight_bytes"]) for row in table[1:-1]) == layers
        assert all(float(row["compute_ms"]) > 0 for row in table)
        assert sum(float(row["read_bytes"]) for row in table[1:-1]) == pytest.approx(layers / 3)
        return
    cells = [re.split(r"\s*\|\s*" if form == "md" else r"\s{2,}", row.strip(" |")) for row in rows]
    assert [row[0] for row in cells if row[0] != "---"] == [*stages, "all"]
    assert {len(row) for row in cells} == {7}
    assert first.strip("| ").startswith("stage")
    assert [stage["stage"] for stage in run(*words, "--json").lines[0]["stages"]] == stages


def test_memory_needs_a_library_before_the_run(refused, store, tmp_path, monkeypatch):
    monkeypatch.setattr("offramp.cli.memory.find_spec", lambda name: None)
    said = refused(1, "matplotlib is not installed", "memory", store, *BUDGET, "--out", tmp_path / "m.svg")
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "replacement"),
    [
        (("profile", "STORE", "--out", "m.svg"), "offramp memory STORE --out m.svg"),
        (("profile", "STORE", "--out", "m.png"), "offramp memory STORE --out m.png"),
        (("profile", "STORE", "--passes", "3"), "offramp memory STORE --passes N"),
        (("profile", "STORE", "--trace=t.jsonl"), "offramp memory STORE --trace FILE"),
        (("bench", "STORE", "--save-profile", "p.json"), "offramp profile STORE --out FILE"),
        (("bench", "STORE", "--save-profile=p.json"), "offramp profile STORE --out FILE"),
    ],
)
def test_an_earlier_spelling_names_the_present_one(refused, store, words, replacement):
    said = refused(2, replacement, *(store if word == "STORE" else word for word in words))
    assert len(said.err.splitlines()) == 1


def test_a_profile_needs_a_json_file(refused, store, tmp_path):
    refused(2, ["give --out profile.json", "offramp memory STORE"], "profile", store)
    refused(2, "use .json", "profile", store, "--out", tmp_path / "profile.txt")
    refused(2, "no such folder", "profile", store, "--out", tmp_path / "none" / "profile.json")


@pytest.mark.parametrize("command", NEEDS_NEWER_PYTHON)
def test_a_command_that_needs_a_newer_python_names_it(refused, monkeypatch, command):
    monkeypatch.setattr(sys, "version_info", (3, 8, 18))
    refused(2, [f"offramp {command} needs Python 3.10 or newer", "this is 3.8.18"], command)


def test_env_names_versions_and_hardware(run):
    (found,) = run("env", "--json").lines
    assert found["offramp_version"] == offramp.__version__
    assert found["library_versions"]["onnxruntime"]
    assert "cpu_model" in run("env").out


def test_help_and_version(run):
    assert run("--version").out == f"offramp {offramp.__version__}\n"
    overview = run("--help")
    assert overview.code == 0
    assert all(f"  {name} " in overview.out for name in COMMANDS)
    assert run().code == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run, command):
    said = run(command, "--help")
    assert said.code == 0
    assert said.out.startswith(f"usage: offramp {command}")


def test_windows_is_refused_in_one_line(run, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    said = run("env")
    assert said.code == 1
    assert said.err == "offramp: error: Windows is not supported - run it on Linux, or in WSL\n"


def test_ls_draws_the_stages_of_any_store(run, refused, model, tmp_path):
    assert run("divide", model, tmp_path / "store").code == 0
    assert run("ls", tmp_path / "store", "--graph", tmp_path / "stages.svg").code == 0
    picture = (tmp_path / "stages.svg").read_text()
    assert picture.count('rx="6"') == NUM_LAYERS + 2
    assert picture.count("<circle") == NUM_LAYERS - 1
    refused(2, "cannot write", "ls", tmp_path / "store", "--graph", tmp_path / "stages.txt")

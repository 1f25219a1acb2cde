"""Images from the command line: train, score, divide, run, tune and bench, by the same commands as texts."""

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
import transformers

import offramp
from offramp.store.transcript import read_transcript
from tests.tiny_vision import LABELS, write_images, write_model

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ("--epochs", 1, "--heads-epochs", 1, "--batch", 16)
BUDGET = ("--budget", "4GiB")  # of this process, which has pytest in it
POLICY = ("--exit", "confidence:0.4")
NUM_EACH = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the ResNet, its data, its run, its store and its transcripts, all by the command line."""
    from offramp.cli import main

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("vision")
    write_model(folder / "model", "resnet")
    write_images(folder / "train.zip", 30)
    write_images(folder / "dev.zip", NUM_EACH, first=500)
    zipfile.ZipFile(folder / "dev.zip").extractall(folder / "images")
    data = ("--train", folder / "train.zip", "--dev", folder / "dev.zip")
    for words in (
        ("train", folder / "model", *data, "--out", folder / "run", *QUICK),
        ("eval", folder / "run", *data, "--split", "tune,certify,dev", "--transcript", folder / "said"),
        ("divide", folder / "run", folder / "store"),
    ):
        assert main([str(word) for word in words]) == 0
    return folder


@pytest.fixture
def answers(run, place):
    def ask(*words):
        said = run("run", place / "store", *BUDGET, "--json", *words)
        assert said.code == 0, said.err
        return said.lines[:-1], said.lines[-1]["record"]

    return ask


def test_the_store_answers_what_the_transcript_of_the_run_says(place, answers):
    """The order of the transcript is that of the zip: class by class, by name."""
    transcript = read_transcript(place / "said", "dev")
    last_NC = np.asarray(transcript.logits_NKC)[:, -1]
    for backend in ("ort", "torch"):
        lines, record = answers("--input", place / "dev.zip", "--backend", backend)
        assert [line["label"] for line in lines] == [LABELS[index] for index in last_NC.argmax(1)]
        assert {line["exit_stage"] for line in lines} == {4}
        assert record["num_inputs"] == 3 * NUM_EACH


def test_the_store_is_scored_as_its_run(run, place):
    said = [run("eval", place / name, "--dev", place / "dev.zip", *POLICY, "--json").lines for name in ("run", "store")]
    assert said[0] == said[1]


def test_rows_leave_where_eval_says(run, place, answers):
    (report,) = run("eval", place / "run", "--dev", place / "dev.zip", *POLICY, "--json").lines
    lines, _ = answers("--input", place / "dev.zip", *POLICY)
    assert np.mean([line["exit_stage"] for line in lines]) == pytest.approx(report["policies"][0]["mean_exit"])


@pytest.mark.parametrize("options", [("--batch", 5), ("--batch", "bulk"), ("--deadline", "100s"), ("--threads", 2)])
def test_options_do_not_change_answers(place, answers, options):
    plain = answers("--input", place / "dev.zip", *POLICY)[0]
    other = answers("--input", place / "dev.zip", *POLICY, *options)[0]
    assert [(line["label"], line["exit_stage"]) for line in other] == [
        (line["label"], line["exit_stage"]) for line in plain
    ]


def test_a_folder_and_single_images_are_what_a_zip_is(place, answers):
    zipped = answers("--input", place / "dev.zip")[0]
    assert answers("--input", place / "images")[0] == zipped
    one = answers("--input", place / "images" / "bird" / "500.png")[0]
    assert [line["label"] for line in one] == [zipped[0]["label"]]


def test_a_person_sees_the_name_of_each_image(run, place):
    said = run("run", place / "store", *BUDGET, "--input", place / "images" / "cat" / "501.png")
    assert said.out.splitlines()[0].split()[0] in LABELS
    assert "exit 4/4" in said.out


def test_plan_verify_memory_and_bench(run, place, tmp_path):
    store = place / "store"
    assert json.loads(run("plan", store, *BUDGET, "--input", place / "dev.zip", "--json").out)["feasible"]
    assert run("verify", store).code == 0
    for words in ((), ("--input", place / "images")):
        said = run("memory", store, *BUDGET, "--out", tmp_path / "m.svg", "--batch", 2, *words, "--json")
        assert said.code == 0, said.err
        assert (tmp_path / "m.svg").read_text().count("<svg") == 1
        assert said.lines[0]["num_inputs"] == 4
    for words in ((), (*POLICY, "--input", place / "dev.zip")):
        (record,) = run("bench", store, "--budget", "300MiB", "--repeat", 1, "--threads", 1, *words, "--json").lines
        assert record["peak_rss_bytes"] <= 300 << 20


def test_a_policy_is_tuned_on_images_and_run(run, place, answers, tmp_path):
    out = tmp_path / "policy.json"
    said = run("profile", place / "store", *BUDGET, "--out", tmp_path / "p.json", "--json")
    assert said.code == 0 and len(said.lines[0]["seconds"]) == 1, "an image has one length"
    words = ("--transcript", place / "said", "--profile", tmp_path / "p.json", "--force-profile")
    said = run("tune", place / "store", *words, "--max-drop", 60, "--confidence", 0.5, "--out", out, "--json")
    assert said.code == 0, said.err
    lines, record = answers("--input", place / "dev.zip", "--exit", out)
    assert record["exit"] != "none"
    assert len(lines) == 3 * NUM_EACH
    assert run("tune", "--explain", out).code == 0


def test_rivals_are_measured_on_a_labelled_split(run, place):
    words = ("--dev", place / "dev.zip", "--rows", 5, "--repeat", 1, "--threads", 1, *POLICY)
    said = run("bench", place / "store", *words, "--json")
    assert said.code == 0, said.err
    *rows, last = said.lines
    assert [row["exit"] for row in rows] == ["none"] * 3 + [POLICY[1]] * 3 + ["stage:1", "stage:2", "stage:3"]
    transcript = read_transcript(place / "said", "dev")
    picked = [index * 3 * NUM_EACH // 5 for index in range(5)]
    right_NK = np.asarray(transcript.logits_NKC).argmax(2) == np.asarray(transcript.labels_N)[:, None]
    for row, exit in ((rows[0], 4), (rows[6], 1), (rows[8], 3)):
        assert row["scores"]["accuracy"] == pytest.approx(100 * right_NK[picked, exit - 1].mean())
    assert last["record"]["num_texts"] == 5


def test_heads_alone_leave_the_model_as_it_is_and_a_second_call_trains_nothing(run, place, tmp_path):
    words = ("train", place / "run", "--train", place / "train.zip", "--out", tmp_path / "run", *QUICK)
    said = run(*words, "--loss", "heads-only")
    assert said.code == 0, said.err
    weights = [(folder / "model.safetensors").read_bytes() for folder in (place / "run", tmp_path / "run")]
    heads = [(folder / "exits.safetensors").read_bytes() for folder in (place / "run", tmp_path / "run")]
    assert weights[0] == weights[1] and heads[0] != heads[1]
    assert "already trained" in run(*words, "--loss", "heads-only").err


def test_an_interrupted_training_goes_on(run, place, tmp_path, monkeypatch):
    """To the same files as one that was not interrupted."""
    words = ("train", place / "model", "--train", place / "train.zip", "--dev", place / "dev.zip", *QUICK)
    words = (*words, "--save-steps", 1, "--out", tmp_path / "run")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("offramp.training.job.Job._fit_heads", interrupt)
        said = run(*words)
    assert said.code == 130 and "continues from the last checkpoint" in said.err
    said = run(*words)
    assert said.code == 0 and "from checkpoint-" in said.err
    for name in ("model.safetensors", "exits.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (place / "run" / name).read_bytes()


def test_what_is_wrong_with_inputs_ends_with_2(refused, place, tmp_path):
    store = place / "store"
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.png").write_bytes(b"no image")
    (tmp_path / "no.zip").write_bytes(b"no zip")
    (tmp_path / "t.txt").write_text("a text\n")
    images = "the model takes images, not texts"
    refused(2, images, "run", store, *BUDGET, "--text", "a text")
    refused(2, images, "plan", store, *BUDGET, "--pair", "a", "b")
    refused(2, images, "run", store, *BUDGET, "--input", tmp_path / "t.txt")
    refused(2, "no images", "run", store, *BUDGET, "--input", tmp_path / "empty")
    refused(2, "cannot be decoded", "run", store, *BUDGET, "--input", tmp_path / "no.png")
    refused(2, "not a whole zip", "run", store, *BUDGET, "--input", tmp_path / "no.zip")
    refused(2, "no length to cut to", "run", store, *BUDGET, "--max-length", 8, "--input", place / "dev.zip")
    refused(2, "patience:4", "run", store, *BUDGET, "--exit", "patience:4", "--input", place / "dev.zip")
    refused(3, "the smallest budget that works is", "run", store, "--budget", "1MiB", "--input", place / "dev.zip")


def test_what_is_wrong_with_data_ends_with_2(refused, place, tmp_path):
    write_images(tmp_path / "one.zip", 4, labels=("bird",))
    write_images(tmp_path / "other.zip", 4, labels=("bird", "fish"))
    table = tmp_path / "t.tsv"
    table.write_text("sentence\tlabel\n" + "".join(f"text {i}\t{LABELS[i % 3]}\n" for i in range(60)))
    train = ("train", place / "model", "--out", tmp_path / "run", *QUICK)
    refused(2, "the only class is 'bird'", *train, "--train", tmp_path / "one.zip")
    refused(2, "no images", *train, "--train", tmp_path)
    refused(2, "this is a regression", *train, "--train", place / "train.zip", "--regression")
    refused(
        2, "text_column and pair_column are for texts", *train, "--train", place / "train.zip", "--text-column", "body"
    )
    refused(4, "the model takes images, the data are texts", *train, "--train", table)
    refused(4, "heads of the form 'own'", *train, "--train", place / "train.zip", "--heads", "own")
    score = ("eval", place / "run")
    refused(2, "class 'fish' is none of bird, cat, dog", *score, "--dev", tmp_path / "other.zip")
    refused(4, "the model takes images, the data are texts", *score, "--dev", table)
    assert not (tmp_path / "run").exists()


def test_images_for_a_model_of_texts_are_refused(refused, store, place):
    for where in (place / "dev.zip", place / "images", place / "images" / "cat" / "500.png"):
        refused(2, "the model takes texts", "run", store, *BUDGET, "--input", where)
    refused(2, "none of business, film, sport", "bench", store, *BUDGET, "--dev", place / "dev.zip")


def test_a_missing_image_processor_is_named(refused, place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    data = ("--dev", place / "dev.zip")
    refused(4, ["no image processor", "preprocessor_config.json"], "eval", tmp_path / "model", *data)
    small = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    module = transformers.AutoModelForImageClassification.from_config(small).eval()
    offramp.divide(module, torch.zeros(2, 3, 32, 32), tmp_path / "store")
    words = ("--input", place / "images", *BUDGET)
    refused(2, ["the store has no image processor", "preprocessor_config.json"], "run", tmp_path / "store", *words)

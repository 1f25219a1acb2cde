"""`train` and `eval` on tables of one's own and on GLUE's folders: what is printed, and what is refused."""

import json
import shutil

import pytest

from offramp.experiments.task_bench import take_sample
from offramp.store import Store
from offramp.store.transcript import read_transcript
from offramp.tasks import DataSpec, load
from offramp.tasks.glue import TASKS
from tests.training.tiny import LABELS, VOCABULARY, examples, make_model

QUICK = ("--epochs", 1, "--heads-epochs", 1, "--max-length", 16, "--batch", 8)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    make_model("bert").base_model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "mine.tsv"
    rows = [f"{text}\t{LABELS[label]}\n" for text, label in examples(90)]
    path.write_text("sentence\tlabel\n" + "".join(rows))
    return path


@pytest.fixture(scope="module")
def trained(encoder, table, tmp_path_factory):
    """A run folder, trained from the command line."""
    from offramp.cli import main

    out = tmp_path_factory.mktemp("runs") / "mine"
    words = ["train", encoder, "--train", table, "--out", out, *QUICK]
    assert main([str(word) for word in words]) == 0
    return out


def write_glue(folder, name, num_rows=60):
    task = TASKS[name]
    columns = [*task.texts[0], task.label_columns[0]]
    for split in ("train", *task.dev_splits):
        rows = ["\t".join(columns)]
        for number in range(num_rows if split == "train" else 9):
            label = number / 12 if not task.labels else number % len(task.labels)
            rows.append("\t".join([*(f"the {split} {number} rose" for _ in task.texts[0]), str(label)]))
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return folder


def test_a_table_of_ones_own_goes_from_training_to_a_run(run, trained, table, tmp_path):
    said = run("eval", trained, "--train", table)
    assert said.code == 0
    head, columns, *rows = said.out.splitlines()
    assert head.startswith("dev: ")
    assert columns.split("  ")[-1] == "correct here, wrong at last exit"
    assert [row.split()[:2] for row in rows[:3]] == [["exit", "1"], ["exit", "2"], ["exit", "3"]]
    assert rows[3].startswith("overthinking: ")
    assert run("divide", trained, tmp_path / "store").code == 0
    of_store = run("eval", tmp_path / "store", "--train", table)
    assert of_store.out == said.out
    result = run("run", tmp_path / "store", "--budget", "2GiB", "--exit", "stage:1", "--text", "a red rose", "--json")
    assert result.lines[0]["label"] in LABELS
    assert result.lines[0]["exit_stage"] == 1


def test_several_seeds_make_several_runs_and_one_of_them_is_named(run, refused, encoder, table, tmp_path):
    words = ("train", encoder, "--train", table, "--out", tmp_path / "runs", *QUICK, "--seed", "3,1", "--json")
    said = run(*words)
    assert [(line["run"], line["seed"]) for line in said.lines] == [
        (str(tmp_path / "runs" / f"seed-{seed}"), seed) for seed in (3, 1)
    ]
    assert {len(line["tune_scores"]) for line in said.lines} == {3}
    refused(2, "name one of its folders: seed-1, seed-3", "divide", tmp_path / "runs", tmp_path / "store")
    again = run(*words)
    assert again.lines == said.lines
    assert again.err.count("already trained") == 2
    refused(2, ("belongs to another configuration", "epochs 1 there, 2 here"), *words, "--epochs", 2)


def test_transcripts_of_several_splits(run, refused, trained, table, tmp_path):
    words = ("eval", trained, "--train", table, "--split", "tune,certify,dev", "--transcript", tmp_path / "t")
    said = run(*words, "--features", "--exit", "patience:1", "--exit", "confidence:0.9", "--json")
    assert [line["split"] for line in said.lines] == ["tune", "certify", "dev"]
    for line in said.lines:
        kept = read_transcript(tmp_path / "t", line["split"])
        assert len(kept.labels_N) == line["num_rows"]
        assert [row["policy"] for row in line["policies"]] == ["patience:1", "confidence:0.9"]
        assert kept.about.max_length == 16, "as in training"
    refused(2, "target exists", *words)
    refused(2, "--features are written to a transcript", "eval", trained, "--train", table, "--features")


@pytest.mark.parametrize("name", TASKS)
def test_every_task_of_glue_trains_and_scores_from_a_folder(run, encoder, name, tmp_path):
    data, task = write_glue(tmp_path / "glue", name), TASKS[name]
    out = tmp_path / "run"
    said = run("train", encoder, "--task", name, "--data", data, "--out", out, *QUICK, "--loss", "mixed", "--json")
    assert said.code == 0, said.err
    assert set(said.lines[0]["tune_scores"][0]) == {*task.metrics, "score"}
    said = run("eval", out, "--task", name, "--data", data, "--json")
    assert [line["split"] for line in said.lines] == list(task.dev_splits)
    assert {len(line["exits"]) for line in said.lines} == {3}
    config = json.loads((out / "config.json").read_text())
    assert list(config["id2label"].values()) == list(task.labels or ("score",))


def test_partial_data_are_said_to_be_partial(run, trained, encoder, tmp_path):
    data = write_glue(tmp_path / "glue", "rte")
    (data / "rte" / "dev.tsv").unlink()
    said = run("train", encoder, "--task", "rte", "--data", data, "--out", tmp_path / "run", *QUICK)
    assert "offramp: warning: no score of rte: there is no dev file" in said.err


def test_rows_can_be_fewer(run, encoder, table, tmp_path):
    said = run("train", encoder, "--train", table, "--out", tmp_path / "run", *QUICK, "--max-rows", 20)
    assert "exits on 20 rows" in said.err


def test_settings_reach_the_training(run, encoder, table, tmp_path):
    words = ("--loss", "distill", "--heads", "own", "--exit-weights", "equal", "--lr", "1e-3", "--head-lr", "2e-3")
    words += ("--accumulate", 2, "--warmup", 0.2, "--precision", "bfloat16", "--save-steps", 7)
    assert run("train", encoder, "--train", table, "--out", tmp_path / "run", *QUICK, *words).code == 0
    found = json.loads((tmp_path / "run" / "train.json").read_text())
    wanted = {"loss": "distill", "heads": "own", "exit_weights": [1 / 3] * 3, "learning_rate": 1e-3}
    wanted |= {"head_learning_rate": 2e-3, "accumulate": 2, "warmup": 0.2, "precision": "bfloat16", "batch_size": 8}
    assert {key: found[key] for key in wanted} == wanted


def test_what_cannot_be_trained_is_refused(refused, encoder, table, tmp_path):
    out = ("--out", tmp_path / "run")
    train = ("train", encoder, *out)
    refused(2, "no data", *train)
    refused(2, "both a task and a table", *train, "--task", "rte", "--train", table)
    refused(2, ("data names a folder of GLUE", "no task is given"), *train, "--train", table, "--data", tmp_path)
    refused(2, ("unknown task 'colla'", "cola"), *train, "--task", "colla")
    refused(2, "no train or dev table of rte", *train, "--task", "rte", "--data", tmp_path)
    refused(2, ("no column 'text', found 'sentence', 'label'",), *train, "--train", table, "--text-column", "text")
    refused(2, "'red' is not a number", *train, "--train", table, "--regression")
    refused(2, "heads must be one of", *train, "--train", table, "--heads", "hat")
    refused(2, "warmup must be from 0 to below 1", *train, "--train", table, "--warmup", 2)
    refused(2, "whole numbers, each once", *train, "--train", table, "--seed", "1,1")
    refused(2, "max_length 99 exceeds the 24 tokens", *train, "--train", table, "--max-length", 99)
    refused(2, "no such folder", "train", tmp_path / "absent", *out, "--train", table)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").touch()
    refused(2, "target exists and is not a run folder", *train, "--train", table, *QUICK)


def test_another_architecture_is_refused(refused, table, tmp_path):
    folder = tmp_path / "gpt"
    folder.mkdir()
    make_model("bert").base_model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    refused(4, "gpt2", "train", folder, "--train", table, "--out", tmp_path / "run")
    refused(4, "gpt2", "eval", folder, "--dev", table)


def test_what_cannot_be_scored_is_refused(refused, trained, encoder, table, tmp_path):
    refused(2, "unknown split 'test'", "eval", trained, "--train", table, "--split", "test")
    refused(2, "no data", "eval", trained)
    refused(4, "the model has no classification head", "eval", encoder, "--dev", table)
    rte = write_glue(tmp_path / "glue", "rte")
    refused(2, "those of the data entailment, not_entailment", "eval", trained, "--task", "rte", "--data", rte)
    refused(2, "label 'purple' is none of", "eval", trained, "--dev", other_labels(tmp_path))


def other_labels(folder):
    path = folder / "other.tsv"
    path.write_text("sentence\tlabel\na rose\tpurple\n")
    return path


OTHER_CUT = ("--split-seed", 1)
LEFT_OUT = "were trained on"


def test_rows_that_were_trained_on_are_not_scored_as_others(run, refused, trained, table, tmp_path):
    """Another seed, or the table under another name, puts rows of train into dev."""
    run("divide", trained, tmp_path / "store")
    (tmp_path / "copy.tsv").write_text(table.read_text().replace("the ", "The  "))
    for model in (trained, tmp_path / "store"):
        for words in (("--train", table, *OTHER_CUT), ("--dev", tmp_path / "copy.tsv")):
            refused(2, (LEFT_OUT, "--include-training-rows"), "eval", model, *words)
            asked = run("eval", model, *words, "--include-training-rows", "--json")
            assert asked.code == 0, asked.err
            (line,) = asked.lines
            assert line["includes_training_rows"] and 0 < line["training_rows"] <= line["num_rows"]
            assert f"{line['training_rows']} of {line['num_rows']} rows of dev {LEFT_OUT}" in asked.err
    refused(2, LEFT_OUT, "eval", trained, "--train", table, "--split", "train")
    shown = run("eval", trained, "--train", table, "--split", "train", "--include-training-rows").out
    assert "of which were trained on" in shown.splitlines()[0]
    kept = run("eval", trained, "--train", table, "--json")
    assert (kept.lines[0]["training_rows"], kept.lines[0]["includes_training_rows"]) == (0, False)


def test_a_few_copies_of_rows_of_training_are_left_out_and_counted(run, trained, table, tmp_path):
    first = table.read_text().splitlines()[1:]
    splits = load(DataSpec(train=table))
    copy = next(line for line in first if line.split("\t")[0] == splits.examples["train"][0].text)
    rows = [f"a grey rose {number}\tred" for number in range(19)]
    (tmp_path / "dev.tsv").write_text("\n".join(["sentence\tlabel", *rows, copy]) + "\n")
    said = run("eval", trained, "--dev", tmp_path / "dev.tsv", "--json")
    assert (said.lines[0]["num_rows"], said.lines[0]["training_rows"]) == (19, 1)
    assert "1 of 20 rows of dev were trained on, and are left out" in said.err


def test_a_training_that_does_not_record_its_rows(run, refused, trained, table, tmp_path):
    """Run folders and stores of before go on working; the cut into splits is compared, as it was."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "trained-rows.json").unlink()
    assert run("divide", tmp_path / "run", tmp_path / "store").code == 0
    for model in (tmp_path / "run", tmp_path / "store"):
        refused(2, "split_seed 0 there, 1 here", "eval", model, "--train", table, *OTHER_CUT)
        cut = ("--train", table, "--dev", table, "--split", "tune")
        refused(2, ("split differently than in training", "cuts_dev True there, False here"), "eval", model, *cut)
        assert run("eval", model, "--train", table, *OTHER_CUT, "--include-training-rows").code == 0
        said = run("eval", model, "--train", table, "--json")
        assert said.code == 0 and said.lines[0]["training_rows"] is None
        assert said.err.count("the rows of its training are not recorded") == 1


def test_bench_refuses_what_eval_does(run, refused, trained, table, tmp_path):
    run("divide", trained, tmp_path / "store")
    words = ("bench", tmp_path / "store", "--train", table, *OTHER_CUT)
    refused(2, (LEFT_OUT, "--include-training-rows"), *words)
    with Store(tmp_path / "store", "never") as store:
        sample = take_sample(store, load(DataSpec(train=table, split_seed=1)), "dev", 5, include=True)
    assert sample.includes_training_rows and sample.training_rows > 0 and len(sample.texts) == 5


def test_training_says_what_it_works_with(run, encoder, table, tmp_path):
    words = ("--train", table, *QUICK)
    said = run("train", encoder, "--out", tmp_path / "run", *words)
    examples = load(DataSpec(train=table)).examples
    for name, rows in examples.items():
        counts = ", ".join(f"{label} {sum(row.label == index for row in rows)}" for index, label in
                           enumerate(sorted(LABELS)))  # fmt: skip
        assert f"{name}: {len(rows)} rows: {counts}\n" in said.err
    assert "the model has no head for 3 labels: a new one is trained\n" in said.err
    assert "phases: model with 2 heads (epochs: 1), heads alone (epochs: 1), measuring the exits\n" in said.err
    again = run("train", tmp_path / "run", "--out", tmp_path / "again", *words, "--loss", "heads-only")
    assert "a new one" not in again.err and "phases: heads alone (epochs: 1), measuring the exits\n" in again.err


def test_a_bare_encoder_has_no_head_to_keep(refused, encoder, table, tmp_path):
    words = ("train", encoder, "--train", table, "--out", tmp_path / "run", *QUICK, "--loss", "heads-only")
    said = refused(4, "it has no head for 3 labels", *words)
    assert "phases" not in said.err and not (tmp_path / "run.partial").exists()


def test_a_store_cuts_texts_as_training_did(run, trained, table, tmp_path):
    run("divide", trained, tmp_path / "store")
    run("eval", tmp_path / "store", "--train", table, "--transcript", tmp_path / "t")
    assert read_transcript(tmp_path / "t", "dev").about.max_length == 16

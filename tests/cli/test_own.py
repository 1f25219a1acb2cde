"""A module of one's own from the command line: its store is scored, tuned, run and measured on an .npz of arrays."""

import numpy as np
import pytest
import torch
from torch import nn

import offramp
from offramp.errors import NonFiniteError
from offramp.tasks import DataSpec, load
from offramp.training import TrainSettings, train_exits
from tests.tiny_families import write_classifier
from tests.training.tiny import LABELS as COLOURS
from tests.training.tiny import examples

LABELS = ("one", "two", "three")
BUDGET = ("--budget", "4GiB")  # of this process, which has pytest in it
NUM_ROWS = 160


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(one_thread, tmp_path_factory):
    """A folder with labelled arrays, and a store with exits that were trained on a part of them."""
    folder = tmp_path_factory.mktemp("own")
    write_arrays(folder / "data.npz", NUM_ROWS, seed=0)
    write_arrays(folder / "new.npz", NUM_ROWS, seed=1)
    found = load(DataSpec(train=folder / "data.npz", label_column="kind", labels=LABELS))
    train_own(folder, found.examples["train"], found.examples["tune"], "run", "store")
    return folder


def write_arrays(path, num_rows, seed):
    x = torch.randn(num_rows, 8, generator=torch.Generator().manual_seed(seed))
    labels = [LABELS[label] for label in x[:, :3].argmax(1).tolist()]
    np.savez(path, **{"0": x.numpy(), "kind": np.array(labels)})


def train_own(folder, train, tune, run, store, epochs=6):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), Block(), Block(), Block(), nn.Linear(16, 3)).eval()
    settings = TrainSettings(epochs=epochs, heads_epochs=2, learning_rate=1e-2)
    train_exits(module, train, tune, folder / run, labels=LABELS, settings=settings)
    offramp.divide(module, torch.randn(2, 8), folder / store, exits=folder / run)


def data(place):
    return ("--train", place / "data.npz", "--label-column", "kind")


def test_it_is_scored_tuned_and_run(run, place, tmp_path):
    kept, policy = ("--transcript", tmp_path / "said"), tmp_path / "policy.json"
    said = run("eval", place / "store", *data(place), "--split", "tune,certify", *kept, "--json")
    assert said.code == 0, said.err
    assert [line["split"] for line in said.lines] == ["tune", "certify"] and len(said.lines[0]["exits"]) == 3
    tuned = run("tune", place / "store", *kept, "--latency", "1s", *BUDGET, "--out", policy)
    assert tuned.code == 0, tuned.err
    found = run("run", place / "store", "--input", place / "data.npz", "--exit", policy, *BUDGET, "--json")
    assert found.code == 0, found.err
    assert len(found.lines) == NUM_ROWS + 1 and {line["label"] for line in found.lines[:-1]} <= set(LABELS)


def test_what_was_trained_on_is_not_scored_tuned_or_measured(run, refused, place, tmp_path, one_thread):
    """Rows that a program of one's own cut otherwise: the last 20 were held out, and the cut of the file is another."""
    found = load(DataSpec(dev=place / "data.npz", label_column="kind", labels=LABELS)).examples["dev"]
    rows = [(torch.from_numpy(example.text.arrays["0"]), example.label) for example in found]
    train_own(tmp_path, rows[:-20], rows[-20:], "run", "store", epochs=1)
    asked, kept = ("--include-training-rows", "--json"), ("--transcript", tmp_path / "said")
    score = ("eval", tmp_path / "store", *data(place), "--split", "tune,certify")
    refused(2, ("rows of tune were trained on", asked[0]), *score)
    lines = run(*score, *kept, *asked).lines
    assert all(line["includes_training_rows"] and line["training_rows"] > 0.5 * line["num_rows"] for line in lines)
    tune = ("tune", tmp_path / "store", *kept, "--latency", "1s", *BUDGET, "--out", tmp_path / "policy.json")
    assert "measuring" not in refused(2, ("the model was trained on", asked[0]), *tune).err
    (line,) = run(*tune, *asked).lines
    assert line["training_rows"] == lines[0]["training_rows"]
    assert "the model was trained on" in run("tune", "--explain", tmp_path / "policy.json").out
    measure = ("bench", tmp_path / "store", *data(place), "--rows", 2, "--repeat", 1, "--threads", 1)
    refused(2, ("rows of dev were trained on", asked[0]), *measure)
    np.savez(tmp_path / "held.npz", **{"0": np.stack([x for x, _ in rows[-20:]]),
                                       "kind": [LABELS[label] for _, label in rows[-20:]]})  # fmt: skip
    (line,) = run("eval", tmp_path / "store", "--dev", tmp_path / "held.npz", *data(place)[2:], "--json").lines
    assert (line["num_rows"], line["training_rows"]) == (20, 0)


def test_what_leaves_is_what_eval_says(run, place):
    dev = ("--dev", place / "new.npz", "--label-column", "kind")
    (report,) = run("eval", place / "store", *dev, "--exit", "confidence:0.7", "--json").lines
    words = ("--input", place / "new.npz", "--exit", "confidence:0.7")
    lines = run("run", place / "store", *words, *BUDGET, "--json").lines
    exits = [line["exit_stage"] for line in lines[:-1]]
    assert len(set(exits)) > 1 and np.mean(exits) == pytest.approx(report["policies"][0]["mean_exit"])


def test_what_is_wrong_is_told(refused, place, tmp_path):
    refused(2, "the module takes arrays", "run", place / "store", "--text", "hello")
    refused(2, "no array 'label' of labels", "eval", place / "store", "--dev", place / "data.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros((3, 8), np.float32))
    refused(2, "the module takes (0: float32, 1 axes)", "run", place / "store", "--input", tmp_path / "other.npz")
    refused(2, "no such file or folder", "run", place / "store", "--input", tmp_path / "absent.npz")
    refused(2, "there is no length to cut to", "run", place / "store", "--max-length", 8, "--input", place / "data.npz")


def test_a_text_classifier_of_any_family(run, tmp_path, one_thread):
    """Of ALBERT, whose names offramp does not know, by the same commands as BERT."""
    write_classifier(tmp_path / "model", "albert", num_layers=2)
    lines = "".join(f"{text}\t{COLOURS[label]}\n" for text, label in examples(90))
    (tmp_path / "t.tsv").write_text("sentence\tlabel\n" + lines)
    table, quick = ("--train", tmp_path / "t.tsv"), ("--epochs", 2, "--lr", "1e-3", "--max-length", 16)
    store, kept = tmp_path / "store", ("--transcript", tmp_path / "said")
    for words in (
        ("train", tmp_path / "model", *table, "--out", tmp_path / "run", *quick),
        ("divide", tmp_path / "run", store),
        ("eval", store, *table, "--split", "tune,certify,dev", *kept),
        ("tune", store, *kept, "--latency", "1s", *BUDGET, "--out", tmp_path / "policy.json"),
        ("plan", store, *BUDGET, "--max-length", 16),
        ("run", store, "--exit", tmp_path / "policy.json", *BUDGET, "--text", "the red sky", "--pair", "red", "green"),
        ("bench", store, "--passes", 3, "--repeat", 1, "--max-length", 16, "--json", *BUDGET),
    ):
        said = run(*words)
        assert said.code == 0, (words[0], said.err)
    assert said.lines[-1]["num_inputs"] >= 3


@pytest.mark.parametrize("number", [np.nan, -np.inf])
def test_an_input_that_is_not_finite_is_named_and_not_the_weights(refused, place, tmp_path, number):
    with np.load(place / "data.npz") as arrays:
        given = {name: arrays[name].copy() for name in arrays.files}
    given["0"][2, 5] = number
    np.savez(tmp_path / "odd.npz", **given)
    what = "has NaN or infinite numbers"
    run_words = ("--input", tmp_path / "odd.npz", "--batch", 4, *BUDGET)
    refused(4, [f"input '0' of row 3 {what}, so that head gave"], "run", place / "store", *run_words)
    refused(4, [what], "run", place / "store", *run_words, "--exit", "confidence:0.9")
    odd = ("--train", tmp_path / "odd.npz", "--label-column", "kind", "--split", "train,tune,certify,dev")
    odd += ("--include-training-rows",)
    refused(4, ["an input has NaN or infinite numbers", "of the data"], "eval", place / "store", *odd)


def test_an_input_of_a_training_that_is_not_finite_is_named(tmp_path):
    module = nn.Sequential(nn.Linear(8, 16), Block(), Block(), nn.Linear(16, 3))
    rows = [(torch.full((8,), float("nan") if number == 5 else 1.0), number % 3) for number in range(12)]
    with pytest.raises(NonFiniteError, match="input '0' has NaN or infinite numbers - training step 1 - replace"):
        train_exits(module, rows, rows[:3], tmp_path / "run", labels=LABELS, settings=TrainSettings(epochs=1))

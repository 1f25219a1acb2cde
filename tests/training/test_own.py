"""Exits on a module of one's own: trained, divided and run, and what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_model
from torch import nn

import offramp
from offramp.errors import NonFiniteError, SourceError, StoreError, UsageError
from offramp.experiments.evaluation import EvalSettings, evaluate
from offramp.store import Store
from offramp.store.transcript import read_transcript
from offramp.tasks.arrays import Record
from offramp.tasks.examples import Example, Splits
from offramp.training import TrainSettings, train_exits

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, LABELS = 16, ("one", "two", "three")
QUICK = TrainSettings(epochs=8, heads_epochs=4, batch_size=16, learning_rate=1e-2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Sum(nn.Module):
    """Two inputs, the second of which is a table's index; blocks in a list; the answer is in a dictionary."""

    def __init__(self):
        super().__init__()
        self.table, self.stem = nn.Embedding(5000, WIDTH), nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, len(LABELS))

    def forward(self, numbers, *, word):
        x = self.stem(numbers) + self.table(word)
        for layer in self.layers:
            x = layer(x)
        return {"answer": self.head(x)}


class Named(nn.Module):
    """No numbered blocks: layers by name, one hidden state from each to the next."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, numbers):
        return self.third(self.second(self.first(numbers).relu()).relu())


def sequence():
    return nn.Sequential(nn.Linear(8, WIDTH), *(Block() for _ in range(3)), nn.Dropout(0.1), nn.Linear(WIDTH, 3))


def made(make, seed=0):
    torch.manual_seed(seed)
    return make().eval()


def numbers(num, seed=0):
    """Vectors whose largest of the first three numbers is the label."""
    x = torch.randn(num, 8, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :3].argmax(1).tolist()


def pairs(num, seed=0):
    x, labels = numbers(num, seed)
    return [(x[i], labels[i]) for i in range(num)]


def train(make, out, settings=QUICK, **options):
    module = made(make)
    return module, train_exits(module, pairs(200), pairs(40, 1), out, labels=LABELS, settings=settings, **options)


@pytest.mark.parametrize(("make", "num_exits"), [(sequence, 3), (Named, 3)])
def test_from_a_module_to_a_store_that_leaves_early(make, num_exits, tmp_path):
    module, metrics = train(make, tmp_path / "run")
    assert metrics.logits_KNC.shape == (num_exits, 40, 3) and not module.training
    assert metrics.scores[-1]["accuracy"] > 70
    store = offramp.divide(module, torch.randn(2, 8), tmp_path / "store", exits=tmp_path / "run")
    x, _ = numbers(40, 1)
    for backend in ("ort", "torch"):
        with offramp.load(store, exit="confidence:0.6", backend=backend, batch=8) as classifier:
            results = classifier.predict(list(x))
        assert len({result.exit_stage for result in results}) > 1
        for index, result in enumerate(results):
            logits_C = metrics.logits_KNC[result.exit_stage - 1, index]
            assert result.label == LABELS[int(logits_C.argmax())]
    with torch.no_grad():
        assert np.allclose(module(x).numpy(), metrics.logits_KNC[-1], atol=1e-5)


def test_several_inputs_of_which_one_is_looked_up_in_a_table(tmp_path):
    """The table is larger than all the rest, and is never read as a whole."""
    x, labels = numbers(120)
    words = torch.arange(120) * 37 % 5000
    examples = [({"numbers": x[i], "word": words[i]}, labels[i]) for i in range(120)]
    module = made(Sum)
    metrics = train_exits(module, examples[:100], examples[100:], tmp_path / "run", labels=LABELS, settings=QUICK)
    example = {"numbers": x[:2], "word": words[:2]}
    store = offramp.divide(module, example, tmp_path / "store", exits=tmp_path / "run")
    with Store(store) as opened:
        (look_up,) = opened.program.lookups.values()
        assert (look_up.table, look_up.input) == ("table.weight", "word")
        home = next(s for s in opened.manifest.shards.values() if s.tensors[0].name == "table.weight")
    with offramp.load(store, exit="confidence:0.5") as classifier:
        assert home.name not in str(classifier.describe_plan())
        results = classifier.predict([item for item, _ in examples[100:]])
        assert classifier.record()["bytes_read_total"] < home.bytes
    for index, result in enumerate(results):
        assert result.label == LABELS[int(metrics.logits_KNC[result.exit_stage - 1, index].argmax())]


def test_a_store_is_scored_and_has_transcripts(tmp_path):
    module, metrics = train(sequence, tmp_path / "run")
    store = offramp.divide(module, torch.randn(2, 8), tmp_path / "store", exits=tmp_path / "run")
    rows = [Example(Record.of(x), label) for x, label in pairs(40, 1)]
    splits = Splits("toy", LABELS, ("accuracy",), {"tune": rows})
    (report,) = evaluate(store, splits, ["tune"], EvalSettings(transcript=tmp_path / "said"), log=print)
    assert [row.scores["accuracy"] for row in report.exits] == [each["accuracy"] for each in metrics.scores]
    transcript = read_transcript(tmp_path / "said", "tune")
    assert np.allclose(np.asarray(transcript.logits_NKC).swapaxes(0, 1), metrics.logits_KNC, atol=1e-5)
    with Store(store) as opened:
        assert transcript.about.model_sha256 == opened.manifest.source.fingerprint


def test_heads_only_leaves_the_module_as_it_is(tmp_path):
    module, _ = train(sequence, tmp_path / "run", TrainSettings(loss="heads-only", heads_epochs=1))
    for name, tensor in made(sequence).state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name


def test_the_same_again_gives_the_trained_weights_back(tmp_path):
    first, metrics = train(sequence, tmp_path / "run")
    told = []
    second, again = train(sequence, tmp_path / "run", progress=told.append)
    assert any("already trained" in line for line in told)
    assert np.array_equal(metrics.logits_KNC, again.logits_KNC)
    assert all(torch.equal(first.state_dict()[name], tensor) for name, tensor in second.state_dict().items())


def test_another_start_is_another_configuration(tmp_path):
    train(sequence, tmp_path / "run")
    with pytest.raises(UsageError, match="another configuration"):
        train_exits(made(sequence, 1), pairs(200), pairs(40, 1), tmp_path / "run", labels=LABELS, settings=QUICK)


def test_exits_of_other_weights_are_refused_until_they_are_loaded(tmp_path):
    train(sequence, tmp_path / "run")
    module = made(sequence)
    with pytest.raises(SourceError, match=r"other weights.*load_model"):
        offramp.divide(module, torch.randn(2, 8), tmp_path / "store", exits=tmp_path / "run")
    load_model(module, tmp_path / "run" / "model.safetensors")
    offramp.divide(module, torch.randn(2, 8), tmp_path / "store", exits=tmp_path / "run")


def test_stages_of_another_size_leave_exits_where_they_are(tmp_path):
    module, _ = train(sequence, tmp_path / "run")
    store = offramp.divide(module, torch.randn(2, 8), tmp_path / "store", exits=tmp_path / "run", stage_bytes=1 << 20)
    with Store(store) as opened:
        program, starts, num_steps = opened.program, [], 0
        for stage in program.stages:
            num_steps += len(stage.steps)
            if stage.exit is not None:
                starts.append(program.module.parts[num_steps].start.module)
    points = json.loads((tmp_path / "run" / "exits.json").read_text())["points"]
    assert starts == [module for module, _, _ in points] and len(starts) == 2


def test_a_regression(tmp_path):
    x, _ = numbers(120)
    examples = [(x[i], float(x[i].sum())) for i in range(120)]

    def make():
        return nn.Sequential(nn.Linear(8, WIDTH), Block(), Block(), nn.Linear(WIDTH, 1))

    module = made(make)
    metrics = train_exits(module, examples[:100], examples[100:], tmp_path / "run", labels=(), settings=QUICK)
    store = offramp.divide(module, torch.randn(2, 8), tmp_path / "store", exits=tmp_path / "run")
    with offramp.load(store) as classifier:
        found = [result.score for result in classifier.predict([item for item, _ in examples[100:]])]
    assert np.allclose(found, metrics.logits_KNC[-1, :, 0], atol=1e-4)


@pytest.mark.parametrize(
    ("labels", "settings", "told"),
    [
        (("a", "b"), QUICK, r"the output of the module has shape \[2, 3\], expected logits \[2, 2\]"),
        (LABELS, TrainSettings(heads="own", epochs=1), "form 'own'"),
    ],
)
def test_what_does_not_fit_is_refused(labels, settings, told, tmp_path):
    rows = [(x, label % len(labels)) for x, label in pairs(8)]
    with pytest.raises(SourceError, match=told):
        train_exits(made(sequence), rows, rows, tmp_path / "run", labels=labels, settings=settings)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_exits_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"exits\.safetensors is missing"):
        offramp.divide(made(sequence), torch.randn(2, 8), tmp_path / "store", exits=tmp_path)


def test_exits_are_for_modules_alone(tmp_path):
    with pytest.raises(UsageError, match="has its exits beside its weights"):
        offramp.divide(tmp_path, tmp_path / "store", exits=tmp_path)


class Masked(nn.Module):
    """Takes a mask as its own matter, and gives blocks a hidden state that they change in place."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(InPlace() for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids) * attention_mask[:, :, None]
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class InPlace(Block):
    def forward(self, x):
        x.mul_(0.5)
        return x + self.down(self.up(x).relu())


class Twice(nn.Module):
    """One weight in two layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3)])
        self.layers[2][1].weight, self.head = self.layers[0][1].weight, nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


def test_a_mask_of_ones_own_is_an_input_and_no_more(tmp_path):
    ids = torch.randint(0, 50, (60, 6), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) < 4).long().expand(60, -1)
    rows = [({"input_ids": ids[i], "attention_mask": mask[i]}, int(ids[i, 0]) % 3) for i in range(60)]
    module = made(Masked)
    metrics = train_exits(module, rows[:40], rows[40:], tmp_path / "run", labels=LABELS, settings=QUICK)
    example = {"input_ids": ids[:2], "attention_mask": mask[:2]}
    store = offramp.divide(module, example, tmp_path / "store", exits=tmp_path / "run")
    with offramp.load(store, exit="stage:1", backend="torch") as classifier:
        results = classifier.predict([item for item, _ in rows[40:]])
    probabilities = torch.from_numpy(metrics.logits_KNC[0]).softmax(-1).max(-1).values
    assert np.allclose([result.score for result in results], probabilities, atol=1e-4)


def test_records_larger_than_the_examples_are_refused(tmp_path):
    ids = torch.randint(0, 50, (40, 6), generator=torch.Generator().manual_seed(0))
    rows = [({"input_ids": row, "attention_mask": torch.ones_like(row)}, i % 3) for i, row in enumerate(ids)]
    module = made(Masked)
    train_exits(module, rows, rows[:9], tmp_path / "run", labels=LABELS, settings=QUICK)
    example = {"input_ids": ids[:2], "attention_mask": torch.ones_like(ids[:2])}
    store = offramp.divide(module, example, tmp_path / "store", exits=tmp_path / "run")
    with offramp.load(store, backend="torch") as classifier:
        short, long = (torch.ones(n, dtype=torch.int64) for n in (5, 60))
        assert len(classifier.predict([{"input_ids": short, "attention_mask": short}])) == 1
        with pytest.raises(StoreError, match="larger than the examples"):
            classifier.predict([{"input_ids": long, "attention_mask": long}])
        with pytest.raises(UsageError, match="in one record and"):
            classifier.encoder.encode([{"input_ids": each, "attention_mask": each} for each in (short, long)])


def test_tied_weights_and_labels_of_numpy(tmp_path):
    x, labels = numbers(80)
    rows = list(zip(x.requires_grad_(), np.array(labels), strict=True))
    module = made(Twice)
    metrics = train_exits(module, rows, rows[:20], tmp_path / "run", labels=LABELS, settings=QUICK)
    store = offramp.divide(module, torch.randn(2, 8), tmp_path / "store", exits=tmp_path / "run")
    with offramp.load(store) as classifier:
        results = classifier.predict([row for row, _ in rows[:20]])
    assert [result.label for result in results] == [LABELS[index] for index in metrics.logits_KNC[-1].argmax(-1)]


def test_a_training_that_fails_gives_the_module_back(tmp_path):
    module = made(sequence)
    settings = TrainSettings(epochs=1, learning_rate=1e30)
    with pytest.raises(NonFiniteError):
        train_exits(module, pairs(200), pairs(40, 1), tmp_path / "run", labels=LABELS, settings=settings)
    assert not module.training

import random
import sys

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

import offramp
from offramp.division.exported import export
from offramp.errors import StageError
from offramp.store import Store
from offramp.streaming.capture import Arguments
from offramp.streaming.placeholders import weights_of


@pytest.fixture(autouse=True)
def no_onnx(monkeypatch):
    """Graphs for ONNX Runtime take seconds, and are tested elsewhere."""
    monkeypatch.setitem(sys.modules, "onnxscript", None)


class Tied(nn.Module):
    """A table of words that is the head as well, under a name that torch.export meets first."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 20, bias=False)
        self.words = nn.Embedding(20, 8)
        self.words.weight = self.head.weight
        self.layer = nn.Linear(8, 8)

    def forward(self, ids, double=False):
        hidden = self.layer(self.words(ids))
        return self.head(hidden * 2 if double else hidden)


class Pooled(nn.Module):
    """Takes images of any size."""

    def __init__(self):
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, pixels):
        return self.head(self.convolution(pixels).mean((2, 3)))


class OfOneLength(nn.Module):
    """Makes a list as long as its example."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, values):
        return torch.stack([self.layer(values[:, index]) for index in range(values.shape[1])], 1)


def exported(module, *examples):
    first, *others = map(Arguments, examples)
    return export(module.eval(), weights_of(module), first, others)


def ids(batch, length):
    return torch.arange(batch * length).view(batch, length) % 20


def test_a_tied_weight_has_the_name_that_the_store_knows_it_by():
    module = Tied()
    graph = exported(module, ids(2, 6))
    assert set(graph.weights.values()) == set(weights_of(module)) == {"head.weight", "layer.weight", "layer.bias"}


def test_tied_weights_are_divided_into_graphs(tmp_path):
    torch.manual_seed(0)
    path = offramp.divide(Tied().eval(), ids(2, 6), tmp_path / "store", more_inputs=[ids(3, 4)], method="export")
    with Store(path) as store:
        assert len(store.program.stages) >= 3 and store.manifest.source.method == "export"


class Bags(nn.Module):
    """Sums of embeddings: by an operation that becomes a Loop over sequences in ONNX, or one by one."""

    def __init__(self, by_bags):
        super().__init__()
        self.words = nn.EmbeddingBag(20, 4, mode="sum") if by_bags else nn.Embedding(20, 4)
        self.layer, self.by_bags = nn.Linear(4, 3), by_bags

    def forward(self, ids):
        hidden = self.words(ids)
        return self.layer(hidden if self.by_bags else hidden.sum(1))


@pytest.mark.parametrize(
    ("by_bags", "words"),
    [(True, "torch only: as ONNX, it needs the operator"), (False, "ONNX graphs differ from")],
)
def test_onnx_graphs_with_operators_that_readers_refuse_are_not_written(by_bags, words, tmp_path, monkeypatch):
    monkeypatch.undo()
    said = []
    path = offramp.divide(Bags(by_bags).eval(), ids(2, 6), tmp_path / "store", method="export", say=said.append)
    assert any(words in line for line in said)
    assert len(list((path / "graphs").glob("*.onnx"))) == (
        0 if by_bags else len(list((path / "graphs").glob("*.json")))
    )


class Sizes(nn.Linear):
    def forward(self, numbers):
        return super().forward(numbers.abs())


class Turned(nn.Module):
    """Complex numbers between two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), Sizes(4, 4)

    def forward(self, x):
        return self.second(torch.complex(self.first(x), x))


def test_complex_numbers_become_graphs_for_torch_alone(tmp_path, monkeypatch):
    """ONNX Runtime gives two numbers for each of them."""
    monkeypatch.undo()
    said = []
    path = offramp.divide(Turned().eval(), torch.ones(2, 4), tmp_path / "store", method="export", say=said.append)
    assert any("torch only: ONNX Runtime gives float32" in line and "complex64" in line for line in said), said
    assert list((path / "graphs").glob("*.json")) and not list((path / "graphs").glob("*.onnx"))


class Complements(nn.Module):
    """Differences of numbers and tensors, as of masks and gates."""

    def __init__(self):
        super().__init__()
        self.words, self.gate = nn.Embedding(20, 4), nn.Linear(4, 4)

    def forward(self, ids):
        hidden = self.words(7 - ids % 8) * (1.5 - ids)[..., None]
        gate = self.gate(hidden).sigmoid()
        return torch.rsub(gate, 2, alpha=3) + (1 - gate) * hidden


def test_a_number_less_a_tensor_is_written_as_onnx(tmp_path, monkeypatch):
    """PyTorch finds no translation where the first operand is no tensor, so that XLNet and gates had no graphs."""
    monkeypatch.undo()
    said = []
    torch.manual_seed(0)
    offramp.divide(Complements().eval(), ids(2, 6), tmp_path / "store", method="export", say=said.append)
    assert any("ONNX graphs differ from" in line for line in said), said


def test_extents_in_which_examples_differ_may_differ():
    graph = exported(Pooled(), torch.ones(2, 3, 8, 8), torch.ones(3, 3, 6, 8))
    assert graph.dynamic[graph.inputs[0]] == (0, 2)


def test_one_example_may_have_any_length_if_the_module_takes_any():
    graph = exported(Tied(), ids(2, 6))
    assert graph.dynamic[graph.inputs[0]] == (0, 1)


def test_a_length_that_the_code_counts_on_is_refused(tmp_path):
    with pytest.raises(StageError, match="specialized it to be a constant"):
        exported(OfOneLength(), torch.ones(2, 5, 4), torch.ones(3, 7, 4))
    offramp.divide(
        OfOneLength().eval(),
        torch.ones(2, 5, 4),
        tmp_path / "store",
        more_inputs=[torch.ones(3, 5, 4)],
        method="export",
    )


def test_examples_that_take_another_path_are_refused():
    module = Tied()
    with pytest.raises(StageError, match="differ in more than sizes"):
        exported(module, {"ids": ids(2, 6)}, {"ids": ids(2, 6), "double": True})


class Blocked(Tied):
    """Computes otherwise for long texts, as models do that attend in blocks, and keeps which way it took."""

    def __init__(self, is_kept=False, axis=1):
        super().__init__()
        self.is_short, self.is_kept, self.axis = False, is_kept, axis

    def forward(self, ids):
        is_short = self.is_short or ids.shape[self.axis] <= 10
        self.is_short = is_short and self.is_kept
        return super().forward(ids, double=not is_short)


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_graph_that_holds_for_some_lengths_is_refused_where_texts_can_be_longer(is_kept):
    module, ids = Blocked(is_kept).eval(), torch.arange(12).view(2, 6)
    examples = Arguments(ids), [Arguments(ids[:1, :4])]
    says = "the graph holds for at most 10 tokens, and the model takes 11 - Blocked - use --method eager"
    with pytest.raises(StageError) as caught:
        export(module, weights_of(module), *examples, longest=11)
    assert str(caught.value) == says
    for longest in (10, None):
        assert export(module, weights_of(module), *examples, longest=longest).nodes
    assert not module.is_short


def test_a_graph_that_holds_for_some_numbers_of_rows_is_refused():
    with pytest.raises(StageError, match="the graph holds for at most 10 rows, and the model takes any number"):
        exported(Blocked(axis=0), torch.arange(12).view(2, 6), torch.arange(4).view(1, 4))


class Printing(OfOneLength):
    """Branches on a value, which torch.export refuses at length."""

    def forward(self, values):
        hidden = super().forward(values)
        return hidden if hidden.sum() > 0 else -hidden


def test_a_refusal_of_torch_export_prints_nothing_of_its_own(capfd):
    with pytest.raises(StageError) as caught:
        exported(Printing(), torch.randn(2, 3, 4))
    assert str(caught.value).count("\n") == 0
    assert capfd.readouterr() == ("", "")


class RowsForSequenceClassification(nn.Module):
    """A classifier of transformers by its name, whose answers `mix` changes."""

    def __init__(self, mix):
        super().__init__()
        self.layer, self.head, self.mix = nn.Linear(4, 8), nn.Linear(8, 3), mix
        self.config = PretrainedConfig(num_labels=3)

    def forward(self, values):
        return self.mix(self.head(self.layer(values).relu()))


@pytest.mark.parametrize(
    ("mix", "says"),
    [
        (lambda logits: logits * 2, None),
        (lambda logits: logits - logits[-1:], "the answer to a row depends on the other rows of its batch"),
        (lambda logits: logits.cumsum(0), "the answer to a row depends on the other rows of its batch"),
        (lambda logits: logits * logits.shape[0], "the answer to a row depends on the other rows of its batch"),
        (lambda logits: logits * random.random(), "the module draws random numbers of Python or NumPy"),
    ],
)
def test_graphs_are_of_modules_whose_rows_do_not_depend_on_each_other(tmp_path, mix, says):
    said, values = [], torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    module = RowsForSequenceClassification(mix).eval()
    store = offramp.divide(module, values, tmp_path / "store", say=said.append)
    with Store(store) as opened:
        assert bool(opened.program.stages) == (says is None)
    assert says is None or any(f"runs by offramp.stream only: {says}" in line for line in said)


class Constant(nn.Linear):
    def forward(self, values):
        return super().forward(values) + torch.tensor([1.0, 2.0, 3.0])


def test_a_store_with_constants_of_graphs_streams(tmp_path):
    module, values = Constant(4, 3).eval(), torch.randn(2, 4)
    expected = module(values)
    store = offramp.divide(module, values, tmp_path / "store", method="export")
    with offramp.stream(module, store) as stream:
        assert torch.equal(stream(values), expected)

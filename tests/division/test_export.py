"""torch.export, and its graph as plain data: no weights needed, nothing left behind."""

import pytest
import torch
from torch import nn

from offramp.backends.torch_graphs import CapturedGraph
from offramp.division import exported
from offramp.division.exported import export
from offramp.errors import StageError
from offramp.program.program import Call, Module, Part, Program
from offramp.streaming.capture import Arguments
from offramp.streaming.placeholders import weights_of


class Tokens(nn.Module):
    """Ids to vectors; one layer called twice; a buffer and a number that follows from the length."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(20, 6), nn.Linear(6, 6)
        self.register_buffer("places", torch.arange(32))

    def forward(self, ids):
        hidden = self.table(ids) + self.places[: ids.shape[1]][:, None]
        hidden = self.layer(self.layer(hidden)).relu()
        return hidden.mean(1), hidden.view(ids.shape[0] * ids.shape[1], 6)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        return self.layer(x)


class CountingByView(Counting):
    def forward(self, x):
        self.calls.view(1)[0].add_(1)
        return self.layer(x)


class Clearing(Counting):
    def forward(self, x):
        x.transpose(0, 1).chunk(2)[0].zero_()
        return self.layer(x)


class InPlace(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu_().add_(1)


class Branching(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def make(cls=Tokens, *sizes):
    torch.manual_seed(0)
    return cls(*sizes).eval()


IDS = torch.arange(10).view(2, 5)


def run(graph, module, *inputs):
    """The exported graph as one piece, on the module's weights."""
    state = {**dict(module.named_parameters()), **graph.data}
    given = dict(zip(graph.inputs, inputs, strict=True))
    given |= {name: state[stored] for name, stored in {**graph.weights, **graph.constants}.items()}
    from offramp.division.cutting import cut

    found = cut(
        graph, Program({}, module=Module("a.Module", "0" * 64, {}, (Part((), None, (), None),), {}, (), (), (), ()))
    )
    (piece,) = found.pieces
    operands = [given[name] for name in piece.reads] + [state[n] for n in (*piece.weights, *piece.constants)]
    with torch.no_grad():
        return CapturedGraph(found.graphs[piece.kernel], "here")(*operands)


def test_the_graph_says_what_the_module_says_for_any_batch_and_length():
    module = make()
    graph = export(module, weights_of(module), Arguments(IDS))
    for rows, length in ((2, 5), (1, 5), (3, 9), (4, 2)):
        ids = torch.arange(rows * length).view(rows, length) % 20
        with torch.no_grad():
            expected = module(ids)
        for found, wanted in zip(run(graph, module, ids), expected, strict=True):
            assert torch.equal(found, wanted)


def test_no_weights_are_needed():
    module = make()
    with torch.device("meta"):
        empty = Tokens().eval()
    empty.places = module.places
    graph = export(empty, weights_of(empty), Arguments(IDS))
    assert all(weight.tensor.is_meta for weight in weights_of(empty).values() if not weight.is_buffer)
    assert torch.equal(run(graph, module, IDS)[0], module(IDS)[0].detach())
    assert set(graph.weights.values()) == {"table.weight", "layer.weight", "layer.bias"}


def test_weights_and_buffers_are_those_of_before_afterwards():
    module = make()
    before = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    copies = {name: tensor.detach().clone() for name, tensor in before.items()}
    export(module, weights_of(module), Arguments(IDS))
    after = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] and torch.equal(after[name], copies[name]) for name in before)


def test_they_are_also_where_it_fails():
    module = make(Branching, 3, 3)
    before = dict(module.named_parameters())
    with pytest.raises(StageError, match=r"torch\.export cannot take this module .*--method eager"):
        export(module, weights_of(module), Arguments(torch.ones(2, 3)))
    assert all(module.get_parameter(name) is tensor for name, tensor in before.items())


def test_repeated_calls_are_told_apart():
    module = make()
    graph = export(module, weights_of(module), Arguments(IDS))
    linear = [node for node in graph.nodes if node.target.startswith("aten.linear")]
    assert [{call for call in node.calls if call.module == "layer"} for node in linear] == [
        {Call("layer", 1)},
        {Call("layer", 2)},
    ]


def test_batch_and_length_may_change_and_nothing_else():
    module = make()
    graph = export(module, weights_of(module), Arguments(IDS))
    pooled, flat = graph.outputs
    (ids,) = graph.inputs
    assert (graph.dynamic[ids], graph.batch[ids]) == ((0, 1), 0)
    assert (graph.dynamic[pooled], graph.batch[pooled]) == ((0,), 0)
    assert graph.dynamic[flat] == (0,)
    assert flat not in graph.batch, "rows of it are tokens, which cannot leave alone"
    assert not set(graph.weights) & set(graph.dynamic)


def test_numbers_that_follow_from_shapes_are_no_tensors():
    graph = export(module := make(), weights_of(module), Arguments(IDS))
    numbers = [node for node in graph.nodes if node.is_number]
    assert {"aten.sym_size.int", "mul"} <= {node.target for node in numbers}
    assert all(node.name not in graph.values for node in numbers)


def test_arguments_by_name_and_by_position():
    module = make()
    graphs = [export(module, weights_of(module), Arguments(inputs)) for inputs in (IDS, (IDS,), {"ids": IDS})]
    assert [graph.inputs for graph in graphs] == [("0",), ("0",), ("ids",)]
    assert graphs[0].nodes == graphs[1].nodes != graphs[2].nodes
    assert graphs[0].values == {"0" if name == "ids" else name: value for name, value in graphs[2].values.items()}
    assert torch.equal(run(graphs[0], module, IDS)[0], run(graphs[2], module, IDS)[0])


@pytest.mark.parametrize("cls", [Counting, CountingByView, Clearing])
def test_a_module_that_writes_to_its_buffers_or_inputs_is_refused(cls):
    module, x = make(cls), torch.ones(2, 3)
    with pytest.raises(StageError, match=r"writes to its buffers or inputs.*--method eager"):
        export(module, weights_of(module), Arguments(x))
    assert torch.equal(module.calls, torch.zeros(1)) and torch.equal(x, torch.ones(2, 3))


def test_one_that_writes_to_what_it_made_is_not():
    module = make(InPlace, 3, 3)
    graph = export(module, weights_of(module), Arguments(torch.ones(2, 3)))
    assert torch.equal(run(graph, module, torch.ones(2, 3))[0], module(torch.ones(2, 3)).detach())


def test_operations_of_others_are_refused():
    @torch.library.custom_op("offramp_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @twice.register_fake
    def _(x):
        return torch.empty_like(x)

    class Foreign(nn.Linear):
        def forward(self, x):
            return twice(super().forward(x))

    module = make(Foreign, 3, 3)
    with pytest.raises(StageError, match=r"offramp_tests\.twice.*none of torch's own"):
        export(module, weights_of(module), Arguments(torch.ones(2, 3)))


@pytest.mark.parametrize("part", [object(), 1j])
def test_arguments_that_json_does_not_hold_are_refused(part):
    with pytest.raises(StageError, match="is not known"):
        exported._data([part])


def test_infinite_numbers_survive():
    module = make(Masked, 3, 3)
    graph = export(module, weights_of(module), Arguments(torch.ones(2, 3)))
    assert torch.equal(run(graph, module, torch.ones(2, 3))[0], module(torch.ones(2, 3)).detach())


class Masked(nn.Linear):
    def forward(self, x):
        return super().forward(x).masked_fill(x > 0, float("-inf"))

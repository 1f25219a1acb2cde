"""What a streamed module holds beside the weights of its store is freed, or counted and said."""

from __future__ import annotations

import collections
import functools
import warnings

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn.utils import prune, spectral_norm, weight_norm  # noqa: E402

import offramp  # noqa: E402
from offramp.errors import BudgetError, StageError  # noqa: E402
from offramp.store import Store  # noqa: E402
from offramp.streaming.outside import Outside  # noqa: E402
from offramp.streaming.placement import data_bytes, smallest_weights  # noqa: E402
from offramp.units import parse_size  # noqa: E402
from tests.division.modules import WIDTH, Block, Chain, made, vectors  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
LARGE = 256
"""Width of a layer whose weight is far larger than its vectors."""


def smallest(store):
    with Store(store) as opened:
        return smallest_weights(opened, data_bytes(opened))


def plain(module, *inputs):
    with torch.no_grad():
        return module(*inputs)


def kept(module):
    """Bytes of all tensors in the attributes of a module that are no parameters of it."""
    found = [value for part in module.modules() for value in vars(part).values() if type(value) is torch.Tensor]
    return sum(tensor.untyped_storage().nbytes() for tensor in found)


class Normed(nn.Module):
    """Layers whose weight a hook computes; code asks for its dtype outside of their calls."""

    def __init__(self, norm):
        super().__init__()
        self.layers = nn.ModuleList([norm(nn.Linear(LARGE, LARGE)) for _ in range(5)])

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden.to(layer.weight.dtype))
        return hidden


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_weights_that_hooks_compute_count_and_are_freed_after_each_part(tmp_path, norm):
    make, inputs = lambda: Normed(norm), torch.randn(2, LARGE)
    expected = plain(made(make), inputs)
    store = offramp.divide(made(make), inputs, tmp_path / "store")
    module, size = made(make), 4 * LARGE * LARGE
    with pytest.raises(BudgetError) as refused:
        offramp.stream(module, store, weight_budget=smallest(store))
    named = parse_size(refused.value.remedy.split()[-1])
    assert named == smallest(store) + size
    with offramp.stream(module, store, weight_budget=named, strict=True) as model:
        for _ in range(3):
            assert kept(module) == 0
            assert torch.equal(model(inputs), expected)
        assert model.counts.outside_bytes == size
        assert smallest(store) < model.counts.peak_weight_bytes <= named


def test_weights_that_hooks_compute_are_right_outside_of_calls(tmp_path):
    module, inputs = made(lambda: Normed(weight_norm)), torch.randn(2, LARGE)
    expected, weight = plain(module, inputs), plain(module.layers[2].weight.clone)
    store = offramp.divide(module, inputs, tmp_path / "store")
    with offramp.stream(module, store) as model:
        assert torch.equal(model.layers[2].weight.clone(), weight)
        assert torch.equal(model(inputs), expected)


def test_weights_that_pruning_computes_are_freed_after_each_part(tmp_path):
    def make():
        module = Normed(lambda layer: layer)
        for layer in module.layers:
            prune.l1_unstructured(layer, "weight", 0.5)
        return module

    inputs, size = torch.randn(2, LARGE), 4 * LARGE * LARGE
    expected = plain(made(make), inputs)
    store = offramp.divide(made(make), inputs, tmp_path / "store")
    module, masks = made(make), 5 * size
    with offramp.stream(module, store, weight_budget=smallest(store) + size + masks, strict=True) as model:
        for _ in range(2):
            assert kept(module) == 0
            assert torch.equal(model(inputs), expected)


class Caching(nn.Module):
    """Keeps something of its own weights: a fused one, a table, a list of either."""

    def __init__(self, how):
        super().__init__()
        self.blocks, self.how, self.cache = nn.ModuleList([Block() for _ in range(4)]), how, None

    def forward(self, hidden):
        if self.cache is None and self.how:
            fused = torch.cat([block.up.weight for block in self.blocks])
            self.cache = {"plain": fused, "list": [{"fused": fused}], "object": Holder(fused)}[self.how]
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class Holder:
    """An object with an attribute."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("how", ["plain", "list", "object"])
def test_what_a_pass_keeps_is_counted_and_said(tmp_path, how):
    store = offramp.divide(made(Caching, None), vectors(), tmp_path / "store")
    module, budget = made(Caching, None), smallest(store)
    with offramp.stream(module, store, weight_budget=budget) as model:
        model(vectors())
        assert model.counts.peak_weight_bytes <= budget and model.counts.outside_bytes == 0
        module.how, module.cache = how, None
        with pytest.warns(UserWarning, match=r"are in tensors that are no weights of the store"):
            for _ in range(3):
                model(vectors())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(vectors())  # said once
        size = 4 * 2 * WIDTH * WIDTH * 4
        assert model.record()["outside_bytes"] == size
        assert model.record()["peak_weight_bytes"] > budget
        assert torch.equal(model(vectors()), plain(made(Caching, None), vectors()))


class Buffered(Chain):
    """Holds more in buffers than in weights."""

    def __init__(self, num_bytes):
        super().__init__()
        self.register_buffer("packed", torch.zeros(num_bytes, dtype=torch.int8))


def test_many_buffers_count_against_a_weight_budget(tmp_path):
    make = lambda: Buffered(1 << 20)  # noqa: E731
    store = offramp.divide(made(make), vectors(), tmp_path / "store")
    with pytest.raises(BudgetError, match=r"tensors of the module beside its weights take 1\.00 MiB") as refused:
        offramp.stream(made(make), store, weight_budget=900_000)
    named = parse_size(refused.value.remedy.split()[-1])
    with pytest.raises(BudgetError):
        offramp.stream(made(make), store, weight_budget=named - 1)
    with offramp.stream(made(make), store, weight_budget=named) as model:
        assert torch.equal(model(vectors()), plain(made(make), vectors()))
        assert 1 << 20 < model.counts.peak_weight_bytes <= named


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_packed_weights_count():
    quantised = torch.ao.nn.quantized.dynamic.Linear(LARGE, LARGE)
    assert Outside(nn.Sequential(nn.Linear(3, 3), quantised)).num_bytes >= LARGE * LARGE
    assert Outside(nn.Sequential(nn.Linear(3, 3))).num_bytes == 0


class Rounds(nn.Module):
    """Runs its blocks several times over, in any order."""

    def __init__(self, num_blocks=6):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(num_blocks)])

    def forward(self, hidden, order=None):
        for index in order or range(len(self.blocks)):
            hidden = self.blocks[index](hidden)
        return hidden


@pytest.mark.parametrize("order", [(*range(6),) * 3, (5, 4, 3, 2, 1, 0), (0, 0, 5, 5, 0, 3, 3), (2,) * 4])
@pytest.mark.parametrize("share", [0, 1, 2])
def test_other_paths_stay_within_the_budget(tmp_path, order, share):
    store = offramp.divide(made(Rounds), vectors(), tmp_path / "store")
    with Store(store) as opened:
        total = sum(data_bytes(opened).values())
    budget = smallest(store) + share * (total - smallest(store)) // 3
    with offramp.stream(made(Rounds), store, weight_budget=budget) as model:
        for _ in range(3):
            assert torch.equal(model(vectors(), order), plain(made(Rounds), vectors(), order))
            assert torch.equal(model(vectors()), plain(made(Rounds), vectors()))
        assert model.counts.peak_weight_bytes <= budget


class Slotted:
    """Keeps a tensor in a slot, and has a method."""

    __slots__ = ("tensor",)

    def __init__(self, tensor):
        self.tensor = tensor

    def method(self):
        return self.tensor


def closed_over(tensor):
    return lambda: tensor


PLACES = {
    "a slot": Slotted,
    "a method": lambda tensor: Slotted(tensor).method,
    "a closure": closed_over,
    "a partial": lambda tensor: functools.partial(torch.add, other=tensor),
    "a deque": lambda tensor: collections.deque([tensor]),
    "an array": lambda tensor: tensor.numpy().copy(),
    "a sparse tensor": lambda tensor: (tensor + 1).to_sparse(),
    "a module in a list": lambda tensor: [nn.Linear(LARGE, LARGE)],
}


@pytest.mark.parametrize("place", PLACES)
def test_tensors_count_wherever_they_can_be_reached(place):
    module = made(Chain)
    module.extra = PLACES[place](torch.zeros(LARGE, LARGE))
    assert Outside(module).num_bytes >= 4 * LARGE * LARGE


def replaced(module):
    module.first.weight = nn.Parameter(torch.zeros(module.first.weight.shape))


CHANGES = {
    "in place": lambda module: module.first.weight.zero_(),
    "by out": lambda module: torch.zeros(module.first.weight.shape, out=module.first.weight),
    "replaced": replaced,
}
OF_PLACEHOLDERS = {
    "data": lambda weight: weight.data.add_(1),
    "a row of data": lambda weight: weight.data[0].fill_(1),
    "data by out": lambda weight: torch.add(weight, 1, out=weight.data),
    "a view": lambda weight: weight.view(-1).mul_(2),
    "several": lambda weight: torch._foreach_add_([weight.data], 1.0),
    "the state": None,
}
"""Writes to weights that are not in memory. Of those that are, `data` has no count of writes."""


@pytest.mark.parametrize("budget", ["smallest", "1GiB"])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_of_a_streamed_module_are_not_changed_without_a_word(tmp_path, change, budget):
    store = offramp.divide(made(Chain), vectors(), tmp_path / "store")
    limit = smallest(store) if budget == "smallest" else budget
    with offramp.stream(made(Chain), store, weight_budget=limit) as model:
        plain(model, vectors())
        with pytest.raises(StageError, match=r"first\.weight"), torch.no_grad():
            CHANGES[change](model.module)
            model(vectors())


@pytest.mark.filterwarnings("ignore:offramp. .* of weights were in memory")
@pytest.mark.parametrize("change", OF_PLACEHOLDERS)
def test_a_write_to_a_view_of_a_weight_that_is_not_in_memory_is_not_lost_without_a_word(tmp_path, change):
    store = offramp.divide(made(Chain), vectors(), tmp_path / "store")
    with offramp.stream(made(Chain), store, weight_budget=smallest(store)) as model:
        expected, weight = plain(model, vectors()), model.module.first.weight
        weight.data.sum(), weight.view(-1).clone().add_(1), weight.detach().t()  # reads
        assert torch.equal(plain(model, vectors()), expected)
        with torch.no_grad():
            if change == "the state":
                model.module.state_dict()["first.weight"].zero_()
            else:
                OF_PLACEHOLDERS[change](weight)
        with pytest.raises(StageError, match=r"first\.weight of a streamed module was written to"):
            model(vectors())

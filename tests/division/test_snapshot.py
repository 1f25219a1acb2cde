"""A division leaves the module, its arguments and the random generators as they were, also where it refuses."""

from __future__ import annotations

import contextlib
import queue
import random
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import offramp  # noqa: E402
from offramp.division.snapshot import undisturbed  # noqa: E402
from offramp.errors import OfframpError  # noqa: E402
from offramp.streaming.placeholders import bits  # noqa: E402
from tests.division.modules import CASES, WIDTH, Block, Chain, Counting, Failing, Routed, ids, made, vectors  # noqa: E402


class Clipped(nn.Linear):
    """Writes to its weight in place."""

    def forward(self, hidden):
        self.weight.data.mul_(0.5)
        return super().forward(hidden)


class Normed(nn.Linear):
    """Sets the data of its weight."""

    def forward(self, hidden):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        return super().forward(hidden)


class ByList(nn.Linear):
    """Writes to its weight through a list."""

    def __init__(self, *args):
        super().__init__(*args)
        self.kept = [self.weight]

    def forward(self, hidden):
        with torch.no_grad():
            self.kept[0].add_(1)
        return super().forward(hidden)


class ByClosure(nn.Linear):
    """Writes to its weight through a closure, and sets its data."""

    def __init__(self, *args, sets=False):
        super().__init__(*args)
        weight = self.weight

        def write():
            if sets:
                weight.data = weight.data * 2
            else:
                weight.data[0] = 1

        self.write = write

    def forward(self, hidden):
        self.write()
        return super().forward(hidden)


class ByArray(nn.Linear):
    """Writes to its weight through an array of NumPy, which no operation of PyTorch tells."""

    def forward(self, hidden):
        self.weight.detach().numpy()[0] = 1
        return super().forward(hidden)


class Busy(Chain):
    """Changes all that a module may hold but its weights."""

    def __init__(self):
        super().__init__()
        self.seen, self.plain, self.nested = [], torch.zeros(3), {"inner": (torch.zeros(2), [1, {2}])}
        self.generator, self.options = torch.Generator(), type("Options", (), {})()
        self.options.count, self.unlisted = 0, [nn.BatchNorm1d(2)]
        self.register_buffer("count", torch.zeros(()))

    def forward(self, hidden):
        self.seen.append(hidden)
        self.plain += 1
        self.nested["inner"][0].data.add_(1)
        self.nested["inner"][1][1].add(3)
        self.options.count += 1
        self.options.other = hidden
        self.count.data.add_(1)
        self.unlisted[0].running_mean.add_(1)
        self.blocks[0].train().register_forward_hook(lambda *_: None)
        self.blocks[0] = self.blocks[0]
        self.blocks[3] = Block().eval().requires_grad_(False)
        self.head.weight.requires_grad_(False)
        self.head.bias.requires_grad_(False)
        torch.rand(1, generator=self.generator), torch.rand(1), random.random(), np.random.rand()
        return super().forward(hidden)


class Drawn(Chain):
    """Draws random numbers of every kind."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, hidden):
        noise = torch.rand(WIDTH, generator=self.generator) + torch.randn(WIDTH) + random.random() + np.random.rand()
        return super().forward(nn.functional.dropout(hidden + noise))


class Slotted:
    """Keeps a number in a slot."""

    __slots__ = ("number",)


class Hidden(Chain):
    """Keeps state that a run changes in arrays, slots, closures and generators that are not of PyTorch."""

    def __init__(self):
        super().__init__()
        self.array, self.bytes, self.slotted = np.zeros(2), bytearray(2), Slotted()
        self.slotted.number, number = 0, 0
        self.own = [np.random.default_rng(0), np.random.RandomState(0), random.Random(0)]

        def count():
            nonlocal number
            number += 1
            return number

        self.count = count

    def state(self):
        numpy, older, own = self.own
        states = str(numpy.bit_generator.state), str(older.get_state()), own.getstate()
        return self.array.tolist(), bytes(self.bytes), self.slotted.number, self.count(), *states

    def forward(self, hidden):
        self.array += 1
        self.bytes[0] += 1
        self.slotted.number += 1
        self.count()
        return super().forward(hidden + self.own[0].random() + self.own[1].rand() + self.own[2].random())


def test_state_in_objects_of_every_kind_is_as_it_was(tmp_path):
    module, fresh = made(Hidden), made(Hidden)
    offramp.divide(module, vectors(), tmp_path / "store")
    assert module.state() == fresh.state()


class Served(Chain):
    """Has a thread that adds one to what is put into a queue."""

    def __init__(self):
        super().__init__()
        self.asked, self.answered = queue.Queue(), queue.Queue()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            self.answered.put(self.asked.get() + 1)

    def forward(self, hidden):
        self.asked.put(hidden)
        return super().forward(self.answered.get(timeout=3))


def test_a_thread_that_waits_for_a_module_waits_for_it_afterwards(tmp_path):
    module = made(Served)
    expected = module(vectors())
    store = offramp.divide(module, vectors(), tmp_path / "store")
    assert torch.equal(module(vectors()), expected)
    with offramp.stream(module, store) as stream:
        assert torch.equal(stream(vectors()), expected)


class Adapting(Chain):
    """Computes gradients of its weights each time, as code does that adapts itself to its inputs."""

    def forward(self, hidden):
        with torch.enable_grad():
            super().forward(hidden).sum().backward()
        return super().forward(hidden)


def test_gradients_are_as_they_were(tmp_path):
    module = made(Adapting)
    module.first.weight.grad = gradient = torch.ones_like(module.first.weight)
    with contextlib.suppress(OfframpError):
        offramp.divide(module, vectors(), tmp_path / "store")
    assert module.first.weight.grad is gradient and torch.equal(gradient, torch.ones_like(gradient))
    assert module.head.weight.grad is None


def test_arrays_that_cannot_be_written_to_are_not_copied(tmp_path):
    module = made(Chain)
    module.file = np.broadcast_to(np.zeros(1), (1 << 44,))
    assert offramp.divide(module, vectors(), tmp_path / "store").is_dir()


class Aliased(Chain):
    """Writes to a buffer and reads the same memory through another buffer or a list."""

    def __init__(self, by_list):
        super().__init__()
        memory = torch.zeros(WIDTH)
        self.register_buffer("written", memory)
        self.kept = [memory]
        if not by_list:
            self.kept = []
            self.register_buffer("view", memory[:4])

    def forward(self, hidden):
        self.written.copy_(hidden.mean(0))
        return super().forward(hidden) + (self.kept[0] if self.kept else self.view).sum()


@pytest.mark.parametrize("by_list", [False, True])
def test_buffers_that_share_memory_are_not_divided_into_another_answer(tmp_path, by_list):
    with pytest.raises(OfframpError, match="other answers than the whole one"):
        offramp.divide(made(Aliased, by_list), vectors(), tmp_path / "store")


def failing():
    module = made(Failing)
    module.error = ValueError("x")
    return module


def partly_training():
    module = made(Chain)
    module.blocks[1].train()
    module.first.weight.requires_grad_(False)
    return module


ZOO = {
    **{name: (lambda make=make: made(make), inputs) for name, (make, inputs) in CASES.items()},
    "clipped": (lambda: nn.Sequential(made(Clipped, WIDTH, WIDTH), made(nn.Linear, WIDTH, 4)).eval(), vectors()),
    "normed": (lambda: nn.Sequential(made(Normed, WIDTH, WIDTH), made(nn.Linear, WIDTH, 4)).eval(), vectors()),
    "embedding of a largest norm": (
        lambda: nn.Sequential(nn.Embedding(50, WIDTH, max_norm=0.5), nn.Linear(WIDTH, 4)).eval(),
        ids(),
    ),
    "by list": (lambda: made(ByList, WIDTH, WIDTH), vectors()),
    "by closure": (lambda: made(ByClosure, WIDTH, WIDTH), vectors()),
    "by array": (lambda: made(ByArray, WIDTH, WIDTH), vectors()),
    "by a closure that sets": (lambda: made(ByClosure, WIDTH, WIDTH, sets=True), vectors()),
    "busy": (lambda: made(Busy), vectors()),
    "drawn": (lambda: made(Drawn), vectors()),
    "counting": (lambda: made(Counting, adds=True), vectors()),
    "routed": (lambda: made(Routed), vectors()),
    "failing": (failing, vectors()),
    "partly in training mode": (partly_training, vectors()),
    "in training mode": (lambda: made(Chain).train(), vectors()),
}
WRITING = ("clipped", "normed", "embedding of a largest norm", "by list", "by closure", "by array")


def contents(tree):
    """The bytes of tensors, and all else as it is, in containers and attributes."""
    if isinstance(tree, torch.Tensor):
        return id(tree), tree.requires_grad, bits(tree), tree.stride()
    if isinstance(tree, torch.Generator):
        return bits(tree.get_state())
    if isinstance(tree, dict):
        return [(key, contents(value)) for key, value in tree.items()]
    if isinstance(tree, (list, tuple)):
        return [contents(each) for each in tree]
    if isinstance(tree, nn.Module) or type(tree).__name__ == "Options":
        return id(tree), contents(vars(tree))
    return tree if isinstance(tree, (int, float, str, set, type(None))) else id(tree)


def randomness():
    return bits(torch.get_rng_state()), random.getstate(), [str(part) for part in np.random.get_state()]


@pytest.mark.parametrize("method", ["eager", "export"])
@pytest.mark.parametrize("name", ZOO)
def test_everything_is_as_it_was_whether_divided_or_refused(tmp_path, name, method):
    make, inputs = ZOO[name]
    module, example = make(), inputs.clone()
    flag = torch.is_grad_enabled(), torch.get_default_dtype()
    before, generators = contents(module), randomness()
    saved = {key: bits(value) for key, value in module.state_dict().items()}
    with contextlib.suppress(OfframpError, ValueError):
        offramp.divide(module, example, tmp_path / "store", method=method)
    assert {key: bits(value) for key, value in module.state_dict().items()} == saved
    assert contents(module) == before
    assert randomness() == generators
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == flag and torch.equal(example, inputs)


@pytest.mark.parametrize("name", WRITING)
def test_a_module_that_writes_to_its_weights_is_refused_by_the_name_of_the_weight(tmp_path, name):
    make, inputs = ZOO[name]
    with pytest.raises(OfframpError, match=r"keeps its weights, and .* writes to (0\.)?weight - compute a new"):
        offramp.divide(make(), inputs, tmp_path / "store")


def test_a_module_that_draws_random_numbers_streams_the_same_bits_from_the_same_seed(tmp_path):
    offramp.divide(made(Drawn), vectors(), tmp_path / "store")
    plain, other = made(Drawn), made(Drawn)

    def seeded(model):
        torch.manual_seed(7), random.seed(7), np.random.seed(7)
        with torch.no_grad():
            return [model(vectors()), model(vectors(5))]

    expected = seeded(plain)
    with offramp.stream(other, tmp_path / "store", weight_budget="1MiB") as stream:
        assert all(torch.equal(one, two) for one, two in zip(seeded(stream), expected, strict=True))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_interrupts_a_run_leaves_nothing_behind(error):
    module = made(Busy)
    before, generators = contents(module), randomness()
    with pytest.raises(error), undisturbed(module):
        module(vectors())
        raise error
    assert contents(module) == before and randomness() == generators

"""A streamed module that several threads and processes call: the answers of the module, and no wait without end."""

from __future__ import annotations

import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import offramp  # noqa: E402
from offramp.errors import UsageError  # noqa: E402
from offramp.store import Store  # noqa: E402
from offramp.streaming import passes as passes_module  # noqa: E402
from offramp.streaming.placement import data_bytes, smallest_weights  # noqa: E402
from tests.division.modules import WIDTH, Block, Chain, made, vectors  # noqa: E402
from tests.forked import in_child  # noqa: E402
from tests.runtime.conftest import deadlocks_fail  # noqa: E402, F401

POOL = ThreadPoolExecutor(3)


def in_thread(part, *arguments):
    """What a part gives, in another thread."""

    def call():
        with torch.no_grad():
            return part(*arguments)

    return POOL.submit(call).result()


class Together(nn.Module):
    """Blocks of which several run in other threads: side by side, all of them, or a recurrent layer."""

    def __init__(self, how, num_blocks=4):
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList([Block() for _ in range(2 * num_blocks)])
        self.cells = nn.ModuleList([nn.LSTM(WIDTH, WIDTH) for _ in range(num_blocks)])

    def forward(self, hidden):
        for index, cell in enumerate(self.cells):
            one, other = self.blocks[2 * index : 2 * index + 2]
            if self.how == "side by side":
                parts = [POOL.submit(_call, part, hidden) for part in (one, other, cell)]
                left, right, (more, _) = (part.result() for part in parts)
            elif self.how == "one after another":
                left, right, (more, _) = (in_thread(part, hidden) for part in (one, other, cell))
            else:
                left, right, (more, _) = one(hidden), in_thread(other, hidden), cell(hidden)
            hidden = left + right + more
        return hidden


def _call(part, hidden):
    with torch.no_grad():
        return part(hidden)


class Again(nn.Module):
    """Calls itself in another thread."""

    def __init__(self):
        super().__init__()
        self.chain = Chain(width=WIDTH)

    def forward(self, hidden, again=True):
        out = self.chain(hidden)
        return out + in_thread(self, hidden.flip(0), False) if again else out


def answer(module, *inputs):
    with torch.no_grad():
        return module(*inputs)


def total(module):
    return sum(weight.nbytes for weight in module.parameters())


@pytest.mark.parametrize("how", ["side by side", "one after another", "here and there"])
def test_parts_that_other_threads_run_belong_to_the_pass(tmp_path, how):
    make = lambda: Together(how)  # noqa: E731
    expected = answer(made(make), vectors())
    store = offramp.divide(made(make), vectors(), tmp_path / "store")
    with Store(store) as opened:
        smallest = smallest_weights(opened, data_bytes(opened))
    for budget in (smallest, total(made(make))):
        with offramp.stream(made(make), store, weight_budget=budget) as model:
            for _ in range(5):
                assert torch.equal(model(vectors()), expected)


def test_a_module_that_calls_itself_in_another_thread_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(passes_module, "PATIENCE_SECONDS", 0.1)
    expected = answer(made(Again), vectors())
    store = offramp.divide(made(Again), vectors(), tmp_path / "store")
    with offramp.stream(made(Again), store) as model:
        assert torch.equal(model(vectors()), expected)


class Slow(Chain):
    """Computes until it is told not to."""

    def forward(self, hidden):
        while not self.may_end.is_set():
            sum(range(1000))
        return super().forward(hidden)


def test_a_second_call_waits_as_long_as_the_first_one_computes(tmp_path, monkeypatch):
    monkeypatch.setattr(passes_module, "PATIENCE_SECONDS", 0.1)
    store = offramp.divide(made(Chain), vectors(), tmp_path / "store")
    module = made(Chain)
    module.__class__, module.may_end = Slow, threading.Event()
    ended = []
    with offramp.stream(module, store) as model:
        threads = [threading.Thread(target=lambda: ended.append(model(vectors()))) for _ in range(2)]
        for thread in threads:
            thread.start()
        threads[0].join(0.5)
        assert model.counts.passes == 0
        module.may_end.set()
        for thread in threads:
            thread.join()
    assert model.counts.passes == 2
    assert all(torch.equal(each, answer(made(Chain), vectors())) for each in ended) and len(ended) == 2


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_forked_stream_answers_in_both_processes(tmp_path, num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        expected = answer(made(Chain), vectors())
        store = offramp.divide(made(Chain), vectors(), tmp_path / "store")
        with offramp.stream(made(Chain), store, weight_budget=total(made(Chain)) // 2) as model:
            for _ in range(3):

                def check():
                    for _ in range(2):
                        assert torch.allclose(model(vectors()), expected, atol=1e-6)

                check()
                assert in_child(check) == 0
    finally:
        torch.set_num_threads(before)


class Forking(Chain):
    """Forks in the middle of a pass; both processes go on."""

    child = None

    def forward(self, hidden):
        hidden = self.first(hidden)
        for index, block in enumerate(self.blocks):
            if index == 2 and self.forks:
                type(self).child = os.fork()
            hidden = block(hidden)
        return self.head(hidden)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_in_the_middle_of_a_pass(tmp_path):
    expected = answer(made(Chain), vectors())
    store = offramp.divide(made(Chain), vectors(), tmp_path / "store")
    module = made(Chain)
    module.__class__, module.forks = Forking, False
    with offramp.stream(module, store, weight_budget=total(made(Chain)) // 2) as model:
        model(vectors())
        module.forks = True

        def both():
            found = model(vectors())
            if Forking.child == 0:
                os._exit(0 if torch.equal(found, expected) else 1)
            assert torch.equal(found, expected)
            assert os.waitstatus_to_exitcode(os.waitpid(Forking.child, 0)[1]) == 0

        both()


def test_a_stream_says_that_it_cannot_be_pickled(tmp_path):
    store = offramp.divide(made(Chain), vectors(), tmp_path / "store")
    with (
        offramp.stream(made(Chain), store) as model,
        pytest.raises(UsageError, match=r"cannot be pickled.*offramp\.stream\(module, store\) in the other process"),
    ):
        pickle.dumps(model)

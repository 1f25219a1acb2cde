from __future__ import annotations

import dataclasses
from collections import UserDict, namedtuple

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from offramp.streaming.capture import (  # noqa: E402
    Arguments,
    LastUsed,
    Touches,
    surround,
    tensors_of,
    trace_run,
)
from offramp.streaming.placeholders import weights_of  # noqa: E402
from tests.division.modules import CASES, Block, Chain, Failing, Keeping, Shared, Tied, ids, made, vectors  # noqa: E402


def traced(module, inputs, fetch=None):
    weights = weights_of(module)
    return trace_run(module, weights, Arguments(inputs), fetch or (lambda name: weights[name].tensor.detach().clone()))


def ops(trace):
    return list(trace.ops)


def calls(trace):
    return [(span.call.module, span.call.number) for span in trace.spans]


def touched_in(trace, module):
    """The weights that each call of a module touches."""
    return [list(trace.weights(span.start, span.end)) for span in trace.spans if span.module == module]


@pytest.mark.parametrize("name", CASES)
def test_a_traced_run_gives_the_same_answer_and_leaves_the_module_as_it_was(name):
    make, inputs = CASES[name]
    module = made(make)
    before = {key: id(tensor) for key, tensor in module.named_parameters()}
    with torch.no_grad():
        expected = tensors_of(module(inputs.clone()))
    found = tensors_of(traced(module, inputs)[1])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert {key: id(tensor) for key, tensor in module.named_parameters()} == before
    assert all("forward" not in vars(part) for part in module.modules())


@pytest.mark.parametrize("name", CASES)
def test_the_same_run_gives_the_same_trace(name):
    make, inputs = CASES[name]
    first, second = (traced(made(make), inputs)[0] for _ in range(2))
    assert first == second
    module = made(make)
    assert traced(module, inputs)[0] == traced(module, inputs)[0] == first


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_seen_in_the_call_of_its_module(name):
    make, inputs = CASES[name]
    module = made(make)
    touched = set(traced(module, inputs)[0].weights())
    assert touched == {key for key, weight in weights_of(module).items() if not weight.is_buffer}


def test_calls_are_nested_and_counted_and_the_whole_module_is_no_call():
    trace, _ = traced(made(Shared), vectors())
    assert calls(trace)[:5] == [("first", 1), ("block", 1), ("block.norm", 1), ("block.up", 1), ("block.down", 1)]
    assert [number for module, number in calls(trace) if module == "block"] == [1, 2, 3]
    assert all(span.start <= span.end <= len(trace.ops) for span in trace.spans)
    assert len({tuple(names) for names in touched_in(trace, "block")}) == 1


def test_a_tied_weight_is_touched_under_one_name():
    trace, _ = traced(made(Tied), ids())
    assert touched_in(trace, "words") == touched_in(trace, "head") == [["words.weight"]]


def test_a_view_of_a_weight_that_is_read_later_is_a_touch_of_it():
    trace, _ = traced(made(Keeping), vectors())
    assert ops(trace)[-1].weights == ("blocks.0.up.weight",)


class Early(nn.Module):
    """Takes a reference of a weight and reads it in another call."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Block(), Block()

    def forward(self, hidden):
        weight = self.two.norm.weight
        return self.two(self.one(hidden)) * weight


def test_a_reference_that_was_taken_earlier_is_a_touch_where_it_is_read():
    trace, _ = traced(made(Early), vectors())
    assert "two.norm.weight" not in touched_in(trace, "one")[0]
    assert ops(trace)[-1].weights == ("two.norm.weight",)


def test_memory_that_comes_back_is_not_taken_for_what_was_there():
    """Weights that are let go of and fetched anew, with values made and dropped in between."""
    module = made(Chain, num_blocks=30)
    data = {name: weight.tensor.detach().clone() for name, weight in weights_of(module).items()}
    trace, _ = traced(module, vectors(), lambda name: data[name].clone())
    for index in range(30):
        (touched,) = touched_in(trace, f"blocks.{index}")
        assert {name.rpartition(".")[0].rpartition(".")[0] for name in touched} == {f"blocks.{index}"}
    starts = [span.start for span in trace.spans if span.module.startswith("blocks.") and span.module.count(".") == 1]
    assert [len(trace.live.at(start)) for start in starts] == [1] * 30


class Direct(nn.Module):
    """Calls `forward` itself, where no hook is called."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, hidden):
        return self.inner.forward(self.inner(hidden))


def test_a_forward_that_is_called_directly_is_a_call():
    assert calls(traced(made(Direct), vectors())[0]) == [("inner", 1), ("inner", 2)]


def test_what_a_hook_of_the_user_touches_is_touched_first_in_the_call():
    """The stream puts weights in at the same place: with a hook of that kind, the call begins before it."""
    module = made(Chain)
    module.blocks[1].register_forward_pre_hook(lambda part, args: (args[0] * module.head.bias[0],))
    trace, _ = traced(module, vectors())
    (touched,) = touched_in(trace, "blocks.1")
    assert touched[0] == "head.bias"


class Arguing(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.first = Takes(), nn.Linear(16, 16)

    def forward(self, hidden):
        made = self.first(hidden)
        return self.inner(hidden, mask=made, scale=self.first.bias)


class Takes(nn.Module):
    def forward(self, hidden, mask=None, scale=None):
        return hidden + mask * scale


def test_arguments_are_the_values_among_them_and_none_for_the_others():
    trace, _ = traced(made(Arguing), vectors())
    (entered,) = (span for span in trace.spans if span.module == "inner")
    made_before = [value for op in ops(trace)[:2] for value in op.writes]
    assert [value for value, _ in entered.arguments] == [None, made_before[-1], None]
    assert [value.axes for _, value in entered.arguments] == [(2, 16), (2, 16), (16,)]


class Writing(nn.Module):
    """Writes in place to what it made, and to its input."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, hidden):
        hidden.mul_(2)
        result = self.inner(hidden)
        view = result[:, :4]
        view.add_(1)
        return result


def test_what_is_written_in_place_is_the_same_value():
    trace, _ = traced(made(Writing), vectors())
    assert len(trace.values) == 1
    assert trace.outputs == (0,)
    assert ops(trace)[-1].reads == (0,)


def test_an_exception_in_forward_puts_the_weights_back():
    module = made(Failing)
    module.error = KeyboardInterrupt()
    before = {key: id(tensor) for key, tensor in module.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        traced(module, vectors())
    assert {key: id(tensor) for key, tensor in module.named_parameters()} == before
    assert all("forward" not in vars(part) for part in module.modules())


def test_an_exception_that_the_module_catches_ends_the_calls_that_it_left():
    class Catching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = Failing(), nn.Linear(16, 16)

        def forward(self, hidden):
            try:
                return self.inner(hidden)
            except ValueError:
                return self.last(hidden)

    module = made(Catching)
    module.inner.error = ValueError()
    run = traced(module, vectors())[0]
    inner, last = (next(span for span in run.spans if span.module == name) for name in ("inner", "last"))
    assert inner.end <= last.start


Pair = namedtuple("Pair", "one two")


@dataclasses.dataclass
class Record:
    one: object
    two: object


@dataclasses.dataclass(frozen=True)
class Slotted:
    __slots__ = ("one", "two")
    one: object
    two: object


class Cache:
    def __init__(self, one, two):
        self.layers, self.itself = [(one, two)], self


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda one, two: (one, two),
        lambda one, two: [one, [None, (two, "text")]],
        lambda one, two: {"x": one, "y": {"z": two}},
        lambda one, two: UserDict(x=one, y=two),
        Pair,
        Record,
        Slotted,
        Cache,
    ],
)
def test_tensors_of_an_output_are_found_in_whatever_it_is(wrapped):
    one, two = torch.ones(1), torch.ones(2)
    assert [id(tensor) for tensor in tensors_of(wrapped(one, two))] == [id(one), id(two)]


def test_an_output_that_holds_the_module_is_not_its_weights():
    module = made(Chain)
    assert tensors_of((Record(module, Chain), None, 1.5)) == []


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        (torch.ones(1), {"0": (1,)}),
        ((torch.ones(1), None, torch.ones(2)), {"0": (1,), "2": (2,)}),
        ({"x": torch.ones(1), "flag": True}, {"x": (1,)}),
        (UserDict(x=torch.ones(1)), {"x": (1,)}),
        (([torch.ones(1), torch.ones(2)],), {"0": (1,), "0.1": (2,)}),
    ],
)
def test_arguments_by_name(inputs, named):
    assert {name: tuple(tensor.shape) for name, tensor in Arguments(inputs).tensors().items()} == named


def test_copied_arguments_have_tensors_of_their_own():
    tensor, flag = torch.ones(2), object()
    first = Arguments({"x": [tensor], "flag": flag})
    second = first.copy()
    second.kwargs["x"][0].zero_()
    assert torch.equal(tensor, torch.ones(2))
    assert second.kwargs["flag"] is flag


def test_a_cache_among_the_arguments_is_copied_with_its_tensors():
    """A model writes to it, and each run must begin with what was given."""
    cache = Cache(torch.ones(2), torch.ones(3))
    copied = Arguments({"cache": cache}).copy().kwargs["cache"]
    copied.layers[0][0].zero_()
    copied.layers.append(None)
    assert torch.equal(cache.layers[0][0], torch.ones(2)) and len(cache.layers) == 1


def test_last_used_keeps_its_limit_of_bytes_and_what_was_used_last():
    fetched = []

    def fetch(name):
        fetched.append(name)
        return torch.zeros(10 if name != "large" else 1000, dtype=torch.uint8)

    kept = LastUsed(fetch, 30)
    for name in ("a", "b", "c", "a", "d", "a", "c"):
        kept(name)
        assert sum(tensor.nbytes for tensor in kept._kept.values()) <= 30
    assert fetched == ["a", "b", "c", "d"]
    kept("b")
    assert fetched[-1] == "b"
    kept("large")
    assert list(kept._kept) == ["large"]
    kept("a")
    assert list(kept._kept) == ["a"]


def test_touches_of_a_tensor_and_of_its_views_are_noticed():
    tensors = {"a": torch.ones(4), "b": torch.ones(4)}
    view = tensors["a"].view(2, 2)[0]
    with Touches(tensors) as touches:
        torch.ones(4) + 1
        assert touches.found == set()
        view + 1
    assert touches.found == {"a"}


def test_surrounding_a_forward_keeps_its_signature_and_is_undone_in_any_order():
    module, order = made(Chain), []

    def around(name):
        def call(forward, args, kwargs):
            order.append(name)
            return forward(*args, **kwargs)

        return call

    first, second = surround(module, around("inner")), surround(module, around("outer"))
    assert module.forward.__wrapped__.__name__ == "forward"
    module(vectors())
    assert order == ["outer", "inner"]
    first()
    module(vectors())
    assert order == ["outer", "inner", "outer"]
    second()
    module(vectors())
    assert len(order) == 3


def test_tensors_are_found_however_deep_they_are_and_in_what_contains_itself():
    one, other, deep = torch.zeros(1), torch.ones(1), torch.ones(2)
    around = [one, [other, {"one": one}]]
    around.append(around)
    for _ in range(5000):
        deep = [deep]
    found = tensors_of((around, deep, around))
    assert [id(tensor) for tensor in found[:3]] == [id(one), id(other), id(one)] == [id(t) for t in found[4:]]

"""A divided module, run from its store: the answers of the module itself, bit for bit, within a limit of weights."""

from __future__ import annotations

import dataclasses
import gc
import threading
import warnings
import weakref

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import offramp  # noqa: E402
from offramp.errors import BudgetError, DamagedError, RefusedError, StageError, UsageError  # noqa: E402
from offramp.measure import read_memory  # noqa: E402
from offramp.runtime.weight_plan import smallest_bytes  # noqa: E402
from offramp.store import Store  # noqa: E402
from offramp.streaming.capture import tensors_of  # noqa: E402
from offramp.streaming.placeholders import Placeholder, weights_of  # noqa: E402
from offramp.streaming.placement import (  # noqa: E402
    data_bytes,
    sliceable_shards,
    streamed_shards,
)
from offramp.units import named_size  # noqa: E402
from tests.division.modules import (  # noqa: E402
    CASES,
    WIDTH,
    Block,
    Chain,
    Counting,
    Failing,
    Keeping,
    Odd,
    Routed,
    Tied,
    Wide,
    ids,
    made,
    on_meta,
    vectors,
)
from tests.leases import TOUCH, num_leases, start  # noqa: E402


class Shelf:
    """Divides each module once; `module` may be a name of CASES."""

    def __init__(self, folder):
        self.folder, self.paths = folder, {}

    def __call__(self, make, inputs, *, key=None, **options):
        key = (key or make, repr(sorted(options)))
        if key not in self.paths:
            self.paths[key] = offramp.divide(made(make), inputs, self.folder / str(len(self.paths)), **options)
        return self.paths[key]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return Shelf(tmp_path_factory.mktemp("stores"))


def smallest(store, sliced=False):
    """The fewest bytes of weights that a store runs with; `sliced`: also some rows at a time."""
    with Store(store) as opened:
        sliceable = sliceable_shards(opened) if sliced else ()
        return smallest_bytes(streamed_shards(opened), data_bytes(opened), opened.program.module.pinned, sliceable)


def total(store):
    with Store(store) as opened:
        return sum(data_bytes(opened).values())


def plain(module, inputs):
    with torch.no_grad():
        return tensors_of(module(inputs))


def same(found, expected):
    found, expected = tensors_of(found), tensors_of(expected)
    assert len(found) == len(expected) > 0
    return all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(found, expected, strict=True))


def positive(num_rows=2):
    return vectors(num_rows).abs()


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_the_module_within_every_limit(shelf, name):
    make, inputs = CASES[name]
    store = shelf(make, inputs, key=name)
    low, high = smallest(store), total(store)
    expected = plain(made(make), inputs)
    for limit in sorted({low, low + 1, low + 64, (low + high) // 2, high - 1, high, 2 * high} - {low - 1}):
        if limit >= low:
            with offramp.stream(made(make), store, weight_budget=limit) as model:
                for _ in range(3):
                    assert same(model(inputs), expected)
                assert model.counts.peak_weight_bytes <= limit
                assert (model.counts.unplanned_loads, model.counts.disorders, model.counts.held) == (0, 0, set())


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_the_module_where_strict_refuses_all_else(shelf, name):
    make, inputs = CASES[name]
    store = shelf(make, inputs, key=name)
    with offramp.stream(made(make), store, weight_budget=smallest(store), strict=True) as model:
        assert same(model(inputs), plain(made(make), inputs))


@pytest.mark.parametrize("name", ["chain", "tied", "wide", "odd"])
def test_one_byte_less_than_the_smallest_limit_is_refused_with_the_number_that_works(shelf, name):
    make, inputs = CASES[name]
    store = shelf(make, inputs, key=name)
    low = smallest(store, sliced=True)
    with pytest.raises(BudgetError, match=rf"- the smallest weight budget that works is {named_size(low)}"):
        offramp.stream(made(make), store, weight_budget=low - 1)
    with offramp.stream(made(make), store, weight_budget=low) as model:
        model(inputs)
        assert model.counts.peak_weight_bytes <= low


@pytest.mark.parametrize("other", [vectors(5), vectors(1), vectors(0)])
def test_another_number_of_rows(shelf, other):
    store = shelf(Chain, vectors())
    with offramp.stream(made(Chain), store, weight_budget=smallest(store)) as model:
        assert same(model(other), plain(made(Chain), other))


def test_the_module_lets_go_of_its_own_weights(shelf):
    store, module = shelf(Tied, ids(), key="tied"), made(Tied)
    own = [weakref.ref(parameter) for parameter in module.parameters()]
    with offramp.stream(module, store, weight_budget=smallest(store)) as model:
        model(ids())
        gc.collect()
        assert [ref for ref in own if ref() is not None] == []


def test_calls_from_several_threads_wait_for_each_other(shelf):
    store = shelf(Chain, vectors())
    inputs = [vectors(seed=seed) for seed in range(4)]
    expected, found = [plain(made(Chain), each) for each in inputs], [None] * 4
    with offramp.stream(made(Chain), store, weight_budget=smallest(store)) as model:

        def work(index):
            call = model if index % 2 else model.module  # as generate does, which knows nothing of the stream
            found[index] = [call(inputs[index]) for _ in range(5)]

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(same(answer, expected[i]) for i, answers in enumerate(found) for answer in answers)
    assert model.counts.passes == 20


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit()])
def test_whatever_is_raised_in_forward_comes_out_and_the_next_pass_is_sound(shelf, error, strict):
    store, module = shelf(Failing, vectors()), made(Failing)
    expected = plain(made(Chain), vectors())
    with (
        warnings.catch_warnings(action="error"),
        offramp.stream(module, store, weight_budget=smallest(store), strict=strict) as model,
    ):
        for _ in range(3):
            module.error = error
            with pytest.raises(type(error)) as caught:
                model(vectors())
            assert caught.value is error
            module.error = error.__traceback__ = None
            del caught
            assert same(model(vectors()), expected)
        gc.collect()
        module(vectors())
        assert model._lost == []


def test_an_interrupt_in_the_middle_of_the_end_of_a_pass_spoils_nothing(shelf, monkeypatch):
    store = shelf(Chain, vectors())
    expected = plain(made(Chain), vectors())
    with offramp.stream(made(Chain), store, weight_budget=smallest(store)) as model:
        for name in ("release", "end_pass"):
            original = getattr(model._feed, name)
            calls = []

            def interrupted(*args, name=name, original=original, calls=calls, **options):
                calls.append(args)
                if len(calls) == 3 or name == "end_pass":
                    raise KeyboardInterrupt
                return original(*args, **options)

            monkeypatch.setattr(model._feed, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                model(vectors())
            monkeypatch.undo()
            assert all(same(model(vectors(seed=2)), plain(made(Chain), vectors(seed=2))) for _ in range(2))
            assert same(model(vectors()), expected)


def test_a_view_that_is_kept_for_every_input_stays_in_memory_by_plan(shelf):
    store = shelf(Keeping, vectors(), key="keeping")
    with Store(store) as opened:
        pinned = opened.program.module.pinned
        kept = [entry.name for name in pinned for entry in opened.manifest.shards[name].tensors]
    assert kept == ["blocks.0.up.weight"]


@pytest.mark.filterwarnings("ignore:offramp. .* of weights were in memory")
def test_a_view_that_is_kept_for_another_input_is_never_overwritten(shelf):
    store, other = shelf(lambda: Keeping(only_negative=True), positive(), key="keeping for some"), -positive()
    module = made(Keeping, only_negative=True)
    expected = plain(module, other)
    with offramp.stream(module, store, weight_budget=smallest(store)) as model:
        for _ in range(3):
            assert same(model(other), expected)
            assert same(model(positive()), plain(made(Keeping, only_negative=True), positive()))
        assert model.counts.held == {"blocks.0.up.weight"}
        assert model.counts.peak_weight_bytes <= 2 * smallest(store) + smallest(store)  # what is held counts once


def test_strict_refuses_a_view_that_is_kept(shelf):
    store = shelf(lambda: Keeping(only_negative=True), positive(), key="keeping for some")
    with offramp.stream(made(Keeping, only_negative=True), store, weight_budget=smallest(store), strict=True) as model:
        with pytest.raises(StageError, match=r"blocks\.0\.up\.weight is still referred to after stage 00\d"):
            model(-positive())
        assert same(model(positive()), plain(made(Keeping, only_negative=True), positive()))


class Giving(nn.Module):
    """Gives weights out: one that is there at the end, and one that is not."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        return {"out": self.last(self.first(hidden)), "weights": (self.first.weight, self.last.weight[:2])}


def test_weights_that_a_module_gives_out_are_whole_and_stay_so(shelf):
    store = shelf(Giving, vectors())
    expected = plain(made(Giving), vectors())
    with offramp.stream(made(Giving), store, weight_budget=total(store)) as model:
        kept = model(vectors())
        assert same(model(-vectors()), plain(made(Giving), -vectors()))
    assert same(kept, expected)
    assert not any(isinstance(tensor, Placeholder) for tensor in tensors_of(kept))


class Late(nn.Module):
    """Like `Giving`, for some inputs only."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, hidden):
        is_negative = bool(hidden.sum() < 0)
        for block in self.blocks:
            hidden = block(hidden)
        return (hidden, self.blocks[0].up.weight, self.blocks[2].up.weight) if is_negative else (hidden,)


@pytest.mark.filterwarnings("ignore:offramp. .* of weights were in memory")
def test_weights_that_are_given_out_for_another_input_are_read_for_that(shelf):
    store = shelf(Late, positive())
    with offramp.stream(made(Late), store, weight_budget=smallest(store)) as model:
        kept = model(-positive())
        assert same(model(positive()), plain(made(Late), positive()))
        assert (model.counts.unplanned, model.counts.held) == ({"blocks.0.up.weight"}, {"blocks.2.up.weight"})
    assert same(kept, plain(made(Late), -positive()))


@pytest.mark.filterwarnings("ignore:offramp. .* of weights were in memory")
def test_another_path_gives_the_right_answer_and_is_counted(shelf):
    """It skips blocks, goes back, and touches a layer that was never called."""
    store = shelf(Routed, positive())
    expected = plain(made(Routed), -positive())
    with offramp.stream(made(Routed), store, weight_budget=smallest(store)) as model:
        assert same(model(-positive()), expected)
        assert model.counts.disorders > 0
        assert model.counts.unplanned >= {"other.weight", "other.bias"}
        first = model.counts.unplanned_loads, model.counts.disorders
        assert same(model(positive()), plain(made(Routed), positive()))
        assert (model.counts.unplanned_loads, model.counts.disorders) == first
        assert same(model(-positive()), expected)
        record = model.record()
    assert record["unplanned"] == sorted(model.counts.unplanned)
    assert record["bytes_read_total"] > 0


def test_strict_refuses_another_path_and_names_weight_operation_and_stage(shelf):
    store = shelf(Routed, positive())
    with offramp.stream(made(Routed), store, weight_budget=smallest(store), strict=True) as model:
        with pytest.raises(StageError, match=r"stage 00\d began after 00\d: another path than when divided"):
            model(-positive())
        with pytest.raises(StageError, match=r"aten\.t\.default touches other\.weight outside of a pass.* none"):
            model.module.other(vectors())
        assert same(model(positive()), plain(made(Routed), positive()))


def test_strict_refuses_a_weight_in_another_stage(shelf):
    store, module = shelf(Chain, vectors()), made(Chain)
    with offramp.stream(module, store, weight_budget=smallest(store), strict=True) as model:
        module.blocks[2].register_forward_pre_hook(lambda part, args: (args[0] + module.head.bias[0],))
        with pytest.raises(
            StageError, match=r"aten\.\w+\.\w+ touches head\.bias in stage 00\d; it is planned for 00\d"
        ):
            model(vectors())


def test_a_store_whose_proof_counted_other_reads_is_refused_by_strict(shelf, tmp_path):
    """The first example goes one way, the second another."""
    store = offramp.divide(made(Routed), positive(), tmp_path / "store", more_inputs=[-positive()])
    with Store(store) as opened:
        assert opened.manifest.proof.is_paged
        assert all(proof.equal for proof in opened.manifest.proof.examples)
    with pytest.raises(RefusedError, match="weights of this store are read outside their stages"):
        offramp.stream(made(Routed), store, strict=True)
    with offramp.stream(made(Routed), store, weight_budget=smallest(store)) as model:
        assert same(model(-positive()), plain(made(Routed), -positive()))


def test_a_module_in_training_mode_is_refused(shelf):
    store = shelf(Chain, vectors())
    with offramp.stream(made(Chain), store, weight_budget=smallest(store)) as model:
        model.train()
        with pytest.raises(UsageError, match="training mode"):
            model(vectors())
        model.eval()
        assert same(model(vectors()), plain(made(Chain), vectors()))


def test_a_closed_stream_answers_no_more_and_says_so(shelf):
    store = shelf(Chain, vectors())
    stream = offramp.stream(made(Chain), store, weight_budget=smallest(store))
    with pytest.raises(ValueError, match="the stream is not open"):
        stream(vectors())
    with stream as model:
        model(vectors())
    stream.close()
    assert stream.record()["passes"] == 1 and stream.record()["bytes_read_total"] > 0
    with pytest.raises(ValueError, match="the stream is not open"):
        stream(vectors())
    with pytest.raises(StageError, match=r"needs first\.weight, and its stream is closed"):
        stream.module(vectors())
    assert "forward" not in vars(stream.module)


def test_a_module_can_be_streamed_again_and_again_but_not_twice_at_once(shelf):
    store, other = shelf(Chain, vectors()), shelf(Chain, vectors(), key="again")
    module = made(Chain)
    for path in (store, other, store):
        with offramp.stream(module, path, weight_budget=smallest(path)) as model:
            assert same(model(vectors()), plain(made(Chain), vectors()))
            with pytest.raises(UsageError, match="the module is streamed already"):
                offramp.stream(module, other, weight_budget=smallest(other)).open()
            assert same(model(vectors()), plain(made(Chain), vectors()))


@pytest.mark.parametrize("make", [Chain, Tied, Odd, Wide])
def test_a_class_is_enough_to_run_a_store(shelf, make):
    inputs = ids() if make is Tied else vectors(width=13 if make is Odd else WIDTH)
    store = shelf(make, inputs)
    with offramp.stream(make, store, weight_budget=smallest(store)) as model:
        assert same(model(inputs), plain(made(make), inputs))
        assert model.counts.unplanned_loads == 0


def test_a_class_whose_unsaved_buffers_come_out_otherwise_is_refused(tmp_path):
    """Its answers would be others, and nothing else tells."""
    module = made(Tied)
    module.positions += 1
    store = offramp.divide(module, ids(), tmp_path / "store")
    with pytest.raises(
        StageError, match="buffers that are in no checkpoint are others than those of the divided module"
    ):
        offramp.stream(Tied, store)
    with offramp.stream(module, store) as model:
        answer = model(ids())
    assert not same(answer, plain(made(Tied), ids()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype(tmp_path, dtype):
    module = made(Tied).to(dtype)
    module.positions = made(Tied).positions  # so that the class builds the same
    expected = plain(module, ids())
    store = offramp.divide(module, ids(), tmp_path / "store")
    for given in (module, Tied):
        with offramp.stream(given, store, weight_budget=smallest(store)) as model:
            assert same(model(ids()), expected)
            assert model.module.shift.dtype == dtype


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (
            lambda: made(Chain, num_blocks=5),
            r"blocks\.4\.down\.bias is float32 \[16\] in the module, missing in the store",
        ),
        (
            lambda: made(Chain, num_blocks=3),
            r"blocks\.3\.down\.bias is missing in the module, float32 \[16\] in the store",
        ),
        (lambda: made(Chain, width=8), r"is float32 \[8\] in the module, float32 \[16\] in the store"),
        (lambda: made(Chain).half(), r"is float16 \[16\] in the module, float32 \[16\] in the store"),
    ],
)
def test_another_module_is_refused_by_name(shelf, module, says):
    store = shelf(Chain, vectors())
    with pytest.raises(StageError, match=says + r".* give a tests\.division\.modules\.Chain as it was divided"):
        offramp.stream(module(), store)


def trained(module):
    module.blocks[2].up.bias.data[1] += 1e-6
    return module


def relaid(module):
    weight = module.blocks[2].up.weight
    weight.data = weight.data.t().contiguous().t()
    return module


@pytest.mark.parametrize("change", [trained, relaid])
def test_a_module_whose_weights_are_not_those_of_the_store_is_refused_by_name(shelf, change):
    """Its own answers would be others than those of the store."""
    store, name = shelf(Chain, vectors()), "up.bias" if change is trained else "up.weight"
    says = rf"blocks\.2\.{name} has other values or strides in the module than in the store .* divide again"
    with pytest.raises(StageError, match=says):
        offramp.stream(change(made(Chain)), store)
    if change is trained:
        other = made(Tied)
        other.shift += 1
        with pytest.raises(StageError, match="shift has other values"):
            offramp.stream(other, shelf(Tied, ids(), key="tied"))


def test_a_module_that_was_streamed_holds_no_weights_that_could_differ(shelf):
    module, store = made(Counting), shelf(Counting, vectors())
    for _ in range(2):
        with offramp.stream(module, store, weight_budget=smallest(store)) as model:
            model(vectors())


def test_a_module_that_is_tied_otherwise_is_refused(shelf):
    module = made(Chain)
    module.blocks[0].norm.weight = module.blocks[1].norm.weight
    store = shelf(Chain, vectors())
    with pytest.raises(StageError):
        offramp.stream(module, store)


def test_buffers_come_from_the_store_and_tied_weights_are_one(shelf):
    store = shelf(Tied, ids(), key="tied")
    torch.manual_seed(5)
    with offramp.stream(Tied, store, weight_budget=total(store)) as model:
        module = model.module
        assert same(model(ids()), plain(made(Tied), ids()))
        assert torch.equal(module.shift, made(Tied).shift)
        assert module.head.weight is module.words.weight


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_passes_may_be_made_in_any_mode(shelf, first):
    """What is made in inference mode cannot be written to outside of it."""
    inputs = vectors(width=13)
    store = shelf(Odd, inputs)
    with offramp.stream(made(Odd), store, weight_budget=smallest(store)) as model:
        for mode in (first, torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                found = model(inputs)
            assert same(found, plain(made(Odd), inputs)) and not found.requires_grad


def test_a_pass_may_be_cast_and_keeps_no_cast_weight(shelf):
    """Autocast keeps those that require gradients until it ends."""

    class Asking(Chain):
        keeps = None

        def forward(self, hidden):
            self.keeps = torch.is_autocast_cache_enabled()
            return super().forward(hidden)

    store, module = shelf(Asking, vectors()), made(Asking)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(made(Asking), vectors())
        with offramp.stream(module, store, weight_budget=smallest(store)) as model:
            assert same(model(vectors()), expected)
        assert module.keeps is False and torch.is_autocast_cache_enabled()
    assert expected[0].dtype == torch.bfloat16


def test_copies_of_weights_that_begin_anywhere_are_gone_with_their_stage(shelf):
    inputs = vectors(width=13)
    store = shelf(Odd, inputs)
    with offramp.stream(made(Odd), store, weight_budget=smallest(store)) as model:
        for _ in range(2):
            model(inputs)
        slots = [*model._arena._slots.values()]
        views = [view for slot in slots for views in slot.notes.values() for view in views]
        assert any(view._entry.offset % 64 for view in views)
        assert all(view._tensor is None for view in views if view._entry.offset % 64)


def test_a_layer_that_is_too_large_is_computed_some_rows_at_a_time(shelf):
    store = shelf(Wide, vectors())
    low = smallest(store, sliced=True)
    assert low < smallest(store) / 2
    with offramp.stream(made(Wide), store, weight_budget=low, strict=True) as model:
        for inputs in (vectors(), vectors(1), vectors(3).view(1, 3, WIDTH), vectors(1)[0]):
            found, expected = model(inputs), made(Wide)(inputs)
            assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-6)
        assert model.counts.peak_weight_bytes <= low
        assert model.record()["sliced"]


@pytest.mark.parametrize(
    "use", [lambda x, w, b: x @ w, lambda x, w, b: torch.addmm(b, x.reshape(-1, x.shape[-1]), w)], ids=["mm", "addmm"]
)
def test_a_weight_that_meets_columns_is_multiplied_some_rows_at_a_time(tmp_path, use):
    """As in GPT-2, whose weights lie the other way round."""

    class Multiplying(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.large = nn.Linear(WIDTH, 400), nn.Parameter(torch.randn(400, 5 * WIDTH))
            self.bias = nn.Parameter(torch.randn(5 * WIDTH))

        def forward(self, hidden):
            return use(self.first(hidden), self.large, self.bias)

    store = offramp.divide(made(Multiplying), vectors(), tmp_path / "store", stage_bytes=1 << 10)
    low = smallest(store, sliced=True)
    assert low < smallest(store) / 2
    with offramp.stream(made(Multiplying), store, weight_budget=low, strict=True) as model:
        for inputs in (vectors(), vectors(1)[:, None]):
            found, expected = model(inputs), made(Multiplying)(inputs)
            assert found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
        assert model.counts.peak_weight_bytes <= low
        assert len(model.record()["sliced"]) == 2


@pytest.mark.parametrize(
    "use", [lambda x, w: x @ w.t(), lambda x, w: x @ w.T, lambda x, w: torch.mm(x, w.transpose(0, 1))]
)
def test_a_large_weight_that_is_used_as_a_whole_is_not_sliced(tmp_path, use):
    class Multiplying(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.large = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(400, WIDTH))

        def forward(self, hidden):
            return use(self.first(hidden), self.large)

    store = offramp.divide(made(Multiplying), vectors(), tmp_path / "store")
    low = smallest(store, sliced=True)
    with offramp.stream(made(Multiplying), store, weight_budget=low, strict=True) as model:
        assert same(model(vectors()), plain(made(Multiplying), vectors()))
        assert model.counts.peak_weight_bytes <= low


def test_rows_of_a_large_embedding_are_looked_up_in_the_file(shelf):
    """Tied, so that the head uses it as a whole, some rows at a time where memory is short."""
    make = lambda: Tied(num_words=6000)  # noqa: E731
    store = shelf(make, ids(), key="large tied")
    with Store(store) as opened:
        assert opened.program.module.sliced == ("words.weight",)
    with offramp.stream(made(make), store, weight_budget=smallest(store)) as model:
        assert same(model(ids()), plain(made(make), ids()))
    low = smallest(store, sliced=True)
    assert low < smallest(store) / 2
    with offramp.stream(made(make), store, weight_budget=low, strict=True) as model:
        found, expected = tensors_of(model(ids())), plain(made(make), ids())
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))
        assert torch.equal(found[1], expected[1])  # before the head
        assert model.record()["gathered_bytes"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [ids(), ids(1, 1), ids(3, 0), torch.full((2, 3), 7), torch.tensor([5999, 0, 5999])])
def test_a_table_is_not_in_memory_at_all(tmp_path_factory, shelf, dtype, asked):
    make = lambda: nn.Sequential(nn.Embedding(6000, 32, padding_idx=0), nn.Linear(32, 4)).to(dtype)  # noqa: E731
    store = shelf(make, ids(), key=f"table {dtype}")
    assert smallest(store) < 6000 * 32
    with offramp.stream(made(make), store, weight_budget=smallest(store), strict=True) as model:
        assert same(model(asked), plain(made(make), asked))
        for index in (-1, 6000):
            with pytest.raises(IndexError, match="index out of range in self"):
                model(torch.tensor([[index]]))
        assert same(model(asked), plain(made(make), asked))


@pytest.mark.parametrize("reads", ["direct", "auto", "buffered"])
def test_a_module_of_nothing_but_a_table(shelf, reads):
    make = lambda: nn.Sequential(nn.Embedding(6000, 32))  # noqa: E731
    store = shelf(make, ids(), key="bare table")
    with offramp.stream(made(make), store, weight_budget=1, reads=reads) as model:
        assert same(model(ids()), plain(made(make), ids()))


@pytest.mark.parametrize("reads", ["direct", "buffered", "mapped"])
@pytest.mark.parametrize("verify", ["always", "first", "never"])
def test_reads_of_all_kinds_give_the_same_answers(shelf, reads, verify):
    store = shelf(Chain, vectors())
    with offramp.stream(made(Chain), store, weight_budget=smallest(store), reads=reads, verify=verify) as model:
        assert all(same(model(vectors()), plain(made(Chain), vectors())) for _ in range(2))


def test_a_stream_gives_way_to_who_writes_to_the_store_and_says_so(tmp_path):
    store = offramp.divide(made(Chain), vectors(), tmp_path / "store")
    with offramp.stream(made(Chain), store, weight_budget=smallest(store), reads="mapped") as model:
        wanted = plain(made(Chain), vectors())
        assert same(model(vectors()), wanted)
        record = model.record()
        if record["reads"] != "mapped":
            pytest.skip(record["reads_because"])
        assert start(TOUCH, *store.glob("weights-*.safetensors")).wait(20) == 0
        assert same(model(vectors()), wanted)
        record = model.record()
        assert record["reads"] == "buffered" and "writing" in record["reads_because"]
    assert num_leases() == 0


def test_a_damaged_shard_ends_the_pass_and_never_gives_an_answer(tmp_path):
    store = offramp.divide(made(Chain), vectors(), tmp_path / "store")
    path = sorted(store.glob("weights-*.safetensors"))[2]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with offramp.stream(made(Chain), store, weight_budget=smallest(store), verify="always") as model:
        for _ in range(2):
            with pytest.raises(DamagedError, match=path.name):
                model(vectors())
        data[-1] ^= 1
        path.write_bytes(data)
        assert same(model(vectors()), plain(made(Chain), vectors()))


def test_damaged_buffers_are_found_when_the_stream_opens_and_the_module_stays_as_it_is(tmp_path):
    module = made(Tied)
    store = offramp.divide(module, ids(), tmp_path / "store")
    path = store / "buffers.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedError, match=r"buffers\.safetensors"):
        offramp.stream(module, store, weight_budget=smallest(store)).open()
    assert same(module(ids()), plain(made(Tied), ids()))
    with pytest.raises(DamagedError):
        offramp.stream(module, store, weight_budget=smallest(store)).open()  # and not: streamed already


def test_a_budget_of_the_process(shelf):
    store = shelf(Chain, vectors())
    for options in ({"budget": "8GiB"}, {}, {"budget": "8GiB", "inputs": vectors(8)}):
        with offramp.stream(made(Chain), store, **options) as model:
            assert same(model(vectors()), plain(made(Chain), vectors()))
    with pytest.raises(
        BudgetError, match=r"budget of 1\.00 MiB is too small - process .* the smallest budget that works is \d+MiB"
    ) as caught:
        offramp.stream(made(Chain), store, budget="1MiB")
    needed = str(caught.value).rpartition(" ")[2].removesuffix("MiB")
    assert 50 < int(needed) < 8 << 10
    with pytest.raises(ValueError, match="give budget, for the whole process, or weight_budget"):
        offramp.stream(made(Chain), store, budget="1GiB", weight_budget=1)


def test_an_unknown_option_is_refused_with_the_known_ones(shelf):
    with pytest.raises(ValueError, match="unknown stream option weigth_budget; known: strict, reads, verify"):
        offramp.stream(made(Chain), shelf(Chain, vectors()), weigth_budget=1)


@pytest.mark.filterwarnings("ignore:offramp. .* of weights were in memory")
def test_a_part_that_is_called_by_itself_is_streamed_too(shelf):
    """As `generate` calls the encoder of an encoder-decoder."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Chain(width=WIDTH), Chain(width=3)

        def forward(self, hidden):
            return self.two(self.one(hidden))

    store = shelf(Two, vectors())
    expected, part = plain(made(Two), vectors()), plain(made(Two).two, vectors(width=3))
    with offramp.stream(made(Two), store, weight_budget=smallest(store)) as model:
        for _ in range(2):
            assert same(model.two(vectors(width=3)), part)
            assert same(model(vectors()), expected)
        assert model.counts.peak_weight_bytes <= 2 * smallest(store)


def test_a_module_that_calls_itself_is_one_pass(shelf):
    class Again(Chain):
        def forward(self, hidden, again=True):
            out = super().forward(hidden)
            return out if not again else out + self(hidden.flip(0), again=False)

    store = shelf(Again, vectors())
    with offramp.stream(made(Again), store, weight_budget=smallest(store)) as model:
        assert same(model(vectors()), plain(made(Again), vectors()))
        assert model.counts.passes == 1


def test_everything_else_is_reached_through_the_stream(shelf):
    store, module = shelf(Chain, vectors()), made(Chain)
    stream = offramp.stream(module, store)
    assert stream.blocks is module.blocks
    assert not hasattr(stream, "nothing")
    assert set(weights_of(module)) == {name for name, _ in stream.named_parameters()}


SMALL = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=16, n_layer=3, n_head=2, **SMALL))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=3, **heads, **SMALL))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **shape, **SMALL))


@pytest.mark.filterwarnings("ignore:offramp. .* of weights were in memory")
@pytest.mark.parametrize("make", [gpt2, llama, t5])
def test_generation_with_a_cache_gives_the_tokens_and_scores_of_the_model(shelf, make):
    inputs = {"input_ids": ids(), "attention_mask": torch.ones_like(ids())}
    example = inputs | ({"decoder_input_ids": ids(2, 3)} if make is t5 else {})
    store = shelf(make, example)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    expected = made(make).generate(**inputs, **options)
    for given in (made(make), type(made(make))):
        with offramp.stream(given, store, weight_budget=smallest(store)) as model:
            found = model.generate(**inputs, **options)
            assert torch.equal(found.sequences, expected.sequences)
            assert same(found.scores, expected.scores)
            with torch.no_grad():
                assert same(model(**example), made(make)(**example))
            if make is not t5:  # whose encoder is called by itself
                assert (model.counts.unplanned_loads, model.counts.disorders, model.counts.held) == (0, 0, set())
                assert model.counts.peak_weight_bytes <= smallest(store)


def test_a_step_with_a_cache_can_be_the_example(shelf, tmp_path):
    def step():
        from transformers import DynamicCache

        cache = DynamicCache(config=made(gpt2).config)
        with torch.no_grad():
            made(gpt2)(input_ids=ids(), past_key_values=cache, use_cache=True)
        return {"input_ids": ids(2, 1), "past_key_values": cache, "use_cache": True}

    example = step()
    store = offramp.divide(made(gpt2), example, tmp_path / "store")
    assert example["past_key_values"].get_seq_length() == 6
    with torch.no_grad():
        expected = made(gpt2)(**step())
    with offramp.stream(made(gpt2), store, weight_budget=smallest(store)) as model:
        assert same(model(**step()), expected)


def test_a_class_of_transformers_is_built_from_the_config_in_the_store(shelf, tmp_path):
    store = shelf(gpt2, {"input_ids": ids()})
    (tmp_path / "copy").mkdir()
    for path in store.iterdir():
        if path.is_file() and path.name != "config.json":
            (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel

    with offramp.stream(AutoModelForCausalLM, store, weight_budget=smallest(store)) as model:
        assert same(model(ids()), plain(made(gpt2), ids()))
    with pytest.raises(RefusedError, match=r"config\.json cannot be read"):
        offramp.stream(GPT2LMHeadModel, tmp_path / "copy")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_module_on_a_gpu_is_refused(shelf, tmp_path):
    store = shelf(Chain, vectors())
    with pytest.raises(StageError, match="is on cuda:0, and a stream computes on the CPU"):
        offramp.stream(made(Chain).cuda(), store)
    with pytest.raises(StageError, match=r"is on cuda:0.*divide module.cpu\(\)"):
        offramp.divide(made(Chain).cuda(), vectors(), tmp_path / "gpu")


class TiedTable(nn.Module):
    """A causal language model without attention: the table of the embedding is the weight of the last layer."""

    def __init__(self, whole_first=False):
        super().__init__()
        self.whole_first = whole_first
        self.table, self.block, self.head = nn.Embedding(3000, 32), nn.Linear(32, 32), nn.Linear(32, 3000, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        hidden = self.table(ids)
        if self.whole_first:
            hidden = self.head(hidden)[..., :32] + hidden
        return self.head(torch.tanh(self.block(hidden)))


@pytest.mark.parametrize("strict", [False, True])
def test_a_tied_table_is_read_once_a_pass(tmp_path, strict):
    module, asked = made(TiedTable), torch.arange(7)[None]
    store = Store(offramp.divide(module, asked, tmp_path / "store"))
    wanted, table = module(asked), max(shard.bytes for shard in store.manifest.shards.values())
    with offramp.stream(module, store.path, weight_budget=table + (64 << 10), strict=strict) as running:
        read = []
        for _ in range(4):
            assert torch.equal(running(asked), wanted)
            read.append(running.record()["bytes_read_total"])
        assert not running.counts.unplanned_loads
        assert running.counts.peak_weight_bytes <= table + (64 << 10)
    whole = sum(shard.bytes for shard in store.manifest.shards.values())
    gathered = asked.numel() * 32 * 4 + (1 << 16)
    assert read[-1] - read[0] <= 3 * (whole + gathered)


def test_a_tied_table_that_the_first_stage_needs_as_a_whole_is_read_for_it(tmp_path):
    module, asked = made(lambda: TiedTable(whole_first=True)), torch.arange(7)[None]
    store = Store(offramp.divide(module, asked, tmp_path / "store"))
    wanted, table = module(asked), max(shard.bytes for shard in store.manifest.shards.values())
    with offramp.stream(module, store.path, weight_budget=table + (64 << 10)) as running:
        for _ in range(3):
            assert torch.allclose(running(asked), wanted, atol=1e-6)
        assert running.counts.peak_weight_bytes <= table + (64 << 10)


class WholeTableBesideAnother(nn.Module):
    """Its first part multiplies by a weight of its own, and by the whole table that it looked up."""

    def __init__(self):
        super().__init__()
        self.table, self.first = nn.Embedding(2880, 256), nn.Parameter(torch.randn(512, 512) / 23)
        self.blocks = nn.ModuleList(nn.Linear(500, 500, bias=False) for _ in range(3))
        self.head = nn.Linear(256, 2880, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        hidden = torch.cat([self.table(ids)] * 2, -1) @ self.first
        hidden = (hidden + nn.functional.linear(hidden[..., :256], self.table.weight)[..., :512])[..., :500]
        for block in self.blocks:
            hidden = torch.tanh(block(hidden))
        return self.head(hidden[..., :256])


@pytest.mark.parametrize("spare_bytes", [16 << 10, 300 << 10, 1 << 20])
def test_a_tied_table_has_a_place_beside_the_weights_of_the_first_stage(tmp_path, spare_bytes):
    """It is taken to be looked up only. Where it shared memory with another weight of that stage, the stream waited
    for ever.
    """
    module, asked = made(WholeTableBesideAnother), torch.arange(7)[None]
    wanted, store = module(asked), offramp.divide(module, asked, tmp_path / "store", stage_bytes=1 << 20)
    both = module.table.weight.nbytes + module.first.nbytes
    with offramp.stream(module, store, weight_budget=both + spare_bytes) as running:
        for _ in range(3):
            assert torch.allclose(running(asked), wanted, atol=1e-5)


def test_what_the_first_pass_adds_to_the_process_is_taken_off_the_weights(tmp_path):
    """As libraries do, which load code when they first run."""
    make, x = lambda: nn.Sequential(*(nn.Linear(512, 512) for _ in range(12))), torch.ones(1, 512)
    module, kept = made(make), []
    wanted, store = module(x), offramp.divide(module, x, tmp_path / "store")
    running = made(make)
    running[0].register_forward_pre_hook(lambda *_: None if kept else kept.append(torch.ones(6 << 20)))  # 24 MiB
    gc.collect()
    budget = read_memory().rss_bytes + (20 << 20)  # the module takes 12 MiB before it is streamed
    with offramp.stream(running, store, budget=budget) as stream:
        assert torch.equal(stream(x), wanted)
        assert stream.plan.resident_bytes + stream.plan.pool_bytes <= 8 << 20
        for _ in range(2):
            assert torch.equal(stream(x), wanted)
            assert read_memory().rss_bytes <= budget
        assert not stream.record()["unplanned"]


def test_a_process_that_grows_beyond_its_budget_in_the_first_pass_says_so(tmp_path):
    make, x, kept = lambda: nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4)), torch.ones(1, 64), []
    store = offramp.divide(made(make), x, tmp_path / "store")
    running = made(make)
    running[0].register_forward_pre_hook(lambda *_: None if kept else kept.append(torch.ones(12 << 20)))  # 48 MiB
    with offramp.stream(running, store, budget=read_memory().rss_bytes + (24 << 20)) as stream:
        with pytest.warns(UserWarning, match=r"more than its limit of .*: .* in a pass, besides weights"):
            stream(x)
        stream(x)


@dataclasses.dataclass(frozen=True)
class Record:
    """An output that is no container of PyTorch."""

    name: str
    tensors: object


class OwnList(list):
    pass


class GivingRecords(Chain):
    """Returns weights that are not in memory at its end, in objects of its own."""

    def forward(self, hidden):
        weight, bias = self.blocks[0].up.weight, self.blocks[1].up.bias
        return super().forward(hidden), Record("both", OwnList([weight, {"bias": Record("one", [bias])}]))


def test_weights_that_a_module_gives_out_in_objects_are_whole_after_the_stream(shelf):
    store = shelf(GivingRecords, vectors())
    module = made(GivingRecords)
    expected = [tensor.clone() for tensor in plain(made(GivingRecords), vectors())]
    with offramp.stream(module, store, weight_budget=smallest(store)) as model:
        given = model(vectors())
    assert same(given, expected) and not any(isinstance(tensor, Placeholder) for tensor in tensors_of(given))


def test_weights_that_are_read_outside_of_passes_do_not_stay_in_memory(shelf):
    store, module = shelf(Chain, vectors()), made(Chain)
    norms = [weight.norm() for weight in made(Chain).parameters()]
    with offramp.stream(module, store, weight_budget=smallest(store)) as model:
        assert [weight.norm() for weight in module.parameters()] == norms
        largest = max(weight.nbytes for weight in module.parameters())
        assert model.counts.peak_weight_bytes <= smallest(store) + largest
        assert same(model(vectors()), plain(made(Chain), vectors()))


class Functional(Chain):
    """Calls its blocks with their own weights through PyTorch, and halved where there are three rows."""

    def forward(self, hidden):
        hidden = self.first(hidden)
        weights = {name: weight * 0.5 if len(hidden) == 3 else weight for name, weight in self.named_parameters()}
        for index, block in enumerate(self.blocks):
            own = {name: weights[f"blocks.{index}.{name}"] for name, _ in block.named_parameters()}
            hidden = torch.func.functional_call(block, own, (hidden,))
        return self.head(hidden)


@pytest.mark.filterwarnings("ignore:offramp. .* of weights were in memory")
@pytest.mark.parametrize("limit", [smallest, total])
def test_weights_that_stand_for_others_during_a_call_are_right_or_refused(shelf, limit):
    store, expected = shelf(Functional, vectors()), plain(made(Functional), vectors(3))
    with offramp.stream(made(Functional), store, weight_budget=limit(store)) as model:
        for _ in range(2):
            assert same(model(vectors()), plain(made(Functional), vectors()))
        try:
            assert same(model(vectors(3)), expected)
        except StageError as refused:
            assert "puts another tensor in the place of the weight" in str(refused)


def test_a_part_of_a_streamed_module_is_not_streamed_at_the_same_time(shelf):
    store, outer = shelf(Chain, vectors()), made(lambda: nn.Sequential(Chain(), nn.Linear(3, 3)))
    other = shelf(lambda: nn.Sequential(Chain(), nn.Linear(3, 3)), vectors(), key="outer")
    for one, of_one, two, of_two, says in (
        (outer, other, outer[0], store, "first"),
        (outer[0], store, outer, other, r"0\.first"),
    ):
        with offramp.stream(one, of_one), pytest.raises(UsageError, match=rf"^{says} is streamed already - .* - close"):
            offramp.stream(two, of_two).open()


class Built(Chain):
    """Built with other arguments, it has weights of the same shapes and gives other answers."""

    def __init__(self, scale=1.0, act=nn.ReLU):
        super().__init__()
        self.scale, self.act = scale, act()

    def forward(self, hidden):
        return self.act(super().forward(hidden)) * self.scale


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Built(2.0, nn.GELU), None),
        (Built, "the module has another attribute scale"),
        (lambda: Built(2.0), "act is ReLU, not GELU"),
    ],
)
def test_a_module_that_is_built_again_is_the_divided_one_or_refused(shelf, build, says):
    store = shelf(lambda: Built(2.0, nn.GELU), vectors(), key="built")
    if says is None:
        with offramp.stream(build, store) as model:
            assert same(model(vectors()), plain(made(lambda: Built(2.0, nn.GELU)), vectors()))
        return
    with pytest.raises(StageError, match=f"builds another module than the one that was divided: {says} - "):
        offramp.stream(build, store)


@pytest.mark.parametrize("module", [3, lambda: 3])
def test_what_is_no_module_is_refused(shelf, module):
    with pytest.raises(UsageError, match=r"give the torch\.nn\.Module that was divided, or its class"):
        offramp.stream(module, shelf(Chain, vectors()))


class Forced(Chain):
    """Computes a gradient in its forward, where that is possible."""

    def forward(self, hidden):
        if torch.is_inference_mode_enabled():
            return super().forward(hidden)
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            return torch.autograd.grad(super().forward(hidden).sum(), hidden)[0]


def test_a_pass_may_compute_gradients_after_one_in_inference_mode(shelf):
    module, inputs = made(Forced), vectors()
    with torch.inference_mode():
        expected = made(Forced)(inputs)
    for limit in (smallest, total):
        store = shelf(Forced, inputs)
        with offramp.stream(module, store, weight_budget=limit(store)) as model:
            with torch.inference_mode():
                assert torch.equal(model(inputs), expected)
            assert same(model(inputs), plain(made(Forced), inputs))


def test_a_module_without_data_is_streamed_unless_it_lacks_buffers(shelf):
    with offramp.stream(on_meta(Chain), shelf(Chain, vectors())) as model:
        assert same(model(vectors()), plain(made(Chain), vectors()))
    with pytest.raises(StageError, match=r"^buffer positions has no data - Tied - give its class, or a module"):
        offramp.stream(on_meta(Tied), shelf(Tied, ids()))


class DrawnInPlace(Chain):
    """Writes to its input, and draws random numbers."""

    def forward(self, hidden):
        return super().forward(hidden.add_(1) + torch.rand(WIDTH))


def test_inputs_that_are_measured_change_nothing_where_the_budget_is_refused(shelf):
    store, module, inputs = shelf(DrawnInPlace, vectors()), made(DrawnInPlace), vectors(8)
    weights = [*module.parameters()]
    state = torch.get_rng_state()
    with pytest.raises(BudgetError):
        offramp.stream(module, store, budget="8MiB", inputs=inputs)
    assert all(one is other for one, other in zip(module.parameters(), weights, strict=True))
    assert torch.equal(inputs, vectors(8)) and torch.equal(torch.get_rng_state(), state)

"""Feeds without look-ahead: the same answers, reads when they are due, and lists of layers that evict by their rule."""

from __future__ import annotations

import time

import pytest

from offramp.runtime.config import EngineConfig
from offramp.runtime.due import DueFeed, ListFeed
from offramp.runtime.planner import page_rounded
from tests.runtime.driver import Shelf, answers, encode, expected
from tests.toy import Toy, layer_shards, make_classifier

BIG = Toy(padding_bytes=3 << 20)
"""Layers whose shards are too large to stay in memory anyway."""
ROWS = ["abc", "defghijkl", "k"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return Shelf(tmp_path_factory.mktemp("stores"))


def opened(store, policy="none", **options):
    options = {"reads": "buffered", **options}
    config = EngineConfig(**options)
    return make_classifier(store, policy, config=config, reads=config.reads).open()


def passes(classifier, store, policy="none", count=3):
    """The shards that each of some passes read; their answers are right."""
    found, engine = [], classifier._engine
    for number in range(count):
        before = engine.feed.bytes_read
        outcomes = engine.sweep([encode(ROWS)], more=number % 2 == 0)
        assert answers(outcomes) == expected(store, ROWS, policy)
        found.append(engine.feed.bytes_read - before)
    return found


def layer_bytes(store):
    return sum(page_rounded(store.manifest.layouts[name].num_bytes) for name in layer_shards(store, 1))


@pytest.mark.parametrize("options", [{"residency": "fifo", "resident_layers": 1}, {"prefetch": False}])
def test_closing_stops_the_reader(shelf, options):
    with opened(shelf.open(BIG), **options) as classifier:
        feed = classifier.feed
        assert feed.is_open
    assert not feed.is_open


@pytest.mark.parametrize(
    ("rule", "num_layers", "loaded"),
    [
        ("fifo", 1, [4, 4]), ("fifo", 3, [4, 4]), ("fifo", 4, [0, 0]), ("fifo", 9, [0, 0]),
        ("lru", 3, [4, 4]), ("lru", 4, [0, 0]),
        ("mru", 1, [4, 4]), ("mru", 2, [3, 3]), ("mru", 3, [2, 2]), ("mru", 4, [0, 0]),
    ],
)  # fmt: skip
def test_a_list_loads_the_layers_that_its_rule_has_evicted(shelf, rule, num_layers, loaded):
    store = shelf.open(BIG)
    with opened(store, residency=rule, resident_layers=num_layers) as classifier:
        assert isinstance(classifier.feed, ListFeed)
        plan, size = classifier.plan, layer_bytes(store)
        assert (plan.num_slots, plan.slot_bytes) == (min(num_layers, 4), size)
        assert plan.residents == {"embedding", "head"}
        first, *others = passes(classifier, store)
        rows = min(others) % 1000  # look-ups of rows are read in each pass
        assert [round(num_bytes / size) for num_bytes in others] == loaded and rows < size
        assert round(first / size) == 4
        assert classifier.feed.resident_bytes() <= plan.num_slots * plan.slot_bytes + plan.resident_bytes


def test_lru_keeps_what_was_used_and_fifo_what_was_loaded_last(shelf):
    """Exits at layer 1 make layer 1 the most used one: in a list of two, only `lru` then keeps it."""
    store, left = shelf.open(BIG), {}
    for rule in ("fifo", "lru", "mru"):
        with opened(store, residency=rule, resident_layers=2) as classifier:
            feed = classifier.feed
            for layer in (1, 2, 1, 3):
                with feed._lock:
                    feed._place(layer)
            left[rule] = sorted(feed._places)
    assert left == {"fifo": [2, 3], "lru": [1, 3], "mru": [1, 3]}


@pytest.mark.parametrize("reads", ["buffered", "direct", "mapped"])
@pytest.mark.parametrize("policy", ["none", "patience:1"])
def test_without_prefetch_nothing_is_read_before_it_is_due(shelf, reads, policy):
    store = shelf.open(BIG)
    with opened(store, policy, reads=reads, prefetch=False, slots=3, resident_layers=2) as classifier:
        assert type(classifier.feed) is DueFeed and classifier.plan.num_slots == 3
        passes(classifier, store, policy)
        spans = classifier.trace.spans()
        reading = [span for span in spans if span.kind == "read" and span.thread == "reader"]
        computing = [span for span in spans if span.kind in ("compute", "head")]
        assert reading and not any(span.kind == "idle_read" for span in spans)
        for one in reading:
            later = [each for each in computing if each.end_seconds > one.start_seconds]
            assert all(each.start_seconds >= one.end_seconds for each in later), "nothing is computed during a read"


@pytest.mark.parametrize(("rule", "loaded"), [("fifo", 4), ("mru", 3), ("planned", 2)])
def test_layers_of_small_shards_are_loaded_as_others(shelf, rule, loaded):
    store = shelf.open(Toy())
    with opened(store, residency=rule, resident_layers=2) as classifier:
        _, *others = passes(classifier, store)
        layer = sum(store.manifest.shards[name].bytes for name in layer_shards(store, 1))
        assert [round(num_bytes / layer) for num_bytes in others] == [loaded] * 2


@pytest.mark.parametrize("toy", [BIG, Toy()], ids=["large", "small"])
@pytest.mark.parametrize("residency", ["planned", "prefix", "even"])
def test_layers_bound_the_weights_of_any_plan(shelf, residency, toy):
    """Also where shards are so small that they stay in memory where layers are not counted."""
    store, sizes = shelf.open(toy), []
    for number in (1, 2, 3, 4, 9):
        with opened(store, residency=residency, resident_layers=number) as classifier:
            plan, sizes_of = classifier.plan, store.manifest.layouts
            always = sum(page_rounded(sizes_of[name].num_bytes) for name in ("embedding", "head"))
            sizes.append(plan.num_slots * plan.slot_bytes + plan.resident_bytes)
            assert {"embedding", "head"} <= plan.residents
            assert sizes[-1] <= number * layer_bytes(store) + always
            passes(classifier, store, count=2)
    assert sizes == sorted(sizes) and sizes[0] < sizes[1] < sizes[-1] and plan.num_slots == 0


@pytest.mark.parametrize("toy", [Toy(shared=True), Toy(whole=True)])
def test_lists_of_other_programs(shelf, toy):
    """A shard that all layers share belongs to none; a step may need all shards of its layer."""
    store = shelf.open(toy)
    with opened(store, residency="fifo", resident_layers=1) as classifier:
        passes(classifier, store, "none")


@pytest.mark.parametrize("options", [{"residency": "mru", "resident_layers": 2}, {"prefetch": False, "slots": 2}])
def test_rows_leave_and_batches_share_a_sweep(shelf, options):
    store = shelf.open(BIG)
    with opened(store, "patience:1", **options) as classifier:
        passes(classifier, store, "patience:1")
        outcomes = classifier._engine.sweep([encode(ROWS), encode(ROWS[:2])])
        assert answers(outcomes) == expected(store, [*ROWS, *ROWS[:2]], "patience:1")


@pytest.mark.parametrize("rule", ["fifo", "lru", "mru"])
def test_a_read_that_is_stopped_leaves_the_list_right(shelf, rule):
    """What the reader brings after the end of a pass is not taken for another layer's."""
    store = shelf.open(BIG)
    with opened(store, residency=rule, resident_layers=2) as classifier:
        engine, feed, read = classifier._engine, classifier.feed, store.read_shard
        for stopped in layer_shards(store):

            def slow(name, view, stopped=stopped, **how):
                found = read(name, view, **how)
                if name == stopped:
                    time.sleep(0.02)
                return found

            store.read_shard = slow
            feed.begin_pass(engine.turns(1))
            for name in [turn.shard for turn in engine.turns(1)]:
                if feed.acquire(name, time.perf_counter() + (0.005 if name == stopped else 60)) is None:
                    break
                feed.release(name)
            feed.end_pass()
            store.read_shard = read
            assert answers(engine.sweep([encode(ROWS)])) == expected(store, ROWS, "none")


def test_a_list_has_no_slots_and_maps_nothing():
    for options in ({"slots": 2}, {"reads": "mapped"}):
        with pytest.raises(ValueError, match=r"a list of layers \(fifo\) has its own copies; give resident_layers"):
            EngineConfig(residency="fifo", **options)
    with pytest.raises(ValueError, match="resident_layers: a whole number"):
        EngineConfig(resident_layers=0)

"""What the plan reckons with besides weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from offramp.measure import Memory
from offramp.program.program import BATCH, TOKENS, Input, LookUp, Program, Stage, Step, Texts, Value
from offramp.runtime import memory_model
from offramp.runtime.inputs import InputReader
from offramp.runtime.memory_model import (
    HEADROOM_BYTES,
    HELD_BYTES,
    NUM_WARM_UPS,
    RUN_CODE_BYTES,
    SMALL_LENGTH,
    TOKEN_BYTES,
    MemoryModel,
    Workload,
)
from offramp.runtime.run_plan import plan_items
from tests.toy import HIDDEN, MAX_LENGTH, Toy, ToyBackend

ROW = 4 * HIDDEN
REST = (50 << 20) + RUN_CODE_BYTES
"""Predicted for a process of 50 MiB that waits."""
TEXTS = Texts(100, 512, 0, 0)


class Reader:
    """As much of an `InputReader` as a model looks at."""

    def __init__(self, program, copied_bytes=(), **row_bytes):
        self.program, self.row_bytes, self.copied_bytes = program, row_bytes, dict(copied_bytes)


class Measured(ToyBackend):
    """A backend whose trial shows what it takes, but for values that are freed at once."""

    is_measured = True

    def returned_bytes(self, num_rows, length):
        return 1000


class Keeping(ToyBackend):
    """A backend that keeps all buffers, perhaps for another one, too."""

    keeps_buffers = True

    def __init__(self, is_measured):
        super().__init__()
        self.is_measured = is_measured


class Gathering(Keeping):
    """A backend that keeps all buffers, and gathers rows into them."""

    keeps_rows = True


class Tried(Measured):
    """A backend that knows the most that its trial has taken."""

    def trial_bytes(self, num_rows, length):
        return 5000 if num_rows > 1 else 90


def model_of(program, backend=None, **facts):
    reader: Any = Reader(program, **facts)
    return MemoryModel(reader, backend or ToyBackend())


def program_of(texts, axes, reads=(), dtype="int64", largest=()):
    lookup = LookUp("table", "x", Value("float32", (*axes, HIDDEN)))
    steps = (Step("k", {"x": "x", "rows": "rows"}), Step("k", {name: name for name in reads}))
    stages = (Stage("inputs", "begin"), Stage("layer.0", "layer", steps))
    return Program({"x": Input(dtype, axes, largest)}, {"rows": lookup}, {}, stages, texts=texts)


def test_rows_that_are_read_after_the_first_step_are_held_until_then_and_others_are_not():
    """A batch begins with its first step: what that alone reads does not wait."""
    held = model_of(program_of(TEXTS, (BATCH, TOKENS), ["rows"]), rows=ROW)
    used = model_of(program_of(TEXTS, (BATCH, TOKENS)), rows=ROW)
    assert held.input_bytes(3, 5) == 15 * (TOKEN_BYTES + ROW)
    assert used.input_bytes(3, 5) == 15 * TOKEN_BYTES


def test_gathering_takes_the_rows_of_all_tables(shelf):
    """Word, position and type."""
    with shelf.open(Toy()) as store:
        model = MemoryModel(InputReader(store), ToyBackend())
        assert model.gathering_bytes(3, 5) == 15 * 3 * ROW
        assert model.input_bytes(3, 5) == 15 * TOKEN_BYTES


def test_gathering_takes_the_rows_of_one_table_as_they_are_in_its_file_before_they_are_upcast():
    row_bytes = {"words": 4 * ROW, "places": ROW}
    program = program_of(TEXTS, (BATCH, TOKENS))
    lookups = dict.fromkeys(row_bytes, program.lookups["rows"])
    halves = {name: size // 2 for name, size in row_bytes.items()}
    model = model_of(replace(program, lookups=lookups), copied_bytes=halves, **row_bytes)
    assert model.gathering_bytes(3, 5) == 15 * (5 * ROW + 2 * ROW)


@pytest.mark.parametrize(("largest", "size"), [((), 4), ((2, None), 4), ((2, 6), 6)])
def test_arrays_count_themselves_and_their_look_ups_at_the_largest_size(largest, size):
    model = model_of(program_of(None, (BATCH, 4), largest=largest), rows=ROW)
    assert model.gathering_bytes(3, 1) == model.input_bytes(3, 1) == 3 * (8 * size + size * ROW)


def test_arrays_count_bytes_by_their_dtype():
    program = Program({"x": Input("float16", (BATCH, 4, 2)), "y": Input("bool", (BATCH,))})
    assert model_of(program).gathering_bytes(3, 1) == 3 * (2 * 8 + 1)


@pytest.mark.parametrize(("backend", "num_held"), [(ToyBackend(), 3), (Keeping(True), 4)])
def test_a_sweep_holds_all_batches_that_wait_or_were_set_aside(backend, num_held):
    model = model_of(program_of(TEXTS, (BATCH, TOKENS)), backend, rows=ROW)
    held = backend.state_bytes(2, 5) + HELD_BYTES + model.input_bytes(2, 5)
    assert model.held_bytes(2, 5) == held
    alone = model.sweep_bytes(Workload(2, 5), 1000)
    assert alone == 1000 + backend.keeps_buffers * 2 * 5 * ROW + HEADROOM_BYTES
    more = model.sweep_bytes(Workload(2, 5, 4), 1000) - alone
    assert more == num_held * held
    assert [model.most_batches(2, 5, size) for size in (more, more - 1, held - 1, -1)] == [4, 3, 1, 1]


@pytest.mark.parametrize("activation_bytes", [0, 100_000])
@pytest.mark.parametrize(
    ("texts", "backend", "is_beside"), [(TEXTS, None, False), (TEXTS, Keeping(True), True), (None, None, True)]
)
def test_rows_are_gathered_before_they_are_computed(texts, backend, is_beside, activation_bytes):
    """Only kept buffers lie beside them; other inputs than texts stay while they are computed."""
    model = model_of(program_of(texts, (BATCH, TOKENS) if texts else (BATCH, 4)), backend, rows=ROW)
    gathered = model.gathering_bytes(2, 5)
    busy = activation_bytes + gathered if is_beside else max(activation_bytes, gathered)
    assert model.sweep_bytes(Workload(2, 5), activation_bytes) == busy + HEADROOM_BYTES


@pytest.mark.parametrize("copied_bytes", [{}, {"rows": ROW // 2}])
def test_rows_in_kept_buffers_take_no_more_but_for_the_copies_that_are_upcast(copied_bytes):
    program = program_of(TEXTS, (BATCH, TOKENS))
    model = model_of(program, Gathering(True), copied_bytes=copied_bytes, rows=ROW)
    beside = 10 * sum(copied_bytes.values())
    assert model.gathering_bytes(2, 5) == 10 * ROW + beside
    assert model.sweep_bytes(Workload(2, 5), 100_000) == 100_000 + beside + HEADROOM_BYTES


@pytest.fixture
def process(monkeypatch):
    """A process that takes so much now; a rehearsal may change it."""

    class Process:
        resident, mappable = 50 << 20, 0

        def __init__(self):
            self.ran, self.trimmed, self.narrowed, self.left = [], None, None, None

        def __enter__(self):
            return self

        def narrow(self):
            self.narrowed = len(self.ran)

        def __exit__(self, *_):
            self.left = len(self.ran)

        def warm_up(self, num_rows, length):
            self.ran.append((num_rows, length))

    process = Process()
    monkeypatch.setattr(memory_model, "read_memory", lambda: Memory(process.resident, process.resident, None, None))
    monkeypatch.setattr(memory_model, "refault_bytes", lambda: process.mappable)
    monkeypatch.setattr(memory_model, "trim_memory", lambda: setattr(process, "trimmed", len(process.ran)))
    monkeypatch.setattr(memory_model, "TouchedPages", lambda: process)
    return process


def test_a_footprint_is_measured_after_code_that_only_start_up_needed_is_gone(process):
    model = model_of(program_of(TEXTS, (BATCH, TOKENS)), rows=ROW)
    found = model.measure_footprint(process.warm_up, Workload(2, MAX_LENGTH), 1 << 40)
    assert process.ran == [(1, SMALL_LENGTH)] * 2 + [(2, MAX_LENGTH)] * NUM_WARM_UPS
    assert (process.trimmed, process.narrowed, process.left) == (0, 1, 2 + NUM_WARM_UPS)
    predicted = ToyBackend().activation_bytes(2, MAX_LENGTH)
    assert found == (REST, model.sweep_bytes(Workload(2, MAX_LENGTH), predicted))


def test_what_a_rehearsal_takes_counts_where_it_is_more_than_predicted(process):
    def warm_up(num_rows, length):
        process.warm_up(num_rows, length)
        process.resident = (50 << 20) + (7 << 20) * (num_rows > 1)

    model, workload = model_of(program_of(TEXTS, (BATCH, TOKENS)), rows=ROW), Workload(2, MAX_LENGTH)
    found = model.measure_footprint(warm_up, workload, 1 << 40, encoding_bytes=9)
    assert found == (REST, model.sweep_bytes(workload, 7 << 20) + 9)


@pytest.mark.parametrize(
    ("backend", "num_rows", "taken"),
    [
        (Measured(), 1, 96 + 1000),
        (Measured(), 2, 96 + 1000),
        (Tried(), 1, 96),  # what stays in memory is more than what is known
        (Tried(), 2, 5000),
        (Keeping(True), 1, 96),
        (Keeping(True), 2, "predicted"),  # rows that remain of a batch may be copied beside the kept buffers
        (Keeping(False), 1, "predicted"),
    ],
)
def test_what_a_rehearsal_takes_counts_alone_where_it_shows_all(process, backend, num_rows, taken):
    def warm_up(num_rows, length):
        process.warm_up(num_rows, length)
        process.resident = (50 << 20) + 96 * (length == MAX_LENGTH)

    model = model_of(program_of(TEXTS, (BATCH, TOKENS)), backend, rows=ROW)
    workload = Workload(num_rows, MAX_LENGTH)
    taken = backend.activation_bytes(num_rows, MAX_LENGTH) if taken == "predicted" else taken
    found = model.measure_footprint(warm_up, workload, 1 << 40)
    assert found == (REST, model.sweep_bytes(workload, taken))


def test_what_an_earlier_rehearsal_took_counts_in_later_plans(process):
    """A plan for several batches rehearses the shape again, when its code is in memory."""

    model, workload = model_of(program_of(TEXTS, (BATCH, TOKENS)), Measured(), rows=ROW), Workload(1, MAX_LENGTH)

    def activations(grown):
        def warm_up(num_rows, length):
            process.warm_up(num_rows, length)
            process.resident = (50 << 20) + grown * (length == MAX_LENGTH) * num_rows

        model.measure_footprint(warm_up, Workload(2, MAX_LENGTH), 1 << 40)  # another shape, which counts for itself
        return model.measure_footprint(warm_up, workload, 1 << 40).activation_bytes

    taken = [activations(grown) for grown in (5000, 96, 7000)]
    assert taken == [model.sweep_bytes(workload, grown + 1000) for grown in (5000, 5000, 7000)]


def test_a_workload_that_cannot_fit_is_not_rehearsed(process):
    model = model_of(program_of(TEXTS, (BATCH, TOKENS)), rows=ROW)
    model.measure_footprint(process.warm_up, Workload(2, MAX_LENGTH), 50 << 20)
    assert process.ran == [(1, SMALL_LENGTH)] * 2


def test_code_that_the_page_cache_did_not_hold_counts_as_if_it_had(process):
    """The footprint of a process with a cold page cache is that of one with a warm cache."""
    model, workload = model_of(program_of(TEXTS, (BATCH, TOKENS)), rows=ROW), Workload(2, MAX_LENGTH)
    warm = model.measure_footprint(process.warm_up, workload, 1 << 40)
    process.resident, process.mappable = (50 << 20) - (3 << 20), 3 << 20
    assert model.measure_footprint(process.warm_up, workload, 1 << 40) == warm


def test_costs_of_an_item_follow_its_weights_and_not_their_dtype(shelf, monkeypatch):
    with shelf.open(Toy(padding_bytes=3 << 20)) as store:
        shards, name = store.manifest.shards, "layer-00-up"
        (item,) = plan_items(store, [(name, 1)], Workload(2, 5), 1)
        weights = sum(int(np.prod(tensor.shape)) for tensor in shards[name].tensors)
        assert item.compute_seconds == pytest.approx(2 * weights * 10 / 60e9)
        assert (item.num_bytes, item.read_seconds) == (shards[name].bytes, pytest.approx(shards[name].bytes / 2e9))
        narrow = tuple(replace(tensor, dtype="I8") for tensor in shards[name].tensors)
        monkeypatch.setitem(shards, name, replace(shards[name], tensors=narrow))
        assert plan_items(store, [(name, 1)], Workload(2, 5), 1) == [item]

"""`Classifier` with the toy: results, budgets, threads, and what it refuses."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import sys
import threading
import weakref
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offramp.errors import BudgetError, NonFiniteError, StoreError, UsageError
from offramp.measure import Memory, read_memory
from offramp.runtime import exits as exits_module
from offramp.runtime import memory_model, run_plan
from offramp.runtime.guard import DeadlineGuard
from offramp.runtime.mapping import mapping_obstacle
from offramp.runtime.memory_model import Workload
from offramp.runtime.planner import SPREAD_BYTES
from offramp.runtime.slots import Slot
from offramp.runtime.sweep import Outcome
from offramp.session.bulk import _evenly, bulk_batches, with_most_rows
from offramp.session.classifier import Settings
from offramp.session.records import page_cache_bytes
from offramp.session.results import result_of
from tests.forked import in_child
from tests.leases import TOUCH, start
from tests.page_cache import held
from tests.runtime.driver import expected
from tests.selection import examples
from tests.toy import LABELS, MAX_LENGTH, Toy, ToyBackend, make_classifier, token_batch, write_toy

LARGE = Toy(padding_bytes=3 << 20)
"""Shards of half a MiB and more: large enough to be streamed."""
TEXTS = ["abc", "defghijkl", "", "kkkkkkkkkkkk", "lb", "abcdefghijkl"]
BASE_BYTES = 50 << 20


@pytest.fixture
def fixed_memory(monkeypatch):
    """A process of 50 MiB, whatever happens in it."""
    monkeypatch.setattr(memory_model, "resident_bytes", lambda: BASE_BYTES)
    monkeypatch.setattr(memory_model, "refault_bytes", int)
    monkeypatch.setattr(memory_model, "RUN_CODE_BYTES", 0)


def in_threads(count, act):
    """Daemons: one that waits for ever does not keep the process."""
    threads = [threading.Thread(target=act, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def rows_of(results):
    return [(result.label, result.score, result.exit_stage) for result in results]


def plainly(store, texts, policy):
    """What `rows_of` must be."""
    rows = []
    for exit_stage, data in expected(store, texts, policy):
        logits_C = np.frombuffer(data, np.float32).tolist()
        total = sum(math.exp(logit) for logit in logits_C)
        best = logits_C.index(max(logits_C))
        rows.append((LABELS[best], pytest.approx(math.exp(logits_C[best]) / total), exit_stage))
    return rows


@pytest.mark.parametrize("policy", ["none", "patience:1", "stage:2", "confidence:0.7"])
@pytest.mark.parametrize("num_rows", [1, 4])
def test_a_result_for_each_text_in_order(shelf, policy, num_rows):
    store = shelf.open(LARGE)
    with make_classifier(store, policy, num_rows=num_rows) as classifier:
        results = classifier.predict(TEXTS)
    assert rows_of(results) == plainly(store, TEXTS, policy)
    assert [result.stages_run for result in results] == [result.exit_stage for result in results]
    assert {result.labels for result in results} == {None}


def test_the_arrays_of_a_sweep_are_freed_before_the_next_one_is_encoded(shelf, monkeypatch):
    """Those of images are larger than what the plan has room for twice."""
    with make_classifier(shelf.open(Toy()), num_rows=2) as classifier:
        encode, before, alive = classifier.encoder.encode, [], []

        def watched(texts):
            alive.append(sum(batch() is not None for batch in before))
            batch = encode(texts)
            before.append(weakref.ref(batch))
            return batch

        monkeypatch.setattr(classifier.encoder, "encode", watched)
        classifier.predict(TEXTS)
    assert alive == [0, 0, 0]


def test_no_texts_no_results(shelf):
    with make_classifier(shelf.open(Toy())) as classifier:
        assert classifier.predict([]) == []
    assert classifier.record()["bytes_read_total"] == 0


def test_regression_has_a_value_and_no_label(shelf):
    store = shelf.open(Toy(problem="regression"))
    with make_classifier(store) as classifier:
        results = classifier.predict(TEXTS)
    values = [float(np.frombuffer(data, np.float32)[0]) for _, data in expected(store, TEXTS, "none")]
    assert [(result.label, result.score) for result in results] == [(None, value) for value in values]


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_all_scores_are_those_of_the_logits_in_the_order_of_the_labels(shelf, problem):
    store = shelf.open(Toy(problem=problem))
    with make_classifier(store) as classifier:
        plain, results = classifier.predict(TEXTS), classifier.predict(TEXTS, all_scores=True)
    assert {result.scores for result in plain} == {None}
    assert [replace(result, scores=None, bytes_read=0) for result in results] == [
        replace(result, bytes_read=0) for result in plain
    ]
    for result, (_, data) in zip(results, expected(store, TEXTS, "none"), strict=True):
        logits_C = np.frombuffer(data, np.float32).astype(float)
        if problem == "regression":
            assert result.scores is None
            continue
        exponents_C = np.exp(logits_C)
        scores_C = exponents_C / exponents_C.sum() if "single" in problem else 1 / (1 + 1 / exponents_C)
        assert list(result.scores) == list(LABELS)
        assert list(result.scores.values()) == pytest.approx(scores_C.tolist())
        assert result.scores[result.label] == result.score


def test_labels_that_are_not_distinct_lose_no_score():
    outcome = Outcome(np.array([1.0, 2.0, 0.0], np.float32), 1)
    result = result_of(outcome, "single_label_classification", ("film", "film", "1:film"), all_scores=True)
    assert list(result.scores) == ["0:film", "1:film", "2:1:film"]
    assert sum(result.scores.values()) == pytest.approx(1)


def test_multi_label_names_all_that_are_more_likely_than_not(shelf):
    toy = Toy(problem="multi_label_classification", exit_bias=((2, -3.0),))
    store = shelf.open(toy)
    with make_classifier(store, "stage:2") as classifier:
        results = classifier.predict(TEXTS)
    for result, (_, data) in zip(results, expected(store, TEXTS, "stage:2"), strict=True):
        logits = dict(zip(LABELS, np.frombuffer(data, np.float32).tolist(), strict=True))
        assert result.labels == tuple(label for label, logit in logits.items() if logit >= 0)
        assert logits[result.label] == max(logits.values())
        assert result.score == pytest.approx(1 / (1 + math.exp(-logits[result.label])))
    assert {len(result.labels) for result in results} == {2, 3}


@settings(
    deadline=None, max_examples=examples(25), database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), policy=st.sampled_from(["none", "patience:1"]), num_rows=st.integers(1, 3))
def test_no_budget_changes_an_answer_and_none_is_exceeded(shelf, fixed_memory, monkeypatch, data, policy, num_rows):
    store = shelf.open(LARGE)
    smallest = make_classifier(store, policy, num_rows=num_rows).plan.smallest_budget_bytes
    budget_bytes = data.draw(st.integers(smallest, smallest + (14 << 20)))
    alive = []

    def counted(num_bytes):
        alive.append(num_bytes)
        return Slot(num_bytes)

    for name in ("Slot", "aligned_slot", "huge_slot"):
        monkeypatch.setattr(run_plan, name, counted)
    with make_classifier(store, policy, budget_bytes, num_rows=num_rows) as classifier:
        assert rows_of(classifier.predict(TEXTS)) == plainly(store, TEXTS, policy)
    plan = classifier.plan
    assert plan.base_bytes + plan.activation_bytes + sum(alive) == plan.predicted_peak_bytes <= budget_bytes


def test_the_smallest_budget_that_is_named_works_and_a_mib_below_its_spread_does_not(shelf, fixed_memory):
    store = shelf.open(LARGE)
    with pytest.raises(BudgetError, match=r"budget of 52\.0 MiB is too small - process 50\.0 MiB") as refused:
        make_classifier(store, "none", 52 << 20).open()
    named = int(refused.value.remedy.split()[-1].removesuffix("MiB"))
    with make_classifier(store, "none", named << 20) as classifier:
        assert rows_of(classifier.predict(TEXTS)) == plainly(store, TEXTS, "none")
    assert classifier.plan.num_slots == 1
    with pytest.raises(BudgetError):
        make_classifier(store, "none", (named - 1 << 20) - SPREAD_BYTES).open()


@settings(deadline=None, max_examples=12, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_engines_that_are_open_together_stay_within_the_least_of_their_budgets(shelf, fixed_memory, data):
    """In every order of planning, opening, using and closing."""
    store = shelf.open(LARGE)
    smallest = make_classifier(store).plan.smallest_budget_bytes
    budgets = data.draw(st.lists(st.integers(smallest, smallest + (20 << 20)), min_size=2, max_size=3))
    planned = [make_classifier(store, "none", budget) for budget in budgets]
    with contextlib.ExitStack() as closing:  # an engine that a failure leaves open would change the next example
        opened = []
        for classifier in data.draw(st.permutations(planned)):
            if opened and data.draw(st.booleans()):
                opened[-1].predict(TEXTS)
            try:
                opened.append(closing.enter_context(classifier))
            except BudgetError as error:
                assert "other open engines" in str(error)
                if len(opened) > 1 and data.draw(st.booleans()):
                    opened.pop(0).close()
        plans = [classifier.plan for classifier in opened]
        weights = sum(plan.num_slots * plan.slot_bytes + plan.resident_bytes for plan in plans)
        most = max(plan.activation_bytes for plan in plans)
        assert BASE_BYTES + weights + most <= min(classifier.settings.budget_bytes for classifier in opened)
        for classifier in opened:
            assert rows_of(classifier.predict(TEXTS)) == plainly(store, TEXTS, "none")
    with make_classifier(store, "none", smallest) as classifier:
        assert classifier.plan.reserved_bytes == 0


def test_the_remedy_beside_an_open_engine_works(shelf, fixed_memory):
    store = shelf.open(LARGE)
    smallest = make_classifier(store).plan.smallest_budget_bytes
    with make_classifier(store, "none", smallest), pytest.raises(BudgetError, match="other open engines") as refused:
        make_classifier(store, "none", smallest + 1).open()
    assert refused.value.remedy == "close the other engine first"
    with make_classifier(store, "none", smallest + 1) as second:
        assert rows_of(second.predict(TEXTS)) == plainly(store, TEXTS, "none")


def test_a_forked_classifier_answers_in_both_processes(shelf, fixed_memory):
    """Also while another thread predicts, whose locks are held for ever in the child."""
    store = shelf.open(LARGE)
    budget_bytes = make_classifier(store).plan.smallest_budget_bytes + (3 << 20)
    wanted = plainly(store, TEXTS, "none")
    with make_classifier(store, "none", budget_bytes) as classifier:

        def check():
            assert rows_of(classifier.predict(TEXTS)) == wanted

        check()
        assert in_child(check) == 0
        may_end = threading.Event()
        other = threading.Thread(target=lambda: [classifier.predict(TEXTS) for _ in iter(may_end.is_set, True)])
        other.start()
        assert [in_child(check) for _ in range(10)] == [0] * 10
        may_end.set()
        other.join()
        check()


def test_a_classifier_of_parts_says_that_it_cannot_be_pickled(shelf):
    with pytest.raises(UsageError, match=r"cannot be pickled.*call offramp\.load in the other process"):
        pickle.dumps(make_classifier(shelf.open(Toy())))


def test_a_budget_from_the_start_of_the_process_counts_what_has_been(shelf, fixed_memory, monkeypatch):
    monkeypatch.setattr(run_plan, "read_memory", lambda: Memory(BASE_BYTES, 90 << 20, None, None))
    store = shelf.open(LARGE)
    assert make_classifier(store, "none", 80 << 20).plan.feasible
    plan = make_classifier(store, "none", 80 << 20, own_process=True).plan
    assert not plan.feasible and plan.smallest_budget_bytes == 90 << 20


def test_a_step_that_needs_three_shards_at_once_gets_three_slots(shelf, fixed_memory):
    store = shelf.open(Toy(padding_bytes=3 << 20, whole=True))
    plan = make_classifier(store).plan
    smallest = plan.smallest_budget_bytes
    with make_classifier(store, "none", smallest) as classifier:
        assert rows_of(classifier.predict(TEXTS)) == plainly(store, TEXTS, "none")
    assert not make_classifier(store, "none", smallest - 1).plan.feasible


def test_what_fits_becomes_resident_and_is_read_once(shelf):
    store = shelf.open(LARGE)
    with make_classifier(store) as classifier:
        first = classifier.predict(["abc"])[0].bytes_read
        assert classifier.predict(["abc"])[0].bytes_read < 1 << 16 < first
    assert classifier.plan.num_slots == 0


def test_many_threads_get_what_one_gets(shelf, fixed_memory):
    store = shelf.open(LARGE)
    budget_bytes = make_classifier(store).plan.smallest_budget_bytes + (3 << 20)
    wanted = plainly(store, TEXTS, "patience:1")
    together = []
    with make_classifier(store, "patience:1", budget_bytes, num_rows=2) as classifier:
        in_threads(8, lambda: [together.append(classifier.predict(TEXTS)) for _ in range(20)])
    assert all(rows_of(results) == wanted for results in together)
    record = classifier.record()
    paid = sum(result.bytes_read for results in together for result in results)
    assert record["bytes_read_total"] == paid + record["bytes_read_idle"]
    assert len(together) == 160 and record["num_inputs"] == len(TEXTS) * 160


def test_threads_that_open_at_once_open_one_ring(shelf):
    before = threading.active_count()
    classifier = make_classifier(shelf.open(Toy()))
    in_threads(8, classifier.open)
    assert threading.active_count() == before + 1
    classifier.close()
    assert threading.active_count() == before


def test_close_gives_back_memory_files_and_threads(shelf):
    store = shelf.open(Toy(padding_bytes=12 << 20))
    classifier = make_classifier(store)
    files, threads = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    classifier.open()
    before = read_memory().rss_bytes
    classifier.predict(["abc"])
    loaded = read_memory().rss_bytes
    classifier.close()
    assert loaded - before > 40 << 20
    assert read_memory().rss_bytes < loaded - (40 << 20)
    assert len(list(Path("/proc/self/fd").iterdir())) <= files
    assert threading.active_count() == threads
    assert classifier.record()["bytes_read_total"] > 40 << 20


@pytest.mark.parametrize("error", [BudgetError("no memory"), KeyboardInterrupt()], ids=repr)
def test_an_opening_that_fails_leaves_no_threads_and_can_be_tried_again(shelf, monkeypatch, error):
    with monkeypatch.context() as refused:
        refused.setattr("offramp.measure.memory.reset_peak", lambda: False)  # so that the peak is sampled, by a thread
        classifier = make_classifier(shelf.open(Toy()))
        before = threading.active_count()

        def fail(*_):
            raise error

        refused.setattr("offramp.session.classifier.allocate", fail)
        with pytest.raises(type(error)):
            classifier.open()
        assert threading.active_count() == before and classifier.backend.closed and not classifier.store._fds
    with classifier:
        assert len(classifier.predict(["abc"])) == 1
    assert threading.active_count() == before


def test_a_closed_classifier_refuses_and_can_be_opened_again(shelf):
    store = shelf.open(Toy())
    classifier = make_classifier(store)
    with pytest.raises(ValueError, match="not open"):
        classifier.predict(TEXTS)
    with classifier:
        classifier.predict(TEXTS)
    classifier.close()
    with pytest.raises(ValueError, match="not open"):
        classifier.predict(TEXTS)
    with classifier:
        assert rows_of(classifier.predict(TEXTS)) == plainly(store, TEXTS, "none")


def tokens(num_rows, length):
    ids_BS = np.ones((num_rows, length), np.int64)
    return token_batch(ids_BS, ids_BS)


@pytest.mark.parametrize(
    ("shape", "fits"), [((4, 3), True), ((1, 6), True), ((5, 3), False), ((4, 4), False), ((1, 12), False)]
)
def test_a_batch_that_takes_more_than_was_planned_is_refused(shelf, shape, fits):
    """12 tokens in one row take more than 12 in four: attention is quadratic."""
    with make_classifier(shelf.open(Toy()), num_rows=4, length=3) as classifier:
        if fits:
            assert len(classifier.predict_batches([tokens(*shape)])) == shape[0]
        else:
            with pytest.raises(
                UsageError, match=rf"batch of {shape[0]} x {shape[1]} tokens - the plan was made for 4 x 3"
            ):
                classifier.predict_batches([tokens(*shape)])


def test_the_longest_input_is_the_encoders_where_none_is_named(shelf):
    with make_classifier(shelf.open(Toy())) as classifier:
        classifier.predict_batches([tokens(1, MAX_LENGTH)])
        with pytest.raises(UsageError):
            classifier.predict_batches([tokens(2, MAX_LENGTH)])


def test_what_most_rows_come_to_is_kept(shelf):
    """With few slots residents are spread, so that reads hide; unless few rows come to the late layers."""
    store = shelf.open(Toy(num_layers=8, whole=True, padding_bytes=3 << 20))
    whole = make_classifier(store)
    sizes = sum(item.num_bytes for item in whole.items)
    budget_bytes = whole.plan.base_bytes + whole.plan.activation_bytes + sizes // 2
    stages = {item.shard: item.stage for item in whole.items}

    def mean_stage(**settings):
        plan = make_classifier(store, budget_bytes=budget_bytes, **settings).plan
        assert 0 < len(plan.residents) < len(stages)
        return sum(stages[name] for name in plan.residents) / len(plan.residents)

    reached = tuple(0.3**layer for layer in range(8))
    assert mean_stage(reached=reached) < mean_stage(reached=reached, num_rows=64) <= mean_stage()


def test_settings_without_rows_are_refused():
    with pytest.raises(ValueError, match="num_rows must be at least 1, not 0"):
        Settings(1, num_rows=0)
    with pytest.raises(ValueError, match="num_batches must be at least 1, not 0"):
        Settings(1, num_batches=0)


def test_exits_that_are_not_there_are_refused(shelf):
    with pytest.raises(UsageError, match="exit patience:1 needs exits and this store has none"):
        make_classifier(shelf.open(Toy(exits=False)), "patience:1")
    make_classifier(shelf.open(Toy(exits=False)), "none")
    make_classifier(shelf.open(Toy(exits=False)), "patience:inf")


def test_exits_that_were_not_trained_are_refused(shelf):
    with pytest.raises(StoreError, match="the exits were never trained"):
        make_classifier(shelf.open(Toy(trained=False)), "stage:1")
    make_classifier(shelf.open(Toy(trained=False)), "none")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null"])
def test_exits_that_are_not_described_are_refused(shelf, monkeypatch, content):
    store = shelf.open(Toy())
    read, described = store.read_file, store.manifest.exits.description
    monkeypatch.setattr(store, "read_file", lambda file: content if file == described else read(file))
    with pytest.raises(StoreError, match=r"^exits\.json: "):
        make_classifier(store, "stage:1")


@pytest.mark.parametrize(
    "arrays",
    [{}, {"exit.1.weight": np.zeros((2, 8), np.float32)}, {"exit.1.weight": np.zeros((3, 8))}],
)
def test_exits_of_another_shape_are_refused_by_name(shelf, monkeypatch, arrays):
    monkeypatch.setattr(exits_module, "load_tensors", lambda *_: arrays)
    with pytest.raises(StoreError, match=r"exit 1: exit.weight is .* not float32 \(3, 8\)"):
        make_classifier(shelf.open(Toy()), "stage:1")


def test_a_failure_is_not_the_end(shelf):
    store = shelf.open(Toy())
    with make_classifier(store, "patience:2") as classifier:
        for error in (KeyboardInterrupt(), MemoryError()):
            classifier.backend.fail["down"] = error
            with pytest.raises(type(error)):
                classifier.predict(TEXTS)
            assert rows_of(classifier.predict(TEXTS)) == plainly(store, TEXTS, "patience:2")


def test_numbers_that_are_none_come_out_as_an_error(shelf):
    classifier = make_classifier(shelf.open(Toy(broken="head")))
    with classifier, pytest.raises(NonFiniteError, match="head gave NaN"):
        classifier.predict(TEXTS)


def test_the_record_adds_up(shelf):
    """Whatever other processes do to the page cache."""
    store = shelf.open(LARGE)
    files = [store.path / shard.file for shard in store.manifest.shards.values()]
    with held(*files), make_classifier(store, "patience:1", num_rows=2, reads="buffered") as classifier:
        before = classifier.record()
        results = classifier.predict(TEXTS, more=False)
        record = classifier.record()
    of_groups = {"group_limit_bytes", "group_peak_bytes"}  # None outside of a container
    assert {key for key in before if before[key] is None} - of_groups == {
        "latency_seconds_median",
        "latency_seconds_p95",
        "latency_seconds_p99",
        "bound_seconds",
        "deadline_seconds",
        "config",  # these settings were made without one
        "threads_by",
        "reads_because",  # as was asked
    }
    assert record["num_inputs"] == len(TEXTS) and record["late"] == 0
    assert record["stages_run_total"] == sum(result.stages_run for result in results)
    assert record["page_cache_bytes"] == sum(path.stat().st_size for path in files)
    assert 0 < record["rss_anon_bytes"] + record["rss_file_bytes"] <= record["peak_rss_bytes"]
    assert record["bytes_read_total"] == sum(result.bytes_read for result in results) + record["bytes_read_idle"]
    assert record["seconds_total"] >= 3 * min(classifier.latencies) > 0
    assert len(classifier.latencies) == len(classifier.costs) == 3
    plan, described = classifier.plan, {key: record[key] for key in ("model", "backend", "exit", "reads", "batch")}
    assert described == {"model": "Toy", "backend": "toy", "exit": "patience:1", "reads": "buffered", "batch": 2}
    assert (record["predicted_peak_bytes"], record["budget_bytes"]) == (plan.predicted_peak_bytes, plan.budget_bytes)


@pytest.mark.parametrize("reads", ["auto", "mapped"])
def test_the_record_says_how_shards_are_read_and_why_no_longer_mapped(tmp_path, fixed_memory, reads):
    with write_toy(tmp_path / "store", LARGE) as store:
        if mapping_obstacle(store, ["layer-00-up"]):
            pytest.skip("no file can be mapped here")
        budget_bytes = make_classifier(store).plan.smallest_budget_bytes
        with make_classifier(store, "none", budget_bytes, reads=reads) as classifier:
            assert classifier.plan.num_slots and classifier.describe_plan()["reads"] == "mapped"
            before = classifier.predict(TEXTS)
            assert [classifier.record()[key] for key in ("reads", "reads_because")] == ["mapped", None]
            assert start(TOUCH, store.path / "layer-00-up.safetensors").wait(20) == 0
            with (store.path / "layer-01-up.safetensors").open("r+b"):
                assert rows_of(classifier.predict(TEXTS)) == rows_of(before)
            record = classifier.record()
        assert record["reads"] == "buffered" and "open" in record["reads_because"]


def test_weights_that_stay_are_not_mapped(shelf):
    plan = make_classifier(shelf.open(LARGE), reads="mapped").describe_plan()
    assert (plan["num_slots"], plan["reads"], plan["reads_because"]) == (0, "buffered", "all weights stay in memory")


@pytest.mark.parametrize(("deadline", "late"), [(0.05, 4), (0.5, 2), (5.0, 0)])
def test_rows_of_requests_that_end_after_the_deadline_are_late(shelf, clock, deadline, late):
    """Two rows a request; the first takes a second, the next 0.1 s, the last nothing to speak of."""
    classifier, pauses = make_classifier(shelf.open(Toy()), num_rows=2), [1.0, 0.1, 0.0]
    classifier.guard = DeadlineGuard(deadline)  # of the record alone: the gate has none
    encode = classifier.encoder.encode

    def slow(inputs):
        clock.sleep(pauses.pop(0))
        return encode(inputs)

    with classifier:
        classifier.encoder.encode = slow
        classifier.predict(TEXTS)
    assert classifier.record()["late"] == late


def test_the_page_cache_is_unknown_if_that_of_any_shard_is(shelf, monkeypatch):
    store, unknown = shelf.open(Toy()), "head.safetensors"
    assert unknown in {shard.file for shard in store.manifest.shards.values()}
    unknown = (store.path / unknown).stat().st_ino
    monkeypatch.setattr("offramp.measure.cached_bytes", lambda fd: None if os.fstat(fd).st_ino == unknown else 1)
    assert page_cache_bytes(store) is None


def test_the_plan_speaks_of_every_shard_once(shelf, fixed_memory):
    store = shelf.open(LARGE)
    classifier = make_classifier(store, "none", make_classifier(store).plan.smallest_budget_bytes + (2 << 20))
    tree = classifier.describe_plan()
    shards = [shard for stage in tree["stages"] for shard in stage["shards"]]
    assert [shard["shard"] for shard in shards] == [name for name in store.manifest.shards if name != "rows"]
    assert sum(-(-shard["bytes"] // 4096) * 4096 for shard in shards if shard["resident"]) == tree["resident_bytes"]
    assert tree["feasible"] and tree["num_slots"] >= 1
    assert tree["predicted_peak_bytes"] <= tree["budget_bytes"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("room", ["one slot", "some residents", "everything"])
def test_the_process_stays_below_the_prediction_and_the_budget(shelf, run_python, room):
    """64 MiB of shards in a process of its own."""
    store = shelf.open(Toy(12, padding_bytes=(64 << 20) // 12))
    extra = {"one slot": 0, "some residents": 20 << 20, "everything": 1 << 30}[room]
    printed = run_python(
        f"""
        from offramp.store import Store
        from offramp.measure import reset_peak
        from tests.toy import make_classifier
        store = Store({str(store.path)!r})
        smallest = make_classifier(store).plan.smallest_budget_bytes
        classifier = make_classifier(store, "none", smallest + (1 << 20) + {extra})
        reset_peak()
        with classifier:
            for text in ["abc", "defghijkl", "kkkk"] * 3:
                classifier.predict([text])
            record = classifier.record()
        keys = ("peak_rss_bytes", "predicted_peak_bytes", "budget_bytes", "resident_bytes")
        print(*(record[key] for key in keys))
        """
    )
    peak, predicted, budget, resident = map(int, printed.split())
    assert peak <= predicted <= budget
    assert resident >= {"one slot": 0, "some residents": 14 << 20, "everything": 63 << 20}[room]


@pytest.mark.parametrize("policy", ["none", "patience:1"])
def test_bulk_gives_the_same_results_in_order(shelf, policy):
    store = shelf.open(Toy())
    texts = [*TEXTS, *reversed(TEXTS), "a" * 7]
    with make_classifier(store, policy, num_rows=3, is_bulk=True) as classifier:
        results = classifier.predict(texts)
        assert classifier.predict([]) == []
    assert rows_of(results) == plainly(store, texts, policy)
    assert classifier.record()["is_bulk"]


def test_bulk_batches_are_alike_in_length_and_within_the_plan():
    backend = ToyBackend()
    planned = backend.activation_bytes(3, MAX_LENGTH)
    lengths = [1, 12, 3, 1, 12, 5, 7, 1, 2, 12, 12, *[6] * 9, *[1] * 50]
    batches = list(bulk_batches(lengths, Workload(3, MAX_LENGTH), backend))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert backend.activation_bytes(len(batch), longest) <= planned
        assert len(batch) * longest <= 3 * MAX_LENGTH, "no array grows beyond those of the plan"
    ends = [(lengths[batch[0]], lengths[batch[-1]]) for batch in batches]
    assert all(before[1] >= after[0] for before, after in pairwise(ends))
    assert len(batches[0]) == 3, "rows of the longest length"
    assert len(batches[-1]) > 3, "short rows are more"


def test_bulk_takes_the_most_rows_that_fit(shelf):
    store = shelf.open(Toy(padding_bytes=1 << 20))
    tried = []

    def plan_for(budget, num_rows, num_batches):
        tried.append((num_rows, num_batches))
        return make_classifier(store, num_rows=num_rows, num_batches=num_batches, budget_bytes=budget)

    for budget, sizes in ((1 << 40, [(1, 1), (32, 1)]), (1, [(1, 1)])):
        tried.clear()
        classifier = with_most_rows(partial(plan_for, budget))
        assert tried == sizes, "what cannot fit is not tried, and of what lies in memory one batch is a sweep"
        assert (classifier.settings.num_rows, classifier.settings.num_batches) == sizes[-1]
        classifier.close()


@pytest.mark.parametrize(("num_inputs", "rows"), [(0, 1), (1, 1), (5, 5), (32, 32), (40, 20)])
def test_bulk_plans_for_no_more_rows_than_there_are_inputs(shelf, num_inputs, rows):
    store = shelf.open(Toy(padding_bytes=1 << 20))

    def plan_for(num_rows, num_batches):
        return make_classifier(store, num_rows=num_rows, num_batches=num_batches, num_inputs=num_inputs)

    classifier = with_most_rows(plan_for)
    assert (classifier.settings.num_rows, classifier.settings.num_batches) == (rows, 1)
    classifier.close()


@given(st.integers(1, 2000), st.integers(1, 32), st.integers(1, 20))
def test_the_rows_of_a_sweep_are_as_few_as_take_all_inputs_in_no_more_sweeps(num_inputs, num_rows, num_batches):
    rows, batches = _evenly(num_inputs, num_rows, num_batches)
    assert 1 <= rows <= num_rows and 1 <= batches <= num_batches
    sweeps = -(-num_inputs // (num_rows * num_batches))
    assert sweeps * rows * batches >= num_inputs > sweeps * (rows - 1) * batches
    assert sweeps * rows * (batches - 1) < num_inputs


def test_bulk_sweeps_hold_as_many_batches_as_the_budget_has_room_for(shelf, fixed_memory, monkeypatch):
    """Rows that take 64 KiB between two steps, and 256 within one: the plan holds what is chosen."""
    store = shelf.open(LARGE)
    monkeypatch.setattr(ToyBackend, "state_bytes", lambda self, num_rows, length: num_rows << 16)
    monkeypatch.setattr(ToyBackend, "activation_bytes", lambda self, num_rows, length: num_rows << 18)

    def plan_for(num_rows, num_batches, num_inputs=None):
        how = {"budget_bytes": budget, "is_bulk": True, "num_inputs": num_inputs}
        return make_classifier(store, num_rows=num_rows, num_batches=num_batches, **how)

    found = []
    for megabytes in (11, 12, 14):
        budget = BASE_BYTES + (megabytes << 20)
        classifier = with_most_rows(plan_for)
        settings = classifier.settings
        found.append(settings.num_rows * settings.num_batches)
        assert classifier.plan.feasible and classifier.plan.predicted_peak_bytes <= budget
        alone = with_most_rows(plan_for, has_deadline=True)
        assert alone.settings.num_batches == 1
        assert settings.num_batches > 1
        assert classifier.plan.num_slots >= 2
        classifier.close()
        few = with_most_rows(partial(plan_for, num_inputs=settings.num_rows + 1))
        assert few.settings.num_batches <= 2
        few.close()
    assert found == sorted(found) and found[-1] > found[0] > 1


@pytest.mark.parametrize("policy", ["none", "patience:1"])
def test_sweeps_of_several_batches_give_the_same_results_in_order(shelf, policy):
    store = shelf.open(Toy())
    texts = [*TEXTS, *reversed(TEXTS), "a" * 7]
    with make_classifier(store, policy, num_rows=2, num_batches=3, is_bulk=True) as classifier:
        results = classifier.predict(texts)
        with pytest.raises(UsageError, match="4 batches - the plan was made for 3"):
            classifier.predict_batches([classifier.encoder.encode(["a"])] * 4)
    assert rows_of(results) == plainly(store, texts, policy)
    assert len(classifier.latencies) < len(texts) / 2
    assert classifier.record()["batch"] == 6

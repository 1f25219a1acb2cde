"""Containers: what a limit of memory leaves to the process, refusals before anything is loaded, lowered limits.

The limits are simulated, with the toy. `tests/cli/test_groups.py` has real ones.
"""

from __future__ import annotations

import re

import pytest

from offramp.errors import BudgetError
from offramp.measure import Memory
from offramp.runtime import ledger, memory_model, run_plan
from offramp.runtime.config import EngineConfig
from offramp.runtime.ledger import CONTAINER, Limit, container_limit, group_bytes
from offramp.session import containers
from offramp.session.containers import STARTS, THRASHING_FAULTS, require_start
from tests.toy import Toy, make_classifier

MIB = 1 << 20
LARGE = Toy(padding_bytes=3 << 20)
TEXTS = ["abc", "defghijkl", "", "kkkkkkkkkkkk"]
BASE_BYTES = 50 * MIB


def rows_of(results):
    return [(result.label, result.score, result.exit_stage) for result in results]


def plainly(store):
    with make_classifier(store) as classifier:
        return rows_of(classifier.predict(TEXTS))


@pytest.fixture
def container(monkeypatch):
    """A process of 50 MiB in a container, whose limit the call sets."""
    monkeypatch.setattr(memory_model, "resident_bytes", lambda: BASE_BYTES)
    monkeypatch.setattr(memory_model, "refault_bytes", int)
    monkeypatch.setattr(memory_model, "RUN_CODE_BYTES", 0)
    for module in (ledger, run_plan, containers, memory_model):
        monkeypatch.setattr(module, "read_memory", lambda: Memory(BASE_BYTES, BASE_BYTES, 20 * MIB, 0))

    def limit(num_bytes):
        monkeypatch.setattr(ledger, "container_bytes", lambda: num_bytes)
        return container_limit()

    limit(None)
    monkeypatch.setattr(containers, "FOLLOW_SECONDS", 0.0)
    return limit


def in_container(store, limit):
    facts = {"limited_by": limit.source, "margin_bytes": limit.margin_bytes}
    return make_classifier(store, "none", limit.num_bytes, **facts)


def test_a_refusal_names_the_container_and_a_limit_that_is_accepted(shelf, container):
    store = shelf.open(LARGE)
    answers = plainly(store)
    with pytest.raises(BudgetError, match=r"container of 54\.0 MiB is too small .* \+ kernel 2\.21 MiB - ") as refused:
        in_container(store, container(54 * MIB)).open()
    named = int(re.search(r"container to (\d+)MiB", refused.value.remedy)[1])
    with in_container(store, container(named * MIB)) as classifier:
        assert rows_of(classifier.predict(TEXTS)) == answers


def test_a_lowered_limit_leaves_fewer_weights_in_memory_and_the_same_answers(shelf, container):
    store = shelf.open(LARGE)
    with in_container(store, container(100 * MIB)) as classifier:
        first = rows_of(classifier.predict(TEXTS))
        before = classifier.plan
        container(group_bytes(before.predicted_peak_bytes))
        classifier.predict(TEXTS)
        assert classifier.plan is before  # it still fits
        lowered = container(group_bytes(before.smallest_budget_bytes))
        with pytest.warns(UserWarning, match="the container was lowered to"):
            assert rows_of(classifier.predict(TEXTS)) == first
        plan, record = classifier.plan, classifier.record()
        assert plan.predicted_peak_bytes <= lowered.num_bytes < before.predicted_peak_bytes
        assert (record["limited_by"], record["budget_bytes"]) == (CONTAINER, lowered.num_bytes)
        assert record["num_inputs"] == 3 * len(TEXTS)
        assert record["bytes_read_total"] >= classifier.plan.slot_bytes
        container(10 * MIB)
        with pytest.raises(BudgetError, match=r"container of 10\.0 MiB is too small"):
            classifier.predict(TEXTS)
        assert not classifier.feed.is_open, "nothing of the plan that does not fit stays in memory"
        with pytest.raises(ValueError, match="not open"):
            classifier.predict(TEXTS)


def test_a_container_that_evicts_code_leaves_fewer_weights_in_memory(shelf, container, monkeypatch):
    """As often as code is evicted, and until no smaller plan is left."""
    store, faults = shelf.open(LARGE), [0]
    monkeypatch.setattr(containers, "major_faults", lambda: faults[0])
    with in_container(store, container(100 * MIB)) as classifier:
        answers, plans = rows_of(classifier.predict(TEXTS)), [classifier.plan]
        faults[0] += THRASHING_FAULTS
        assert rows_of(classifier.predict(TEXTS)) == answers
        assert classifier.plan is plans[0], "as many as of a cold start"
        while plans[-1].predicted_peak_bytes > plans[-1].smallest_budget_bytes:
            faults[0] += THRASHING_FAULTS + 1
            with pytest.warns(UserWarning, match=r"the container evicts code of this process: \d slots and .* stay in"):
                assert rows_of(classifier.predict(TEXTS)) == answers
            plans.append(classifier.plan)
            assert plans[-1].predicted_peak_bytes < plans[-2].predicted_peak_bytes
            classifier.predict(TEXTS)
            assert classifier.plan is plans[-1], "once it has ended"
        assert len(plans) > 1
        faults[0] += THRASHING_FAULTS + 1
        assert rows_of(classifier.predict(TEXTS)) == answers, "slow, and not refused"
        assert classifier.plan is plans[-1]


@pytest.mark.parametrize("backend", STARTS)
def test_a_container_that_cannot_hold_the_start_is_refused_before_the_backend_is_loaded(shelf, container, backend):
    store, config = shelf.open(LARGE), EngineConfig(backend=backend)
    last_exit = len(store.program.layers)
    with pytest.raises(BudgetError, match=r"process at most .* raise the memory limit of the container to") as refused:
        require_start(store, config, container(24 * MIB), last_exit)
    named = int(re.search(r"container to (\d+)MiB", refused.value.remedy)[1])
    require_start(store, config, container(named * MIB), last_exit)
    require_start(store, config, Limit(24 * MIB), last_exit)  # a budget is measured


def test_near_the_limit_of_a_container_nothing_is_run_to_be_measured(shelf, container):
    store = shelf.open(LARGE)
    classifier = in_container(store, container(30 * MIB))
    assert not classifier.plan.feasible
    assert classifier.plan.base_bytes >= 20 * MIB + memory_model.MOST_CODE_BYTES

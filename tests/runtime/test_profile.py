"""Device profiles: what they are made of, and that they hold for one machine, store and plan."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from offramp.errors import RefusedError, StoreError, UsageError
from offramp.profiling import profiler as profiler_module
from offramp.profiling.profiler import Profiler, Scheduled, _like_inputs, measure_profile, profile_lengths
from offramp.runtime.profile import (
    DeviceProfile,
    cached_profile,
    fingerprint_of,
    load_profile,
    require_here,
    save_profile,
)
from offramp.session import Classifier, Settings
from offramp.store.policy_file import MeasuredOn
from offramp.tasks.arrays import ArrayInputs
from offramp.tasks.pixels import ImageEncoder, ImageInputs
from tests.toy import LAYER_KINDS, MAX_LENGTH, Toy, ToyBackend, ToyTextEncoder

NUM_EXITS = 4


def open_scheduled(store, num_rows=1):
    return Classifier(store, ToyBackend(), ToyTextEncoder(), Scheduled(), Settings(1 << 40, num_rows))


@pytest.fixture(scope="module")
def measured(shelf):
    with open_scheduled(shelf.open(Toy())) as classifier:
        return measure_profile(classifier, MAX_LENGTH, lambda line: None)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_batch_of_a_profile_has_as_many_rows_as_asked_for(shelf, num_rows):
    with open_scheduled(shelf.open(Toy())) as classifier:
        assert len(_like_inputs(classifier, num_rows, 4, 0).lengths_B) == num_rows
    store = SimpleNamespace(program=SimpleNamespace(texts=None))
    for encoder in (ImageInputs(ImageEncoder(), "x"), ArrayInputs({"x": ("float32", (2,))})):
        batch = _like_inputs(SimpleNamespace(store=store, encoder=encoder), num_rows, 1, 0)
        assert batch.num_rows == len(batch.arrays["x"]) == num_rows


def test_every_exit_of_every_length_is_timed(measured):
    assert measured.lengths == (4, 8, 12)
    assert measured.num_exits == NUM_EXITS
    for name in ("seconds", "seconds_p99", "step_seconds_p99", "compute_seconds"):
        table = getattr(measured, name)
        assert [len(row) for row in table] == [NUM_EXITS] * 3
        assert all(seconds > 0 for row in table for seconds in row), name
    assert [len(row) for row in measured.head_seconds] == [NUM_EXITS - 1] * 3
    assert measured.num_rounds == profiler_module.NUM_ROUNDS
    assert len(measured.bytes_read) == len(measured.read_seconds) == NUM_EXITS


def test_tails_are_not_below_means(measured):
    for middle, tail in zip(measured.seconds, measured.seconds_p99, strict=True):
        assert all(low <= high for low, high in zip(middle, tail, strict=True))


def test_seconds_add_up_to_what_all_passes_took(shelf, monkeypatch):
    monkeypatch.setattr(profiler_module, "_SLOWEST", 1e9)  # a toy's passes are so short that any noise is far out
    monkeypatch.setattr(Profiler, "_after_seconds", lambda self, before: 0.0)
    with open_scheduled(shelf.open(Toy())) as classifier:
        profiler = Profiler(classifier, MAX_LENGTH)
        for _ in range(5):
            profiler.run_round()
        profile, lengths = profiler.profile(), len(profiler.lengths)
    warm_up, passes, compared = lengths, (1 + 6) * lengths * NUM_EXITS, 2 * 3 * lengths
    starts = range(warm_up, len(classifier.latencies), warm_up + passes + compared)
    round_seconds = [sum(classifier.latencies[start : start + passes]) for start in starts]
    assert profile.num_rounds == len(round_seconds) == 5
    assert (1 + 6) * 5 * sum(map(sum, profile.seconds)) == pytest.approx(sum(round_seconds)), "means, not medians"


def test_one_pass_that_hangs_does_not_make_a_mean_its_own(shelf):
    with open_scheduled(shelf.open(Toy())) as classifier:
        profiler = Profiler(classifier, MAX_LENGTH)
        profiler.run_round()
    cells = [(length, stage) for length in profiler.lengths for stage in profiler.exits]
    samples = {cell: [1.0, 1.0, 1.0, 1.0, 1.0] for cell in cells}
    samples[cells[0]] = [1.0, 1.0, 1.0, 1.0, 100.0]
    samples[cells[1]] = [1.0, 1.0, 1.0, 1.0, 2.5]
    means = profiler._means(samples)
    for row in means:
        assert row == pytest.approx(((15 + 2) / 15, (15 + 1.5) / 15, 1.0, 1.0)), (
            "as if it had taken three times as long"
        )


def test_heads_cost_what_passes_without_them_take_less(shelf):
    with open_scheduled(shelf.open(Toy())) as classifier:
        profiler = Profiler(classifier, MAX_LENGTH)
    for compared, drawn_out in (
        ([(0.15, 0.1)] * 20, 1.5),
        ([(0.9, 0.1)] * 20, 3.0),
        ([(-0.1, 0.1)] * 20, 0.0),
        ([(3.0, 0.1), (-2.7, 0.1)] * 10, 1.0),  # noise
        ([(0.0, 0.0)] * 20, 1.0),  # no heads
    ):
        profiler._compared = compared
        assert profiler._head_overhead_factor() == pytest.approx(drawn_out), compared[0]


@pytest.mark.parametrize("after", ["short", "long"])
def test_a_pass_after_short_ones_may_be_faster(shelf, clock, after):
    """A backend that begins the slower the more layers ran in the pass before, as caches make it; or the faster, which
    no cache does.
    """
    with open_scheduled(shelf.open(Toy())) as classifier:
        begin, step, ran = classifier.backend.begin, classifier.backend.run, {"before": 0, "now": 0}

        def slow_begin(*arguments):
            ran.update(before=ran["now"], now=0)
            clock.sleep(0.0005 * (ran["before"] if after == "short" else max(16 - ran["before"], 0)))
            return begin(*arguments)

        def slow_step(state, step_of, weights):
            if step_of.kernel in LAYER_KINDS:
                ran["now"] += 1
                clock.sleep(0.001)
            return step(state, step_of, weights)

        classifier.backend.begin, classifier.backend.run = slow_begin, slow_step
        profiler = Profiler(classifier, 4)
        for _ in range(10):
            profiler.run_round()
        profile = profiler.profile()
    assert (profile.after_seconds > 0.0002) == (after == "short")
    assert profile.seconds[0][0] < profile.among_seconds < profile.seconds[0][-1]


@pytest.mark.parametrize("num_rounds", [1, 6])
@pytest.mark.parametrize("drift", ["rising", "falling", "waves"])
def test_drift_of_the_machine_is_no_cache(shelf, drift, num_rounds):
    """Passes that take longer, or less, with time, whatever came before."""
    with open_scheduled(shelf.open(Toy())) as classifier:
        profiler = Profiler(classifier, MAX_LENGTH)
        for _ in range(num_rounds):
            profiler.run_round()

    def ran(seconds_of):
        log = [each._replace(seconds=seconds_of(each.place / len(profiler._log), each)) for each in profiler._log]
        profiler._passes, profiler._log = [log[each.place] for each in profiler._passes], log
        profiler._singles = profiler._passes
        return profiler.profile()

    speeds = {"rising": lambda t: 1 + t, "falling": lambda t: 2 - t, "waves": lambda t: 1.5 + 0.5 * np.sin(30 * t)}
    profile = ran(lambda t, each: 0.001 * each.kind[0] * each.kind[1] * speeds[drift](t))
    assert profile.after_seconds < 0.05 * profile.among_seconds
    if num_rounds == 1:
        return
    before = profiler._before()
    told = 0.002
    profile = ran(lambda t, each: each.seconds + told * speeds[drift](t) * (before[each.place] - before[0]))
    assert profile.after_seconds == pytest.approx(1.5 * told, rel=0.4), "and what is no drift is found beside it"


def test_heads_that_never_run_are_left_out():
    row, heads = (1.0, 2.0, 3.0, 4.0), (0.1, 0.1, 0.1)
    profile = DeviceProfile(
        MeasuredOn(),
        (8,),
        (row,),
        (row,),
        (row,),
        (heads,),
        0.0,
        (row,),
        row,
        row,
        row,
        (row,),
        (heads,),
        (0.0,),
        0.0,
        1.0,
        3,
    )
    assert profile.costs().seconds == (row,)
    assert profile.costs(3).seconds[0] == pytest.approx((1.0, 1.9, 2.8, 3.8))
    assert profile.costs(4).seconds[0] == pytest.approx((1.0, 1.9, 2.8, 3.7))


def test_noise_does_not_turn_the_order_of_exits_round():
    row = (2.0, 1.0, 3.0)
    profile = DeviceProfile(
        MeasuredOn(),
        (8,),
        (row,),
        (row,),
        (row,),
        ((0.0, 0.0),),
        0.0,
        (row,),
        row,
        row,
        row,
        (row,),
        ((0.0, 0.0),),
        (0.0,),
        0.0,
        1.0,
        3,
    )
    seconds = profile.costs().seconds[0]
    assert seconds[0] == 2.0 < seconds[1] < seconds[2] == 3.0


def test_rows_of_a_pass_share_its_seconds():
    row, heads = (1.0, 2.0, 3.0, 4.0), (0.1, 0.1, 0.1)
    tables = ((8,), (row,), (row,), (row,), (heads,), 0.0, (row,), row, row, row, (row,), (heads,), (0.0,), 0.0, 1.0, 3)
    single, several = DeviceProfile(MeasuredOn(), *tables), DeviceProfile(MeasuredOn(batch=4), *tables)
    assert (single.batch, several.batch) == (1, 4)
    for first in (1, 3):
        shares = [seconds / 4 for seconds in single.costs(first).seconds[0]]
        assert several.costs(first).seconds[0] == pytest.approx(shares)
    assert several.step_p99(2, 8) == single.step_p99(2, 8) == 2.0, "a request waits for the whole pass"


def test_passes_have_as_many_rows_as_the_classifier_runs_together(shelf, measured):
    rows, store = [], shelf.open(Toy())
    with open_scheduled(store, 3) as classifier:
        step = classifier.backend.run
        classifier.backend.run = lambda state, *rest: rows.append(state.num_rows) or step(state, *rest)
        profile = measure_profile(classifier, MAX_LENGTH, lambda line: None, max_seconds=1e-6)
    assert set(rows) == {1, 2, 3}, "all together, alone, and leaving one after another"
    assert (profile.batch, measured.batch) == (3, 1)
    assert all(single > 0 for row in profile.single_seconds for single in row)
    assert all(seconds > 0 for seconds in profile.gather_seconds)
    assert measured.single_seconds == measured.seconds
    assert measured.gather_seconds == (0.0, 0.0, 0.0)
    assert profile.fingerprint == dataclasses.replace(measured.fingerprint, batch=3)
    assert all(0 < several < one for several, one in zip(profile.bytes_read, measured.bytes_read, strict=True))


def test_a_profile_of_another_batch_size_is_refused(measured):
    several = dataclasses.replace(measured.fingerprint, batch=8)
    with pytest.raises(RefusedError, match=r"measured under other conditions \(batch 1 there, 8 here\)"):
        require_here(measured, several, "here")
    unsaid = dataclasses.replace(measured.fingerprint, batch=None)
    first = dataclasses.replace(measured, fingerprint=unsaid)
    require_here(first, measured.fingerprint, "here")
    with pytest.raises(RefusedError, match="batch 1 there, 8 here"):
        require_here(first, several, "here")


def test_lengths_double_up_to_the_longest():
    assert profile_lengths(128) == (4, 8, 16, 32, 64, 128)
    assert profile_lengths(100) == (4, 8, 16, 32, 64, 100)
    assert profile_lengths(5) == (4, 5)


def test_a_slow_machine_is_measured_in_fewer_rounds(shelf):
    with open_scheduled(shelf.open(Toy())) as classifier:
        profile = measure_profile(classifier, 8, lambda line: None, max_seconds=1e-6)
    assert profile.num_rounds == 1


def test_profiles_read_back(measured, tmp_path):
    save_profile(measured, tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == measured


def test_the_cache_remembers_what_is_the_same(measured, shelf):
    assert cached_profile(measured.fingerprint, 8) is None
    save_profile(measured)
    assert cached_profile(measured.fingerprint, 8) == measured
    assert cached_profile(measured.fingerprint, 13) is None, "longer than what was measured"
    assert cached_profile(dataclasses.replace(measured.fingerprint, threads=7), 8) is None
    with open_scheduled(shelf.open(Toy())) as classifier:
        assert fingerprint_of(classifier) == measured.fingerprint
    with open_scheduled(shelf.open(Toy(seed=1))) as classifier:
        assert fingerprint_of(classifier) != measured.fingerprint


def test_costs_from_an_exit_on_are_those_of_a_policy_that_runs_no_head_before_it(measured):
    assert measured.costs_from(1) == measured.costs(1)
    costs = measured.costs_from(2)
    assert costs.lengths == measured.lengths
    assert costs.seconds == tuple(row[1:] for row in measured.costs(2).seconds)
    assert costs.seconds[0][0] < measured.costs(1).seconds[0][1], "a head less"


def test_an_unwritable_cache_is_no_error(measured, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("OFFRAMP_CACHE", str(tmp_path / "file"))
    save_profile(measured)
    assert cached_profile(measured.fingerprint, 8) is None


def test_a_profile_of_another_machine_is_refused(measured):
    require_here(measured, measured.fingerprint, "here")
    with pytest.raises(
        RefusedError, match=r"measured under other conditions \(threads 1 there, 2 here\) - here - measure one here"
    ):
        require_here(measured, dataclasses.replace(measured.fingerprint, threads=2), "here")
    with pytest.raises(RefusedError, match=r"measured under other conditions \(budget_bytes None there, 64MiB here\)"):
        require_here(measured, MeasuredOn(budget_bytes=64 << 20), "here")
    require_here(dataclasses.replace(measured, budget_bytes=64 << 20), MeasuredOn(budget_bytes=64 << 20), "here")


@pytest.mark.parametrize(
    "change",
    [
        {"seconds": []},
        {"seconds": 3},
        {"lengths": [8]},
        {"fingerprint": None},
        {"seconds": [[1, "2"]] * 2},
        {"head_seconds": [[float("nan")] * 2] * 9},
        {"budget_bytes": "64MiB"},
        {"step_seconds_p99": [[0.1]] * 9},
        {"fingerprint": {"batch": 0}},
    ],
)
def test_files_of_something_else_are_refused(measured, tmp_path, change):
    tree = {"format": 1, **json.loads(json.dumps(measured.to_json())), **change}
    (tmp_path / "profile.json").write_text(json.dumps(tree))
    with pytest.raises(StoreError, match="no device profile"):
        load_profile(tmp_path / "profile.json")
    with pytest.raises(UsageError, match="no such device profile"):
        load_profile(tmp_path / "none.json")

"""The bench of a task, with records as processes print them: what is compared with what, and how."""

import numpy as np
import pytest

import offramp
from offramp.errors import BudgetError, UsageError
from offramp.experiments import task_bench
from offramp.experiments.task_bench import (
    Rival,
    Sample,
    bench_task,
    measured,
    rivals_of,
    take_sample,
)
from offramp.runtime.config import EngineConfig
from offramp.store import Store
from offramp.tasks.examples import Example, Splits
from tests.cli.conftest import NUM_LAYERS, write_tiny
from tests.toy import LABELS, Toy, write_toy

NUM_TEXTS = 20
TRUTH_N = np.array([0, 1] * 10)
SAMPLE = Sample("toy", "dev", ("accuracy",), ["a"] * NUM_TEXTS, ("no", "yes"), TRUTH_N, "digest", 0, False)


def record(latencies, wrong=0, exits=(4,) * NUM_TEXTS, peak=100, read=10.0, total=None):
    """What a process prints of SAMPLE; the last `wrong` answers are."""
    answers = [SAMPLE.labels[label if index < NUM_TEXTS - wrong else 1 - label] for index, label in enumerate(TRUTH_N)]
    return {
        "latencies_seconds": list(latencies),
        "batch": 1,
        "peak_rss_bytes": peak,
        "bytes_read_per_input": read,
        "texts": {"seconds": total or sum(latencies), "answers": answers, "exit_stages": list(exits)},
    }


def test_a_policy_twice_as_fast_is_told_so_and_so_is_what_it_loses():
    seconds = np.linspace(0.01, 0.03, NUM_TEXTS)
    plain = [record(scale * seconds) for scale in (1, 3, 2, 4, 1.5)]
    early = [record(seconds / 2, 2, (2,) * NUM_TEXTS, 68 + r, 2.0 + r) for r in range(5)]
    found = measured(Rival("exits", "stage:2", 1), early, plain, SAMPLE, num_layers=4)
    assert found.speedup == pytest.approx(4), "in the middle round plain takes 2 x, the policy half"
    assert found.speedup_low <= 4 <= found.speedup_high
    assert found.scores == {"accuracy": 90.0, "score": 90.0}
    assert found.score_difference == pytest.approx(-10)
    assert found.score_difference_low < -10 < found.score_difference_high <= 0
    assert (found.mean_exit, found.layer_count_speedup) == (2.0, 2.0)
    assert (found.peak_rss_bytes, found.bytes_read_per_text) == (72, 4.0), "the largest peak, the middle round"
    assert found.latency_seconds_p50 == pytest.approx(0.01)
    assert found.latency_seconds_p90 == pytest.approx(np.quantile(seconds / 2, 0.9))
    assert found.texts_per_second == pytest.approx(NUM_TEXTS / (seconds.sum() / 2))
    assert found.paired_over == "texts"


def test_the_plain_model_is_compared_with_nobody():
    plain = [record([0.01] * NUM_TEXTS)]
    found = measured(Rival("plain", "none", 1), plain, plain, SAMPLE, num_layers=4)
    assert (found.score_difference, found.speedup, found.speedup_low) == (None, None, None)
    assert found.layer_count_speedup == 1


def test_a_deadline_may_answer_otherwise_in_each_round():
    plain = [record([0.01] * NUM_TEXTS)] * 2
    cut = [record([0.01] * NUM_TEXTS), record([0.01] * NUM_TEXTS, wrong=4)]
    found = measured(Rival("exits", "none", 1, 0.1), cut, plain, SAMPLE, num_layers=4)
    assert found.scores["accuracy"] == 90.0
    assert found.score_difference == pytest.approx(-10)


@pytest.mark.parametrize("batch", [1, 8, "bulk"])
def test_few_rounds_have_values_and_no_intervals(batch):
    """The score is that of texts, and has one from two rounds on."""
    plain, early = record([0.02] * NUM_TEXTS), record(np.linspace(0.005, 0.015, NUM_TEXTS), wrong=2)
    for rounds, has_intervals in ((1, (False, False)), (2, (True, False)), (4, (True, False)), (5, (True, True))):
        found = measured(Rival("exits", "stage:2", batch), [early] * rounds, [plain] * rounds, SAMPLE, num_layers=4)
        assert found.speedup == pytest.approx(2) and found.score_difference == pytest.approx(-10)
        ends = (found.score_difference_low, found.score_difference_high, found.speedup_low, found.speedup_high)
        assert [each is not None for each in ends] == [has for has in has_intervals for _ in range(2)]


def test_in_bulk_mode_whole_rounds_are_paired():
    """The batches of one rival are not those of another."""
    plain = [record([1.0, 3.0], total=total) for total in (4.0, 5.0, 4.5, 6.0, 3.0)]
    early = [record([1.0], total=2.0)] * 5
    found = measured(Rival("exits", "stage:2", "bulk"), early, plain, SAMPLE, num_layers=4)
    assert (found.speedup, found.paired_over) == (2.25, "rounds")
    assert (found.speedup_low, found.speedup_high) == (1.5, 3.0)


def test_the_interval_covers_the_speed_up_of_all_rounds():
    """Of 100 studies of seven rounds that vary by some percent, at least 95 %: an uncorrected percentile interval of
    seven rounds is that of the inner five, and covers 89 %.
    """
    generator, hits = np.random.default_rng(1), 0
    for _ in range(100):
        plain, own = ([record([0.01], total=scale * value) for value in generator.lognormal(0, noise, 7)]
                      for scale, noise in ((2, 0.05), (1, 0.005)))  # fmt: skip
        found = measured(Rival("exits", "stage:2", "bulk"), own, plain, SAMPLE, num_layers=4)
        hits += found.speedup_low <= 2 <= found.speedup_high
    assert hits >= 95


def test_the_interval_covers_the_speed_up_of_all_texts():
    """Texts that are all alike in each round, and differ from one another: the interval is that of texts."""
    generator, hits = np.random.default_rng(3), 0
    plain_N = generator.lognormal(0, 0.5, 20_000)
    own_N = plain_N * generator.uniform(0.3, 0.9, plain_N.size)
    for _ in range(60):
        drawn = generator.integers(0, plain_N.size, NUM_TEXTS)
        plain, own = ([record(side_N[drawn])] * 5 for side_N in (plain_N, own_N))
        found = measured(Rival("exits", "stage:2", 1), own, plain, SAMPLE, num_layers=4)
        hits += found.speedup_low <= plain_N.sum() / own_N.sum() <= found.speedup_high
    assert hits >= 55


def test_pairs_are_drawn_together():
    """Texts that differ a thousandfold, all twice as fast: there is nothing to be unsure of."""
    seconds = np.geomspace(1e-3, 1, NUM_TEXTS)
    sides = ([record(seconds * scale)] * 5 for scale in (0.5, 1))
    found = measured(Rival("exits", "stage:2", 1), *sides, SAMPLE, num_layers=4)
    assert (found.speedup, found.speedup_low, found.speedup_high) == pytest.approx((2, 2, 2))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task-bench")
    with Store(offramp.divide(write_tiny(folder / "model"), folder / "store"), "never") as opened:
        yield opened


def splits(labels=("business", "film", "sport"), **more):
    examples = [Example(f"the bank {number}", number % 3) for number in range(10)]
    return Splits("toy", labels, ("accuracy",), {"tune": examples[:3], "dev": examples, **more})


def test_rows_are_evenly_spaced_and_labels_those_of_the_model(store):
    sample = take_sample(store, splits(("sport", "film", "business")), "dev", 5)
    assert sample.texts == [f"the bank {number}" for number in (0, 2, 4, 6, 8)]
    assert sample.truth_N.tolist() == [2, 0, 1, 2, 0]
    assert take_sample(store, splits(), "tune", 5).truth_N.tolist() == [0, 1, 2]
    assert sample.answers([{"texts": {"answers": ["sport", "business"]}}]).tolist() == [[2, 0]]


def test_of_two_dev_splits_the_first_is_taken_and_named(store):
    both = {"dev_matched": [Example("the film", 1)], "dev_mismatched": [Example("a match", 2)]}
    mnli = Splits("mnli", ("business", "film", "sport"), ("accuracy",), both)
    sample = take_sample(store, mnli, "dev", 5)
    assert (sample.split, sample.texts) == ("dev_matched", ["the film"])
    assert take_sample(store, mnli, "dev_mismatched", 5).texts == ["a match"]


def test_data_that_do_not_fit_are_refused(store):
    with pytest.raises(UsageError, match="the model's labels are business, film, sport, those of the data yes, no, so"):
        take_sample(store, splits(("yes", "no", "so")), "dev", 5)
    with pytest.raises(UsageError, match="unknown split 'test'"):
        take_sample(store, splits(), "test", 5)


def test_who_is_measured(store, tmp_path):
    names = [str(rival) for rival in rivals_of(store, "patience:1", None, (1, "bulk"))]
    stages = [f"stage:{number}, batch 1" for number in range(1, NUM_LAYERS)]
    assert names == [
        *("plain, batch 1", "plain, batch bulk", "patience:1, batch 1", "patience:1, batch bulk"),
        *stages,
    ]
    assert [str(rival) for rival in rivals_of(store, "none", None, (1,))] == ["plain, batch 1", *stages]
    deadline = rivals_of(store, "none", 0.00001, (1,))[1]
    configured = deadline.configure(EngineConfig(threads=1, exit="stage:1", batch=4))
    assert deadline.name == "exits"
    assert configured == EngineConfig(threads=1, exit="none", batch=1, deadline=0.00001)
    for number, toy in enumerate((Toy(exits=False), Toy(trained=False))):
        with write_toy(tmp_path / str(number), toy) as other:
            assert [rival.name for rival in rivals_of(other, "none", None, (1,))] == ["plain"]


class Workers:
    """In the place of worker processes: keeps jobs and their inputs; a batch of 8 does not fit if `full`."""

    def __init__(self, full=False):
        self.full, self.jobs = full, []

    def run_worker(self, job, log=print):
        if self.full and job.config.batch == 8:
            raise BudgetError("budget of 1.0 MiB is too small")
        self.jobs.append((job, list(job.inputs)))
        num_inputs = len(self.jobs[-1][1])
        common = dict.fromkeys(
            ("model", "store_sha256", "dtype", "backend", "threads", "budget_bytes", "reads", "verify"), 1
        )
        texts = {"seconds": 1.0, "answers": ["film"] * num_inputs, "exit_stages": [2] * num_inputs}
        facts = {"latencies_seconds": [0.1], "batch": 1, "peak_rss_bytes": 1, "bytes_read_per_input": 1.0}
        return {**common, **facts, "texts": texts}


@pytest.mark.parametrize("full", [False, True])
def test_a_batch_that_the_budget_does_not_hold_is_left_out_and_told(store, monkeypatch, full):
    workers, lines = Workers(full), []
    monkeypatch.setattr(task_bench, "run_worker", workers.run_worker)
    monkeypatch.setattr("offramp.experiments.bench.run_worker", workers.run_worker)
    pairs = Splits("toy", ("business", "film", "sport"), ("accuracy",), {"dev": [Example(("the", "film"), 1)]})
    sample = take_sample(store, pairs, "dev", 5)
    config = EngineConfig(exit="patience:1", threads=1, budget=1 << 40)
    found, common = bench_task(store, sample, config, 2, lines.append)
    batches = [1, "bulk"] if full else [1, 8, "bulk"]
    assert [each.batch for each in found if each.rival == "plain"] == batches
    assert [each.batch for each in found if each.rival == "exits"] == batches
    assert lines[0].startswith("batch 8 is left out: budget of 1.0 MiB") == full
    assert (common["num_texts"], common["rounds"], common["split"]) == (1, 2, "dev")
    planned = [job for job, _ in workers.jobs if job.job == "plan"]
    assert [(job.config.exit, job.config.batch) for job in planned] == [("patience:1", batch) for batch in batches]
    measured_jobs = [job for job, _ in workers.jobs if job.job == "inputs"]
    assert len(workers.jobs) == len(planned) + len(measured_jobs) == len(planned) + 2 * len(found)
    for job, inputs in workers.jobs:
        assert inputs == [("the", "film")]
        assert (job.store, job.config.threads, job.config.budget) == (str(store.path), 1, 1 << 40)


def test_a_budget_that_is_too_small_for_one_text_ends_it(store, monkeypatch):
    def impossible(job):
        raise BudgetError("too small")

    monkeypatch.setattr(task_bench, "run_worker", impossible)
    with pytest.raises(BudgetError):
        bench_task(store, take_sample(store, splits(), "dev", 5), EngineConfig(), 1, print)


def test_a_regression_is_scored_by_its_values(tmp_path):
    with write_toy(tmp_path / "store", Toy(problem="regression")) as store:
        values = Splits("toy", (), ("pearson",), {"dev": [Example("a", 1.5), Example("b", 2.5)]})
        sample = take_sample(store, values, "dev", 5)
        assert sample.truth_N.tolist() == [1.5, 2.5]
        assert sample.answers([{"texts": {"answers": [0.5, 0.7]}}]).tolist() == [[0.5, 0.7]]
        with pytest.raises(UsageError, match="the model is a regression, the data are for a classification"):
            take_sample(store, Splits("toy", LABELS, ("accuracy",), {"dev": [Example("a", 1)]}), "dev", 5)

"""The runner: what it runs, in which order, what it records of failures, and that kills lose and repeat nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from datetime import datetime
from pathlib import Path

import pytest

from offramp.errors import (
    BudgetError,
    ChangedError,
    DiskFullError,
    MissingExtraError,
    OfframpError,
    RefusedError,
    UsageError,
)
from offramp.experiments import Grid, children, experiment, pools, prerequisites, results, scheduled, steps, sweep
from offramp.experiments.children import LostError
from offramp.experiments.comparison import measured_last
from offramp.experiments.grid import read_recipe
from offramp.experiments.pools import LocalPool, attempt, failure_of, run_all
from offramp.experiments.prerequisites import MADE, Needs, Prerequisite, Source, needs_of
from offramp.experiments.report import page_of
from offramp.experiments.results import RECORDS, Results, read_results
from offramp.experiments.steps import _data_digest
from offramp.experiments.sweep import Plan, Runner, SweepSettings, estimated_seconds, plan_sweep
from offramp.measure.conditions import surroundings
from offramp.reporting.html_page import to_html
from offramp.tasks import DataSpec
from offramp.training import TrainSettings
from tests.cli.conftest import write_tiny
from tests.experiments import toy_worker
from tests.processes import is_running, wait_until

TOYS = Grid(job="toy", model="toy", seed=[1, 2], rounds=3)


def ignore(*what):
    pass


def run(experiments, folder, **options):
    lines = []
    progress = lambda done, total, line: lines.append((done, total, line))  # noqa: E731
    plan = sweep.sweep(list(experiments), folder, SweepSettings(**options), ignore, progress)
    return plan, lines


def stable(folder):
    """What does not depend on the machine, the time or the order, of all records."""
    kept = ("id", "round", "experiment", "status", "figures", "samples")
    records = read_results(folder, ignore)
    assert len({record["id"] for record in records}) == len(records), "one record an id"
    return json.dumps(sorted(([record[key] for key in kept] for record in records), key=lambda each: each[0]))


def report(folder):
    return to_html(page_of({"results": read_results(folder, ignore)}, "Report"))


def test_rounds_alternate_and_each_starts_with_another_experiment(in_process, tmp_path):
    run(TOYS, tmp_path / "out")
    ran = [(step["round"], step["experiment"]["seed"]) for step in in_process]
    assert ran == [(1, 1), (1, 2), (2, 2), (2, 1), (3, 1), (3, 2)]


def test_what_is_recorded_is_not_run_again(in_process, tmp_path):
    plan, lines = run(TOYS, tmp_path / "out", limit=2)
    assert (len(plan.jobs), plan.num_limited, plan.num_recorded) == (2, 4, 0)
    assert [line[:2] for line in lines] == [(0, 2), (1, 2), (2, 2)]
    before = (tmp_path / "out" / RECORDS).read_bytes()
    plan, _ = run(TOYS, tmp_path / "out")
    assert (len(plan.jobs), plan.num_recorded, len(in_process)) == (4, 2, 6)
    assert (tmp_path / "out" / RECORDS).read_bytes().startswith(before), "nothing is rewritten"
    more = Grid(job="toy", model="toy", seed=[1, 2], rounds=4)
    plan, _ = run(more, tmp_path / "out")
    assert [job.number for job in plan.jobs] == [4, 4], "more rounds of the same experiments"


def test_a_record_says_what_ran_where_and_how(in_process, tmp_path):
    run(TOYS, tmp_path / "out", limit=1)
    (record,) = read_results(tmp_path / "out", ignore)
    assert record["id"] == f"{record['key']}.1" and record["status"] == "done" and record["format"] == 1
    assert record["experiment"]["seed"] == 1 and len(record["samples"]["latencies"]) == 10
    assert record["attempts"] == 1 and record["seconds"] > 0 and record["workers"] == 1
    assert record["git"] is None or len(record["git"]["commit"]) == 40
    assert record["ended"].endswith("+00:00")


def test_failures_are_records_with_their_reason(in_process, tmp_path):
    models = ["toy", "toy-refuses", "toy-is-killed", "toy-without-score"]
    run(Grid(job="toy", model=models, rounds=2), tmp_path / "out")
    records = read_results(tmp_path / "out", ignore)
    assert len(records) == 8
    found = {(record["experiment"]["model"], record["round"]): record for record in records}
    assert found["toy", 1]["status"] == "done" and "reason" not in found["toy", 1]
    refused = found["toy-refuses", 1]
    assert refused["status"] == "failed" and refused["reason"]["kind"] == "refused"
    assert refused["reason"]["what"] == "this toy refuses" and refused["reason"]["remedy"] == "take another toy"
    parts = {"cpu_model", "num_cores", "total_memory_bytes", "memory_limit_bytes", "caches", "load_1min",
             "available_memory_bytes", "kernel", "python_version", "offramp_version", "library_versions"}  # fmt: skip
    for record in records:
        assert record["status"] == "done" or parts <= record["environment"].keys(), "also where it was not run"
    assert found["toy-refuses", 2]["environment"] == refused["environment"]
    assert found["toy-refuses", 2]["attempts"] == 0, "every round would be refused"
    for number in (1, 2):
        killed = found["toy-is-killed", number]
        assert killed["reason"]["kind"] == "killed" and killed["attempts"] == 2, "tried again"
        assert found["toy-without-score", number]["figures"]["score"] is None
    ran = [step["experiment"]["model"] for step in in_process]
    assert ran.count("toy-refuses") == 1 and ran.count("toy-is-killed") == 4
    plan, _ = run(Grid(job="toy", model=models, rounds=3), tmp_path / "out")
    assert [record["attempts"] for record in read_results(tmp_path / "out", ignore)][8:].count(0) == 1
    assert len(plan.jobs) == 4


def test_failures_of_some_kinds_are_measured_again_and_the_newer_record_counts(in_process, tmp_path, monkeypatch):
    grid, out = Grid(job="toy", model=["toy", "toy-refuses", "toy-is-killed"], rounds=2), tmp_path / "out"
    run(grid, out)
    before = (out / RECORDS).read_bytes()
    assert len(run(grid, out)[0].jobs) == len(run(grid, out, retry=("memory",))[0].jobs) == 0
    monkeypatch.setattr(pools, "run_worker", lambda job, *rest: toy_worker.compute(job.step, ignore))
    plan, _ = run(grid, out, retry=("killed", "timeout"), limit=1)
    assert [(job.experiment.model, job.number) for job in plan.jobs] == [("toy-is-killed", 1)]
    assert (plan.num_limited, len(plan.failed_before), len(plan.failed)) == (1, 2, 0)
    found = {(each["experiment"]["model"], each["round"]): each["status"] for each in read_results(out, ignore)}
    assert len(found) == 6 and found["toy-is-killed", 1] == "done" and found["toy-is-killed", 2] == "failed"
    plan, _ = run(grid, out, retry=("refused", "killed"))
    assert len(plan.jobs) == 3 and not plan.failed and not run(grid, out, retry=("refused", "killed"))[0].jobs
    assert "failures" not in [table.name for table in page_of({"out": read_results(out, ignore)}, "T").tables]
    assert (out / RECORDS).read_bytes().startswith(before) and len(json.loads(stable(out))) == 6


def test_what_still_fails_is_tried_once_again_of_all_its_rounds(in_process, tmp_path):
    grid = Grid(job="toy", model="toy-refuses", rounds=3)
    run(grid, tmp_path / "out")
    plan, _ = run(grid, tmp_path / "out", retry=("refused",))
    assert len(in_process) == 2 and len(plan.failed) == 3 and len(json.loads(stable(tmp_path / "out"))) == 3


def test_a_result_that_no_record_holds_is_a_failure_and_the_sweep_goes_on(in_process, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "MAX_RECORD_BYTES", 4000)
    compute = toy_worker.toy
    monkeypatch.setitem(steps._STEPS, "toy", lambda *step: {**compute(*step), "environment": {"num_cores": 7}})
    plan, _ = run([*Grid(job="toy", model="toy", passes=[10, 900], rounds=2)], tmp_path / "out")
    found = read_results(tmp_path / "out", ignore)
    assert [record["status"] for record in found] == ["done", "failed", "failed", "done"]
    assert "result not kept" in found[1]["reason"]["what"] and found[2]["attempts"] == 0
    assert found[1]["environment"] == found[2]["environment"] == {"num_cores": 7}, "of the measurement"
    assert found[1]["reason"]["remedy"].startswith("give fewer rows") and len(plan.failed) == 2


def test_of_a_machine_that_a_scheduler_has_lost_nothing_is_recorded(tmp_path):
    each = experiment(job="toy", model="toy")
    with Results(tmp_path / "out", ignore) as found:
        runner = Runner(found, Recorder(), SweepSettings(), ignore, ignore)
        record = runner._record(
            sweep.Job("k", 1, each, {}, Needs(tmp_path)),
            {**scheduled._lost("tcp://w"), "attempts": 2, "seconds": 1.0},
            1,
        )
    assert record["reason"]["kind"] == "killed" and "environment" not in record


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BudgetError("x"), "memory"), (MissingExtraError("torch", "train"), "absent"), (UsageError("x"), "refused"),
        (LostError("x"), "killed"), (OfframpError("x"), "error"), (DiskFullError("x"), "disk"),
        (ChangedError("x"), "changed"),
    ],
)  # fmt: skip
def test_kinds_of_failures(error, kind):
    assert failure_of(error)["kind"] == kind and (kind in pools.RECORDED) == (kind not in ("disk", "changed"))


def test_a_full_disk_of_a_worker_stops_the_sweep_and_records_nothing(monkeypatch, tmp_path):
    def full(job, *rest):
        raise DiskFullError("no space left", "made", None)

    monkeypatch.setattr(pools, "run_worker", full)
    with pytest.raises(DiskFullError, match="records are kept"):
        run(TOYS, tmp_path / "out")
    assert (tmp_path / "out" / RECORDS).read_bytes() == b""


def test_a_model_or_data_that_change_while_a_sweep_runs_end_it_without_a_record(monkeypatch, tmp_path):
    def changed(job, *rest):
        raise ChangedError("the model has changed", "m", "run the sweep again")

    monkeypatch.setattr(pools, "run_worker", changed)
    with pytest.raises(ChangedError, match="run the sweep again"):
        run(TOYS, tmp_path / "out")
    assert (tmp_path / "out" / RECORDS).read_bytes() == b""
    each, source = experiment(model="m", exit="stage:3"), Source("m", "digest", True, 6)
    job = sweep.Job("k", 1, each, {}, needs_of(each, source, None, tmp_path))
    for digest, is_same in (("digest", True), ("another", False)):
        outcome = {"result": {"run": {"store_sha256": digest}, "figures": {}}, "attempts": 1, "seconds": 1.0}
        with nullcontext() if is_same else pytest.raises(ChangedError, match="the store has changed since the sweep"):
            sweep._require_same_store(job, outcome)
            sweep._require_same_store(job, {"error": {}})
    sweep._require_same_store(sweep.Job("k", 1, each, {}, Needs(tmp_path)), outcome)


def test_what_is_made_is_of_the_model_and_data_that_were_identified(tmp_path):
    tiny = write_tiny(tmp_path / "model", exits=False)
    (tmp_path / "t.tsv").write_text("".join(["sentence\tlabel\n", *(f"text {n}\t{n % 2}\n" for n in range(60))]))
    spec = DataSpec(train=tmp_path / "t.tsv")
    digest = _data_digest(asdict(spec), ignore)
    for loss in (None, "pabee"):
        each = experiment(model="m", train=str(tmp_path / "t.tsv"), **({"loss": loss} if loss else {}))
        first, *others = needs_of(each, Source("m", "digest", False), digest, tmp_path).steps.values()
        assert first.arguments["sha256"] == "digest" and not any("sha256" in step.arguments for step in others)
        assert {step.arguments["data_sha256"] for step in (first, *others) if "data" in step.arguments} == {digest}
    step = {"data": asdict(spec), "data_sha256": digest, "model": "m", "sha256": "digest"}
    assert steps._load_unchanged(step, ignore).examples["train"]
    steps._require_unchanged(step, "digest")
    (tmp_path / "t.tsv").write_text((tmp_path / "t.tsv").read_text() + "more\t1\n")
    with pytest.raises(
        ChangedError, match=r"the data have changed since the sweep began - .*t\.tsv - run the sweep again"
    ):
        steps._load_unchanged(step, ignore)
    with pytest.raises(ChangedError, match="the model has changed since the sweep began - m - run the sweep again"):
        steps._require_unchanged(step, "another")
    made = {"kind": "divide", "model": str(tiny), "out": str(tmp_path), "dtype": "fp32", "sha256": "of another"}
    with pytest.raises(ChangedError, match="the model has changed"):
        steps.take_step(made, ignore)
    assert not (tmp_path / "store").exists() and steps.take_step({**made, "sha256": None}, ignore)


def test_an_experiment_for_another_device_is_never_moved(in_process, tmp_path):
    found = [experiment(job="toy", model="toy", rounds=1, device=device) for device in (None, "board")]
    plan, _ = run(found, tmp_path / "out")
    assert len(plan.jobs) == 1 and plan.elsewhere == [found[1]]
    plan, _ = run(found, tmp_path / "out", device="board")
    assert [job.experiment for job in plan.jobs] == [found[1]]


def test_a_clock_that_jumps_changes_no_duration_and_no_order(in_process, tmp_path, monkeypatch):
    """Records are in the order in which they were added; the last of two contents counts, whatever day it ended on."""
    monkeypatch.chdir(tmp_path)
    grid, clock = [experiment(job="toy", model="toy", exit="policy.json|stage:3", rounds=3)], JumpingClock()
    for name in ("stands", "jumps"):
        for text in ("earlier", "later"):
            (tmp_path / "policy.json").write_text(text)
            run(grid, tmp_path / name)
        monkeypatch.setattr(sweep, "datetime", clock)
    stands, jumps = (read_results(tmp_path / name, ignore) for name in ("stands", "jumps"))
    days = [record["ended"] for record in jumps]
    assert days != sorted(days) and days != sorted(days, reverse=True) and len(set(days)) == 6
    assert [record["id"] for record in jumps] == [record["id"] for record in stands]
    assert all(0 < record["seconds"] < 60 for record in jumps)
    current = measured_last(jumps, lambda record: None)
    assert [record["id"] for record in current] == [record["id"] for record in jumps[3:]]
    pages = [page_of({"results": records}, "Report") for records in (jumps, stands)]
    assert to_html(pages[0]) == to_html(pages[1])
    assert "Left out: 3 records" in pages[0].tables[0].notes[-1] and pages[0].tables[0].rows[0].cells[-1].text == "3"


class JumpingClock:
    """Gives another day each time."""

    def __init__(self):
        self.days = iter([20, 3, 28, 15, 1, 9])

    def now(self, zone):
        return datetime(2026, 11, next(self.days), tzinfo=zone)


def test_a_policy_file_that_changes_is_another_input(in_process, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy.json").write_text("1")
    each = experiment(job="toy", model="toy", exit="policy.json|stage:3", rounds=1)
    run([each], tmp_path / "out")
    assert len(run([each], tmp_path / "out")[0].jobs) == 0
    (tmp_path / "policy.json").write_text("2")
    assert len(run([each], tmp_path / "out")[0].jobs) == 1


def test_a_policy_file_whose_name_holds_the_marks_of_rules_is_an_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a&b.json", "c.json"):
        (tmp_path / name).write_text("1")
    assert [*sweep.files_of(experiment(model="m", exit="a&b.json"))] == ["a&b.json"]
    assert [*sweep.files_of(experiment(model="m", exit="from:2>c.json"))] == ["c.json"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"exit": "patiense:2"}, "'patiense:2' is not a rule"),
        ({"exit": "confidence:2.5"}, "threshold out of range"),
        ({"exit": "patience:6"}, "patience:6 can never fire with 6 exits"),
        ({"exit": "random:stage:7"}, "stage:7 can never fire with 6 exits"),
        ({"exit": "tune:latency=patience:9"}, "patience:9 can never fire"),
        ({"exit": "confidence:0.9"}, "which a regression does not have"),
        ({"exit": "no.json"}, "no such policy file"),
        ({"exit": "no.py:Mine"}, "no such policy in Python"),
        ({"backend": "onnx"}, "no backend onnx - m - give ort, torch, numpy"),
        ({"max_length": 65}, "max_length 65 exceeds the 64 tokens"),
        ({"exit": "tune:latency=5ms", "batch": "bulk"}, "in bulk mode, whose profile is of a fixed number of rows"),
        ({"exit": "oracle", "batch": "bulk"}, "in bulk mode, whose order of rows is another"),
    ],
)
def test_what_could_only_fail_is_refused_before_anything_is_made(options, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = Source("m", "digest", True, 6, 64, "regression")
    with pytest.raises(UsageError, match=says):
        needs_of(experiment(model="m", dev="d.tsv", **options), source, "data", tmp_path)


def test_a_fixed_exit_needs_no_data(tmp_path):
    needs = needs_of(experiment(model="m", exit="stage:3"), Source("m", "digest", True, 6), None, tmp_path)
    assert needs.engine.exit == "stage:3" and needs.sample is None
    for exit in ("patience:1", "random:stage:3", "oracle", "stage:3|patience:1"):
        with pytest.raises(UsageError, match="on random inputs"):
            needs_of(experiment(model="m", exit=exit), Source("m", "digest", True, 6), None, tmp_path)


def test_a_training_is_as_long_as_the_model_unless_a_length_is_given(tmp_path):
    each, source = experiment(model="m", train="t.tsv", loss="pabee"), Source("m", "digest", False, 6, 64)
    lengths = [
        next(step for step in needs_of(each, found, "data", tmp_path).steps.values() if step.kind == "train")
        for found in (source, Source("m", "digest", False, 6, 512), Source("m", "digest", False))
    ]
    assert [step.arguments["settings"]["max_length"] for step in lengths] == [64, 128, 128]


def test_what_is_made_first_names_its_model_and_data(tmp_path):
    plain = needs_of(experiment(model="m", dev="d.tsv"), Source("m", "digest", False), "data", tmp_path)
    trained = experiment(model="m", train="t.tsv", loss="pabee")
    trained = needs_of(trained, Source("m", "digest", False), "data", tmp_path)
    found = [(step.kind, step.model, step.data) for needs in (plain, trained) for step in needs.steps.values()]
    assert found == [
        ("divide", "m", ""), ("sample", "m", "d.tsv"),
        ("train", "m", "t.tsv"), ("divide", "m", "t.tsv"), ("sample", "m", "t.tsv"),
    ]  # fmt: skip


def test_columns_are_checked_when_the_data_are_identified(tmp_path):
    (tmp_path / "t.tsv").write_text("sentence\tlabel\na\tx\n")
    read = lambda **options: _data_digest(asdict(DataSpec(dev=tmp_path / "t.tsv", **options)), ignore)  # noqa: E731
    assert read()
    for wrong in ({"label_column": "y"}, {"text_column": "words"}, {"pair_column": "b"}):
        with pytest.raises(UsageError, match="no column"):
            read(**wrong)


POLICY = """
from offramp.policies import MemorylessPolicy
class Mine(MemorylessPolicy):
    def update(self, exit_index, evidence):
        return evidence.confidence_B > 0.9
"""


@pytest.mark.parametrize("exit", ["from:2>mine.py:Mine|stage:3", "random:mine.py:Mine", "tune:latency=mine.py:Mine"])
def test_a_policy_in_python_that_changes_is_another_experiment(exit, in_process, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    each, folders = experiment(job="toy", model="toy", exit=exit, rounds=1), []
    real = experiment(model="m", dev="d.tsv", exit=exit)
    for number in (1, 1, 2):
        (tmp_path / "mine.py").write_text(POLICY + "#" * number)
        assert len(run([each], tmp_path / "out")[0].jobs) == (len(folders) != 1)
        needs = needs_of(real, Source("m", "digest", True), "data", tmp_path)
        folders.append([*needs.steps, needs.engine.exit])
    assert folders[0] == folders[1] and folders[0][1:] != folders[2][1:], "made anew, or pinned"


def test_records_cannot_name_code(in_process, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(POLICY)
    run([experiment(job="toy", model="toy", exit="mine.py:Mine", rounds=1)], tmp_path / "out")
    with pytest.raises(RefusedError, match="the records name code"):
        read_recipe(tmp_path / "out")


def test_time_is_estimated_from_records(in_process, tmp_path):
    plan = plan_sweep(list(TOYS), tmp_path, [], SweepSettings(), ignore)
    assert estimated_seconds(plan, []) is None
    known = [{"status": "done", "seconds": seconds, "experiment": {"model": "toy"}} for seconds in (1, 2, 9)]
    assert estimated_seconds(plan, known) == 6 * 2
    other = [{"status": "done", "seconds": 4, "experiment": {"model": "other"}}, {**known[0], "status": "failed"}]
    assert estimated_seconds(plan, other) == 6 * 4


class Recorder:
    """A pool that runs nothing, and notes what was started beside what."""

    def __init__(self, failing=()):
        self.order, self.failing = [], failing

    def room(self, num_jobs, alone):
        return num_jobs

    def check(self):
        pass

    def start(self, job, timeout_seconds, log, alone):
        done, kind = Future(), job.step["kind"] if job.step else job.job
        self.order.append(kind)
        error = {"kind": "refused", "what": "no", "where": None, "remedy": None}
        outcome = {"error": error, "environment": {"num_cores": 7}} if kind in self.failing else {"result": {}}
        done.set_result({**outcome, "attempts": 1, "seconds": 1.0})
        return done

    def close(self):
        pass


def chain(folder):
    """A store, then a sample and a transcript of it, then what needs both."""
    needs = Needs(folder / "made")
    store = needs.add("divide", "a", model="m")
    sample, transcript = needs.add("sample", "b", (store,)), needs.add("transcript", "c", (store,))
    needs.add("exits", "d", (sample, transcript))
    return needs


def test_prerequisites_are_made_once_each_after_those_it_needs(tmp_path):
    needs = chain(tmp_path / "out")
    steps = list(needs.steps.values())
    with Results(tmp_path / "out", ignore) as results:
        pool = Recorder()
        Runner(results, pool, SweepSettings(num_jobs=2), ignore, ignore).run(Plan([], steps[::-1], 0))
        assert pool.order[0] == "divide" and pool.order[-1] == "exits" and len(pool.order) == 4
        assert all(step.is_made for step in steps)
        assert json.loads((steps[0].folder / MADE).read_text())["seconds"] == 1.0


def test_what_needs_a_failed_prerequisite_is_recorded_as_failed(tmp_path, in_process):
    needs = chain(tmp_path / "out")
    each = experiment(job="toy", model="toy", rounds=2)
    with Results(tmp_path / "out", ignore) as results:
        pool = Recorder(failing=("transcript",))
        jobs = [sweep.Job("k", number, each, {}, needs) for number in (1, 2)]
        Runner(results, pool, SweepSettings(), ignore, ignore).run(Plan(jobs, list(needs.steps.values()), 0))
        assert "exits" not in pool.order
        reasons = [record["reason"]["what"] for record in results.records]
        assert all(record["environment"] == {"num_cores": 7} for record in results.records), "of what failed"
    assert reasons == ["transcript failed: no"] * 2


def test_a_prerequisite_that_failed_is_not_made_again_for_each_trial_of_a_search(tmp_path, in_process):
    with Results(tmp_path / "out", ignore) as results:
        pool = Recorder(failing=("divide",))
        runner = Runner(results, pool, SweepSettings(), ignore, ignore)
        for seed in (1, 2, 3):
            needs = chain(tmp_path / "out")
            job = sweep.Job(f"k{seed}", 1, experiment(job="toy", model="toy", seed=seed), {}, needs)
            runner.names = {job.experiment: "toy"}
            runner.run(Plan([job], list(needs.steps.values()), 0))
        assert pool.order == ["divide"]
        assert [record["reason"]["what"] for record in results.records] == ["divide failed: no"] * 3


def test_equal_prerequisites_are_shared_and_changed_inputs_make_new_ones(tmp_path):
    first, second = (Needs(tmp_path) for _ in range(2))
    assert first.add("divide", ["a"]) == second.add("divide", ["a"]) != second.add("divide", ["b"])
    assert not Prerequisite("divide", tmp_path, {}).is_made


def test_each_way_to_read_the_same_files_has_prerequisites_of_its_own(tmp_path):
    """Digests of files are of their bytes: other columns, labels or splits of them are other rows."""

    def names(**options):
        options = {"train": "d.tsv", "loss": "pabee", "exit": "oracle", **options}
        each = experiment(model="m", **{name: value for name, value in options.items() if value is not None})
        return needs_of(each, Source("m", "digest", False), "bytes", tmp_path).steps.keys()

    others = {
        "text_column": "body", "pair_column": "second", "label_column": "topic", "labels": ("b", "a"),
        "regression": True, "split_seed": 1, "format": "csv", "header": False, "quotes": True, "dev": "d.tsv",
    }  # fmt: skip
    assert {*others, "task", "data", "train", "offline"} == {each.name for each in fields(DataSpec)}
    ways = [{}, {"train": "d.csv"}, *({name: value} for name, value in others.items())]
    ways += [{"dev": "d.tsv", "train": None, "loss": None}]
    found = [name for way in ways for name in names(**way)]
    assert len(found) == len(set(found)) > 4 * len(ways)
    assert names() == names(train="moved/d.tsv", offline=True)


def test_a_profile_keeps_the_key_of_older_releases(monkeypatch, tmp_path):
    """Else a results folder would tune again, with another policy, in the middle of an experiment."""
    monkeypatch.setattr(prerequisites, "machine", lambda: "machine")
    names = []
    for more in ({}, {"prefetch": False}):
        each = experiment(model="m", task="sst2", exit="tune:latency=5ms", budget="96MiB", **more)
        names.append([*needs_of(each, Source("m", "stored", True), "rows", tmp_path).steps])
    names[0] = [name for name in names[0] if name.startswith(("profile-", "tune-"))]
    assert names[0] == ["profile-6311a2b747152398", "tune-f0e9079291db27a7"] and not set(names[0]) & set(names[1])


@pytest.mark.parametrize("share_cores", [False, True])
def test_jobs_that_measure_time_run_one_at_a_time_unless_asked(tmp_path, monkeypatch, share_cores):
    """Those of streams, too: each compares its time with that of its model. Toys run beside each other, and first."""
    kinds, groups = ("stream", "toy", "measure") * 2, []

    def run_group(pool, jobs, num_workers, log, alone):
        found = [(job, {"result": {}, "attempts": 1, "seconds": 1.0}) for job, *_ in jobs]
        groups.append(([job.experiment.job for job, _ in found], num_workers, alone))
        yield from found

    monkeypatch.setattr(sweep, "run_all", run_group)
    with Results(tmp_path / "out", ignore) as results:
        runner = Runner(results, Recorder(), SweepSettings(3, share_cores), ignore, ignore)
        jobs = [sweep.Job(f"k{n}", 1, experiment(job=kind, model=f"m{n}"), {}, Needs(tmp_path))
                for n, kind in enumerate(kinds)]  # fmt: skip
        runner.run(Plan(jobs, [], 0))
        workers = [record["workers"] for record in results.records]
    beside = 3 if share_cores else 1
    timed = (["stream", "measure"] * 2, beside, not share_cores)
    assert groups == [(["toy"] * 2, 3, False), timed] and workers == [3, 3, *[beside] * 4]


def test_a_rival_ends_at_its_limit_before_its_worker_does():
    of = {"model": "m", "timeout": "5s"}
    assert sweep._limit(experiment(**of)) == 5 < sweep._limit(experiment(rival="disk", **of))
    assert sweep._limit(experiment(model="m", rival="disk")) is None


def test_jobs_are_taken_only_when_a_worker_is_free():
    class Slow(Recorder):
        def start(self, job, timeout_seconds, log, alone):
            self.running = getattr(self, "running", 0) + 1
            assert self.running <= 2
            return super().start(job, timeout_seconds, log, alone)

    pool = Slow()
    jobs = iter([(number, pools.WorkerJob("step", "", step={"kind": "toy"}), None) for number in range(5)])
    for _ in run_all(pool, jobs, 2, ignore):
        pool.running -= 1
    assert len(pool.order) == 5


@pytest.fixture
def failing_toys(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setattr(children, "WORKER", toy_worker.COMMAND)


def test_a_real_worker_that_is_killed_or_hangs_or_has_no_memory(failing_toys, monkeypatch, tmp_path):
    """Two attempts of the first, one of the others. One that lives tells its environment, as a measurement does."""

    monkeypatch.setattr(pools, "surroundings", lambda folder: {"told by": "the parent"})

    def outcome(model, timeout_seconds=None):
        step = {"kind": "toy", "experiment": experiment(job="toy", model=model).to_json(), "round": 1}
        step["model"] = str(tmp_path)
        return attempt(pools.WorkerJob("step", "", step=step), timeout_seconds)

    killed, hangs, full = outcome("toy-is-killed"), outcome("toy-hangs", 0.6), outcome("toy-fills-memory")
    assert (killed["error"]["kind"], killed["attempts"]) == ("killed", 2)
    assert (hangs["error"]["kind"], hangs["attempts"]) == ("timeout", 1) and hangs["seconds"] < 30
    assert "did not finish in 600.0 ms" in hangs["error"]["what"]
    assert (full["error"]["kind"], full["attempts"]) == ("memory", 1) and "not enough memory" in full["error"]["what"]
    assert killed["environment"] == hangs["environment"] == {"told by": "the parent"}
    assert full["environment"].keys() == surroundings(tmp_path).keys() and full["environment"]["storage"]


def test_a_pool_that_is_closed_leaves_no_process(failing_toys):
    pool, step = LocalPool(2), {"kind": "toy", "experiment": experiment(job="toy", model="toy-hangs").to_json()}
    job = pools.WorkerJob("step", "", step={**step, "round": 1})
    running = [pool.start(job, None, ignore, False) for _ in range(2)]
    wait_until(lambda: len(pool._children) == 2, "both jobs start")
    children = [child.pid for child in pool._children]
    pool.close()
    assert not any(map(is_running, children)) and all(each.done() for each in running)


RECIPE = """
from offramp.experiments import Grid
def recipe():
    return Grid(job='toy', model='toy', seed=range({}), rounds=1)
"""


def sweeping(recipe, out, *more):
    words = [sys.executable, "-m", "offramp", "sweep", recipe, "--out", out, "--jobs", "2", *more]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def workers_of(pid):
    """The processes whose parent has ended or is `pid`, and that are workers of this sweep."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.getsid(int(path.parent.name)) == pid and b".experiments." in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(("num_jobs", "num_kills"), [pytest.param(100, 30, marks=pytest.mark.slow), (3, 2)])
def test_kills_lose_and_repeat_nothing(tmp_path, num_jobs, num_kills):
    """The sweep is killed by SIGKILL at random times, and ends up with the records of one that was left alone."""
    recipe, generator = tmp_path / "toys.py", random.Random(num_kills)
    recipe.write_text(RECIPE.format(num_jobs))
    for _ in range(num_kills):
        child = sweeping(recipe, tmp_path / "killed")
        time.sleep(generator.uniform(0.4, 1.2))
        child.kill()
        child.wait()
        wait_until(lambda child=child: not workers_of(child.pid), "a worker is left")
    assert sweeping(recipe, tmp_path / "killed").wait() == 0
    if num_jobs > 3:
        assert sweeping(recipe, tmp_path / "whole").wait() == 0
        assert stable(tmp_path / "killed") == stable(tmp_path / "whole")
        assert report(tmp_path / "killed") == report(tmp_path / "whole"), "byte for byte"
    assert len(json.loads(stable(tmp_path / "killed"))) == num_jobs


def sweeping_toys(model, folder):
    """A sweep, in a session of its own, of four toys that do what their model is named after."""
    recipe = folder / "toys.py"
    recipe.write_text(RECIPE.format(4).replace("'toy', s", f"{model!r}, s"))
    code = (
        "import sys; from offramp.cli import main; from offramp.experiments import children\n"
        "from tests.experiments import toy_worker\n"
        f"children.WORKER = toy_worker.COMMAND\n"
        f"sys.exit(main(['sweep', {str(recipe)!r}, '--out', {str(folder / 'out')!r}]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.DEVNULL, start_new_session=True, env=environment, cwd=folder
    )


def test_a_sweep_that_is_killed_ends_its_rival_in_a_session_of_its_own(tmp_path):
    """Sweep, worker, rival: each ends with its parent."""
    child, told = sweeping_toys("toy-has-a-rival", tmp_path), tmp_path / "rival"
    wait_until(lambda: told.exists() and told.read_text(), "a rival measures")
    rival, workers = int(told.read_text()), workers_of(child.pid)
    assert len(workers) == 1 and os.getsid(rival) == rival and is_running(rival)
    child.kill()
    child.wait()
    wait_until(lambda: not any(map(is_running, [*workers, rival])), "a worker or a rival is left")


def test_an_interrupted_sweep_ends_its_workers(tmp_path):
    child = sweeping_toys("toy-hangs", tmp_path)
    wait_until(lambda: workers_of(child.pid), "a worker starts")
    os.kill(child.pid, signal.SIGINT)
    assert child.wait(30) == 130
    assert not workers_of(child.pid)


def test_a_narrow_experiment_divides_and_its_transcript_is_of_the_narrow_store(tmp_path):
    of = {"model": "m", "data": "glue", "task": "sst2", "exit": "oracle"}
    full, narrow = (
        needs_of(experiment(**of, dtype=dtype), Source("m", "d", True), "rows", tmp_path) for dtype in ("fp32", "int8")
    )
    kinds = [[step.kind for step in needs.steps.values()] for needs in (full, narrow)]
    assert "divide" not in kinds[0] and kinds[1][0] == "divide"
    divided, answering = (
        next(step for step in narrow.steps.values() if step.kind == kind) for kind in ("divide", "transcript")
    )
    assert divided.arguments == {"model": "m", "dtype": "int8"}
    assert answering.arguments["model"] == narrow.store == str(divided.folder / "store")
    assert not {step.name for step in full.steps.values()} & {step.name for step in narrow.steps.values()}


def test_experiments_that_differ_in_their_rounds_share_those_that_both_have(tmp_path):
    both = [*Grid(job="toy", model="toy", rounds=3), *Grid(job="toy", model="toy", rounds=2)]
    plan = plan_sweep(both, tmp_path, [], SweepSettings(), ignore)
    assert [job.number for job in plan.jobs] == [1, 2, 3]


def test_an_invalid_policy_of_random_exits_is_refused_before_anything_is_made(tmp_path):
    each = experiment(model="m", data="glue", task="sst2", exit="random:confidnce:0.9")
    with pytest.raises(UsageError, match="invalid exit policy"):
        needs_of(each, Source("m", "d", True), "rows", tmp_path)


_SOURCE = Source("m", "d", True, num_layers=6, has_head=True, has_exits=False)


@pytest.mark.parametrize("options", [{"exit": exit} for exit in ("patience:1", "stage:2", "oracle", "random:votes:2",
                                                                 "tune:drop=1")] + [{"deadline": "9ms"}])  # fmt: skip
def test_exits_of_a_model_without_exits_are_refused_before_anything_is_made(tmp_path, options):
    each = experiment(model="m", train="t.tsv", **options)
    with pytest.raises(UsageError, match=r"needs exits and the model has none - m - .* the sweep then trains"):
        needs_of(each, _SOURCE, "rows", tmp_path)
    trained = replace(each, training=TrainSettings(loss="last"))
    with pytest.raises(UsageError, match="needs exits, and a training with loss last makes none"):
        needs_of(trained, _SOURCE, "rows", tmp_path)
    for has_exits in (True, None):
        assert needs_of(each, replace(_SOURCE, has_exits=has_exits), "rows", tmp_path).steps
    assert needs_of(replace(each, training=TrainSettings()), _SOURCE, "rows", tmp_path).steps
    assert needs_of(experiment(model="m", train="t.tsv", exit="stage:6"), _SOURCE, "rows", tmp_path).steps


def test_data_for_a_model_without_a_head_are_refused_before_anything_is_made(tmp_path):
    source = replace(_SOURCE, has_head=False)
    with pytest.raises(UsageError, match=r"the model has no classification head - m - .* the sweep then trains"):
        needs_of(experiment(model="m", train="t.tsv"), source, "rows", tmp_path)
    assert needs_of(experiment(model="m", train="t.tsv", loss="pabee"), source, "rows", tmp_path).steps
    assert needs_of(experiment(model="m"), source, None, tmp_path).store == "m"


@pytest.mark.parametrize("wrong", ["models", "data"])
def test_nothing_is_read_after_the_first_model_or_data_that_is_wrong(monkeypatch, wrong):
    seen = []

    def read(given, *more):
        seen.append(given)
        if given == f"wrong {wrong}":
            raise UsageError("x", "y", "z")
        return given

    monkeypatch.setattr(steps, "_identify_model", read)
    monkeypatch.setattr(steps, "_data_digest", read)
    order = ["good models", "wrong models", "more models"], ["good data", "wrong data", "more data"]
    found = steps.take_step({"kind": "identify", "models": order[0], "data": order[1], "offline": True}, ignore)
    assert seen == (order[0][:2] if wrong == "models" else [*order[0], *order[1][:2]])
    assert found[wrong] == [
        f"good {wrong}",
        {"error": {"class": "UsageError", "what": "x", "where": "y", "remedy": "z"}},
    ]


@pytest.mark.parametrize(
    ("options", "what", "where"),
    [
        ("model='none'", "no such folder", "none ({})"),
        ("model='m', dev='none.tsv'", "no such file", "none.tsv ({})"),
        ("model='m', dev='d.tsv', exit='patiense:2'", "'patiense:2' is not a rule", "'patiense:2' ({})"),
        ("model='m', exit='oracle'", "policies leave at other exits on random inputs", "m ({})"),
    ],
)
@pytest.mark.parametrize("call", ["Grid(rounds=1, {})", "experiment({})"])
def test_what_is_wrong_names_the_line_of_the_recipe(in_process, tmp_path, monkeypatch, options, what, where, call):
    """A model or data that are not there, and what the model shows to be wrong."""
    monkeypatch.chdir(tmp_path)
    Path("d.tsv").write_text("sentence\tlabel\na\tx\n")
    lines = ["from offramp.experiments import Grid, experiment", "def recipe():", "    return ["]
    lines += ["        Grid(job='toy', model='toy'),", f"        {call.format(options)}]", ""]
    Path("asked.py").write_text("\n".join(lines))
    if "model='none'" not in options:
        facts = {"folder": "m", "sha256": "d", "is_store": True, "num_layers": 6}
        monkeypatch.setattr(steps, "_identify_model", lambda *given: facts)
    with pytest.raises(OfframpError, match=what) as caught:
        plan_sweep(read_recipe(Path("asked.py")), tmp_path / "out", [], SweepSettings(), ignore)
    assert str(caught.value.where) == where.format("asked.py, line 5")
    assert f" - {caught.value.where}" in str(caught.value)

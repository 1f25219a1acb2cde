"""The exit gate: head, evidence, policy, and which rows leave; whether the rest is gathered or carried on.

What it learns of exits serves to decide how far ahead weights are read. What it learns of times serves to decide
whether to gather (F7 in docs/cost-function.md): that pays if computing the departed rows through the expected further
layers would take longer. Answers do not depend on either: rows that have left are computed but ignored.

Shapes: B remaining rows, P rows of the backend's arrays, C labels.
"""

from __future__ import annotations

import time
from typing import Dict, Mapping, Tuple

import numpy as np

from offramp.errors import NonFiniteError
from offramp.policies import Evidence, Policy
from offramp.runtime.backend import Backend, Weights
from offramp.runtime.guard import Guard
from offramp.runtime.inputs import not_finite
from offramp.runtime.sweep import Answer, BatchRun
from offramp.store import Store

MIN_OBSERVATIONS = 8
"""Number of rows that must have been evaluated at an exit before prefetching may stop there."""
_RATE = 0.2
"""Weight of a new measurement in the exponential moving average."""
_DECAY = 0.98
"""Factor per decision applied to the time of gathering. A shape that was slow once is tried again after some hundred
decisions."""
_STOPPED_FACTOR = 2.0
"""Time that a stopped kernel is taken to need, in deadlines: with the decay of the guard it is tried again after 35
requests."""
Shape = Tuple[int, int]
"""Logarithmic size classes of rows and tokens."""


class ExitGate:
    """Decides after each layer which rows leave with the answer of its exit. Exits are counted from 1."""

    def __init__(
        self, store: Store, backend: Backend, policy: Policy, heads: Mapping[int, Weights], guard: Guard
    ) -> None:
        """`heads` maps an exit to the weights of its head."""
        self.policy, self.guard, program = policy, guard, store.program
        self.num_exits = len(program.layers)
        self.last_exit = policy.last_exit(self.num_exits)
        self.exit_statistics, self.gathering = ExitStatistics(self.num_exits), Gathering()
        self._backend, self._heads, self._where, self._problem = backend, heads, store.path, program.problem
        self._values = [stage.exit for stage in program.stages]

    def ask(self, stage: int, run: BatchRun) -> None:
        """Evaluate what stands after a stage: nothing, an exit, or the program's own output, where all rows leave."""
        if stage > self.num_exits:
            self._answer(run)
        elif stage:
            assert run.state is not None
            self.gathering.record_layer(run.state.num_rows, run.length, run.layer_seconds)
            if self._is_asked(stage):
                self._evaluate(stage, run)
        run.layer_seconds = 0.0

    def note_missed(self, run: BatchRun) -> None:
        """Tell the guard that the weights of the next exit were not there in time."""
        self._tell_guard(run.answer.exit_stage + 1, run, time.perf_counter())

    def note_stopped(self, run: BatchRun) -> None:
        """Tell the guard that a kernel before the next exit was stopped: how long it takes is not known."""
        assert self.guard.deadline_seconds is not None, "kernels are stopped at a deadline"
        seconds = _STOPPED_FACTOR * self.guard.deadline_seconds
        self.guard.record(run.answer.exit_stage + 1, run.length, seconds, seconds)

    def _is_asked(self, exit_index: int) -> bool:
        """Return whether the answer of an exit can matter. Under a deadline any answer is better than none."""
        first = self.policy.first_evidence(self.num_exits)
        if self.policy.earliest_exit(self.num_exits) >= self.num_exits:
            first = self.num_exits
        return (1 if self.guard.needs_every_exit else first) <= exit_index < self.num_exits

    def _evaluate(self, exit_index: int, run: BatchRun) -> None:
        name, value = f"exit {exit_index}", self._values[exit_index]
        assert run.state is not None and value is not None
        head = self._heads[exit_index]
        logits_PC = run.timed(name, exit_index, "head", self._backend.exit_logits, run.state, value, head)
        logits_BC = logits_PC[run.places_B]
        leave_B = run.timed(name, exit_index, "decide", self._decide, exit_index, run, logits_BC)
        leave_B = leave_B | (exit_index == self.last_exit)
        self.exit_statistics.record(exit_index, leave_B)
        if leave_B.any():
            run.leave(logits_BC, leave_B, exit_index)
        self._check_deadline(exit_index, run, logits_BC[~leave_B])
        if 0 < len(run.rows_B) < run.state.num_rows:
            self._gather(exit_index, run)

    def _decide(self, exit_index: int, run: BatchRun, logits_BC: np.ndarray) -> np.ndarray:
        """Return which rows the policy lets leave, bool [B]."""
        assert self._problem is not None
        finite_BC = self._finite(logits_BC, f"exit {exit_index}", run)
        return run.decider.update(exit_index, Evidence.from_logits(finite_BC, self._problem, run.lengths_B))

    def _check_deadline(self, exit_index: int, run: BatchRun, logits_BC: np.ndarray) -> None:
        """Keep the answer of the remaining rows; let them leave with it if the next exit would be too late."""
        now = time.perf_counter()
        self._tell_guard(exit_index, run, now)
        run.answer = Answer(exit_index, logits_BC, now, run.compute_seconds)
        if self.guard.deadline_seconds is not None and run.state is not None:
            run.state.latest = run.began + self.guard.deadline_seconds
        if len(logits_BC) and not self.guard.allows_next_exit(exit_index, run.length, now - run.began):
            run.cut()

    def _tell_guard(self, exit_index: int, run: BatchRun, now: float) -> None:
        """Report how long it took from the previous answer to exit `exit_index`."""
        seconds, compute_seconds = now - run.answer.seconds, run.compute_seconds - run.answer.compute_seconds
        self.guard.record(exit_index, run.length, seconds, compute_seconds)

    def _gather(self, exit_index: int, run: BatchRun) -> None:
        """Take rows that have left out of the backend's arrays, if carrying them on would cost more."""
        assert run.state is not None
        num_kept, before = len(run.rows_B), run.compute_seconds
        num_layers = self.exit_statistics.expected_layers(exit_index, self.last_exit, num_kept)
        if not self.gathering.pays(run.state.num_rows, num_kept, run.length, num_layers):
            return
        run.timed(f"exit {exit_index}", exit_index, "gather", self._backend.keep, run.state, run.places_B)
        run.places_B = np.arange(num_kept)
        self.gathering.record_gathering(num_kept, run.length, run.compute_seconds - before)

    def _answer(self, run: BatchRun) -> None:
        """Let all remaining rows leave with the program's own output."""
        logits_PC = run.timed("head", self.num_exits + 1, "head", self._backend.logits, run.state)
        logits_BC = self._finite(logits_PC[run.places_B], "head", run)
        self._tell_guard(self.num_exits, run, time.perf_counter())
        run.leave(logits_BC, np.ones(len(logits_BC), bool), self.num_exits)

    def _finite(self, logits_BC: np.ndarray, name: str, run: BatchRun) -> np.ndarray:
        is_finite_B = np.isfinite(logits_BC).all(axis=1)
        if is_finite_B.all():
            return logits_BC
        what = f"{name} gave NaN or infinite logits"
        reason = not_finite(run.batch.arrays, run.rows_B[~is_finite_B].tolist())
        if reason is not None:
            raise NonFiniteError(f"{reason}, so that {what}", None, "replace these numbers, or leave out the input")
        raise NonFiniteError(what, self._where, "the weights are broken: train or convert the model again")


class ExitStatistics:
    """Counts of rows evaluated and rows that left, by exit: an estimate of how likely rows leave, as if independent."""

    def __init__(self, num_exits: int) -> None:
        self.evaluated, self.exited = np.zeros(num_exits + 1, np.int64), np.zeros(num_exits + 1, np.int64)

    def record(self, exit_index: int, leave_B: np.ndarray) -> None:
        """Add one batch evaluated at `exit_index`; `leave_B` marks the rows that exit."""
        self.evaluated[exit_index] += len(leave_B)
        self.exited[exit_index] += int(leave_B.sum())

    def likely_empties(self, exit_index: int, num_rows: int) -> bool:
        """Return whether all `num_rows` rows exit at `exit_index` with estimated probability above 0.5."""
        evaluated = self.evaluated[exit_index]
        return bool(evaluated >= MIN_OBSERVATIONS and 2 * (self.exited[exit_index] / evaluated) ** num_rows > 1)

    def expected_layers(self, exit_index: int, last_exit: int, num_rows: int) -> float:
        """Return the expected number of further layers that a batch of `num_rows` rows executes after `exit_index`.

        A batch executes a layer while at least one of its rows remains.
        """
        layers, remaining = 0.0, 1.0
        for index in range(exit_index + 1, last_exit + 1):
            layers += 1 - (1 - remaining) ** num_rows
            if self.evaluated[index]:
                remaining *= 1 - float(self.exited[index] / self.evaluated[index])
        return layers


class Gathering:
    """Learned times of layers and of gathering. Shapes in the same size class share their measurements."""

    def __init__(self) -> None:
        self._row_seconds: Dict[Shape, float] = {}
        self._gather_seconds: Dict[Shape, float] = {}
        self.always = False
        """Gather regardless of the estimate, to measure the cost of gathering."""

    def record_layer(self, num_rows: int, length: int, seconds: float) -> None:
        """Record the seconds of one layer for `num_rows` rows, including rows that have left."""
        _update_mean(self._row_seconds, _shape(num_rows, length), seconds / num_rows)

    def record_gathering(self, num_kept: int, length: int, seconds: float) -> None:
        """Record the seconds of gathering `num_kept` rows."""
        _update_mean(self._gather_seconds, _shape(num_kept, length), seconds)

    def pays(self, num_rows: int, num_kept: int, length: int, num_layers: float) -> bool:
        """Return whether to gather `num_kept` rows of a batch that is expected to execute `num_layers` further layers.

        Shapes without measurements return True.
        """
        here, kept = _shape(num_rows, length), _shape(num_kept, length)
        if self.always or here not in self._row_seconds or kept not in self._gather_seconds:
            return True
        if (num_rows - num_kept) * self._row_seconds[here] * num_layers > self._gather_seconds[kept]:
            return True
        self._gather_seconds[kept] *= _DECAY
        return False


def _shape(num_rows: int, length: int) -> Shape:
    return num_rows.bit_length(), length.bit_length()


def _update_mean(means: Dict[Shape, float], shape: Shape, seconds: float) -> None:
    before = means.get(shape, seconds)
    means[shape] = before + _RATE * (seconds - before)

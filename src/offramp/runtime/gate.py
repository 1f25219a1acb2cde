"""The exit gate: head, evidence, policy, and which rows leave; whether the rest is gathered or carried on.

Shapes: B remaining rows, P rows of the backend's arrays, C labels.
"""

from __future__ import annotations

import time
from typing import Mapping

import numpy as np

from offramp.errors import NonFiniteError
from offramp.policies import Evidence, Policy
from offramp.program.program import Program
from offramp.runtime.backend import Backend, Weights
from offramp.runtime.gathering import Gathering
from offramp.runtime.guard import Guard
from offramp.runtime.survival import ExitStatistics
from offramp.runtime.sweep import Answer, BatchRun


class ExitGate:
    """Decides after each layer which rows leave with the answer of its exit. Exits are counted from 1."""

    def __init__(
        self,
        program: Program,
        backend: Backend,
        policy: Policy,
        heads: Mapping[int, Weights],
        guard: Guard,
        where: object,
    ) -> None:
        """`heads` maps an exit to the weights of its head; `where` is the store that errors name."""
        self.policy, self.guard = policy, guard
        self.num_exits = len(program.layers)
        self.last_exit = policy.last_exit(self.num_exits)
        self.exit_statistics, self.gathering = ExitStatistics(self.num_exits), Gathering()
        self._backend, self._heads, self._where, self._problem = backend, heads, where, program.problem
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
        assert run.answer is not None
        self._tell_guard(run.answer.exit_stage + 1, run, time.perf_counter())

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
        finite_BC = self._finite(logits_BC, f"exit {exit_index}")
        return run.decider.update(exit_index, Evidence.from_logits(finite_BC, self._problem, run.lengths_B))

    def _check_deadline(self, exit_index: int, run: BatchRun, logits_BC: np.ndarray) -> None:
        """Keep the answer of the remaining rows; let them leave with it if the next exit would be too late."""
        now = time.perf_counter()
        self._tell_guard(exit_index, run, now)
        run.answer = Answer(exit_index, logits_BC, now, run.compute_seconds)
        if len(logits_BC) and not self.guard.allows_next_exit(exit_index, run.length, now - run.began):
            run.cut()

    def _tell_guard(self, exit_index: int, run: BatchRun, now: float) -> None:
        """Report how long it took from the previous answer to exit `exit_index`."""
        before, computed = (run.began, 0.0)
        if run.answer is not None:
            before, computed = run.answer.seconds, run.answer.compute_seconds
        self.guard.record(exit_index, run.length, now - before, run.compute_seconds - computed)

    def _gather(self, exit_index: int, run: BatchRun) -> None:
        """Take rows that have left out of the backend's arrays, if carrying them on would cost more."""
        assert run.state is not None
        num_kept, before = len(run.rows_B), run.compute_seconds
        num_layers = self.exit_statistics.expected_layers(exit_index, self.last_exit, num_kept)
        if not self.gathering.pays(run.state.num_rows, num_kept, run.length, num_layers):
            return
        name = f"exit {exit_index}"
        run.timed(name, exit_index, "gather", self._backend.keep, run.state, run.remaining_P())
        run.mark_gathered()
        self.gathering.record_gathering(num_kept, run.length, run.compute_seconds - before)

    def _answer(self, run: BatchRun) -> None:
        """Let all remaining rows leave with the program's own output."""
        logits_PC = run.timed("head", self.num_exits + 1, "head", self._backend.logits, run.state)
        logits_BC = self._finite(logits_PC[run.places_B], "head")
        self._tell_guard(self.num_exits, run, time.perf_counter())
        run.leave(logits_BC, np.ones(len(logits_BC), bool), self.num_exits)

    def _finite(self, logits_BC: np.ndarray, name: str) -> np.ndarray:
        if not np.isfinite(logits_BC).all():
            what, remedy = (
                f"{name} gave NaN or infinite logits",
                "the weights are broken: train or convert the model again",
            )
            raise NonFiniteError(what, self._where, remedy)
        return logits_BC

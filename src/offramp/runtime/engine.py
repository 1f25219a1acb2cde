"""The engine: for each stage acquire weights, run its steps, release; at an exit ask the gate; stop at the last row.

It is independent of texts, files and devices. Several batches may share a sweep over the weights: each shard is in
memory once and serves one batch after another, while only the values between steps are kept for the others.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Deque, List, Optional, Sequence

from offramp.measure import Span
from offramp.program.inputs import Batch
from offramp.program.program import END, LAYER, Step
from offramp.runtime.backend import Backend, State, StoppedError, Weights
from offramp.runtime.feed import WeightFeed
from offramp.runtime.gate import ExitGate
from offramp.runtime.inputs import InputReader
from offramp.runtime.ring import Turn
from offramp.runtime.schedule import Group, Schedule, shards_of
from offramp.runtime.sweep import BatchRun, Outcome, PassCost, Sweep


class _LateError(Exception):
    """The deadline passed while weights were read or a kernel ran, and there is an answer to give."""


class Engine:
    """Runs batches through the stages of a program."""

    def __init__(
        self, schedule: Schedule, inputs: InputReader, backend: Backend, gate: ExitGate, feed: WeightFeed
    ) -> None:
        self.schedule, self.inputs, self.backend, self.gate, self.feed = schedule, inputs, backend, gate, feed
        self.costs: Deque[PassCost] = deque(maxlen=4096)
        """Costs of the last sweeps, the oldest first."""

    def sweep(self, batches: Sequence[Batch], *, more: bool = False, began: Optional[float] = None) -> List[Outcome]:
        """Run batches through one sweep over the weights. Return one outcome a row, batch after batch.

        Args:
            batches: several of them only without a deadline, and with slots for all shards of joined steps.
            more: other batches will follow, so read their first shards when these are done.
            began: start of the request, which a deadline counts from; None: now.
        """
        started = time.perf_counter()
        began = started if began is None else began
        sweep = Sweep([self._start(batch, began) for batch in batches if batch.num_rows])
        assert len(sweep.runs) <= 1 or not self.gate.guard.needs_every_exit, "a deadline is for one batch"
        self.gate.guard.begin()
        if not sweep.runs:
            return []
        if len(sweep.runs) > 1:  # some of its steps are joined
            self.feed.require_slots(self.schedule.most_shards_together(len(sweep.runs), self.feed.residents))
        self.feed.begin_pass(self.turns(sweep.num_rows))
        try:
            self._run(sweep)
        except _LateError:
            sweep.runs[0].cut()
        finally:
            self.feed.end_pass(self.turns(sweep.num_rows) if more and not sweep.live else ())
        self.feed.count_charged(sum(outcome.bytes_read for outcome in sweep.outcomes))
        seconds, compute_seconds = time.perf_counter() - started, sum(run.compute_seconds for run in sweep.runs)
        self.costs.append(PassCost(seconds, compute_seconds, sweep.read_seconds, sweep.fill_seconds))
        return sweep.outcomes

    def _run(self, sweep: Sweep) -> None:
        self._begin(sweep, sweep.runs[0])  # its rows are gathered while the first weights are read
        for index in range(len(self.schedule.stages)):
            for steps in self.schedule.groups(index, len(sweep.live)):
                weights = [self._acquire(step, sweep) for step in steps]
                for run in sweep.live:
                    state = run.state or self._begin(sweep, run)
                    self._compute(index, steps, weights, run, state)
                    if len(sweep.live) > 1:
                        self.backend.set_aside(state)
                self._release(steps)
            for run in sweep.live:
                self.gate.ask(index, run)
            if not sweep.live:
                return
            self.feed.continue_past(index)

    def turns(self, num_rows: int) -> List[Turn]:
        """Return the reads of a pass of `num_rows` rows, in order."""
        return self.schedule.turns(lambda exit_index: self.gate.exit_statistics.likely_empties(exit_index, num_rows))

    def close(self) -> None:
        """Stop the reader and free the backend."""
        self.feed.close()
        self.backend.close()

    def _start(self, batch: Batch, began: float) -> BatchRun:
        decider = self.gate.policy.start(batch.num_rows, self.schedule.num_exits)
        return BatchRun(batch, decider, began, self.feed.trace, self.feed.pass_index)

    def _begin(self, sweep: Sweep, run: BatchRun) -> State:
        """Read the inputs of a batch and hand them to the backend."""
        started = time.perf_counter()
        shape = (run.batch.num_rows, run.length)
        self.backend.prepare(*shape)
        arrays, num_bytes = self.inputs.read(run.batch, self.backend.allocate)
        ended = time.perf_counter()
        if num_bytes:
            self.feed.trace.add(Span("rows", 0, "read", started, ended, num_bytes, "loop", run.pass_index))
            sweep.read_seconds += ended - started
            sweep.fill_seconds += ended - started
            self.feed.count_read(num_bytes)
            run.charge(num_bytes)
        name = self.schedule.stages[0].name
        state: State = run.timed(name, 0, "compute", self.backend.begin, arrays, self.inputs.mask(run.batch), shape)
        run.state = state
        return state

    def _acquire(self, step: Step, sweep: Sweep) -> Weights:
        """Wait for the shards of a step and charge them to the rows. Return its weights by kernel input."""
        slots = {}
        for shard in shards_of(step):
            loaded = self.feed.acquire(shard, self._wait_until(sweep))
            if loaded is None:
                self.gate.note_missed(sweep.runs[0])
                raise _LateError
            sweep.charge(loaded)
            slots[shard] = loaded.slot
        return self.feed.views(step, slots)

    def _wait_until(self, sweep: Sweep) -> Optional[float]:
        """Return the time at which to stop waiting for weights, or None without a deadline or an answer to give."""
        run, answered = sweep.runs[0], sweep.runs[0].answer.exit_stage
        latest = self.gate.guard.latest_seconds(answered, run.length) if answered else None
        return None if latest is None else run.began + latest

    def _compute(self, index: int, steps: Group, weights: Sequence[Weights], run: BatchRun, state: State) -> None:
        """Run the steps of a group for one batch."""
        stage, before = self.schedule.stages[index], run.compute_seconds
        kind = "head" if stage.role == END else "compute"
        for step, arrays in zip(steps, weights):
            name = f"{stage.name} {step.kernel}" if stage.role == LAYER else stage.name
            try:
                run.timed(name, index, kind, self.backend.run, state, step, arrays)
            except StoppedError:
                self.gate.note_stopped(run)
                raise _LateError from None
        run.layer_seconds += run.compute_seconds - before

    def _release(self, steps: Group) -> None:
        for step in steps:
            for shard in shards_of(step):
                self.feed.release(shard)

"""The loop: acquire, step, release, ask the exits, let rows leave; the whole engine is `Loop.sweep`.

It knows nothing of texts, files or devices. Several batches may share a sweep of the weights: each shard is there once,
and serves one batch after another, of which only hidden states are kept meanwhile.

Shapes: B rows still in the batch, P rows of the backend's arrays (some may have left), S tokens, T = P S, C labels.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Callable, Deque, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from offramp.errors import NonFiniteError
from offramp.measure import Trace
from offramp.policies import Evidence, Policy
from offramp.runtime.backend import Backend, State
from offramp.runtime.course import Batch, course_of
from offramp.runtime.gathering import Gathering
from offramp.runtime.guard import DeadlineGuard
from offramp.runtime.passes import Answer, Outcome, Pass, PassCost
from offramp.runtime.ring import Ring, Turn
from offramp.runtime.slots import EqualSlots, Slot
from offramp.runtime.survival import ExitStatistics
from offramp.store import Stage, Step, Store
from offramp.store.reader import tensor_view

Live = Tuple[Pass, State]
"""A batch of the sweep under way, some of whose rows are still there."""


class _LateError(Exception):
    """The deadline came while the loop waited for weights, and there is an answer to give."""


class Loop:
    """Runs batches through the stages of a store. `exits` maps an exit (1 .. n-1) to the weights of its head."""

    def __init__(
        self,
        store: Store,
        backend: Backend,
        policy: Policy,
        exits: Mapping[int, Mapping[str, np.ndarray]],
        trace: Trace,
        guard: Optional[DeadlineGuard] = None,
    ) -> None:
        self.store, self.backend, self.policy, self.exits, self.trace = store, backend, policy, exits, trace
        self.guard = guard
        self.course = course_of(store)
        self.layers: Tuple[Stage, ...] = self.course.layers
        num_exits = len(self.layers)
        self._last = policy.last_exit(num_exits)
        # under a deadline any answer is better than none
        self._early = policy.earliest_exit(num_exits) < num_exits if guard is None else num_exits > 1
        self.exit_statistics, self.gathering = ExitStatistics(num_exits), Gathering()
        self._pass_index = 0
        self._passes: List[Pass] = []
        self._pass: Optional[Pass] = None
        self.ring: Optional[Ring] = None
        self.stage_of = {
            shard: index for index, stage in enumerate(self.stages()) for step in stage.steps for shard in step.shards
        }
        self.costs: Deque[PassCost] = deque(maxlen=4096)

    def connect(self, slots: Sequence[Slot], residents: Dict[str, Slot], *, direct: bool) -> None:
        """Start the reader, once the plan has said where shards go."""

        def read(shard, view, cancelled):
            return self.store.read_shard(shard, view, direct=direct, cancelled=cancelled)

        self.ring = Ring(read, EqualSlots(slots), residents, depth=len(slots) or 2, on_read=self._on_read)

    def close(self) -> None:
        """Stop the reader and free the backend."""
        if self.ring is not None:
            self.ring.close()
        self.backend.close()

    @property
    def last_pass(self) -> int:
        """Index of the pass that was run last, as the trace has it."""
        return self._pass_index - 1

    def turns(self, num_rows: int) -> List[Turn]:
        """The shards of a pass in order, gated where it is more likely than not that all rows leave."""
        turns, after = [], 0
        for index, stage in enumerate(self.stages()):
            if index > 1 and self.exit_statistics.likely_empties(index - 1, num_rows):
                after = index - 1
            turns += [Turn(shard, after) for step in stage.steps for shard in self.loads(step)]
        return turns

    def rehearse(self, num_rows: int, length: int) -> None:
        """Go through the motions of a pass over [B, S] tokens without weights.

        Code and heap are then as a pass leaves them.
        """
        blank = self.course.blank(num_rows, length)
        if blank is not None:
            self.course.read(blank)
        self.backend.rehearse(num_rows, length)

    def sweep(self, batches: Sequence[Batch], *, more: bool = False, began: Optional[float] = None) -> List[Outcome]:
        """Run one batch, or several through one sweep of the weights; an outcome a row, batch after batch.

        `more`: other batches will follow, so fetch their first shards when these are done. `began`: when the request
        did, for a deadline, which is for one batch alone; now, if None.
        """
        started, batches = time.perf_counter(), [batch for batch in batches if batch.shape[0]]
        if not batches:
            return []
        assert self.ring is not None and (self.guard is None or len(batches) == 1)
        num_rows = sum(batch.shape[0] for batch in batches)
        self._passes = [self._start(batch, started if began is None else began) for batch in batches]
        self._pass = self._passes[0]
        if self.guard is not None:
            self.guard.begin()
        finished = False
        self.ring.begin_pass(self.turns(num_rows))
        try:
            self._go(batches)
            finished = True
        except _LateError:
            self._pass.cut()
            finished = True
        finally:
            self.ring.end_pass(self.turns(num_rows) if more and finished else ())
            passes, self._passes, self._pass, self._pass_index = self._passes, [], None, self._pass_index + 1
        outcomes = [outcome for this in passes for outcome in this.outcomes]
        self.ring.add_bytes_used(sum(outcome.bytes_read for outcome in outcomes))
        taken = [(this.compute_seconds, this.read_seconds, this.fill_seconds) for this in passes]
        self.costs.append(PassCost(time.perf_counter() - started, *map(sum, zip(*taken))))
        return outcomes

    def _start(self, batch: Batch, began: float) -> Pass:
        num_rows, length = batch.shape
        decider = self.policy.start(num_rows, len(self.layers))
        return Pass(
            [Outcome() for _ in range(num_rows)], np.arange(num_rows), batch.lengths_B, decider, began, length
        )  # fmt: skip

    def _go(self, batches: Sequence[Batch]) -> None:
        assert self.ring is not None
        live = self._begin(batches)
        for index, stage in enumerate(self.layers[: self._last], start=1):
            self._run_layer(index, stage, live)
            for this, state in live:
                self._pass = this
                self._leave_early(index, state)
            live = [(this, state) for this, state in live if len(this.rows_B)]
            if not live:
                return
            self.ring.continue_past(index)
        self._run_head(live)

    def stages(self) -> Tuple[Stage, ...]:
        """The stages that a pass can come to."""
        head = self.course.head if self._last == len(self.layers) else None
        return (self.course.first, *self.layers[: self._last], *(() if head is None else (head,)))

    def loads(self, step: Step) -> List[str]:
        """The shards that a step has in memory at once, each named once. Rows of the others are gathered."""
        return [shard for shard in dict.fromkeys(step.shards) if not self.course.is_gathered(shard)]

    def at_once(self, stage: Stage, num_batches: int) -> List[Tuple[Step, ...]]:
        """The steps of a stage whose weights are there together: one after another, but where several batches share a
        sweep and what a step leaves behind is more than hidden states.
        """
        groups: List[Tuple[Step, ...]] = []
        for step in stage.steps:
            goes_on = groups and num_batches > 1 and groups[-1][-1].kind in self.backend.unsettled
            groups[len(groups) - bool(goes_on) :] = [(*groups[-1], step) if goes_on else (step,)]
        return groups

    def _begin(self, batches: Sequence[Batch]) -> List[Live]:
        steps, live, weights = self.course.first.steps, [], None
        for this, batch in zip(self._passes, batches):
            self._pass = this
            rows = self._read_rows(batch)
            if weights is None:
                weights = self._acquire(*steps)
            state = self._timed("embedding", 0, "compute", self.backend.begin, rows, batch.mask_BS, weights)
            del rows  # before those of the next batch are there
            live.append((this, state))
        self._release(*steps)
        return live

    def _read_rows(self, batch: Batch) -> Mapping[str, np.ndarray]:
        started = time.perf_counter()
        rows, num_bytes = self.course.read(batch)
        ended = time.perf_counter()
        assert self._pass is not None and self.ring is not None
        if num_bytes:
            self.trace.add("rows", 0, "read", started, ended, num_bytes, "loop", self._pass_index)
            self._pass.read_seconds += ended - started
            self._pass.fill_seconds += ended - started
            self.ring.add_bytes_read(num_bytes)
            self._pass.charge(num_bytes)
        return rows

    def _run_layer(self, index: int, stage: Stage, live: Sequence[Live]) -> None:
        before = [this.compute_seconds for this, _ in live]
        for steps in self.at_once(stage, len(live)):
            weights = [self._acquire(step) for step in steps]
            for this, state in live:
                self._pass = this
                for step, of_step in zip(steps, weights):
                    name = f"{stage.name} {step.kind}"
                    self._timed(name, index, "compute", self.backend.step, state, step.kind, of_step)
            self._release(*steps)
        for (this, state), seconds in zip(live, before):
            self.gathering.record_layer(state.num_rows, this.length, this.compute_seconds - seconds)

    def _leave_early(self, index: int, state: State) -> None:
        """Ask the exit after layer `index`, if its answer can matter, and let rows go."""
        num_exits = len(self.layers)
        final = index == self._last < num_exits
        first = 1 if self.guard is not None else self.policy.first_evidence(num_exits)
        if not (self._early and first <= index < num_exits):
            return
        this, problem = self._pass, self.course.problem
        assert this is not None and problem is not None
        logits_PC = self._timed(f"exit {index}", index, "head", self.backend.exit_logits, state, self.exits[index])
        logits_BC = logits_PC[this.places_B]
        leave_B = self._timed(f"exit {index}", index, "decide", self._decide, index, logits_BC, problem) | final
        self.exit_statistics.record(index, leave_B)
        if leave_B.any():
            this.leave(logits_BC, leave_B, index)
        if self.guard is not None:
            self._mind_the_deadline(index, logits_BC[~leave_B])
        if 0 < len(this.rows_B) < state.num_rows:
            self._gather_rows(index, state)

    def _gather_rows(self, index: int, state: State) -> None:
        """Take those that have left out of the backend's arrays, if to carry them on would cost more."""
        this = self._pass
        assert this is not None
        num_kept, before = len(this.rows_B), this.compute_seconds
        num_layers = self.exit_statistics.expected_layers(index, self._last, num_kept)
        if not self.gathering.pays(state.num_rows, num_kept, this.length, num_layers):
            return
        self._timed(f"exit {index}", index, "gather", self.backend.keep, state, this.stay_P(state.num_rows))
        this.gathered()
        self.gathering.record_gathering(num_kept, this.length, this.compute_seconds - before)

    def _decide(self, index: int, logits_BC: np.ndarray, problem: str) -> np.ndarray:
        """Whom the policy lets go, [B]."""
        this = self._pass
        assert this is not None
        evidence = Evidence.from_logits(self._finite(logits_BC, f"exit {index}"), problem, this.lengths_B)
        return this.decider.update(index, evidence)

    def _mind_the_deadline(self, index: int, logits_BC: np.ndarray) -> None:
        """Remember what exit `index` said of who is still here; let them go if there is no time for the next exit."""
        this, guard, now = self._pass, self.guard, time.perf_counter()
        assert this is not None and guard is not None
        self._tell_guard(index, now)
        this.answer = Answer(index, logits_BC, now, this.compute_seconds)
        if len(logits_BC) and not guard.allows_next_exit(index, this.length, now - this.began):
            this.cut()

    def _tell_guard(self, index: int, now: float) -> None:
        """How long it took from the answer before to exit `index`."""
        this, guard = self._pass, self.guard
        assert this is not None and guard is not None
        before, computed = (
            (this.began, 0.0) if this.answer is None else (this.answer.seconds, this.answer.compute_seconds)
        )
        guard.record(index, this.length, now - before, this.compute_seconds - computed)

    def _run_head(self, live: Sequence[Live]) -> None:
        assert self.course.head is not None
        steps = self.course.head.steps
        weights = self._acquire(*steps)
        for this, state in live:
            self._pass = this
            logits_PC = self._timed("head", len(self.layers) + 1, "head", self.backend.head_logits, state, weights)
            logits_BC = self._finite(logits_PC[this.places_B], "head")
            if self.guard is not None:
                self._tell_guard(len(self.layers), time.perf_counter())
            this.leave(logits_BC, np.ones(len(logits_BC), bool), len(self.layers))
        self._release(*steps)

    def _finite(self, logits_BC: np.ndarray, stage: str) -> np.ndarray:
        if not np.isfinite(logits_BC).all():
            raise NonFiniteError(
                f"{stage} gave NaN or infinite logits",
                self.store.path,
                "the weights are broken: train or convert the model again",
            )
        return logits_BC

    def _acquire(self, *steps: Step) -> Dict[str, np.ndarray]:
        """Views of the tensors of the shards of one step, or of none, by role; waits for their reads and charges them
        to the rows.
        """
        weights: Dict[str, np.ndarray] = {}
        assert self.ring is not None and self._pass is not None
        for name in [name for step in steps for name in self.loads(step)]:
            started = time.perf_counter()
            acquired = self.ring.acquire(name, self._latest())
            ended = time.perf_counter()
            if acquired is None:
                answer = self._pass.answer
                assert answer is not None
                self._tell_guard(answer.exit_stage + 1, ended)
                raise _LateError
            slot, num_bytes, seconds = acquired
            self.trace.add(name, self.stage_of[name], "wait", started, ended, num_bytes, "loop", self._pass_index)
            self._charge(num_bytes)
            self._passes[0].time_read(seconds, ended - started)
            shard = self.store.contents.shards[name]
            weights.update(
                (
                    tensor.role if shard.blocks is None else tensor.name,
                    tensor_view(tensor, slot.array, shard.data_start),
                )
                for tensor in shard.tensors  # a table that a module takes as a whole has no role of its own
            )
        return weights

    def _charge(self, num_bytes: int) -> None:
        """Share the bytes of a read equally among all rows of the sweep that are still there."""
        live = [this for this in self._passes if len(this.rows_B)]
        num_rows = sum(len(this.rows_B) for this in live)
        for this in live:
            own = num_bytes * len(this.rows_B) // num_rows
            this.charge(own)
            num_bytes, num_rows = num_bytes - own, num_rows - len(this.rows_B)

    def _latest(self) -> Optional[float]:
        """Until when weights are waited for; None: as long as it takes, there is no deadline or no answer yet."""
        this = self._pass
        assert this is not None
        if self.guard is None or this.answer is None:
            return None
        return this.began + self.guard.latest_seconds(this.answer.exit_stage, this.length)

    def _release(self, *steps: Step) -> None:
        assert self.ring is not None
        for name in [name for step in steps for name in self.loads(step)]:
            self.ring.release(name)

    def _timed(self, name: str, stage: int, kind: str, act: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        result = act(*arguments)
        ended = time.perf_counter()
        self.trace.add(name, stage, kind, started, ended, 0, "loop", self._pass_index)
        assert self._pass is not None
        self._pass.compute_seconds += ended - started
        return result

    def _on_read(self, shard: str, started: float, ended: float, num_bytes: int, idle: bool) -> None:
        """Called in the reader thread."""
        kind = "idle_read" if idle else "read"
        self.trace.add(shard, self.stage_of.get(shard, 0), kind, started, ended, num_bytes, "reader", self._pass_index)

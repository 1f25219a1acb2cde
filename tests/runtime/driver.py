"""What the tests of this room share: toy stores written once, the toy computed without ring or engine, waiting."""

from __future__ import annotations

import time
import weakref
from functools import cache

import numpy as np
from hypothesis import strategies as st

from offramp.policies import Evidence, parse
from offramp.runtime.exits import load_exits
from offramp.runtime.inputs import InputReader
from offramp.runtime.slots import Slot
from offramp.store import Store
from offramp.store.reader import tensor_view
from tests.toy import ToyBackend, ToyTextEncoder, write_toy

texts = st.text("abcdefghijkl", max_size=12)
batches = st.lists(texts, min_size=1, max_size=5)


class Shelf:
    """Writes each toy once, opens it as often as it is asked for."""

    def __init__(self, folder):
        self.folder, self.paths, self._opened = folder, {}, weakref.WeakSet()

    def open(self, toy, verify="never"):
        if toy not in self.paths:
            self.paths[toy] = self.folder / str(len(self.paths))
            write_toy(self.paths[toy], toy).close()
        store = Store(self.paths[toy], verify)
        self._opened.add(store)
        return store

    def close(self):
        """Close the stores that live on, such as those of the traceback of a caught error."""
        for store in self._opened:
            store.close()


def eventually(condition):
    """Wait for what the reader will do on its own; a deadlock ends it (conftest)."""
    while not condition():
        time.sleep(0.0005)


def encode(rows):
    return ToyTextEncoder().encode(rows)


def answers(outcomes):
    """(exit, logits) of each row, bit for bit."""
    return [(outcome.exit_stage, outcome.logits_C.tobytes()) for outcome in outcomes]


def expected(store, rows, policy):
    """The same by plain code: each row alone, through the whole model, then out where the policy says."""
    return [_answer_alone(store.path, row, policy) for row in rows]


@cache
def _answer_alone(path, row, policy_text):
    store, policy = Store(path, "never"), parse(policy_text)
    logits_KC = logits_alone(path, row)
    num_exits, problem = len(store.program.layers), store.program.problem
    if policy.earliest_exit(num_exits) < num_exits:
        decider = policy.start(1, num_exits)
        for index in range(policy.first_evidence(num_exits), num_exits):
            if decider.update(index, Evidence.from_logits(logits_KC[index - 1][np.newaxis], problem))[0]:
                return index, logits_KC[index - 1].tobytes()
    return num_exits, logits_KC[-1].tobytes()


@cache
def logits_alone(path, row):
    """Logits of every exit, the head's last."""
    with Store(path, "never") as store:
        backend, batch, inputs = ToyBackend(), encode([row]), InputReader(store)
        exits = load_exits(store, parse("stage:1")) if store.manifest.exits else {}
        state = backend.begin(inputs.read(batch)[0], inputs.mask(batch), (1, batch.length))
        logits = []
        for index, stage in enumerate(store.program.stages):
            for step in stage.steps:
                backend.run(state, step, _weights(store, step))
            if stage.exit is not None and exits:
                logits.append(backend.exit_logits(state, stage.exit, exits[index])[0])
        return (*logits, backend.logits(state)[0])


def _weights(store, step):
    weights, tensors = {}, store.manifest.tensors()
    for role, tensor_name in step.weights.items():
        shard, tensor = tensors[tensor_name]
        slot = Slot(shard.bytes)
        store.read_shard(shard.name, slot.view)
        weights[role] = tensor_view(tensor, slot.array, shard.data_start)
    return weights

"""What the tests of this room share: toy stores written once, the toy computed without ring or loop, waiting."""

from __future__ import annotations

import time
from functools import cache

import numpy as np
from hypothesis import strategies as st

from offramp.policies import Evidence, parse
from offramp.program.program import TEXT_INPUTS
from offramp.runtime.course import Tokens, course_of
from offramp.runtime.exits import load_exits
from offramp.runtime.slots import Slot
from offramp.store import Store
from offramp.store.reader import tensor_view
from tests.toy import ToyBackend, ToyTextEncoder, write_toy

texts = st.text("abcdefghijkl", max_size=12)
batches = st.lists(texts, min_size=1, max_size=5)


class Shelf:
    """Writes each toy once, opens it as often as it is asked for."""

    def __init__(self, folder):
        self.folder, self.paths = folder, {}

    def open(self, toy, verify="never"):
        if toy not in self.paths:
            self.paths[toy] = self.folder / str(len(self.paths))
            write_toy(self.paths[toy], toy).close()
        return Store(self.paths[toy], verify)


def eventually(condition):
    """Wait for what the reader will do on its own; a deadlock ends it (conftest)."""
    while not condition():
        time.sleep(0.0005)


def encode(rows):
    batch = ToyTextEncoder().encode(rows)
    return Tokens(*(batch.arrays[name] for name in TEXT_INPUTS))


def answers(outcomes):
    """(exit, logits) of each row, bit for bit."""
    return [(outcome.exit_stage, outcome.logits_C.tobytes()) for outcome in outcomes]


def expected(store, rows, policy):
    """The same by plain code: each row alone, through the whole model, then out where the policy says."""
    return [_answer_alone(store.path, row, policy) for row in rows]


@cache
def _answer_alone(path, row, policy_text):
    store, policy = Store(path, "never"), parse(policy_text)
    logits_KC = _logits_alone(path, row)
    num_exits, problem = store.manifest.encoder.num_layers, store.manifest.encoder.problem
    if policy.earliest_exit(num_exits) < num_exits:
        decider = policy.start(1, num_exits)
        for index in range(policy.first_evidence(num_exits), num_exits):
            if decider.update(index, Evidence.from_logits(logits_KC[index - 1][np.newaxis], problem))[0]:
                return index, logits_KC[index - 1].tobytes()
    return num_exits, logits_KC[-1].tobytes()


@cache
def _logits_alone(path, row):
    """Logits of every exit, the head's last."""
    with Store(path, "never") as store:
        backend, batch, encoder = ToyBackend(), encode([row]), store.manifest.encoder
        exits = load_exits(store, course_of(store), parse("stage:1")) if store.manifest.exits else {}
        indices = {"word": batch.ids_BS[0], "position": np.arange(batch.ids_BS.size), "type": batch.types_BS[0]}
        rows = {role: store.gather("rows", role, index_T)[0] for role, index_T in indices.items()}
        state = backend.begin(rows, batch.mask_BS, _weights(store, "embedding"))
        logits = []
        for index, stage in enumerate(store.manifest.layers, start=1):
            for step in stage.steps:
                backend.step(state, step.kind, _weights(store, *step.shards))
            if index < encoder.num_layers and exits:
                logits.append(backend.exit_logits(state, exits[index])[0])
        return (*logits, backend.head_logits(state, _weights(store, "head"))[0])


def _weights(store, *names):
    weights = {}
    for name in names:
        shard = store.manifest.shards[name]
        slot = Slot(shard.bytes)
        store.read_shard(name, slot.view)
        weights.update({tensor.role: tensor_view(tensor, slot.array, shard.data_start) for tensor in shard.tensors})
    return weights

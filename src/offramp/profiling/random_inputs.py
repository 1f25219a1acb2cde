"""Random inputs of a store, for measurements that need no data.

Numbers come from a linear congruence, so that a measured process loads no random number library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, List, Optional

import numpy as np

from offramp.program.inputs import Batch
from offramp.store import Store
from offramp.tasks.text import token_batch

if TYPE_CHECKING:
    from offramp.session.classifier import Classifier

RANDOM_LENGTH = 128
"""Number of tokens of a random input, unless the model or the user limits it."""


def random_length(store: str, max_length: Optional[int]) -> int:
    """Return the number of tokens of a random input: `max_length` or RANDOM_LENGTH, at most the limit of the model; 1
    where inputs have no length.
    """
    with Store(store, verify="never") as opened:
        texts = opened.program.texts
        return 1 if texts is None else min(max_length or RANDOM_LENGTH, texts.max_length)


def random_batch(classifier: Classifier, num_rows: int, length: int, seed: int) -> Batch:
    """Return random tokens without padding, or random arrays for a store that takes arrays."""
    program = classifier.store.program
    if program.texts is not None:
        ids_BS = random_numbers(num_rows * length, seed).reshape(num_rows, length) % program.texts.vocab_size
        return token_batch(program.texts, ids_BS, np.ones_like(ids_BS), np.zeros_like(ids_BS))
    found = {}
    for name, value in program.inputs.items():
        shape = (num_rows, *(axis for axis in value.axes[1:] if isinstance(axis, int)))
        numbers = random_numbers(int(np.prod(shape)), seed) % 256
        is_real = np.issubdtype(np.dtype(value.dtype), np.floating)
        values = numbers.astype(np.float32) / 128 - 1 if is_real else numbers % 2  # every table has rows 0 and 1
        found[name] = values.reshape(shape).astype(value.dtype)
    return Batch(found, num_rows, 1, np.ones(num_rows, np.int64))


def random_sweep(classifier: Classifier, num_rows: int, length: int, number: int) -> List[Batch]:
    """Return the random batches of one sweep: several in bulk mode, else one."""
    num_batches = classifier.settings.num_batches
    seeds = range(number * num_batches, (number + 1) * num_batches)
    return [random_batch(classifier, num_rows, length, seed) for seed in seeds]


def random_numbers(count: int, seed: int) -> np.ndarray:
    """Return `count` numbers, int64; other seeds give others."""
    return np.arange(count, dtype=np.int64) * 7919 + seed * 104729 + 1

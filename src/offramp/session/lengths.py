"""The cost of the length of texts in a plan, and the length that a budget allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from offramp.runtime.inputs import InputReader
from offramp.runtime.memory_model import Footprint, MemoryModel, Workload
from offramp.runtime.run_plan import make_run_plan

if TYPE_CHECKING:
    from offramp.session.classifier import Classifier

SPARE_BYTES = 2 << 20
"""Memory by which a plan for shorter texts is smaller than the budget: processes differ by as much from run to run."""
SHORTEST = 16
"""Fewest tokens that are named as a length."""


def require_feasible(classifier: Classifier) -> None:
    """Raise BudgetError unless the plan fits its budget.

    The error names the smallest budget that works, and a length of texts that works with this one.
    """
    length = None if classifier.plan.feasible else fitting_length(classifier)
    hint = "" if length is None else f", and --max-length {length} works with this one"
    classifier.plan.require_feasible(classifier.items, hint)


def fitting_length(classifier: Classifier) -> Optional[int]:
    """Return the largest power of two of tokens, below the planned length, whose plan fits the budget.

    None if no length does, and where inputs have no length.
    """
    if classifier.store.program.texts is None:
        return None
    plan, settings = classifier.plan, classifier.settings
    lengths = (1 << bits for bits in range((classifier.length - 1).bit_length() - 1, 0, -1))
    for length in (length for length in lengths if length >= SHORTEST):
        activation_bytes = activation_bytes_of(classifier, length) + SPARE_BYTES
        footprint = Footprint(plan.base_bytes - plan.reserved_bytes, activation_bytes)
        how = (settings.num_batches, footprint, plan.limit)
        # The peak of this process is that of the longer texts, which were tried.
        if make_run_plan(classifier.schedule, classifier.items, *how, False, settings.strategy).feasible:
            return length
    return None


def activation_bytes_of(classifier: Classifier, length: int) -> int:
    """Return the bytes of activations in a plan for texts of at most `length` tokens, which are not run for this."""
    settings, backend = classifier.settings, classifier.backend
    model = MemoryModel(InputReader(classifier.store), backend)

    def predicted(length: int) -> int:
        workload = Workload(settings.num_rows, length, settings.num_batches)
        return model.sweep_bytes(workload, backend.activation_bytes(settings.num_rows, length))

    return classifier.plan.activation_bytes + predicted(length) - predicted(classifier.length)

"""Cutting of inputs, which may arrive over time, into requests."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, Iterable, Iterator, List, Mapping, Sized, Tuple

if TYPE_CHECKING:
    from offramp.session.classifier import Classifier
    from offramp.session.results import Result

BULK_INPUTS = 1024
"""Number of inputs that bulk mode sorts by length at a time, where they are not all at hand."""


def require_several(inputs: Any) -> None:
    """Raise ValueError for one input, or a table, in place of an iterable of inputs."""
    if hasattr(inputs, "columns"):  # iterating a table yields the names of its columns
        raise ValueError("predict takes an iterable of inputs, not a table: predict(table['text'])")
    is_iterable = isinstance(inputs, Iterable) or hasattr(inputs, "__getitem__")
    if isinstance(inputs, (str, bytes, Mapping)) or not is_iterable:
        kind = type(inputs).__name__
        raise ValueError(f"predict takes an iterable of inputs, such as predict([text]), not one {kind}")


def requests_of(inputs: Iterable[Any], num_rows: int, *, waits: bool) -> Iterator[Tuple[List[Any], bool]]:
    """Yield (inputs of a request, whether another follows), so that the last request does not read weights ahead.

    Args:
        waits: inputs arrive over time. Waiting for the next one would delay an answer, so another request is always
            said to follow.
    """
    rest = iter(inputs)
    batch = list(islice(rest, num_rows))
    while batch:
        following = [] if waits else list(islice(rest, num_rows))
        yield batch, waits or bool(following)
        batch = list(islice(rest, num_rows)) if waits else following


def stream_results(classifier: Classifier, inputs: Iterable[Any], *, more: bool, all_scores: bool) -> Iterator[Result]:
    """Yield the results of inputs in order, each as soon as its request is answered.

    No more inputs are taken than the request needs. Between two results the classifier is free for other calls.
    """
    size = BULK_INPUTS if classifier.settings.is_bulk else classifier.settings.num_rows
    for batch, follows in requests_of(inputs, size, waits=not isinstance(inputs, Sized)):
        yield from classifier.predict(batch, more=more or follows, all_scores=all_scores)

"""`predict` of whatever can be iterated, at once and as a stream: order, count, and what is taken ahead."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offramp.errors import UsageError
from offramp.session.requests import requests_of
from tests.runtime.driver import texts
from tests.toy import Toy, make_classifier

TEXTS = ["abc", "defghijkl", "k", "kkkkkkkkkkkk", "lb", "abcdefghijkl", "a"]
ITERABLES = {
    "list": list,
    "tuple": tuple,
    "generator": lambda rows: (row for row in rows),
    "map": lambda rows: map(str, rows),
    "array": lambda rows: np.array(rows, dtype=object),
    "column of a frame": lambda rows: pd.Series(rows, index=range(100, 100 + len(rows)), dtype=object),
    "keys": lambda rows: dict.fromkeys(rows).keys(),
}


class Source:
    """Texts that arrive one at a time; `taken` counts them."""

    def __init__(self, rows):
        self.rows, self.taken, self.is_closed = rows, 0, False

    def __iter__(self):
        try:
            for row in self.rows:
                self.taken += 1
                if isinstance(row, Exception):
                    raise row
                yield row
        finally:
            self.is_closed = True


@pytest.mark.parametrize("name", ITERABLES)
@pytest.mark.parametrize("is_bulk", [False, True])
def test_every_iterable_is_answered_as_a_list_is(shelf, name, is_bulk):
    make = ITERABLES[name]
    with make_classifier(shelf.open(Toy()), "patience:1", num_rows=3, is_bulk=is_bulk) as classifier:
        plain = [(result.label, result.score) for result in classifier.predict(TEXTS)]
        assert [(result.label, result.score) for result in classifier.predict(make(TEXTS))] == plain
        streamed = classifier.predict(make(TEXTS), stream=True)
        assert iter(streamed) is streamed, "results come one at a time"
        assert [(result.label, result.score) for result in streamed] == plain


@settings(deadline=None, max_examples=10, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(texts, max_size=9), num_rows=st.integers(1, 4), stop=st.integers(0, 9))
def test_a_stream_takes_no_more_than_a_batch_ahead_and_can_be_left(shelf, rows, num_rows, stop):
    source = Source(rows)
    with make_classifier(shelf.open(Toy()), num_rows=num_rows) as classifier:
        expected = [result.score for result in classifier.predict(rows)]
        stream, found = classifier.predict(iter(source), stream=True), []
        assert source.taken == 0
        for result in stream:
            found.append(result.score)
            assert source.taken <= -(-len(found) // num_rows) * num_rows
            if len(found) > stop:
                break
        stream.close()
        assert found == expected[: stop + 1]
        assert next(stream, None) is None
        assert [result.score for result in classifier.predict(rows)] == expected, "it is as it was"
    assert source.is_closed or not source.taken


def test_other_calls_run_between_two_results_of_a_stream(shelf):
    with make_classifier(shelf.open(Toy()), num_rows=2) as classifier:
        expected = classifier.predict(TEXTS)
        first, second = (classifier.predict(iter(TEXTS), stream=True) for _ in range(2))
        for place, pair in enumerate(zip(first, second, strict=True)):
            assert [each.score for each in pair] == [expected[place].score] * 2
            assert classifier.predict(["abc"])[0].score == expected[0].score


def test_what_fails_in_a_stream_comes_after_the_results_before_it(shelf):
    with make_classifier(shelf.open(Toy()), num_rows=2) as classifier:
        stream = classifier.predict(iter(Source(["abc", "k", "lb", UsageError("line 4"), "a"])), stream=True)
        assert [next(stream).exit_stage, next(stream).exit_stage] == [4, 4]
        with pytest.raises(UsageError, match="line 4"):
            next(stream)
        assert len(classifier.predict(TEXTS)) == len(TEXTS)
    with pytest.raises(ValueError, match="not open"):
        next(classifier.predict(iter(TEXTS), stream=True))


@pytest.mark.parametrize("given", ["abc", b"abc", {"pixels": np.zeros(3)}, None, 3, 0.5, pd.DataFrame({"text": TEXTS})])
def test_one_input_and_a_table_are_refused_before_anything_is_run(shelf, given):
    classifier = make_classifier(shelf.open(Toy()))
    for stream in (False, True):
        with classifier, pytest.raises(ValueError, match="predict takes an iterable of inputs") as refused:
            classifier.predict(given, stream=stream)
        assert "predict(" in str(refused.value), "what to write instead"


@given(num_inputs=st.integers(0, 9), num_rows=st.integers(1, 4), waits=st.booleans())
def test_only_the_last_request_is_followed_by_none(num_inputs, num_rows, waits):
    requests = list(requests_of(iter(range(num_inputs)), num_rows, waits=waits))
    assert [each for batch, _ in requests for each in batch] == list(range(num_inputs))
    assert [len(batch) for batch, _ in requests[:-1]] == [num_rows] * (len(requests) - 1)
    assert [more for _, more in requests] == [waits or place + 1 < len(requests) for place in range(len(requests))]

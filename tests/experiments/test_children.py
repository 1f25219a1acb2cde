import sys

import pytest

from offramp.errors import BudgetError, DiskFullError, OfframpError, RefusedError, UsageError
from offramp.experiments.children import output_of


def python(code):
    return [sys.executable, "-c", code]


def test_what_a_command_prints():
    assert output_of(python("print('one'); print('two')")) == "one\ntwo\n"


@pytest.mark.parametrize(
    ("code", "kind"), [(1, OfframpError), (2, UsageError), (3, BudgetError), (4, RefusedError), (5, DiskFullError)]
)
def test_an_error_keeps_its_class_and_its_line(code, kind):
    lines = "progress\\nofframp: error: W - X - Y"
    said = f"import sys; print('{lines}', file=sys.stderr); sys.exit({code})"
    with pytest.raises(kind) as caught:
        output_of(python(said))
    assert type(caught.value) is kind
    assert str(caught.value) == "W - X - Y"
    assert caught.value.exit_code == code


def test_what_it_says_meanwhile_is_passed_on_but_not_its_error():
    said = []
    code = "import sys; print('out'); [print(line, file=sys.stderr) for line in sys.argv[1:]]"
    assert output_of([*python(code), "one", "", "offramp: error: W", "two"], said.append) == "out\n"
    assert said == ["one", "two"]


def test_who_stops_listening_stops_the_child():
    """Else this would last a minute, and the test run with it (conftest)."""
    code = "import sys, time; print('one', file=sys.stderr, flush=True); time.sleep(60)"

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        output_of(python(code), stop)


@pytest.mark.parametrize("last_words", ["", "offramp: warning: a text was cut"])
def test_a_command_that_is_killed(last_words):
    with pytest.raises(OfframpError) as caught:
        output_of(
            python(f"import os, sys; print({last_words!r}, file=sys.stderr, flush=True); os.kill(os.getpid(), 9)")
        )
    assert str(caught.value) == "a process ended with -9"

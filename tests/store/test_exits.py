import pytest

from offramp.errors import SourceError, StoreError
from offramp.store import Encoder
from offramp.store.exits import FORMS, describe_exits, exit_name, exit_shapes, exit_tensors, parse_exits

ENCODER = Encoder(8, 8, 3, 2, 16, "gelu", 1e-12, 30, 24, 0, 2, 0, "tanh", "single_label_classification", ("a", "b"))


@pytest.mark.parametrize("form", FORMS)
def test_a_description_comes_back(form):
    found = parse_exits(describe_exits(form, 3), "here")
    assert (found.form, found.trained) == (form, True)


@pytest.mark.parametrize("form", FORMS)
def test_every_role_of_every_exit_has_a_tensor(form):
    tensors = exit_tensors(ENCODER, form)
    for number in (1, 2):
        for role, shape in exit_shapes(ENCODER, form).items():
            assert tensors.pop(exit_name(role, number, form), shape) == shape
    assert not tensors


def test_names_in_the_file():
    assert exit_name("exit.weight", 2, "mean-linear") == "exit.2.weight"
    assert exit_name("exit.dense.weight", 2, "own") == "exit.2.dense.weight"
    assert exit_name("exit.dense.weight", 2, "own-shared") == "exit.dense.weight"
    assert exit_name("exit.out.bias", 2, "own-shared") == "exit.2.out.bias"


def test_an_exit_that_does_not_say_that_it_was_trained_was_not():
    assert not parse_exits(b'{"form": "own"}', "here").trained


@pytest.mark.parametrize("error", [StoreError, SourceError])
def test_the_error_is_that_of_the_asker(error):
    with pytest.raises(error, match="unknown form of exits 'hat', known:"):
        parse_exits(b'{"form": "hat"}', "here", error)

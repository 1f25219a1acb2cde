import dataclasses

import pytest

from offramp.errors import SourceError, StoreError
from offramp.program.heads import FORMS
from offramp.store.exits import describe_exits, exit_tensors, parse_exits
from offramp.store.parsing import loads
from tests.store.old_formats import encoder_store


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Of an encoder with three layers."""
    path = encoder_store(tmp_path_factory.mktemp("golden"))
    return loads((path / "offramp.json").read_bytes()).program


@pytest.mark.parametrize("form", FORMS)
def test_a_description_comes_back(form):
    found = parse_exits(describe_exits(form, 3), "here")
    assert (found.form, found.trained) == (FORMS[form], True)


@pytest.mark.parametrize("form", FORMS)
def test_every_role_of_every_exit_has_a_tensor(program, form):
    form = FORMS[form]
    tensors = exit_tensors(program, form)
    width, num_labels = program.values()["layer.0.hidden"].width, program.output.num_labels
    for number in (1, 2):
        for role, shape in form.shapes(width, num_labels).items():
            assert tensors.pop(form.tensor_name(role, number), shape) == shape
    assert not tensors


def test_exits_stand_where_the_program_has_places_for_them(program):
    layers = [stage if stage.name != "layer.1" else dataclasses.replace(stage, exit=None) for stage in program.stages]
    found = exit_tensors(dataclasses.replace(program, stages=tuple(layers)), FORMS["mean-linear"])
    assert set(found) == {"exit.1.weight", "exit.1.bias"}


def test_names_in_the_file():
    assert FORMS["mean-linear"].tensor_name("exit.weight", 2) == "exit.2.weight"
    assert FORMS["own"].tensor_name("exit.dense.weight", 2) == "exit.2.dense.weight"
    assert FORMS["own-shared"].tensor_name("exit.dense.weight", 2) == "exit.dense.weight"
    assert FORMS["own-shared"].tensor_name("exit.out.bias", 2) == "exit.2.out.bias"


def test_an_exit_that_does_not_say_that_it_was_trained_was_not():
    assert not parse_exits(b'{"form": "own"}', "here").trained


@pytest.mark.parametrize("error", [StoreError, SourceError])
def test_the_error_is_that_of_the_asker(error):
    with pytest.raises(error, match=r"exits\.json: form must be one of .*, not 'hat'"):
        parse_exits(b'{"form": "hat"}', "here", error)

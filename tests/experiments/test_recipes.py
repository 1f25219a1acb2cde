"""The recipes that are published are read without models, and their short forms ask less."""

from pathlib import Path

import pytest

from offramp.experiments.grid import read_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_experiments(path):
    assert len(read_recipe(path)) > 1


def test_the_short_form_of_the_study_asks_a_part_of_each_question(monkeypatch):
    whole = read_recipe(RECIPES[0].with_name("ancestor.py"))
    monkeypatch.setenv("QUICK", "1")
    short = read_recipe(RECIPES[0].with_name("ancestor.py"))
    assert sum(each.rounds for each in short) < 0.1 * sum(each.rounds for each in whole)
    assert {each.data is None for each in short} == {True, False} and {each.rounds for each in short} == {1}

"""The recipes that are published plan what they ask, with models that are not there, and their short forms ask less."""

from pathlib import Path

import pytest

from offramp.experiments import sweep
from offramp.experiments.grid import read_recipe
from offramp.experiments.prerequisites import Source
from offramp.experiments.sweep import SweepSettings, plan_sweep
from offramp.tasks.examples import Splits
from offramp.tasks.glue import task_of

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_plans_all_that_it_asks(path, tmp_path, monkeypatch):
    """As `--dry-run` does: no option contradicts another, nor a model of 12 layers; of rivals, one that can be read."""

    def identify(experiments, log):
        models = {sweep._model(each): Source("m", "digest", False, 12, 512) for each in experiments}
        return models, {each.data: "rows" for each in experiments}

    monkeypatch.setattr(sweep, "identify", identify)
    found = read_recipe(path)
    plan = plan_sweep(found, tmp_path / "out", [], SweepSettings(), print)
    assert found and len(plan.jobs) == sum(each.rounds for each in found)
    assert plan.steps or {each.job for each in found} == {"stream"}
    assert all(each.place.startswith(f"{path}, line ") for each in found)


def test_the_short_form_of_the_study_asks_a_part_of_each_question(monkeypatch):
    whole = read_recipe(RECIPES[0].with_name("ancestor.py"))
    monkeypatch.setenv("QUICK", "1")
    short = read_recipe(RECIPES[0].with_name("ancestor.py"))
    assert sum(each.rounds for each in short) < 0.1 * sum(each.rounds for each in whole)
    assert {each.data is None for each in short} == {True, False} and {each.rounds for each in short} == {1}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_splits_that_a_recipe_asks_for_are_there_whatever_files_a_task_has(path):
    """Without a train file, the only file is cut: MNLI then has a split `dev`, and no `dev_matched`."""
    for task, split in {(each.data.task, each.split) for each in read_recipe(path) if each.data}:
        parts = task_of(task).dev_splits
        for names in (parts, ("dev", *parts[1:])):
            examples = {name: [] for name in ("train", "tune", "certify", *names)}
            assert Splits(task, (), (), examples).named([split])

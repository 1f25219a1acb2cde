"""Searches: proposals follow from the records alone, every trial is another experiment, and what fails is learned."""

import pytest

from offramp.errors import UsageError
from offramp.experiments import Grid, Search, searching, sweep
from offramp.experiments.grid import narrowed, read_recipe
from offramp.experiments.results import read_results
from offramp.experiments.searching import Study
from offramp.experiments.specification import names_of
from offramp.experiments.sweep import SweepSettings

SPACE = Grid(job="toy", model="toy", seed=list(range(6)), batch=[1, 2, 3], rounds=2)


def ignore(*what):
    pass


def search(folder, trials=6, **options):
    study, lines = Study(Search(SPACE, ("latency", "score"), trials)), []
    plan = sweep.search(study, folder, SweepSettings(**options), ignore, lambda *line: lines.append(line))
    return study, plan, lines


def tried(folder):
    return [(record["key"], record["round"]) for record in read_results(folder, ignore)]


def test_a_search_that_is_interrupted_continues_as_if_it_had_not_been(in_process, tmp_path):
    study, plan, lines = search(tmp_path / "whole")
    assert len(plan.jobs) == 12 and len({key for key, _ in tried(tmp_path / "whole")}) == len(study) == 6
    assert lines[-1][:2] == (6, 6) and lines[-1][2].startswith("trial 6: seed=")
    for _ in range(20):
        _, plan, _ = search(tmp_path / "parts", limit=1)
        assert len(plan.jobs) <= 1
    assert tried(tmp_path / "parts") == tried(tmp_path / "whole")
    _, plan, _ = search(tmp_path / "whole", trials=8)
    assert len(plan.jobs) == 4, "more trials continue the same search"
    assert tried(tmp_path / "whole")[:12] == tried(tmp_path / "parts")


def test_a_whole_grid_is_tried_once(in_process, tmp_path):
    study, plan, _ = search(tmp_path / "out", trials=100)
    assert len(plan.jobs) == 2 * 18 and set(study.figures) == set(SPACE)
    front = study.front()
    for each, (latency, score) in study.figures.items():
        better = [own for own in front.values() if own[0] <= latency and own[1] >= score]
        assert better, f"{each} is surpassed or on the front"
        assert (each in front) == (not any(own != [latency, score] for own in better))


def test_where_proposals_bring_nothing_new_the_first_that_was_not_tried_is_taken(in_process, tmp_path, monkeypatch):
    monkeypatch.setattr(searching, "MOST_REPEATED", 0)
    study, _, _ = search(tmp_path, trials=100)
    assert list(study.figures) == list(SPACE)


def test_experiments_that_fail_or_are_left_out_are_not_proposed_again(in_process, tmp_path):
    space = Grid(job="toy", model=["toy", "toy-refuses", "toy-without-score"], seed=[1, 2], rounds=1)
    study = Study(Search(space.where(lambda each: each.seed == 1 or each.model == "toy"), ["score"], 9))
    plan = sweep.search(study, tmp_path / "out", SweepSettings(), ignore, ignore)
    assert len(plan.jobs) == len(study) == 4
    assert sorted(values is None for values in study.figures.values()) == [False, False, True, True]
    assert [each.model for each in study.front()] == ["toy"]
    assert len(plan.failed) == 1 and not plan.failed_before
    study = Study(study.search)
    plan = sweep.search(study, tmp_path / "out", SweepSettings(), ignore, ignore)
    assert len(plan.failed_before) == 1 and not plan.failed


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(UsageError, match=r"optuna is not installed - a Search - pip install 'offramp\[search\]'"):
        searching.Study(Search(SPACE))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"objectives": ("speed",)}, "objectives must be some of latency, .*, not speed"),
        ({"objectives": ()}, "not none"), ({"trials": 0}, "trials must be at least 1, not 0"),
        ({"space": [SPACE]}, "must be a Grid, not list"),
    ],
)  # fmt: skip
def test_what_is_no_search_is_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Search(**{"space": SPACE, **options})


def test_a_recipe_returns_a_search_alone(tmp_path):
    path = tmp_path / "recipe.py"
    text = (
        "from offramp.experiments import Grid, Search\n"
        "def recipe():\n    return {}Search(Grid(job='toy', model='toy', seed=[1, 2, 3]), 'score', trials=2){}\n"
    )
    path.write_text(text.format("", ""))
    found = read_recipe(path)
    assert isinstance(found, Search) and found.objectives == ("score",) and len(list(found)) == 3
    less = narrowed(found, ["seed=1,3"])
    assert isinstance(less, Search) and list(names_of(list(less)).values()) == ["seed=1", "seed=3"]
    path.write_text(text.format("[", "]"))
    with pytest.raises(UsageError, match="return the search alone"):
        read_recipe(path)

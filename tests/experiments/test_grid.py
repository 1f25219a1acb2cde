"""Specifications and recipes: grids, identities, JSON, and every way in which a recipe can be wrong."""

import json
import re
from pathlib import Path

import pytest

from offramp.errors import UsageError
from offramp.experiments import Experiment, Grid, experiment, patience
from offramp.experiments.grid import read_recipe, selected
from offramp.experiments.specification import names_of, option_names
from offramp.runtime.config import EngineConfig

IMPORTS = "from offramp.experiments import Grid, experiment, patience\n"


@pytest.fixture
def recipe(tmp_path):
    def write(text, before=IMPORTS):
        path = tmp_path / "recipe.py"
        path.write_text(before + text)
        return path

    return write


def test_the_grid_of_the_readme_is_all_combinations():
    grid = Grid(
        model=["runs/bert", "runs/distilbert"], task=["sst2", "mrpc"], exit=["none", *patience(1, 5), "confidence:0.9"],
        budget=["96MiB", "128MiB", None], backend=["ort", "torch"], seed=[1, 2, 3],
    )  # fmt: skip
    found = list(grid)
    assert len(found) == len(set(found)) == 2 * 2 * 7 * 3 * 2 * 3
    assert found[0].engine.budget == 96 << 20 and found[0].data.task == "sst2" and found[0].seed == 1
    assert [each.seed for each in found[:4]] == [1, 2, 3, 1], "the last option varies fastest"
    assert len(list(grid.where(lambda each: each.engine.exit == "none"))) == len(found) // 7


def test_a_grid_that_would_fill_the_memory_is_refused_before_it_is_expanded():
    assert len(list(Grid(model="a", seed=range(3)))) == 3
    for axes in ({"seed": range(10**12)}, {"seed": range(1000), "rows": list(range(1, 1001))}):
        with pytest.raises(ValueError, match=r"the grid has \d+ combinations of values, more than 100000"):
            Grid(model="a", **axes)


def test_a_specification_survives_json():
    for each in (
        experiment(model="m"),
        experiment(
            model="m", task="sst2", loss="pabee", epochs=1, max_length=64, seed=3, timeout="2s", budget="resident"
        ),
        experiment(
            model="m", train="t.tsv", labels=("a", "b"), exit="tune:drop=1", batch=8, trace=True, device="board"
        ),
    ):
        tree = json.loads(json.dumps(each.to_json()))
        assert Experiment.from_json(tree) == each and hash(Experiment.from_json(tree)) == hash(each)
    assert each.flat()["exit"] == "tune:drop=1" and each.flat()["train"] == "t.tsv"


def test_the_length_and_the_seed_of_a_training_are_those_of_the_experiment():
    each = experiment(model="m", task="sst2", loss="last", max_length=64, seed=3)
    assert (each.training.max_length, each.training.seed, each.training.loss) == (64, 3, "last")
    assert experiment(model="m", task="sst2").training is None


def test_every_engine_option_can_be_varied():
    left_out = {"own_process", "longest"}
    assert {name for name in vars(EngineConfig()) if name not in left_out} <= set(option_names())


def test_a_key_is_of_the_specification_and_the_inputs_and_not_of_the_number_of_rounds():
    inputs = {"model": "a", "data": None}
    key = experiment(model="m").key(inputs)
    assert key == experiment(model="m", rounds=9, timeout="1s").key(inputs)
    others = [experiment(model="m", batch=2).key(inputs), experiment(model="m").key({**inputs, "model": "b"})]
    assert len({key, *others}) == 3 and len(key) == 16
    assert experiment(model="m", budget="128MiB").key(inputs) == "1d5dad293b30d06b", "of records that were made before"
    added = [{"rival": "disk"}, {"prefetch": False}, {"resident_layers": 1}]
    assert len({key, *(experiment(model="m", **each).key(inputs) for each in added)}) == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"modell": "m"}, r"unknown field modell \(did you mean model\?\); known: model, job, "),
        ({"model": "m", "learningrate": 1}, "did you mean learning_rate"),
        ({"model": "m", "xyzzy": 1}, "unknown field xyzzy; known: model, job, "),
        ({"xyzzy": 1, "modell": "m"}, r"unknown fields modell \(did you mean model\?\), xyzzy; known: model, job, "),
        ({"model": "m", "rows": 0}, "rows must be an integer from 1"),
        ({"model": "m", "job": "x"}, "job must be one of"),
        ({"model": "m", "task": "sst2", "split": "validation"}, "split must be one of"),
        ({"model": "m", "dtype": "int3"}, "dtype must be one of"),
        ({"model": 3}, "model must be a string"),
        ({"model": " "}, "model must name a folder"),
        ({}, "no model"),
        ({"model": "m", "budget": "128"}, "budget: a size must have a unit"),
        ({"model": "m", "label_column": "x"}, "label_column without data"),
        ({"model": "m", "task": "sst2", "loss": "x"}, "loss must be one of"),
        ({"model": "m", "task": "sst2", "exit_weights": lambda k: [1] * k}, "needs a form in JSON"),
        ({"model": "m", "timeout": 0}, "must be a number above 0"),
    ],
)
def test_a_wrong_specification_says_what_is_wrong(options, says):
    with pytest.raises((ValueError, UsageError), match=says):
        experiment(**options)


def test_the_readme_lists_all_options_once():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    rows = re.search(r"\| options of a recipe \|.*?\n\n", text, re.DOTALL)[0].split("\n")[2:-2]
    assert sorted(re.findall("`([a-z_]+)`", " ".join(row.split("|")[2] for row in rows))) == sorted(option_names())


def test_a_tree_with_unknown_or_missing_keys_is_refused():
    tree = experiment(model="m").to_json()
    for wrong in ({**tree, "colour": 1}, {key: value for key, value in tree.items() if key != "model"}, [], None):
        with pytest.raises(ValueError):
            Experiment.from_json(wrong)
    with pytest.raises(ValueError, match="colour"):
        Experiment.from_json({**tree, "engine": {"colour": 1}})


def test_a_recipe_returns_grids_experiments_or_lists_and_each_experiment_once(recipe):
    path = recipe("""
def recipe():
    return [Grid(model=["a", "b"]), [experiment(model="c")], Grid(model="a")]
""")
    assert [each.model for each in read_recipe(path)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("def recipe():\n    return 1 / 0\n", 3, "ZeroDivisionError: division by zero"),
        ("def recipe():\n    return 3\n", 2, "returns int, not experiments"),
        ("def recipe():\n    return [Grid(model='a'), None]\n", 2, "returns NoneType"),
        ("x = 1\n", None, "has no function recipe"),
        ("recipe = 4\n", None, "has no function recipe"),
        ("def recipe(:\n", 2, "SyntaxError"),
        ("import no_such_library\n", 2, "no_such_library"),
        ("def recipe():\n    return Grid(\n        modell='a')\n", 3, "unknown field modell (did you mean model?)"),
        ("def recipe():\n    grid = Grid(model='a', budget='128')\n    return grid\n", 3, "budget: a size must have"),
        (
            "def recipe():\n    return [Grid(model='a'),\n        Grid(model='a', exit=[])]\n",
            4,
            "no values of exit",
        ),
        ("def recipe():\n    return Grid(model=[])\n", 3, "no values of model"),
        ("def recipe():\n    return []\n", 2, "has no experiments"),
        ("def recipe():\n    return Grid(model='a').where(lambda each: False)\n", 2, "has no experiments"),
        ("def recipe():\n    return Grid(model='a').where(\n        lambda each: each.x)\n", 4, "AttributeError"),
        ("def recipe():\n    return [Grid(model='a'),\n        Grid(model='a', task='imdb')]\n", 4, "imdb"),
        ("def recipe():\n    return [Grid(model='a'),\n        experiment(model='a', rows=0)]\n", 4, "rows must be"),
        ("def recipe():\n    raise SystemExit(1)\n", 3, "SystemExit: 1"),
        ("def recipe(of):\n    return Grid(model='a')\n", 2, "missing 1 required positional argument"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_line(recipe, text, line, says):
    path = recipe(text)
    with pytest.raises(UsageError) as caught:
        read_recipe(path)
    assert says in str(caught.value)
    assert str(caught.value.where) == (str(path) if line is None else f"{path}, line {line}")
    assert caught.value.remedy


def test_a_recipe_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(UsageError, match="no such recipe"):
        read_recipe(tmp_path / "none.py")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "binary.py"):
        with pytest.raises(UsageError, match="cannot read a recipe"):
            read_recipe(path)


def test_only_keeps_the_experiments_of_these_values():
    found = list(Grid(model=["a", "b"], budget=["96MiB", None, "resident"], task=["sst2", "mrpc"], rows=[20, 200]))
    for only, count in (
        (["task=sst2"], 12), (["task=sst2,mrpc"], 24), (["budget=96MiB"], 8), (["budget=none", "model=b"], 4),
        (["budget=resident"], 8), (["rows=20"], 12), ([], 24),
    ):  # fmt: skip
        assert len(selected(found, only)) == count, only
    with pytest.raises(UsageError, match="no experiment is left"):
        selected(found, ["task=cola"])
    found = [*Grid(model=["m", "n", "m,n"], train="a.csv", labels=("x", "z")), experiment(model="o")]
    for only, count in (
        (["labels=x,z"], 3), (["labels=['x', 'z']"], 3), (["labels=none"], 1), (["model=m,n"], 1), (["model=m,o"], 2),
    ):  # fmt: skip
        assert len(selected(found, only)) == count, only
    with pytest.raises(UsageError, match="no experiment is left"):
        selected(found, ["labels=x"])
    found = list(Grid(model="m", train="a.csv", trace=[True, False], timeout="90s", learning_rate=[2e-5, 3e-5]))
    for only, count in (
        ("trace=true", 2), ("trace=True", 2), ("trace=no", 2), ("timeout=90s", 4), ("timeout=90000ms", 4),
        ("timeout=90", 4), ("timeout=90.0", 4), ("learning_rate=0.00002", 2), ("learning_rate=2e-5", 2),
    ):  # fmt: skip
        assert len(selected(found, [only])) == count, only
    for wrong in ("taks=sst2", "task"):
        with pytest.raises(UsageError, match=r"no option of this name .* names: model, job"):
            selected(found, [wrong])


def test_experiments_are_named_by_what_differs():
    found = list(Grid(model="m", budget=["96MiB", None], exit=["none", "patience:1"], rounds=[1]))
    assert list(names_of(found).values())[:2] == ["budget=96MiB exit=none", "budget=96MiB exit=patience:1"]
    assert list(names_of(found).values())[2] == "exit=none"
    assert names_of([experiment(model="m")])[experiment(model="m")] == "m"

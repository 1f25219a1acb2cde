"""Grids of experiments, searches in them, and recipes: Python files whose function `recipe` returns experiments."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from offramp.errors import OfframpError, RefusedError, UsageError, innermost_line, missing, said
from offramp.experiments.children import ignore
from offramp.experiments.comparison import FIGURES
from offramp.experiments.prerequisites import rule_of
from offramp.experiments.results import ABOUT, read_results
from offramp.experiments.specification import (
    RECIPE,
    Experiment,
    experiment,
    made_at,
    option_names,
    recipe_place,
    require_options,
    specification_of,
)
from offramp.policies.own import python_files
from offramp.units import parse_duration

Filter = Callable[[Experiment], bool]
MAX_EXPERIMENTS = 100_000
"""Most combinations of a grid, before filters: they are in memory together."""


@dataclass(frozen=True, init=False)
class Grid:
    """All combinations of values of options. Iterating yields the experiments; the last option varies fastest.

    `Grid(model=["a", "b"], budget=["96MiB", None], rounds=3)` are four experiments. Raises ValueError for an unknown
    option, naming the known ones, and for more than `MAX_EXPERIMENTS` combinations.
    """

    axes: Mapping[str, tuple[Any, ...]]
    filters: tuple[Filter, ...]
    place: str | None = field(compare=False)
    """Line of the recipe that made it; None: no recipe did."""

    def __init__(self, **axes: Any) -> None:
        require_options(axes)
        number = math.prod(len(value) for value in axes.values() if isinstance(value, (list, range)))
        if number > MAX_EXPERIMENTS:
            raise ValueError(f"the grid has {number} combinations of values, more than {MAX_EXPERIMENTS}")
        # A list of values is an axis; `labels` is one value, a tuple of names.
        values = {name: tuple(value) if isinstance(value, (list, range)) else (value,) for name, value in axes.items()}
        empty = ", ".join(name for name, each in values.items() if not each)
        if empty:
            raise ValueError(f"no values of {empty}")
        object.__setattr__(self, "axes", values)
        object.__setattr__(self, "filters", ())
        object.__setattr__(self, "place", recipe_place())

    def where(self, keep: Filter) -> "Grid":
        """Return the experiments of this grid for which `keep` is true, as `lambda each: each.engine.batch == 1`."""
        grid = Grid(**{name: list(values) for name, values in self.axes.items()})
        object.__setattr__(grid, "filters", (*self.filters, keep))
        object.__setattr__(grid, "place", self.place)
        return grid

    def __iter__(self) -> Iterator[Experiment]:
        for values in itertools.product(*self.axes.values()):
            found = made_at(self.place, experiment(**dict(zip(self.axes, values, strict=True))))
            if all(keep(found) for keep in self.filters):
                yield found


@dataclass(frozen=True)
class Search:
    """A search in a grid for the experiments that no other one surpasses in all objectives, by optuna.

    Each trial is an experiment, proposed by the figures of those before. The same records and seed give the same
    proposals, so that a search that is interrupted continues. Raises ValueError for objectives that are no figures.
    """

    space: Grid
    objectives: tuple[str, ...] = ("latency", "memory")
    """Names of FIGURES: the score is maximised, all others are minimised."""
    trials: int = 20
    """Number of different experiments; fewer if the grid has fewer."""
    seed: int = 0

    def __post_init__(self) -> None:
        objectives = (self.objectives,) if isinstance(self.objectives, str) else tuple(self.objectives)
        object.__setattr__(self, "objectives", objectives)
        unknown = sorted(set(objectives) - set(FIGURES))
        if unknown or not objectives:
            raise ValueError(f"objectives must be some of {', '.join(FIGURES)}, not {', '.join(unknown) or 'none'}")
        if not isinstance(self.space, Grid):
            raise ValueError(f"the space of a search must be a Grid, not {type(self.space).__name__}")
        if self.trials < 1:
            raise ValueError(f"trials must be at least 1, not {self.trials}")

    def __iter__(self) -> Iterator[Experiment]:
        return iter(self.space)


def patience(first: int, last: int) -> list[str]:
    """Return the rules `patience:FIRST` to `patience:LAST`, for `exit`."""
    return [f"patience:{number}" for number in range(first, last + 1)]


def read_recipe(path: Path, only: Sequence[str] = ()) -> list[Experiment] | Search:
    """Run a recipe and return its experiments, each once, or its search; `narrowed` by the values of `only`.

    A recipe is code: it may do anything. A results folder is a recipe of the experiments that it has records of;
    nothing of it is run. Raises UsageError with the line of the recipe that is wrong, and the errors of `read_results`
    and `selected`.
    """
    if (path / ABOUT).is_file():
        records = read_results(path, ignore)
        found = selected(dict.fromkeys(specification_of(record, path) for record in records), only)
        _require_no_code(found, path)
        return found
    return narrowed(_run_recipe(path), only)


def _run_recipe(path: Path) -> list[Experiment] | Search:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise missing(path, "recipe") from None
    except (OSError, UnicodeError) as error:
        raise UsageError(f"cannot read a recipe ({said(error)})", path, "name a Python file") from None
    line = 1
    try:
        names: dict[str, Any] = {"__name__": RECIPE, "__file__": str(path)}
        exec(compile(text, str(path), "exec"), names)  # a recipe is code of the user  # nosec B102
        function = names.get(RECIPE)
        if not callable(function):
            raise UsageError("the recipe has no function recipe()", path, "define one that returns a Grid")
        line = getattr(getattr(function, "__code__", None), "co_firstlineno", 1)
        returned = function()
        place = f"{path}, line {line}"
        found = list(_experiments(returned, place, path))
    except UsageError as error:
        if error.where is not None and str(error.where).startswith(str(path)):
            raise
        raise _wrong(error, path, f"{path}, line {line}") from None
    except (Exception, SystemExit) as error:
        raise _wrong(error, path, f"{path}, line {line}") from None
    if not found:
        what = "the recipe has no experiments"
        raise UsageError(what, place, "return a Grid, and keep some of it where you filter it")
    return returned if isinstance(returned, Search) else list(dict.fromkeys(found))


def _require_no_code(experiments: Iterable[Experiment], path: Path) -> None:
    """Raise RefusedError for records whose exit names a Python file: records are data, and may be of others."""
    for each in experiments:
        if python_files(rule_of(each.engine.exit)):
            what = f"the records name code, exit {each.engine.exit}, and records may be of others"
            remedy = "run the recipe again: offramp sweep RECIPE.py; or --only other experiments of the records"
            raise RefusedError(what, path, remedy)


def _experiments(found: Any, where: str, path: Path) -> Iterator[Experiment]:
    """Yield the experiments that a recipe returned: a grid, an experiment, or a list of these."""
    if isinstance(found, Experiment):
        yield found
    elif isinstance(found, Search):
        yield from _experiments(found.space, where, path)
    elif isinstance(found, Grid):
        try:
            yield from found
        except Exception as error:
            raise _wrong(error, path, found.place or where) from None
    elif isinstance(found, (list, tuple)):
        if any(isinstance(each, Search) for each in found):
            what = "a search beside other experiments: its trials follow from its own records"
            raise UsageError(what, where, "return the search alone")
        for each in found:
            yield from _experiments(each, where, path)
    else:
        what = f"the recipe returns {type(found).__name__}, not experiments"
        raise UsageError(what, where, "return a Grid, an experiment, a list of these, or a Search")


def _wrong(error: BaseException, path: Path, place: str) -> UsageError:
    """Return the error of a recipe with the line that took part in it, or else a known place."""
    reason = str(error) if isinstance(error, (OfframpError, ValueError)) else said(error)
    line = innermost_line(error, str(path), 0)
    return UsageError(f"the recipe is wrong: {reason}", f"{path}, line {line}" if line else place, "correct the recipe")


def narrowed(found: list[Experiment] | Search, only: Sequence[str]) -> list[Experiment] | Search:
    """Return what is `selected` of the experiments of a recipe, or a search in that."""
    if not only:
        return found
    kept = selected(found, only)
    return replace(found, space=found.space.where(set(kept).__contains__)) if isinstance(found, Search) else kept


def selected(experiments: Iterable[Experiment], only: Sequence[str]) -> list[Experiment]:
    """Return the experiments that `matching` finds. Raises UsageError if `only` leaves none."""
    found = matching(experiments, only)
    if only and not found:
        raise UsageError(
            "no experiment is left", f"--only {' --only '.join(only)}", "offramp sweep --dry-run lists all"
        )
    return found


def matching(experiments: Iterable[Experiment], only: Iterable[str], option: str = "--only") -> list[Experiment]:
    """Return the experiments whose options have the values of all `only`, such as `task=sst2` or `exit=none,oracle`.

    A value with commas is one value if an experiment has it, else several.
    Raises UsageError, naming the option of the command line, for an unknown option of an experiment.
    """
    found = list(experiments)
    for text in only:
        name, equals, values = text.partition("=")
        if not equals or name not in option_names():
            known = ", ".join(option_names())
            remedy = f"give {option} NAME=VALUE; names: {known}"
            raise UsageError(f"{option} {text}: no option of this name", None, remedy)
        whole = [each for each in found if _has(each, name, values)]
        found = whole or [each for each in found if any(_has(each, name, value) for value in values.split(","))]
    return found


def _has(each: Experiment, name: str, text: str) -> bool:
    """Return whether an option has the value that a text stands for, in the spelling of a recipe."""
    value = each.flat().get(name)
    if text == str(value) or (value is None and text == "none"):
        return True
    if isinstance(value, list):
        return text == ",".join(map(str, value))
    if isinstance(value, bool):
        return text.lower() in (("true", "yes") if value else ("false", "no"))
    if value is None or isinstance(value, str):
        return False
    try:
        if hasattr(each.engine, name):
            return replace(each.engine, **{name: text}) == each.engine
        if name == "timeout" and not text.isdecimal():  # in seconds, as records have it, or with a unit
            return parse_duration(text) == value
        return float(text) == value
    except ValueError:
        return False

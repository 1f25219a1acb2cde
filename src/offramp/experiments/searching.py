"""A search: optuna proposes the next experiment of a grid from the figures of those before.

The study is made again from the records each time, so that it is deterministic: a search that was killed continues as
if it had not been. An experiment that fails has no figures, and the sampler learns that.
"""

from __future__ import annotations

import importlib.util
import itertools
import operator
import sys
from collections.abc import Iterable, Iterator, Sequence

from offramp.errors import UsageError
from offramp.experiments.grid import Search
from offramp.experiments.results import Record
from offramp.experiments.specification import Experiment, experiment
from offramp.measure import median

MOST_REPEATED = 20
"""Successive proposals without a new experiment after which the first experiment that was not tried is taken."""


def require_optuna() -> None:
    """Raise UsageError where optuna is not installed. It is not imported."""
    if sys.modules.get("optuna", ...) is None or importlib.util.find_spec("optuna") is None:
        raise UsageError("optuna is not installed", "a Search", "pip install 'offramp[search]'")


class Study:
    """The trials of a search. Iterate over it, and `tell` the records of each experiment before the next.

    Raises UsageError without optuna.
    """

    def __init__(self, search: Search) -> None:
        require_optuna()
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.search, self._fail = search, optuna.trial.TrialState.FAIL
        self._axes, kept = search.space.axes, set(search.space)
        self._space: dict[tuple[int, ...], Experiment] = {}
        """Place of the value on each axis -> experiment, for those that the grid does not leave out."""
        for places in itertools.product(*(range(len(axis)) for axis in self._axes.values())):
            options = {name: axis[place] for (name, axis), place in zip(self._axes.items(), places, strict=True)}
            if (found := experiment(**options)) in kept:
                self._space[places] = found
        self.figures: dict[Experiment, list[float] | None] = {}
        """Experiment that was tried -> its objectives; None: it failed."""
        towards = optuna.study.StudyDirection
        directions = [towards.MAXIMIZE if name == "score" else towards.MINIMIZE for name in search.objectives]
        self._study = optuna.create_study(directions=directions, sampler=optuna.samplers.TPESampler(seed=search.seed))

    def __len__(self) -> int:
        """Return the number of trials."""
        return min(self.search.trials, len(set(self._space.values())))

    def __iter__(self) -> Iterator[Experiment]:
        repeated = 0
        while len(self.figures) < len(self):
            if repeated >= MOST_REPEATED:
                following = next(places for places, each in self._space.items() if each not in self.figures)
                self._study.enqueue_trial(dict(zip(self._axes, following, strict=True)))
            trial = self._study.ask()
            each = self._space.get(
                tuple(trial.suggest_categorical(name, range(len(axis))) for name, axis in self._axes.items())
            )
            repeated += 1
            if each is not None and each not in self.figures:
                repeated = 0
                yield each
            values = None if each is None else self.figures[each]
            self._study.tell(trial, values, state=self._fail if values is None else None)

    def tell(self, each: Experiment, records: Sequence[Record]) -> None:
        """Note the objectives of an experiment: their medians over the records of its rounds."""
        values = [
            [record["figures"][name] for record in records if record["figures"].get(name) is not None]
            for name in self.search.objectives
        ]
        self.figures[each] = [median(found) for found in values] if all(values) else None

    def front(self) -> dict[Experiment, list[float]]:
        """Return the experiments that no other one surpasses in all objectives, with their objectives."""
        found = {each: values for each, values in self.figures.items() if values is not None}
        signs = [-1 if name == "score" else 1 for name in self.search.objectives]
        costs = {each: tuple(s * value for s, value in zip(signs, own, strict=True)) for each, own in found.items()}
        return {each: own for each, own in found.items() if not is_surpassed(costs[each], costs.values())}


def is_surpassed(costs: tuple[float, ...], others: Iterable[tuple[float, ...]]) -> bool:
    """Return whether one of the others is at least as good in all costs, and better in one; less is better."""
    return any(other != costs and all(map(operator.le, other, costs)) for other in others)

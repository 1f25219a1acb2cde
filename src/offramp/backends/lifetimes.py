"""Lifetimes of the values of a program, computed once from the program alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, FrozenSet, List, Mapping, Set, Tuple

from offramp.program.program import Program

MASK = "mask"
"""Template of the kernel whose result tells attention which tokens are padding."""


@dataclass(frozen=True)
class Lifetimes:
    """The values of a program that are needed at each place."""

    read: FrozenSet[str]
    """Values that a step, an exit or the output reads."""
    ended: Mapping[int, Tuple[str, ...]]
    """Identity of a step (steps hold dicts and cannot be hashed) -> values that nothing needs after it."""
    between: Tuple[Tuple[str, ...], ...]
    """Values made by steps, masks excluded, that are needed after each stage."""


def lifetimes_of(program: Program) -> Lifetimes:
    """Return the lifetimes of a program's values. The output has no end."""
    steps = list(program.steps())
    last: Dict[str, int] = {}
    bounds: List[int] = []
    index = 0
    for stage in program.stages:
        for step in stage.steps:
            last.update((name, index) for name in (*step.writes, *step.reads.values()))
            index += 1
        if stage.exit is not None:
            last[stage.exit] = index  # the exit runs before the next step
        bounds.append(index)
    if program.output is not None:
        last[program.output.value] = len(steps)
    ended: Dict[int, List[str]] = {id(step): [] for step in steps}
    for name, index in last.items():
        if index < len(steps):
            ended[id(steps[index])].append(name)
    masks = {name for step in steps if program.kernels[step.kernel].template == MASK for name in step.writes}
    made = {name: number for number, step in enumerate(steps) for name in step.writes if name not in masks}
    between = (tuple(name for name, number in made.items() if number < bound <= last[name]) for bound in bounds)
    return Lifetimes(_read(program), {key: tuple(names) for key, names in ended.items()}, tuple(between))


def _read(program: Program) -> FrozenSet[str]:
    found: Set[str] = {name for step in program.steps() for name in step.reads.values()}
    found.update(stage.exit for stage in program.stages if stage.exit is not None)
    if program.output is not None:
        found.add(program.output.value)
    return frozenset(found)

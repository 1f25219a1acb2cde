"""Programs whose kernels are graphs captured from a run of a module.

Each piece of the run is one step; the pieces between two exits are one layer. The stages before and after the layers
are empty: the first piece reads the inputs, and the last one writes the output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from offramp.program import program as p
from offramp.program.program import Axis, Input, Kernel, LookUp, Output, Program, Stage, Step, Value

Values = Mapping[str, Value]


@dataclass(frozen=True)
class Piece:
    """One call of a captured graph. All names are in the order of the graph's inputs and results."""

    kernel: str
    """Pieces that differ only in which weights they take share one kernel."""
    reads: Tuple[str, ...]
    """Values, each an input, a look-up, or written by an earlier piece."""
    writes: Tuple[str, ...]
    weights: Tuple[str, ...]
    """Tensors that must be in memory while the piece runs."""
    constants: Tuple[str, ...]
    """Tensors that always stay in memory."""
    shards: Tuple[str, ...] = ()
    """Shards that contain the weights."""

    def step(self, values: Values) -> Step:
        """Return the step; the graph calls what it reads r0, r1, ..., weights w0, ... and constants c0, ..."""
        reads, writes = _numbered("r", self.reads), {name: values[name] for name in self.writes}
        weights, constants = _numbered("w", self.weights), _numbered("c", self.constants)
        return Step(self.kernel, reads, writes, weights, constants, self.shards)


def captured_inputs(examples: Sequence[Values], of_texts: bool) -> Tuple[Dict[str, Input], Tuple[int, int]]:
    """Return the inputs of a program, and the rows and tokens of the first example, which it was captured from.

    The first axis counts rows, and the second one tokens where texts are the input. Other axes are fixed, unless the
    examples differ in them.

    Args:
        examples: input -> dtype and sizes of every example.
    """
    inputs: Dict[str, Input] = {}
    for name, value in examples[0].items():
        names: Tuple[Axis, ...] = (p.BATCH, p.TOKENS) if of_texts else (p.BATCH,)
        others = [other[name].axes for other in examples[1:] if name in other]
        largest: List[Optional[int]] = []
        for index in range(len(value.axes)):
            sizes = {axes[index] for axes in (value.axes, *others) if len(axes) == len(value.axes)}
            largest.append(max(sizes) if len(sizes) > 1 else None)  # type: ignore[type-var]
        axes = (*names[: len(value.axes)], *value.axes[len(names) :])
        inputs[name] = Input(value.dtype, axes, tuple(largest))
    num_rows = max([1, *(value.axes[0] for value in examples[0].values() if value.axes)])  # type: ignore[type-var]
    tokens = examples[0][p.INPUT_IDS].axes[1] if of_texts else 1
    return inputs, (num_rows, tokens)  # type: ignore[return-value]


def captured_program(
    program: Program,
    pieces: Sequence[Piece],
    values: Values,
    exits: Sequence[int],
    lookups: Mapping[str, LookUp],
    output: str,
) -> Program:
    """Return a program of a module that runs as captured graphs.

    Args:
        program: inputs, meaning of the output, texts and module.
        values: every value that pieces write.
        exits: indices of the pieces before which an exit stands, ascending; the first value that such a piece reads is
            what the exit head reads.
        output: value that the module returns.
    """
    bounds = [0, *exits, len(pieces)]
    stages = [Stage("inputs", p.BEGIN)]
    for number, start in enumerate(bounds[:-1]):
        end = bounds[number + 1]
        steps = tuple(piece.step(values) for piece in pieces[start:end])
        stages.append(Stage(f"layer.{number}", p.LAYER, steps, pieces[end].reads[0] if end in exits else None))
    stages.append(Stage("answer", p.END))
    kernels = {**{piece.kernel: Kernel(p.CAPTURED) for piece in pieces}, p.EXIT_KERNEL: Kernel(p.POOLED_LINEAR)}
    answer = replace(program.output or Output(""), value=output)
    return replace(program, lookups=dict(lookups), kernels=kernels, stages=tuple(stages), output=answer)


def _numbered(letter: str, names: Sequence[str]) -> Dict[str, str]:
    return {f"{letter}{i}": name for i, name in enumerate(names)}

"""Programs whose large products are cut into blocks of output rows, so that a slot holds a block and not a whole step.

A step whose weights are larger than a block becomes several steps with a shard each:

    attention   heads (queries, keys and values of some heads, and their context) ..., join, product ..., join-norm
    up          product (with its activation) ..., join
    down        product ..., join-norm
    head        first, product (with its activation) ..., join, product ..., join
    embedding   embedding (without its projection), product ..., join

Every output is computed as before, by a product with fewer columns. The blocks of a product are as few as fit, and as
equal as their unit allows, so that slots are no larger than they must be.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from offramp.program import program as p
from offramp.program.dtypes import DTYPES
from offramp.program.encoder import HEAD_SIZE, MOST_OUTPUTS, OUTPUTS, TEMPLATES, attributes_of
from offramp.program.narrow import DEFAULTS, EXACT, ROTATION, SUFFIX, ZERO_POINT, option, plain
from offramp.program.program import Kernel, Program, Step, Value

UNIT = 16
"""Outputs of a block are a multiple of this where a block has as many: its tensors are aligned then, and libraries
compute most columns of a block with the instructions that they take for the whole product, which gives equal bits."""
_AXES = {"weight": 0, "scale": 0, "bias": 0, "exact": 1, "channels": None}
"""Part of a linear layer -> the axis of its outputs, which of integers is the last one; None if it has none."""
_ROWS = ".rows-"
"""Text between the name of a tensor that is cut and the outputs of a block."""
Tensors = Mapping[str, Tuple[str, Tuple[int, ...]]]
"""Name -> dtype as safetensors names it, and shape."""


@dataclass(frozen=True)
class Rows:
    """Outputs `start` to `stop`, along `axis`, of a tensor of the program that is cut. Without an axis it is the whole
    tensor, which each block has a copy of."""

    tensor: str
    start: int
    stop: int
    axis: Optional[int] = 0

    def name(self, tensors: Tensors) -> str:
        """Return the name of these outputs in the program with blocks."""
        is_whole = self.axis is not None and (self.start, self.stop) == (0, tensors[self.tensor][1][self.axis])
        return self.tensor if is_whole else f"{self.tensor}{_ROWS}{self.start}-{self.stop}"

    def shape(self, tensors: Tensors) -> Tuple[int, ...]:
        """Return the shape of these outputs."""
        shape = tensors[self.tensor][1]
        if self.axis is None:
            return shape
        return (*shape[: self.axis], self.stop - self.start, *shape[self.axis + 1 :])


def whole_name(tensor: str) -> str:
    """Return the name of the tensor that a tensor of a program with blocks is a part of, or its own."""
    whole, _, rows = tensor.rpartition(_ROWS)
    return whole if whole and re.fullmatch(r"\d+-\d+", rows) else tensor


BlockShards = Dict[str, Dict[str, Rows]]
"""Shard, in order of use -> port of the kernel -> what it holds."""


class CutProgram(NamedTuple):
    """A program with blocks."""

    program: Program
    shards: Dict[str, BlockShards]
    """Shard that was cut -> those that take its place."""


def cut_program(program: Program, tensors: Tensors, block_bytes: int) -> CutProgram:
    """Return the program of an encoder in which steps whose weights are larger than `block_bytes` are cut.

    A block has at least one output, and one head of attention, even if these are larger.
    """
    kernels, shards, stages = dict(program.kernels), {}, []
    for stage in program.stages:
        steps: List[Step] = []
        for step in stage.steps:
            cut = _Cut(step, kernels, tensors, block_bytes)
            if cut.is_needed:
                _CUTS[cut.template](cut)
                shards[step.shards[0]] = cut.shards
            steps += cut.steps or [step]
        stages.append(replace(stage, steps=tuple(steps)))
    called = {p.EXIT_KERNEL, *(step.kernel for stage in stages for step in stage.steps)}
    kept = {name: kernel for name, kernel in kernels.items() if name in called}
    return CutProgram(replace(program, stages=tuple(stages), kernels=kept), shards)


def spans(size: int, most: int, unit: int) -> List[Tuple[int, int]]:
    """Return (start, stop) of the fewest blocks of at most `most` of `size` outputs, larger blocks first.

    Blocks are multiples of `unit`, except the last, and differ by at most one unit. A block has at least one unit.
    """
    num_units, most_units = -(-size // unit), max(most // unit, 1)
    count = -(-num_units // most_units)
    least, num_larger = divmod(num_units, count)
    bounds = [min((index * least + min(index, num_larger)) * unit, size) for index in range(count + 1)]
    return list(zip(bounds, bounds[1:]))


class _Cut:
    """One step that is cut: the steps and shards in its place. Its methods add steps and return the values written."""

    def __init__(self, step: Step, kernels: Dict[str, Kernel], tensors: Tensors, block_bytes: int) -> None:
        """`kernels`: those of the program, to which the kernels of new steps are added."""
        self.step = step
        self.sizes: Mapping[str, Any] = kernels[step.kernel].attributes
        self.template = plain(kernels[step.kernel].template)
        self.result = next(iter(step.writes))
        self.steps: List[Step] = []
        self.shards: BlockShards = {}
        self._values: Dict[str, Value] = {}
        self._kernels, self._tensors, self._block_bytes = kernels, tensors, block_bytes

    @property
    def is_needed(self) -> bool:
        """True if the weights are larger than a block, and there is a product to cut."""
        can_be = self.template in _CUTS and (self.template != "embedding" or "project.weight" in self.step.weights)
        return can_be and self._num_bytes(self.step.weights.values()) > self._block_bytes

    def product(self, role: str, x: str, result: str, **settings: Any) -> List[str]:
        """Compute one linear layer, a block at a time. The blocks are called `result` where there is one of them."""
        shape, size = self._shape(f"{role}.weight"), self._shape(f"{role}.bias")[0]
        settings = {"rows": p.BATCH_TOKENS, "num_inputs": sum(shape) - size, "activation": None, **DEFAULTS, **settings}
        label = "block" if role == self.step.kernel else role
        return self.blocks("product", label, {"product": role}, {"x": x}, result, **settings)

    def blocks(
        self,
        template: str,
        label: str,
        roles: Mapping[str, str],
        reads: Mapping[str, str],
        result: str,
        **settings: Any,
    ) -> List[str]:
        """Compute linear layers, the same outputs of each at a time; `roles`: name in the template -> in the step."""
        taken = {f"{name}.{part}": f"{role}.{part}" for name, role in roles.items() for part in _AXES}
        names = {port: self.step.weights[role] for port, role in taken.items() if role in self.step.weights}
        size, is_narrow = self._shape(next(iter(roles.values())) + ".bias")[0], len(names) > 2 * len(roles)
        most = max(self._block_bytes * size // self._num_bytes(names.values()), 1)
        places = spans(size, most, settings.get(HEAD_SIZE) or (UNIT if most >= UNIT else 1))
        settings[MOST_OUTPUTS] = places[0][1] - places[0][0]
        axes = {**_AXES, "weight": int(is_narrow)}
        results = []
        for index, (start, stop) in enumerate(places):
            weights = {port: Rows(name, start, stop, axes[port.rpartition(".")[2]]) for port, name in names.items()}
            results.append(result if len(places) == 1 else f"{result}.{index}")
            shard = f"{label}-{index:0{len(str(len(places) - 1))}d}"
            settings[OUTPUTS] = stop - start
            self.call(label, template + SUFFIX * is_narrow, reads, results[-1], weights, shard, **settings)
        return results

    def join(self, parts: Sequence[str], result: str, label: str = "join") -> str:
        """Join blocks where there are several."""
        if list(parts) == [result]:
            return result
        width = sum(self._values[part].axes[-1] for part in parts)  # type: ignore[misc]
        return self.call(label, "join", _ports(parts), result, rows=self._values[parts[0]].axes[0], width=width)

    def add_and_norm(self, parts: Sequence[str]) -> str:
        """Join blocks, add what the step reads as `hidden`, and normalise the sum."""
        reads = {**_ports(parts), "hidden": self.step.reads["hidden"]}
        return self.call("norm", "join-norm", reads, self.result, self.whole("norm"), "norm")

    def whole(self, role: str) -> Dict[str, Rows]:
        """Return the whole weights of one role by port."""
        names = {port: name for port, name in self.step.weights.items() if port.startswith(role + ".")}
        return {port: Rows(name, 0, self._tensors[name][1][0]) for port, name in names.items()}

    def call(
        self, label: str, template: str, reads: Mapping[str, str], result: str,
        weights: Optional[Mapping[str, Rows]] = None, shard: str = "", **settings: Any,
    ) -> str:  # fmt: skip
        """Add one step, with a shard of its own for its weights.

        Args:
            label: for the name of the kernel, unless there is one of the same template and attributes.
            settings: attributes of the kernel that are not those of the step that is cut, and the number of outputs.
        """
        sizes = {**self.sizes, **settings}
        kernel = Kernel(template, attributes_of(template, sizes))
        known = [name for name, each in self._kernels.items() if each == kernel]
        name = known[0] if known else f"{self.step.kernel}-{label}"
        assert self._kernels.setdefault(name, kernel) == kernel, "kernels of one step have labels of their own"
        self._values[result] = TEMPLATES[template].sized_result(sizes)
        shards: Tuple[str, ...] = ()
        if weights:
            shards = (f"{self.step.shards[0]}-{shard}",)
            self.shards[shards[0]] = dict(weights)
        tensors = {port: rows.name(self._tensors) for port, rows in (weights or {}).items()}
        self.steps.append(Step(name, dict(reads), {result: self._values[result]}, tensors, {}, shards))
        return result

    def _shape(self, role: str) -> Tuple[int, ...]:
        return self._tensors[self.step.weights[role]][1]

    def _num_bytes(self, names: Iterable[str]) -> int:
        tensors = (self._tensors[name] for name in names)
        return sum(DTYPES[dtype].item_bytes * math.prod(shape) for dtype, shape in tensors)


def _ports(parts: Sequence[str]) -> Dict[str, str]:
    return {f"part.{index}": name for index, name in enumerate(parts)}


def _attention(cut: _Cut) -> None:
    sizes, context = cut.sizes, f"{cut.result}.context"
    head = sizes["hidden_size"] // sizes["num_heads"]
    heads = cut.blocks("heads", "qkv", {role: role for role in "qkv"}, cut.step.reads, context, head_size=head)
    cut.add_and_norm(cut.product("o", cut.join(heads, context), f"{cut.result}.o"))


def _up(cut: _Cut) -> None:
    settings = {"activation": cut.sizes["activation"], ROTATION: option(cut.sizes, ROTATION)}
    blocks = cut.product("up", cut.step.reads["hidden"], cut.result, **settings)
    cut.join(blocks, cut.result)


def _down(cut: _Cut) -> None:
    settings = {name: option(cut.sizes, name) for name in (ZERO_POINT, EXACT)}
    cut.add_and_norm(cut.product("down", cut.step.reads["inner"], f"{cut.result}.down", **settings))


def _head(cut: _Cut) -> None:
    first = cut.call("first", "first", cut.step.reads, f"{cut.result}.first")
    dense, settings = f"{cut.result}.dense", {"rows": p.BATCH, "activation": cut.sizes["activation"]}
    cut.join(cut.product("dense", first, dense, **settings), dense)
    cut.join(cut.product("out", dense, cut.result, rows=p.BATCH), cut.result, "labels")


def _embedding(cut: _Cut) -> None:
    narrow, width = f"{cut.result}.narrow", cut.sizes["embedding_size"]
    cut.call("narrow", "embedding", cut.step.reads, narrow, cut.whole("norm"), "norm", hidden_size=width)
    cut.join(cut.product("project", narrow, cut.result), cut.result)


_CUTS: Dict[str, Callable[[_Cut], None]] = {
    "attention": _attention, "up": _up, "down": _down, "head": _head, "embedding": _embedding,
}  # fmt: skip
"""Template -> function that cuts a step of it."""

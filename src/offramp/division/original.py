"""The module that is being divided: its weights, its examples, and its own answers to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from offramp.errors import OfframpError, StageError, UsageError
from offramp.program.program import Value
from offramp.streaming.capture import Arguments, tensors_of, trace_run, value_of
from offramp.streaming.placeholders import Placeholder, Weight, weights_of
from offramp.streaming.placement import ALIGNMENT_BYTES, NAMES
from offramp.streaming.stages import Trace

PLAIN = (Tensor, nn.Parameter, Placeholder)
"""Classes of weights whose data are their whole state."""
Say = Callable[[str], None]
Fetch = Callable[[str], Tensor]


@dataclass(frozen=True)
class Example:
    """Arguments of a module, and the tensors that it returns for them."""

    inputs: Arguments
    outputs: Sequence[Tensor]

    def described(self) -> dict[str, Value]:
        """Return dtype and sizes of each tensor among the arguments, by name."""
        return {name: value_of(tensor) for name, tensor in self.inputs.tensors().items()}


@dataclass(frozen=True)
class Original:
    """A module in evaluation mode, which stays as it is."""

    module: nn.Module
    weights: Mapping[str, Weight]
    fetch: Fetch
    """Returns the data of a weight, which may lie in a checkpoint and not in the module."""
    examples: tuple[Example, ...]
    """The first is the one that is traced; the division is proven with all."""
    say: Say

    @property
    def name(self) -> str:
        """Name of the module's class."""
        return type(self.module).__name__


def trace(module: nn.Module, weights: Mapping[str, Weight], example: Arguments, fetch: Fetch, made_up: bool) -> Trace:
    """Return the operations of one run.

    Raises UsageError where the module does not take an example that is `made_up`; for any other example, the exception
    of the module itself.
    """
    try:
        with undisturbed(module):
            return trace_run(module, weights, example.copy(), fetch)[0]
    except OfframpError:
        raise
    except Exception as error:
        if not made_up:
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        what = f"the example inputs do not suit a {type(module).__name__} ({type(error).__name__}: {reason})"
        raise UsageError(what, None, "give --inputs FILE.safetensors with what it takes, by name") from None


def run_examples(
    module: nn.Module,
    weights: Mapping[str, Weight],
    example: Arguments,
    more: Sequence[Arguments],
    fetch: Fetch,
    say: Say,
) -> tuple[Example, ...]:
    """Return all examples with the module's own answers.

    Without `more`, the example with another batch size and length is added, if the module takes it.
    """
    first = Example(example, _run(module, weights, example, fetch))
    if not first.outputs:
        raise StageError("the module gives no tensor, so nothing can be compared", type(module).__name__)
    if more:
        return (first, *(Example(inputs, _run(module, weights, inputs, fetch)) for inputs in more))
    for name, inputs in variations(example):
        try:
            return first, Example(inputs, _run(module, weights, inputs, fetch))
        except StageError:
            raise
        except Exception as error:  # modules raise any class for inputs that they do not take
            say(f"no proof with another {name}: {type(error).__name__}")
    return (first,)


def variations(example: Arguments) -> Iterator[tuple[str, Arguments]]:
    """Yield (name, example) with another batch size and length, then with another batch size only."""
    tensors = example.tensors()
    batched = {tensor.shape[0] for tensor in tensors.values() if tensor.dim()}
    lengths = {tensor.shape[1] for tensor in tensors.values() if tensor.dim() == 2 and not tensor.is_floating_point()}
    for longer, name in ((True, "batch size and length"), (False, "batch size")):
        if len(batched) == 1 and (not longer or (len(lengths) == 1 and max(lengths) > 2)):
            yield name, _varied(example, max(lengths, default=0) if longer else 0)


def _varied(example: Arguments, length: int) -> Arguments:
    """Return the example with one row less (or two rows of one), and about half the length in tensors of `length`."""

    def vary(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        leaf = leaf[:-1].contiguous() if len(leaf) > 1 else torch.cat([leaf, leaf])
        shorter = length and leaf.dim() > 1 and leaf.shape[1] == length
        return leaf[:, : length // 2 + 1].contiguous() if shorter else leaf

    made = Arguments(())
    made.args, made.kwargs = pytree.tree_map(vary, (example.args, example.kwargs))
    return made


def _run(module: nn.Module, weights: Mapping[str, Weight], inputs: Arguments, fetch: Fetch) -> list[Tensor]:
    """Return the module's own answer. Weights that it does not hold are fetched as they are used.

    Weights that are not aligned as in a stream, such as those of a mapped checkpoint, are fetched too: with a single
    row, alignment changes the last bits.
    """
    absent = [weight for weight in weights.values() if weight.tensor.is_meta or not _is_aligned(weight)]
    try:
        for weight in absent:
            weight.put(Placeholder(weight.name, weight.tensor, lambda name, operation: fetch(name)))
        with undisturbed(module):
            return [tensor.detach().clone() for tensor in tensors_of(inputs.copy().call(module))]
    finally:
        for weight in absent:
            weight.put(weight.tensor)


def _is_aligned(weight: Weight) -> bool:
    return weight.is_buffer or weight.tensor.data_ptr() % ALIGNMENT_BYTES == 0


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Restore the module's buffers afterwards; within, it has copies that it may write to."""
    before = [(part, dict(part._buffers)) for part in module.modules()]
    copies: dict[int, Tensor] = {}
    for part, buffers in before:
        for name, buffer in buffers.items():
            if buffer is not None and not isinstance(buffer, nn.Parameter):
                part._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
    try:
        yield
    finally:
        for part, buffers in before:
            part._buffers.update(buffers)


def require_divisible(module: nn.Module) -> None:
    """Raise StageError naming what cannot be divided: compiled code, weights without data or of other classes."""
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            what = f"{path or 'the module'} is compiled by torch.jit, so its weights cannot be taken out"
            raise StageError(what, type(module).__name__, "divide the module that it was compiled from")
    weights = weights_of(module)
    if all(weight.is_buffer for weight in weights.values()):
        raise StageError("the module has no weights, so there is nothing to divide", type(module).__name__)
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            raise StageError(f"buffer {name} has no data", type(module).__name__, "build the module with its buffers")
    for name, weight in weights.items():
        kind = type(weight.tensor)
        if kind not in PLAIN:
            remedy = "divide the module before it is quantised, and after it has run once"
            raise StageError(f"weight {name} is a {kind.__name__}", type(module).__name__, remedy)
        if weight.tensor.device.type not in ("cpu", "meta"):
            what = f"weight {name} is on {weight.tensor.device}, and a stream computes on the CPU"
            raise StageError(what, type(module).__name__, "divide module.cpu()")
        if weight.tensor.dtype not in NAMES or weight.tensor.layout != torch.strided:
            what = f"weight {name} is {weight.tensor.dtype}, {weight.tensor.layout}"
            raise StageError(what, type(module).__name__, "divide the module before it is quantised")

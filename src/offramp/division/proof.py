"""The module that is being divided, its own answers to examples, and the proof that its store gives the same answers.

For the proof, each example is run from the store under the smallest weight budget. The results are compared bit for bit
with the answers of the module itself.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from offramp.division.differences import Log, first_difference, logged
from offramp.division.snapshot import COMPILER, Snapshot, undisturbed
from offramp.errors import OfframpError, StageError, UsageError, said
from offramp.store import Store
from offramp.store.manifest import Proof, ProvenExample, ProvenInput
from offramp.streaming.capture import Arguments, Touches, are_equal, tensors_of, trace_run, value_of
from offramp.streaming.layouts import layout_of
from offramp.streaming.placeholders import Placeholder, Weight, bits, weights_of
from offramp.streaming.placement import (
    NAMES,
    data_bytes,
    plan_within,
    sliceable_shards,
    smallest_weights,
)
from offramp.streaming.stages import Trace
from offramp.streaming.streamed import Stream, StreamConfig

PLAIN = (Tensor, nn.Parameter, Placeholder)
"""Classes of weights whose data are their whole state."""
OTHERS, FROM_DATA = (
    "the divided module gives other answers than the whole one",
    "compute that from inputs and weights alone",
)
CLOSE = 1e-4
"""Largest difference of answers, relative to their largest value, that is put down to the last bits."""
QUANTIZERS = ("bitsandbytes", "hqq", "optimum", "torchao")
"""Packages whose classes of weights are quantised."""


class _Bare(nn.Parameter):
    """A class without code of its own: another one has no more attributes."""


@dataclass(frozen=True)
class Example:
    """Arguments of a module, and the tensors that it returns for them."""

    inputs: Arguments
    outputs: Sequence[Tensor]

    @property
    def shapes(self) -> str:
        """Shapes of the tensors among the arguments, in words."""
        return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.inputs.tensors().items())


@dataclass(frozen=True)
class Original:
    """A module in evaluation mode, which stays as it is."""

    module: nn.Module
    weights: Mapping[str, Weight]
    fetch: Callable[[str], Tensor]
    """Returns the data of a weight, which may lie in a checkpoint and not in the module."""
    say: Callable[[str], None]
    examples: tuple[Example, ...] = ()
    """The first is the one that is traced; the division is proven with all."""

    @property
    def name(self) -> str:
        """Name of the module's class."""
        return type(self.module).__name__

    def run(self, inputs: Arguments) -> tuple[Trace, list[Tensor]]:
        """Run the module, each weight fetched as it is used. Returns the operations, and the tensors of the answer.

        The module has none of its own weights while it runs: those of a checkpoint are not in memory, code can write
        to them, and with a single row other alignment than in a stream changes the last bits.
        """
        is_loaded = COMPILER in sys.modules
        try:
            return self._run(inputs)
        except Exception:
            if is_loaded or COMPILER not in sys.modules:
                raise
        torch.compiler.reset()  # the module has loaded it, such as for torch.cond, and nothing else was compiled
        return self._run(inputs)

    def _run(self, inputs: Arguments) -> tuple[Trace, list[Tensor]]:
        with undisturbed(self.module):
            trace, output = trace_run(self.module, self.weights, inputs.copy(), self.fetch)
            return trace, [tensor.detach().clone() for tensor in tensors_of(output)]

    def run_plain(self, inputs: Arguments) -> list[Tensor]:
        """Return the answer of the module with its own weights in place. Raises StageError if it writes to one."""
        own = {name: weight.tensor for name, weight in self.weights.items() if not weight.is_buffer}
        gradients = {name: weight.grad for name, weight in own.items()}
        try:
            for weight in own.values():
                weight.grad = None  # code can add to it
            with undisturbed(self.module), Touches(own):
                return [tensor.detach().clone() for tensor in tensors_of(inputs.copy().call(self.module))]
        finally:
            for name, weight in own.items():
                weight.grad = gradients[name]

    def require_plain(self, inputs: Arguments, outputs: Sequence[Tensor]) -> None:
        """Raise StageError unless the module with its own weights gives the answer `outputs` of a run without them.

        Code can look at more of a weight than its data: at its class, or for it as the key of a dictionary. All other
        runs of a division have placeholders, and would agree on another answer.
        """
        found = self.run_plain(inputs)
        if are_close(found, outputs):
            return
        with logged(self.module) as plain:
            self.run_plain(inputs)
        one, other = self.log(inputs), self.log(inputs)
        if one != other:
            raise self.undetermined(one, other)
        raise _other_answers(inputs, first_difference(one, plain, self.module), self.name)

    def trace(self, inputs: Arguments, *, made_up: bool) -> tuple[Trace, list[Tensor]]:
        """Return the operations and the answer of one run.

        Raises UsageError where the module does not take inputs that are `made_up`; for any others, the exception of the
        module itself.
        """
        try:
            return self.run(inputs)
        except OfframpError:
            raise
        except Exception as error:
            if not made_up:
                self._require_same_failure(inputs, error)
                raise
            what = f"the example inputs do not suit a {self.name} ({said(error)})"
            raise UsageError(what, None, "give --inputs FILE.safetensors with what it takes, by name") from None

    def _require_same_failure(self, inputs: Arguments, error: Exception) -> None:
        """Raise StageError if the module fails with `error` only while its weights are not in memory."""
        try:
            self.run_plain(inputs)
        except Exception:  # the fault is the module's own, whatever it raises with other tensors in its places
            return
        what = f"the module fails where placeholders stand for its weights ({said(error)})"
        raise StageError(what, self.name, FROM_DATA) from None

    def with_examples(
        self, inputs: Arguments, more: Sequence[Arguments], outputs: Sequence[Tensor] | None = None
    ) -> "Original":
        """Return the module with its own answers to all examples.

        Without `more`, the first example with another batch size and length is added, if the module takes it.

        Args:
            outputs: the answer of an earlier run with `inputs`, which must be the same.
        """
        examples = [self._answered(inputs)]
        if not examples[0].outputs:
            raise StageError("the module gives no tensor, so nothing can be compared", self.name)
        if outputs is not None and not are_equal(outputs, examples[0].outputs):
            raise self.undetermined(self.log(inputs), self.log(inputs))
        examples += [self._answered(each) for each in more]
        for name, varied in () if more else variations(inputs):
            try:
                examples.append(self._answered(varied))
                break
            except StageError:
                raise
            except Exception as error:  # modules raise any class for inputs that they do not take
                self.say(f"no proof with another {name}: {type(error).__name__}")
        return replace(self, examples=tuple(examples))

    def log(self, inputs: Arguments) -> Log:
        """Return the log of a run."""
        with logged(self.module) as log:
            self.run(inputs)
        return log

    def undetermined(self, one: Log, other: Log) -> StageError:
        """Return the error for a module of which two equal runs differ."""
        where = first_difference(one, other, self.module)
        what = f"two runs of the module with equal inputs and random generators give different answers: {where}"
        return StageError(what, self.name, "make it deterministic")

    def _answered(self, inputs: Arguments) -> Example:
        return Example(inputs, self.run(inputs)[1])


def are_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Return whether two lists of tensors are equal but for the last bits of floats.

    The address of a weight changes the last bits of results.
    """
    pairs = [*zip(found, expected, strict=False)]
    if len(found) != len(expected) or any((a.dtype, a.shape) != (b.dtype, b.shape) for a, b in pairs):
        return False
    differ = [(a, b) for a, b in pairs if not are_equal([a], [b])]
    if any(not a.is_floating_point() or a.layout != torch.strided or a.is_nested for a, _ in differ):
        return False
    return all(difference_of(a, b) <= max(CLOSE, 8 * torch.finfo(a.dtype).eps) for a, b in differ)


def difference_of(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two tensors of one shape, relative to the largest finite value expected."""
    finite = expected.isfinite()
    if not torch.equal(found[~finite].double(), expected[~finite].double()) and not expected.isnan().any():
        return float("inf")
    if not finite.any():
        return 0.0
    one, other = found[finite].double(), expected[finite].double()
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))


def variations(example: Arguments) -> Iterator[tuple[str, Arguments]]:
    """Yield (name, example) with another batch size and length, then with another batch size only."""
    tensors = example.tensors()
    batched = {tensor.shape[0] for tensor in tensors.values() if tensor.dim()}
    lengths = {tensor.shape[1] for tensor in tensors.values() if tensor.dim() == 2 and not tensor.is_floating_point()}
    if len(batched) != 1:
        return
    if len(lengths) == 1 and max(lengths) > 2:
        yield "batch size and length", _varied(example, max(lengths))
    yield "batch size", _varied(example, 0)


def _varied(example: Arguments, length: int) -> Arguments:
    """Return the example with one row less (or two rows of one), and about half the length in tensors of `length`."""

    def vary(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.layout != torch.strided:
            return leaf
        leaf = leaf[:-1].contiguous() if len(leaf) > 1 else torch.cat([leaf, leaf])
        shorter = length and leaf.dim() > 1 and leaf.shape[1] == length
        return leaf[:, : length // 2 + 1].contiguous() if shorter else leaf

    made = Arguments(())
    made.args, made.kwargs = pytree.tree_map(vary, (example.args, example.kwargs))
    return made


def require_divisible(module: nn.Module) -> None:
    """Raise StageError naming what cannot be divided: compiled code, weights without data or of other classes."""

    def refuse(what: str, remedy: str | None) -> None:
        raise StageError(what, type(module).__name__, remedy)

    for path, part in module.named_modules():
        maker = _maker(part)
        if maker is not None:
            what = f"{path or 'the module'} is compiled by {maker}, so its weights cannot be taken out"
            refuse(what, "divide the module that it was compiled from")
    weights = weights_of(module)
    if all(weight.is_buffer for weight in weights.values()):
        refuse("the module has no weights, so there is nothing to divide", None)
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            refuse(f"buffer {name} has no data", "build the module with its buffers")
    for name, weight in weights.items():
        tensor = weight.tensor
        fault = _fault_of(tensor)
        if fault is not None:
            refuse(f"weight {name} {fault[0]}", fault[1])
        if tensor.device.type not in ("cpu", "meta"):
            refuse(f"weight {name} is on {tensor.device}, and a stream computes on the CPU", "divide module.cpu()")


def _maker(part: nn.Module) -> str | None:
    """Return what has compiled a module into code that no longer takes its weights from it, or None."""
    if isinstance(part, torch.jit.ScriptModule):
        return "torch.jit"
    if isinstance(part, torch.fx.GraphModule) and "eval" in vars(part):  # replaced there by one that only raises
        return "torch.export"
    is_compiled = "_orig_mod" in part._modules or part._compiled_call_impl is not None
    return "torch.compile" if is_compiled else None


def _fault_of(tensor: Tensor) -> tuple[str, str] | None:
    """Return why a store cannot hold a weight, and what to do, or None if it can."""
    kind = type(tensor)
    if isinstance(tensor, Placeholder):
        return None
    if is_lazy(tensor):
        return f"is a {kind.__name__}, which has no data", "run the module once before it is divided"
    if tensor.is_quantized or kind.__module__.partition(".")[0] in QUANTIZERS:
        return f"is quantised ({tensor.dtype})", "divide the module before it is quantised"
    if kind.__module__.startswith("torch.distributed"):
        return "is distributed over processes", "put weight.full_tensor() in its place"
    own = [each for each in kind.__mro__[: kind.__mro__.index(Tensor)] if each not in PLAIN]
    if any(vars(each).keys() - vars(_Bare).keys() for each in own):
        remedy = "replace it with an nn.Parameter; divide a quantised module before it is quantised"
        return f"is a {kind.__name__}, a tensor with code of its own", remedy
    if tensor.layout != torch.strided:
        remedy = "keep its to_dense(), or register a buffer with persistent=False"
        return f"is not dense but {str(tensor.layout).removeprefix('torch.')}", remedy
    if tensor.dtype not in NAMES:
        return f"is {tensor.dtype}, which a store cannot hold", "keep it in another dtype, complex numbers as complex64"
    if tensor.is_neg():
        return "is a view that negates other memory", "replace it with its resolve_neg()"
    layout = layout_of(tensor)
    if layout is not None and not layout.fits(tensor.shape):
        return f"is a view with strides {layout.strides} of other memory", "replace it with its contiguous()"
    return None


def prove_all(original: Original, folder: Path) -> tuple[list[ProvenExample], set[str]]:
    """Run each example from the store, the first one twice, under the smallest weight budget.

    Returns the results, and the weights that were used outside their stages.
    """
    found = [_prove(original, folder, example, 1 if index else 2) for index, example in enumerate(original.examples)]
    return [proven for proven, _ in found], {name for _, names in found for name in names}


def prove_slices(original: Original, folder: Path) -> set[str]:
    """Return the weights that were planned to be read some rows at a time, and are used as a whole."""
    found: set[str] = set()
    with Store(folder, verify="never") as store:
        sliceable, module = sliceable_shards(store), store.program.module
        assert module is not None, "divided by a run"
    for example in original.examples if sliceable else ():
        with _streamed(original, folder, sliceable) as (stream, _):
            example.inputs.copy().call(stream)
            found |= stream.counts.unplanned & set(module.sliced)
    return found


def verdict(proven: Sequence[ProvenExample], original: Original, folder: Path) -> Proof:
    """Return the proof that the manifest contains. Raises StageError where an answer differs."""
    for result, example in zip(proven, original.examples, strict=True):
        if not result.equal:
            raise _disproof(original, folder, example)
    return Proof(tuple(proven), any(example.unplanned_loads or example.disorders for example in proven))


def _disproof(original: Original, folder: Path, example: Example) -> StageError:
    """Return the error for a module whose answer from the store differs, with the first step that differs."""
    one, other = (original.log(example.inputs) for _ in range(2))
    if one != other:
        return original.undetermined(one, other)
    streamed: list[Log] = []
    with _streamed(original, folder) as (stream, snapshot):
        for _ in range(2):
            snapshot.seed()
            with logged(original.module) as log:
                outputs = tensors_of(example.inputs.copy().call(stream))
            streamed.append(log)
            if not are_equal(outputs, example.outputs):
                break
    what, remedy = OTHERS, FROM_DATA
    if len(streamed) > 1:
        what, remedy, one = (
            "a second run gives another answer than the first",
            "keep no state between runs",
            streamed[1],
        )
    where = first_difference(streamed[0], one, original.module)
    return _other_answers(example.inputs, where, original.name, what, remedy)


def _other_answers(inputs: Arguments, where: str, name: str, what: str = OTHERS, remedy: str = FROM_DATA) -> StageError:
    return StageError(f"{what} for {Example(inputs, ()).shapes}: {where}", name, remedy)


@contextmanager
def _streamed(original: Original, folder: Path, sliceable: Sequence[str] = ()) -> Iterator[tuple[Stream, Snapshot]]:
    """Yield the module as it runs from a store under the smallest weight budget; afterwards it has its own weights."""
    store = Store(folder, verify="never")
    sizes, config = data_bytes(store), StreamConfig(reads="buffered")
    plan = plan_within(store, sizes, smallest_weights(store, sizes, sliceable), sliceable)
    with undisturbed(original.module) as snapshot, Stream(original.module, store, plan, sizes, config) as stream:
        yield stream, snapshot


def _prove(original: Original, folder: Path, example: Example, num_passes: int) -> tuple[ProvenExample, set[str]]:
    """Run one example from the store. Returns the result, and the weights that were used outside their stages."""
    own = {name: weight.tensor for name, weight in original.weights.items() if not weight.is_buffer}
    inputs, outputs = example.inputs, []
    with _streamed(original, folder) as (stream, snapshot):
        touches = Touches(own)
        for number in range(num_passes):
            snapshot.seed()
            with nullcontext() if number else touches:
                outputs.append(tensors_of(inputs.copy().call(stream)))
        counts, plan = stream.counts, stream.plan
    if touches.found:
        what = f"weight {min(touches.found)} is used through a reference outside its module, which cannot be replaced"
        raise StageError(what, original.name, "have the code take it from its module each time it runs")
    described, digest = {}, hashlib.sha256()
    for name, tensor in inputs.tensors().items():
        axes = tuple(axis for axis in value_of(tensor).axes if isinstance(axis, int))
        described[name] = ProvenInput(str(tensor.dtype).removeprefix("torch."), axes)
        digest.update(json.dumps([name, str(tensor.dtype), axes]).encode())
        digest.update(bits(tensor))
    proven = ProvenExample(
        described,
        digest.hexdigest(),
        all(are_equal(output, example.outputs) for output in outputs),
        unplanned_loads=-(-counts.unplanned_loads // counts.passes),
        disorders=-(-counts.disorders // counts.passes),
        peak_weight_bytes=counts.peak_weight_bytes,
        weight_budget_bytes=plan.resident_bytes + plan.pool_bytes,
    )
    return proven, counts.held | counts.unplanned

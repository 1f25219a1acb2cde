"""Places for exits in any module, found by a run of it, and a classifier with exits at these places.

An exit can stand between consecutive blocks where a single hidden state flows, of tokens or a feature map. It is the
mean over tokens or places and one linear layer.

Shapes: B rows, S tokens, H width, C labels; K exits.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from offramp.backends.torch_modules import pool
from offramp.errors import SourceError
from offramp.program.heads import DEFAULT_FORM, FORMS
from offramp.program.program import ATTENTION_MASK, INPUT_IDS, Call, can_carry_exit
from offramp.streaming.capture import Arguments, tensors_of, trace_run
from offramp.streaming.placeholders import sizes_of, weights_of
from offramp.streaming.stages import plan_stages

Point = tuple[Call, int]
"""The module call that begins after an exit, and the width of the hidden state there."""


def points_of(module: nn.Module, inputs: Any, *, of_texts: bool = False) -> list[Point]:
    """Return the places for exits, in order; none is after the last block. Weights may be on the meta device.

    Args:
        inputs: what the module is called with: a tensor, a tuple, or a dictionary.
        of_texts: the inputs are texts, so an exit needs a hidden state for each token.
    """
    weights = weights_of(module)
    empty = {name: torch.zeros(w.tensor.shape, dtype=w.tensor.dtype) for name, w in weights.items()}
    trace, _ = trace_run(module, weights, Arguments(inputs).copy(), empty.__getitem__)
    plan = plan_stages(trace, sizes_of(weights))
    found = []
    for index in plan.exits:
        part = plan.stages[index].part
        hidden = None if part.hidden is None else part.flows[part.hidden]
        if part.start is None or hidden is None:
            continue
        tokens = inputs[INPUT_IDS].shape[1] if of_texts else None
        if can_carry_exit(hidden, tokens, of_texts):
            found.append((part.start, hidden.width))
    return found


def answer_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return the logits of a classifier: the first tensor of its output, as in the graphs of its store."""
    positional = [inputs[name] for name in sorted((name for name in inputs if name.isdigit()), key=int)]
    return tensors_of(model(*positional, **{name: value for name, value in inputs.items() if not name.isdigit()}))[0]


def widened(pooled_BH: Tensor, width: int) -> Tensor:
    """Return pooled values padded with zeros to `width`."""
    return functional.pad(pooled_BH, (0, width - pooled_BH.shape[1]))


class ModuleWithExits(nn.Module):
    """A classifier and a head at each point; the last exit is the model's own head.

    Inputs are those of the model by name; positional ones are named 0, 1, ... . For texts, `attention_mask` selects the
    tokens to average, even if the model does not take it.
    """

    form = DEFAULT_FORM

    def __init__(
        self,
        model: Any,
        points: Sequence[Point],
        num_labels: int | None = None,
        problem: str = "",
        *,
        of_texts: bool = False,
    ) -> None:
        """`num_labels` and `problem` default to those of the config of a transformers model."""
        super().__init__()
        self.model, self.points = model, tuple(points)
        config = getattr(model, "config", None)
        self.problem = problem or str(getattr(config, "problem_type", None))
        num_labels = num_labels or int(config.num_labels)  # type: ignore[union-attr]
        self.heads = nn.ModuleList(nn.Linear(width, num_labels) for _, width in points)
        taken = inspect.signature(model.forward).parameters
        self._of_texts = of_texts
        self._dropped = {ATTENTION_MASK} - taken.keys() if of_texts else set()
        self._fixed = {"use_cache": False} if of_texts and "use_cache" in taken else {}
        spread = float(getattr(config, "initializer_range", None) or 0.02)
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            nn.init.normal_(head.weight, std=spread)
            nn.init.zeros_(head.bias)

    @property
    def backbone(self) -> nn.Module:
        """The model without its head; the whole model if it has no `base_model`."""
        return getattr(self.model, "base_model", self.model)

    @property
    def pooled_size(self) -> int:
        """Width H of the widest hidden state; narrower ones are padded with zeros."""
        return max((width for _, width in self.points), default=1)

    def forward(self, last_only: bool = False, **inputs: Tensor) -> list[Tensor]:
        """Return logits [B, C] of each exit, the first one first, or of the last exit alone."""
        if last_only:
            return [self._answer(inputs)]
        return self.with_hidden(**inputs)[0]

    def with_hidden(self, **inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits of each exit, and its pooled values as one token [B, 1, H]; the last repeats the one before."""
        with self._watching(inputs) as seen:
            last = self._answer(inputs)
        pooled = self._pooled(seen)
        return [*self.classify(pooled), last], [each[:, None] for each in [*pooled, pooled[-1]]] if pooled else []

    def pooled(self, **inputs: Tensor) -> list[Tensor]:
        """Return the pooled values [B, H] that the head of each exit but the last reads."""
        with self._watching(inputs) as seen:
            self._answer(inputs)
        return self._pooled(seen)

    def classify(self, pooled: Sequence[Tensor]) -> list[Tensor]:
        """Return logits of each exit but the last from the result of `pooled`."""
        found = zip(self.heads, self.points, pooled, strict=True)
        return [head(pooled_BH[:, :width]) for head, (_, width), pooled_BH in found]

    def _answer(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return answer_of(self.model, {k: x for k, x in inputs.items() if k not in self._dropped} | self._fixed)

    def exit_tensors(self) -> dict[str, Tensor]:
        """Return the content of `exits.safetensors` in float32."""
        found = {}
        for number, head in enumerate(self.heads, 1):
            for name, tensor in head.state_dict().items():
                found[FORMS[self.form].tensor_name(f"exit.{name}", number)] = tensor.to(
                    "cpu", torch.float32
                ).contiguous()
        return found

    def load_exits(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the heads from the content of `exits.safetensors`. Raises ValueError unless they fit."""
        own = {name: tuple(tensor.shape) for name, tensor in self.exit_tensors().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != own:
            raise ValueError(f"exits do not fit the model: expected {own}, got {found}")
        for number, head in enumerate(self.heads, 1):
            names = {name: FORMS[self.form].tensor_name(f"exit.{name}", number) for name in ("weight", "bias")}
            head.load_state_dict({name: tensors[stored] for name, stored in names.items()})

    def _pooled(self, seen: Mapping[Call, Tensor]) -> list[Tensor]:
        missing = [call for call, _ in self.points if call not in seen]
        if missing:
            what = f"{missing[0].module} was not called: another path than when exits were placed"
            raise SourceError(what, type(self.model).__name__, "exits need a model that always goes the same way")
        return [widened(seen[call], self.pooled_size) for call, _ in self.points]

    @contextmanager
    def _watching(self, inputs: Mapping[str, Tensor]) -> Iterator[dict[Call, Tensor]]:
        """Collect the pooled hidden state [B, H] at each point of a run. Pooled at once, since calls may modify it."""
        keep = inputs[ATTENTION_MASK][:, :, None].float() if self._of_texts else None
        seen: dict[Call, Tensor] = {}
        numbers: dict[str, int] = defaultdict(int)
        wanted = {call for call, _ in self.points}

        def watch(path: str) -> Callable[[nn.Module, tuple, dict], None]:
            def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
                numbers[path] += 1
                call = Call(path, numbers[path])
                if call in wanted:
                    hidden = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
                    seen[call] = pool(hidden, keep)

            return look

        modules = dict(self.model.named_modules())
        handles = [
            modules[path].register_forward_pre_hook(watch(path), with_kwargs=True)
            for path in {call.module for call in wanted}
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

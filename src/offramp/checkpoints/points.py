"""Where exits can stand in any module, and a classifier with exits there.

A run tells: between the blocks that follow one another, where one hidden state flows, tokens or a feature map. Its mean
over tokens or places and one linear layer are an exit.

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
from offramp.program.program import TEXT_INPUTS, Call, is_for_heads
from offramp.runtime.segments import width_of
from offramp.store.exits import DEFAULT_FORM, exit_name
from offramp.streaming.capture import Arguments, tensors_of, trace_run
from offramp.streaming.placeholders import sizes_of, weights_of
from offramp.streaming.stages import plan_stages

MASK = TEXT_INPUTS[1]
Point = tuple[Call, int]
"""The call that begins behind an exit, and the width of the hidden state there."""


def points_of(module: nn.Module, inputs: Any, *, of_texts: bool = False) -> list[Point]:
    """The places for exits, in order, none behind the last block. The module's weights may have no data.

    Args:
        inputs: what the module is called with: a tensor, a tuple, or a dictionary.
        of_texts: the inputs are those of texts, and an exit needs a hidden state of each token.
    """
    weights = weights_of(module)
    empty = {name: torch.zeros(w.tensor.shape, dtype=w.tensor.dtype) for name, w in weights.items()}
    trace, _ = trace_run(module, weights, Arguments(inputs).copy(), empty.__getitem__)
    plan = plan_stages(trace, sizes_of(weights))
    found = []
    for index in plan.exits:
        flow = plan.stages[index].flow
        hidden = None if flow.hidden is None else flow.values[flow.hidden]
        if flow.start is None or hidden is None:
            continue
        if is_for_heads(hidden, tuple(inputs[TEXT_INPUTS[0]].shape) if of_texts else None):
            found.append((flow.start, width_of(hidden)))
    return found


def answer_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The logits that a classifier gives: the first tensor of its answer, as in the graphs of its store."""
    positional = [inputs[name] for name in sorted((name for name in inputs if name.isdigit()), key=int)]
    return tensors_of(model(*positional, **{name: value for name, value in inputs.items() if not name.isdigit()}))[0]


def widened(pooled_BH: Tensor, width: int) -> Tensor:
    """Filled up with zeros."""
    return functional.pad(pooled_BH, (0, width - pooled_BH.shape[1]))


class ModuleWithExits(nn.Module):
    """A classifier and a head at each point; the last exit is the model's own head.

    Inputs are those of the model, by name; those without a name are called 0, 1, ... . Of texts, `attention_mask` tells
    which tokens are averaged, whether the model takes it or not.
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
        """`num_labels` and `problem` are those of the config, of a model of transformers."""
        super().__init__()
        self.model, self.points = model, tuple(points)
        config = getattr(model, "config", None)
        self.problem = problem or str(getattr(config, "problem_type", None))
        num_labels = num_labels or int(config.num_labels)  # type: ignore[union-attr]
        self.heads = nn.ModuleList(nn.Linear(width, num_labels) for _, width in points)
        taken = inspect.signature(model.forward).parameters
        self._of_texts = of_texts
        self._dropped = {MASK} - taken.keys() if of_texts else set()
        self._fixed = {"use_cache": False} if of_texts and "use_cache" in taken else {}
        spread = float(getattr(config, "initializer_range", None) or 0.02)
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            nn.init.normal_(head.weight, std=spread)
            nn.init.zeros_(head.bias)

    @property
    def backbone(self) -> nn.Module:
        """What was there before its head: of a model of one's own, all of it."""
        return getattr(self.model, "base_model", self.model)

    @property
    def pooled_size(self) -> int:
        """H of the widest hidden state; narrower ones are filled up with zeros."""
        return max((width for _, width in self.points), default=1)

    def forward(self, last_only: bool = False, **inputs: Tensor) -> list[Tensor]:
        """Logits [B, C] of each exit, the shallowest first, or of the last alone."""
        if last_only:
            return [self._answer(inputs)]
        return self.with_hidden(**inputs)[0]

    def with_hidden(self, **inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Logits of each exit, and what it stands on as one token [B, 1, H]; the last stands on nothing of its own."""
        with self._watching(inputs) as seen:
            last = self._answer(inputs)
        pooled = self._pooled(seen)
        return [*self.classify(pooled), last], [each[:, None] for each in [*pooled, pooled[-1]]] if pooled else []

    def pooled(self, **inputs: Tensor) -> list[Tensor]:
        """All that the heads see: [B, H] for each exit but the last."""
        with self._watching(inputs) as seen:
            self._answer(inputs)
        return self._pooled(seen)

    def classify(self, pooled: Sequence[Tensor]) -> list[Tensor]:
        """Logits of each exit but the last, of what `pooled` gives."""
        found = zip(self.heads, self.points, pooled, strict=True)
        return [head(pooled_BH[:, :width]) for head, (_, width), pooled_BH in found]

    def _answer(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return answer_of(self.model, {k: x for k, x in inputs.items() if k not in self._dropped} | self._fixed)

    def exit_tensors(self) -> dict[str, Tensor]:
        """The content of `exits.safetensors`, in float32; `store.exits` has the names."""
        found = {}
        for number, head in enumerate(self.heads, 1):
            for name, tensor in head.state_dict().items():
                found[exit_name(f"exit.{name}", number, self.form)] = tensor.to("cpu", torch.float32).contiguous()
        return found

    def load_exits(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the heads from the content of an `exits.safetensors`. Raises ValueError unless they fit."""
        own = {name: tuple(tensor.shape) for name, tensor in self.exit_tensors().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != own:
            raise ValueError(f"exits do not fit the model: expected {own}, got {found}")
        for number, head in enumerate(self.heads, 1):
            names = {name: exit_name(f"exit.{name}", number, self.form) for name in ("weight", "bias")}
            head.load_state_dict({name: tensors[stored] for name, stored in names.items()})

    def _pooled(self, seen: Mapping[Call, Tensor]) -> list[Tensor]:
        missing = [call for call, _ in self.points if call not in seen]
        if missing:
            what = f"{missing[0].module} was not called: another path than when exits were placed"
            raise SourceError(what, type(self.model).__name__, "exits need a model that always goes the same way")
        return [widened(seen[call], self.pooled_size) for call, _ in self.points]

    @contextmanager
    def _watching(self, inputs: Mapping[str, Tensor]) -> Iterator[dict[Call, Tensor]]:
        """The hidden state at each point of the run that follows, [B, H]: pooled at once, for calls may change it."""
        keep = inputs[MASK][:, :, None].float() if self._of_texts else None
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

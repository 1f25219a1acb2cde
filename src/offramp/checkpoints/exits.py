"""Classifiers with several exits, and the forward pass through all of them.

The last exit is the model's own head, so its answers are those of the model. Every layer runs; no row stops early. In
an encoder with known tensor names an exit stands after each layer. In any other module a run finds the places: between
consecutive blocks where a single hidden state flows, of tokens or a feature map.

Shapes: B rows, S tokens, H width, C labels; K exits.
"""

import inspect
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from offramp.backends.torch_modules import ExitHead, pool
from offramp.checkpoints.families import family_of
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
    tokens = inputs[INPUT_IDS].shape[1] if of_texts else None
    found = []
    for part in (plan.stages[index].part for index in plan.exits):
        hidden = None if part.hidden is None else part.flows[part.hidden]
        if part.start is not None and hidden is not None and can_carry_exit(hidden, tokens, of_texts):
            found.append((part.start, hidden.width))
    return found


def answer_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return the logits of a classifier: the first tensor of its output, as in the graphs of its store."""
    positional = [inputs[name] for name in sorted((name for name in inputs if name.isdigit()), key=int)]
    return tensors_of(model(*positional, **{name: value for name, value in inputs.items() if not name.isdigit()}))[0]


def widened(pooled_BH: Tensor, width: int) -> Tensor:
    """Return pooled values padded with zeros to `width`."""
    return functional.pad(pooled_BH, (0, width - pooled_BH.shape[1]))


class WithExits(nn.Module):
    """A classifier with a head for each exit but the last, which is the model's own head.

    Inputs are those of the model by name. New heads are drawn from torch's generator, as transformers initialises the
    model's own head.
    """

    form = DEFAULT_FORM
    """Form of the heads, a key of `program.heads.FORMS`."""
    heads: Any
    """nn.ModuleList of the heads."""
    pooled_size = 1
    """Width H of the values that heads read."""
    _role_prefix = ""
    """Prefix of the names in the state of a head that makes them roles of its form."""

    def __init__(self, model: Any, heads: Iterable[nn.Module], spread: float) -> None:
        """`spread`: standard deviation of the weights of new heads."""
        super().__init__()
        self.model, self.heads = model, nn.ModuleList(heads)
        self.problem = str(getattr(getattr(model, "config", None), "problem_type", None))
        for module in self.heads.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=spread)
                nn.init.zeros_(module.bias)

    @property
    def backbone(self) -> nn.Module:
        """The model without its head; the whole model if it has no `base_model`."""
        return getattr(self.model, "base_model", self.model)

    def forward(self, last_only: bool = False, **inputs: Tensor) -> list[Tensor]:
        """Return logits [B, C] of each exit, the first one first, or of the last exit alone."""
        return [self._answer(inputs)] if last_only else self.with_hidden(**inputs)[0]

    def with_hidden(self, **inputs: Tensor) -> tuple[list[Tensor], Sequence[Tensor]]:
        """Return logits of each exit, and hidden states [B, S, H] where they stand; S is 1 where only pooled values are
        kept, of which the last repeats the one before.
        """
        last, pooled, hidden = self._run(inputs)
        return [*self.classify(pooled), last], hidden

    def pooled(self, **inputs: Tensor) -> list[Tensor]:
        """Return the pooled values [B, H] that the head of each exit but the last reads."""
        return self._run(inputs)[1]

    def classify(self, pooled: Sequence[Tensor]) -> list[Tensor]:
        """Return logits of each exit but the last from the result of `pooled`."""
        raise NotImplementedError

    def exit_tensors(self) -> dict[str, Tensor]:
        """Return the content of `exits.safetensors` in float32."""
        return {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in self._exit_state().items()}

    def load_exits(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the heads from the content of `exits.safetensors`. Raises ValueError unless they fit."""
        own = self._exit_state()
        wanted, found = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (own, tensors))
        if found != wanted:
            raise ValueError(f"exits do not fit the model: expected {wanted}, got {found}")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def _exit_state(self) -> dict[str, Tensor]:
        """Return name in `exits.safetensors` -> tensor of a head, which shares its memory."""
        found = {}
        for number, head in enumerate(self.heads, 1):
            state = head.state_dict(prefix=self._role_prefix)
            found.update({FORMS[self.form].tensor_name(role, number): state[role] for role in state})
        return found

    def _answer(self, inputs: Mapping[str, Any]) -> Tensor:
        return answer_of(self.model, inputs)

    def _run(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor], Sequence[Tensor]]:
        """Return the logits of the last exit, the pooled values of the others, and the hidden states of all."""
        raise NotImplementedError


class ModelWithExits(WithExits):
    """A `...ForSequenceClassification` of transformers with a head for each layer but the last.

    Raises SourceError for a model of a family that offramp does not divide.
    """

    _shared: nn.Module | None = None
    """The first layer of the model's own head, if all exits share it."""

    def __init__(self, model: Any, form: str = DEFAULT_FORM) -> None:
        config = {**json.loads(model.config.to_json_string(use_diff=False)), "architectures": [type(model).__name__]}
        family = family_of(config)
        encoder = family.encoder(config)
        sizes: dict[str, Any] = {"hidden_size": encoder.hidden_size, "num_labels": len(encoder.labels)}
        sizes["activation"] = encoder.head_activation
        heads = [ExitHead(sizes, FORMS[form]) for _ in range(encoder.num_layers - 1)]
        super().__init__(model, heads, float(model.config.initializer_range))
        self.form, self.encoder, self.pooled_size = form, encoder, encoder.hidden_size
        # Dropout before the last layer of the model's own head; the first name is DistilBERT's.
        names = ("seq_classif_dropout", "classifier_dropout", "hidden_dropout_prob")
        settings = [getattr(model.config, name, None) for name in names]
        self._dropout = float(next(value for value in settings if value is not None))
        if FORMS[form].shared:  # used by every head and owned by none, so that it is saved once
            shared = family.names("head", family.base)["dense.weight"].removesuffix(".weight")
            vars(self)["_shared"] = model.get_submodule(shared)
            for head in self.heads:
                del head.exit.dense
                vars(head.exit)["dense"] = self._shared

    def classify(self, pooled: Sequence[Tensor]) -> list[Tensor]:
        """Return logits of each exit but the last from the result of `pooled`."""
        dropout = self._dropout if self.training else 0.0
        return [head.classify(pooled_BH, dropout) for head, pooled_BH in zip(self.heads, pooled, strict=True)]

    def _exit_state(self) -> dict[str, Tensor]:
        return super()._exit_state() | ({} if self._shared is None else self._shared.state_dict(prefix="exit.dense."))

    def _run(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor], Sequence[Tensor]]:
        # The mask stays 0 and 1: each model of transformers makes of it what its attention needs.
        output = self.model(**inputs, output_hidden_states=True)
        _, *between, last = output.hidden_states  # the embeddings and the last layer have no head here
        keep_BS1 = inputs[ATTENTION_MASK].unsqueeze(-1).to(last.dtype)
        pooled = [head.pool(hidden_BSH, keep_BS1) for head, hidden_BSH in zip(self.heads, between, strict=True)]
        return output.logits, pooled, [*between, last]


class ModuleWithExits(WithExits):
    """Any classifier with a head at each point: the mean over tokens or places, and one linear layer.

    Positional inputs are named 0, 1, ... . For texts, `attention_mask` selects the tokens to average, even if the model
    does not take it. Pooled values are padded with zeros to the width of the widest.
    """

    _role_prefix = "exit."

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
        config: Any = getattr(model, "config", None)
        num_labels = num_labels or int(config.num_labels)
        heads = [nn.Linear(width, num_labels) for _, width in points]
        super().__init__(model, heads, float(getattr(config, "initializer_range", None) or 0.02))
        self.problem, self.points = problem or self.problem, tuple(points)
        self.pooled_size = max((width for _, width in points), default=1)
        taken = inspect.signature(model.forward).parameters
        self._of_texts = of_texts
        self._dropped = {ATTENTION_MASK} - taken.keys() if of_texts else set()
        self._fixed = {"use_cache": False} if of_texts and "use_cache" in taken else {}

    def classify(self, pooled: Sequence[Tensor]) -> list[Tensor]:
        """Return logits of each exit but the last from the result of `pooled`."""
        found = zip(self.heads, self.points, pooled, strict=True)
        return [head(pooled_BH[:, :width]) for head, (_, width), pooled_BH in found]

    def _answer(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return super()._answer({k: x for k, x in inputs.items() if k not in self._dropped} | self._fixed)

    def _run(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor], Sequence[Tensor]]:
        """Watch the hidden state at each point of a run. It is pooled at once, since calls may modify it."""
        keep = inputs[ATTENTION_MASK][:, :, None].float() if self._of_texts else None
        seen: dict[Call, Tensor] = {}
        numbers: Counter[str] = Counter()
        wanted = [call for call, _ in self.points]

        def watch(path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
            numbers[path] += 1
            call = Call(path, numbers[path])
            if call in wanted:
                hidden = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
                seen[call] = pool(hidden, keep)

        with ExitStack() as hooks:
            for path in {call.module for call in wanted}:
                module = self.model.get_submodule(path)
                hooks.enter_context(module.register_forward_pre_hook(partial(watch, path), with_kwargs=True))
            last = self._answer(inputs)
        missing = [call for call in wanted if call not in seen]
        if missing:
            what = f"{missing[0].module} was not called: another path than when exits were placed"
            raise SourceError(what, type(self.model).__name__, "exits need a model that always goes the same way")
        pooled = [widened(seen[call], self.pooled_size) for call in wanted]
        return last, pooled, [each[:, None] for each in (*pooled, *pooled[-1:])]

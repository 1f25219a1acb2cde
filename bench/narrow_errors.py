"""Where int8 stores differ from float32: `python bench/narrow_errors.py RUN --data GLUE [--task mrpc]`.

RUN is a run folder of a BERT with exits (form mean-linear). The integers of weights and activations are simulated in
PyTorch, as stores have them: one part at a time, and with one technique of a store left out at a time. Printed are the
error of the logits of all exits, and the share of dev rows that leave at the same exit as in float32. Gaussian noise on
the logits of float32 shows the largest error that a method may have.

Shapes: B rows, S tokens, K inputs, O outputs of a linear layer, E exits, N rows, C labels.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from offramp.policies import parse, replay
from offramp.program.narrow import (
    CHOSEN_EXACT,
    DEFAULTS,
    LARGEST_PAIR,
    LARGEST_WEIGHT,
    LEAST_MAGNITUDE,
    LOW_ZERO_POINT,
    MOST_ROTATED,
    ZERO_POINT,
    hadamard,
    steps_of,
)
from offramp.tasks import glue

POLICIES = ("patience:1", "patience:2", "patience:3", "confidence:0.8", "confidence:0.9", "entropy:0.3")
KINDS = {"query": "q/k/v", "key": "q/k/v", "value": "q/k/v", "intermediate.dense": "up", "attention.output.dense": "o"}
EVERY = ("q/k/v", "o", "up", "down")
BATCH = 34
Round = Callable[[Tensor], Tensor]


def rounded(x: Tensor, largest: float, axis: int = -1) -> Tensor:
    """Return x as integers up to `largest` with a scale along an axis stand for it."""
    scale = x.abs().amax(axis, keepdim=True).clamp_min(LEAST_MAGNITUDE) / largest
    return (x / scale).round() * scale


def by_pairs(weight_OK: Tensor) -> Tensor:
    """Return rounded weights, with the scale of each output that its largest pair of neighbours allows."""
    scale_O1 = weight_OK.abs().unflatten(1, (-1, 2)).sum(2).amax(1, keepdim=True) / (LARGEST_PAIR - 1)
    return (weight_OK / scale_O1).round() * scale_O1


def with_exact_inputs(weight: Round, number: int = CHOSEN_EXACT) -> Round:
    """Return a rounding of weights that leaves the inputs with the largest ones as they are."""

    def rounding(weight_OK: Tensor) -> Tensor:
        exact = weight_OK.abs().amax(0).argsort(descending=True)[:number]
        rest_OK = weight_OK.index_fill(1, exact, 0)
        return weight(rest_OK).index_copy(1, exact, weight_OK[:, exact])

    return rounding


def activations(zero_point: int = DEFAULTS[ZERO_POINT]) -> Round:
    """Return the rounding of rows of activations, each by its own scale."""
    below, above = steps_of({ZERO_POINT: zero_point})

    def rounding(x: Tensor) -> Tensor:
        scale = torch.maximum(x.amax(-1, keepdim=True) / above, -x.amin(-1, keepdim=True) / below)
        scale = scale.clamp_min(LEAST_MAGNITUDE / above)
        return (x / scale).round() * scale

    return rounding


def of_a_tensor(x: Tensor) -> Tensor:
    """Return activations as ONNX Runtime's `quantize_dynamic` has them: one scale and zero point for all tokens."""
    low, high = x.amin((-2, -1), keepdim=True).clamp_max(0), x.amax((-2, -1), keepdim=True).clamp_min(0)
    scale = (high - low) / 255
    zero = (-low / scale).round()
    return ((x / scale + zero).round().clamp(0, 255) - zero) * scale


class Part(NamedTuple):
    """How the products of one kind are rounded."""

    weight: Round | None = by_pairs
    activation: Round | None = activations()
    rotation: int = 1


STORE = {
    "q/k/v": Part(rotation=MOST_ROTATED),
    "o": Part(),
    "up": Part(rotation=MOST_ROTATED),
    "down": Part(with_exact_inputs(by_pairs), activations(LOW_ZERO_POINT)),
}
"""Rounding of each kind of product in an int8 store."""


def only(field: str) -> dict[str, Part]:
    """Return the parts of a store with nothing rounded but weights, or activations."""
    other = "activation" if field == "weight" else "weight"
    return {kind: part._replace(**{other: None}) for kind, part in STORE.items()}


def seven_bits(weight_OK: Tensor) -> Tensor:
    """Return weights with single ones up to half a pair."""
    return rounded(weight_OK, LARGEST_PAIR // 2)


def of_whole_tensors(weight_OK: Tensor) -> Tensor:
    """Return weights of 8 bits with one scale."""
    return rounded(weight_OK.reshape(1, -1), LARGEST_WEIGHT).view_as(weight_OK)


UNROTATED = {kind: part._replace(rotation=1) for kind, part in STORE.items()}
PARTS: dict[str, dict[str, Part]] = {
    "int8 store": STORE,
    "weights": only("weight"),
    **{f"weights of {kind}": {kind: only("weight")[kind]} for kind in EVERY},
    "activations": only("activation"),
    **{f"activations of {kind}": {kind: only("activation")[kind]} for kind in EVERY},
    "int8 store without rotations": UNROTATED,
    "... without exact inputs": {**STORE, "down": STORE["down"]._replace(weight=by_pairs)},
    "... with as many steps below 0": {**STORE, "down": STORE["down"]._replace(activation=activations())},
    "... with single weights up to 64": {
        **{kind: part._replace(weight=seven_bits) for kind, part in STORE.items()},
        "down": STORE["down"]._replace(weight=with_exact_inputs(seven_bits)),
    },
    "... without all of these": dict.fromkeys(EVERY, Part(seven_bits)),
    "a scale for each tensor, as `quantize_dynamic`": dict.fromkeys(EVERY, Part(of_whole_tensors, of_a_tensor)),
}
"""Name -> how the products of each kind are rounded; others are not."""


class Exits:
    """Every exit of a run folder on the dev rows of a task."""

    def __init__(self, folder: Path, rows: list[Any]) -> None:
        from safetensors.torch import load_file

        self.model: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        self.heads, tokenizer = load_file(folder / "exits.safetensors"), AutoTokenizer.from_pretrained(folder)
        texts = [row.text if isinstance(row.text, tuple) else (row.text,) for row in rows]
        options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
        self.batches = []
        for start in range(0, len(texts), BATCH):
            sides = map(list, zip(*texts[start : start + BATCH], strict=True))
            self.batches.append(tokenizer(*sides, **options))

    @torch.no_grad()
    def logits(self, parts: Mapping[str, Part]) -> np.ndarray:
        """Return the logits [E, N, C] with the products of some kinds rounded."""
        hooks, kept = [], []
        for name, layer in self.model.named_modules():
            kind = next((kind for end, kind in KINDS.items() if name.endswith(end)), "down")
            if not isinstance(layer, torch.nn.Linear) or ".layer." not in name or kind not in parts:
                continue
            part = parts[kind]
            turn, rounding = torch.tensor(hadamard(part.rotation)), part.activation or (lambda x: x)
            kept.append((layer, layer.weight.data))
            turned = rotated(layer.weight.data, turn)
            layer.weight.data = turned if part.weight is None else part.weight(turned)
            hooks.append(
                layer.register_forward_pre_hook(
                    lambda _, inputs, turn=turn, rounding=rounding: (rounding(rotated(inputs[0], turn)),)
                )
            )
        found = [self._exits(batch) for batch in self.batches]
        for layer, before in kept:
            layer.weight.data = before
        for hook in hooks:
            hook.remove()
        return np.concatenate(found, axis=1)

    def _exits(self, batch: Any) -> np.ndarray:
        out, keep_BS1 = self.model(**batch, output_hidden_states=True), batch["attention_mask"][..., None]
        pooled = [(each * keep_BS1).sum(1) / keep_BS1.sum(1) for each in out.hidden_states[1:-1]]
        heads = [
            (self.heads[f"exit.{exit}.weight"], self.heads[f"exit.{exit}.bias"]) for exit in range(1, len(pooled) + 1)
        ]
        logits = [mean_BK @ weight.T + bias for mean_BK, (weight, bias) in zip(pooled, heads, strict=True)]
        return torch.stack([*logits, out.logits]).numpy()


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Multiply the last axis by a rotation, a part of it at a time."""
    return (x.unflatten(-1, (-1, len(turn))) @ turn).flatten(-2)


def show(name: str, found_ENC: np.ndarray, wide_ENC: np.ndarray) -> None:
    """Print a row of the table."""
    error = np.sqrt(np.mean((found_ENC - wide_ENC) ** 2))
    exits = [
        [replay(parse(text), each, "single_label_classification") for each in (found_ENC, wide_ENC)]
        for text in POLICIES
    ]
    same = " | ".join(f"{100 * np.mean(one == other):.1f}" for one, other in exits)
    print(f"| {name} | {error:.4f} | {same} |", flush=True)


def main() -> None:
    """Read the arguments, simulate, and print the table."""
    parser = argparse.ArgumentParser(description="Where int8 stores differ from float32.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", default="mrpc")
    args = parser.parse_args()
    exits = Exits(args.run, glue.load_files(glue.task_of(args.task), args.data).named(["dev"])["dev"])
    wide_ENC, rng = exits.logits({}), np.random.default_rng(0)
    print(f"| rounded | error of logits | {' | '.join(POLICIES)} |\n{'|---' * (2 + len(POLICIES))}|")
    for name, parts in PARTS.items():
        show(name, exits.logits(parts), wide_ENC)
    for deviation in (0.01, 0.02, 0.03):
        noise_ENC = rng.normal(0, deviation, wide_ENC.shape).astype(np.float32)
        show(f"noise of {deviation}", wide_ENC + noise_ENC, wide_ENC)


if __name__ == "__main__":
    main()

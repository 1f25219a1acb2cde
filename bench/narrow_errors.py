"""Where int8 stores differ from float32: `python bench/narrow_errors.py RUN --data GLUE [--task mrpc]`.

RUN is a run folder of a BERT with exits (form mean-linear). The integers of weights and activations are simulated in
PyTorch, one part at a time: the error of the logits of all exits, and the share of dev rows that leave at the same exit
as in float32. Gaussian noise on the logits of float32 says what errors any method may have.

Shapes: B rows, S tokens, K inputs, O outputs of a linear layer, E exits, N rows, C labels.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from offramp.policies import parse, replay
from offramp.program.narrow import LARGEST_ACTIVATION, LARGEST_WEIGHT, LEAST_MAGNITUDE
from offramp.tasks import glue

POLICIES = ("patience:1", "patience:2", "patience:3", "confidence:0.8", "confidence:0.9", "entropy:0.3")
KINDS = {"query": "q/k/v", "key": "q/k/v", "value": "q/k/v", "intermediate.dense": "up", "attention.output.dense": "o"}
BATCH = 34
Round = Callable[[Tensor], Tensor]


def rounded(x: Tensor, largest: int, axis: int = -1) -> Tensor:
    """Return x as integers up to `largest` with a scale along an axis stand for it."""
    scale = x.abs().amax(axis, keepdim=True).clamp_min(LEAST_MAGNITUDE) / largest
    return (x / scale).round() * scale


def with_exact_outputs(weight_OK: Tensor, number: int = 1) -> Tensor:
    """Return rounded weights, but for the outputs whose largest weight is furthest above the others."""
    found_OK, excess_O = rounded(weight_OK, LARGEST_WEIGHT), weight_OK.abs().amax(1) / weight_OK.pow(2).mean(1).sqrt()
    exact = excess_O.argsort(descending=True)[:number]
    found_OK[exact] = weight_OK[exact]
    return found_OK


def of_a_tensor(x: Tensor) -> Tensor:
    """Return activations as ONNX Runtime's `quantize_dynamic` has them: one scale and zero point for all tokens."""
    low, high = x.amin((-2, -1), keepdim=True).clamp_max(0), x.amax((-2, -1), keepdim=True).clamp_min(0)
    scale = (high - low) / 255
    zero = (-low / scale).round()
    return ((x / scale + zero).round().clamp(0, 255) - zero) * scale


def weights(largest: int) -> Round:
    """Return the rounding of weights to integers up to `largest`."""
    return lambda weight: rounded(weight, largest)


def activations(x: Tensor) -> Tensor:
    """Return activations as int8 stores have them."""
    return rounded(x, LARGEST_ACTIVATION)


SEVEN, EIGHT = weights(LARGEST_WEIGHT), weights(127)
EVERY = ("q/k/v", "o", "up", "down")
PARTS: dict[str, tuple[Round | None, Round | None, tuple[str, ...]]] = {
    "int8 store": (SEVEN, activations, EVERY),
    "weights": (SEVEN, None, EVERY),
    **{f"weights of {kind}": (SEVEN, None, (kind,)) for kind in EVERY},
    "weights of down, one output of each layer exact": (with_exact_outputs, None, ("down",)),
    "activations": (None, activations, EVERY),
    **{f"activations of {kind}": (None, activations, (kind,)) for kind in EVERY},
    "weights of 8 bits": (EIGHT, None, EVERY),
    "weights of 8 bits, activations": (EIGHT, activations, EVERY),
    "a scale for each tensor, as `quantize_dynamic`": (
        lambda weight: rounded(weight.reshape(1, -1), 127).view_as(weight), of_a_tensor, EVERY,
    ),
}  # fmt: skip
"""Rounding of weights, of activations, and the products that have it."""


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
    def logits(self, weight: Round | None, activation: Round | None, kinds: tuple[str, ...]) -> np.ndarray:
        """Return the logits [E, N, C] with the products of some kinds rounded."""
        hooks, kept = [], []
        for name, layer in self.model.named_modules():
            if not isinstance(layer, torch.nn.Linear) or ".layer." not in name:
                continue
            if next((kind for end, kind in KINDS.items() if name.endswith(end)), "down") not in kinds:
                continue
            if weight is not None:
                kept.append((layer, layer.weight.data))
                layer.weight.data = weight(layer.weight.data)
            if activation is not None:
                hooks.append(layer.register_forward_pre_hook(lambda _, inputs: (activation(inputs[0]),)))
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
    wide_ENC, rng = exits.logits(None, None, ()), np.random.default_rng(0)
    print(f"| rounded | error of logits | {' | '.join(POLICIES)} |\n{'|---' * (2 + len(POLICIES))}|")
    for name, part in PARTS.items():
        show(name, exits.logits(*part), wide_ENC)
    for deviation in (0.01, 0.02, 0.03):
        noise_ENC = rng.normal(0, deviation, wide_ENC.shape).astype(np.float32)
        show(f"noise of {deviation}", wide_ENC + noise_ENC, wide_ENC)


if __name__ == "__main__":
    main()

"""A zoo of tiny models of every kind, to try on them what offramp promises of any PyTorch model.

Configurations are shrunk to a hidden size of about 32 and a few layers, and **weights are random**: nothing here says
anything about accuracy. What a specimen keeps of its architecture is what dividing it can get wrong: the order in which
weights are used, weights that are shared, used twice, used outside their module, or chosen by the data.

`python -m tests.zoo.survey [NAME ...] [--families transformers torchvision timm]` builds each twice and once more as a
weightless skeleton that is filled with its weights, and runs all on two inputs; the answers must be finite and agree
bit for bit. One line a model; exit code 1 if any fails. What this environment cannot offer is listed by name with the
reason; vision.py says how to make one for torchvision and timm.
"""

import argparse
import collections
import importlib.util
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from tests.zoo import images, media, text, vision
from tests.zoo.specimen import Specimen, resolve

__all__ = ["FAMILIES", "Specimen", "call", "scramble", "specimens", "survey", "tensors"]

FAMILIES = ("transformers", "torchvision", "timm")
BATCH, LENGTH = 2, 16
OTHER_BATCH, OTHER_LENGTH = 3, 9
NOISE = 0.1


def survey(families: Iterable[str] = ("transformers",)) -> tuple[list[Specimen], dict[str, str]]:
    """What this environment can show, and by name why it cannot show the rest."""
    found: list[Specimen] = []
    missing: dict[str, str] = {}
    for family in families:
        if family == "transformers":
            if importlib.util.find_spec("torchvision"):
                # Transformers imports it too, and fails where the plain import fails.
                vision.import_torchvision()
            for kind, inputs, table in (*text.TABLES, *images.TABLES, *media.TABLES):
                shown, absent = resolve(kind, inputs, table)
                found += shown
                missing |= absent
            missing |= media.LEFT_OUT
        elif family in FAMILIES:
            shown, absent = vision.resolve(family)
            found += shown
            missing |= absent
        else:
            raise ValueError(f"a family is one of {', '.join(FAMILIES)}, not {family!r}")
    return found, missing


def specimens(families: Iterable[str] = ("transformers",)) -> list[Specimen]:
    """What this environment can show; what it cannot goes to stderr, by name with the reason."""
    found, missing = survey(families)
    for name, reason in missing.items():
        print(f"not in the zoo: {name}: {reason}", file=sys.stderr)
    return found


def scramble(model: nn.Module, seed: int = 0) -> None:
    """Noise on all that a checkpoint holds, so that no norm weight is 1, no bias 0, and a wrong or missing one shows.

    Matrices get as much as keeps a signal at its size. Many initial weights are so small that the answers of a deep
    model are those of its biases, whatever goes in and whatever its first layers hold.
    """
    generator = torch.Generator().manual_seed(seed)
    buffers = dict(model.named_buffers())
    stored = {name: buffers[name] for name in model.state_dict() if name in buffers}
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *stored.items()):
            if not value.is_floating_point() or not value.numel():
                continue
            fan_in = value[0].numel() if value.ndim > 1 else 1
            noise = torch.randn(value.shape, generator=generator).to(value.dtype)
            noise *= NOISE if fan_in == 1 else fan_in**-0.5
            if name.endswith("running_var"):
                value.mul_(noise.exp())
            elif value.ndim == 1 and name.endswith("weight"):
                # Some norms begin at 0, so that their block does nothing.
                value.copy_(1 + noise)
            else:
                value.add_(noise)


def call(model: nn.Module, inputs: dict[str, Any] | tuple[Any, ...]) -> Any:
    """The model's answer, whichever way its inputs are given."""
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def tensors(answer: Any) -> list[torch.Tensor]:
    """All tensors of an answer, in order; anything that is not one, nor holds any, is passed over."""
    if isinstance(answer, torch.Tensor):
        return [answer]
    if isinstance(answer, dict):
        answer = list(answer.values())
    return [tensor for part in answer for tensor in tensors(part)] if isinstance(answer, list | tuple) else []


def others(answer: Any) -> set[str]:
    """Names of the types in an answer that are neither tensors nor hold any."""
    if isinstance(answer, dict):
        answer = list(answer.values())
    if isinstance(answer, list | tuple):
        return {name for part in answer for name in others(part)}
    return set() if isinstance(answer, torch.Tensor) else {type(answer).__name__}


def equal(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    """Bit for bit, so that -0 differs from 0."""

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    return len(first) == len(second) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
        for a, b in zip(first, second, strict=True)
    )


def skeleton_of(specimen: Specimen) -> nn.Module:
    """The model without weights, its buffers in place."""
    if specimen.skeleton is not None:
        return specimen.skeleton()
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return specimen.build()


def examine(specimen: Specimen) -> tuple[str, str]:
    """Sizes of the model, and `ok` or what is wrong with it."""
    lengths = (LENGTH, LENGTH if specimen.fixed_length else OTHER_LENGTH)
    started = time.perf_counter()
    torch.manual_seed(0)
    model = specimen.build()
    seconds = time.perf_counter() - started
    scramble(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    weights = list(model.parameters())
    sizes = (
        f"{sum(w.numel() for w in weights):>9,} {sum(w.nbytes for w in weights):>11,} B {len(weights):>4} weights "
        f"{len(named) - len(weights):>3} tied {seconds:5.2f} s"
    )
    torch.manual_seed(0)
    again = specimen.build()
    scramble(again)
    if not equal(weights, list(again.parameters())):
        return sizes, "weights differ from one build to the next"
    bare = skeleton_of(specimen)
    bare.load_state_dict(model.state_dict(), assign=True)
    left = [name for name, value in bare.named_buffers() if value.is_meta]
    if left:
        return sizes, f"skeleton leaves buffers on meta: {', '.join(left)}"
    notes = {"fixed length"} if specimen.fixed_length else set()
    for batch, length in zip((BATCH, OTHER_BATCH), lengths, strict=True):
        inputs = specimen.inputs(batch, length)
        # Without a seed: a model that draws numbers as it runs is not for this zoo.
        answers = [call(copy, inputs) for copy in (model, model, again, bare)]
        first, *rest = map(tensors, answers)
        if not first:
            return sizes, "answers with no tensor"
        if not all(bool(tensor.isfinite().all()) for tensor in first):
            return sizes, f"not finite at batch {batch}, length {length}"
        for answer, what in zip(rest, ("a second run", "a second build", "the skeleton"), strict=True):
            if not equal(first, answer):
                return sizes, f"{what} differs at batch {batch}, length {length}"
        notes |= others(answers[0])
    return sizes, "; ".join(["ok", *sorted(notes)])


def main() -> int:
    parser = argparse.ArgumentParser(description="Build and run every model of the zoo.")
    parser.add_argument("names", nargs="*", help="these alone")
    parser.add_argument("--families", nargs="+", default=["transformers"], choices=FAMILIES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found, missing = survey(arguments.families)
    chosen = [specimen for specimen in found if not arguments.names or specimen.name in arguments.names]
    failed, kinds = [], collections.Counter[str]()
    for specimen in chosen:
        try:
            sizes, verdict = examine(specimen)
        except Exception as error:
            sizes, verdict = "", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        kinds[specimen.kind] += 1
        if verdict.split(";")[0] != "ok":
            failed.append(specimen.name)
        print(f"{specimen.name:30} {specimen.kind:16} {sizes} {verdict}", flush=True)
    for name, reason in missing.items():
        print(f"{name:30} not in the zoo: {reason}")
    print(", ".join(f"{number} {kind}" for kind, number in kinds.most_common()))
    print(f"{len(chosen)} models, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())

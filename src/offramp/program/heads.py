"""Forms of exit heads, and the tensors that each form has.

Exit K, from 1, stands after layer K; the last exit is the model's own head and has no tensors here.

Shapes: H width of the value that a head reads, C labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Tuple, TypeVar

Shapes = Dict[str, Tuple[int, ...]]
"""Role -> shape."""
Size = TypeVar("Size", int, str)


@dataclass(frozen=True)
class HeadForm:
    """Computation of logits [B, C] from the value after a layer."""

    pool: str
    """`mean` over the tokens (or places of a feature map) of each row, or the `first` token."""
    depth: int
    """Linear layers: 1, or 2 with the activation of the model's own head between them."""
    shared: bool = False
    """All exits share the first layer of the model's own head, as in PABEE (Zhou et al. 2020)."""

    @property
    def name(self) -> str:
        """Key of this form in FORMS."""
        return next(name for name, form in FORMS.items() if form == self)

    def shapes(self, width: int, num_labels: int) -> Shapes:
        """Return the shape of each role of one head."""
        if self.depth == 1:
            return linear_shapes("exit", num_labels, width)
        return {**linear_shapes("exit.dense", width, width), **linear_shapes("exit.out", num_labels, width)}

    def tensor_name(self, role: str, number: int) -> str:
        """Return the name of a role of exit `number` in `exits.safetensors`, like `exit.2.weight`."""
        is_shared = self.shared and role.startswith("exit.dense.")
        return role if is_shared else f"exit.{number}{role[len('exit') :]}"


FORMS: Dict[str, HeadForm] = {
    "mean-linear": HeadForm("mean", 1),
    "cls-linear": HeadForm("first", 1),
    "own": HeadForm("first", 2),
    "own-shared": HeadForm("first", 2, shared=True),
}
"""Forms by the name that `exits.json` and `--heads` use."""
DEFAULT_FORM = "mean-linear"


def linear_shapes(role: str, outputs: Size, inputs: Size) -> Dict[str, Tuple[Size, ...]]:
    """Return the shapes of weight and bias of a linear layer, from sizes or their names."""
    return {f"{role}.weight": (outputs, inputs), f"{role}.bias": (outputs,)}

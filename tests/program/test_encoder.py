"""Programs of text encoders: steps, look-ups, shapes, and the attributes of their kernels."""

import dataclasses

import pytest

from offramp.program.checks import read
from offramp.program.consistency import check_program
from offramp.program.encoder import (
    LAYER_KERNELS,
    Encoder,
    PlacedStage,
    PlacedStep,
    encoder_program,
    encoder_shapes,
    misfit,
    wrong_attributes,
)
from offramp.program.narrow import SUFFIX
from offramp.program.program import Kernel, Program, plain

ENCODER = Encoder(8, 8, 3, 2, 16, "gelu", 1e-12, 30, 24, 2, 2, 1, "tanh", "single_label_classification", ("a", "b"))
HEADLESS = dataclasses.replace(ENCODER, head_activation=None, problem=None, labels=())


def program_and_tensors(encoder, narrow=False):
    """The program of an encoder whose tensors are called `SHARD.ROLE`, one shard a step."""
    shapes, tensors = encoder_shapes(encoder, narrow=narrow), {}

    def placed(kernel, shard, *more):
        roles = {}
        for name, kind in ((shard, kernel), *more):
            roles.update((role, f"{name}.{role}") for role in shapes[kind])
            dtypes = {role: "I8" for role in shapes[kind] if f"{role[:-7]}.scale" in shapes[kind]}
            dtypes["down.channels"] = "I64"
            tensors.update((f"{name}.{role}", (dtypes.get(role, "F32"), shape)) for role, shape in shapes[kind].items())
        return PlacedStep(kernel, (*(name for name, _ in more), shard), roles)

    stages = [PlacedStage("embedding", "begin", (placed("embedding", "embedding", ("rows", "embedding-rows")),))]
    for i in range(encoder.num_layers):
        stages.append(PlacedStage(f"layer.{i}", "layer", tuple(placed(k, f"{i}-{k}") for k in LAYER_KERNELS)))
    if encoder.problem is not None:
        stages.append(PlacedStage("head", "end", (placed("head", "head"),)))
    return encoder_program(encoder, stages, ["rows"], narrow=narrow), tensors


@pytest.mark.parametrize(
    "encoder",
    [
        ENCODER,
        HEADLESS,
        dataclasses.replace(ENCODER, embedding_size=4),
        dataclasses.replace(ENCODER, num_token_types=0),
        dataclasses.replace(ENCODER, num_layers=1),
    ],
    ids=["classifier", "headless", "narrow embeddings", "no types", "one layer"],
)
def test_a_program_is_sound_and_comes_back(encoder):
    program, tensors = program_and_tensors(encoder)
    check_program(program)
    assert misfit(program, tensors) is None and read(Program, plain(program), "program") == program
    assert [layer.exit is not None for layer in program.layers] == [True] * (encoder.num_layers - 1) + [False]
    assert program.problem == encoder.problem and program.output.num_labels == len(encoder.labels)
    assert ("type" in program.lookups) == ("token_type_ids" in program.inputs) == bool(encoder.num_token_types)
    assert all("rows" not in step.shards for step in program.steps())
    assert program.texts == encoder.texts


def test_every_weight_that_is_missing_is_named():
    program, tensors = program_and_tensors(ENCODER)
    for name, (_, shape) in tensors.items():
        if not name.startswith("rows."):
            wrong = misfit(program, {**tensors, name: ("F32", (*shape, 1))})
            assert f"{name.split('.', 1)[1]} is ('F32', {(*shape, 1)})" in wrong


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 1 << 41}, "hidden_size is"),
        ({"hidden_size": 8.0}, "hidden_size is 8.0"),
        ({"hidden_size": "8"}, "hidden_size is '8'"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_heads": 3}, "hidden_size 8 is not a multiple of num_heads 3"),
        ({"norm_epsilon": 1.0}, "norm_epsilon is 1.0"),
        ({"norm_epsilon": -1e-9}, "norm_epsilon is -1e-09"),
        ({"norm_epsilon": 0}, "norm_epsilon is 0"),
        ({"extra": 1}, "takes the attributes"),
    ],
)
def test_attributes_that_cannot_be(changes, mentions):
    attributes = {"hidden_size": 8, "num_heads": 2, "norm_epsilon": 1e-12}
    assert wrong_attributes(Kernel("attention", attributes)) is None
    assert mentions in wrong_attributes(Kernel("attention", {**attributes, **changes}))


def test_a_narrow_program_takes_integers_scales_and_biases():
    program, tensors = program_and_tensors(ENCODER, narrow=True)
    check_program(program)
    assert misfit(program, tensors) is None and read(Program, plain(program), "program") == program
    assert {name: kernel.template for name, kernel in program.kernels.items() if kernel.template != name} == {
        name: name + SUFFIX for name in LAYER_KERNELS
    }
    assert {role: tensors[f"0-up.{role}"] for role in encoder_shapes(ENCODER, narrow=True)["up"]} == {
        "up.weight": ("I8", (8, 16)), "up.scale": ("F32", (16,)), "up.bias": ("F32", (16,)),
    }  # fmt: skip
    assert {role: tensors[f"0-down.{role}"] for role in ("down.exact", "down.channels")} == {
        "down.exact": ("F32", (4, 8)), "down.channels": ("I64", (4,)),
    }  # fmt: skip
    assert [dict(program.kernels[name].attributes).get("rotation") for name in LAYER_KERNELS] == [8, 8, None]
    assert dict(program.kernels["down"].attributes)["zero_point"] == 16
    integers, scales = tensors["1-attention.q.weight"], tensors["1-attention.q.scale"]
    swapped = {**tensors, "1-attention.q.weight": scales, "1-attention.q.scale": integers}
    assert "q.scale is ('I8', (8, 8)), the kernel takes ('F32', (8,))" in misfit(program, swapped)
    assert "stage layer.0, up: up.weight is ('F32', (8, 16)), the" in misfit(
        program, {**tensors, "0-up.up.weight": ("F32", (8, 16))}
    )

"""Programs cut into blocks: sound for any sizes, every output in one block, and blocks that do not fit refused."""

import dataclasses
import itertools
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.program.blocks import UNIT, cut_program, spans
from offramp.program.checks import WrongError, read
from offramp.program.consistency import MAX_TEMPLATE_KERNELS, check_program
from offramp.program.encoder import MAX_SIZE, Encoder, misfit, wrong_attributes
from offramp.program.program import Kernel, Program, Value, plain
from tests.program.test_encoder import ENCODER, HEADLESS, program_and_tensors
from tests.selection import examples

WIDE = dataclasses.replace(ENCODER, hidden_size=96, embedding_size=96, num_heads=6, intermediate_size=200)
BLOCK = 16 << 10


def cut(encoder=WIDE, block_bytes=BLOCK, narrow=False):
    """The program with blocks, its tensors, and those of the whole program."""
    program, tensors = program_and_tensors(encoder, narrow)
    made = cut_program(program, tensors, block_bytes)
    blocks = {
        rows.name(tensors): (tensors[rows.tensor][0], rows.shape(tensors))
        for shards in made.shards.values() for ports in shards.values() for rows in ports.values()
    }  # fmt: skip
    return made, {**tensors, **blocks}, tensors


ENCODERS = st.builds(
    lambda heads, head, inner, width, layers, labels, types: Encoder(
        heads * head, width or heads * head, layers, heads, inner, "gelu", 1e-12, 30, 24, 2, types, 1, "tanh",
        "single_label_classification", tuple(map(str, range(labels))),
    ),
    st.integers(1, 7), st.integers(1, 40), st.integers(1, 300), st.sampled_from([0, 0, 5, 70]), st.integers(1, 4),
    st.integers(1, 60), st.integers(0, 2),
)  # fmt: skip


@settings(max_examples=examples(30), deadline=None)
@given(ENCODERS, st.integers(1000, 200_000), st.booleans())
def test_any_encoder_is_cut_into_a_sound_program(encoder, block_bytes, narrow):
    made, blocked, tensors = cut(encoder, block_bytes, narrow)
    program = made.program
    check_program(program)
    assert misfit(program, blocked) is None and read(Program, plain(program), "program") == program
    assert len(program.kernels) <= MAX_TEMPLATE_KERNELS
    whole, _ = program_and_tensors(encoder, narrow)
    assert [(stage.name, stage.exit) for stage in program.stages] == [(each.name, each.exit) for each in whole.stages]
    assert program.output == whole.output
    uncut = {name for step in whole.steps() if not {*step.shards} & {*made.shards} for name in step.weights.values()}
    held = {}
    for shards in made.shards.values():
        for ports in shards.values():
            for rows in ports.values():
                held.setdefault(rows.tensor, []).append((rows.start, rows.stop))
                assert rows.axis == output_axis(rows.tensor, tensors)
    assert not uncut & held.keys()
    assert uncut | held.keys() == {name for step in whole.steps() for name in step.weights.values()}
    for name, places in held.items():  # every output once, in order
        bounds = [0, *(stop for _, stop in places)]
        axis, of_outputs = output_axis(name, tensors), name.replace(".channels", ".bias")
        assert places == list(itertools.pairwise(bounds)) and bounds[-1] == tensors[of_outputs][1][axis or 0]


def output_axis(name, tensors):
    """The axis of the outputs: the last of integers and of exact inputs. Each block has the numbers of all of these."""
    if name.endswith(".channels"):
        return None
    return int(tensors[name][0] == "I8" or name.endswith(".exact"))


@settings(max_examples=examples(30), deadline=None)
@given(ENCODERS, st.integers(1000, 200_000))
def test_no_block_is_larger_than_it_may_be_unless_it_is_the_smallest(encoder, block_bytes):
    made, blocked, _ = cut(encoder, block_bytes)
    for step in made.program.steps():
        size = sum(4 * math.prod(blocked[name][1]) for name in step.weights.values())
        kernel = made.program.kernels[step.kernel]
        (value,) = step.writes.values()
        least = {"heads": kernel.attributes.get("head_size"), "product": 1}.get(kernel.template, value.axes[-1])
        assert size <= block_bytes or value.axes[-1] == least or kernel.template in ("embedding", "join-norm")


@given(st.integers(1, 5000), st.integers(0, 600), st.integers(1, 70))
def test_blocks_are_few_and_as_equal_as_their_unit_allows(size, most, unit):
    found = spans(size, most, unit)
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])] and found[-1][1] == size
    widths = [stop - start for start, stop in found]
    assert all(width % unit == 0 for width in widths[:-1]) and max(widths) <= max(most, unit)
    assert len(found) == math.ceil(math.ceil(size / unit) / max(most // unit, 1)), "no fewer would do"
    assert max(widths) - min(widths[:-1] or widths) <= unit and widths[:-1] == sorted(widths[:-1], reverse=True)


def test_steps_that_fit_a_block_stay_as_they_are():
    program, tensors = program_and_tensors(WIDE)
    made = cut_program(program, tensors, 1 << 30)
    assert made.program == program and made.shards == {}
    half = cut_program(program, tensors, 100_000)  # attention takes 150,720 bytes, the others less
    kernels = [step.kernel for step in half.program.stages[1].steps]
    assert kernels == [*["attention-qkv"] * 2, "attention-join", "attention-o", "attention-norm", "up", "down"]
    assert {*half.shards} == {f"{layer}-attention" for layer in range(3)}


def test_a_row_that_is_larger_than_a_block_is_a_block():
    made, blocked, _ = cut(WIDE, 100)
    widths = {step.kernel: value.axes[-1] for step in made.program.steps() for value in step.writes.values()}
    assert widths["down-block"] == widths["up-block"] == widths["attention-o"] == widths["head-dense"] == 1
    assert widths["attention-qkv"] == 16, "a block of attention holds a head"
    assert misfit(made.program, blocked) is None


def test_blocks_of_a_large_model_have_aligned_rows_and_few_steps():
    """24 layers of 1,024: the steps, kernels and manifest of blocks of 1 MiB are within their limits."""
    encoder = dataclasses.replace(
        WIDE, hidden_size=1024, embedding_size=1024, num_layers=24, num_heads=16, intermediate_size=4096
    )
    made, _, _ = cut(encoder, 1 << 20)
    check_program(made.program)
    assert sum(1 for _ in made.program.steps()) == 1570 and len(made.program.kernels) == 14
    blocks = [rows for shards in made.shards.values() for ports in shards.values() for rows in ports.values()]
    assert all((rows.stop - rows.start) % UNIT == 0 for rows in blocks if not rows.tensor.startswith("head.out"))


def test_a_model_without_a_head_is_cut():
    made, blocked, _ = cut(
        dataclasses.replace(HEADLESS, hidden_size=96, embedding_size=64, intermediate_size=200), 9000
    )
    check_program(made.program)
    assert misfit(made.program, blocked) is None
    assert [step.kernel for step in made.program.stages[0].steps][:3] == [
        "mask",
        "embedding-narrow",
        "embedding-project",
    ]


def changed(program, kernel, **changes):
    """The program with fields of the first step of a kernel replaced by functions of their values."""
    stages = list(program.stages)
    for place, stage in enumerate(stages):
        for index, step in enumerate(stage.steps):
            if step.kernel == kernel:
                new = dataclasses.replace(step, **{key: change(getattr(step, key)) for key, change in changes.items()})
                steps = (*stage.steps[:index], new, *stage.steps[index + 1 :])
                stages[place] = dataclasses.replace(stage, steps=steps)
                return dataclasses.replace(program, stages=tuple(stages))
    raise AssertionError(kernel)


def without(key):
    return lambda tree: {name: value for name, value in tree.items() if name != key}


def swapped(one, other):
    return lambda tree: {**tree, one: tree[other], other: tree[one]}


def of_width(width):
    return lambda writes: {name: Value("float32", (value.axes[0], width)) for name, value in writes.items()}


@pytest.mark.parametrize(
    ("kernel", "change", "mentions"),
    [
        ("up-join", {"reads": without("part.6")}, "parts is Value.*192.*the kernel takes Value.*200"),
        ("up-join", {"reads": without("part.0")}, "part.5 is Value"),
        ("up-join", {"reads": swapped("part.0", "part.1")}, "not distinct values in the order of their steps"),
        ("up-join", {"reads": lambda reads: {**reads, "part.1": reads["part.0"]}}, "not distinct values"),
        ("attention-norm", {"reads": lambda reads: {**reads, "part.9": "mask"}}, "part.9 is Value"),
        ("up-join", {"reads": lambda reads: {}}, "parts is None"),
        ("up-join", {"reads": lambda reads: {**reads, "more": reads["part.0"]}}, "more is Value"),
        ("attention-norm", {"reads": without("hidden")}, "hidden is None"),
        ("up-block", {"writes": of_width(16)}, r"product.bias is \('F32', \(32,\)\), the kernel takes .*\(16,\)"),
        ("up-block", {"writes": of_width(0)}, "a block of 0 outputs"),
        ("up-block", {"writes": of_width(33)}, "a block of 33 outputs, the kernel gives multiples of 1 up to 32"),
        ("up-block", {"writes": of_width("tokens")}, "a block of tokens outputs"),
        ("attention-qkv", {"writes": of_width(8)}, "a block of 8 outputs, the kernel gives multiples of 16 up to 16"),
        ("up-block", {"weights": lambda names: {**names, "product.weight": "0-down.down.weight"}}, "product.weight is"),
        ("up-block", {"writes": lambda writes: {}}, "a block of None outputs"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(kernel, change, mentions):
    made, blocked, _ = cut()
    assert misfit(made.program, blocked) is None
    wrong = misfit(changed(made.program, kernel, **change), blocked)
    assert wrong is not None and re.search(mentions, wrong), wrong


@pytest.mark.parametrize(
    ("template", "changes", "mentions"),
    [
        ("heads", {"most_outputs": 8}, "most_outputs is not a multiple of head_size"),
        ("heads", {"head_size": 1, "most_outputs": 64}, "num_heads 64 makes heads of 1 elements"),
        ("heads", {"head_size": 0}, "head_size is 0"),
        ("heads", {"most_outputs": MAX_SIZE + 1}, "most_outputs is"),
        ("product", {"rows": "tokens"}, "rows is 'tokens'"),
        ("product", {"rows": 3}, "rows is 3"),
        ("product", {"activation": "softmax"}, "activation is 'softmax'"),
        ("product", {"num_inputs": None}, "num_inputs is None"),
        ("up", {"activation": None}, "activation is None"),
        ("join", {"width": 0}, "width is 0"),
        ("join", {"num_parts": 2}, "takes the attributes"),
    ],
)
def test_attributes_that_cannot_be(template, changes, mentions):
    attributes = {
        "heads": {"hidden_size": 96, "head_size": 16, "most_outputs": 32},
        "product": {"rows": "batch", "num_inputs": 96, "most_outputs": 32, "activation": None},
        "up": {"hidden_size": 8, "intermediate_size": 8, "activation": "gelu"},
        "join": {"rows": "batch*tokens", "width": 96},
    }[template]
    assert wrong_attributes(Kernel(template, attributes)) is None
    assert mentions in wrong_attributes(Kernel(template, {**attributes, **changes}))


def test_a_block_that_is_read_before_it_is_written_is_refused():
    made, _, _ = cut()
    layer = made.program.stages[1]
    late = dataclasses.replace(layer, steps=(*layer.steps[1:], layer.steps[0]))
    program = dataclasses.replace(made.program, stages=(made.program.stages[0], late, *made.program.stages[2:]))
    with pytest.raises(WrongError, match=r"reads 'layer.0.attended.context.0' before it is written"):
        check_program(program)

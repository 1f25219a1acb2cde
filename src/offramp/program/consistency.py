"""Checks that the parts of a program fit together: inputs, stages, steps, values and exits.

Whether the tensors are those that the kernels take is checked by `offramp.store`, which knows them.
"""

from __future__ import annotations

from typing import Dict, Tuple

from offramp.program import program as p
from offramp.program.checks import WrongError, int_of, require_distinct, require_shape, str_of
from offramp.program.dtypes import OF_ARRAYS, OF_VALUES
from offramp.program.encoder import TEMPLATES, wrong_attributes
from offramp.program.program import Output, Program, Value

MAX_TEMPLATE_KERNELS = 16
"""Most kernels of templates. An encoder has one of each template, and with blocks one for each height of a block; every
kernel costs a session of the backend."""

MAX_STEPS = 4096
"""Most steps of a program. Steps may share weights, so a few bytes could describe any number of them."""


def check_program(program: Program) -> None:
    """Raise WrongError unless stages, steps, values and exits fit together."""
    _check_inputs(program)
    output = program.output or Output("")
    if (output.problem is None) != (output.num_labels == 0):
        raise WrongError("program.output: problem and num_labels go together")
    if program.module is not None:
        _check_parts(program.module)
    if not program.stages:
        if program.module is None or program.lookups or program.kernels:
            raise WrongError("program.stages is empty, which only a module without kernels and lookups allows")
        return
    num_steps = sum(len(stage.steps) for stage in program.stages)
    if num_steps > MAX_STEPS:
        raise WrongError(f"program.stages have {num_steps} steps, at most {MAX_STEPS} are run")
    known = _check_look_ups(program)
    _check_kernels(program)
    _check_stages(program)
    exits = program.kernels.get(p.EXIT_KERNEL)
    are_masked = program.texts is not None and exits is not None and exits.template == p.POOLED_LINEAR
    for index, stage in enumerate(program.stages):
        for number, step in enumerate(stage.steps):
            _check_step(step, program, known, f"program.stages[{index}].steps[{number}]")
        value = known.get(stage.exit or "")
        if stage.exit is not None and (value is None or not p.can_carry_exit(value, of_texts=are_masked)):
            wrong = "is not written by then" if value is None else f"({value.dtype} {value.axes}) is no hidden state"
            raise WrongError(f"program.stages[{index}].exit: {stage.exit!r} {wrong}")
    if program.output is None or program.output.value not in known:
        raise WrongError("program.output must name a value that is written")
    logits = known[program.output.value]
    if not p.fits_output(logits, output):
        raise WrongError(f"program.output.value: {output.value!r} has the axes {logits.axes}, no row of logits")


def _check_inputs(program: Program) -> None:
    for name, each in program.inputs.items():
        if each.largest and len(each.largest) != len(each.axes):
            where = f"program.inputs.{name}.largest"
            raise WrongError(f"{where} has {len(each.largest)} sizes for {len(each.axes)} axes")
        _require_shape(each.axes, f"program.inputs.{name}")
        if program.stages:
            str_of(each.dtype, f"program.inputs.{name}.dtype", choices=OF_ARRAYS)
    texts = program.texts
    if texts is None:
        return
    if texts.pad_token is not None:
        int_of(texts.pad_token, "program.texts.pad_token", 0, texts.vocab_size - 1)
    if p.INPUT_IDS not in program.inputs:
        raise WrongError(f"program.inputs: no {p.INPUT_IDS!r} where texts are the input")
    for name, each in program.inputs.items():
        is_ids = each.dtype == "int64" and each.axes == (p.BATCH, p.TOKENS)
        if not is_ids or name not in (*p.TEXT_INPUTS, p.POSITION_IDS):
            raise WrongError(f"program.inputs: {name!r} where texts are the input")


def _check_parts(module: p.Module) -> None:
    where = "program.module.parts"
    starts = [part.start for part in module.parts]
    if not starts or [start is None for start in starts] != [True] + [False] * (len(starts) - 1):
        raise WrongError(f"{where}: the first part, and no other, has no start")
    require_distinct((f"{start.module}, {start.number}" for start in starts if start), f"{where}: start")
    for index, part in enumerate(module.parts):
        require_distinct(part.shards, f"{where}[{index}]: shard")
        if part.hidden is not None:
            int_of(part.hidden, f"{where}[{index}].hidden", 0, len(part.flows) - 1)


def _check_look_ups(program: Program) -> Dict[str, Value]:
    """Return the values that are known when a pass begins."""
    known = {name: Value(each.dtype, each.axes) for name, each in program.inputs.items()}
    for name, lookup in program.lookups.items():
        ids = known.get(lookup.input)
        if lookup.input not in program.inputs or ids is None or ids.dtype not in ("int64", "int32"):
            raise WrongError(f"program.lookups: {name!r} is looked up by {lookup.input!r}, no input of ids")
        if name in known:
            raise WrongError(f"program.lookups: {name!r} is another value already")
        axes = lookup.value.axes
        if lookup.value.dtype != "float32" or axes[:-1] not in ((p.BATCH_TOKENS,), ids.axes):
            raise WrongError(f"program.lookups: {name!r} is {lookup.value}, not rows for the ids {ids}")
        _require_shape(axes, f"program.lookups.{name}")
        known[name] = lookup.value
    return known


def _require_shape(axes: Tuple[p.Axis, ...], where: str) -> None:
    require_shape((size for size in axes if isinstance(size, int)), where)


def _check_kernels(program: Program) -> None:
    num_labels = 0 if program.output is None else program.output.num_labels
    num_templates = sum(kernel.template in TEMPLATES for kernel in program.kernels.values())
    if num_templates > MAX_TEMPLATE_KERNELS:
        raise WrongError(f"program.kernels has {num_templates} kernels of templates, at most {MAX_TEMPLATE_KERNELS}")
    for name, kernel in program.kernels.items():
        where = f"program.kernels.{name}"
        str_of(kernel.template, where + ".template", choices=(*TEMPLATES, p.CAPTURED, p.POOLED_LINEAR))
        wrong = wrong_attributes(kernel)
        if wrong is not None:
            raise WrongError(f"{where}.attributes: {wrong}")
        if (name == p.EXIT_KERNEL) != (kernel.template in ("exit", p.POOLED_LINEAR)):
            raise WrongError(f"{where} has the template {kernel.template!r}")
        if kernel.attributes.get("num_labels", num_labels) != num_labels:
            raise WrongError(f"{where} has another number of labels than the output, {num_labels}")


def _check_stages(program: Program) -> None:
    roles = [stage.role for stage in program.stages]
    if len(roles) < 3 or roles != [p.BEGIN, *[p.LAYER] * (len(roles) - 2), p.END]:
        raise WrongError(f"program.stages must be one {p.BEGIN}, the layers and one {p.END}, in this order")
    require_distinct((stage.name for stage in program.stages), "program.stages: stage")
    for index, stage in enumerate(program.stages):
        can_exit = stage.role == p.LAYER and index < len(roles) - 2
        if (stage.exit is not None) != can_exit:
            raise WrongError(f"program.stages[{index}].exit must be {'a value' if can_exit else 'null'}")


def _check_step(step: p.Step, program: Program, known: Dict[str, Value], where: str) -> None:
    """Raise WrongError unless a step reads known values and writes new ones, which become known."""
    if step.kernel not in program.kernels or step.kernel == p.EXIT_KERNEL:
        raise WrongError(f"{where}.kernel {step.kernel!r} is no kernel of steps")
    early = [name for name in step.reads.values() if name not in known]
    if early:
        raise WrongError(f"{where} reads {early[0]!r} before it is written")
    require_distinct(step.shards, f"{where}: shard")
    for name, value in step.writes.items():
        if name in known:
            raise WrongError(f"{where} writes {name!r}, which is another value already")
        str_of(value.dtype, f"{where}.writes.{name}.dtype", choices=OF_VALUES)
        _require_shape(value.axes, f"{where}.writes.{name}")
        known[name] = value

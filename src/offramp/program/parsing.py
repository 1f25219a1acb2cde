"""Programs read from JSON trees, with every check that needs no tensors.

`program_of` checks keys, types and names; `check_program` checks that stages, steps and values fit together. Whether
the tensors are those that the kernels take is checked by `offramp.store`, which knows them.
"""

from __future__ import annotations

import re
from typing import Any, Dict, Iterable, Optional, Set, Tuple

from offramp.program.checks import (
    WrongError,
    bool_of,
    choice_of,
    int_of,
    items_of,
    list_of,
    names_of,
    object_of,
    str_of,
)
from offramp.program.encoder import LAYER_KERNELS, wrong_attributes
from offramp.program.program import (
    AXES,
    BATCH_TOKENS,
    BEGIN,
    CAPTURED,
    END,
    EXIT_KERNEL,
    INPUT_IDS,
    LAYER,
    POOLED_LINEAR,
    POSITION_IDS,
    PROBLEMS,
    REGRESSION,
    TEXT_INPUTS,
    Axis,
    Call,
    Input,
    Kernel,
    LookUp,
    Module,
    Output,
    Part,
    Program,
    Stage,
    Step,
    Texts,
    Value,
    can_carry_exit,
)

MAX_RANK = 64
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Names of kernels, stages and shards: safe as parts of file names and in messages."""
EXIT_TEMPLATES = ("exit", POOLED_LINEAR)
"""Templates of exit heads, which are no steps."""
TEMPLATES = ("mask", "embedding", *LAYER_KERNELS, "head", CAPTURED, *EXIT_TEMPLATES)


def program_of(tree: Any, where: str = "program") -> Program:
    """Return the program that a JSON tree describes. Raises WrongError."""
    about = "inputs lookups kernels stages output texts module activation_bytes example"
    tree = object_of(tree, where, about)
    return Program(
        inputs={name: _input(part, f"{where}.inputs") for name, part in items_of(tree["inputs"], where + ".inputs")},
        lookups={name: _look_up(part, f"{where}.lookups") for name, part in items_of(tree["lookups"], where)},
        kernels={
            str_of(name, where + ".kernels", NAME): _kernel(part, f"{where}.kernels.{name}")
            for name, part in items_of(tree["kernels"], where + ".kernels")
        },
        stages=tuple(
            _stage(part, f"{where}.stages[{i}]") for i, part in enumerate(list_of(tree["stages"], where + ".stages"))
        ),
        output=None if tree["output"] is None else _output(tree["output"], where + ".output"),
        texts=None if tree["texts"] is None else texts_of(tree["texts"], where + ".texts"),
        module=None if tree["module"] is None else _module(tree["module"], where + ".module"),
        activation_bytes=int_of(tree["activation_bytes"], where + ".activation_bytes"),
        example=_example(tree["example"], where + ".example"),
    )


def texts_of(tree: Any, where: str) -> Texts:
    """Return what a model requires of texts. Raises WrongError."""
    tree = object_of(tree, where, "vocab_size max_length num_token_types pad_token position_offset")
    sizes = (int_of(tree[name], f"{where}.{name}", 1) for name in ("vocab_size", "max_length"))
    counts = (int_of(tree[name], f"{where}.{name}") for name in ("num_token_types", "pad_token", "position_offset"))
    return Texts(*sizes, *counts)


def call_of(tree: Any, where: str) -> Optional[Call]:
    """Return the module call that a part begins with, or None for the first part. Raises WrongError."""
    if tree is None:
        return None
    tree = object_of(tree, where, "module number")
    return Call(str_of(tree["module"], where), int_of(tree["number"], where, 1))


def _example(tree: Any, where: str) -> Tuple[int, int]:
    sizes = [int_of(size, where, 1) for size in list_of(tree, where)]
    if len(sizes) != 2:
        raise WrongError(f"{where} must be rows and tokens, not {len(sizes)} integers")
    return sizes[0], sizes[1]


def _axes(tree: Any, where: str) -> Tuple[Axis, ...]:
    axes = list_of(tree, where)
    if len(axes) > MAX_RANK:
        raise WrongError(f"{where} has {len(axes)} axes, at most {MAX_RANK} are read")
    return tuple(choice_of(axis, where, AXES) if isinstance(axis, str) else int_of(axis, where) for axis in axes)


def _value(tree: Any, where: str) -> Value:
    tree = object_of(tree, where, "dtype axes")
    return Value(str_of(tree["dtype"], where + ".dtype"), _axes(tree["axes"], where + ".axes"))


def _values(tree: Any, where: str) -> Dict[str, Value]:
    return {name: _value(part, where) for name, part in items_of(tree, where)}


def _input(tree: Any, where: str) -> Input:
    tree = object_of(tree, where, "dtype axes largest")
    axes = _axes(tree["axes"], where + ".axes")
    largest = tuple(
        None if size is None else int_of(size, where + ".largest", 1)
        for size in list_of(tree["largest"], where + ".largest")
    )
    if largest and len(largest) != len(axes):
        raise WrongError(f"{where}.largest has {len(largest)} sizes for {len(axes)} axes")
    return Input(str_of(tree["dtype"], where + ".dtype"), axes, largest)


def _look_up(tree: Any, where: str) -> LookUp:
    tree = object_of(tree, where, "table input value")
    table, name = (str_of(tree[key], f"{where}.{key}") for key in ("table", "input"))
    return LookUp(table, name, _value(tree["value"], where + ".value"))


def _kernel(tree: Any, where: str) -> Kernel:
    tree = object_of(tree, where, "template attributes keeps_intermediates")
    attributes = dict(items_of(tree["attributes"], where + ".attributes"))
    for name, value in attributes.items():
        if isinstance(value, bool) or not isinstance(value, (int, float, str, type(None))):
            raise WrongError(f"{where}.attributes.{name} must be a number, a string or null, not {value!r}")
    template = choice_of(tree["template"], where + ".template", TEMPLATES)
    kernel = Kernel(template, attributes, bool_of(tree["keeps_intermediates"], where + ".keeps_intermediates"))
    wrong = wrong_attributes(kernel)
    if wrong is not None:
        raise WrongError(f"{where}.attributes: {wrong}")
    return kernel


def _names_by_port(tree: Any, where: str) -> Dict[str, str]:
    return {port: str_of(name, where) for port, name in items_of(tree, where)}


def _step(tree: Any, where: str) -> Step:
    tree = object_of(tree, where, "kernel reads writes weights constants shards")
    return Step(
        str_of(tree["kernel"], where + ".kernel", NAME),
        _names_by_port(tree["reads"], where + ".reads"),
        _values(tree["writes"], where + ".writes"),
        _names_by_port(tree["weights"], where + ".weights"),
        _names_by_port(tree["constants"], where + ".constants"),
        names_of(tree["shards"], where + ".shards", NAME),
    )


def _stage(tree: Any, where: str) -> Stage:
    tree = object_of(tree, where, "name role steps exit")
    return Stage(
        str_of(tree["name"], where + ".name", NAME),
        choice_of(tree["role"], where + ".role", (BEGIN, LAYER, END)),
        tuple(_step(part, f"{where}.steps[{i}]") for i, part in enumerate(list_of(tree["steps"], where + ".steps"))),
        None if tree["exit"] is None else str_of(tree["exit"], where + ".exit"),
    )


def _output(tree: Any, where: str) -> Output:
    tree = object_of(tree, where, "value problem num_labels")
    problem = tree["problem"]
    return Output(
        str_of(tree["value"], where + ".value"),
        None if problem is None else choice_of(problem, where + ".problem", PROBLEMS),
        int_of(tree["num_labels"], where + ".num_labels"),
    )


def _part(tree: Any, where: str) -> Part:
    tree = object_of(tree, where, "shards start flows hidden")
    flows = tuple(_value(value, where + ".flows") for value in list_of(tree["flows"], where + ".flows"))
    hidden = tree["hidden"]
    return Part(
        names_of(tree["shards"], where + ".shards", NAME),
        call_of(tree["start"], where + ".start"),
        flows,
        None if hidden is None else int_of(hidden, where + ".hidden", 0, len(flows) - 1),
    )


def _module(tree: Any, where: str) -> Module:
    tree = object_of(tree, where, "name weights_sha256 versions parts aliases buffers pinned sliced unused")
    return Module(
        str_of(tree["name"], where + ".name"),
        str_of(tree["weights_sha256"], where + ".weights_sha256"),
        {name: str_of(part, where + ".versions") for name, part in items_of(tree["versions"], where + ".versions")},
        tuple(_part(part, f"{where}.parts[{i}]") for i, part in enumerate(list_of(tree["parts"], where + ".parts"))),
        {name: names_of(part, where + ".aliases") for name, part in items_of(tree["aliases"], where + ".aliases")},
        *(names_of(tree[key], f"{where}.{key}") for key in ("buffers", "pinned", "sliced", "unused")),
    )


def require_distinct(names: Iterable[str], what: str) -> None:
    """Raise WrongError for the first name that occurs twice."""
    seen: Set[str] = set()
    for name in names:
        if name in seen:
            raise WrongError(f"{what} {name!r} is listed twice")
        seen.add(name)


def check_program(program: Program, where: str = "program") -> None:
    """Raise WrongError unless stages, steps, values and exits fit together."""
    _check_texts(program, where)
    _check_output(program, where)
    if program.module is not None:
        _check_parts(program.module, where + ".module")
    if not program.stages:
        if program.module is None or program.lookups or program.kernels:
            raise WrongError(f"{where}.stages is empty, which only a module without kernels and lookups allows")
        return
    known = _check_look_ups(program, where)
    _check_kernels(program, where)
    _check_stages(program, where)
    for index, stage in enumerate(program.stages):
        for number, step in enumerate(stage.steps):
            _check_step(step, program, known, f"{where}.stages[{index}].steps[{number}]")
        _check_exit(stage, known, f"{where}.stages[{index}].exit")
    if program.output is None or program.output.value not in known:
        raise WrongError(f"{where}.output must name a value that is written")


def _check_texts(program: Program, where: str) -> None:
    if program.texts is None:
        return
    if INPUT_IDS not in program.inputs:
        raise WrongError(f"{where}.inputs: no {INPUT_IDS!r} where texts are the input")
    for name, each in program.inputs.items():
        if name not in (*TEXT_INPUTS, POSITION_IDS) or each.dtype != "int64" or len(each.axes) != 2 or 0 in each.axes:
            raise WrongError(f"{where}.inputs: {name!r} where texts are the input")


def _check_output(program: Program, where: str) -> None:
    output = program.output
    if output is None:
        return
    if (output.problem is None) != (output.num_labels == 0):
        raise WrongError(f"{where}.output: problem and num_labels go together")
    if output.problem == REGRESSION and output.num_labels != 1:
        raise WrongError(f"{where}.output: a regression has one label, not {output.num_labels}")


def _check_parts(module: Module, where: str) -> None:
    starts = [part.start for part in module.parts]
    if not starts or [start is None for start in starts] != [True] + [False] * (len(starts) - 1):
        raise WrongError(f"{where}.parts: the first part, and no other, has no start")
    require_distinct((f"{start.module}, {start.number}" for start in starts if start), f"{where}.parts: start")
    for index, part in enumerate(module.parts):
        require_distinct(part.shards, f"{where}.parts[{index}]: shard")


def _check_look_ups(program: Program, where: str) -> Dict[str, Value]:
    """Return the values that are known when a pass begins."""
    known = {name: Value(each.dtype, each.axes) for name, each in program.inputs.items()}
    for name, lookup in program.lookups.items():
        ids = known.get(lookup.input)
        if lookup.input not in program.inputs or ids is None or ids.dtype not in ("int64", "int32"):
            raise WrongError(f"{where}.lookups: {name!r} is looked up by {lookup.input!r}, no input of ids")
        if name in known:
            raise WrongError(f"{where}.lookups: {name!r} is another value already")
        axes = lookup.value.axes
        if lookup.value.dtype != "float32" or axes[:-1] not in ((BATCH_TOKENS,), ids.axes):
            raise WrongError(f"{where}.lookups: {name!r} is {lookup.value}, not rows for the ids {ids}")
        known[name] = lookup.value
    return known


def _check_kernels(program: Program, where: str) -> None:
    num_labels = 0 if program.output is None else program.output.num_labels
    for name, kernel in program.kernels.items():
        if (name == EXIT_KERNEL) != (kernel.template in EXIT_TEMPLATES):
            raise WrongError(f"{where}.kernels.{name} has the template {kernel.template!r}")
        if kernel.attributes.get("num_labels", num_labels) != num_labels:
            raise WrongError(f"{where}.kernels.{name} has another number of labels than the output, {num_labels}")


def _check_stages(program: Program, where: str) -> None:
    roles = [stage.role for stage in program.stages]
    if len(roles) < 3 or roles != [BEGIN, *[LAYER] * (len(roles) - 2), END]:
        raise WrongError(f"{where}.stages must be one {BEGIN}, the layers and one {END}, in this order")
    require_distinct((stage.name for stage in program.stages), f"{where}.stages: stage")
    for index, stage in enumerate(program.stages):
        can_exit = stage.role == LAYER and index < len(roles) - 2
        if (stage.exit is not None) != can_exit:
            raise WrongError(f"{where}.stages[{index}].exit must be {'a value' if can_exit else 'null'}")


def _check_step(step: Step, program: Program, known: Dict[str, Value], where: str) -> None:
    """Raise WrongError unless a step reads known values and writes new ones, which become known."""
    if step.kernel not in program.kernels or step.kernel == EXIT_KERNEL:
        raise WrongError(f"{where}.kernel {step.kernel!r} is no kernel of steps")
    early = [name for name in step.reads.values() if name not in known]
    if early:
        raise WrongError(f"{where} reads {early[0]!r} before it is written")
    require_distinct(step.shards, f"{where}: shard")
    for name, value in step.writes.items():
        if name in known:
            raise WrongError(f"{where} writes {name!r}, which is another value already")
        known[name] = value


def _check_exit(stage: Stage, known: Dict[str, Value], where: str) -> None:
    if stage.exit is None:
        return
    if stage.exit not in known:
        raise WrongError(f"{where}: {stage.exit!r} is not written by then")
    value = known[stage.exit]
    if not can_carry_exit(value):
        raise WrongError(f"{where}: {stage.exit!r} ({value.dtype} {value.axes}) is no hidden state")

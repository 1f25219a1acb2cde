"""A value is kept as long as a later step, exit or caller reads it, and not longer."""

from offramp.backends.base import lifetimes_of
from offramp.program.program import BATCH, BEGIN, END, LAYER, Kernel, Output, Program, Stage, Step, Value
from tests.backends import captured

VALUE = Value("float32", (BATCH, 2))


def step(kernel, reads, writes):
    return Step(kernel, {str(i): name for i, name in enumerate(reads)}, dict.fromkeys(writes, VALUE))


def ended(program):
    """The values that end with each step, in order."""
    found = lifetimes_of(program).ended
    return [set(found[id(step)]) for step in program.steps()]


def make(*stages, output="y"):
    roles = [BEGIN, *[LAYER] * (len(stages) - 2), END]
    made = [Stage(str(i), role, steps, exit) for i, (role, (steps, exit)) in enumerate(zip(roles, stages, strict=True))]
    return Program({}, {}, {"mask": Kernel("mask"), "k": Kernel("k")}, tuple(made), Output(output))


def test_a_value_ends_with_its_last_reader():
    program = make(
        ((step("k", ["x"], ["a"]), step("k", ["a"], ["b"])), None),
        ((step("k", ["a", "b"], ["c"]),), None),
        ((step("k", ["c"], ["y"]),), None),
    )
    assert ended(program) == [{"x"}, set(), {"a", "b"}, {"c"}]


def test_an_exit_keeps_its_value_until_the_next_step():
    """Also where the last step that reads it stands before the exit."""
    program = make(
        ((step("k", ["x"], ["a"]),), None),
        ((step("k", ["a"], ["b"]), step("k", ["b"], ["c"])), "b"),
        ((step("k", ["c"], ["y"]),), None),
    )
    assert ended(program) == [{"x"}, {"a"}, set(), {"b", "c"}]


def test_a_value_that_nothing_reads_ends_with_the_step_that_writes_it():
    program = make(((step("k", ["x"], ["a", "b"]),), None), ((step("k", ["a"], ["y"]),), None), ((), None))
    assert ended(program) == [{"x", "b"}, {"a"}]


def test_the_output_is_never_dropped_and_counts_as_read():
    program = make(((step("k", ["x"], ["y"]),), None), ((step("k", ["y"], ["z"]),), None), ((), None))
    assert ended(program) == [{"x"}, {"z"}]
    assert lifetimes_of(program).read == {"x", "y"}


def test_masks_do_not_count_between_stages():
    program = make(
        ((step("mask", ["m"], ["mask"]), step("k", ["x"], ["a"])), None),
        ((step("k", ["a", "mask"], ["b"]),), None),
        ((step("k", ["b", "mask"], ["y"]),), None),
    )
    assert lifetimes_of(program).between == (("a",), ("b",), ("y",))


def test_equal_steps_of_one_program_are_told_apart():
    """Steps are compared by identity: two layers may differ in their values alone."""
    program = captured.program()
    assert ended(program) == [{"x"}, {"h0"}, {"h1"}]

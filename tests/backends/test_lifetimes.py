"""A value is kept as long as a later step, exit or caller reads it, and not longer."""

from hypothesis import given
from hypothesis import strategies as st

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
    kernels = {"mask": Kernel("mask"), "k": Kernel("k"), "keeping": Kernel("k", keeps_intermediates=True)}
    return Program({}, {}, kernels, tuple(made), Output(output))


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


def test_values_wait_after_each_step_of_a_layer_that_keeps_no_intermediates():
    """There another batch of the sweep may run; not within the first stage, nor before a step that is joined."""
    program = make(
        ((step("k", ["x"], ["a"]), step("k", ["a"], ["b"])), None),
        ((step("k", ["b"], ["c"]), step("keeping", ["b", "c"], ["d"]), step("k", ["d"], ["e"])), None),
        ((step("k", ["e"], ["f"]), step("k", ["f"], ["y"])), None),
    )
    assert lifetimes_of(program).between == (("b",), ("b", "c"), ("e",), ("f",), ("y",))


def test_values_beside_a_step_live_on_and_are_not_read_by_it():
    """They take memory in addition to what a kernel counts: its own inputs among them."""
    program = make(
        ((step("mask", ["m"], ["mask"]), step("k", ["x"], ["a"])), None),
        ((step("k", ["a"], ["b"]), step("k", ["a"], ["c"]), step("k", ["b"], ["d"])), None),
        ((step("k", ["c", "d", "mask"], ["y"]),), None),
    )
    beside = lifetimes_of(program).beside
    assert [beside[id(each)] for each in program.steps()] == [[], [], [], ["b"], ["c"], []]


KERNELS = st.sampled_from(["k", "keeping"])


@given(
    st.lists(
        st.tuples(st.lists(st.tuples(KERNELS, st.integers(0, 9)), max_size=3), st.booleans()), min_size=3, max_size=8
    ),
    st.data(),
)
def test_values_between_steps_are_those_made_before_and_needed_after(stages, data):
    """By the definition, which takes the square of the number of stages."""
    made, parts = ["x"], []
    for reads, has_exit in stages:
        steps = []
        for kernel, number in reads:
            steps.append(step(kernel, [made[number % len(made)]], [f"v{len(made)}"]))
            made.append(f"v{len(made)}")
        parts.append((tuple(steps), made[-1] if has_exit and len(made) > 1 else None))
    program = make(*parts, output=data.draw(st.sampled_from(made)))
    found, written = lifetimes_of(program).between, {}
    for index, each in enumerate(program.steps()):
        written.update(dict.fromkeys(each.writes, index))
    needed, index, bounds = {program.output.value: len(written)}, 0, []
    for stage in program.stages:
        for each in stage.steps:
            for name in (*each.reads.values(), *each.writes):
                needed[name] = max(needed.get(name, 0), index)
            index += 1
            if stage.role != BEGIN and each.kernel == "k" and each is not stage.steps[-1]:
                bounds.append(index)
        if stage.exit is not None:
            needed[stage.exit] = max(needed.get(stage.exit, 0), index)
        bounds.append(index)
    assert [set(names) for names in found] == [
        {name for name, at in written.items() if at < bound <= needed[name]} for bound in bounds
    ]

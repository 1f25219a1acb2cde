"""Lists whose elements repeat, written once: any tree comes back, and no manifest expands without limit."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.program.checks import WrongError
from offramp.store import repeats
from offramp.store.repeats import compress, expand
from tests.selection import examples

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**18), 10**18), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=6), st.sampled_from(["layer.1.weight", "9", "09", "\u0661", "#", "\u00e9"]),
)  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=4), inner, max_size=3),
        st.tuples(inner, st.integers(3, 12)).map(lambda pair: [pair[0]] * pair[1]),
    ),
    max_leaves=12,
)  # fmt: skip


def counted(tree, number, width=0):
    """A tree whose `@` are a number."""
    return json.loads(json.dumps(tree).replace("@", str(number).zfill(width)))


def is_repeat(tree):
    return isinstance(tree, dict) and set(tree) == set(repeats.KEYS)


def contains_repeat(tree):
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return is_repeat(tree) or any(contains_repeat(each) for each in inner)


@settings(max_examples=examples(300), deadline=None)
@given(TREES)
def test_any_tree_comes_back(tree):
    if not contains_repeat(tree):
        assert expand(compress(tree), "program") == tree


@settings(max_examples=examples(200), deadline=None)
@given(
    st.lists(TREES, min_size=1, max_size=3), st.integers(0, 10**6), st.integers(0, 1000), st.integers(3, 20),
    st.integers(0, 4),
)  # fmt: skip
def test_runs_that_count_come_back(group, start, step, count, width):
    if contains_repeat(group):
        return
    marked = [{"name": "layer-@.up", "of": each} for each in group]
    elements = [each for i in range(count) for each in counted(marked, start + i * step, width)]
    assert expand(compress(elements), "program") == elements


def test_many_stages_take_no_more_than_a_few():
    stages = [{"name": f"layer.{i}", "shards": [f"layer-{i:02d}-up", f"layer-{i:02d}-down"]} for i in range(400)]
    found = compress(stages)
    assert len(json.dumps(found)) < 1500 and expand(found, "program") == stages
    assert found[-1]["repeat"] > 250, "only the change from two digits to three is written out"


def test_a_run_within_a_run_that_grows():
    """A loop that keeps all its states: what flows into a part grows from part to part."""
    parts = [{"number": i, "flows": [{"axes": [2, 32]}] * i} for i in range(400)]
    found = compress(parts)
    assert len(json.dumps(found)) < 1500 and expand(found, "program") == parts


def test_groups_of_several_elements():
    steps = [{"kernel": kernel, "shard": f"{i}-{kernel}"} for i in range(9) for kernel in ("attention", "up", "down")]
    (found,) = compress(steps)
    assert found["repeat"] == 9 and len(found["first"]) == 3 and expand([found], "program") == steps


def test_numbers_that_go_down():
    names = [f"some long name of a tensor {number}" for number in range(20, 2, -1)]
    assert len(compress(names)) < 6 and expand(compress(names), "program") == names


def block(first, second, count=3):
    return [{"repeat": count, "first": first, "second": second}]


ATTACKS = {
    "other words": (block(["a1"], ["b2"]), "differ in more than integers"),
    "another length": (block(["a1"], ["a1", "a2"]), "differ in more than integers"),
    "other zeros": (block(["a01"], ["a2"]), "differ in leading zeros"),
    "no list": (block("a", "a"), "first must be a list"),
    "two copies": (block(["a1"], ["a2"], 2), "repeat must be an integer from 3"),
    "a count that is a word": (block(["a1"], ["a2"], "9"), "repeat must be an integer"),
    "a count that is true": (block(["a1"], ["a2"], True), "repeat must be an integer"),
    "numbers below zero": (block(["a1"], ["a0"]), "becomes -1"),
    "numbers beyond all": (block(["a0"], ["a900000000000000"]), "becomes 1800000000000000"),
    "copies by the billion": (block(["a1"], ["a2"], 1 << 50), "are repeated"),
    "equal copies by the billion": (block(["a"], ["a"], 1 << 50), "are repeated"),
    "copies of copies": (block(block(["a"], ["a"], 9999), block(["a"], ["a"], 9999), 9999), "are repeated"),
    "counted copies of copies": (
        block(block(["a"], ["a"], 9000), block(["a"], ["a"], 9001), 9999), "are repeated"),
    "empty copies": (block([], [], 1 << 50), "are repeated"),
    "an escape that ends elsewhere": (block(["\u00e9"], ["\u00f9"]), "differ in more than integers"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_what_cannot_be_expanded_is_refused(name):
    tree, mentions = ATTACKS[name]
    with pytest.raises(WrongError) as caught:
        expand({"stages": tree}, "program")
    assert mentions in str(caught.value) and str(caught.value).startswith("program.stages[0]")


def test_a_tree_that_is_nested_too_deeply():
    tree = []
    for _ in range(100_000):
        tree = [tree]
    with pytest.raises(WrongError, match="nested too deeply"):
        expand(tree, "program")


def test_equal_copies_share_memory():
    found = expand(block([{"a": [1]}], [{"a": [1]}], 100_000), "program")
    assert len(found) == 100_000 and found[0] is found[-1]


@pytest.mark.parametrize(("last", "is_fine"), [(10**15 - 1, True), (10**15, False)])
def test_integers_of_repeats_have_fifteen_digits_at_most(last, is_fine):
    step = 10**14
    repeat = {"repeat": 3, "first": [last - 2 * step], "second": [last - step]}
    if is_fine:
        assert expand([repeat], "program") == [last - 2 * step, last - step, last]
    else:
        with pytest.raises(WrongError, match="a repeated integer becomes 1000000000000000"):
            expand([repeat], "program")


@pytest.mark.parametrize("members", [([0], [1]), (["a0"], ["a1"]), ([0], [0]), ([], []), ([{}], [{}])])
def test_many_short_copies_are_refused_before_they_take_time(members):
    """Each copy costs a parser's start, and an element a pointer, however few bytes they have."""
    first, second = members
    with pytest.raises(WrongError, match="bytes are repeated"):
        expand([{"repeat": 1_000_000, "first": first, "second": second}], "program")
    few = expand([{"repeat": 1000, "first": first, "second": second}], "program")
    assert len(few) == 1000 * len(first)


def test_too_many_copies_are_refused_before_the_first_is_made(monkeypatch):
    """A limit that is found by reaching it has taken the memory that it limits."""
    monkeypatch.setattr(repeats, "strict_json", lambda data: pytest.fail("a copy was made"))
    for count in (repeats.MAX_EXPANDED_BYTES // 128 + 1, 2**53):
        with pytest.raises(WrongError, match="bytes are repeated"):
            expand([{"repeat": count, "first": [{"a": 10}], "second": [{"a": 11}]}], "program")

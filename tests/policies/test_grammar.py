from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import UsageError
from offramp.policies import (
    GRAMMAR,
    AllOf,
    AnyOf,
    Confidence,
    Entropy,
    From,
    FullDepth,
    Margin,
    Patience,
    StopAt,
    parse,
)
from tests.policies.driver import policies, quick

SAID = {
    "none": FullDepth(),
    "stage:3": StopAt(3),
    "patience:3": Patience(3),
    "patience:inf": Patience(math.inf),
    "patience:3@0.25": Patience(3, 0.25),
    "patience:inf@2": Patience(math.inf, 2.0),
    "entropy:0": Entropy(0.0),
    "confidence:0.9": Confidence(0.9),
    "margin:1": Margin(1.0),
    "entropy:1e-05": Entropy(1e-5),
    "patience:3|confidence:0.9": AnyOf((Patience(3), Confidence(0.9))),
    "patience:3&confidence:0.9&stage:2": AllOf((Patience(3), Confidence(0.9), StopAt(2))),
    "stage:5|patience:3&margin:0.5": AnyOf((StopAt(5), AllOf((Patience(3), Margin(0.5))))),
    "patience:3&margin:0.5|stage:5": AnyOf((AllOf((Patience(3), Margin(0.5))), StopAt(5))),
    "from:2>patience:1": From(2, Patience(1)),
    "from:2>patience:1|confidence:0.9": From(2, AnyOf((Patience(1), Confidence(0.9)))),
}


@pytest.mark.parametrize("text", SAID)
def test_texts_and_policies_are_one_to_one(text):
    assert parse(text) == SAID[text]
    assert str(parse(text)) == text


@quick
@given(policies(9) | st.builds(Patience, st.integers(1, 99), st.floats(1e-300, 1e300)))
def test_a_policy_reads_back_from_its_text(policy):
    assert parse(str(policy)) == policy
    assert str(parse(str(policy))) == str(policy)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("\n from : 2 >\n patience : 3 @ .5 |\tstage : 4 & margin : 1. ", "from:2>patience:3@0.5|stage:4&margin:1"),
        (" none ", "none"),
        ("patience: inf", "patience:inf"),
        ("confidence:9E-1", "confidence:0.9"),
        ("stage:+03", "stage:3"),
    ],
)
def test_whitespace_and_spelling_of_numbers_do_not_matter(text, same):
    assert str(parse(text)) == same


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("", "''"),
        ("patience", "'patience'"),
        ("patience:", "'patience:': '' is not an integer"),
        ("patience:3|", "'' is not a rule"),
        ("&patience:3", "''"),
        ("patience:three", "'patience:three': 'three' is not an integer"),
        ("patience:2.5", "'2.5'"),
        ("patience:1 2", "'1 2'"),
        ("patience:٣", "'٣'"),
        ("patience:9999999999", "'9999999999'"),
        ("patience:0", "use stage:1 for the first exit, or none"),
        ("patience:-1", "patience:-1: P must be an integer >= 1"),
        ("patience:3@", "''"),
        ("patience:3@x", "'patience:3@x': 'x' is not a number"),
        ("patience:3@0", "patience:3@0: TAU must be finite and > 0"),
        ("patience:3@1e999", "patience:3@inf: TAU must be finite and > 0"),
        ("stage:0", "stage:0: K must be an integer >= 1"),
        ("stage:inf", "'inf'"),
        ("confidence:0", "confidence:0: threshold out of range, expected 0 < T <= 1"),
        ("confidence:nan", "'confidence:nan': 'nan' is not a number"),
        ("confidence:1_0", "'1_0'"),
        ("confidence:0.9@3", "'0.9@3'"),
        ("margin:1.5", "margin:1.5: threshold out of range, expected 0 < T <= 1"),
        ("entropy:1", "entropy:1: threshold out of range, expected 0 <= T < 1"),
        ("none:1", "'none:1'"),
        ("none|patience:3", "none cannot be a part of it"),
        ("patience:3&none", "none cannot be a part of it"),
        ("from:2>none", "not none"),
        ("from:2", "'from:2'"),
        ("from:0>patience:3", "exits count from 1"),
        ("from:x>patience:3", "'from:K>': 'x' is not an integer"),
        ("from:2>", "''"),
        ("from:2>from:3>patience:3", "'from:3>patience:3'"),
        ("patience:3|from:2>stage:4", "'from:2>stage:4'"),
        ("(patience:3|stage:4)&margin:1", "'(patience:3'"),
        ("Patience:3", "'Patience:3'"),
    ],
)
def test_what_cannot_be_read_is_named_beside_the_grammar(text, piece):
    with pytest.raises(UsageError) as caught:
        parse(text)
    message = str(caught.value)
    assert piece in message.split(" - ")[0] and repr(text) in message and GRAMMAR in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["policy.json", "runs/best/policy.JSON ", "patience:3.json"])
def test_policy_files_are_read_by_who_calls(text):
    with pytest.raises(UsageError, match="a policy file is not accepted here"):
        parse(text)
    names = []
    read = lambda name: names.append(name) or parse("patience:3")  # noqa: E731
    assert str(parse(f"from:2> {text} | entropy:0.1", read)) == "from:2>patience:3|entropy:0.1"
    assert names == [text.strip()]


@quick
@given(st.text(st.sampled_from("none stagepicfdr:inf@|&>0123.e-\n"), max_size=30))
def test_any_text_is_read_or_refused_as_usage(text):
    try:
        policy = parse(text)
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert parse(str(policy)) == policy

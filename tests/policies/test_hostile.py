"""Policies that anybody may write: large numbers are computed with, and many rules are refused."""

import numpy as np
import pytest

from offramp.errors import UsageError
from offramp.policies import codec, grammar
from offramp.policies.codec import from_json
from offramp.policies.evidence import FEATURES, SINGLE_LABEL, Evidence
from offramp.policies.grammar import parse

LARGE = 2 * 10**19
"""A number of JSON that is no integer of NumPy."""
WEIGHTS = [LARGE, 0.5, *[1] * (len(FEATURES) - 2)]
COSTS = {"lengths": [1, LARGE], "seconds": [[1, LARGE], [2, 3]]}
LEARNED = {
    "halting": {"risks": [WEIGHTS], "level": LARGE, "is_logistic": True},
    "index": {"risks": [[WEIGHTS, WEIGHTS]], "costs": COSTS, "price": LARGE, "is_logistic": False},
}


@pytest.mark.parametrize("kind", LEARNED)
def test_numbers_beyond_those_of_numpy_are_floats(kind):
    policy = from_json({"kind": kind, "features": list(FEATURES), **LEARNED[kind]})
    evidence = Evidence.from_logits(np.array([[0.0, 1.0]]), SINGLE_LABEL, np.array([7]))
    assert policy.start(1, 2).update(1, evidence).dtype == bool


def test_policies_of_many_rules_are_refused():
    rules = "confidence:0.5|" * (grammar.MAX_CHARACTERS // 15)
    assert parse(rules[:-1]).start(1, 2)
    with pytest.raises(UsageError, match="characters, at most"):
        parse(rules + "confidence:0.5")
    rule = {"kind": "rule", "text": "confidence:0.5"}
    from_json({"kind": "any", "parts": [rule] * codec._MAX_PARTS})
    with pytest.raises(ValueError, match="parts, at most"):
        from_json({"kind": "any", "parts": [rule] * (codec._MAX_PARTS + 1)})

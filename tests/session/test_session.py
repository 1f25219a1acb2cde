"""What a session is refused for when it is planned."""

import pytest

from offramp.errors import BudgetError
from offramp.session.session import _require_resident
from tests.toy import Toy, make_classifier


def test_weights_that_do_not_all_fit_are_not_resident_and_the_budget_that_is_named_works(shelf):
    store = shelf.open(Toy(padding_bytes=3 << 20))
    whole = make_classifier(store)
    _require_resident(whole)
    for budget_bytes in (1, whole.plan.smallest_budget_bytes + (2 << 20)):
        with pytest.raises(BudgetError, match=r"with all weights in memory, and .* are available") as refused:
            _require_resident(make_classifier(store, budget_bytes=budget_bytes))
        named = int(refused.value.remedy.partition("--budget ")[2].partition("MiB")[0])
        assert make_classifier(store, budget_bytes=(named + 2) << 20).plan.feasible, "2 MiB for growth of this process"

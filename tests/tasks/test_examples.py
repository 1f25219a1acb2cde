import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.tasks.examples import split_by_text

SHARES = {"train": 0.5, "tune": 0.3, "certify": 0.2}
texts = st.text(max_size=6) | st.tuples(st.text(max_size=4), st.text(max_size=4))


def cut(items, seed=0):
    return split_by_text(items, lambda text: text, SHARES, seed)


@settings(deadline=None, database=None)
@given(st.lists(texts), st.lists(texts), st.integers(0, 3))
def test_every_text_goes_to_one_split_and_more_texts_move_none(some, more, seed):
    before, after = cut(some, seed), cut(some + more, seed)
    assert sorted(map(repr, some)) == sorted(repr(text) for split in before.values() for text in split)
    assert all(after[name][: len(found)] == found for name, found in before.items())


def test_equal_texts_stay_together():
    for texts in (["A  fine Day", "a fine day"], [("a b", "C"), ("A b", " c ")]):
        assert sum(bool(found) for found in cut(texts).values()) == 1


def test_shares_are_kept_and_the_seed_matters():
    texts = [f"text {number}" for number in range(4000)]
    sizes = {name: len(found) / 4000 for name, found in cut(texts).items()}
    assert sizes == pytest.approx(SHARES, abs=0.03)
    assert cut(texts) != cut(texts, seed=1)
    with pytest.raises(ValueError, match="sum to 1"):
        split_by_text(texts, str, {"train": 0.5})

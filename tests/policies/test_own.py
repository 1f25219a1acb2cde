"""Policies of the user in Python files."""

import numpy as np
import pytest

from offramp.errors import RefusedError, UsageError
from offramp.policies import Confidence, parse, replay
from offramp.policies.codec import from_json
from offramp.policies.own import pinned, python_files

CODE = """
from dataclasses import dataclass
from offramp.policies import MemorylessPolicy, Policy

@dataclass(frozen=True)
class Falling(MemorylessPolicy):
    first: float
    step: float = 0.0

    def update(self, exit_index, evidence):
        return evidence.confidence_B >= self.first - self.step * (exit_index - 1)

class Numbers(Falling):
    def update(self, exit_index, evidence):
        return evidence.confidence_B

class Broken(Falling):
    def update(self, exit_index, evidence):
        return evidence.colour

def helper(): ...
"""
PROBLEM = "single_label_classification"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path


@pytest.fixture
def logits_KNC():
    return np.random.default_rng(0).standard_normal((4, 60, 3))


def own(text):
    return parse(text, code=True)


@pytest.mark.parametrize("form", ["{}", "from:2>{}", "{}&patience:1", "{}|patience:2", "from:2>{}|patience:2"])
def test_a_class_decides_as_the_same_rule_does_alone_and_combined(form, logits_KNC):
    there, here = own(form.format("mine.py:Falling:0.6")), parse(form.format("confidence:0.6"))
    there.check(4, PROBLEM)
    assert replay(there, logits_KNC, PROBLEM).tolist() == replay(here, logits_KNC, PROBLEM).tolist()
    assert there.earliest_exit(4) == here.earliest_exit(4) and there.last_exit(4) == here.last_exit(4)
    assert (
        replay(own("mine.py:Falling:0.6,0.2"), logits_KNC, PROBLEM).mean()
        < replay(Confidence(0.6), logits_KNC, PROBLEM).mean()
        or form != "{}"
    )


def test_the_name_holds_the_digest_and_is_refused_for_another_content(place):
    policy = own("from:2>mine.py:Falling:0.6,0.1")
    assert str(policy) == pinned("from:2>mine.py:Falling:0.6,0.1") and "mine.py@" in str(policy)
    assert own(str(policy)) == policy and pinned(str(policy)) == str(policy)
    (place / "mine.py").write_text(CODE.replace(">=", "> "))
    with pytest.raises(RefusedError, match="was changed"):
        own(str(policy))
    assert own("from:2>mine.py:Falling:0.6,0.1") != policy
    assert sorted(path.name for path in place.iterdir()) == ["mine.py"], "nothing is written beside the file"


def test_texts_without_a_python_file_stay_as_they_are():
    for text in ("none", "from:2>confidence:0.9|patience:2", "a.json&votes:2"):
        assert pinned(text) == text and not python_files(text)
    assert python_files("from:2>a.py:B:1|c/d.py@0123456789abcdef:E&patience:1") == ["a.py", "c/d.py"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("other.py:Falling", "no such policy in Python - other.py"),
        ("mine.py", "no class is named - mine.py - .*it has Falling, Numbers, Broken"),
        ("mine.py:Rising", "no class Rising - mine.py"),
        ("mine.py:helper", "helper is not a subclass of .* - mine.py, line 21"),
        ("mine.py:Policy", "abstract"),
        ("mine.py:Falling", "missing 1 required positional argument: 'first' - mine.py, line 6"),
        ("mine.py:Falling:1,2,3", "4 were given - mine.py, line 6"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text, says):
    with pytest.raises(UsageError, match=says):
        own(text)


def test_a_wrong_file_or_method_is_named_with_its_line(place, logits_KNC):
    (place / "syntax.py").write_text("\nclass A(:\n")
    (place / "name.py").write_text("\n\nunknown\n")
    for text, line in (("syntax.py:A", 2), ("name.py:A", 3)):
        with pytest.raises(UsageError, match=f"line {line}"):
            own(text)
    for name, says in (
        ("Numbers", "a bool for each of 60 rows, not float64 .* line 14"),
        ("Broken", "colour.* line 19"),
    ):
        with pytest.raises(UsageError, match=says):
            replay(own(f"mine.py:{name}:1"), logits_KNC, PROBLEM)


def test_data_cannot_name_code():
    for read in (lambda: parse("mine.py:Falling:1"), lambda: from_json({"kind": "rule", "text": "mine.py:Falling:1"})):
        with pytest.raises(UsageError, match="only a command line or a recipe may name one"):
            read()

"""The guards that `make guards` removes: each is in the code, once, and has tests."""

from collections import Counter
from pathlib import Path

from tests.checks.guards import GUARDS

ROOT = Path(__file__).parents[1]


def test_every_guard_is_in_the_code_once():
    whole = "\f".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    assert [guard.name for guard in GUARDS if whole.count(guard.text) != 1] == []
    assert Counter(guard.name for guard in GUARDS).most_common(1)[0][1] == 1
    assert Counter(guard.text for guard in GUARDS).most_common(1)[0][1] == 1


def test_every_guard_has_tests():
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert [guard.name for guard in GUARDS if not guard.tests or not files.issuperset(guard.tests)] == []

"""Figures out of records: medians, ratios within a round, verdicts, and how they are written down."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from offramp.measure import median

Result = dict[str, Any]
Records = list[dict[str, Any]]
"""Of one rival, in the order in which they were made."""
NONE = "–"


@dataclass(frozen=True)
class Verdict:
    """One line of the table of targets; `met` is None where nothing was measured."""

    what: str
    target: str
    measured: str
    met: bool | None

    @property
    def word(self) -> str:
        return {True: "yes", False: "**no**", None: "not measured"}[self.met]


def at_most(what: str, limit: float, values: Sequence[float], unit: str = "x") -> Verdict:
    """Met if the median is not above the limit."""
    return Verdict(what, f"<= {limit:.2f}{unit}", spread(values, unit), median(values) <= limit if values else None)


def peak_at_most(what: str, limit_mib: int, peaks: Sequence[int]) -> Verdict:
    """Met if no peak is above the limit."""
    shown, met = (mib(max(peaks)), max(peaks) <= limit_mib << 20) if peaks else (NONE, None)
    return Verdict(what, f"<= {limit_mib} MiB", shown, met)


def good(records: Records) -> dict[int, Result]:
    """Round -> result, of those that came to their end."""
    return {each["round"]: each["result"] for each in records if not {"failed", "unfinished"} & each["result"].keys()}


def trouble(records: Records) -> str | None:
    """Why a rival has no figures, if it has none."""
    if not records:
        return "not run"
    reasons = [each["result"].get("failed") or each["result"].get("unfinished") for each in records]
    return None if None in reasons else f"{reasons[-1]}{f' (as {len(reasons)} times)' if len(reasons) > 1 else ''}"


def each_of(records: Records, key: str) -> list[Any]:
    """One field of every good result."""
    return [result[key] for result in good(records).values()]


def ratios(records: Records, others: Records, value: Callable[[Result], float]) -> list[float]:
    """A value of one rival divided by that of another in the same round."""
    mine, theirs = good(records), good(others)
    return [value(mine[number]) / value(theirs[number]) for number in sorted(mine.keys() & theirs.keys())]


def spread(values: Sequence[float], unit: str = "x", digits: int = 2) -> str:
    """The median, and the least and the most."""
    if not values:
        return NONE
    middle, least, most = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle}{unit} ({least}..{most})"


def mib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 20):,.1f} MiB"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def yes(met: bool) -> str:
    return "yes" if met else "**no**"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown; a bar in a cell would end it. Rows that are too short are filled."""
    full = [[*row, *[NONE] * (len(head) - len(row))] for row in rows]
    lines = [head, ["---"] * len(head), *full]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]

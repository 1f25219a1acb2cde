"""The page of results, from the records of a run: what was tried, and how it ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
HOSTILE = ("manifests", "torch graphs", "onnx graphs", "side files", "model folders")
Record = dict[str, Any]


def write(records: Sequence[Record], path: Path) -> None:
    """Replace the figures of the page, between its two marks."""
    text = path.read_text()
    head, rest = text.split(BEGIN)
    parts = [hostile(records), by_verb(records), counted(records, "flips", FLIPS), counted(records, "fuzz", FUZZ)]
    parts += [others(records), faults(records), times(records)]
    path.write_text(head + BEGIN + "\n\n" + "\n\n".join(filter(None, parts)) + "\n\n" + END + rest.split(END)[1])


def print_parts(records: Sequence[Record], parts: Mapping[str, tuple[Any, str]]) -> None:
    """Print the parts with what they try, and the time that each took so far."""
    for name, (_, what) in parts.items():
        own = [each for each in records if each["part"] == name]
        seconds = sum(each["seconds"] for each in own if each["name"] == "time")
        num_faults = sum(bool(each.get("fault")) for each in own)
        print(f"{name:14} {seconds:7.0f} s  {len(own):6} records  {num_faults:4} faults  {what}")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def trials(records: Sequence[Record], part: str) -> list[Record]:
    """Return the trials of hostile inputs and their twins."""
    return [each for each in records if each["part"] == part and each.get("verb") and "legal" in each]


def hostile(records: Sequence[Record]) -> str:
    """Return the counts of the parts that try hostile inputs."""
    rows = []
    for part in HOSTILE:
        found = trials(records, part)
        for is_legal, kind in ((False, part), (True, f"{part}, legal twins")):
            own = [each for each in found if each["legal"] == is_legal]
            counts = Counter(each["outcome"] for each in own)
            outcomes = [counts[name] for name in ("refused", "honest answer", "other model", "fault")]
            rows.append((kind, len({each["name"] for each in own}), len(own), *outcomes, *extremes(own)))
    head = ("inputs", "number", "trials", "refused", "honest answer", "another model", "faults")
    return "### Hostile inputs\n\n" + table((*head, "slowest (s)", "most memory beyond the honest input (MiB)"), rows)


def extremes(own: Sequence[Record]) -> tuple[str, object]:
    """Return the slowest trial in seconds, and the most memory beyond the honest input in MiB."""
    if not own:
        return "-", "-"
    return f"{max(each['seconds'] for each in own):.1f}", max(each["more_mib"] for each in own)


def by_verb(records: Sequence[Record]) -> str:
    """Return the number of trials by verb."""
    own = [each for part in HOSTILE for each in trials(records, part)]
    counts = Counter((each["verb"], bool(each["fault"])) for each in own)
    rows = [
        (verb, counts[verb, False] + counts[verb, True], counts[verb, True]) for verb in sorted({v for v, _ in counts})
    ]
    skipped = [each for each in records if each.get("outcome") in ("not made", "honest input refused")]
    note = f"\n\n{len(skipped)} inputs or verbs were not tried: " + ", ".join(
        sorted({f"{each['name']} {each.get('verb', '')}".strip() for each in skipped})[:12]
    )
    return "### Trials by verb\n\n" + table(("verb", "trials", "faults"), rows) + (note if skipped else "")


FLIPS: dict[str, Callable[[Record], object]] = {
    "kind of file": lambda each: each["kind"],
    "flips": lambda each: each.get("flips", each.get("skipped")),
    "found by `verify`": lambda each: each["flips"] - each["missed"] if "flips" in each else "-",
    "runs after a flip": lambda each: each.get("runs", "-"),
    "of them with the same answer": lambda each: each.get("same", "-"),
    "of them with another answer": lambda each: each.get("wrong", "-"),
}
FUZZ: dict[str, Callable[[Record], object]] = {
    "parser": lambda each: each["target"],
    "guided by coverage": lambda each: "yes" if each["guided"] else "no",
    "executions": lambda each: each["executions"],
    "read": lambda each: each["read"],
    "refused": lambda each: each["refused"],
    "faults": lambda each: len(each["faults"]),
    "slowest (s)": lambda each: each["most_seconds"],
}


def counted(records: Sequence[Record], part: str, columns: Mapping[str, Callable[[Record], object]]) -> str:
    """Return a table of the records of a part."""
    own = [each for each in records if each["part"] == part and ({"kind", "target"} & each.keys())]
    title = {"flips": "Bit flips", "fuzz": "Fuzzing"}[part]
    return f"### {title}\n\n" + table(tuple(columns), [[cell(each) for cell in columns.values()] for each in own])


def others(records: Sequence[Record]) -> str:
    """Return how the other parts ended."""
    rows = []
    for part in ("disks", "tampering", "processes", "soak", "kills", "faults", "schedules"):
        own = [each for each in records if each["part"] == part and each["name"] != "time"]
        counts = Counter("fault" if each.get("fault") else str(each.get("outcome", "well")) for each in own)
        rows.append(
            (part, len(own), ", ".join(f"{name}: {count}" for name, count in sorted(counts.items())) or "not run")
        )
    soak = next((each for each in records if each["part"] == "soak" and "growth_bytes" in each), None)
    note = ""
    if soak is not None:
        note = f"\n\nSoak: {soak['requests']} requests, {soak['growth_bytes'] / (1 << 20):.2f} MiB more at the end than"
        note += f" after 1,000; threads {soak['first']['threads']} and {soak['last']['threads']}."
    return "### Changing stores, full disks, kills and the rest\n\n" + table(("part", "trials", "ended"), rows) + note


def faults(records: Sequence[Record]) -> str:
    """Return one line for each kind of fault."""
    kinds = Counter(f"{each['part']}: {each['fault'].partition(':')[0]}" for each in records if each.get("fault"))
    if not kinds:
        return "### Faults\n\nNone."
    return "### Faults\n\n" + table(("kind", "trials"), kinds.most_common())


def times(records: Sequence[Record]) -> str:
    """Return the time of each part."""
    rows = [(each["part"], each["records"], each["seconds"]) for each in records if each["name"] == "time"]
    total = sum(seconds for *_, seconds in rows)
    return "### Time\n\n" + table(
        ("part", "records", "seconds"), [*rows, ("all", sum(n for _, n, _ in rows), round(total))]
    )

"""Page of a benchmark from its records: targets and measurements, then one table per section.

Computes every verdict from the records and measures nothing.
"""

from importlib import metadata
from pathlib import Path

from figures import Records, Verdict, mib, table
from pages import PAGES, Found

from offramp.measure.hardware import environment

FULL_ROUNDS = 5
TIMED = ("latency", "start", "cgroup", "throttle", "divide")
"""Sections with medians over rounds."""
INTRODUCTION = """\
# Main benchmark

A classifier with the exact shape of BERT-base (12 layers, hidden size 768, vocabulary 30,522; DistilBERT where named),
float32, batch 1, 128 tokens, 2 threads, warm page cache unless stated. **The weights are random**: times, bytes and
memory do not depend on their values, and no accuracy is claimed. [Method](../how-measured.md).
"""


def write(found: dict[str, Found], missing: dict[str, str | None], out: Path, command: str) -> str:
    """Return the page. `missing` maps each section to the reason why it cannot run here, or None."""
    verdicts: list[Verdict] = []
    body: list[str] = []
    for name, rivals in found.items():
        page = PAGES[name]
        section_verdicts, lines = page.draw(rivals)
        verdicts += section_verdicts
        skipped = f"skipped: {missing[name]}" if missing[name] else "not run"
        body += ["", f"## {page.title}", "", *([*lines, "", page.note] if any(rivals.values()) else [skipped])]
    rows = [(each.what, each.target, each.measured, each.word) for each in verdicts]
    records = [record for rivals in found.values() for each in rivals.values() for record in each]
    facts = [f"- command: `{command}`", *_facts(records, out)]
    targets = ["## Targets", "", *table(("what", "target", "measured", "met"), rows)]
    return "\n".join([INTRODUCTION, *facts, "", *_caution(records), *targets, *body]) + "\n"


def _facts(records: Records, out: Path) -> list[str]:
    facts = environment(out)
    versions = {"python": facts["python_version"], "offramp": facts["offramp_version"], **facts["library_versions"]}
    versions["accelerate"] = metadata.version("accelerate")
    days = sorted({record["finished"][:10] for record in records})
    storage = facts["storage"]
    return [
        f"- measured: {' to '.join(dict.fromkeys((days[0], days[-1]))) if days else 'nothing'} (UTC),"
        " rivals interleaved, each in its own process",
        f"- machine: {facts['cpu_model']}, {facts['num_cores']} cores, {mib(facts['total_memory_bytes'])} of memory,"
        f" {facts['platform']} {facts['kernel']}, {storage['file_system']}, read-ahead {storage['read_ahead_kb']} KiB",
        f"- versions: {', '.join(f'{name} {version}' for name, version in sorted(versions.items()))}",
    ]


def _caution(records: Records) -> list[str]:
    """Return a warning if some rival has fewer rounds than a published figure needs."""
    rounds: dict[tuple[str, str], set[int]] = {}
    for record in records:
        if record["section"] in TIMED and "unfinished" not in record["result"]:
            rounds.setdefault((record["section"], record["rival"]), set()).add(record["round"])
    least = min(map(len, rounds.values()), default=FULL_ROUNDS)
    if least >= FULL_ROUNDS:
        return []
    return [f"**Some rivals have {least} of {FULL_ROUNDS} rounds: this is a trial, not a result.**", ""]

"""Write docs/results/latency.md and the pictures of docs/cost-function.md from the records of latency.py:
`python bench/latency_report.py`. It measures nothing. What was not run prints a dash.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import latency
import numpy as np
from figures import Verdict, table
from glue_report import MODELS, label
from records import read_records

from offramp.measure import median
from offramp.measure.hardware import environment

PAGE = latency.RESULTS.with_name("latency.md")
SLOT_BYTES = 4 * 768 * 3072
"""Of BERT-base: a third of a layer."""
PICTURES = latency.RESULTS.parents[1] / "pictures"
INTRODUCTION = """\
# Latency: what `offramp tune` promises, and what comes of it

Models, data and splits are those of [glue.md](glue.md): MiniLM-L6 and a DistilBERT filled from it, seed 0, whole model
in memory, batch 1, 2 threads. Policies are made on the tune split with a device profile of this machine. QNLI, QQP and
MNLI are partial data.
"""


def main() -> None:
    records = read_records(latency.RESULTS)
    verdicts: list[Verdict] = []
    body: list[str] = []
    for title, part in (
        ("## A mean latency is asked for", asked),
        ("## Against patience, at equal latency", patience),
        ("## Deadlines, while reads become slow", deadlines),
        ("## Certificates", certificates),
        ("## BERT-base's shape, streamed: what exits save", streamed),
        ("## BERT-base's shape, in bulk", bulk),
        ("## Tuning", tuning),
    ):
        lines, found = part(records)
        body += [title, "", *lines, ""]
        verdicts += found
    facts = environment(Path())
    versions = {"python": facts["python_version"], "offramp": facts["offramp_version"], **facts["library_versions"]}
    head = [
        INTRODUCTION,
        "- commands: `python bench/latency.py --data GLUE`, `python bench/latency_report.py`; records: `latency.jsonl`",
        f"- machine of this page: {facts['cpu_model']}, {facts['num_cores']} cores, {facts['platform']}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in sorted(versions.items()))}",
        "", "## Targets", "",
    ]  # fmt: skip
    rows = [(each.what, each.target, each.measured, each.word) for each in verdicts]
    PAGE.write_text("\n".join([*head, *table(("what", "target", "measured", "met"), rows), "", *body]).rstrip() + "\n")
    for record in of(records, "pictures"):
        draw(record)


def of(records: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def asked(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[Verdict]]:
    rows, of_asked, of_predicted = [], [], []
    for record in of(records, "latencies"):
        for name, seconds in record["asked"].items():
            rounds = [each[name] for each in record["rounds"]]
            achieved = median([each["seconds"] for each in rounds])
            ratio = median([each["seconds"] / each["predicted"] for each in rounds])
            of_asked.append(achieved / seconds)
            of_predicted.append(ratio)
            full = median([each["none"]["seconds"] / each[name]["seconds"] for each in record["rounds"]])
            rows.append((
                f"{MODELS[record['model']]}, {label(record['task'])}", f"`{record['policies'][name]}`",
                f"{seconds * 1e3:.2f} ms", f"{achieved * 1e3:.2f} ms", f"{achieved / seconds:.2f}x", f"{ratio:.2f}x",
                f"{full:.2f}x",
            ))  # fmt: skip
    note = (
        f"The policy is tuned to a mean latency on the tune split; {latency.NUM_TEXTS} texts of the certify split,"
        f" which it never saw, are then run. Medians of {latency.ROUNDS} rounds. Of the profile: against what a device"
        " profile of the same round says of the same policy and texts, so that a machine that drifts does not count."
        " The last column is the speed-up over `--exit none` of the same store."
    )
    head = ("task", "policy", "asked", "measured", "of asked", "of the profile", "speed-up")
    verdicts = []
    if rows:
        for name, ratios in (("the latency asked for", of_asked), ("the profile of the same round", of_predicted)):
            within = sum(abs(ratio - 1) <= 0.05 for ratio in ratios)
            told = f"{within} of {len(ratios)}; {min(ratios):.2f}x .. {max(ratios):.2f}x, median {median(ratios):.2f}x"
            verdicts.append(
                Verdict(f"mean latency on held-out texts, of {name}", "within 5 %, all", told, within == len(ratios))
            )
    return [note, "", *table(head, rows)], verdicts


def patience(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[Verdict]]:
    rows = []
    for record in of(records, "against_patience"):
        key = (record["model"], record["task"])
        for pair in record["pairs"]:
            ratio = median([each["ours"] / each["patience"] for each in pair["rounds"]])
            interval = f"{pair['gain']:+.1f} [{pair['gain_low']:+.1f} {pair['gain_high']:+.1f}]"
            rows.append((
                f"{MODELS[key[0]]}, {label(key[1])}", f"`{pair['patience']}`", f"{pair['score']:.1f}",
                f"`{pair['policy']}`", interval, f"{ratio:.2f}x",
            ))  # fmt: skip
    note = (
        "For each patience the cost function (`stopping` or `index`), tuned to the latency that the profile says of"
        " that patience. Gain: score on dev, with the paired 95 % bootstrap interval. Seconds: measured side by side on"
        f" {latency.NUM_TEXTS} texts of dev, cost function by patience, median of 3 rounds."
    )
    verdicts = []
    for model, name in MODELS.items():
        mine = [record for record in of(records, "against_patience") if record["model"] == model and record["pairs"]]
        if mine:
            worse = [r["task"] for r in mine if any(pair["gain_high"] < 0 for pair in r["pairs"])]
            better = [r["task"] for r in mine if np.mean([pair["gain"] for pair in r["pairs"]]) > 0]
            what = f"{name}: tasks where the cost function is worse than a patience beyond the interval, of {len(mine)}"
            verdicts.append(Verdict(what, "none", ", ".join(worse) or "none", not worse))
            what = f"{name}: tasks where it is better, in the mean over patiences"
            verdicts.append(
                Verdict(what, ">= 4 of 7", f"{len(better)} of {len(mine)}: {', '.join(better)}", len(better) >= 4)
            )
    head = ("task", "patience", "score", "cost function", "gain [95 %]", "seconds")
    return [note, "", *table(head, rows)], verdicts


def deadlines(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[Verdict]]:
    found = of(records, "deadlines")
    if not found:
        return ["not run"], []
    record = found[0]
    rows = [
        (
            name, f"{each['beyond']} of {record['requests']}", f"{each['p50'] * 1e3:.1f} ms",
            f"{each['p99'] * 1e3:.1f} ms", f"{each['worst'] * 1e3:.1f} ms", f"{each['mean_exit_before']:.2f}",
            f"{each['mean_exit_after']:.2f}",
        )
        for name, each in ((name, record[name]) for name in ("guard", "no guard"))
    ]  # fmt: skip
    note = (
        f"MiniLM-L6 on SST-2, streamed, `--deadline {record['deadline'] * 1e3:.0f}ms` (twice the median of a pass);"
        f" from request {record['requests'] // 2} on every read takes {latency.SLOWER} times as long."
        " Exit policy: none."
    )
    share = record["guard"]["beyond"] / record["requests"]
    what = f"requests beyond the deadline by more than 5 %, reads {latency.SLOWER}x slower from the middle on"
    without = record["no guard"]["beyond"] / record["requests"]
    told = f"{100 * share:.2f} % (without the guard {100 * without:.0f} %)"
    head = ("", "beyond", "p50", "p99", "worst", "mean exit before", "after")
    return [note, "", *table(head, rows)], [Verdict(what, "<= 1 %", told, share <= 0.01)]


def certificates(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[Verdict]]:
    from scipy.stats import binom

    found = of(records, "certificates")
    if not found:
        return ["not run"], []
    record, verdicts, rows = found[0], [], []
    most = int(binom.ppf(0.99, record["sets"], latency.DELTA))
    for method in ("ucb", "ltt"):
        each = record[method]
        rows.append((method, str(each["certified"]), str(each["violations"])))
        what = f"{method}: sets of {record['sets']} whose certified policy risks more than {latency.EPSILON:g}"
        verdicts.append(Verdict(what, f"<= {most}", str(each["violations"]), each["violations"] <= most))
    note = (
        f"SST-2: {record['sets']} sets of {record['drawn']} drawn with replacement from {record['rows']} samples; among"
        f" 30 thresholds of confidence each set certifies one, epsilon {latency.EPSILON:g}, delta {latency.DELTA:g};"
        " the risk is that of all samples. `tests/policies/test_certify.py` does the same in every test run, and"
        " catches a certifier that ignores chance."
    )
    return [note, "", *table(("method", "sets with a certificate", "violations"), rows)], verdicts


def streamed(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[Verdict]]:
    found = of(records, "streamed")
    if not found:
        return ["not run"], []
    rows, shares, of_profile, reads = [], [], [], []
    for stage in latency.STAGES:
        rounds = [(each["none"], each[f"stage:{stage}"]) for each in found[0]["rounds"]]
        speed = median([full["seconds"] / early["seconds"] for full, early in rounds])
        foretold = median([full["predicted"] / early["predicted"] for full, early in rounds])
        share = median([early["bytes"] / full["bytes"] for full, early in rounds])
        seconds, peak = (median([early[key] for _, early in rounds]) for key in ("seconds", "peak"))
        shares.append(speed / (12 / stage))
        of_profile.append(speed / foretold)
        reads.append(median([(early["bytes"] - full["bytes"] * stage / 12) / SLOT_BYTES for full, early in rounds]))
        rows.append((
            f"`stage:{stage}`", f"{seconds * 1e3:.0f} ms", f"{speed:.2f}x", f"{foretold:.2f}x", f"{12 / stage:.2f}x",
            f"{100 * share:.0f} %", f"{100 * stage / 12:.0f} %", f"{peak / 2**20:.0f} MiB",
        ))  # fmt: skip
    note = (
        f"Random weights, fp32, 12 layers, 768 wide, `--budget {latency.SHAPE_BUDGET}`, texts of {latency.MAX_LENGTH}"
        f" tokens, batch 1, medians of {latency.SHAPE_ROUNDS} rounds. Plain is the same store, backend and budget with"
        " `--exit none`, which runs no head. By the profile: measured in the same round. Early exits read less than"
        " their share, because resident shards lie in the first layers."
    )
    head = ("exit", "a text", "speed-up", "by the profile", "by layers", "bytes read", "of the layers", "peak")
    verdicts = [
        Verdict("speed-up of exits, streamed, of that by layers", ">= 0.85x", _least(shares), min(shares) >= 0.85),
        Verdict("the same, of what the profile says", ">= 0.95x", _least(of_profile), min(of_profile) >= 0.95),
        Verdict(
            "bytes read with exits, less those of all by the share of layers run", "within one slot",
            f"{min(reads):+.1f} .. {max(reads):+.1f} slots", max(map(abs, reads)) <= 1,
        ),
    ]  # fmt: skip
    return [note, "", *table(head, rows)], verdicts


def _least(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f}x .. {max(ratios):.2f}x"


def bulk(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[Verdict]]:
    found = of(records, "bulk")
    if not found:
        return ["not run"], []
    rounds = found[0]["rounds"]
    sizes = list(rounds[0]["theirs"])
    best = [max(each["theirs"].values()) for each in rounds]
    ratios = [each["ours"] / top for each, top in zip(rounds, best, strict=True)]
    rows = [
        (f"transformers, all in memory, batch {size}", f"{median([each['theirs'][size] for each in rounds]):.2f}", "",
         f"{max(each['their_peak'] for each in rounds) / 2**20:.0f} MiB")
        for size in sizes
    ]  # fmt: skip
    rows.append((
        f"offramp, `--budget {latency.SHAPE_BUDGET} --batch bulk`: {rounds[0]['rows']} rows",
        f"{median([each['ours'] for each in rounds]):.2f}", f"{median(ratios):.2f}x",
        f"{max(each['peak'] for each in rounds) / 2**20:.0f} MiB",
    ))  # fmt: skip
    what = f"bulk under {latency.SHAPE_BUDGET}, texts a second, of transformers' best batch size"
    told = f"{median(ratios):.2f}x ({_least(ratios)})"
    head = ("", "texts a second", "of the best", "peak")
    return table(head, rows), [Verdict(what, ">= 0.90x", told, median(ratios) >= 0.9)]


def tuning(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[Verdict]]:
    found = of(records, "tuning_time")
    if not found:
        return ["not run"], []
    seconds = found[0]["seconds"]
    what = "tuning, a transcript of 10,000 x 12 exits, all families"
    return [f"{seconds:.1f} s, without the profile."], [Verdict(what, "< 30 s", f"{seconds:.1f} s", seconds < 30)]


def draw(record: dict[str, Any]) -> None:
    """Three pictures, black on white, for docs/cost-function.md."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "offramp", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot as plt

    PICTURES.mkdir(exist_ok=True)
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for family in dict.fromkeys(each[0] for each in record["tried"]):
        points = [(1e3 * seconds, score) for name, seconds, score in record["tried"] if name == family]
        axes.plot(*zip(*points, strict=True), "o", markersize=3, label=family, alpha=0.7)
    chosen = record["chosen"]
    axes.plot(1e3 * chosen["seconds"], chosen["score"], "k*", markersize=12, label=f"chosen: {chosen['kind']}")
    axes.set(xlabel="mean latency, ms", ylabel="score on tune", title="SST-2, MiniLM-L6: every policy that was tried")
    axes.legend(fontsize=7)
    save(figure, "pareto")
    figure, axes = plt.subplots(figsize=(6, 2.6))
    total = sum(record["exits"])
    axes.bar(range(1, len(record["exits"]) + 1), [100 * count / total for count in record["exits"]], color="0.4")
    axes.set(xlabel="exit", ylabel="% of samples", title="where samples of the certify split leave")
    save(figure, "exits")
    figure, axes = plt.subplots(figsize=(6, 3))
    levels, risks, bounds = zip(*record["curve"], strict=True)
    axes.plot(levels, [100 * risk for risk in risks], "k-", label="measured on certify")
    axes.plot(levels, [100 * bound for bound in bounds], "k--", label="upper bound, confidence 0.9")
    axes.axhline(1.0, color="0.6", linewidth=1)
    axes.set(xlabel="threshold of confidence", ylabel="accuracy lost, points", title="what a threshold risks")
    axes.legend(fontsize=8)
    save(figure, "risk")


def save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
    print(PAGE, file=sys.stderr)

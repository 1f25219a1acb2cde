"""Write docs/results/latency.md and the pictures of docs/cost-function.md from the records of latency.py:
`python bench/latency_report.py`. It measures nothing. What was not run prints a dash.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import latency
import numpy as np
import promise
from figures import NONE, Verdict, table
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
in memory, batch 1 where nothing else is said, 2 threads. Policies are made on the tune split with a device profile of
this machine. QNLI, QQP and MNLI are partial data. A dash is what was not measured yet. The policies at batch 1 of the
first section were made before `tune` tried prices of a second below zero; from the same profiles it takes none with
such a price at these latencies.
"""
NOTE_ASKED = f"""\
A policy is tuned to a mean latency on the tune split, and then runs up to {latency.NUM_TEXTS} texts of the certify
split, which it never saw. This machine is shared: from one second to the next it is faster or slower by a quarter. So
policies take turns of {promise.BLOCK} passes with passes of a device profile, in one process (`bench/promise.py`), and
each round, of {latency.ROUNDS}, has its own profile. *Tune says*: the mean latency in the policy file, of that asked
for; less where every slower policy scores worse. *Of the texts*: what texts take, of what the profile of the same
seconds says of these very texts; medians of rounds. *Measured of said*: what the whole certify split takes, of what
that profile says of the tune split; that of the whole split is what the profile says of it times *of the texts*, so
that it is not left to chance which texts run. *Of asked*: its product with *tune says*, in which the machine's drift
since the first profile is not, nor what that profile itself was off by. *By the clock*: milliseconds measured, of those
asked for, with both. *Speed-up*: over `--exit none`. *Tokens*: that a text is computed with in the mean, of the tune
and of the certify split. At batch 8 these are those of the longest of eight, in which the splits of some tasks differ
by a tenth, by chance; nothing that `tune` sees can foretell that, and it is in *measured of said* and *of asked*.
"""
MISSED = """\
- **Mean latencies.** Rounds of one policy differ: the slowest takes {spread:.0f} % more of what its own profile says
  than the fastest (the median over policies at batch 1), since the machine's speed changes from turn to turn. Of such
  numbers a median of five is off by some percent, and those that miss at batch 1 miss by little, on both sides. At
  batch 8, tokens of the splits differ as well (see there). By the clock, the machine's drift between the first profile
  and the run is counted too.
- **Patience.** At equal latency, each of {pairs} pairs has an interval of its own: {by_chance:.1f} of them are expected
  to lie below zero where both are as good. Latencies are matched by what the profile says; what they are measured to be
  scatters as above, so that some pairs are not of equal time.
- **Bytes under 128MiB.** Early exits read less than their share, as residents lie where every text comes.
"""
NOTE_BENCHES = f"""\
`offramp bench STORE --task T --exit policy.json`: {latency.BENCH_TEXTS} texts of dev, {latency.BENCH_ROUNDS} rounds in
processes of their own. The policy is that of the middle latency above. Latencies are of a batch, in bulk of a sweep;
differences in points and speed-ups are against plain at the same batch size, with 95 % intervals by paired bootstrap.
*By layers* counts layers and measures nothing. `stage:K` is the model truncated after layer K, of all the one nearest
in throughput. MiB a text: bytes read, first reads of deeper layers included. There is no int8 model here.
"""


def main() -> None:
    records = read_records(latency.RESULTS)
    verdicts: list[Verdict] = []
    body: list[str] = []
    for title, part in (
        ("## What is missed, and why", missed),
        ("## A mean latency is asked for", asked),
        ("## Against patience, at equal latency", patience),
        ("## Deadlines, while reads become slow", deadlines),
        ("## The bench of a task", benches),
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
    lines, verdicts = [NOTE_ASKED, ""], []
    for kind, batch in (("latencies", 1), ("latencies_of_batches", 8)):
        rows, of_asked, of_said, raw = [], [], [], []
        for record in of(records, kind):
            for name, seconds in record["asked"].items():
                rounds = [each[name] for each in record["rounds"]]
                used = record["said"][name] / seconds
                of_said.append(median(_of_said(record, name)))
                of_asked.append(used * of_said[-1])
                raw.append(median([each["seconds"] for each in rounds]) / seconds)
                full = median([each["none"]["seconds"] / each[name]["seconds"] for each in record["rounds"]])
                of_texts = median([each["seconds"] / each["predicted"] for each in rounds])
                rows.append((
                    f"{MODELS[record['model']]}, {label(record['task'])}", f"`{record['policies'][name]}`",
                    f"{seconds * 1e3:.2f} ms", f"{used:.3f}x", f"{of_said[-1]:.3f}x", f"{of_asked[-1]:.3f}x",
                    f"{raw[-1]:.2f}x", f"{of_texts:.3f}x", f"{full:.2f}x",
                    " / ".join(f"{record['tokens'][rows]:.1f}" for rows in ("said", "whole")),
                ))  # fmt: skip
        what = f"mean latency on held-out texts at batch {batch}"
        if not rows:
            verdicts.append(Verdict(what, "within 5 %, all", NONE, None))
            continue
        head = (
            "task", "policy", "asked", "tune says", "measured of said", "of asked", "by the clock", "of the texts",
            "speed-up", "tokens",
        )  # fmt: skip
        lines += [f"Batch {batch}:", "", *table(head, rows), ""]
        verdicts += [
            _within(f"{what}, of that asked for, the machine's drift taken out", of_asked),
            _within(f"{what}, of that asked for, by the clock", raw),
            _within(f"{what}, of what a profile of the same seconds says", of_said),
        ]
    seen = {record["model"] for record in of(records, "latencies")}
    missing = [name for model, name in MODELS.items() if model not in seen]
    verdicts += [Verdict(f"{name}: mean latency on held-out texts", "within 5 %, all", NONE, None) for name in missing]
    return lines, verdicts


def _of_said(record: dict[str, Any], name: str) -> list[float]:
    """What the whole certify split takes, of what the profile says of the tune split, by rounds."""
    rounds = [each[name] for each in record["rounds"]]
    return [each["seconds"] * each["whole"] / each["predicted"] / each["said"] for each in rounds]


def missed(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[Verdict]]:
    rounds_of = [_of_said(record, name) for record in of(records, "latencies") for name in record["asked"]]
    spread = median([max(rounds) / min(rounds) - 1 for rounds in rounds_of])
    pairs = sum(len(record["pairs"]) for record in of(records, "against_patience"))
    return [MISSED.format(spread=100 * spread, pairs=pairs, by_chance=0.025 * pairs)], []


def _within(what: str, ratios: Sequence[float]) -> Verdict:
    within = sum(abs(ratio - 1) <= 0.05 for ratio in ratios)
    told = f"{within} of {len(ratios)}; {min(ratios):.2f}x .. {max(ratios):.2f}x, median {median(ratios):.3f}x"
    return Verdict(what, "within 5 %, all", told, within == len(ratios))


def patience(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[Verdict]]:
    rows, ratios = [], []
    for record in of(records, "against_patience"):
        key = (record["model"], record["task"])
        for pair in record["pairs"]:
            share = pair["whole_by_texts"]["ours"] / pair["whole_by_texts"]["patience"]
            ratio = share * median([each["ours"] / each["patience"] for each in pair["rounds"]])
            ratios.append(ratio)
            interval = f"{pair['gain']:+.1f} [{pair['gain_low']:+.1f} {pair['gain_high']:+.1f}]"
            rows.append((
                f"{MODELS[key[0]]}, {label(key[1])}", f"`{pair['patience']}`", f"{pair['score']:.1f}",
                f"`{pair['policy']}`", interval, f"{ratio:.2f}x",
            ))  # fmt: skip
    note = (
        "For each patience the cost function (`stopping` or `index`) of the same latency, which is what the profile"
        " says of the texts of dev; scores on tune choose, as `tune` does, and labels of dev choose nothing. Gain:"
        " score on dev, with the paired 95 % bootstrap interval. Seconds: measured in turns on up to"
        f" {latency.PAIR_TEXTS} texts of dev, cost function by patience, medians of {latency.PAIR_ROUNDS} rounds; those"
        " of all of dev are estimated as in the section before, by what the profile says of both; far less than 1"
        " where no policy that was tried takes more of the time, or a faster one scores better on tune, beyond the"
        " interval there. Of so many pairs the interval of one in forty lies below zero by chance alone."
    )
    verdicts = []
    for model, name in MODELS.items():
        mine = [record for record in of(records, "against_patience") if record["model"] == model and record["pairs"]]
        if not mine:
            verdicts.append(Verdict(f"{name}: tasks where the cost function is better", ">= 4 of 7", NONE, None))
        else:
            worse = [r["task"] for r in mine if any(pair["gain_high"] < 0 for pair in r["pairs"])]
            better = [r["task"] for r in mine if np.mean([pair["gain"] for pair in r["pairs"]]) > 0]
            what = f"{name}: tasks where the cost function is worse than a patience beyond the interval, of {len(mine)}"
            verdicts.append(Verdict(what, "none", ", ".join(worse) or "none", not worse))
            what = f"{name}: tasks where it is better, in the mean over patiences"
            verdicts.append(
                Verdict(what, ">= 4 of 7", f"{len(better)} of {len(mine)}: {', '.join(better)}", len(better) >= 4)
            )
    if ratios:
        slower = sum(ratio > 1.05 for ratio in ratios)
        told = f"{slower} of {len(ratios)}; {_least(ratios)}, median {median(ratios):.2f}x"
        verdicts.append(Verdict("pairs in which the cost function is slower by over 5 %", "none", told, slower == 0))
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
    rounds = found[0]["rounds"]
    rows, shares, of_profile, reads = [], [], [], {}
    for budget in latency.STREAMED_BUDGETS:
        for stage in (12, *latency.STAGES):
            exit = "none" if stage == 12 else f"stage:{stage}"
            pairs = [(each[budget]["none"], each[budget][exit]) for each in rounds]
            speed = median([full["seconds"] / early["seconds"] for full, early in pairs])
            foretold = median([full["predicted"] / early["predicted"] for full, early in pairs])
            beyond = median([(early["bytes"] - full["bytes"] * stage / 12) / SLOT_BYTES for full, early in pairs])
            seconds, peak, num_bytes = (
                median([early[key] for _, early in pairs]) for key in ("seconds", "peak", "bytes")
            )
            if stage < 12:
                shares.append(speed / (12 / stage))
                of_profile.append(speed / foretold)
                reads.setdefault(budget, []).append(beyond)
            rows.append((
                budget, f"`{exit}`", f"{seconds * 1e3:.0f} ms", f"{speed:.2f}x", f"{foretold:.2f}x",
                f"{12 / stage:.2f}x", f"{num_bytes / 2**20:.1f} MiB", f"{beyond:+.2f}", f"{peak / 2**20:.0f} MiB",
            ))  # fmt: skip
    theirs = [each["transformers"] for each in rounds]
    their_seconds, their_peak = (median([each[key] for each in theirs]) for key in ("seconds", "peak"))
    rows.append((
        "none", "transformers, all in memory", f"{their_seconds * 1e3:.0f} ms", "", "", "", "", "",
        f"{their_peak / 2**20:.0f} MiB",
    ))  # fmt: skip
    note = (
        f"Random weights, fp32, 12 layers, 768 wide, texts of {latency.MAX_LENGTH} tokens, batch 1, medians of"
        f" {latency.STREAMED_ROUNDS} rounds, in each of which the exits run there and back. Plain is the same store,"
        " backend and budget with `--exit none`, which runs no head. By the profile: measured in the same round. Slots:"
        " bytes read, less those of `none` times the share of"
        f" layers run; a slot is {SLOT_BYTES / 2**20:.0f} MiB. Under the smaller budget no layer is resident. Under the"
        " larger one a shard of each of the first three is, since every text needs these: early exits then read less"
        " than their share, by more than a slot, and are counted as a miss although nobody loses by it."
    )
    head = ("budget", "exit", "a text", "speed-up", "by the profile", "by layers", "bytes read", "slots", "peak")
    verdicts = [
        Verdict("speed-up of exits, streamed, of that by layers", ">= 0.85x", _least(shares), min(shares) >= 0.85),
        Verdict("the same, of what the profile says", ">= 0.95x", _least(of_profile), min(of_profile) >= 0.95),
        *(
            Verdict(
                f"bytes read with exits, less those of all by the share of layers run, `--budget {budget}`",
                "within one slot", f"{min(beyond):+.2f} .. {max(beyond):+.2f} slots", max(map(abs, beyond)) <= 1,
            )
            for budget, beyond in reads.items()
        ),
    ]  # fmt: skip
    return [note, "", *table(head, rows)], verdicts


def _least(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f}x .. {max(ratios):.2f}x"


def benches(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[Verdict]]:
    """What `offramp bench --task` said: all batch sizes, and the truncated model that is nearest in throughput."""
    share, rows = f"{latency.SHARES[1]:g}", []
    policies = {(r["model"], r["task"]): r["policies"][share] for r in of(records, "latencies")}
    for record in [*of(records, "task_bench"), *of(records, "streamed_task_bench")]:
        where = "" if record["kind"] == "task_bench" else f", {latency.TASK_BUDGET}"
        measured, key = record["measured"], (record["model"], record["task"])
        ours = next(each for each in measured if (each["rival"], each["batch"]) == ("exits", 1))
        cut = [each for each in measured if each["rival"] == "truncated"]
        near = min(cut, key=lambda each: abs(each["texts_per_second"] - ours["texts_per_second"]))
        for each in [*(each for each in measured if each["rival"] != "truncated"), near]:
            exit = {"plain": "plain", "exits": f"`{policies[key]}`"}.get(each["rival"], f"`{each['exit']}`")
            rows.append((
                f"{MODELS[key[0]]}, {label(key[1])}{where}", exit, str(each["batch"]),
                *(f"{1e3 * each[f'latency_seconds_{part}']:.1f}" for part in ("p50", "p90", "p99")),
                f"{each['texts_per_second']:.0f}", f"{each['peak_rss_bytes'] / 2**20:.0f}",
                f"{each['bytes_read_per_text'] / 2**20:.2f}", f"{each['scores']['score']:.1f}",
                _interval("+.1f", each, "score_difference"), _interval(".2f", each, "speedup"),
                f"{each['layer_count_speedup']:.2f}",
            ))  # fmt: skip
    if not rows:
        return ["not run"], []
    head = (
        "task", "exit", "batch", "p50 ms", "p90", "p99", "texts a s", "peak MiB", "MiB a text", "score",
        "against plain", "speed-up", "by layers",
    )  # fmt: skip
    return [NOTE_BENCHES, *table(head, rows)], []


def _interval(form: str, measured: dict[str, Any], key: str) -> str:
    value, low, high = (measured[name] for name in (key, f"{key}_low", f"{key}_high"))
    if value is None:
        return ""
    return f"{value:{form}}" if low is None else f"{value:{form}} [{low:{form}} {high:{form}}]"


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
         f"{max(each['their_peak'] for each in rounds) / 2**20:.0f} MiB", "")
        for size in sizes
    ]  # fmt: skip
    rows.append((
        f"offramp, `--budget {latency.SHAPE_BUDGET} --batch bulk`: {rounds[0]['rows']} rows a sweep",
        f"{median([each['ours'] for each in rounds]):.2f}", f"{median(ratios):.2f}x",
        f"{max(each['peak'] for each in rounds) / 2**20:.0f} MiB",
        f"{median([each['bytes'] for each in rounds]) / 2**20:.1f} MiB",
    ))  # fmt: skip
    what = f"bulk under {latency.SHAPE_BUDGET}, texts a second, of transformers' best batch size"
    told = f"{median(ratios):.2f}x ({_least(ratios)})"
    head = ("", "texts a second", "of the best", "peak", "read a text")
    note = (
        f"{latency.BULK_TEXTS} texts of {latency.MAX_LENGTH} tokens, tokenized and run; transformers is given tokens."
        " Weights are read once a sweep."
    )
    return [note, "", *table(head, rows)], [Verdict(what, ">= 0.90x", told, median(ratios) >= 0.9)]


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

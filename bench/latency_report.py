"""Write docs/results/latency.md and the pictures of docs/cost-function.md: `python bench/latency_report.py`.

Reads the records of latency.py and measures nothing. Missing records print a dash.
"""

import re
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
"""Size of a slot for BERT-base in bytes: one third of a layer."""
PICTURES = latency.RESULTS.parents[1] / "pictures"
INTRODUCTION = """\
# Latency: predictions of `offramp tune` and measurements

Models, data and splits are those of [glue.md](glue.md): MiniLM-L6 and a DistilBERT initialised from it, seed 0, fully
resident, batch 1 unless stated, 2 threads. Policies are chosen on the tune split with a device profile of this machine.
QNLI, QQP and MNLI use partial data. A dash marks a missing measurement. The policies at batch 1 of the first section
were made before `tune` considered negative prices per second; with the same profiles it selects none of them at these
latencies. Learned policies are shown by their kind; their hashes are in the records.
"""
NOTE_ASKED = f"""\
Each row is one tuned policy, run on up to {latency.NUM_TEXTS} texts of the certify split, not used for tuning.
The speed of this shared machine varies by a quarter from one second to the next. Therefore policies alternate with
passes of a device profile in one process (`bench/promise.py`), in blocks of {promise.BLOCK} passes, and each of
{latency.ROUNDS} rounds has its own profile. Ratios are medians over rounds.

- *predicted / requested*: mean latency in the policy file, relative to the request. It is below 1 if every slower
  policy has a lower score.
- *measured / predicted*: latency on the whole certify split, relative to the prediction of the same round's profile for
  the tune split. The latency of the whole split is the profile's prediction for it times *on these texts*, so that it
  does not depend on which texts were run.
- *measured / requested, drift removed*: the product of both. It excludes the drift of the machine since the first
  profile, and the error of that profile.
- *measured / requested, wall-clock*: measured milliseconds relative to the request, including both.
- *on these texts: measured / predicted*: latency of the texts that were run, relative to the same round's prediction
  for these texts.
- *speed-up*: relative to `--exit none`.
- *mean tokens per text (tune / certify)*: number of tokens computed. At batch 8 this is the length of the longest of
  eight texts, in which the splits of some tasks differ by a tenth by chance. `tune` cannot predict this difference; it
  is part of *measured / predicted* and *measured / requested*.
"""
MISSED = """\
- **Mean latencies.** Rounds of one policy differ: relative to its own profile, the slowest round takes {spread:.0f} %
  longer than the fastest (median over policies at batch 1), because the speed of the machine changes between blocks. A
  median of five such values has an error of some percent; the misses at batch 1 are small and on both sides. At batch 8
  the splits also differ in tokens (see the table). Wall-clock ratios include the drift between the first profile and
  the run.
- **Patience.** Each of {pairs} pairs has its own interval; {by_chance:.1f} of them are expected to lie below zero
  if both policies are equally good. Latencies are matched by prediction; measured latencies scatter as above, so
  some pairs do not have equal latency.
- **Bytes under 128MiB.** Early exits read less than their share, because the resident layers are those that every text
  executes.
"""
NOTE_BENCHES = f"""\
`offramp bench STORE --task T --exit policy.json`: {latency.BENCH_TEXTS} texts of dev, {latency.BENCH_ROUNDS} rounds in
separate processes. Each row is one policy at one batch size; the policy is that of the middle latency above. Latencies
are per batch, in bulk mode per sweep. Score differences (points) and speed-ups are relative to the plain model at the
same batch size, with 95 % intervals by paired bootstrap. *Speed-up by layer count* is not a measurement. `stage:K` is
the truncated model with the most similar throughput. *MiB read per text* includes first reads of deeper layers. There
is no int8 model.
"""


def main() -> None:
    records = read_records(latency.RESULTS)
    verdicts: list[Verdict] = []
    body: list[str] = []
    for title, part in (
        ("## Missed targets and their causes", missed),
        ("## Requested mean latencies", asked),
        ("## Cost function and patience at equal latency", patience),
        ("## Deadlines while reads become slow", deadlines),
        ("## Task benchmark", benches),
        ("## Certificates", certificates),
        ("## BERT-base shape, streamed: savings by exits", streamed),
        ("## BERT-base shape, bulk mode", bulk),
        ("## Time of tuning", tuning),
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
        rows, of_requested, of_predicted, raw = [], [], [], []
        for record in of(records, kind):
            for name, seconds in record["asked"].items():
                rounds = [each[name] for each in record["rounds"]]
                used = record["said"][name] / seconds
                of_predicted.append(median(_of_predicted(record, name)))
                of_requested.append(used * of_predicted[-1])
                raw.append(median([each["seconds"] for each in rounds]) / seconds)
                full = median([each["none"]["seconds"] / each[name]["seconds"] for each in record["rounds"]])
                of_texts = median([each["seconds"] / each["predicted"] for each in rounds])
                rows.append((
                    f"{MODELS[record['model']]}, {label(record['task'])}", readable(record["policies"][name]),
                    f"{seconds * 1e3:.2f} ms", f"{used:.3f}x", f"{of_predicted[-1]:.3f}x", f"{of_requested[-1]:.3f}x",
                    f"{raw[-1]:.2f}x", f"{of_texts:.3f}x", f"{full:.2f}x",
                    " / ".join(f"{record['tokens'][rows]:.1f}" for rows in ("said", "whole")),
                ))  # fmt: skip
        what = f"mean latency on held-out texts at batch {batch}"
        if not rows:
            verdicts.append(Verdict(what, "within 5 %, all", NONE, None))
            continue
        head = (
            "task", "policy", "requested mean latency", "predicted / requested", "measured / predicted",
            "measured / requested, drift removed", "measured / requested, wall-clock",
            "on these texts: measured / predicted", "speed-up", "mean tokens per text (tune / certify)",
        )  # fmt: skip
        lines += [f"Batch {batch}:", "", *table(head, rows), ""]
        verdicts += [
            _within(f"{what}: measured / requested, drift removed", of_requested),
            _within(f"{what}: measured / requested, wall-clock", raw),
            _within(f"{what}: measured / predicted by a simultaneous profile", of_predicted),
        ]
    seen = {record["model"] for record in of(records, "latencies")}
    missing = [name for model, name in MODELS.items() if model not in seen]
    verdicts += [Verdict(f"{name}: mean latency on held-out texts", "within 5 %, all", NONE, None) for name in missing]
    return lines, verdicts


def readable(policy: str) -> str:
    """Return the name of a policy for tables: rules as code, learned policies by their kind, without the hash."""
    kind, _, first = re.sub(r":[0-9a-f]{8}(?=@|$)", "", policy).partition("@")
    if kind == policy.partition("@")[0]:
        return f"`{policy}`"
    return f"{kind}, from exit {first}" if first else kind


def _of_predicted(record: dict[str, Any], name: str) -> list[float]:
    """Return, for each round, the latency of the certify split over the prediction for the tune split."""
    rounds = [each[name] for each in record["rounds"]]
    return [each["seconds"] * each["whole"] / each["predicted"] / each["said"] for each in rounds]


def missed(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[Verdict]]:
    rounds_of = [_of_predicted(record, name) for record in of(records, "latencies") for name in record["asked"]]
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
                readable(pair["policy"]), interval, f"{ratio:.2f}x",
            ))  # fmt: skip
    note = (
        "Each row compares a patience with the cost function (`stopping` or `index`) of the same latency, as predicted"
        " by the profile for the texts of dev. The policy is chosen by its score on tune, as in `tune`; labels of dev"
        " are not used. *Gain*: difference of scores on dev, with the paired 95 % bootstrap interval. *Latency ratio*:"
        f" cost function over patience, measured alternately on up to {latency.PAIR_TEXTS} texts of dev, medians of"
        f" {latency.PAIR_ROUNDS} rounds, and extrapolated to all of dev as in the section above. It is far below 1 if"
        " no candidate uses more of the time, or if a faster one has a significantly better score on tune. By chance,"
        " one interval in forty lies below zero."
    )
    verdicts = []
    for model, name in MODELS.items():
        mine = [record for record in of(records, "against_patience") if record["model"] == model and record["pairs"]]
        if not mine:
            verdicts.append(Verdict(f"{name}: tasks where the cost function is better", ">= 4 of 7", NONE, None))
        else:
            worse = [r["task"] for r in mine if any(pair["gain_high"] < 0 for pair in r["pairs"])]
            better = [r["task"] for r in mine if np.mean([pair["gain"] for pair in r["pairs"]]) > 0]
            what = f"{name}: tasks of {len(mine)} where the cost function is significantly worse than a patience"
            verdicts.append(Verdict(what, "none", ", ".join(worse) or "none", not worse))
            what = f"{name}: tasks where the cost function is better, mean over patiences"
            verdicts.append(
                Verdict(what, ">= 4 of 7", f"{len(better)} of {len(mine)}: {', '.join(better)}", len(better) >= 4)
            )
    if ratios:
        slower = sum(ratio > 1.05 for ratio in ratios)
        told = f"{slower} of {len(ratios)}; {_least(ratios)}, median {median(ratios):.2f}x"
        verdicts.append(
            Verdict("pairs in which the cost function is slower by more than 5 %", "none", told, slower == 0)
        )
    head = ("task", "patience", "score of patience", "cost function", "gain (points) [95 % CI]", "latency ratio")
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
        f"MiniLM-L6 on SST-2, streamed, `--deadline {record['deadline'] * 1e3:.0f}ms` (twice the median latency)."
        f" From request {record['requests'] // 2} on, every read takes {latency.SLOWER} times as long."
        " Exit policy: none."
    )
    share = record["guard"]["beyond"] / record["requests"]
    what = f"requests that exceed the deadline by more than 5 %, reads {latency.SLOWER}x slower in the second half"
    without = record["no guard"]["beyond"] / record["requests"]
    told = f"{100 * share:.2f} % (without the guard {100 * without:.0f} %)"
    head = (
        "run", "requests past the deadline by more than 5 %", "p50 latency", "p99 latency", "maximum latency",
        "mean exit, first half", "mean exit, second half",
    )  # fmt: skip
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
        what = f"{method}: sets of {record['sets']} whose certified policy has a risk above {latency.EPSILON:g}"
        verdicts.append(Verdict(what, f"<= {most}", str(each["violations"]), each["violations"] <= most))
    note = (
        f"SST-2: {record['sets']} sets of {record['drawn']} samples, drawn with replacement from {record['rows']}. Each"
        f" set certifies one of 30 confidence thresholds, epsilon {latency.EPSILON:g}, delta {latency.DELTA:g}. The"
        " true risk is that on all samples. `tests/policies/test_certify.py` repeats the experiment in every test run."
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
            predicted = median([full["predicted"] / early["predicted"] for full, early in pairs])
            beyond = median([(early["bytes"] - full["bytes"] * stage / 12) / SLOT_BYTES for full, early in pairs])
            seconds, peak, num_bytes = (
                median([early[key] for _, early in pairs]) for key in ("seconds", "peak", "bytes")
            )
            if stage < 12:
                shares.append(speed / (12 / stage))
                of_profile.append(speed / predicted)
                reads.setdefault(budget, []).append(beyond)
            rows.append((
                budget, f"`{exit}`", f"{seconds * 1e3:.0f} ms", f"{speed:.2f}x", f"{predicted:.2f}x",
                f"{12 / stage:.2f}x", f"{num_bytes / 2**20:.1f} MiB", f"{beyond:+.2f}", f"{peak / 2**20:.0f} MiB",
            ))  # fmt: skip
    theirs = [each["transformers"] for each in rounds]
    their_seconds, their_peak = (median([each[key] for each in theirs]) for key in ("seconds", "peak"))
    rows.append((
        "none", "transformers, fully resident", f"{their_seconds * 1e3:.0f} ms", "", "", "", "", "",
        f"{their_peak / 2**20:.0f} MiB",
    ))  # fmt: skip
    note = (
        f"Random weights, fp32, 12 layers, hidden size 768, texts of {latency.MAX_LENGTH} tokens, batch 1, medians of"
        f" {latency.STREAMED_ROUNDS} rounds; each round runs the exits in ascending and descending order. Speed-ups are"
        " relative to `--exit none` on the same store, backend and budget. The predicted speed-up is that of a profile"
        " of the same round. *Excess reads*: bytes read minus the bytes of `none` times the fraction of layers"
        f" executed, in slots of {SLOT_BYTES / 2**20:.0f} MiB. Under the smaller budget no layer is resident. Under the"
        " larger one, one shard of each of the first three layers is resident, because every text needs them; early"
        " exits then read less than their share, by more than one slot, which counts as a miss although it is harmless."
    )
    head = (
        "budget", "exit", "latency per text", "speed-up", "predicted speed-up", "speed-up by layer count", "bytes read",
        "excess reads (slots)", "peak memory",
    )  # fmt: skip
    verdicts = [
        Verdict("streamed exits: speed-up / speed-up by layer count", ">= 0.85x", _least(shares), min(shares) >= 0.85),
        Verdict("streamed exits: speed-up / predicted", ">= 0.95x", _least(of_profile), min(of_profile) >= 0.95),
        *(
            Verdict(
                f"streamed exits: excess reads over the fraction of layers executed, `--budget {budget}`",
                "within one slot", f"{min(beyond):+.2f} .. {max(beyond):+.2f} slots", max(map(abs, beyond)) <= 1,
            )
            for budget, beyond in reads.items()
        ),
    ]  # fmt: skip
    return [note, "", *table(head, rows)], verdicts


def _least(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f}x .. {max(ratios):.2f}x"


def benches(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[Verdict]]:
    """Return the results of `offramp bench --task`: all batch sizes, and the truncated model of similar throughput."""
    share, rows = f"{latency.SHARES[1]:g}", []
    policies = {(r["model"], r["task"]): r["policies"][share] for r in of(records, "latencies")}
    for record in [*of(records, "task_bench"), *of(records, "streamed_task_bench")]:
        where = "" if record["kind"] == "task_bench" else f", {latency.TASK_BUDGET}"
        measured, key = record["measured"], (record["model"], record["task"])
        ours = next(each for each in measured if (each["rival"], each["batch"]) == ("exits", 1))
        cut = [each for each in measured if each["rival"] == "truncated"]
        near = min(cut, key=lambda each: abs(each["texts_per_second"] - ours["texts_per_second"]))
        for each in [*(each for each in measured if each["rival"] != "truncated"), near]:
            exit = {"plain": "plain", "exits": readable(policies[key])}.get(each["rival"], f"`{each['exit']}`")
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
        "task", "policy", "batch", "p50 latency (ms)", "p90 (ms)", "p99 (ms)", "throughput (texts/s)",
        "peak memory (MiB)", "MiB read per text", "score", "score difference [95 % CI]", "speed-up [95 % CI]",
        "speed-up by layer count",
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
        (f"transformers, fully resident, batch {size}", f"{median([each['theirs'][size] for each in rounds]):.2f}", "",
         f"{max(each['their_peak'] for each in rounds) / 2**20:.0f} MiB", "")
        for size in sizes
    ]  # fmt: skip
    rows.append((
        f"offramp, `--budget {latency.SHAPE_BUDGET} --batch bulk`: {rounds[0]['rows']} rows per sweep",
        f"{median([each['ours'] for each in rounds]):.2f}", f"{median(ratios):.2f}x",
        f"{max(each['peak'] for each in rounds) / 2**20:.0f} MiB",
        f"{median([each['bytes'] for each in rounds]) / 2**20:.1f} MiB",
    ))  # fmt: skip
    what = f"bulk under {latency.SHAPE_BUDGET}: throughput relative to the best batch size of transformers"
    told = f"{median(ratios):.2f}x ({_least(ratios)})"
    head = (
        "run",
        "throughput (texts/s)",
        "relative to the best of transformers",
        "peak memory",
        "weights read per text",
    )
    note = (
        f"{latency.BULK_TEXTS} texts of {latency.MAX_LENGTH} tokens. offramp tokenizes them; transformers receives"
        " token ids. Weights are read once per sweep."
    )
    return [note, "", *table(head, rows)], [Verdict(what, ">= 0.90x", told, median(ratios) >= 0.9)]


def tuning(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[Verdict]]:
    found = of(records, "tuning_time")
    if not found:
        return ["not run"], []
    seconds = found[0]["seconds"]
    what = "tuning on a transcript of 10,000 rows and 12 exits, all families of policies"
    return [f"{seconds:.1f} s, without measuring the profile."], [
        Verdict(what, "< 30 s", f"{seconds:.1f} s", seconds < 30)
    ]


def draw(record: dict[str, Any]) -> None:
    """Draw three pictures for docs/cost-function.md."""
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

"""Write docs/results/any-model.md: `python bench/any_model_report.py`.

Reads the records of any_model.py, vision.py and anywhere.py and measures nothing. Missing records are marked.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import any_model
import anywhere
import vision
from figures import NONE, Verdict, at_most, each_of, mib, ms, peak_at_most, ratios, spread, table, trouble
from records import read_records

from offramp.measure import median

PAGE = any_model.RESULTS.with_name("any-model.md")
COST_SECONDS, COST_MIB, NAMES_MIB, LATENCY = 10, 700, 80, 1.15
WAYS = ("cpu_offload", "disk_offload")
INTRODUCTION = """\
# Any model: division, streaming and their cost

The zoo of `bench/zoo.py`: tiny configurations of the architectures of transformers, torchvision and timm, with random
weights and noise on every saved tensor, one thread, each model in its own process. **Random weights do not allow
statements about accuracy.** Method: [how-measured.md](../how-measured.md).
"""
KINDS = {"encoder": "encoders", "decoder": "decoders", "experts": "mixtures of experts", "recurrent": "recurrent"}
"""Plural names of kinds of the zoo."""
CAUSES: dict[str, str] = {}
"""Name of a model -> cause of its exception, if the record does not contain it."""
Record = dict[str, Any]
Records = list[Record]
Section = tuple[list[str], list[Verdict]]


def main() -> None:
    records = read_records(any_model.RESULTS)
    parts: tuple[tuple[str, Callable[[Records], Section]], ...] = (
        ("## Divided and streamed", streamed),
        ("## Budgets below the largest stage", sliced),
        ("## Offloading by accelerate", offloaded),
        ("## Stages as graphs", graphs),
        ("## Agreement of names, eager and export on one checkpoint", agreement),
        ("## Cost of dividing", cost),
        ("## Latency, streamed", latency),
    )
    sections = [(title, *part(records)) for title, part in parts]
    sections.append(("## Images with exits", *exits_on_images(read_records(vision.RESULTS))))
    sections.append(
        ("## Exits on other architectures and custom modules", *exits_anywhere(read_records(anywhere.RESULTS)))
    )
    sections.append(("## Not in the zoo", *missing(records)))
    lines = [INTRODUCTION, *about(records), "", "## Targets", ""]
    verdicts = [verdict for _, _, found in sections for verdict in found]
    rows = [(each.what, each.target, each.measured, NONE if each.target == NONE else each.word) for each in verdicts]
    lines += [*table(("what", "target", "measured", "met"), rows), ""]
    for title, body, _ in sections:
        lines += [title, "", *body, ""] if body else []
    PAGE.write_text("\n".join(lines).rstrip() + "\n")


def about(records: Records) -> list[str]:
    """Commands, machines and versions."""
    lines = [
        "- commands: `python bench/any_model.py`, with `--families torchvision,timm` in an environment that has them,"
        " and `python bench/any_model_report.py`; records: `any-model.jsonl`"
    ]
    for each in of(records, "environment"):
        shown = ", ".join(f"{name} {version}" for name, version in each["versions"].items())
        line = f"- {each['cpu_model']}, {each['num_cores']} cores, {each['platform']}: {shown}"
        lines += [line] if line not in lines else []
    return lines


def of(records: Records, kind: str) -> Records:
    return [record for record in records if record["kind"] == kind]


def group_of(record: Record) -> str:
    """Return the table row to which a model belongs."""
    kind = KINDS.get(record["of"], record["of"])
    return f"{record['family']}: {kind}" if record["family"] == "transformers" else record["family"]


def grouped(records: Iterable[Record]) -> dict[str, Records]:
    found: dict[str, Records] = collections.defaultdict(list)
    for record in records:
        found[group_of(record)].append(record)
    return found


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def by_reason(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """Return one line per reason, with the models that it applies to."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for name, reason in reasons:
        found[reason].append(name)
    ordered = sorted(found.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    return [f"- {listed(names)} ({len(names)}): {reason}" for reason, names in ordered]


# zoo ------------------------------------------------------------------------------------------------------------------


def streamed(records: Records) -> Section:
    """Report equality and peak bytes of weights under the smallest budget and twice the smallest budget."""
    found = of(records, "zoo")
    if not found:
        return ["not run"], []
    exceptions = [(record["name"], reason) for record in found if (reason := fault(record)) is not None]
    divided = [record for record in found if "failed" not in record]
    runs = [record[budget] for record in divided for budget in ("smallest", "twice") if "failed" not in record[budget]]
    shares = [run["peak_weight_bytes"] / run["budget_bytes"] for run in runs]
    num_equal = len(found) - len(exceptions)
    verdicts = [
        Verdict(
            "models divided and streamed bit-identically on two inputs, under two budgets", "100 %",
            f"{num_equal} of {len(found)}: {100 * num_equal / len(found):.1f} %", num_equal == len(found),
        ),
        Verdict(
            "peak bytes of weights / weight budget", "<= 1.00x, always",
            f"at most {max(shares):.2f}x in {len(shares)} runs", max(shares) <= 1,
        ),
    ]  # fmt: skip
    rows = [group_row(name, members) for name, members in grouped(found).items()]
    rows.append(group_row("all", found))
    head = (
        "kind, models, models with equal answers, peak / weight budget, weight budget / all weights, stages,"
        " models with kept weights, models with paged weights, seconds to divide"
    )
    paged = [record for record in divided if record["is_paged"]]
    kept = [record for record in divided if record["kept"]]
    lines = [
        "Each row is a kind of models. Each model is divided from memory by a run on 2 rows, verified with 3 rows of "
        "another length, and streamed again: from its class or a module without weights under the smallest "
        "budget that holds its largest stage, and from a module with other weights under twice that budget. Answers "
        "are equal if all tensors of both answers are equal bit for bit under both budgets. The peak counts weights in "
        "the arena, residents, paged weights and weights that the code still references, and is the larger of both "
        "runs. The weight budget is the smaller one. Saved buffers stay in memory and are not counted. *Kept* weights "
        "stay in memory because the code refers to them across stages; *paged* weights are read outside their stages. "
        "Stages, budgets and seconds are medians.",
        "",
        *table(head.split(", "), rows),
        "",
        "Exceptions:" if exceptions else "There are no exceptions.",
        *by_reason(exceptions),
        "",
        f"Kept in memory: {listed(record['name'] for record in kept)}. Paged: {listed(r['name'] for r in paged)}.",
    ]
    return lines, verdicts


def fault(record: Record) -> str | None:
    """Return the reason why a model counts as an exception, or None."""
    reason = record.get("failed")
    for budget in ("smallest", "twice") if reason is None else ():
        run = record[budget]
        if "failed" in run:
            reason = f"{run['module']}: {run['failed']}"
        elif not all(run["equal"]):
            reason = "answers differ" if "not finite" in map(str, run["difference"]) else "the last bits differ"
        elif run["peak_weight_bytes"] > run["budget_bytes"]:
            reason = "more bytes of weights than the budget"
        if reason is not None:
            break
    return reason if reason is None else CAUSES.get(record["name"], reason)


def group_row(name: str, members: Records) -> Sequence[str]:
    divided = [record for record in members if "failed" not in record]
    runs = [run for record in divided for run in (record["smallest"], record["twice"]) if "failed" not in run]
    if not runs:
        return (name, str(len(members)), "0")
    shares = [run["peak_weight_bytes"] / run["budget_bytes"] for run in runs]
    return (
        name,
        str(len(members)),
        str(sum(fault(record) is None for record in members)),
        f"{max(shares):.2f}x",
        f"{100 * median([r['smallest']['budget_bytes'] / max(r['weight_bytes'], 1) for r in divided]):.0f} %",
        f"{median([record['num_stages'] for record in divided]):.0f}",
        str(sum(bool(record["kept"]) for record in divided)),
        str(sum(record["is_paged"] for record in divided)),
        f"{median([record['divide_seconds'] for record in divided]):.2f} s",
    )


def sliced(records: Records) -> Section:
    """Report runs under budgets that are smaller than the largest stage."""
    found = [record for record in of(records, "zoo") if "sliced" in record]
    if not found:
        return [], []
    good = [record for record in found if "failed" not in record["sliced"]]
    equal = [record["name"] for record in good if all(record["sliced"]["equal"])]
    differences = {r["name"]: max(r["sliced"]["difference"], key=float) for r in good if "difference" in r["sliced"]}
    shares = [record["sliced"]["budget_bytes"] / record["smallest"]["budget_bytes"] for record in good]
    worst = max(differences.values(), default=0.0)
    lines = [
        f"If a stage does not fit, large weights of linear layers are read in slices of rows: {len(good)} models run in"
        f" {100 * median(shares):.0f} % (median) of the smallest budget above, {len(equal)} of them with bitwise equal"
        f" answers. Sliced products can round differently: the others differ by at most {worst:.1e}, relative to the"
        f" largest value: {listed(differences)}.",
        *by_reason((record["name"], record["sliced"]["failed"]) for record in found if "failed" in record["sliced"]),
    ]
    return lines, []


# accelerate -----------------------------------------------------------------------------------------------------------


def offloaded(records: Records) -> Section:
    """Report offloading by accelerate on the same models and inputs."""
    found = of(records, "accelerate")
    if not found:
        return ["not run"], []
    rows, verdicts, lines = [], [], []
    for name, members in {**grouped(found), "all": found}.items():
        cells = [f"{counts['equal']} / {counts['error']} / {counts['wrong']}" for counts in map(counted(members), WAYS)]
        rows.append((name, str(len(members)), *cells))
    for way in WAYS:
        counts = counted(found)(way)
        shown = f"{counts['equal']} of {len(found)} equal, {counts['error']} errors, {counts['wrong']} silently wrong"
        verdicts.append(Verdict(f"for comparison: `{way}` of accelerate on the same models", NONE, shown, None))
        wrong = {record["name"]: shown_difference(record[way]) for record in found if ended(record, way) == "wrong"}
        names = ", ".join(f"{name} ({wrong[name]})" for name in sorted(wrong)) or "none"
        lines += [f"Silently wrong with `{way}` (largest difference / largest value): {names}.", ""]
        errors = [(r["name"], failed_of(r, way)) for r in found if ended(r, way) == "error"]
        lines += [f"Errors of `{way}`:", *by_reason(errors), ""]
    note = (
        "`accelerate.cpu_offload(model, execution_device='cpu')` and `disk_offload`, both inputs, eval mode, no"
        " gradients. Cells: models with equal answers / with an error / with different answers and no error."
    )
    head = ("kind", "models", *(f"`{way}`" for way in WAYS))
    return [note, "", *table(head, rows), "", *lines[:-1]], verdicts


def ended(record: Record, way: str) -> str:
    if "failed" in record or "failed" in record[way]:
        return "error"
    return "equal" if all(record[way]["equal"]) else "wrong"


def failed_of(record: Record, way: str) -> str:
    return record["failed"] if "failed" in record else record[way]["failed"]


def counted(members: Records) -> Callable[[str], collections.Counter[str]]:
    return lambda way: collections.Counter(ended(record, way) for record in members)


def shown_difference(result: Record) -> str:
    numbers = [each for each in result["difference"] if isinstance(each, float)]
    words = [each for each in result["difference"] if isinstance(each, str)]
    return words[0] if words else f"{max(numbers):.1e}"


# graphs ---------------------------------------------------------------------------------------------------------------


def graphs(records: Records) -> Section:
    """Report which models have graphs for their stages, and the reasons of the others."""
    found = of(records, "export")
    if not found:
        return ["not run"], []
    onnx = {(record["family"], record["name"]): record for record in of(records, "onnx")}
    rows = []
    for name, members in {**grouped(found), "all": found}.items():
        good = [record for record in members if "num_kinds" in record]
        tried = [record for key in ((r["family"], r["name"]) for r in members) if (record := onnx.get(key))]
        rows.append((
            name, str(len(members)), str(len(good)), str(sum(record["num_exits"] > 0 for record in good)),
            *((" / ".join(f"{median([r[key] for r in good]):.0f}" for key in ("num_stages", "num_kinds")),
               f"{median([record['seconds'] for record in good]):.1f} s") if good else (NONE, NONE)),
            f"{sum(bool(record.get('num_onnx')) for record in tried)} of {len(tried)}" if tried else NONE,
        ))  # fmt: skip
    refused = [(r["name"], r.get("refused") or r["failed"]) for r in found if "num_kinds" not in r]
    without = [
        (record["name"], record.get("failed") or record.get("refused") or record["said"])
        for record in onnx.values() if not record.get("num_onnx")
    ]  # fmt: skip
    note = (
        "`--method export` converts the stages of the same division to graphs for PyTorch. Their answers are bitwise"
        " equal to the model on both inputs, otherwise the model is refused. Stages that differ only in their weights"
        " share a graph. Stages, graphs and seconds are medians; seconds are those of the whole division. ONNX: models"
        " with graphs for ONNX Runtime, out of those tried; their answers differ from PyTorch by at most 1e-4 of the"
        " largest value."
    )
    head = (
        "kind", "models", "models with graphs", "models with possible exits", "stages / graphs", "seconds to divide",
        "models with ONNX graphs",
    )  # fmt: skip
    lines = [note, "", *table(head, rows), "", "Refused:", *shortened(refused)]
    lines += ["", "No ONNX:", *shortened(without)] if without else []
    return lines, []


def shortened(reasons: Iterable[tuple[str, str]]) -> list[str]:
    """Group by reason, without numbers and names of inputs."""
    return by_reason((name, _general(reason)) for name, reason in reasons)


_REWORDED = (("answers otherwise than", "differs from"), (", and elsewhere by the module", " and outside it"))
"""Phrases in messages of older records -> plain wording."""


def _general(reason: str) -> str:
    for old, new in _REWORDED:
        reason = reason.replace(old, new)
    if reason.startswith("the exported graph"):
        return reason.partition(" for ")[0].partition(" (")[0]
    return reason.removeprefix("no ONNX graphs written, the store runs on torch only: ")


# agreement ------------------------------------------------------------------------------------------------------------


def agreement(records: Records) -> Section:
    """Compare three divisions of one checkpoint."""
    found = of(records, "agreement")
    if not found:
        return ["not run"], []
    good = [record for record in found if "failed" not in record]
    ways = list(dict.fromkeys(way for record in good for way in record["logits"]))
    rows: list[tuple[str, ...]] = [(record["name"], record["failed"]) for record in found if "failed" in record]
    for record in good:
        orders = {tuple(order) for order in record["layers"].values()}
        weights = "same bytes" if all(record["same_weights"].values()) else f"**{record['num_weights']}**"
        rows.append((
            record["name"], f"{record['num_weights']['eager']}, {weights}",
            "same" if len(orders) == 1 else "**differ**", *(_logits(record["logits"][way]) for way in ways),
        ))  # fmt: skip
    note = (
        "Classifiers with 3 layers, saved by transformers and divided by `names`, `eager` and `export`. Compared are"
        " weights, the order of layers, and logits of 3 texts of 9 to 16 tokens: bitwise equal to transformers, or the"
        " largest difference relative to the largest value."
    )
    exact = [way for way in ways if not way.endswith("ort")]
    agree = [
        record for record in good
        if all(record["same_weights"].values()) and len({tuple(order) for order in record["layers"].values()}) == 1
        and all(all(record["logits"][way]["equal"]) for way in exact)
    ]  # fmt: skip
    what = "names, eager and export agree: weights, order of layers, logits in PyTorch"
    verdict = Verdict(what, "all, bit for bit", f"{len(agree)} of {len(found)} families", len(agree) == len(found))
    return [note, "", *table(("family", "weights", "layers", *ways), rows)], [verdict]


def _logits(result: Record) -> str:
    return "equal" if all(result["equal"]) else shown_difference(result)


# cost and latency -----------------------------------------------------------------------------------------------------


def cost(records: Records) -> Section:
    """Report time and memory of `offramp divide`."""
    rows, verdicts = [], []
    for model, methods in any_model.SHAPES.items():
        for method in methods:
            found = [r for r in of(records, "cost") if (r["model"], r["method"]) == (model, method)]
            seconds, peaks = each_of(found, "seconds"), each_of(found, "peak_rss_bytes")
            rows.append((model, f"`{method}`", spread(seconds, " s", 1), mib(max(peaks)) if peaks else NONE))
            what, limit = f"dividing {model} by `{method}`: ", NAMES_MIB if method == "names" else COST_MIB
            if method == "eager":
                verdicts.append(at_most(f"{what}seconds", COST_SECONDS, seconds, " s"))
            verdicts.append(peak_at_most(f"{what}largest peak of the process", limit, peaks))
    note = (
        "`offramp divide FOLDER STORE --method ...` in its own process, including imports: median (minimum..maximum) of"
        f" {any_model.COST_ROUNDS} runs, and the largest peak. `eager` runs the model seven times: once to find the"
        " stages, once on each of two inputs, and twice each from the store."
    )
    return [note, "", *table(("model", "method", "time", "peak memory (maximum)"), rows)], verdicts


def latency(records: Records) -> Section:
    """Compare streaming in PyTorch with room for two stages to resident and offloaded models."""
    found = of(records, "latency")
    if not found:
        return ["not run"], []
    rows, verdicts = [], []
    for model, (num_rows, threads) in itertools.product(any_model.SHAPES, any_model.SETTINGS):
        here = [r for r in found if (r["model"], r["rows"], r["threads"]) == (model, num_rows, threads)]
        rivals = {name: [r for r in here if r["rival"] == name] for name in any_model.LATENCY_RIVALS}
        for name, mine in rivals.items():
            first = (f"{model}, {name}", str(num_rows), str(threads))
            if reason := trouble(mine):
                rows.append((*first, reason))
                continue
            seconds = [each for result in each_of(mine, "latencies_seconds") for each in result]
            shares = ratios(mine, rivals["resident"], lambda result: median(result["latencies_seconds"]))
            peaks = each_of(mine, "peak_rss_bytes")
            budgets = [r["result"].get("weight_budget_bytes") for r in mine]
            rows.append((
                *first, ms(median(seconds)), spread(shares), mib(max(peaks)),
                mib(median(each_of(mine, "bytes_read_per_input"))), mib(budgets[0]) if budgets[0] else NONE,
            ))  # fmt: skip
        shares = ratios(rivals["streamed"], rivals["resident"], lambda result: median(result["latencies_seconds"]))
        setting = f"{num_rows} row{'s' * (num_rows > 1)}, {threads} thread{'s' * (threads > 1)}"
        what = f"{model} streamed in PyTorch with room for two stages, {setting}: latency / resident"
        verdicts.append(at_most(what, LATENCY, shares))
    compared = [r for r in found if r["rival"] == "compare"]
    equal = all(all(r["result"].get("equal", [False])) for r in compared) and bool(compared)
    note = (
        "128 tokens or 224 x 224 pixels per row, 2 cores, warm page cache, medians over"
        f" {any_model.PASSES} passes per round, rounds interleaved, each rival in its own process. *resident*:"
        " transformers with all weights in memory; *streamed*: `offramp.stream` with a `weight_budget` of two of the"
        ' largest stages; *disk*: `device_map={"": "disk"}`. Ratios are taken within a round: median'
        " (minimum..maximum). The peak is that of the whole process. Two separate threads copy weights from the page"
        " cache; without a free core they compete with the computation."
        f" Answers of streamed and resident are {'equal bit for bit' if equal else '**not** equal'}."
    )
    head = (
        "rival", "rows", "threads", "latency", "relative to resident", "peak memory (maximum)", "bytes read per pass",
        "weight budget",
    )  # fmt: skip
    return [note, "", *table(head, rows)], verdicts


# images ---------------------------------------------------------------------------------------------------------------


def exits_on_images(records: Records) -> Section:
    """Report image models with exits, as measured by vision.py."""
    if not records:
        return [], []
    note = "CIFAR images after JPEG compression; the numbers are not results on CIFAR-10."
    rows, verdicts = exits_worth(records, "net", "exits on images")
    note = " ".join([note, *dict.fromkeys(record["note"] for record in records if "note" in record)])
    return [f"{note} {worth_note(records[0])}", "", *rows], verdicts


def exits_anywhere(records: Records) -> Section:
    """Report exits on a family without known names and on a custom module, as measured by anywhere.py."""
    if not records:
        return [], []
    rows, verdicts = exits_worth(records, "model", "exits")
    note = (
        "`own`: a custom module (an MLP-Mixer of 6 blocks, `bench/anywhere.py`) on the test images of MNIST, split"
        " again; not a result on MNIST. `mpnet`: an MPNet initialised from MiniLM-L6, divided by a run; `minilm`:"
        " MiniLM-L6, divided by names; both trained with equal settings on 6,000 rows of SST-2, evaluated on its dev"
        " split."
    )
    return [f"{note} {worth_note(records[0])}", "", *rows], verdicts


def worth_note(record: Mapping[str, Any]) -> str:
    """Describe the columns of `exits_worth`."""
    return (
        "The exit rule is the one with the earliest mean exit whose loss on tune and certify is at most 0.5 points (end"
        " of the 95 % interval). Speed-up: mean seconds per input of the whole model over those with exits, at batch 1,"
        f" {record['latency']['inputs']} inputs, {record['latency']['threads']} thread, medians of rounds."
    )


def exits_worth(records: Records, key: str, what: str) -> Section:
    """Return a table row and a verdict for each model."""
    rows, verdicts = [], []
    for record in records:
        dev, rounds = record["dev"], record["latency"]["rounds"]
        speeds = [
            [each[f"{backend} whole"]["mean_seconds"] / each[f"{backend} exits"]["mean_seconds"] for each in rounds]
            for backend in ("ort", "torch")
        ]
        whole = dev["accuracy"][-1]
        gain = f"{dev['gain']:+.2f} [{dev['gain_low']:+.2f} {dev['gain_high']:+.2f}]"
        rows.append((
            record[key], " ".join(f"{each:.1f}" for each in dev["accuracy"]), f"`{record['rule']}`", gain,
            f"{dev['mean_exit']:.2f} of {record['exits']}", *map(spread, speeds),
        ))  # fmt: skip
        shown = f"{whole:.1f} % without exits, {dev['gain']:+.2f} points with exits, speed-up {spread(speeds[0])}"
        is_faster = dev["gain"] >= -0.5 and median(speeds[0]) > 1
        verdicts.append(
            Verdict(f"{record[key]}: {what}, speed-up at a loss of at most 0.5 points", "> 1x", shown, is_faster)
        )
    head = (
        key, "accuracy after each exit (%)", "exit rule", "gain (points) [95 % CI]", "mean exit", "speed-up, ort",
        "speed-up, torch",
    )  # fmt: skip
    return table(head, rows), verdicts


def missing(records: Records) -> Section:
    """List models that could not be measured in any environment."""
    measured = {(record["family"], record["name"]) for record in of(records, "zoo")}
    absent = {(r["family"], r["name"]): r["reason"] for r in of(records, "missing")}
    left = [(name, reason) for (family, name), reason in absent.items() if (family, name) not in measured]
    return by_reason(left), []


if __name__ == "__main__":
    main()

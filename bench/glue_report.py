"""Write docs/results/glue.md from the records of glue.py and glue_speed.py: `python bench/glue_report.py`.

Computes every verdict from the records; trains and measures nothing. Missing records print `-`.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import glue
import glue_agree
import glue_speed
import numpy as np
from figures import Verdict, table
from records import read_records

from offramp.measure import median
from offramp.measure.hardware import environment
from offramp.program.heads import DEFAULT_FORM, FORMS
from offramp.tasks.glue import TASKS
from offramp.tasks.metrics import paired_interval
from offramp.training.settings import TrainSettings

PAGE = glue.RESULTS.with_name("glue.md")
NONE = "-"
DEFAULT = {"loss": "pabee", "heads": DEFAULT_FORM, "joint_only": False}
MODELS = {"minilm": "MiniLM-L6", "distil-minilm": "DistilBERT initialised from MiniLM-L6"}
NOT_GLUE = ("qnli", "qqp", "mnli")
Record = dict[str, Any]
INTRODUCTION = """\
# Exits trained on GLUE

MiniLM-L6 (BertModel, 6 layers, hidden size 384, 22.7 M parameters) and a DistilBERT initialised from it, fine-tuned
with an exit after each layer. Pretrained BERT-base and DistilBERT were not available. At most 10,000 training rows per
task, {epochs} epochs, batch {batch}, learning rate {rate:g} (heads 1e-3), then {heads} epochs of the heads on the
frozen model; exits are measured in float32. These are comparisons under an equal number of steps, not reference scores
of the model. Train is split by a hash of the text into train, tune and certify (80, 10, 10 %); rules are chosen on
tune, dev is only reported. The score is the mean of the metrics of the task in percent: Matthews (CoLA), accuracy,
accuracy and F1 (MRPC, QQP), Pearson and Spearman (STS-B).

**QNLI, QQP and MNLI are not GLUE scores**: their data are partial. QNLI: the dev file, split into all four; QQP: 23,497
rows of train, split; MNLI: matched dev, split, with SNLI dev added to its train part; mismatched: 1,000 rows.
"""
NOTE_LAST = """\
Each row is one task. *Plain* is the same code with the loss of the last exit alone (`--loss last`) and the same seed.
Intervals: 95 %, percentile bootstrap over dev rows, with both models and all seeds scored on the same draw.
"""
NOTE_RULES = """\
Each row is one exit rule: the one with the earliest mean exit on the tune split among those that lose at most 0.5
points there. *Gain*: dev score relative to the last exit of the same model. Latencies: per sentence at batch 1, fully
resident, 2 threads, median over rounds. Speed-ups are ratios within a round (range over rounds), relative to the
plain model in the same engine, which runs no heads, and to the faster of the plain models of transformers and offramp.
*Speed-up by layer count* is 6 divided by the mean exit and not a measurement.
"""


def main() -> None:
    records = list(glue.done().values())
    speeds = glue_speed.done()
    verdicts: list[Verdict] = []
    body: list[str] = []
    for model, name in MODELS.items():
        body += [f"## {name}: last exit compared with plain fine-tuning", ""]
        lines, verdict = last_exits(records, model)
        body += [*lines, ""]
        verdicts += verdict
        body += [f"## {name}: every exit", "", *every_exit(records, model), ""]
        lines, verdict = rules(records, speeds, model)
        body += [f"## {name}: exit rules and their speed-up", "", NOTE_RULES, *lines, ""]
        verdicts += verdict
    verdicts += loss_verdict(records)
    body += ["## Other losses", "", *losses(records), ""]
    body += ["## Forms of heads", "", *forms(records), ""]
    lines, verdict = agreement()
    body += ["## Agreement of engine and transcript", "", *lines, ""]
    verdicts += verdict
    lines, verdict = training(speeds)
    body += ["## Training", "", *lines, ""]
    verdicts += verdict
    rows = [(each.what, each.target, each.measured, each.word) for each in verdicts]
    recipe = {
        "epochs": glue.RECIPE["epochs"],
        "batch": glue.RECIPE["batch_size"],
        "rate": glue.RECIPE["learning_rate"],
        "heads": TrainSettings.heads_epochs,
    }
    head = [INTRODUCTION.format(**recipe), *facts(records), "", "## Targets", ""]
    PAGE.write_text("\n".join([*head, *table(("what", "target", "measured", "met"), rows), "", *body]).rstrip() + "\n")


def facts(records: Sequence[Record]) -> list[str]:
    found = environment(Path())
    versions = {"python": found["python_version"], "offramp": found["offramp_version"], **found["library_versions"]}
    ways = {(record["settings"]["precision"], record["threads"], record["gpu"] or "CPU") for record in records}
    trainings = "; ".join(f"{precision}, threads: {threads}, {device}" for precision, threads, device in sorted(ways))
    return [
        "- commands: `python bench/glue.py --data GLUE --workers 2`, `python bench/glue_speed.py --data GLUE`,"
        " `python bench/glue_report.py`; records: `glue.jsonl`, `glue-speed.jsonl`",
        f"- machine of this page: {found['cpu_model']}, {found['num_cores']} cores, {found['platform']}; "
        f"trainings: {trainings}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in sorted(versions.items()))}",
    ]


def of(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """Return the records with these settings, ordered by seed."""
    found = [record for record in records if all(record[key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda record: record["seed"])


def dev_of(record: Record) -> Record:
    """Return the dev split that represents a task; for MNLI, the matched one."""
    return record["splits"][next(name for name in record["splits"] if name.startswith("dev"))]


def unpacked(answers: Any) -> np.ndarray:
    return np.array(list(answers), np.int64 if isinstance(answers, str) else np.float64)


def paired(ours: Sequence[Record], plain: Sequence[Record]) -> tuple[float, float, float]:
    """Return the gain of the last exit, mean over seeds, and its interval over dev rows."""
    truth_N = unpacked(dev_of(ours[0])["truth"])
    mine_SN, other_SN = (np.stack([unpacked(dev_of(record)["last"]) for record in side]) for side in (ours, plain))
    return paired_interval(TASKS[ours[0]["task"]].metrics, truth_N, mine_SN, other_SN)


def last_scores(records: Sequence[Record]) -> list[float]:
    return [dev_of(record)["exits"][-1]["score"] for record in records]


def spread(values: Sequence[float]) -> str:
    if not values:
        return NONE
    return f"{np.mean(values):.1f}" + (f" ({min(values):.1f}..{max(values):.1f})" if len(values) > 1 else "")


def matched(records: Sequence[Record], **wanted: Any) -> tuple[list[Record], list[Record]]:
    """Return records, and the records of plain fine-tuning with the same seeds."""
    plain = {record["seed"]: record for record in of(records, model=wanted["model"], task=wanted["task"], loss="last")}
    ours = [record for record in of(records, **wanted) if record["seed"] in plain]
    return ours, [plain[record["seed"]] for record in ours]


def last_exits(records: Sequence[Record], model: str) -> tuple[list[str], list[Verdict]]:
    rows, gains, worse = [], [], []
    for task in glue.TASKS:
        ours, plain = matched(records, model=model, task=task, **DEFAULT)
        if not ours:
            rows.append((label(task), *[NONE] * 5))
            continue
        gain, low, high = paired(ours, plain)
        gains.append(gain)
        worse += [task] if high < 0 else []
        interval = f"{gain:+.1f} [{low:+.1f} {high:+.1f}]"
        rows.append(
            (
                label(task),
                str(ours[0]["train_rows"]),
                str(len(ours)),
                spread(last_scores(plain)),
                spread(last_scores(ours)),
                interval,
            )
        )
    head = ("task", "training rows", "seeds", "score, plain", "score, PABEE, last exit", "gain (points) [95 % CI]")
    verdicts = []
    if gains:
        mean = float(np.mean(gains))
        what = f"{MODELS[model]}: last exit minus plain fine-tuning, mean over {len(gains)} of {len(glue.TASKS)} tasks"
        verdicts.append(Verdict(what, ">= -0.5 points", f"{mean:+.2f}", mean >= -0.5))
        what = f"{MODELS[model]}: tasks of {len(gains)} that are significantly worse (paired 95 % interval)"
        verdicts.append(Verdict(what, "none", ", ".join(worse) or "none", not worse))
    return [*table(head, rows), "", NOTE_LAST], verdicts


def every_exit(records: Sequence[Record], model: str) -> list[str]:
    rows = []
    for task in glue.TASKS:
        found = of(records, model=model, task=task, **DEFAULT)
        names = [name for name in found[0]["splits"] if name.startswith("dev")] if found else ["dev"]
        for name in names:
            means = (
                np.mean([[each["score"] for each in record["splits"][name]["exits"]] for record in found], 0)
                if found
                else []
            )
            shown = label(task) + (f", {name}" if len(names) > 1 else "")
            rows.append((shown, *(f"{mean:.1f}" for mean in means)) if found else (shown, *[NONE] * 6))
    return table(("task", *(f"exit {number}" for number in range(1, 7))), rows)


def rules(records: Sequence[Record], speeds: Sequence[Record], model: str) -> tuple[list[str], list[Verdict]]:
    rows, found = [], {}
    for task in glue.TASKS:
        record = next(iter(of(records, model=model, task=task, **DEFAULT)), None)
        rounds = of_speed(speeds, "inference", task, model)
        for name, family in glue_speed.RULES.items():
            chosen = None if record is None else dev_of(record).get("policies", {}).get(family)
            if chosen is None:
                rows.append((label(task), name, *[NONE] * 7))
                continue
            exits = f"offramp, exits, {name}"
            own = [one[PLAIN[1]]["milliseconds"] / one[exits]["milliseconds"] for one in rounds]
            best = [min(one[plain]["milliseconds"] for plain in PLAIN) / one[exits]["milliseconds"] for one in rounds]
            times = [
                median([one[key]["milliseconds"] for one in rounds]) if rounds else None for key in (*PLAIN, exits)
            ]
            interval = f"{chosen['gain']:+.1f} [{chosen['gain_low']:+.1f} {chosen['gain_high']:+.1f}]"
            if rounds and not family:
                kept = chosen["gain"] >= -0.5 or chosen["gain_high"] >= 0
                found[task] = (median(own), median(best), kept, interval)
            rows.append((
                label(task), f"{name}: `{chosen['policy']}`", interval,
                *(NONE if value is None else f"{value:.2f}" for value in times),
                *(f"{median(each):.2f}x ({min(each):.2f}..{max(each):.2f})" if each else NONE for each in (own, best)),
                f"{6 / chosen['mean_exit']:.2f}x",
            ))  # fmt: skip
    head = (
        "task", "rule", "gain (points) [95 % CI]", "transformers (ms)", "offramp, plain (ms)", "offramp, exits (ms)",
        "speed-up over offramp, plain", "speed-up over the faster plain model", "speed-up by layer count",
    )  # fmt: skip
    return table(head, rows), rule_verdicts(found, model)


PLAIN = ("transformers, plain", "offramp, plain")


Timed = dict[str, tuple[float, float, bool, str]]
"""Task -> speed-up of its best rule over plain in the same engine, and over the faster plain model; whether the loss is
acceptable; the gain."""


def rule_verdicts(found: Timed, model: str) -> list[Verdict]:
    verdicts = []
    tasks = [task for task in found if task != "stsb"]
    for place, rival in enumerate(("plain, same engine", "the faster of transformers and offramp, plain")):
        if "sst2" in found:
            speed, kept, gain = found["sst2"][place], *found["sst2"][2:]
            what = f"{MODELS[model]}, SST-2: speed-up over {rival}; loss at most 0.5 points or not significant"
            verdicts.append(Verdict(what, ">= 1.50x", f"{speed:.2f}x, gain {gain}", speed >= 1.5 and kept))
        if tasks:
            fast = [task for task in tasks if found[task][place] >= 1.3 and found[task][2]]
            what = (
                f"{MODELS[model]}: tasks with a speed-up >= 1.30x over {rival}, same condition; {len(tasks)} measured"
            )
            verdicts.append(Verdict(what, ">= 3 of 7", f"{len(fast)}: {', '.join(fast) or 'none'}", len(fast) >= 3))
    return verdicts


LOSSES: dict[str, dict[str, Any]] = {
    "pabee": {"loss": "pabee", "joint_only": False},
    "mixed": {"loss": "mixed", "joint_only": False},
    "distill": {"loss": "distill", "joint_only": False},
    "heads-only": {"loss": "heads-only", "base": "last"},
    "pabee, joint": {"loss": "pabee", "joint_only": True},
    "mixed, joint": {"loss": "mixed", "joint_only": True},
    "distill, joint": {"loss": "distill", "joint_only": True},
}
DEFAULT_LOSS = "pabee"
MINILM = {"model": "minilm", "heads": DEFAULT_FORM}


def losses(records: Sequence[Record]) -> list[str]:
    rows = []
    for task in glue.TASKS:
        for split in ("tune", "dev"):
            cells = []
            for wanted in ({"loss": "last"}, *LOSSES.values()):
                found = seed_zero(records, task, wanted)
                cells.append(NONE if found is None else two_scores(found, split))
            rows.append((f"{label(task)}, {split}", *cells))
    note = (
        "Seed 0. Cells: score of the last exit / mean score of the exits before it. The default is chosen on tune."
        f" After joint training the heads are trained on the frozen model for {TrainSettings.heads_epochs} epochs;"
        " `joint` omits this stage (`--heads-epochs 0`), `heads-only` is this stage alone, after plain fine-tuning."
    )
    return [note, "", *table(("task", "plain", *LOSSES), rows)]


def two_scores(record: Record, split: str) -> str:
    exits = [each["score"] for each in scored(record, split)]
    return f"{exits[-1]:.1f}" if len(exits) == 1 else f"{exits[-1]:.1f} / {np.mean(exits[:-1]):.1f}"


def loss_verdict(records: Sequence[Record]) -> list[Verdict]:
    """Compare other losses with the default by the mean of all exits on tune, over tasks and seeds that have both.

    The target is met if the default is the best.
    """
    gains, shown = [], []
    for name, wanted in LOSSES.items():
        pairs = [
            (ours, default)
            for task in glue.TASKS
            for default in of(records, **MINILM, task=task, **LOSSES[DEFAULT_LOSS])
            for ours in of(records, **MINILM, task=task, seed=default["seed"], **wanted)
        ]
        if pairs and name != DEFAULT_LOSS:
            tune, dev = (gain_of_exits(pairs, split) for split in ("tune", "dev"))
            gains.append(tune)
            num_tasks = len({ours["task"] for ours, _ in pairs})
            shown.append(f"{name} {tune:+.2f} (dev {dev:+.2f}; {len(pairs)} trainings, {num_tasks} tasks)")
    what = f"the default loss, {DEFAULT_LOSS}, is the best: mean score of all exits on tune, other losses minus default"
    return [Verdict(what, "<= 0", ", ".join(shown), max(gains) <= 0)] if gains else []


def seed_zero(records: Sequence[Record], task: str, wanted: Record) -> Record | None:
    return next(iter(of(records, **MINILM, task=task, seed=0, **wanted)), None)


def gain_of_exits(pairs: Sequence[tuple[Record, Record]], split: str) -> float:
    """Return the mean score of all exits of the first records minus that of the second."""
    means = [[np.mean([each["score"] for each in scored(record, split)]) for record in pair] for pair in pairs]
    return float(np.mean([ours - default for ours, default in means]))


def scored(record: Record, split: str) -> list[dict[str, float]]:
    """Return the scores of each exit."""
    return (record["splits"]["tune"] if split == "tune" else dev_of(record))["exits"]


def forms(records: Sequence[Record]) -> list[str]:
    rows = []
    for task in glue.SMALL:
        for name in FORMS:
            for split in ("tune", "dev"):
                found = of(records, model="minilm", task=task, loss="pabee", joint_only=True, heads=name, seed=0)
                if found:
                    scores = [f"{each['score']:.1f}" for each in scored(found[0], split)]
                    rows.append((f"{label(task)}, {split}", name, *scores))
                else:
                    rows.append((f"{label(task)}, {split}", name, *[NONE] * 6))
    note = (
        "Joint training of PABEE only, seed 0. `own-shared` is the form of PABEE: the pooler of the family, shared by"
        " all exits. Cells: score."
    )
    return [note, "", *table(("task", "heads", *(f"exit {number}" for number in range(1, 7))), rows)]


def agreement() -> tuple[list[str], list[Verdict]]:
    found = read_records(glue_agree.RESULTS)
    if not found:
        return ["not run"], []
    rows = [
        (label(each["task"]), f"`{each['policy']}`", str(each["rows"]), str(each["left_elsewhere"])) for each in found
    ]
    num_different, num_rows = (sum(each[key] for each in found) for key in ("left_elsewhere", "rows"))
    note = (
        f"`python bench/glue_agree.py`: exits chosen by the engine under `--budget {glue_agree.BUDGET}`, compared with"
        " the replay of the transcript."
    )
    what = (
        "dev sentences for which the streamed engine and the replay of a PABEE or threshold policy choose other exits"
    )
    verdicts = [Verdict(what, "0", f"{num_different} of {num_rows}", num_different == 0)]
    return [note, "", *table(("task", "policy", "rows", "rows with different exits"), rows)], verdicts


def training(speeds: Sequence[Record]) -> tuple[list[str], list[Verdict]]:
    rounds = of_speed(speeds, "training", glue_speed.TRAIN_TASK, "minilm")
    if not rounds:
        return ["not run"], []
    rows, verdicts, base = [], [], glue_speed.TRAINERS[0]
    for name in glue_speed.TRAINERS:
        ratios = [one[name]["sentences_a_second"] / one[base]["sentences_a_second"] for one in rounds]
        middle = median([one[name]["sentences_a_second"] for one in rounds])
        rows.append((name, f"{middle:.1f}", f"{median(ratios):.2f}x ({min(ratios):.2f}..{max(ratios):.2f})"))
        if name == "--loss last":
            what = "training without heads: throughput relative to the Trainer of transformers"
            verdicts.append(Verdict(what, ">= 0.90x", f"{median(ratios):.2f}x", median(ratios) >= 0.9))
    note = (
        f"One epoch of {glue_speed.NUM_TRAIN} rows of {label(glue_speed.TRAIN_TASK)}, float32,"
        f" {glue_speed.THREADS} threads,"
        f" median of {len(rounds)} interleaved rounds. `--loss pabee` trains the heads in addition to `--loss last`."
    )
    return [
        note,
        "",
        *table(("training", "throughput (sentences/s)", "relative to the Trainer of transformers"), rows),
    ], verdicts


def of_speed(speeds: Sequence[Record], kind: str, task: str, model: str) -> list[dict[str, Any]]:
    return [one["rivals"] for one in speeds if (one["kind"], one["task"], one["model"]) == (kind, task, model)]


def label(task: str) -> str:
    return TASKS[task].folder + (" (partial)" if task in NOT_GLUE else "")


if __name__ == "__main__":
    main()
    print(PAGE, file=sys.stderr)

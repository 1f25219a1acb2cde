"""Write docs/results/glue.md from the records of glue.py and glue_speed.py: `python bench/glue_report.py`.

It computes every verdict from the records, and trains and times nothing. What was not run prints `-`.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import glue
import glue_speed
import numpy as np
from figures import Verdict, table

from offramp.measure import median
from offramp.measure.hardware import environment
from offramp.tasks.glue import TASKS
from offramp.tasks.metrics import paired_interval

PAGE = glue.RESULTS.with_name("glue.md")
NONE = "-"
MODELS = {"minilm": "MiniLM-L6", "distil-minilm": "DistilBERT filled from MiniLM-L6"}
NOT_GLUE = ("qnli", "qqp", "mnli")
Record = dict[str, Any]
INTRODUCTION = """\
# Exits trained on GLUE

MiniLM-L6 (BertModel, 6 layers, 384 wide, 22.7 M parameters) and a DistilBERT filled from it, fine-tuned with an exit
after each layer. BERT-base and DistilBERT themselves were not to be had here. At most 10,000 training rows a task,
{epochs} epochs, batch {batch}, learning rate {rate:g} (heads 1e-3), bfloat16 autocast: these are no reference scores of
the model, but comparisons under one budget of steps. Train is cut by a hash of the text into train, tune and certify
(80, 10, 10 %); rules are chosen on tune, dev is only reported. The score is the mean of the task's metrics in percent:
Matthews (CoLA), accuracy, accuracy and F1 (MRPC, QQP), Pearson and Spearman (STS-B).

**QNLI, QQP and MNLI are not GLUE scores**: their data are partial. QNLI: the dev file, cut into all four; QQP: 23,497
rows of train, cut; MNLI: matched dev, cut, its train part filled up with SNLI dev; mismatched: 1,000 rows.
"""
NOTE_LAST = """\
"Plain" is the same code with the loss of the last exit alone (`--loss last`), from the same seed. Intervals: 95 %,
percentile bootstrap over dev rows, both models drawn together; where there are several seeds, their rows together.
"""
NOTE_RULES = """\
For each task the rule that leaves earliest on the tune split while it loses at most 0.5 points there. Gain: dev score
against the last exit of the same model. Time: milliseconds a sentence at batch 1, whole model in memory, 2 threads, the
median over rounds; speed-up: against the plain model without heads in the same engine, as ratios within a round (range
over rounds). The last column is layers alone, 6 divided by the mean exit, and no measure of time.
"""


def main() -> None:
    records = list(glue.done().values())
    speeds = glue_speed.done()
    verdicts: list[Verdict] = []
    body: list[str] = []
    for model, name in MODELS.items():
        body += [f"## {name}: the last exit against plain fine-tuning", ""]
        lines, verdict = last_exits(records, model)
        body += [*lines, ""]
        verdicts += [each for each in verdict if model == "minilm"]
        body += [f"## {name}: every exit", "", *every_exit(records, model), ""]
        lines, verdict = rules(records, speeds, model)
        body += [f"## {name}: exit rules, and what they save", "", NOTE_RULES, *lines, ""]
        verdicts += [each for each in verdict if model == "minilm"]
    body += ["## Other losses", "", *losses(records), ""]
    body += ["## Forms of heads", "", *forms(records), ""]
    lines, verdict = training(speeds)
    body += ["## Training", "", *lines, ""]
    verdicts += verdict
    rows = [(each.what, each.target, each.measured, each.word) for each in verdicts]
    recipe = {"epochs": glue.RECIPE["epochs"], "batch": glue.RECIPE["batch_size"], "rate": glue.RECIPE["learning_rate"]}
    head = [INTRODUCTION.format(**recipe), *facts(records), "", "## Targets", ""]
    PAGE.write_text("\n".join([*head, *table(("what", "target", "measured", "met"), rows), "", *body]).rstrip() + "\n")


def facts(records: Sequence[Record]) -> list[str]:
    found = environment(Path())
    versions = {"python": found["python_version"], "offramp": found["offramp_version"], **found["library_versions"]}
    ways = sorted(
        {f"{record['threads']} thread{'s' * (record['threads'] > 1)}, {record['gpu'] or 'CPU'}" for record in records}
    )
    return [
        "- commands: `python bench/glue.py --data GLUE --workers 2`, `python bench/glue_speed.py --data GLUE`,"
        " `python bench/glue_report.py`; records: `glue.jsonl`, `glue-speed.jsonl`",
        f"- machine: {found['cpu_model']}, {found['num_cores']} cores, {found['platform']}; "
        f"trainings: {'; '.join(ways)}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in sorted(versions.items()))}",
    ]


def of(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """Records with these settings, by seed."""
    found = [record for record in records if all(record[key] == value for key, value in wanted.items())]
    return sorted(found, key=lambda record: record["seed"])


def dev_of(record: Record) -> Record:
    """The dev split that stands for a task: matched, of MNLI."""
    return record["splits"][next(name for name in record["splits"] if name.startswith("dev"))]


def unpacked(answers: Any) -> np.ndarray:
    return np.array(list(answers), np.int64 if isinstance(answers, str) else np.float64)


def paired(ours: Sequence[Record], plain: Sequence[Record]) -> tuple[float, float, float]:
    """Gain of the last exit, and its interval; rows of all seeds together."""
    truth, mine, other = (
        np.concatenate([unpacked(dev_of(record)[key]) for record in side])
        for side, key in ((ours, "truth"), (ours, "last"), (plain, "last"))
    )
    return paired_interval(TASKS[ours[0]["task"]].metrics, truth, mine, other)


def last_scores(records: Sequence[Record]) -> list[float]:
    return [dev_of(record)["exits"][-1]["score"] for record in records]


def spread(values: Sequence[float]) -> str:
    if not values:
        return NONE
    return f"{np.mean(values):.1f}" + (f" ({min(values):.1f}..{max(values):.1f})" if len(values) > 1 else "")


def matched(records: Sequence[Record], **wanted: Any) -> tuple[list[Record], list[Record]]:
    """Records, and those of plain fine-tuning with the same seeds."""
    plain = {record["seed"]: record for record in of(records, model=wanted["model"], task=wanted["task"], loss="last")}
    ours = [record for record in of(records, **wanted) if record["seed"] in plain]
    return ours, [plain[record["seed"]] for record in ours]


def last_exits(records: Sequence[Record], model: str) -> tuple[list[str], list[Verdict]]:
    rows, gains, worse = [], [], []
    for task in glue.TASKS:
        ours, plain = matched(records, model=model, task=task, loss="pabee", heads="mean-linear")
        if not ours:
            rows.append((label(task), *[NONE] * 5))
            continue
        gain, low, high = paired(ours, plain)
        gains.append(np.mean(last_scores(ours)) - np.mean(last_scores(plain)))
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
    head = ("task", "training rows", "seeds", "plain", "PABEE, last exit", "gain [95 %]")
    verdicts = []
    if gains:
        mean = float(np.mean(gains))
        what = f"{MODELS[model]}: last exit against plain fine-tuning, mean over {len(gains)} tasks"
        verdicts.append(Verdict(what, ">= -0.5 points", f"{mean:+.2f}", mean >= -0.5))
        verdicts.append(
            Verdict("tasks worse beyond their paired 95 % interval", "none", ", ".join(worse) or "none", not worse)
        )
    return [*table(head, rows), "", NOTE_LAST], verdicts


def every_exit(records: Sequence[Record], model: str) -> list[str]:
    rows = []
    for task in glue.TASKS:
        found = of(records, model=model, task=task, loss="pabee", heads="mean-linear")
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
    rows, fast = [], {}
    for task in glue.TASKS:
        record = next(iter(of(records, model=model, task=task, loss="pabee", heads="mean-linear")), None)
        rounds = of_speed(speeds, "inference", task, model)
        for name, family in glue_speed.RULES.items():
            chosen = None if record is None else dev_of(record).get("policies", {}).get(family)
            if chosen is None:
                rows.append((label(task), name, *[NONE] * 6))
                continue
            ratios = [
                one["offramp, plain"]["milliseconds"] / one[f"offramp, exits, {name}"]["milliseconds"] for one in rounds
            ]
            times = [median([one[key]["milliseconds"] for one in rounds]) if rounds else None
                     for key in ("transformers, plain", "offramp, plain", f"offramp, exits, {name}")]  # fmt: skip
            kept = chosen["gain"] >= -0.5 or chosen["gain_high"] >= 0
            if ratios and kept and not family:
                fast[task] = median(ratios)
            rows.append((
                label(task), f"{name}: `{chosen['policy']}`",
                f"{chosen['gain']:+.1f} [{chosen['gain_low']:+.1f} {chosen['gain_high']:+.1f}]",
                *(NONE if value is None else f"{value:.2f}" for value in times),
                f"{median(ratios):.2f}x ({min(ratios):.2f}..{max(ratios):.2f})" if ratios else NONE,
                f"{6 / chosen['mean_exit']:.2f}x",
            ))  # fmt: skip
    head = ("task", "rule", "gain [95 %]", "transformers", "plain", "exits", "speed-up", "layers")
    verdicts = []
    if fast:
        names = [task for task in glue.TASKS if task != "stsb" and fast.get(task, 0) >= 1.3]
        sst2 = fast.get("sst2")
        verdicts.append(Verdict(
            "SST-2: speed-up of a rule chosen on tune, loss at most 0.5 points or inside the interval", ">= 1.50x",
            NONE if sst2 is None else f"{sst2:.2f}x", None if sst2 is None else sst2 >= 1.5,
        ))  # fmt: skip
        measured = f"{len(names)}: {', '.join(names) or 'none'}"
        verdicts.append(
            Verdict(
                "classification tasks with a speed-up >= 1.30x, loss as above", ">= 3 of 7", measured, len(names) >= 3
            )
        )
    return table(head, rows), verdicts


def losses(records: Sequence[Record]) -> list[str]:
    names = ("pabee", "mixed", "distill", "heads-only")
    rows = []
    for task in glue.TASKS:
        cells = []
        for name in ("last", *names):
            found = of(records, model="minilm", task=task, loss=name, heads="mean-linear", seed=0)
            if not found:
                cells.append(NONE)
                continue
            exits = [each["score"] for each in dev_of(found[0])["exits"]]
            cells.append(f"{exits[-1]:.1f}" if len(exits) == 1 else f"{exits[-1]:.1f} / {np.mean(exits[:-1]):.1f}")
        rows.append((label(task), *cells))
    note = "Seed 0, dev: the last exit / the mean of the exits before it. heads-only starts from the plain model."
    return [note, "", *table(("task", "plain", *names), rows)]


def forms(records: Sequence[Record]) -> list[str]:
    names = ("mean-linear", "cls-linear", "own", "own-shared")
    rows = []
    for task in glue.SMALL:
        for name in names:
            found = of(records, model="minilm", task=task, loss="pabee", heads=name, seed=0)
            scores = [f"{each['score']:.1f}" for each in dev_of(found[0])["exits"]] if found else [NONE] * 6
            rows.append((label(task), name, *scores))
    note = "PABEE's loss, seed 0, dev scores. `own-shared` is PABEE's own: the family's pooler, shared by all exits."
    return [note, "", *table(("task", "heads", *(f"exit {number}" for number in range(1, 7))), rows)]


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
            what = "training without heads, of transformers' Trainer, sentences a second"
            verdicts.append(Verdict(what, ">= 0.90x", f"{median(ratios):.2f}x", median(ratios) >= 0.9))
    note = (
        f"One epoch of {glue_speed.NUM_TRAIN} rows of {label(glue_speed.TRAIN_TASK)}, float32,"
        f" {glue_speed.THREADS} threads,"
        f" median of {len(rounds)} interleaved rounds. What `--loss pabee` takes beyond `--loss last` are the heads."
    )
    return [note, "", *table(("training", "sentences a second", "of transformers' Trainer"), rows)], verdicts


def of_speed(speeds: Sequence[Record], kind: str, task: str, model: str) -> list[dict[str, Any]]:
    return [one["rivals"] for one in speeds if (one["kind"], one["task"], one["model"]) == (kind, task, model)]


def label(task: str) -> str:
    return TASKS[task].folder + (" (partial)" if task in NOT_GLUE else "")


if __name__ == "__main__":
    main()
    print(PAGE, file=sys.stderr)

"""Convert the published records into results folders, once: `python bench/convert.py OUT`. Nothing is measured.

A record of a study says in `study` which part of it it belongs to, and what its experiment does not.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from offramp.experiments.results import ABOUT, FORMAT, RECORDS, line_of
from offramp.experiments.specification import digest_of, experiment
from offramp.measure import median

PUBLISHED = Path(__file__).parents[1] / "docs" / "results"
Tree = dict[str, Any]
GLUE_TASKS = ("cola", "sst2", "mrpc", "rte", "stsb", "qnli", "qqp", "mnli")


def read(name: str) -> list[Tree]:
    return [json.loads(line) for line in (PUBLISHED / f"{name}.jsonl").read_text().splitlines()]


def record(options: Tree, figures: Tree, study: Tree, round_number: int = 0, samples: Tree | None = None, **more: Any) -> Tree:
    spec = experiment(**options).to_json()
    return {
        "key": digest_of({"experiment": spec, "study": study}), "round": round_number, "experiment": spec,
        "inputs": {"data": None}, "figures": figures, "samples": samples or {}, "run": {}, "study": study, **more,
    }  # fmt: skip


def write(folder: Path, records: list[Tree]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ABOUT).write_text(json.dumps({"format": FORMAT}) + "\n")
    (folder / RECORDS).write_bytes(b"".join(map(line_of, records)))


# glue -----------------------------------------------------------------------------------------------------------------


def dev_name(splits: Tree) -> str:
    return next(name for name in splits if name.startswith("dev"))


def unpacked(answers: Any) -> list[Any]:
    return [int(each) for each in answers] if isinstance(answers, str) else answers


def training_options(each: Tree) -> Tree:
    settings = dict(each["settings"])
    if each["loss"] == "heads-only":
        settings["heads_epochs"] = settings.pop("epochs")
    dev = each["splits"][dev_name(each["splits"])]
    return {
        "model": each["model"], "task": each["task"], "loss": each["loss"], "heads": each["heads"], "seed": each["seed"],
        "rows": dev["rows"], "rounds": 1, **settings,
    }  # fmt: skip


def glue() -> list[Tree]:
    import numpy as np

    from offramp.tasks.metrics import paired_interval

    found, trainings = [], read("glue")
    for each in trainings:
        splits, policies = dict(each["splits"]), {}
        splits.pop("chosen", None)
        for split in splits.values():
            policies = policies or split.get("policies", {})
        dev = splits[dev_name(splits)]
        samples = {
            "metrics": each["metrics"], "truth": unpacked(dev["truth"]), "answers": unpacked(dev["last"]),
            "exits": {name: split["exits"] for name, split in splits.items()},
            "other_answers": {
                name: {part: split[part] for part in ("truth", "last")}
                for name, split in splits.items() if split is not dev
            },
        }  # fmt: skip
        study = {
            "part": "training", "base": each["base"], "joint_only": each["joint_only"], "note": each["note"],
            "train_rows": each["train_rows"], "device": each["gpu"] or "CPU", "threads": each["threads"],
            "precision": each["settings"]["precision"], "torch": each.get("torch"),
        }  # fmt: skip
        figures = {"score": dev["exits"][-1]["score"], "training_seconds": each.get("seconds")}
        found.append(record(training_options(each), figures, study, samples=samples))
        chosen = each["splits"].get("chosen", {})
        for family, rule in chosen.items():
            kept = dev_policies(each).get(family)
            if rule is None or kept is None:
                continue
            options = {
                "model": each["model"], "task": each["task"], "exit": kept["policy"], "seed": each["seed"],
                "rows": dev["rows"], "rounds": 1,
            }  # fmt: skip
            about = {
                "part": "rule", "family": family or "any", "policy": kept["policy"], "loss": each["loss"],
                "heads": each["heads"], "joint_only": each["joint_only"], "on_tune": rule,
            }  # fmt: skip
            figures = {name: kept[name] for name in ("score", "mean_exit", "gain", "gain_low", "gain_high")}
            found.append(record(options, figures, about))
    for model in ("minilm", "distil-minilm"):
        for task in GLUE_TASKS:
            mine = [each for each in trainings if (each["model"], each["task"]) == (model, task)]
            plain = {each["seed"]: each for each in mine if each["loss"] == "last"}
            ours = [
                each for each in mine
                if (each["loss"], each["heads"], each["joint_only"]) == ("pabee", "mean-linear", False)
                and each["seed"] in plain
            ]  # fmt: skip
            ours.sort(key=lambda each: each["seed"])
            sides = [
                np.stack([np.array(unpacked(each["splits"][dev_name(each["splits"])]["last"])) for each in side])
                for side in (ours, [plain[each["seed"]] for each in ours])
            ]
            dev = ours[0]["splits"][dev_name(ours[0]["splits"])]
            gain = paired_interval(ours[0]["metrics"], np.array(unpacked(dev["truth"])), *sides)
            figures = dict(zip(("gain", "gain_low", "gain_high"), map(float, gain), strict=True))
            options = {"model": model, "task": task, "loss": "pabee", "rows": dev["rows"], "rounds": 1}
            found.append(record(options, figures, {"part": "against plain", "seeds": [each["seed"] for each in ours]}))
    for each in read("glue-speed"):
        for rival, timed in each["rivals"].items():
            options = {"model": each["model"], "task": each["task"], "rounds": 3, "threads": 2}
            study = {"part": each["kind"], "rival": rival}
            if each["kind"] == "training":
                figures = {"texts_per_second": timed["sentences_a_second"]}
            else:
                ours = timed["exit"] is not None
                options |= {"exit": timed["exit"]} if ours else {"model": f"{each['model']} in transformers"}
                study["model"] = each["model"]
                figures = {"latency": timed["milliseconds"] / 1e3, "mean_exit": timed["mean_exit"]}
            found.append(record(options, figures, study, each["round"]))
    for each in read("glue-agree"):
        options = {
            "model": "minilm", "task": each["task"], "exit": each["policy"], "budget": "96MiB", "rows": each["rows"],
            "rounds": 1,
        }  # fmt: skip
        study = {"part": "agreement", "policy": each["policy"]}
        found.append(record(options, {"left_elsewhere": each["left_elsewhere"]}, study))
    return found


def dev_policies(each: Tree) -> Tree:
    return each["splits"][dev_name(each["splits"])].get("policies", {})


# latency --------------------------------------------------------------------------------------------------------------


def readable(policy: str) -> str:
    """Rules as code, learned policies by their kind, without the hash."""
    kind, _, first = re.sub(r":[0-9a-f]{8}(?=@|$)", "", policy).partition("@")
    if kind == policy.partition("@")[0]:
        return f"`{policy}`"
    return f"{kind}, from exit {first}" if first else kind


def exit_of(policy: str) -> str:
    """A rule, or the file of a learned policy."""
    return policy if readable(policy).startswith("`") else re.sub("[:@]", "-", policy) + ".json"


def latency() -> list[Tree]:
    found: list[Tree] = []
    for each in read("latency"):
        found += PARTS[each["kind"]](each)
    return found


def promised(each: Tree) -> list[Tree]:
    found = []
    batch = 1 if each["kind"] == "latencies" else 8
    for name, seconds in each["asked"].items():
        rounds = [one[name] for one in each["rounds"]]
        of_predicted = [one["seconds"] * one["whole"] / one["predicted"] / one["said"] for one in rounds]
        used = each["said"][name] / seconds
        figures = {
            "latency": median([one["seconds"] for one in rounds]), "requested": seconds, "predicted": each["said"][name],
            "predicted_of_requested": used, "measured_of_predicted": median(of_predicted),
            "measured_of_requested": used * median(of_predicted),
            "wall_clock_of_requested": median([one["seconds"] for one in rounds]) / seconds,
            "of_these_texts": median([one["seconds"] / one["predicted"] for one in rounds]),
            "speedup": median([one["none"]["seconds"] / one[name]["seconds"] for one in each["rounds"]]),
            "round_spread": max(of_predicted) / min(of_predicted) - 1,
            "tokens_tune": each["tokens"]["said"], "tokens_certify": each["tokens"]["whole"],
        }  # fmt: skip
        policy = each["policies"][name]
        options = {
            "model": each["model"], "task": each["task"], "exit": exit_of(policy), "batch": batch, "split": "certify",
            "threads": 2, "rows": each["texts"], "rounds": 1,
        }  # fmt: skip
        study = {"part": "requested", "share": name, "policy": policy, "shown": readable(policy)}
        samples = {"rounds": [{"policy": one[name], "none": one["none"]} for one in each["rounds"]]}
        found.append(record(options, figures, study, samples=samples))
    return found


def against_patience(each: Tree) -> list[Tree]:
    found = []
    for pair in each["pairs"]:
        share = pair["whole_by_texts"]["ours"] / pair["whole_by_texts"]["patience"]
        figures = {name: pair[name] for name in ("gain", "gain_low", "gain_high", "score")}
        figures["latency_ratio"] = share * median([one["ours"] / one["patience"] for one in pair["rounds"]])
        options = {
            "model": each["model"], "task": each["task"], "exit": exit_of(pair["policy"]), "threads": 2,
            "rows": each["texts"], "rounds": 1,
        }  # fmt: skip
        study = {"part": "against patience", "patience": pair["patience"], "policy": pair["policy"]}
        study["shown"] = readable(pair["policy"])
        samples = {"rounds": pair["rounds"], "whole_by_texts": pair["whole_by_texts"]}
        found.append(record(options, figures, study, samples=samples))
    return found


def deadlines(each: Tree) -> list[Tree]:
    options = {
        "model": each["model"], "task": each["task"], "deadline": each["deadline"], "rows": each["requests"], "rounds": 1
    }  # fmt: skip
    return [
        record(options if name == "guard" else {**options, "deadline": None}, each[name], {"part": "deadline", "run": name, "seconds": each["deadline"]})
        for name in ("guard", "no guard")
    ]


def certificates(each: Tree) -> list[Tree]:
    from scipy.stats import binom

    options = {"model": each["model"], "task": each["task"], "split": "certify", "rows": each["drawn"], "rounds": 1}
    study = {
        "part": "certificate", "population": each["rows"], "sets": each["sets"], "epsilon": 0.01, "delta": 0.1,
        "most": int(binom.ppf(0.99, each["sets"], 0.1)),
    }  # fmt: skip
    return [record(options, each[method], {**study, "method": method}) for method in ("ucb", "ltt")]


def streamed(each: Tree) -> list[Tree]:
    found = []
    for number, one in enumerate(each["rounds"]):
        for budget, exits in one.items():
            if budget == "transformers":
                options = {"model": "bert-base-shape in transformers", "rounds": 5, "max_length": 128}
                figures = {"latency": exits["seconds"], "memory": exits["peak"]}
                found.append(record(options, figures, {"part": "streamed", "rival": budget}, number))
                continue
            for name, timed in exits.items():
                stage = 12 if name == "none" else int(name.partition(":")[2])
                options = {
                    "model": "bert-base-shape", "exit": name, "budget": budget, "rounds": 5, "max_length": 128,
                    "threads": 2,
                }  # fmt: skip
                figures = {
                    "latency": timed["seconds"], "predicted": timed["predicted"], "bytes": timed["bytes"],
                    "memory": timed["peak"],
                    "excess_slots": (timed["bytes"] - exits["none"]["bytes"] * stage / 12) / (4 * 768 * 3072),
                }  # fmt: skip
                study = {"part": "streamed", "rival": "offramp", "under": budget, "layers": stage}
                found.append(record(options, figures, study, number))
    return found


def bulk(each: Tree) -> list[Tree]:
    found = []
    for number, one in enumerate(each["rounds"]):
        for size, throughput in one["theirs"].items():
            options = {"model": "bert-base-shape in transformers", "batch": int(size), "rounds": 3, "max_length": 128}
            figures = {"texts_per_second": throughput, "memory": one["their_peak"]}
            found.append(record(options, figures, {"part": "bulk", "rival": "transformers", "size": size}, number))
        options = {
            "model": "bert-base-shape", "batch": "bulk", "budget": "128MiB", "rounds": 3, "max_length": 128, "rows": 256
        }  # fmt: skip
        figures = {"texts_per_second": one["ours"], "memory": one["peak"], "bytes": one["bytes"]}
        found.append(record(options, figures, {"part": "bulk", "rival": "offramp", "sweep_rows": one["rows"]}, number))
    return found


def tuning_time(each: Tree) -> list[Tree]:
    return [record({"model": "random logits", "rows": 10_000}, {"seconds": each["seconds"]}, {"part": "tuning"})]


def pictures(each: Tree) -> list[Tree]:
    options = {"model": each["model"], "task": each["task"], "rounds": 1}
    samples = {name: each[name] for name in ("tried", "exits", "curve")}
    return [record(options, each["chosen"], {"part": "pictures"}, samples=samples)]


POLICIES: Tree = {}


def task_bench(each: Tree) -> list[Tree]:
    if not POLICIES:
        for other in read("latency"):
            if other["kind"] == "latencies":
                POLICIES[other["model"], other["task"]] = other["policies"]["0.4"]
    measured, policy = each["measured"], POLICIES[each["model"], each["task"]]
    budget = None if each["kind"] == "task_bench" else "96MiB"
    ours = next(one for one in measured if (one["rival"], one["batch"]) == ("exits", 1))
    cut = [one for one in measured if one["rival"] == "truncated"]
    near = min(cut, key=lambda one: abs(one["texts_per_second"] - ours["texts_per_second"]))
    found = []
    for one in measured:
        name = {"plain": "plain", "exits": readable(policy)}.get(one["rival"], f"`{one['exit']}`")
        options = {
            "model": each["model"], "task": each["task"], "rounds": each["record"]["rounds"], "budget": budget,
            "exit": exit_of(policy) if one["rival"] == "exits" else one["exit"], "batch": one["batch"],
            "threads": each["record"]["threads"], "rows": each["record"]["num_texts"],
        }  # fmt: skip
        figures = {name: value for name, value in one.items() if isinstance(value, (int, float)) and name != "batch"}
        figures |= one["scores"] | {"memory": one["peak_rss_bytes"], "latency": one["latency_seconds_p50"]}
        shown = one["rival"] != "truncated" or one is near
        study = {"part": "task", "rival": one["rival"], "under": budget, "shown": name if shown else None, "size": one["batch"]}
        found.append(record(options, figures, study, run=each["record"]))
    return found


PARTS = {
    "latencies": promised, "latencies_of_batches": promised, "task_bench": task_bench, "streamed_task_bench": task_bench,
    "against_patience": against_patience, "deadlines": deadlines, "certificates": certificates, "streamed": streamed,
    "bulk": bulk, "tuning_time": tuning_time, "pictures": pictures,
}  # fmt: skip


# any model ------------------------------------------------------------------------------------------------------------

KINDS = {"encoder": "encoders", "decoder": "decoders", "experts": "mixtures of experts", "recurrent": "recurrent"}


def group_of(each: Tree) -> str:
    kind = KINDS.get(each["of"], each["of"])
    return f"{each['family']}: {kind}" if each["family"] == "transformers" else each["family"]


def fault(each: Tree) -> str | None:
    """Return why a model counts as an exception, or None."""
    reason = each.get("failed")
    for budget in ("smallest", "twice") if reason is None else ():
        one = each[budget]
        if "failed" in one:
            reason = f"{one['module']}: {one['failed']}"
        elif not all(one["equal"]):
            reason = "answers differ" if "not finite" in map(str, one["difference"]) else "the last bits differ"
        elif one["peak_weight_bytes"] > one["budget_bytes"]:
            reason = "more bytes of weights than the budget"
        if reason is not None:
            break
    return reason


def general(reason: str) -> str:
    """Without numbers and names of inputs."""
    for old, new in (("answers otherwise than", "differs from"), (", and elsewhere by the module", " and outside it")):
        reason = reason.replace(old, new)
    if reason.startswith("the exported graph"):
        return reason.partition(" for ")[0].partition(" (")[0]
    return reason.removeprefix("no ONNX graphs written, the store runs on torch only: ")


def shown_difference(result: Tree) -> str:
    numbers = [each for each in result["difference"] if isinstance(each, float)]
    words = [each for each in result["difference"] if isinstance(each, str)]
    return words[0] if words else f"{max(numbers):.1e}"


def offloaded(each: Tree, way: str) -> Tree:
    if "failed" in each or "failed" in each[way]:
        return {"way": way, "ended": "error", "reason": each["failed"] if "failed" in each else each[way]["failed"]}
    if all(each[way]["equal"]):
        return {"way": way, "ended": "equal"}
    return {"way": way, "ended": "wrong", "difference": shown_difference(each[way])}


def any_model() -> list[Tree]:
    found, records = [], read("any-model")
    measured = {(each["family"], each["name"]) for each in records if each["kind"] == "zoo"}
    for each in records:
        kind, figures, study = each["kind"], {}, {name: value for name, value in each.items() if name not in ("kind", "result")}
        options: Tree = {"model": f"{each['family']}/{each['name']}" if "family" in each else each.get("model", "zoo"), "rounds": 1}
        study["part"] = kind
        if kind == "missing":
            study["counts"] = (each["family"], each["name"]) not in measured
        elif kind == "environment":
            study = {"part": kind}
            here = {name: each[name] for name in ("cpu_model", "num_cores", "total_memory_bytes", "platform", "versions")}
            found.append(record(options, {}, study, environment=here))
            continue
        elif kind == "zoo":
            study |= {"group": group_of(each), "fault": fault(each)}
            numbers = ("divide_seconds", "num_stages", "num_tensors", "weight_bytes", "largest_stage_bytes", "kept_bytes")
            figures = {name: study.pop(name) for name in numbers if name in each}
            runs = [each[name] for name in ("smallest", "twice") if name in each and "failed" not in each[name]]
            study["num_runs"] = len(runs)
            if runs:
                figures["peak_share"] = max(one["peak_weight_bytes"] / one["budget_bytes"] for one in runs)
                figures["budget_share"] = each["smallest"]["budget_bytes"] / max(each["weight_bytes"], 1)
            if "sliced" in each and "failed" not in each["sliced"]:
                small = each["sliced"]
                figures["sliced_share"] = small["budget_bytes"] / each["smallest"]["budget_bytes"]
                study["sliced_equal"] = all(small["equal"])
                if "difference" in small:
                    figures["sliced_difference"] = max(small["difference"], key=float)
        elif kind == "accelerate":
            for way in ("cpu_offload", "disk_offload"):
                about = {"part": kind, "group": group_of(each), "family": each["family"], "name": each["name"], "of": each["of"]}
                about |= {"raw": each.get(way, {})} | offloaded(each, way)
                found.append(record(options, {}, about))
            continue
        elif kind == "export":
            study["group"] = group_of(each)
            figures = {name: study.pop(name) for name in ("seconds", "num_stages", "num_kinds", "num_exits", "num_onnx") if name in each}
            if "num_kinds" not in each:
                study["reason"] = general(each.get("refused") or each["failed"])
        elif kind == "agreement":
            exact = [way for way in each["logits"] if not way.endswith("ort")]
            same_order = len({tuple(order) for order in each["layers"].values()}) == 1
            same_weights = all(each["same_weights"].values())
            study |= {
                "same_order": same_order, "weights_are_same": same_weights,
                "agrees": same_weights and same_order and all(all(each["logits"][way]["equal"]) for way in exact),
                "shown": {way: "equal" if all(one["equal"]) else shown_difference(one) for way, one in each["logits"].items()},
            }  # fmt: skip
        elif kind in ("cost", "latency"):
            found.append(measured_shape(each, options, study))
            continue
        found.append(record(options, figures, study))
    for name, key in (("vision", "net"), ("anywhere", "model")):
        for each in read(name):
            found.append(with_exits(each, key))
    return found


def measured_shape(each: Tree, options: Tree, study: Tree) -> Tree:
    """Time and memory of dividing, or of a pass, of BERT-base's and ViT-base's shapes."""
    result = dict(each["result"])
    samples = {"latencies": result.pop("latencies_seconds")} if "latencies_seconds" in result else {}
    figures = {name: value for name, value in result.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    if samples:
        figures |= {"latency": median(samples["latencies"]), "memory": figures.pop("peak_rss_bytes")}
        figures["bytes"] = figures.pop("bytes_read_per_input")
    rest = {name: value for name, value in result.items() if name not in figures and name not in ("peak_rss_bytes", "bytes_read_per_input")}
    options |= {"rounds": 3} | ({"batch": each["rows"], "threads": each["threads"]} if each["kind"] == "latency" else {})
    if each["kind"] == "latency":
        options["model"] = each["model"] if each["rival"] == "streamed" else f"{each['model']}, {each['rival']}"
        study["shape"] = each["model"]
    return record(options, figures, study, each["round"], samples, run=rest)


def with_exits(each: Tree, key: str) -> Tree:
    dev, latency = each["dev"], each["latency"]
    figures = {name: dev[name] for name in ("gain", "gain_low", "gain_high", "mean_exit")} | {"score": dev["accuracy"][-1]}
    speeds = {
        backend: [one[f"{backend} whole"]["mean_seconds"] / one[f"{backend} exits"]["mean_seconds"] for one in latency["rounds"]]
        for backend in ("ort", "torch")
    }  # fmt: skip
    figures["speedup"] = median(speeds["ort"])
    samples = {
        "accuracy": {split: each[split]["accuracy"] for split in ("tune", "certify", "dev")},
        "rounds": latency["rounds"], "speedups": speeds,
    }  # fmt: skip
    options = {"model": each[key], "exit": each["rule"], "rows": dev["rows"], "rounds": 1, "threads": latency["threads"]}
    study = {"part": f"exits of a {key}", "name": each[key], "rule": each["rule"], "num_exits": each["exits"]}
    study |= {"train_rows": each["train_rows"], "settings": each["settings"], "inputs": latency["inputs"]}
    return record(options, figures, study, samples=samples)


# main job -------------------------------------------------------------------------------------------------------------
# Its records were not published: the page itself is read. Figures have the digits that are printed there.


def tables_of(page: str, title: str) -> list[list[list[str]]]:
    """Return the tables of a section: rows of cells, without the heads."""
    section = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    found: list[list[list[str]]] = []
    for before, line in zip(["", *section.splitlines()], section.splitlines(), strict=False):
        if line.startswith("| ---"):
            found.append([])
        elif line.startswith("|") and found and before.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


SCALES = {"ms": 1e-3, "s": 1, "x": 1, "MiB": 2**20, "%": 0.01, "": 1}


def spread_of(name: str, cell: str) -> Tree:
    """Return the figures of "value unit" or "value unit (low..high)"."""
    match = re.fullmatch(r"([-+\d.,e]+) ?(ms|s|x|MiB|%|)(?: \((\S+)\.\.(\S+)\))?", cell)
    if match is None:
        return {}
    scale = SCALES[match[2]]
    numbers = [None if each is None else float(each.replace(",", "")) * scale for each in (match[1], match[3], match[4])]
    return {name: numbers[0]} | ({f"{name}_low": numbers[1], f"{name}_high": numbers[2]} if match[3] else {})


def main_job() -> list[Tree]:
    page = (PUBLISHED / "main-job.md").read_text()
    found = []

    def add(part: str, rival: str, cells: Tree, options: Tree | None = None, **study: Any) -> None:
        figures: Tree = {}
        for name, cell in cells.items():
            parsed = spread_of(name, cell)
            figures |= parsed
            if not parsed and cell not in ("", "–"):
                study[name] = cell
        options = {"model": "bert-base-shape", "threads": 2, "max_length": 128, "rounds": 1, **(options or {})}
        found.append(record(options, figures, {"part": part, "rival": rival, **study}))

    (latency,) = tables_of(page, "Latency and memory")
    names = ("latency", "latency_p95", "relative", "memory", "memory_median", "bytes", "bound", "", "reads_as")
    for rival, *cells in latency:
        budget = rival.partition("MiB")[0].rpartition(" ")[2] + "MiB" if "MiB" in rival else None
        model = {"offramp resident": "bert-base-shape"}.get(rival, "bert-base-shape" if budget else f"bert-base-shape, {rival}")
        add("latency", rival, {name: cell for name, cell in zip(names, cells, strict=True) if name}, {"budget": budget, "model": model})
    (targets,) = tables_of(page, "Targets")
    disk = [cells for cells in targets if "against `device_map" in cells[0]]
    add("against disk", "offramp 120MiB", {"speedup": disk[0][2], "memory_share": disk[1][2]}, {"budget": "120MiB"})
    for rival, cell in tables_of(page, "Time to the first label")[0]:
        add("start", rival, {"first_label": cell}, {"budget": "128MiB"} if "MiB" in rival else {"model": "bert-base-shape, transformers"})
    completes = next(cells for cells in targets if "completes" in cells[0])[2].split(" of ")
    for rival, *cells in tables_of(page, "Small memory cgroup")[0]:
        names = ("reads_as", "first_pass", "latency", "relative", "memory", "failcnt")
        study = {"finished": int(completes[0]), "tried": int(completes[1])} if rival == "128 MiB" else {}
        add("group", rival, dict(zip(names, cells, strict=True)), {"budget": "120MiB"}, **study)
    for number, cells in enumerate(tables_of(page, "Slow disk")[0]):
        names = ("compute", "read", "bound", "own_bound", "latency", "of_bound", "of_own_bound")
        add("slow disk", "offramp 128MiB", dict(zip(names, cells, strict=True)), {"budget": "128MiB", "reads": "direct"}, number=number)
    answers, budgets = tables_of(page, "Equality of answers")
    for name, attention, *cells in answers:
        add("logits", name, dict(zip(("texts", "pairs", "one"), cells, strict=True)), {"backend": name.split()[0]}, attention=attention)
    for budget, slots, residents, reads, equal in budgets:
        add("budgets", budget, {"bytes_of_budget": budget, "slots_used": slots, "residents": residents}, {"reads": reads}, equal=equal == "yes")
    for policy, *cells in tables_of(page, "Reads saved by exits")[0]:
        names = ("exit_stage", "shards_read", "slots_used", "bytes", "needed_bytes", "allowed_bytes")
        rule = policy.strip("`")
        stage = int(re.search(r"\d+", rule)[0])
        add("exits", rule, dict(zip(names, cells[:6], strict=True)), {"exit": rule, "budget": "128MiB"}, stage=stage, within=cells[6] == "yes")
    for source, *cells in tables_of(page, "Dividing a checkpoint")[0]:
        add("divide", source, dict(zip(("seconds", "memory"), cells, strict=True)))
    return found


def main() -> None:
    out = Path(sys.argv[1])
    for name, make in {"glue": glue, "latency": latency, "any-model": any_model, "main-job": main_job}.items():
        if name not in (sys.argv[2:] or [name]):
            continue
        write(out / name, make())


if __name__ == "__main__":
    main()

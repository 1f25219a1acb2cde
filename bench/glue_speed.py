"""Time the models of glue.py: `python bench/glue_speed.py --data GLUE --out glue-out`, on a machine that is quiet.

Inference: dev sentences at their own lengths, batch 1, whole model in memory, each rival a process of its own, rivals
interleaved. Exit rules are those that the tune split chose. Training: sentences a second of transformers' Trainer, of
plain fine-tuning and of training with exits. Each round is one line of docs/results/glue-speed.jsonl; what is there is
not done again.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import glue
from processes import offramp, run, worker
from records import add_record, read_records

RESULTS = glue.RESULTS.with_name("glue-speed.jsonl")
NUM_TEXTS, NUM_ROUNDS = 200, 3
NUM_TRAIN, TRAIN_TASK = 960, "mrpc"
RULES = {"the best": "", "patience": "patience", "confidence": "confidence"}
THREADS = 2
NEVER = 1_000_000
TRAINERS = ("transformers' Trainer", "--loss last", "--loss pabee")


def rivals(task: str, model: str, out: Path, file: Path) -> dict[str, list[str]]:
    """Name -> command line. Creates the store. Plain: the same model without any exit head."""
    run_name = glue.Run(task, "pabee", model=model).name
    store = out / "stores" / run_name
    if not store.exists():
        finished = run(offramp("divide", out / run_name, store), {})
        assert finished.returncode == 0, finished.errors
    config = {"max_length": 128, "threads": THREADS}
    found = {"transformers, plain": worker("reference", out / run_name, config, inputs={"file": str(file)})}
    ours = offramp("run", store, "--input", file, "--json", "--threads", THREADS, "--max-length", 128)
    found["offramp, plain"] = ours
    chosen = glue.done()[run_name]["splits"]["chosen"]
    for name, family in RULES.items():
        if chosen[family] is not None:
            found[f"offramp, exits, {name}"] = [*ours, "--exit", chosen[family]["policy"]]
    return found


def write_inputs(task: str, data: Path, path: Path) -> None:
    """Evenly spaced rows of dev, as `offramp run` reads them."""
    from offramp.tasks.examples import spread

    splits, _, _ = glue.load(task, data)
    dev = splits.examples[next(name for name in splits.examples if name.startswith("dev"))]
    texts = [example.text for example in spread(dev, NUM_TEXTS)]
    pairs = [{"text": text} if isinstance(text, str) else {"text": text[0], "pair": text[1]} for text in texts]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def time_inference(task: str, model: str, data: Path, out: Path, number: int) -> dict[str, Any]:
    """One round: milliseconds a text of each rival, and the mean exit."""
    file = out / f"{task}.jsonl"
    write_inputs(task, data, file)
    found = {}
    commands = list(rivals(task, model, out, file).items())
    for name, command in commands[number % len(commands) :] + commands[: number % len(commands)]:
        finished = run(command, {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"})
        assert finished.returncode == 0, finished.errors
        *results, last = [json.loads(line) for _, line in finished.lines]
        results, record = last.get("results", results), last["record"]
        exits = [result["exit_stage"] for result in results if "exit_stage" in result]
        found[name] = {
            "milliseconds": 1000 * record["seconds_total"] / record["num_inputs"],
            "mean_exit": sum(exits) / len(exits) if exits else None,
            "exit": record.get("exit"),
        }
    return {"kind": "inference", "task": task, "model": model, "round": number, "rivals": found}


def train_once(name: str, data: Path, out: Path) -> dict[str, Any]:
    """Sentences a second of one epoch, loading left out."""
    import tempfile

    splits, train, _ = glue.load(TRAIN_TASK, data)
    rows = train[:NUM_TRAIN]
    with tempfile.TemporaryDirectory(dir=out) as folder:
        seconds = (plain_trainer if name == TRAINERS[0] else our_trainer)(name, splits, rows, Path(folder))
    return {"sentences_a_second": len(rows) / seconds}


def our_trainer(name: str, splits: Any, rows: list[Any], folder: Path) -> float:
    from offramp.training import TrainSettings, train_exits, trainer
    from offramp.training.trainer import ExitTrainer

    seconds = []

    class Timed(ExitTrainer):
        """Times what the rival's clock times: the call of `train`."""

        def train(self, *args: Any, **options: Any) -> Any:
            began = time.monotonic()
            result = super().train(*args, **options)
            seconds.append(time.monotonic() - began)
            return result

    trainer.ExitTrainer = Timed
    loss = name.rpartition(" ")[2]
    settings = TrainSettings(loss=loss, save_steps=NEVER, **{**glue.RECIPE, "epochs": 1})
    train_exits(glue.minilm(), rows, rows[:1], folder / "run", labels=splits.labels, settings=settings)
    return seconds[0]


def plain_trainer(name: str, splits: Any, rows: list[Any], folder: Path) -> float:
    """As the examples of transformers do it: dynamic padding, batches by length."""
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(glue.minilm())
    encoded = [
        {**tokenizer(*text, truncation=True, max_length=glue.RECIPE["max_length"]), "labels": label}
        for text, label in rows
    ]
    model = AutoModelForSequenceClassification.from_pretrained(glue.minilm(), num_labels=len(splits.labels))
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=glue.RECIPE["batch_size"],
        learning_rate=glue.RECIPE["learning_rate"], warmup_steps=0.1, train_sampling_strategy="group_by_length",
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, DataCollatorWithPadding(tokenizer), train_dataset=encoded)
    began = time.monotonic()
    trainer.train()
    return time.monotonic() - began


def time_training(data: Path, out: Path, number: int) -> dict[str, Any]:
    """One round of each trainer."""
    found = {}
    for name in TRAINERS[number % 3 :] + TRAINERS[: number % 3]:
        command = [sys.executable, __file__, "--data", str(data), "--out", str(out), "--train-once", name]
        finished = run(command, {"OMP_NUM_THREADS": str(THREADS)})
        assert finished.returncode == 0, finished.errors
        found[name] = json.loads(finished.lines[-1][1])
    return {"kind": "training", "task": TRAIN_TASK, "model": "minilm", "round": number, "rivals": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("glue-out"))
    parser.add_argument("--train-once", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train_once:
        print(json.dumps(train_once(args.train_once, args.data, args.out)))
        return
    (args.out / "stores").mkdir(exist_ok=True, parents=True)
    known = {(record["kind"], record["task"], record["model"], record["round"]) for record in done()}
    for number in range(NUM_ROUNDS):
        if ("training", TRAIN_TASK, "minilm", number) not in known:
            keep(time_training(args.data, args.out, number))
        for model in ("minilm", "distil-minilm"):
            for task in glue.TASKS:
                is_there = (args.out / glue.Run(task, "pabee", model=model).name).exists()
                if is_there and ("inference", task, model, number) not in known:
                    keep(time_inference(task, model, args.data, args.out, number))


def done() -> list[dict[str, Any]]:
    """The rounds on record."""
    return read_records(RESULTS)


def keep(record: dict[str, Any]) -> None:
    print(json.dumps(record), file=sys.stderr, flush=True)
    add_record(RESULTS, record)


if __name__ == "__main__":
    main()

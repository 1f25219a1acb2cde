"""One side of same_answers.py: makes models, divides them, or answers. PYTHONPATH decides which code it runs.

    python tests/checks/same_answers_side.py make MODELS      write all models, with trained exits
    python tests/checks/same_answers_side.py divide MODELS STORES
    python tests/checks/same_answers_side.py answer           read cells on stdin, print one JSON line for each

It uses public names of offramp and its command line alone.
"""

import hashlib
import importlib
import json
import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import small_models
import torch

import offramp

sys.path.append(str(Path(__file__).resolve().parents[2]))  # of the golden stores
QUICK = ("--loss", "heads-only", "--heads-epochs", 3, "--batch", 16)


def call(*words: object) -> None:
    """Run a command of offramp in this process."""
    from offramp.cli import main

    if main([str(word) for word in words]):
        raise SystemExit(f"offramp {words[0]} failed")


def make(folder: Path) -> None:
    """Write every model into its folder; where it has exits, into `NAME` after training from `NAME.bare`."""
    folder.mkdir(parents=True)
    small_models.write_texts(folder / "texts.tsv")
    small_models.write_images(folder / "images.zip")
    for model in small_models.models():
        if not model.heads:
            small_models.write_folder(folder / model.name, model)
            continue
        bare, data = folder / f"{model.name}.bare", folder / ("images.zip" if model.kind == "image" else "texts.tsv")
        small_models.write_folder(bare, model)
        brief = ("--max-length", 16) if model.kind == "text" else ()
        call("train", bare, "--train", data, "--out", folder / model.name, "--heads", model.heads, *QUICK, *brief)
    for name, (cls, config) in small_models.streamed_models().items():
        small_models.scrambled(lambda cls=cls, config=config: cls(config)).save_pretrained(folder / name)
    train_sum(folder / "arrays")


def train_sum(folder: Path) -> None:
    """Train exits on the classifier of arrays."""
    from offramp.training import TrainSettings, train_exits

    generator = torch.Generator().manual_seed(0)
    numbers, words = torch.randn(60, 8, generator=generator), torch.arange(60) * 37 % 2000
    rows = [({"numbers": numbers[i], "word": words[i]}, int(numbers[i, :3].argmax())) for i in range(60)]
    settings = TrainSettings(loss="heads-only", heads_epochs=3)
    module = small_models.scrambled(small_models.Sum)
    train_exits(module, rows[:48], rows[48:], folder, labels=small_models.LABELS, settings=settings)


def divide(models: Path, stores: Path) -> None:
    """Divide every model into `STORES/NAME`."""
    from safetensors.torch import load_model

    stores.mkdir(parents=True)
    for model in small_models.models():
        offramp.divide(models / model.name, stores / model.name)
    for name in small_models.streamed_models():
        offramp.divide(models / name, stores / name, method="eager")
    module = small_models.scrambled(small_models.Sum)
    load_model(module, models / "arrays" / "model.safetensors")
    example = {"numbers": torch.zeros(2, 8), "word": torch.tensor([1, 2])}
    offramp.divide(module.eval(), example, stores / "arrays", exits=models / "arrays")
    offramp.divide(small_models.scrambled(small_models.Tied), torch.tensor([[1, 2, 3, 4]]), stores / "tied")


def load_above(load: Any, extra_mib: int) -> Any:
    """Return a classifier under the smallest budget that errors of `load` recommend and `extra_mib` above it.

    The process may grow between two attempts: each error names a new smallest budget.
    """
    budget = 1
    for _ in range(10):
        try:
            return load(f"{budget}MiB")
        except offramp.OfframpError as error:
            found = re.findall(r"([0-9]+) ?MiB", str(error))
            if "too small" not in str(error) or not found:
                raise
            budget = int(found[-1]) + extra_mib
    raise RuntimeError(f"a budget of {budget} MiB was recommended and refused")


def predict(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the answers of a cell, bit for bit, and the plan that it ran with."""
    options = {"backend": cell["backend"], "exit": cell["exit"], "batch": cell["batch"], "reads": cell["reads"]}

    def load(budget: Any) -> Any:
        return offramp.load(cell["store"], budget=budget, threads=cell["threads"], **options)

    classifier = load(None) if cell["extra_mib"] is None else load_above(load, cell["extra_mib"])
    with classifier:
        results = classifier.predict(inputs_of(cell["inputs"]))
        plan = classifier.describe_plan()
    answers = [[each.label, each.score.hex(), each.exit_stage, each.stages_run, each.labels] for each in results]
    kept = sum(shard["resident"] for stage in plan["stages"] for shard in stage["shards"])
    return {"answers": answers, "plan": [plan["num_slots"], kept, plan["reads"]]}


def inputs_of(name: str) -> list[Any]:
    """Return the inputs of a kind of model, or of a golden store."""
    kind, _, golden = name.partition(":")
    if kind != "golden":
        return small_models.inputs_of(kind)
    from tests.golden.common import read_answers, to_input

    return [to_input(each) for each in read_answers()["stores"][golden]["inputs"]]


def stream(cell: dict[str, Any]) -> dict[str, Any]:
    """Return digests of the outputs of a streamed module."""
    place, _, name = cell["module"].partition(":")
    module = getattr(importlib.import_module(place), name)
    budget = cell["weight_budget"]
    if budget == "smallest":
        try:
            offramp.stream(module, cell["store"], weight_budget=1).close()
        except offramp.OfframpError as error:
            budget = int(re.findall(r"([0-9]+) bytes", str(error))[-1])
    outputs = []
    with offramp.stream(module, cell["store"], weight_budget=budget, reads=cell["reads"]) as model, torch.no_grad():
        for shape in ((1, 5), (3, 9)):
            ids = torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(1))
            logits = model(ids)["logits"].contiguous()
            outputs.append([list(logits.shape), hashlib.sha256(logits.numpy().tobytes()).hexdigest()])
    return {"answers": outputs, "plan": ["stream", budget, cell["reads"]]}


def answer() -> None:
    """Answer the cells on stdin, in order."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for cell in json.load(sys.stdin):
        try:
            found = stream(cell) if "module" in cell else predict(cell)
        except Exception as error:  # an error is an answer, to be compared like others
            if not isinstance(error, offramp.OfframpError):
                traceback.print_exc()
            found = {"error": type(error).__name__, "message": str(error)[:300]}
        print(json.dumps(found), flush=True)


def main() -> None:
    """Run one of the three commands."""
    source = Path(offramp.__file__).resolve().parents[1]
    if str(source) != os.environ["PYTHONPATH"]:
        raise SystemExit(f"this process runs the code of {source}, not of {os.environ['PYTHONPATH']}")
    torch.set_num_threads(1)
    command, *folders = sys.argv[1:]
    {"make": make, "divide": divide, "answer": answer}[command](*map(Path, folders))


if __name__ == "__main__":
    main()

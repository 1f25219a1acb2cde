"""Does offramp divide any model? `python -m tests.zoo.measure --records FILE` tries all of the zoo.

Each is divided, streamed under two budgets of weights and compared bit for bit (`zoo`); the same with accelerate's
offloading (`accelerate`); stages as graphs (`export`, `onnx`); and three ways to divide one checkpoint against one
another (`agreement`).

Each model has a process of its own, forked off this one, and a time limit: a crash or a hang is a record like any
other. Models, weights and inputs are made anew from the same seeds whenever they are needed. Each measurement is one
line of the records; what is there is not done again. `--families torchvision,timm` is for an environment that has them.

`--kinds zoo --sample 60` tries models spread evenly over the zoo. Prints how many are bit-identical and what dividing
them costs, and ends with 1 if one is not.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import offramp
from bench.records import add_record, read_records
from offramp.division.export import CONSTANTS
from offramp.errors import StageError
from offramp.experiments import bitwise
from offramp.experiments.bitwise import CHARACTERS, Trial, compared
from offramp.measure.hardware import environment
from offramp.store import Store
from offramp.streaming.capture import Arguments
from offramp.streaming.weightless import weightless
from tests.zoo import survey as zoo
from tests.zoo.specimen import Specimen

Result = dict[str, Any]
Example = dict[str, Any] | tuple[Any, ...]
LIBRARIES = (
    "accelerate", "numpy", "onnx", "onnxruntime", "onnxscript", "timm", "torch", "torchvision", "transformers",
)  # fmt: skip
TEXT_CLASSIFIERS = ("bert", "distilbert", "roberta", "xlm-roberta", "electra")
LENGTHS = (16, 9, 12)
"""Tokens of each row of the batch that `agreement` is asked for."""


class Measurements:
    """The records of all kinds, and a folder for stores."""

    def __init__(self, path: Path, scratch: Path) -> None:
        self._path, self._scratch = path, scratch

    def of_kind(self, kind: str) -> list[Result]:
        """Return the records of one kind."""
        return [record for record in read_records(self._path) if record["kind"] == kind]

    def keep(self, record: Result) -> None:
        """Add a record."""
        print(json.dumps(record)[:300], file=sys.stderr, flush=True)
        add_record(self._path, record)

    def measure(self, kind: str, found: list[Specimen]) -> None:
        """Measure the models that are not in the records."""
        measure, limit_seconds = MEASURES[kind]
        known = {(record["family"], record["name"]) for record in self.of_kind(kind)}
        for specimen in found:
            if (specimen.family, specimen.name) in known:
                continue
            with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
                result = apart(functools.partial(measure, specimen, Path(folder)), limit_seconds)
            about = {"kind": kind, "family": specimen.family, "name": specimen.name, "of": specimen.kind}
            self.keep({**about, **result})

    def surveyed(self, family: str) -> list[Specimen]:
        """Return the models of a family. What the environment lacks becomes a record."""
        found, missing = zoo.survey([family])
        known = {(record["family"], record["name"], record["reason"]) for record in self.of_kind("missing")}
        for name, reason in missing.items():
            if (family, name, reason) not in known:
                self.keep({"kind": "missing", "family": family, "name": name, "reason": reason})
        return found

    def chosen(self, kind: str, families: Sequence[str]) -> list[Specimen]:
        """Return the models that a kind of measurement is made of."""
        if kind == "agreement":
            return [_classifier(name) for name in TEXT_CLASSIFIERS]
        found = [specimen for family in families for specimen in self.surveyed(family)]
        if kind == "onnx":
            exported = {(each["family"], each["name"]) for each in self.of_kind("export") if "num_kinds" in each}
            found = [specimen for specimen in found if (specimen.family, specimen.name) in exported]
        return found

    def note_environment(self) -> None:
        """Keep what the lines that follow are measured with, where it is not what those before were."""
        from importlib import metadata

        facts = environment(self._scratch)
        installed = {each.metadata["Name"].lower() for each in metadata.distributions()}
        versions = {name: metadata.version(name) for name in LIBRARIES if name in installed}
        versions = {**versions, "python": facts["python_version"], "offramp": offramp.__version__}
        hardware = {key: facts[key] for key in ("cpu_model", "num_cores", "total_memory_bytes", "platform")}
        record = {"kind": "environment", "versions": dict(sorted(versions.items())), **hardware}
        if record not in self.of_kind("environment")[-1:]:
            self.keep(record)

    def summary(self) -> int:
        """Print how many models are bit-identical, and the cost of dividing. Returns 1 if one is not, else 0."""
        records = self.of_kind("zoo")
        runs = {record["name"]: [record.get(run, {}) for run in ("smallest", "twice")] for record in records}
        wrong = sorted(
            name for name, both in runs.items() if not all(run.get("equal") and all(run["equal"]) for run in both)
        )
        seconds = sorted(record["divide_seconds"] for record in records if "divide_seconds" in record)
        print(
            f"{len(runs)} models, {len(runs) - len(wrong)} bit-identical{': not ' if wrong else ''}{', '.join(wrong)}"
        )
        if seconds:
            print(f"dividing: {sum(seconds):.1f} s in all, median {seconds[len(seconds) // 2]:.3f} s")
        return int(bool(wrong) or not runs)


def main() -> int:
    parser = argparse.ArgumentParser(description="Divide and stream the models of the zoo.")
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--kinds", default=",".join(MEASURES), help="(default: %(default)s)")
    parser.add_argument("--families", default="transformers", help="transformers,torchvision,timm")
    parser.add_argument("--names", default="", help="these models alone")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="N models, spread evenly over the zoo")
    args = parser.parse_args()
    names = {name for name in args.names.split(",") if name}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.update({"OFFRAMP_CACHE": f"{scratch}/cache", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
        measurements = Measurements(args.records, Path(scratch))
        measurements.note_environment()
        for kind in args.kinds.split(","):
            found = measurements.chosen(kind, args.families.split(","))
            found = [specimen for specimen in found if not names or specimen.name in names]
            measurements.measure(kind, sampled(found, args.sample))
        return measurements.summary()


def sampled(found: list[Specimen], number: int) -> list[Specimen]:
    """Return `number` models spread evenly over all; all of them if it is 0 or more than there are."""
    if not 0 < number < len(found):
        return found
    return [found[index * len(found) // number] for index in range(number)]


def apart(measure: Callable[[], Result], limit_seconds: float) -> Result:
    """What it finds, in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(measure, theirs))
    child.start()
    theirs.close()
    try:
        if not ours.poll(limit_seconds):
            return {"failed": f"did not finish in {limit_seconds:.0f} s"}
        return ours.recv()
    except EOFError:
        child.join()
        return {"failed": f"the process ended with {child.exitcode}, without an answer"}
    finally:
        child.kill()
        child.join()


def _answer(measure: Callable[[], Result], pipe: Any) -> None:
    try:
        result = measure()
    except Exception as error:  # whatever it is, it is the result
        traceback.print_exc()
        result = {"failed": told(error)}
    pipe.send(result)


def told(error: Exception) -> str:
    """Type and first line of an error, without the folders of this machine."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    for path, shown in (
        (tempfile.gettempdir(), "TMP"),
        (sys.prefix, "PYTHON"),
        (str(Path(__file__).resolve().parents[2]), ""),
    ):
        said = said.replace(path, shown)
    return f"{type(error).__name__}: {said[:CHARACTERS]}"


def built(specimen: Specimen) -> nn.Module:
    torch.manual_seed(0)
    model = specimen.build()
    zoo.scramble(model, 0)
    return model


def examples_of(specimen: Specimen) -> list[Example]:
    """Two inputs that differ in batch size, and in length where the model takes any."""
    length = zoo.LENGTH if specimen.fixed_length else zoo.OTHER_LENGTH
    return [specimen.inputs(zoo.BATCH, zoo.LENGTH), specimen.inputs(zoo.OTHER_BATCH, length)]


def inputs_of(specimen: Specimen) -> list[Arguments]:
    return [Arguments(example) for example in examples_of(specimen)]


def answers_of(model: Any, specimen: Specimen) -> list[list[Tensor]]:
    """All tensors of the answer to each input."""
    return bitwise.answers_of(model, inputs_of(specimen))


def divided(specimen: Specimen, store: Path, method: str) -> tuple[float, list[str]]:
    """Divide it from memory: seconds, and what was said."""
    first, second = examples_of(specimen)
    model, said = built(specimen), []
    began = time.perf_counter()
    offramp.divide(model, first, store, more_inputs=[second], method=method, say=said.append)
    return time.perf_counter() - began, said


# zoo ------------------------------------------------------------------------------------------------------------------


def streamed(specimen: Specimen, folder: Path) -> Result:
    """Divide it and stream it, and whether it answers as the whole model does."""
    expected, path = answers_of(built(specimen), specimen), folder / "store"
    seconds, _ = divided(specimen, path, "eager")
    build = functools.partial(built, specimen)
    trial = Trial(path, functools.partial(bare, specimen), build, inputs_of(specimen), expected, told)
    return {"divide_seconds": seconds, **trial.run()}


def bare(specimen: Specimen) -> Any:
    """Its class, or a module without weights where a class alone does not tell the shape."""
    if specimen.family == "transformers" and specimen.skeleton is None:
        return type(built(specimen))
    return specimen.skeleton() if specimen.skeleton else weightless(specimen.build)


# accelerate -----------------------------------------------------------------------------------------------------------


def offloaded(specimen: Specimen, folder: Path) -> Result:
    """The same model under both ways of accelerate to leave weights where they are."""
    import accelerate

    expected, device, found = answers_of(built(specimen), specimen), torch.device("cpu"), {}
    for name in ("cpu_offload", "disk_offload"):
        model = built(specimen)
        try:
            if name == "cpu_offload":
                accelerate.cpu_offload(model, execution_device=device)
            else:
                accelerate.disk_offload(model, folder / "offload", execution_device=device)
            answers = answers_of(model, specimen)
        except Exception as error:  # whatever it is, it is the result
            found[name] = {"failed": told(error)}
            continue
        if any(tensor.is_meta for answer in answers for tensor in answer):
            found[name] = {"failed": "the answer has no data: it is on the meta device"}
        else:
            found[name] = compared(answers, expected)
    return found


# export ---------------------------------------------------------------------------------------------------------------


def exported(specimen: Specimen, folder: Path) -> Result:
    """Its stages as graphs for torch, which divide compares with the model on both inputs."""
    sys.modules["onnxscript"] = None  # type: ignore[assignment]  # no graphs for ONNX Runtime: they take longer
    return _with_graphs(specimen, folder)[0]


def written(specimen: Specimen, folder: Path) -> Result:
    """The same with graphs for ONNX Runtime."""
    found, said = _with_graphs(specimen, folder)
    about = [line for line in said if "ONNX" in line]
    return {**found, "said": about[-1].replace(str(folder), "") if about else "nothing"}


def _with_graphs(specimen: Specimen, folder: Path) -> tuple[Result, list[str]]:
    began = time.perf_counter()
    try:
        seconds, said = divided(specimen, folder / "store", "export")
    except StageError as error:
        return {"refused": error.what[:CHARACTERS], "seconds": time.perf_counter() - began}, []
    with Store(folder / "store", verify="never") as store:
        program, graphs = store.program, store.manifest.graphs
    steps = list(program.steps())
    return {
        "seconds": seconds,
        "num_stages": len(steps),
        "num_kinds": len({step.kernel for step in steps}),
        "num_exits": len(program.layers) - 1,
        "num_onnx": len(graphs),
    }, said


# agreement ------------------------------------------------------------------------------------------------------------


def _classifier(name: str) -> Specimen:
    """A classifier of texts of a family whose names of tensors are known."""
    import transformers

    def build() -> nn.Module:
        shape = {"vocab_size": 200, "max_position_embeddings": 48, "pad_token_id": 1 if "roberta" in name else 0}
        sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
        if name == "distilbert":
            sizes = {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 128}
        config = transformers.AutoConfig.for_model(name, num_labels=3, **shape, **sizes)
        return transformers.AutoModelForSequenceClassification.from_config(config).eval()

    def inputs(batch: int, length: int) -> dict[str, Any]:
        lengths_B = torch.tensor(LENGTHS[:batch])
        mask_BS = (torch.arange(length) < lengths_B[:, None]).long()
        generator = torch.Generator().manual_seed(batch)
        ids_BS = torch.randint(5, 200, (batch, length), generator=generator) * mask_BS
        ids_BS += (1 - mask_BS) * (1 if "roberta" in name else 0)
        return {"input_ids": ids_BS, "attention_mask": mask_BS}

    return Specimen(name, "transformers", "encoder", build, inputs)


def agreed(specimen: Specimen, folder: Path) -> Result:
    """One checkpoint divided by names, by a run and by export: weights, order of layers, and logits."""
    model: Any = built(specimen)
    batch: Any = specimen.inputs(len(LENGTHS), max(LENGTHS))
    model.save_pretrained(folder / "model")
    with torch.no_grad():
        wanted = model(**batch).logits
    stores = {method: folder / method for method in ("names", "eager", "export")}
    for method, store in stores.items():
        offramp.divide(folder / "model", store, method=method, inputs=None if method == "names" else batch)
    weights = {method: _weights(store) for method, store in stores.items()}
    orders = {method: _layers(store) for method, store in stores.items()}
    with offramp.stream(type(model), stores["eager"], weight_budget="1MiB") as stream:
        streamed = stream(**batch).logits
    logits = {
        "names, torch": _logits(stores["names"], batch, "torch"),
        "names, ort": _logits(stores["names"], batch, "ort"),
        "eager": streamed,
        "export, torch": _logits(stores["export"], batch, "torch"),
        "export, ort": _logits(stores["export"], batch, "ort"),
    }
    return {
        "num_weights": {method: len(each) for method, each in weights.items()},
        "same_weights": {method: each == weights["eager"] for method, each in weights.items()},
        "layers": orders,
        "logits": {name: compared([[each]], [[wanted]]) for name, each in logits.items()},
    }


def _weights(path: Path) -> list[str]:
    """Digests of the bytes of all weights of a store, whatever they are called."""
    with Store(path) as store:
        shards = {name: shard for name, shard in store.manifest.shards.items() if name != CONSTANTS}
        buffers = set() if store.program.module is None else set(store.program.module.buffers)
        return sorted(
            hashlib.sha256(store.read_tensor(name, entry)).hexdigest()
            for name, shard in shards.items() for entry in shard.tensors
            if entry.name not in buffers
        )  # fmt: skip


def _layers(path: Path) -> list[int]:
    """Numbers of the layers in the order in which stages take weights of them."""
    with Store(path) as store:
        module, steps = store.program.module, store.program.steps()
        used = [step.shards for step in steps] if module is None else [part.shards for part in module.parts]
        names = [entry.name for each in used for shard in each for entry in store.manifest.shards[shard].tensors]
    numbers = [next((int(part) for part in name.split(".") if part.isdigit()), None) for name in names]
    return list(dict.fromkeys(number for number in numbers if number is not None))


def _logits(path: Path, batch: dict[str, Any], backend: str) -> Tensor:
    """Of a store that runs by itself, with one thread."""
    from offramp.backends import open_backend
    from offramp.policies import parse
    from offramp.program.inputs import Batch
    from offramp.session import Classifier, Settings
    from offramp.tasks.text import token_batch

    arrays = {name: tensor.numpy() for name, tensor in batch.items()}
    with Store(path) as store:
        texts, (num_rows, length) = store.program.texts, arrays["input_ids"].shape
        given = Batch(arrays, num_rows, length, np.full(num_rows, length, np.int64))
        if texts is not None:
            ids_BS, mask_BS = arrays["input_ids"], arrays["attention_mask"]
            given = token_batch(texts, ids_BS, mask_BS, np.zeros_like(ids_BS))
        encoder, settings = _Encoded(given), Settings(1 << 40, num_rows, length)
        with Classifier(store, open_backend(backend, store, 1), encoder, parse("none"), settings) as classifier:
            assert classifier._engine is not None
            return torch.from_numpy(np.array([outcome.logits_C for outcome in classifier._engine.sweep([given])]))


class _Encoded:
    """An encoder of one batch that is encoded already."""

    sample: Sequence[Any] = ()

    def __init__(self, batch: Any) -> None:
        self.batch, self.max_length = batch, batch.length

    def encode(self, inputs: Sequence[Any]) -> Any:
        return self.batch


MEASURES: dict[str, tuple[Callable[[Specimen, Path], Result], float]] = {
    "zoo": (streamed, 300),
    "accelerate": (offloaded, 120),
    "export": (exported, 120),
    "onnx": (written, 300),
    "agreement": (agreed, 300),
}
"""Kind -> what is done with each model, and the seconds that it may take."""


if __name__ == "__main__":
    sys.exit(main())

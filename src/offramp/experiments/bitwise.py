"""The job `stream`: a model that is divided by a run and streamed under small budgets of weights, bit for bit.

Budgets are the smallest that holds the largest stage, twice that, and where large weights can be read in slices of
rows, the smallest with slices. Each answer to two inputs is compared with that of the whole model.
"""

from __future__ import annotations

import inspect
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import BudgetError, UsageError, said
from offramp.experiments.children import Log
from offramp.experiments.specification import INPUTS
from offramp.measure import median
from offramp.runtime.weight_plan import smallest_bytes
from offramp.store import Store
from offramp.streaming.capture import Arguments, are_equal, tensors_of
from offramp.streaming.placement import data_bytes, module_of, sliceable_shards, streamed_shards
from offramp.streaming.streamed import stream
from offramp.units import parse_size

CHARACTERS = 300
"""Most characters of a message in a record."""
STORE = "divided/store"
"""Store in a temporary folder: not in it, since the lock of that folder is taken."""
_SEED = 0
"""Seed of the random numbers that a model may draw while it runs."""
_NUM_TIMED = 5
"""Passes that a job times, of the whole model and of each stream."""
_COUNTED = ("peak_weight_bytes", "unplanned_loads", "disorders", "held", "sliced")
"""Fields of a stream's record that are kept."""
Tree = Mapping[str, Any]
Answers = Sequence[Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class Trial:
    """A store that was made by a run, with what its answers are compared with."""

    store: Path
    bare: Callable[[], Any]
    """Return the class of the model, or a module without weights."""
    build: Callable[[], nn.Module]
    """Return the model with the weights that were divided."""
    inputs: Sequence[Arguments]
    expected: Answers
    """Answers of the whole model, as `answers_of` returns them."""
    describe: Callable[[Exception], str] = lambda error: f"{type(error).__name__}: {str(error)[:CHARACTERS]}"
    """Return an error in one line."""
    num_timed: int = 0
    """Number of passes of the first input that are timed in each result, after those whose answers are compared."""

    def run(self) -> dict[str, Any]:
        """Return facts of the store, and the results `smallest`, `twice` and, where it differs, `sliced`."""
        with Store(self.store, verify="never") as store:
            sizes, stages, pinned = data_bytes(store), streamed_shards(store), module_of(store).pinned
            smallest, sliced = (smallest_bytes(stages, sizes, pinned, each) for each in ((), sliceable_shards(store)))
            found = _facts(store, sizes, stages)
        found["num_tensors"] = len(self.expected[0])
        # The class or a module without weights; then one with equal weights, since others are refused.
        found["smallest"] = self.run_within(self.bare(), smallest)
        found["twice"] = self.run_within(self.build(), 2 * smallest)
        if sliced < smallest:
            found["sliced"] = self.run_within(self.build(), sliced)
        return found

    def run_within(self, module: Any, budget: int) -> dict[str, Any]:
        """Stream all inputs under this many bytes of weights; an error is a result.

        Tensors beside the weights may count; the budget is then the smallest one that the refusal names.
        """
        shown = {"budget_bytes": budget, "module": "class" if isinstance(module, type) else "module"}
        try:
            with stream(module, self.store, weight_budget=budget) as streamed:
                answers = answers_of(streamed, self.inputs)
                record = streamed.record()
                times = {"seconds": seconds_of(streamed, self.inputs[0], self.num_timed)} if self.num_timed else {}
        except BudgetError as error:
            needed = parse_size((error.remedy or "").rpartition(" ")[2])
            if needed > budget:
                return self.run_within(module, needed)
            return {**shown, "failed": self.describe(error)}
        except Exception as error:  # whatever it is, it is the result
            traceback.print_exc()
            return {**shown, "failed": self.describe(error)}
        return {**shown, **compared(answers, self.expected), **{name: record[name] for name in _COUNTED}, **times}


def stream_model(step: Tree, log: Log) -> dict[str, Any]:
    """Divide a model folder by a run in a temporary folder, and return the record of its trial.

    Raises UsageError for inputs that the model does not take, and the errors of `divide`.
    """
    from offramp.division import divide
    from offramp.store.scratch import scratch_folder
    from offramp.streaming.weightless import class_of_folder

    folder = Path(step["model"])
    torch.set_num_threads(step["experiment"]["engine"]["threads"] or 1)
    kind = class_of_folder(folder)
    build = partial(_loaded, kind, folder)
    whole = build()
    inputs, expected = _answered(whole, folder, log)
    whole_seconds = seconds_of(whole, inputs[0], _NUM_TIMED)
    del whole
    with scratch_folder("offramp-stream-") as place:
        (place / STORE).parent.mkdir()
        began = time.perf_counter()
        first, *more = (each.kwargs for each in inputs)
        divide(folder, place / STORE, method="eager", inputs=first, more_inputs=more, say=log)
        seconds = time.perf_counter() - began
        found = Trial(place / STORE, lambda: kind, build, inputs, expected, num_timed=_NUM_TIMED).run()
        return record_of({"divide_seconds": seconds, "whole_seconds": whole_seconds, **found}, place)


def _loaded(kind: Any, folder: Path) -> nn.Module:
    """Return the whole model, its tensors at addresses where a stream has them: others change the last bits."""
    model = kind.from_pretrained(folder, local_files_only=True).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def _answered(model: nn.Module, folder: Path, log: Log) -> tuple[list[Arguments], list[list[Tensor]]]:
    """Return the inputs of a trial, the second with other sizes if the model takes it, and the answers to them."""
    from offramp.division.checkpoints import example_of, load_inputs
    from offramp.division.proof import variations

    if (folder / INPUTS).exists():
        takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        example: dict[str, Any] = {**load_inputs(folder / INPUTS), **({"use_cache": False} if takes_cache else {})}
    else:
        example = example_of(model, folder)
    inputs = [Arguments(example)]
    try:
        expected = answers_of(model, inputs)
    except Exception as error:  # modules raise any class for inputs that they do not take
        what = f"a {type(model).__name__} does not take the example inputs ({said(error)})"
        raise UsageError(what, folder, f"put inputs by name into {INPUTS} in this folder") from None
    for name, other in variations(inputs[0]):
        try:
            expected += answers_of(model, [other])
            return [*inputs, other], expected
        except Exception as error:
            log(f"no trial with another {name}: {type(error).__name__}")
    return inputs, expected


def record_of(found: Tree, folder: Path) -> dict[str, Any]:
    """Return what the record of a job says of a trial: figures, and in `run` the rest."""
    from offramp.measure.conditions import surroundings

    run, figures = dict(found), {}
    for name in ("divide_seconds", "num_stages", "num_tensors", "weight_bytes", "largest_stage_bytes", "kept_bytes"):
        figures[name] = run.pop(name)
    runs = [found["smallest"], found["twice"]]
    peaks = [each["peak_weight_bytes"] / each["budget_bytes"] for each in runs if "failed" not in each]
    if peaks:
        figures |= {"peak_share": max(peaks)}
    if "seconds" in runs[0] and "whole_seconds" in run:
        figures |= {"slowdown": runs[0]["seconds"] / run["whole_seconds"]}
    figures |= {"budget_share": runs[0]["budget_bytes"] / figures["weight_bytes"]}
    run |= {"num_runs": len(peaks), "fault": next(filter(None, map(_fault, runs)), None)}
    if "sliced" in found:
        figures |= {"sliced_share": found["sliced"]["budget_bytes"] / runs[0]["budget_bytes"]}
        run["sliced_equal"] = _fault(found["sliced"]) is None
        differences = [each for each in found["sliced"].get("difference", ()) if not isinstance(each, str)]
        figures |= {"sliced_difference": max(differences)} if differences else {}
    return {"figures": figures, "samples": {}, "run": run, "environment": surroundings(folder)}


def seconds_of(model: Any, given: Arguments, num_passes: int) -> float:
    """Return the median seconds of a pass of a model that is warm."""
    found = []
    for _ in range(num_passes):
        arguments = given.copy()
        began = time.perf_counter()
        arguments.call(model)
        found.append(time.perf_counter() - began)
    return median(found)


def answers_of(model: Any, inputs: Sequence[Arguments]) -> list[list[Tensor]]:
    """Return all tensors of the answer to each input, those in caches of keys and values included."""
    answers = []
    for each in inputs:
        torch.manual_seed(_SEED)
        answers.append([tensor.clone() for tensor in tensors_of(each.copy().call(model))])
    return answers


def compared(answers: Answers, expected: Answers) -> dict[str, Any]:
    """Return whether answers are equal bit for bit, one by one, and by how much they differ where one is not."""
    equal = [are_equal(found, wanted) for found, wanted in zip(answers, expected, strict=True)]
    return {"equal": equal} if all(equal) else {"equal": equal, "difference": list(map(difference, answers, expected))}


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float | str:
    """Return the largest difference as a share of the largest value of its tensor, or in words where there is none."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in wanted]:
        return "other shapes"
    worst = 0.0
    for one, other in zip(found, wanted, strict=True):
        if not other.numel():
            continue
        distance = (one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30)
        worst = max(worst, float(distance)) if distance.isfinite() else math.inf
    return worst if math.isfinite(worst) else "not finite"


def _facts(store: Store, sizes: Mapping[str, int], stages: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return what the manifest of a store tells of its stages and weights."""
    contents, module = store.manifest, module_of(store)
    return {
        "num_stages": len(stages),
        "weight_bytes": sum(size for name, size in sizes.items() if name != "buffers"),
        "largest_stage_bytes": max(sum(sizes[shard] for shard in shards) for shards in stages),
        "largest_weight_bytes": max(each.num_bytes for shard in contents.shards.values() for each in shard.tensors),
        "kept": [tensor.name for shard in module.pinned for tensor in contents.shards[shard].tensors],
        "kept_bytes": sum(sizes[shard] for shard in module.pinned),
        "num_unused": len(module.unused),
        "is_paged": contents.proof is not None and contents.proof.is_paged,
    }


def _fault(run: Tree) -> str | None:
    """Return what is wrong with one result, or None if all its answers are equal."""
    if "failed" in run:
        return run["failed"]
    return None if all(run["equal"]) else f"answers differ by {' and '.join(map(str, run['difference']))}"

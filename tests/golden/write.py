"""Write the golden stores and their answers: `python -m tests.golden.write`. Not to be run again.

The files in this folder were written at commit 3569a7d, before the engine was rebuilt, with Python 3.11, torch 2.13,
transformers 5.23, onnx 1.23 and ONNX Runtime 1.32. They stand for all stores that users have divided with that code.
Later code must read them and give the recorded answers, so this script and `make.py` use internals of that commit and
do not follow later changes.
"""

import base64
import io
import json
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import offramp
from offramp.measure.hardware import environment
from offramp.policies import parse, replay
from tests.golden import make, modules
from tests.golden.common import ANSWERS, BACKENDS, STORES, TUNED, pack, to_array, to_input

COMMIT = "3569a7d"
LIBRARIES = ("numpy", "onnx", "onnxruntime", "onnxscript", "tokenizers", "torch", "transformers")
TEXTS = (
    "the red sky", "a blue rose of the green grass", "is", "green", "unknown words of the sky", "roses blueish red",
    "grass", "the sky is a sky is a rose is a rose", "", "Red GREEN",
)  # fmt: skip
PAIRS = (("the sky", "a red rose"), ("blue", ""), ("green grass of a rose", "the sky is blue of a rose"))
THRESHOLDS = tuple(step / 50 for step in range(1, 50))
ORT_ONLY = ("stage:2", "votes", "entropy", "margin", "from")
"""Rules that are recorded for one backend alone: decisions are made by the same code for both."""
CLEARANCE = 2e-3
"""A threshold is recorded only if exits do not change when the threshold moves by this, up or down."""


def main():
    """Write stores, policy files, transcripts, device profile and answers."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scratch, stores = Path(folder) / "models", Path(folder) / "stores"
        scratch.mkdir()
        for path in (STORES, TUNED):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        make.make_stores(stores, scratch)
        make.make_tuned(stores, TUNED, scratch)
        names = sorted(path.name for path in stores.iterdir())
        for name in names:
            pack(stores / name, STORES / f"{name}.zip")
        classified = [name for name in names if not name.endswith(("-eager", "-headless"))]
        tree = {
            "about": about(),
            "stores": {name: answers_of(stores / name) for name in classified},
            "streams": {name: outputs_of(stores / name) for name in names if name.endswith("-eager")},
            "headless": ["bert-headless"],
        }
    ANSWERS.write_text(folded(tree) + "\n")


def folded(tree, depth=0):
    """Return JSON with one line for each input and for each list of results."""
    if depth > 5 or not isinstance(tree, (dict, list)) or not tree or (isinstance(tree, list) and depth > 4):
        return json.dumps(tree)
    pad, opening = "\n" + " " * (depth + 1), "{}" if isinstance(tree, dict) else "[]"
    if isinstance(tree, dict):
        parts = [f"{json.dumps(key)}: {folded(value, depth + 1)}" for key, value in tree.items()]
    else:
        parts = [folded(value, depth + 1) for value in tree]
    return opening[0] + pad + ("," + pad).join(parts) + "\n" + " " * depth + opening[1]


def about():
    """Return the commit, the versions of libraries and the processor."""
    facts = environment(STORES)
    versions = {name: metadata.version(name) for name in LIBRARIES}
    return {"commit": COMMIT, "python": facts["python_version"], "versions": versions, "cpu": facts["cpu_model"]}


def answers_of(store):
    """Return the inputs of a classifier and its answers by backend and exit rule."""
    inputs = inputs_of(store.name)
    stages = ("stage:1", "stage:2") if (store / "exits.json").exists() else ()
    said = {rule: results_of(store, "ort", rule, inputs) for rule in [*stages, "none"]}
    rules = [*said, *rules_of(store.name, said)]
    answers = [
        {"backend": backend, "exit": rule, "results": results_of(store, backend, rule, inputs)}
        for backend in BACKENDS
        for rule in rules
        if backend == "ort" or not rule.startswith(ORT_ONLY)
    ]
    return {"inputs": inputs, "answers": answers}


def inputs_of(name):
    """Return inputs for a store, as JSON."""
    generator = np.random.default_rng(0)
    if name.startswith(("vit", "resnet")):
        return [{"image": png(generator, shade)} for shade in (40, 100, 160, 220, 128, 128)]
    if name.startswith("arrays"):
        numbers = generator.standard_normal((8, 4)).astype(np.float32)
        rows = [{"numbers": tree_of(row), "word": tree_of(np.int64(2 * i))} for i, row in enumerate(numbers)]
        return [{"arrays": row} for row in rows]
    return [*({"text": text} for text in TEXTS), *({"pair": list(pair)} for pair in PAIRS)]


def png(generator, shade):
    """Return a noisy image around a shade as a PNG file in base64."""
    shape = (make.SIDE + 2, make.SIDE, 3)
    pixels = generator.normal(shade, 50, shape).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def tree_of(array):
    """Return an array as JSON. float32 values are written as decimals that round back to the same bits."""
    array = np.asarray(array)
    values = shortest(array.reshape(-1)) if array.dtype == np.float32 else array.reshape(-1).tolist()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "values": values}


def results_of(store, backend, rule, inputs):
    """Return the results of all inputs, run one at a time, as one list for each field, and their logits."""
    found = []
    exit = str(TUNED / rule) if rule.endswith(".json") else rule
    with offramp.load(store, backend=backend, exit=exit, threads=1, warn=lambda message: None) as classifier:
        sweep = classifier._loop.sweep

        def watched(*args, **kwargs):
            outcomes = sweep(*args, **kwargs)
            found.extend(outcome.logits_C for outcome in outcomes)
            return outcomes

        classifier._loop.sweep = watched
        results = classifier.predict([to_input(each) for each in inputs])
    columns = {
        "label": [result.label for result in results],
        "score": [round(result.score, 9) for result in results],
        "exit_stage": [result.exit_stage for result in results],
        "stages_run": [result.stages_run for result in results],
    }
    if any(result.labels is not None for result in results):
        columns["labels"] = [list(result.labels) for result in results]
    return {**columns, "logits": [shortest(logits) for logits in found]}


def shortest(values):
    """Return float32 values as floats with the fewest decimals that round back to the same bits."""
    return [float(str(np.float32(value))) for value in values]


def rules_of(name, said):
    """Return exit rules under which rows leave at different exits, with thresholds far from every recorded value.

    `said`: the results of every exit, by the rule that stops there.
    """
    if len(said) == 1:
        return ["patience:inf"]
    logits_KNC = np.array([results["logits"] for results in said.values()], np.float32)
    if "regression" in name:
        return [best("patience:1@{}", logits_KNC, "regression")]
    problem = make.MULTI if "multi-label" in name else make.SINGLE
    words = ("confidence:{}", "entropy:{}", "margin:{}", "patience:1|confidence:{}", "from:2>confidence:{}")
    rules = ["patience:1", "votes:2", *(best(word, logits_KNC, problem) for word in words)]
    return rules + (["policy.json"] if name == "bert-tuned" else [])


def best(word, logits_KNC, problem):
    """Return the rule whose threshold spreads the rows most evenly over the exits."""

    def exits(threshold):
        return replay(parse(word.format(threshold)), logits_KNC, problem)

    def evenness(threshold):
        return -np.bincount(exits(threshold), minlength=len(logits_KNC) + 1).max()

    def is_clear(threshold):
        return all(np.array_equal(exits(threshold + off), exits(threshold)) for off in (-CLEARANCE, CLEARANCE))

    return word.format(max(filter(is_clear, THRESHOLDS), key=evenness))


def outputs_of(store):
    """Return example inputs of an eager store, and the tensors that its module answers."""
    import transformers

    cls = modules.Tied if store.name == "tied-eager" else transformers.GPT2LMHeadModel
    name = "ids" if cls is modules.Tied else "input_ids"
    calls = []
    for shape in ((1, 4), (2, 7)):
        ids = torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(shape[0]))
        with offramp.stream(cls, store) as model, torch.no_grad():
            answer = model(ids)
        outputs = {"logits": tree_of(answer["logits"].numpy())}
        if cls is modules.Tied:
            outputs["hidden"] = tree_of(answer["hidden"][0].numpy())
        calls.append({"inputs": {name: tree_of(ids.numpy())}, "outputs": outputs})
        assert np.array_equal(to_array(calls[-1]["inputs"][name]), ids.numpy())
    return {"module": f"{cls.__module__.partition('.')[0]}:{cls.__qualname__}", "calls": calls}


if __name__ == "__main__":
    main()

"""Write a golden store of narrow weights and its answers: `python -m tests.golden.narrow NAME DTYPE`.

They are divided from the golden store `bert-tuned`, and stand for all stores that users divided with `--dtype`: later
code must read them and give the recorded answers, so that none is written again. `bert-int8` has integers to 64 and no
attributes for rounding; `bert-int8-rotated` has them. They need no more than the public names of the package.
"""

import json
import sys
import tempfile
from pathlib import Path

import offramp
from tests.golden.common import FOLDER, pack, to_input, unpack

STORES = FOLDER / "narrow_stores"
ANSWERS = STORES / "answers.json"
SOURCE = "bert-tuned"
RULES = ("none", "stage:1", "stage:2", "patience:1")
FIELDS = ("label", "score", "exit_stage")
INPUTS = [{"text": "the red sky"}, {"text": "unknown words of the sky"}, {"text": ""}, {"pair": ["blue", "a rose"]}]


def predicted(store, backend, rule):
    """Return the answers of a store as one list for each field."""
    with offramp.load(store, backend=backend, exit=rule, threads=1, warn=lambda message: None) as classifier:
        results = classifier.predict([to_input(each) for each in INPUTS])
    return {field: [getattr(result, field) for result in results] for field in FIELDS}


def main(name, precision):
    """Write a store and the answers of ONNX Runtime."""
    tree = json.loads(ANSWERS.read_text()) if ANSWERS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        store = offramp.divide(unpack(SOURCE, folder), Path(folder) / name, dtype=precision)
        pack(store, STORES / f"{name}.zip")
        tree[name] = {rule: predicted(store, "ort", rule) for rule in RULES}
    ANSWERS.write_text(json.dumps(tree, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

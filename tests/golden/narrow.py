"""Write the golden stores of narrow weights and their answers: `python -m tests.golden.narrow`. Not to be run again.

They are divided from the golden store `bert-tuned`, and stand for all stores that users divide with `--dtype`: later
code must read them and give the recorded answers. They need no more than the public names of the package.
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
PRECISIONS = ("fp16", "int8")
RULES = ("none", "stage:1", "stage:2", "patience:1")
FIELDS = ("label", "score", "exit_stage")
INPUTS = [{"text": "the red sky"}, {"text": "unknown words of the sky"}, {"text": ""}, {"pair": ["blue", "a rose"]}]


def predicted(store, backend, rule):
    """Return the answers of a store as one list for each field."""
    with offramp.load(store, backend=backend, exit=rule, threads=1, warn=lambda message: None) as classifier:
        results = classifier.predict([to_input(each) for each in INPUTS])
    return {field: [getattr(result, field) for result in results] for field in FIELDS}


def main(precisions):
    """Write stores and answers of ONNX Runtime."""
    tree = json.loads(ANSWERS.read_text()) if ANSWERS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        source = unpack(SOURCE, folder)
        for precision in precisions:
            name = f"bert-{precision}"
            store = offramp.divide(source, Path(folder) / name, dtype=precision)
            pack(store, STORES / f"{name}.zip")
            tree[name] = {rule: predicted(store, "ort", rule) for rule in RULES}
    ANSWERS.write_text(json.dumps(tree, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or PRECISIONS)

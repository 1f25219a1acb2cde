"""Stores that were written before the engine was rebuilt open, verify and answer as they did then.

The stores and `answers.json` were written once by `write.py`. This file uses public names alone, and runs on Python 3.8
with NumPy, ONNX Runtime and tokenizers; cases that need PyTorch or Pillow are skipped where it is missing.
"""

import importlib
import importlib.util
import json
import sys

import numpy as np
import pytest

import offramp
from tests.golden.common import BACKENDS, TOLERANCE, TUNED, read_answers, smallest_budget, to_array, to_input, unpack
from tests.rounding import HAS_AVX512

GOLDEN = read_answers()
CLASSIFIERS, STREAMS, HEADLESS = GOLDEN["stores"], GOLDEN["streams"], GOLDEN["headless"]
CASES = [(name, backend) for name in CLASSIFIERS for backend in BACKENDS]
ENCODER_FILES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "offramp_tokenizer.json", "preprocessor_config.json", "processor_config.json"),
)
"""Files that decide how inputs become arrays."""
has_cli = pytest.mark.skipif(sys.version_info < (3, 10), reason="tune needs Python 3.10")


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    """Return a function that unpacks a golden store by its name and returns its folder."""
    folder = tmp_path_factory.mktemp("golden")
    return lambda name: unpack(name, folder)


def needs(library):
    """Skip the test where a library is not installed."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(library + " is not installed")


def needs_opset_18():
    """Skip the test where ONNX Runtime is too old for the graphs of a division by a run."""
    import onnxruntime

    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 14):
        pytest.skip("ONNX Runtime " + onnxruntime.__version__ + " does not read opset 18")


def require(name, backend):
    """Skip the test where the libraries that a store needs on a backend are not installed."""
    needs("torch" if backend == "torch" else "onnxruntime")
    if backend == "ort" and name.endswith("-export"):
        needs_opset_18()
    inputs = {kind for each in CLASSIFIERS[name]["inputs"] for kind in each}
    if "image" in inputs:
        needs("PIL")
    if "text" in inputs:
        needs("tokenizers")


def rules(name, backend):
    """Return the recorded results by exit rule."""
    answers = CLASSIFIERS[name]["answers"]
    return {each["exit"]: each["results"] for each in answers if each["backend"] == backend}


def load(store, backend, rule, **options):
    """Open a golden store with an exit rule of `answers.json`; policy files lie in TUNED."""
    exit = str(TUNED / rule) if rule.endswith(".json") else rule
    return offramp.load(store, backend=backend, exit=exit, threads=1, warn=lambda message: None, **options)


def load_smallest(store, backend):
    """Open a golden store under the smallest budget that a BudgetError names, which grows with the test process."""
    budget = "1MiB"
    for _ in range(5):
        try:
            return load(store, backend, "none", budget=budget)
        except offramp.OfframpError as error:
            budget = smallest_budget(str(error))
    raise AssertionError("the smallest budget that was named was refused: " + budget)


def require_answers(classifier, name, expected):
    """Assert that a classifier gives the recorded labels and exits, and scores within TOLERANCE."""
    results = classifier.predict([to_input(each) for each in CLASSIFIERS[name]["inputs"]])
    for field in ("label", "exit_stage", "stages_run"):
        assert [getattr(result, field) for result in results] == expected[field]
    np.testing.assert_allclose([result.score for result in results], expected["score"], rtol=0, atol=TOLERANCE)
    if "labels" in expected:
        assert [list(result.labels) for result in results] == expected["labels"]


@pytest.mark.parametrize("name", [*CLASSIFIERS, *STREAMS, *HEADLESS])
def test_a_golden_store_opens_and_every_file_is_intact(golden, name):
    store = golden(name)
    with offramp.Store(store):
        pass
    checks = list(offramp.verify(store))
    assert len(checks) > 5 and all(check.problem is None for check in checks)


@pytest.mark.parametrize("extent", ["third", "all"])
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_a_golden_store_answers_as_recorded_under_every_exit_rule(golden, name, backend, extent):
    """`third`: every third exit rule, beginning with another one for each store and backend."""
    require(name, backend)
    recorded, step = list(rules(name, backend).items()), 3 if extent == "third" else 1
    for rule, expected in recorded[CASES.index((name, backend)) % step :: step]:
        with load(golden(name), backend, rule) as classifier:
            require_answers(classifier, name, expected)


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_a_golden_store_answers_the_same_in_batches(golden, name, backend):
    require(name, backend)
    found, batch = rules(name, backend), 4 if backend == "torch" else "bulk"
    rule = next((rule for rule in found if "confidence" in rule), "none")
    with load(golden(name), backend, rule, batch=batch) as classifier:
        require_answers(classifier, name, found[rule])


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_a_golden_store_answers_the_same_under_the_smallest_budget(golden, name, backend):
    require(name, backend)
    expected = rules(name, backend)["none"]
    with load_smallest(golden(name), backend) as classifier:
        require_answers(classifier, name, expected)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_files_that_the_manifest_does_not_list_change_no_answer(tmp_path, name):
    require(name, "ort")
    store = unpack(name, tmp_path)
    for other in ENCODER_FILES:
        if not (store / other).exists():
            (store / other).write_text("{ no JSON, and no vocabulary")
    with load(store, "ort", "none") as classifier:
        require_answers(classifier, name, rules(name, "ort")["none"])


@pytest.mark.parametrize("name", ["bert-tuned", "electra-own"])
def test_graphs_of_text_encoders_are_not_read(tmp_path, name):
    require(name, "ort")
    store = unpack(name, tmp_path)
    for path in (store / "graphs").iterdir():
        path.write_bytes(b"not a graph")
    with load(store, "ort", "none") as classifier:
        require_answers(classifier, name, rules(name, "ort")["none"])


@pytest.mark.parametrize("name", HEADLESS)
def test_a_store_without_a_head_is_refused_by_load(golden, name):
    with pytest.raises(offramp.OfframpError, match="head"):
        offramp.load(golden(name))


@pytest.mark.parametrize("weight_budget", [None, "16KiB"])
@pytest.mark.parametrize("name", STREAMS)
def test_a_golden_module_streams_as_recorded(golden, name, weight_budget):
    needs("torch")
    needs("transformers")
    import torch

    package, _, cls = STREAMS[name]["module"].partition(":")
    module = getattr(importlib.import_module("tests.golden.modules" if package == "tests" else package), cls)
    with offramp.stream(module, golden(name), weight_budget=weight_budget) as stream, torch.no_grad():
        for call in STREAMS[name]["calls"]:
            answer = stream(**{key: torch.from_numpy(to_array(tree)) for key, tree in call["inputs"].items()})
            for key, expected in call["outputs"].items():
                found = answer[key] if key == "logits" else answer[key][0]
                wanted = to_array(expected)
                # Logits reach 15, where float32 steps by 1e-6: other processors than that of the record differ by more.
                tolerance = TOLERANCE if HAS_AVX512 else TOLERANCE * max(1, abs(wanted).max())
                np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=tolerance)


@has_cli
def test_a_policy_is_tuned_on_golden_transcripts_and_profile(golden, tmp_path):
    from offramp.cli import main

    out = tmp_path / "policy.json"
    words = ["tune", golden("bert-tuned"), "--transcript", TUNED, "--profile", TUNED / "profile.json"]
    words += ["--force-profile", "--max-drop", "20", "--confidence", "0.8", "--out", out]
    assert main([str(word) for word in words]) == 0
    certified, found = json.loads((TUNED / "certified.json").read_text()), json.loads(out.read_text())
    assert found["certificate"]["num_samples"] == certified["certificate"]["num_samples"]
    assert found["model_sha256"] == certified["model_sha256"]


@has_cli
@pytest.mark.parametrize("name", ["policy.json", "certified.json"])
def test_a_golden_policy_file_is_explained(name, capsys):
    from offramp.cli import main

    assert main(["tune", "--explain", str(TUNED / name)]) == 0
    assert "samples of mine" in capsys.readouterr().out

"""Remedies of the rooms units, policies, runtime, session and profiling: options, plans, policies, device profiles."""

import json
import os
import pickle
import re
import subprocess
import sys
from functools import partial

import numpy as np

import offramp
from offramp import measure, units
from offramp.backends.onnx import OnnxBackend
from offramp.policies import parse
from offramp.policies.codec import to_json
from offramp.program.inputs import Batch
from offramp.runtime import ledger, memory_model, run_plan, slots
from offramp.runtime.ledger import STACK_BYTES
from offramp.session.inputs import InputSource
from offramp.store.policy_file import read_policy
from offramp.units import parse_size
from tests.golden.common import unpack
from tests.remedies.cli import SAY, tune_again
from tests.remedies.entries import TEXT, Entry, closed, corrected, named_command, said_by
from tests.remedies.store import DIVIDE, exit_heads, exits_json, failing, os_error, spoilt, undo, use

TUNED = f"run tuned {SAY} --exit policy.json --threads 1"
SINGLE, REGRESSION = "single_label_classification", "regression"


def load(w, store=None, **options):
    with offramp.load(store or w.store, threads=1, **options) as classifier:
        return classifier.predict([TEXT])


def policy(place, wrong, says, *rights, exits=4, problem=SINGLE):
    """An entry of a policy that a model does not run; the remedy names others."""

    def check(text):
        parse(text).check(exits, problem)

    return corrected(place, lambda w: check(wrong), says, lambda w: [check(right) for right in rights])


def fitted_for_another(w):
    """The golden policy for a model of another number of exits."""
    from offramp.policies.codec import from_json

    return from_json(read_policy(w.copy("policy.json")).policy).check(9, SINGLE)


def spoilt_json(name, change, work):
    return spoilt(lambda w: w.edit_json(name, change), work)


def without(*keys):
    return lambda tree: {name: value for name, value in tree.items() if name not in keys}


def tuned(place, change, work=TUNED):
    """An entry of a policy file that is made again."""
    return Entry(place, spoilt_json("policy.json", change, work), "make it again: offramp tune", tune_again)


def measure_again(w, said):
    named_command("--threads 1 --max-length 8", STORE="store", FILE="made.json")(w, said)
    (w / "made.json").replace(w / "profile.json")


measure_again.says = "`offramp profile store --out profile.json --threads 1 --max-length 8`"
PROFILE = f"run store {SAY} --deadline 10s --profile profile.json --threads 1 --max-length 8"


def named_words(command, words):
    """Run the command with the words that the message names."""

    def act(w, said):
        w.run(f"{command} {re.findall(words, said)[-1]}")

    act.says = "the command with what the message names"
    return act


SMALL = f"run store {SAY} --threads 1"


def long_store(w):
    """A store whose texts may be so long that attention takes more memory than all else."""
    from tests.cli.conftest import write_tiny

    fixed(w)
    offramp.divide(write_tiny(w / "long-model", exits=False, max_position_embeddings=2048), w / "long")


def between(w):
    """A budget that is enough for short texts only."""
    lengths = (2048, 16)
    least = [offramp.prepare(w / "long", threads=1, max_length=each).plan.smallest_budget_bytes for each in lengths]
    return f"plan long --threads 1 --budget {sum(least) // 2}B"


def too_long(w):
    w.run(between(w))


def shorter(w, said):
    w.run(f"{between(w)} {re.findall('--max-length [0-9]+', said)[-1]}")


shorter.says = "the length that the message names"


RSS = 50 << 20


def fixed(w, **system):
    """Let the process have 50 MiB, whatever happens in it, and the system give what is said."""
    w.patch(memory_model, "resident_bytes", lambda: RSS)
    w.patch(memory_model, "refault_bytes", int)
    w.patch(memory_model, "RUN_CODE_BYTES", 0)
    w.patch(OnnxBackend, "is_measured", False)  # a trial shows nothing where memory is fixed
    for module in (ledger, run_plan):
        w.patch(module, "read_memory", lambda: measure.Memory(RSS, RSS, None, None))
    for name, num_bytes in system.items():
        w.patch(ledger, name, partial(int, num_bytes))


def limited(name):
    """Let the system give 64 KiB less than a run needs."""

    def spoil(w):
        fixed(w)
        needed = offramp.prepare(w.store, 1 << 40, threads=1).plan.smallest_budget_bytes - (64 << 10)
        w.limit = {"container_bytes": needed, "available_bytes": needed - RSS}.get(name, needed - RSS + STACK_BYTES)
        fixed(w, **{name: w.limit})

    return spoil


def raised(name, words):
    """Raise a limit as far as the message says: `words` find the number, in KiB or of a unit."""

    def act(w, said):
        number, unit = re.search(words, said).groups()
        num_bytes = parse_size(number + (unit or "KiB"))
        fixed(w, **{name: num_bytes if name == "container_bytes" else w.limit + num_bytes})

    act.says = "the limit is raised as far as the message says"
    return act


def open_first(w):
    fixed(w)
    w.least = offramp.prepare(w.store, threads=1).plan.smallest_budget_bytes
    w.keep(offramp.prepare(w.store, w.least, threads=1).open().close)


def beside_another(w):
    """Open an engine beside another one that has the budget, unless that was closed."""
    w.once(open_first)
    with offramp.prepare(w.store, w.least + 1, threads=1) as classifier:
        return classifier.predict([TEXT])


def close_the_other(w, said):
    w.let_go()


close_the_other.says = "the other engine is closed"


def named_deadline(w, said):
    w.run(f"{DEADLINE} --deadline {said.rpartition('--deadline ')[2].split()[0]}")


named_deadline.says = "the deadline that the message names"
DEADLINE = f"run tuned {SAY} --exit confidence:0.9 --profile made.json --threads 1 --max-length 8"


def measured(w):
    w.run("profile tuned --out made.json --threads 1 --max-length 8")


def no_nan(w):
    """Break the weights of a model and divide it."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(w.model / "model.safetensors")
    save_file({name: array * np.float32("nan") for name, array in tensors.items()}, w.model / "model.safetensors")
    w.run("divide model store --force")


def convert_again(w, said):
    import shutil

    shutil.copy(w.made.model / "model.safetensors", w.model)
    w.run(DIVIDE)


convert_again.says = "whole weights are put there, and divided"


def plan(texts, **options):
    """Classify texts with a plan that was made for others."""

    def work(w):
        with offramp.prepare(w.store, threads=1, texts=["the"], **options) as classifier:
            return classifier.predict(texts)

    return work


def train_and_divide(w, said):
    """Bring exits: what training writes, here from the model that was trained."""
    w.run("divide model bare --force")


train_and_divide.says = "a model with trained exits is divided"


def batch(ids):
    return Batch({"input_ids": np.array([ids])}, 1, len(ids), np.array([len(ids)]))


def option(place, says, wrong, *rights):
    """An entry of an option of `offramp.load`."""
    from offramp.runtime.config import EngineConfig

    return corrected(
        place, lambda w: EngineConfig(**wrong), says, lambda w: [EngineConfig(**right) for right in rights]
    )


def with_named(parse, wrong):
    """Parse the text that the message proposes."""

    def act(w, said):
        parse(said.rpartition(": ")[2].rstrip("?"))

    act.says = "the spelling that the message proposes"
    return act


def read_ids(*ids):
    """Read a batch of these token ids."""

    def read(w):
        from offramp.program.program import ATTENTION_MASK, INPUT_IDS, POSITION_IDS, TOKEN_TYPE_IDS
        from offramp.runtime.inputs import InputReader
        from offramp.store import Store

        with Store(w.store) as store:
            ids_BS = np.array([ids])
            names = (INPUT_IDS, ATTENTION_MASK, TOKEN_TYPE_IDS, POSITION_IDS)
            values = ids_BS, np.ones_like(ids_BS), np.zeros_like(ids_BS), np.arange(len(ids))[None]
            arrays = dict(zip(names, values, strict=True))
            arrays = {
                name: array for name, array in arrays.items() if name in store.program.inputs or name in names[:3]
            }
            return InputReader(store).read(Batch(arrays, 1, len(ids), np.array([len(ids)])))

    return read


def images(w, divided, given):
    """Divide a module with examples of these sizes, and read one of another."""
    import torch

    from offramp.runtime.inputs import InputReader
    from offramp.store import Store
    from tests.division.test_export_shapes import Pooled

    path = w / "x".join(str(part) for sizes in divided for part in sizes)
    if not path.exists():
        first, *more = (torch.ones(2, 3, *sizes) for sizes in divided)
        offramp.divide(Pooled().eval(), first, path, more_inputs=more, method="export")
    with Store(path) as store:
        name = next(iter(store.program.inputs))
        return InputReader(store).read(Batch({name: np.ones((1, 3, *given), np.float32)}, 1, 1, np.ones(1)))


def one_layer(w, **options):
    from tests.cli.conftest import write_tiny

    if not (w / "one").exists():
        write_tiny(w / "short", exits=False, num_hidden_layers=1)
        offramp.divide(w / "short", w / "one")
    return load(w, w / "one", **options)


def batches(w, num):
    """Run several batches with a plan for one."""
    with offramp.prepare(w.store, threads=1) as classifier:
        made = [classifier.encoder.encode(["the bank"])] * num
        return classifier.predict_batches(made)


def two_policies(w, same):
    tree = json.loads(w.copy("policy.json").read_text())
    for name in ("one.json", "two.json"):
        tree["policy"] = to_json(parse("confidence:0.9"))
        tree["model_sha256"] = tree["model_sha256"] if same or name == "one.json" else "0" * 64
        (w / name).write_text(json.dumps(tree))
    load(w, w.copy("tuned"), exit="one.json|two.json")


def with_profile(w, num_exits):
    from tests.experiments.test_tuning import make_profile

    load(w, profile=make_profile(num_exits), deadline="10s")


def unpadded(tree):
    tree["program"]["texts"]["pad_token"] = None


def inline(w, labels):
    from dataclasses import replace

    from offramp.store import Store, manifest

    with Store(w.store) as store:
        return manifest.dumps(replace(store.manifest, inline_labels=labels))


def learned(w, problem):
    from offramp.policies.codec import from_json

    found = from_json(read_policy(w.copy("policy.json")).policy)
    found.check(found.num_early_exits + 1, problem)


def chain(w):
    """The store of a module that is no classifier."""
    from tests.division.modules import Chain, made, vectors

    return offramp.divide(made(Chain), vectors(), w / "chain", force=True)


def stream_chain(w):
    from tests.division.modules import Chain, vectors

    with offramp.stream(Chain, w / "chain") as model:
        return model(vectors())


def headless(w):
    return load(w, unpack("bert-headless", w.folder))


def stream_headless(w, said):
    """Divide with the method that the message names, and stream."""
    from transformers import BertForSequenceClassification

    assert "divide with --method eager and run it with offramp.stream" in said
    w.run("divide plain another --method eager")
    offramp.stream(BertForSequenceClassification, w / "another").open().close()


stream_headless.says = "`--method eager` and `offramp.stream`"


def in_another_process(code):
    """Run Python code in another process. Returns what it prints."""
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    return done.stdout


def pickled_parts(w):
    """Send a classifier that was made of parts to another process."""
    from offramp.session.classifier import Classifier

    whole = offramp.prepare(w.store, threads=1)
    pickle.dumps(Classifier(whole.store, whole.backend, whole.encoder, whole.policy, whole.settings, whole.guard))


def load_there(w, said):
    code = f"import offramp; print(offramp.load({str(w.store)!r}, threads=1).predict([{TEXT!r}])[0].label)"
    assert in_another_process(code).strip() == load(w)[0].label


load_there.says = "`offramp.load` in the other process"


def pickle_it(w):
    w.pickle = pickle.dumps(offramp.prepare(w.store, threads=1))
    w.run("divide plain store --force")


def unpickled(w):
    with pickle.loads(w.pickle) as classifier:
        return classifier.predict([TEXT])


def pickle_again(w, said):
    w.pickle = pickle.dumps(offramp.prepare(w.store, threads=1))


pickle_again.says = "the store is loaded and pickled again"


def large_store(w):
    """A store of which a run may hold a part in memory, or all of it."""
    from tests.cli.conftest import write_tiny

    offramp.divide(write_tiny(w / "large-model", exits=False, hidden_size=256, intermediate_size=1024), w / "large")
    fixed(w)
    least = offramp.prepare(w / "large", threads=1).plan.smallest_budget_bytes
    fixed(w, available_bytes=least + (1 << 20) - RSS)


def stream_the_weights(w, said):
    with offramp.load(w / "large", re.search(r"--budget (\S+)", said)[1], threads=1) as classifier:
        assert classifier.plan.num_slots
        classifier.predict([TEXT])


stream_the_weights.says = "the budget that the message names"


def no_large_pages(w):
    """The system gives no mapping of more than 16 KiB for weights."""
    failing(slots.mmap, "mmap", os_error("ENOMEM"), lambda _, num_bytes, **more: num_bytes > LARGE_PAGES)(w)


LARGE_PAGES = 16 << 10


def of_arrays(w):
    """The store of a classifier of arrays, and arrays of which one has NaN."""
    from tests.cli.test_own import write_arrays
    from tests.remedies.training import divide_own

    divide_own(w, loads=True)
    write_arrays(w / "odd.npz", 4, seed=0)
    change_arrays(w, lambda x: np.where(np.arange(x.size).reshape(x.shape) == 21, np.nan, x).astype(x.dtype))


def change_arrays(w, change):
    with np.load(w / "odd.npz") as found:
        given = dict(found)
    np.savez(w / "odd.npz", **{name: change(array) if array.ndim == 2 else array for name, array in given.items()})


def replace_numbers(w, said):
    change_arrays(w, np.nan_to_num)


replace_numbers.says = "the numbers are replaced"


def leave_out(w, said):
    with np.load(w / "odd.npz") as found:
        given = dict(found)
    row = int(re.search(r"of row (\d+)", said)[1]) - 1
    np.savez(w / "odd.npz", **{name: np.delete(array, row, 0) for name, array in given.items()})


leave_out.says = "the row that the message names is left out"


TABLE = [
    option(
        "runtime/config.py: {}: a list of layers",
        "give resident_layers",
        {"residency": "fifo", "slots": 2},
        {"residency": "fifo", "resident_layers": 2},
    ),
    corrected(
        "units.py: a size must be an integer",
        lambda w: units.parse_size(None),
        "like '128MiB'",
        lambda w: units.parse_size("128MiB"),
    ),
    corrected(
        "units.py: a size must be a number and one of",
        lambda w: units.parse_size("many"),
        "like '128MiB'",
        lambda w: [units.parse_size(f"2{unit}") for unit in ["B", "KB", "MB", "GB", "KiB", "MiB", "GiB"]],
    ),
    Entry(
        "units.py: a size must have a unit",
        lambda w: units.parse_size("128"),
        "a size must have a unit",
        with_named(units.parse_size, "128"),
        again=False,
    ),
    Entry(
        "units.py: a duration must have a unit",
        lambda w: units.parse_duration("40"),
        "a duration must have a unit",
        with_named(units.parse_duration, "40"),
        again=False,
    ),
    corrected(
        "units.py: a duration must be a number",
        lambda w: units.parse_duration("soon"),
        "like '40ms'",
        lambda w: [units.parse_duration(f"2{unit}") for unit in ("s", "ms", "us")],
    ),
    policy(
        "policies/grammar.py: invalid exit policy",
        "trust:1",
        "write [from:K>] RULES",
        "none",
        "stage:1",
        "patience:1",
        "votes:2",
        "entropy:0.5",
        "confidence:0.5",
        "margin:0.5",
        "from:2>confidence:0.5|margin:0.5&votes:2",
    ),
    policy("policies/rules.py: {}: @TAU applies to regression only", "patience:1@0.5", "use patience:1", "patience:1"),
    policy(
        "policies/rules.py: {} needs {}",
        "confidence:0.5",
        "use patience:P@TAU, stage:K or none",
        "patience:1@0.1",
        "stage:1",
        "none",
        problem=REGRESSION,
    ),
    policy("policies/rules.py: {} needs {}", "votes:2", "use patience:P@TAU", "patience:1@0.1", problem=REGRESSION),
    policy(
        "policies/rules.py: {} can never fire",
        "patience:9",
        "use at most 3, or patience:inf",
        "patience:3",
        "patience:inf",
    ),
    policy("policies/rules.py: {} can never fire", "patience:9", "patience:inf", "patience:inf", exits=1),
    policy("policies/rules.py: {} can never fire", "votes:9", "use at most 4", "votes:4"),
    policy("policies/rules.py: {} can never fire", "votes:9", "use none", "none", exits=1),
    policy("policies/rules.py: {} can never fire", "stage:9", "use at most 4", "stage:4"),
    Entry(
        "policies/learned.py: {} was fitted for",
        fitted_for_another,
        "with offramp tune",
        tune_again,
        again=False,
    ),
    corrected(
        "session/inputs.py: --text-column",
        lambda w: InputSource(("a",), text_column="x"),
        "give --input FILE",
        lambda w: InputSource(file="x.tsv", text_column="x"),
    ),
    corrected(
        "session/requests.py: predict takes an iterable of inputs, such as",
        plan(TEXT),
        "predict([text])",
        plan(["the"]),
    ),
    corrected(
        "session/classifier.py: the classifier is not open",
        lambda w: offramp.prepare(w.store).predict([TEXT]),
        "use it in a `with` block, or call open()",
        lambda w: (load(w), offramp.prepare(w.store).open().predict([TEXT])),
    ),
    corrected(
        "session/classifier.py: batch of {} tokens",
        plan(["the bank fell today the bank fell today " * 3]),
        "the plan was made for",
        plan(["the"]),
    ),
    Entry(
        "session/policy_files.py: the policy was tuned for another model",
        f"run store {SAY} --exit policy.json",
        "tune it on a transcript of this store",
        said_by(f"run tuned {SAY} --exit policy.json", "a policy of this store"),
        again=False,
    ),
    tuned("session/policy_files.py: no policy", lambda tree: {**tree, "policy": {"kind": "none such"}}),
    corrected(
        "session/policy_files.py: a profile is of a fixed number",
        f"{PROFILE} --batch bulk".replace("profile.json", "x.json"),
        "omit it, or give --batch that number",
        PROFILE.replace("--profile profile.json", "--batch bulk"),
    ),
    Entry(
        "session/policy_files.py: a deadline of {}",
        spoilt(measured, f"{DEADLINE} --deadline 1us"),
        "works for such inputs",
        named_deadline,
        again=False,
    ),
    Entry(
        "runtime/exits.py: exit {}: {} is {} {}",
        spoilt(exit_heads, use),
        "train the exits again, and divide again",
        DIVIDE,
    ),
    Entry(
        "runtime/exits.py: {} needs exits",
        lambda w: load(w, w.copy("bare"), exit="patience:1"),
        "--exit none runs the whole model",
        said_by(lambda w: load(w, w.copy("bare"), exit="none"), "`exit='none'`"),
        again=False,
    ),
    Entry(
        "runtime/exits.py: {} needs exits",
        lambda w: load(w, w.copy("bare"), exit="patience:1"),
        "train exits and divide again",
        train_and_divide,
    ),
    Entry(
        "runtime/exits.py: the exits were never trained",
        spoilt(exits_json(lambda tree: {**tree, "trained": False}), use),
        "--exit none runs the whole model",
        said_by(lambda w: load(w, exit="none"), "`exit='none'`"),
        again=False,
    ),
    Entry(
        "runtime/planner.py: {} of {} is too small",
        f"{SMALL} --budget 1MiB",
        "the smallest budget that works is --budget",
        named_words(SMALL, r"--budget \S+"),
        again=False,
    ),
    Entry(
        "runtime/planner.py: {} of {} is too small",
        spoilt(long_store, too_long),
        "works with this one",
        shorter,
        again=False,
    ),
    *(
        Entry(
            "runtime/planner.py: {} of {} is too small",
            spoilt(limited(name), load),
            says,
            raised(name, words),
            simulates="memory",
        )
        for name, says, words in (
            ("container_bytes", "raise the memory limit of the container to", r"container to ([\d.]+)(\w+)"),
            ("available_bytes", "KiB more are available", r"until ([\d.]+) (KiB) more"),
            ("address_space_bytes", "raise the limit of ulimit -v by", r"ulimit -v by (\d+)()"),
        )
    ),
    Entry(
        "runtime/planner.py: {} of {} is too small",
        beside_another,
        "close the other engine first",
        close_the_other,
    ),
    Entry("runtime/gate.py: {} gave NaN", spoilt(no_nan, use), "train or convert the model again", convert_again),
    Entry(
        "store/exits.py: exits.json: {}",
        spoilt(exits_json(lambda tree: {**tree, "exits": [1, 1, 99]}), use),
        "train the exits again, and divide again",
        DIVIDE,
    ),
    closed("store/exits.py: exits.json: {}", "shared", "train the exits again"),
    tuned("store/policy_file.py: policy file without", without("policy")),
    tuned("store/policy_file.py: policy file with the unknown key", lambda tree: {**tree, "odd": 1}),
    tuned("store/policy_file.py: policy file with an invalid {}", lambda tree: {**tree, "predicted": 3}),
    tuned(
        "store/policy_file.py: policy file with an invalid 'deadline_seconds'",
        lambda tree: {**tree, "deadline_seconds": -1},
    ),
    tuned("store/policy_file.py: no {}", without("format")),
    tuned("store/policy_file.py: {} of format", lambda tree: {**tree, "format": 99}),
    tuned("store/policy_file.py: {} with 'trust_kernels'", lambda tree: {**tree, "trust_kernels": True}),
    corrected(
        "store/policy_file.py: {} cannot be read",
        spoilt(lambda w: (w / "odd.json").mkdir(), f"run tuned {SAY} --exit odd.json --threads 1"),
        "check the path",
        f"run tuned {SAY} --exit policy.json",
    ),
    Entry(
        "runtime/profile.py: no device profile of this version",
        spoilt_json("profile.json", without("seconds"), PROFILE),
        "measure it again: offramp profile STORE --out FILE",
        measure_again,
    ),
    Entry(
        "store/policy_file.py: no {}",
        spoilt_json("profile.json", without("format"), PROFILE),
        "measure it again: offramp profile STORE --out FILE",
        measure_again,
    ),
    Entry(
        "store/policy_file.py: {} with 'trust_kernels'",
        spoilt_json("profile.json", lambda tree: {**tree, "trust_kernels": True}, PROFILE),
        "measure it again: offramp profile STORE --out FILE",
        measure_again,
    ),
    Entry(
        "store/policy_file.py: {} of format",
        spoilt_json("profile.json", lambda tree: {**tree, "format": 99}, PROFILE),
        "measure it again: offramp profile STORE --out FILE",
        measure_again,
    ),
    Entry(
        "runtime/profile.py: the profile was measured under other conditions",
        PROFILE,
        "offramp profile STORE --out FILE",
        measure_again,
    ),
    Entry("tasks/text.py: the tokenizer gives token", f"run store {SAY}", "", None, closed="research"),
    corrected(
        "runtime/inputs.py: token id {} in a vocabulary of {}",
        read_ids(2, 99),
        "the tokenizer belongs to another model",
        read_ids(2, 9),
    ),
    corrected(
        "runtime/inputs.py: {} is {}, {}",
        lambda w: images(w, [(8, 8)], (9, 8)),
        "with inputs of several such sizes",
        lambda w: images(w, [(8, 8), (9, 8)], (9, 8)),
    ),
    corrected(
        "runtime/inputs.py: {} is {}, {}",
        lambda w: images(w, [(8, 8), (6, 8)], (9, 8)),
        "divide it with an example as large as the largest input",
        lambda w: images(w, [(9, 8), (6, 8)], (9, 8)),
    ),
    corrected(
        "runtime/exits.py: a deadline needs exits",
        lambda w: one_layer(w, deadline="10s"),
        "run it without a deadline",
        one_layer,
    ),
    corrected(
        "session/classifier.py: {} batches", lambda w: batches(w, 4), "the plan was made for 1", lambda w: batches(w, 1)
    ),
    corrected(
        "session/policy_files.py: the policy files are of two models",
        lambda w: two_policies(w, False),
        "combine policies of one model",
        lambda w: two_policies(w, True),
    ),
    corrected(
        "session/policy_files.py: the profile has {} exits",
        lambda w: with_profile(w, 9),
        "take a profile of this store",
        lambda w: with_profile(w, 4),
    ),
    Entry(
        "session/session.py: texts of this model cannot be padded",
        spoilt(lambda w: w.edit(unpadded), lambda w: load(w, batch=2)),
        "use batch 1",
        said_by(lambda w: load(w, batch=1), "`batch=1`"),
        again=False,
    ),
    Entry(
        "session/session.py: texts of this model cannot be padded",
        spoilt(lambda w: w.edit(unpadded), lambda w: load(w, batch=2)),
        "set it and divide again for batches",
        DIVIDE,
    ),
    corrected(
        "store/manifest.py: format 3 keeps labels in a file",
        lambda w: inline(w, ("a",)),
        "set Manifest.labels",
        lambda w: inline(w, ()),
    ),
    corrected(
        "policies/rules.py: {} needs {}",
        lambda w: learned(w, REGRESSION),
        "tune another policy",
        lambda w: learned(w, SINGLE),
    ),
    policy(
        "policies/rules.py: patience:0 is not a policy",
        "patience:0",
        "use stage:1 for the first exit, or none",
        "stage:1",
        "none",
    ),
    Entry(
        "store/manifest.py: {} has no classification head",
        headless,
        "divide a model ...ForSequenceClassification",
        said_by(load, "the store of a classifier"),
        again=False,
    ),
    Entry(
        "store/manifest.py: {} has no classification head",
        headless,
        "or divide with --method eager and",
        stream_headless,
        again=False,
        slow=True,
    ),
    Entry(
        "store/manifest.py: {} has no classification head",
        lambda w: load(w, chain(w)),
        "or run it with offramp.stream",
        said_by(stream_chain, "`offramp.stream`"),
        again=False,
    ),
    closed("runtime/exits.py: exits that read the {} token", "unreachable", "train the exits again, and divide again"),
    closed("store/reader.py: tensor {} is {}, for which", "unreachable", "divide the model again"),
    closed("store/files.py: file ends inside a tensor", "torn", "write the transcript again"),
    Entry(
        "session/classifier.py: a classifier that was made of parts",
        pickled_parts,
        "call offramp.load in the other process",
        load_there,
        again=False,
    ),
    Entry(
        "session/classifier.py: the store is another one",
        spoilt(pickle_it, unpickled),
        "load it again, and pickle that",
        pickle_again,
    ),
    Entry(
        "session/session.py: the process takes",
        spoilt(large_store, lambda w: load(w, w / "large", budget="resident")),
        "stream the weights: --budget",
        stream_the_weights,
        again=False,
        simulates="memory",
    ),
    Entry(
        "runtime/slots.py: the system refuses",
        spoilt(no_large_pages, lambda w: load(w, w.copy("bare"))),
        "raise the limit of ulimit -v",
        undo,
        simulates="memory",
    ),
    *(
        Entry(
            "runtime/gate.py: {}, so that {}",
            spoilt(of_arrays, "run store --input odd.npz --batch 4 --threads 1"),
            "replace these numbers, or leave out the input",
            act,
            slow=True,
        )
        for act in (replace_numbers, leave_out)
    ),
]

"""Remedies of the rooms training and experiments: run folders, settings, tuning, evaluation."""

import dataclasses
import json
import re
import shutil

import numpy as np

import offramp
from offramp.experiments import tuning
from offramp.experiments.evaluation import model_label_ids
from offramp.experiments.held_out import require_same_cut
from offramp.experiments.tuning import Goal
from offramp.policies import parse
from offramp.training import TrainSettings, folders, train_exits
from offramp.training.subjects import FolderModel
from offramp.units import parse_duration
from tests.experiments.test_tuning import make_profile, make_transcript, with_rows
from tests.remedies.cli import instead
from tests.remedies.entries import Entry, corrected, said_by
from tests.remedies.store import failing, spoilt, undo
from tests.training.test_own import made as own_made
from tests.training.test_own import pairs, sequence
from tests.training.tiny import LABELS, examples

QUICK = "--epochs 1 --heads-epochs 1 --max-length 16 --batch 8"
TRAIN = f"train encoder --train mine.tsv --out made {QUICK}"
TUNE = "tune tuned --transcript transcripts --profile profile.json --force-profile"
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def quiet(line):
    pass


def goal(place, says, wrong, *rights):
    return corrected(place, lambda w: Goal(**wrong), says, lambda w: [Goal(**right) for right in rights])


def tune(w, goal, transcript=None, certify_on=None, profile=None):
    transcript = transcript or make_transcript(w.folder)
    return tuning.tune(transcript, certify_on, profile or make_profile(), goal, quiet)


def certify(w, split="certify", num=2500, seed=7):
    return make_transcript(w.folder, split, num, seed=seed)


def labels(place, says, wrong, right):
    """An entry of a model whose labels are not those of the data: wrong and right are (labels, problem, model's)."""
    return corrected(
        place, lambda w: model_label_ids(*wrong, w.folder), says, lambda w: model_label_ids(*right, w.folder)
    )


def poisoned(logits_KNC):
    logits_KNC[1, 5, 0] = np.nan
    return logits_KNC


def folder(w, config=3):
    """Train in a run folder, for no time at all."""
    with folders.run_folder(w / "made", {"epochs": config}):
        pass
    return folders.is_finished(w / "made", {"epochs": config})


def another_name(w, said):
    with folders.run_folder(w / "another", {"epochs": 3}):
        pass


another_name.says = "another name is given"


def remove(name):
    def act(w, said):
        shutil.rmtree(w / name)

    act.says = f"`rm -r {name}`"
    return act


def unlike(place, spoil, work, name):
    """Two entries of a folder that is not the run: another name, or it is removed."""
    for act, again in ((another_name, False), (remove(name), True)):
        yield Entry(place, spoilt(spoil, work), "choose another name, or remove it", act, again=again)


def other_run(w):
    folder(w, config=5)


def is_finished(w):
    if not folders.is_finished(w / "made", {"epochs": 3}):
        folder(w)


def train(w, model=None, out="made", labels=LABELS, rows=None, **settings):
    rows = rows or (examples(8), examples(4, seed=1))
    settings = TrainSettings(**{"epochs": 1, "heads_epochs": 1, "max_length": 16, **settings})
    return train_exits(model or w.copy("encoder"), *rows, w / out, labels=labels, settings=settings)


def trained(place, says, wrong, right, **options):
    """An entry of a training that is refused, and of the one that the message describes."""
    return corrected(
        place,
        wrong if callable(wrong) else lambda w: train(w, **wrong),
        says,
        right if callable(right) else lambda w: train(w, **right),
        **options,
    )


def train_last(w, said):
    """Train a model with `loss="last"` first, and its heads on that."""
    train(w, out="first", loss="last")
    train(w, w / "first", loss="heads-only")


train_last.says = "`--loss last`, and `--loss heads-only` on its run folder"


def own(w, num_labels=3, labels=LABELS, exits=None, module=None, **settings):
    settings = TrainSettings(**{"epochs": 1, "heads_epochs": 1, "batch_size": 8, **settings})
    rows = [(x, label % num_labels) for x, label in pairs(16)]
    return train_exits(
        module or own_made(sequence), rows, rows[:8], w / "own", labels=labels[:num_labels], settings=settings
    )


def own_regression(w, num_outputs):
    from torch import nn

    module = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, num_outputs)).eval()
    rows = [(x, float(label)) for x, label in pairs(16)]
    train_exits(module, rows, rows[:8], w / "own", labels=(), settings=TrainSettings(epochs=1, heads_epochs=1))


def divide_own(w, loads=False, exits="own"):
    """Divide a module with the exits of a run folder, perhaps with the weights that it holds."""
    import torch
    from safetensors.torch import load_model

    if not (w / "own").exists():
        own(w)
    module = own_made(sequence)
    if loads:
        load_model(module, w / "own" / "model.safetensors")
    return offramp.divide(module, torch.randn(2, 8), w / "store", exits=w / exits)


def without_labels(w):
    own(w)
    w.edit_json("own/train.json", lambda tree: {"x": 1})


def divide_again(w, said):
    shutil.rmtree(w / "own")
    own(w)


divide_again.says = "`train_exits` into that folder again"


def decoder(w):
    """A decoder without a token for padding."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(vocab_size=15, n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    GPT2ForSequenceClassification(config).save_pretrained(w / "decoder")
    shutil.copy(w.copy("encoder") / "vocab.txt", w / "decoder")


def train_decoder(w):
    FolderModel(w / "decoder", 8)


def set_pad(w, said):
    w.edit_json("decoder/config.json", lambda tree: {**tree, "pad_token_id": 0})


set_pad.says = "pad_token_id is set"


def torn(w):
    from safetensors.torch import load_file, save_file

    path = w.copy("encoder") / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, path, {"format": "pt"})


def restore(*names):
    def act(w, said):
        for name in names:
            shutil.copy(w.made.encoder / name, w.copy("encoder") / name)

    act.says = f"{' and '.join(names)} of the checkpoint again"
    return act


def unsavable(w):
    import transformers

    failing(transformers.PretrainedConfig, "save_pretrained", ValueError("the key such cannot be saved"))(w)


def full_folder(w):
    """Write checkpoints, as torch reports a full disk while it does."""
    with folders.run_folder(w / "made", {"epochs": 3}):
        if (w / "full").exists():
            raise RuntimeError("inline_container: no space")


def free(w, said):
    (w / "full").unlink()


free.says = "the fault is taken away"


def waiting(w):
    w.patch(folders, "_WAIT_SECONDS", 0)
    return folders.await_folder(w / "made")


def look(w, said):
    """The output of the first process says why; here it was not started."""
    with folders.run_folder(w / "made", {"epochs": 3}):
        folders.await_folder(w / "made")


look.says = "the first process is started"


def transcript(place, change, says="write the transcript again: offramp eval --transcript"):
    """An entry of a transcript that is spoilt, and written again."""
    return Entry(place, spoilt(change, f"{TUNE} --latency 1s"), says, write_again)


def write_again(w, said):
    """What `offramp eval --transcript` writes: here it is put back."""
    shutil.rmtree(w / "transcripts")
    w.copy("transcripts")


write_again.says = "`offramp eval --transcript` writes it again"


def in_transcripts(name, change):
    def spoil(w):
        path = w.copy("transcripts") / name
        path.write_bytes(change(path.read_bytes()))

    return spoil


def described(change):
    return in_transcripts("tune.json", lambda data: json.dumps(change(json.loads(data))).encode())


def tensors(change):
    """Change the tensors of a transcript, and their description with them."""

    def spoil(w):
        from hashlib import sha256

        from safetensors.numpy import load, save

        folder = w.copy("transcripts")
        data = save(change(load((folder / "tune.safetensors").read_bytes())))
        (folder / "tune.safetensors").write_bytes(data)
        w.edit_json(
            "transcripts/tune.json",
            lambda tree: {**tree, "file": {**tree["file"], "bytes": len(data), "sha256": sha256(data).hexdigest()}},
        )

    return spoil


def certified(w, said):
    """A larger loss, a smaller confidence, or more samples."""
    w.undo()
    tune(w, Goal(max_drop=50.0, confidence=0.5), certify_on=certify(w))


certified.says = "a larger `--max-drop` and a smaller `--confidence`"


def nothing_passes(w):
    w.patch(tuning, "certify", lambda rows, epsilon, delta, method: -1)


def few(w, num, **goal):
    return tune(w, Goal(**{"max_drop": 0.5, **goal}), certify_on=certify(w, num=num))


def certify_as_said(w, said):
    """Follow each of the ways that the message names."""
    remedy = said.rpartition(" - ")[2]
    for drop in re.findall(r"--max-drop ([\d.]+)", remedy):
        few(w, 459, max_drop=float(drop))
    few(w, int(re.search(r"certify on (\d+) rows", remedy)[1]))
    few(w, int(re.search(r"--method ltt, which needs no more than (\d+)", remedy)[1]), method="ltt")


certify_as_said.says = "each way that the message names"


def certified_on(w, first):
    """Certify on 60 rows, the first of them the number `first` of rows of which 60 are tuned on."""
    on = (with_rows(make_transcript(w.folder, num=60), np.arange(60, dtype=np.uint64), row_salt="ab"),)
    rows_N = np.arange(first, first + 60, dtype=np.uint64)
    return tune(w, Goal(max_drop=30), *on, with_rows(certify(w, num=60), rows_N, row_salt="ab"))


def with_training_rows(w, are_included, accepts):
    """Tune on rows of which some were trained on, or were left out."""
    known = {"training_rows": 40, "includes_training_rows": are_included}
    goal = Goal(latency_seconds=0.07, include_training_rows=accepts)
    return tune(w, goal, with_rows(make_transcript(w.folder, num=60), **known))


def scored(line):
    """Score the run folder on a table of texts that no training has seen, or on the rows of its own."""

    def work(w):
        for name, rows in (("seen.tsv", examples(16)), ("new.tsv", [("of of the " * n, n % 3) for n in range(1, 20)])):
            (w / name).write_text("sentence\tlabel\n" + "".join(f"{text}\t{LABELS[label]}\n" for text, label in rows))
        w.run(f"eval run --max-length 16 {line}")

    return work


def trained_on_a_table(w, said):
    """Train on a table, and score the model on splits that were cut in the same way."""
    lines = (f"red rose of row {number}\tred\n" if number % 2 else f"sky {number}\tblue\n" for number in range(90))
    (w / "all.tsv").write_text("sentence\tlabel\n" + "".join(lines))
    w.run(f"train encoder --train all.tsv --split-seed 3 --out made {QUICK}")
    w.run("eval made --train all.tsv --split-seed 3 --split tune,certify,dev")


trained_on_a_table.says = "the options of the training are given"


def own_with_nan(w, num_bad):
    rows = [(x * float("nan") if number < num_bad else x, label) for number, (x, label) in enumerate(pairs(16))]
    settings = TrainSettings(epochs=1, heads_epochs=1, batch_size=8)
    return train_exits(own_made(sequence), rows, rows[8:], w / "own", labels=LABELS, settings=settings)


def named_goal(name):
    def act(w, said):
        text = said.rpartition(f"--{name} ")[2].split()[0]
        tune(w, Goal(**{f"{name}_seconds": parse_duration(text)}))

    act.says = f"the {name} that the message names"
    return act


ONE, TWO = ("a", "b"), ("c", "d")


def same_cut(w, here):
    """Evaluate with a cut of the data, after a training with seed 0."""
    (w / "cut").mkdir(exist_ok=True)
    (w / "cut/train.json").write_text(json.dumps({"data": {"task": "mine", "split_seed": 0, "cuts_dev": True}}))
    require_same_cut(w / "cut", {"task": "mine", "split_seed": here, "cuts_dev": True}, ["dev"])


def profile(w, batch):
    from offramp.experiments import worker
    from offramp.experiments.jobs import WorkerJob
    from offramp.runtime.config import EngineConfig

    job = WorkerJob("profile", str(w.store), EngineConfig(batch=batch, threads=1, max_length=8))
    return worker._profile(job)


def existing_transcript(folder):
    def write(w):
        from tests.store.test_transcript import arrays, write

        if not (w / "t").exists():
            write(w / "t", arrays())
        write(w / folder, arrays(1))

    return write


def removed(w, said):
    for path in (w / "t").iterdir():
        path.unlink()


removed.says = "it is removed"


TABLE = [
    goal(
        "experiments/tuning.py: no goal",
        "give --latency, --max-drop or --deadline",
        {},
        {"latency_seconds": 1},
        {"max_drop": 1},
        {"deadline_seconds": 1},
    ),
    goal(
        "experiments/tuning.py: two goals",
        "give --latency or --max-drop",
        {"latency_seconds": 1, "max_drop": 1},
        {"latency_seconds": 1},
        {"max_drop": 1},
    ),
    goal(
        "experiments/tuning.py: no drop can be certified",
        "give --max-drop or --deadline",
        {"deadline_seconds": 1, "max_drop": 1},
        {"deadline_seconds": 1},
        {"max_drop": 1},
    ),
    corrected(
        "experiments/tuning.py: no certify split",
        lambda w: tune(w, Goal(max_drop=5), certify_on=make_transcript(w.folder)),
        "offramp eval --split tune,certify",
        lambda w: tune(w, Goal(max_drop=5), certify_on=certify(w)),
    ),
    labels(
        "experiments/evaluation.py: the model gives several labels",
        "score another model",
        (ONE, MULTI, ONE),
        (ONE, SINGLE, ONE),
    ),
    labels(
        "experiments/evaluation.py: the model is {}, the data",
        "take a model of this task",
        (ONE, REGRESSION, ("x",)),
        (ONE, SINGLE, ONE),
    ),
    labels(
        "experiments/evaluation.py: the model gives {} values",
        "score another model",
        ((), REGRESSION, ONE),
        ((), REGRESSION, ("x",)),
    ),
    labels(
        "experiments/evaluation.py: the model's labels are",
        "take a model of this task",
        (TWO, SINGLE, ONE),
        (ONE, SINGLE, ONE),
    ),
    instead(
        "experiments/evaluation.py: the model has no classification head",
        "eval encoder --train mine.tsv",
        "offramp train gives it one",
        TRAIN,
        "eval made --train mine.tsv",
        slow=True,
    ),
    corrected(
        "training/pipeline.py: no examples to",
        lambda w: train_exits(w.copy("encoder"), [], [], w / "made", labels=ONE),
        "pass at least one",
        TRAIN,
        slow=True,
    ),
    *(
        Entry(
            "experiments/tuning.py: a {} of {} is below the first exit",
            lambda w, name=name: tune(w, Goal(**{f"{name}_seconds": 1e-4})),
            "is about the smallest that works",
            named_goal(name),
            again=False,
        )
        for name in ("latency", "deadline")
    ),
    corrected(
        "experiments/tuning.py: the certify split is of another",
        lambda w: tune(
            w,
            Goal(max_drop=0.5),
            certify_on=dataclasses.replace(
                t := make_transcript(w.folder), about=dataclasses.replace(t.about, split="certify")
            ),
        ),
        "write both at once: offramp eval --split tune,certify",
        lambda w: tune(w, Goal(max_drop=5), certify_on=certify(w)),
    ),
    Entry(
        "experiments/tuning.py: {} points cannot be certified",
        lambda w: few(w, 459),
        "give --max-drop",
        certify_as_said,
        again=False,
    ),
    Entry(
        "experiments/tuning.py: {} points cannot be certified",
        lambda w: few(w, 5),
        "certify on",
        certify_as_said,
        again=False,
    ),
    corrected(
        "experiments/tuning.py: {} rows of the certify split",
        lambda w: certified_on(w, 59),
        "write both at once: offramp eval --split tune,certify",
        lambda w: certified_on(w, 60),
    ),
    corrected(
        "experiments/tuning.py: the model was trained on",
        lambda w: with_training_rows(w, True, False),
        "write the transcript without --include-training-rows, or give it here too",
        lambda w: (with_training_rows(w, False, False), with_training_rows(w, True, True)),
    ),
    corrected(
        "experiments/tuning.py: the model has one exit",
        lambda w: tune(
            w, Goal(1), make_transcript(w.folder, logits=lambda logits_KNC: logits_KNC[-1:]), profile=make_profile(1)
        ),
        "train exits: offramp train",
        lambda w: tune(w, Goal(1)),
    ),
    corrected(
        "experiments/tuning.py: texts with several labels",
        lambda w: tune(w, Goal(1), make_transcript(w.folder, problem=MULTI)),
        "name a policy",
        lambda w: parse("confidence:0.9").check(4, MULTI),
    ),
    corrected(
        "experiments/tuning.py: the profile has {} exits",
        lambda w: tune(w, Goal(1), profile=make_profile(3)),
        "take the profile and the transcript of one store",
        lambda w: tune(w, Goal(1)),
    ),
    Entry(
        "experiments/tuning.py: no {}",
        spoilt(nothing_passes, lambda w: tune(w, Goal(max_drop=0.5), certify_on=certify(w))),
        "allow a larger --max-drop, a smaller --confidence, or certify on more",
        certified,
    ),
    corrected(
        "experiments/trials.py: {}",
        lambda w: tune(w, Goal(1), make_transcript(w.folder, logits=poisoned)),
        "train the exits again",
        lambda w: tune(w, Goal(1)),
    ),
    *unlike(
        "training/folders.py: target exists and is not a run folder",
        lambda w: (w / "made" / "x").mkdir(parents=True),
        is_finished,
        "made",
    ),
    *unlike(
        "training/folders.py: the folder contains other files",
        lambda w: (w / "made.partial" / "x").mkdir(parents=True),
        folder,
        "made.partial",
    ),
    *unlike("training/folders.py: the folder belongs to another configuration", other_run, is_finished, "made"),
    Entry(
        "training/folders.py: no space left",
        spoilt(lambda w: (w / "full").touch(), full_folder),
        "free some space and run again",
        free,
        simulates="disk space",
    ),
    Entry(
        "training/folders.py: the first process did not",
        waiting,
        "see its output",
        look,
        again=False,
        simulates="processes",
    ),
    trained(
        "training/trainer.py: float16 needs a GPU",
        "use bfloat16 or float32",
        {"precision": "float16"},
        lambda w: (train(w, precision="bfloat16"), train(w, out="other", precision="float32")),
    ),
    trained(
        "training/trainer.py: cannot report to",
        "installed integrations:",
        {"report_to": "carrier-pigeon"},
        {"report_to": "none"},
    ),
    trained(
        "training/loss.py: {} of exit {} is not finite",
        "lower the learning rate",
        {"learning_rate": 1e30, "batch_size": 4, "head_learning_rate": 1e30, "warmup": 0.0},
        {"learning_rate": 1e-4, "batch_size": 4, "warmup": 0.0},
    ),
    trained(
        "training/subjects.py: max_length {} exceeds",
        "use a smaller max_length",
        {"max_length": 25},
        {"max_length": 16},
    ),
    Entry(
        "training/subjects.py: no tokenizer",
        spoilt(lambda w: (w.copy("encoder") / "vocab.txt").unlink(), train),
        "copy the tokenizer's files to the model's folder",
        restore("vocab.txt"),
    ),
    Entry(
        "training/subjects.py: texts of this model cannot be padded",
        spoilt(decoder, train_decoder),
        "set it, to eos_token_id",
        set_pad,
    ),
    Entry(
        "training/subjects.py: {} tensors of the encoder",
        spoilt(torn, train),
        "download the checkpoint again",
        restore("model.safetensors"),
    ),
    Entry(
        "training/job.py: the labels of the model are",
        lambda w: train(w, w.copy("run"), loss="heads-only", labels=("a", "b", "c")),
        "train a model with --loss last first",
        train_last,
        again=False,
    ),
    Entry(
        "training/job.py: heads-only keeps the model",
        lambda w: train(w, loss="heads-only"),
        "train a model with --loss last first",
        train_last,
        again=False,
    ),
    Entry(
        "training/job.py: the model cannot be saved",
        spoilt(unsavable, train),
        "change what it names before training",
        undo,
    ),
    trained(
        "training/subjects.py: the output of the module has shape",
        "pass one label per logit",
        lambda w: own(w, 2),
        lambda w: own(w, 3),
    ),
    trained(
        "training/subjects.py: the output of the module has shape",
        "return one value per row",
        lambda w: own_regression(w, 2),
        lambda w: own_regression(w, 1),
    ),
    trained(
        "training/subjects.py: heads of the form",
        "use mean-linear",
        lambda w: own(w, heads="own"),
        lambda w: own(w, heads="mean-linear"),
    ),
    trained(
        "division/modules.py: no run folder with exits",
        "train them with train_exits",
        lambda w: divide_own(w, exits="none"),
        lambda w: divide_own(w, loads=True),
    ),
    trained(
        "division/modules.py: the exits were trained with other weights",
        "safetensors.torch.load_model(module,",
        divide_own,
        lambda w: divide_own(w, loads=True),
    ),
    Entry(
        "division/modules.py: {} does not name the labels",
        spoilt(without_labels, lambda w: divide_own(w, loads=True)),
        "train the exits again",
        divide_again,
    ),
    Entry(
        "store/transcript.py: no transcript of split",
        spoilt(
            lambda w: (w.copy("transcripts") / "tune.json").unlink() or (w / "transcripts/tune.safetensors").unlink(),
            f"{TUNE} --latency 1s",
        ),
        "offramp eval --split tune --transcript DIR",
        write_again,
    ),
    transcript(
        "store/transcript.py: sha256 differs", in_transcripts("tune.safetensors", lambda data: data[:-1] + b"?")
    ),
    transcript("store/transcript.py: {}", in_transcripts("tune.safetensors", lambda data: data[:-1])),
    transcript("store/transcript.py: transcript of format", described(lambda tree: {**tree, "format": 99})),
    transcript("store/transcript.py: not a description", described(lambda tree: {})),
    transcript("store/transcript.py: this is the transcript", described(lambda tree: {**tree, "split": "dev"})),
    transcript("store/transcript.py: labels: {}", described(lambda tree: {**tree, "labels": ["a"]})),
    transcript(
        "store/transcript.py: tensor {} has a value", tensors(lambda all: {**all, "labels": all["labels"] + 99})
    ),
    transcript("store/transcript.py: tensor {} is missing", tensors(lambda all: {"x": all["labels"]})),
    transcript("store/transcript.py: tensors of shapes", tensors(lambda all: {**all, "labels": all["labels"][:-1]})),
    corrected(
        "experiments/held_out.py: the data are split differently",
        lambda w: same_cut(w, 3),
        "give --train, --dev and --split-seed as in training",
        lambda w: same_cut(w, 0),
    ),
    corrected(
        "experiments/worker.py: a profile is of a fixed number",
        lambda w: profile(w, "bulk"),
        "give --batch 8, or another",
        lambda w: profile(w, 8),
        slow=True,
    ),
    corrected(
        "store/transcript.py: target exists",
        existing_transcript("t"),
        "choose another folder",
        existing_transcript("u"),
    ),
    Entry("store/transcript.py: target exists", existing_transcript("t"), "or remove it", removed),
    *(
        Entry(
            "experiments/held_out.py: {} of {} rows of {} were trained on",
            scored("--dev seen.tsv"),
            "give --train, --dev and --split-seed as in training, or other data, or --include-training-rows",
            act,
            again=False,
        )
        for act in (
            trained_on_a_table,
            said_by(scored("--dev new.tsv"), "other data"),
            said_by(scored("--dev seen.tsv --include-training-rows"), "`--include-training-rows`"),
        )
    ),
    trained(
        "training/loss.py: input {} has NaN",
        "replace these numbers in the data, or drop their rows",
        lambda w: own_with_nan(w, 1),
        lambda w: own_with_nan(w, 0),
    ),
]

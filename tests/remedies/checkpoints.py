"""Remedies of the room checkpoints: model folders, the hub, config.json, pickles, exits beside a model."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file

from offramp.checkpoints import hub
from offramp.checkpoints.checkpoint import load_classifier
from offramp.checkpoints.source import open_source, read_training
from offramp.division.names.build import divide_by_names
from offramp.program.program import Texts
from offramp.tasks.model_files import ModelFiles
from tests.remedies.entries import Entry, closed, corrected, said_by
from tests.remedies.store import failing, os_error, spoilt, undo
from tests.remedies.tasks import copy_vocabulary, save_fast, tokenizer_files

DIVIDE = "divide model another"


def of_characters(w):
    """The tokenizer of one class, and the name of another one, which reads characters."""
    save_fast(w, "")
    (w.model / "vocab.txt").unlink(missing_ok=True)
    (w.model / "tokenizer_config.json").write_text('{"tokenizer_class": "CanineTokenizer"}')


def remove_tokenizer(w, said):
    """`rm tokenizer.json`"""
    (w.model / "tokenizer.json").unlink()


def restore(*names):
    """Put files of the whole model back."""

    def act(w, said):
        for name in names:
            shutil.copy(w.made.model / name, w.model / name)

    act.says = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} put back whole"
    return act


def spoil_file(name, content):
    return lambda w: (w.model / name).write_bytes(content)


def file(place, name, content, says, act=None, work=DIVIDE):
    """An entry of a file of a model that is replaced by other bytes, and put back."""
    return Entry(place, spoilt(spoil_file(name, content), work), says, act or restore(name))


def config(place, says, wrong, right, work=DIVIDE, act=None):
    """An entry of a key of config.json; with the method that the remedy names, or another value."""

    def mend(w, said):
        w.edit_json("model/config.json", lambda tree: {**tree, **right})

    mend.says = f"config.json is corrected: {json.dumps(right)}"
    return Entry(
        place,
        spoilt(lambda w: w.edit_json("model/config.json", lambda tree: {**tree, **wrong}), work),
        says,
        act or mend,
    )


def removed(*names):
    return lambda w: [(w.model / name).unlink() for name in names]


def moved(name, *targets):
    """Rename a file of the model to the first target; further targets are copies of config.json."""

    def spoil(w):
        (w.model / targets[0]).parent.mkdir(exist_ok=True)
        (w.model / name).rename(w.model / targets[0])
        for each in targets[1:]:
            shutil.copy(w.model / "config.json", w.model / each)

    return spoil


def renamed(name, target):
    return said_by(moved(name, target), f"{name} is renamed to {target}")


def index_of_one(w, said):
    """Write the index that the message names."""
    names = load_file(w.model / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (w.model / "model.safetensors.index.json").write_text(json.dumps(index))


index_of_one.says = "the index is put there"


def in_place_of(name):
    """Put a pipe in the place of a file."""

    def spoil(w):
        (w.model / name).unlink(missing_ok=True)
        os.mkfifo(w.model / name)

    return spoil


def put_back(name):
    """Replace a pipe by the file."""

    def act(w, said):
        (w.model / name).unlink()
        restore(name)(w, said)

    act.says = f"{name} is put in the place of the pipe"
    return act


def save(w, tree, **options):
    (w.model / "model.safetensors").unlink(missing_ok=True)
    torch.save(tree, w.model / "pytorch_model.bin", **options)


def pickled(change=lambda tensors: tensors, **options):
    """Replace the weights by a pickle."""
    return lambda w: save(w, change(load_file(w.model / "model.safetensors")), **options)


def save_state(w, said):
    save(w, load_file(w.made.model / "model.safetensors"))


save_state.says = "`torch.save(model.state_dict(), ...)`"


def convert(w, said):
    """Run the command that the message names, in the folder of the model."""
    import os
    import subprocess
    import sys

    code = said.partition("python -c ")[2].strip()
    subprocess.run(f"{sys.executable} -c {code}", shell=True, check=True, cwd=w.model, env=os.environ)


convert.says = "the command that the message names, in the folder"


def by_names(w):
    with open_source(w.model) as source:
        from offramp.division.config import DivideConfig

        return divide_by_names(source, w / "another", DivideConfig(method="names"))


def explained(error, offline=False):
    """Let the download fail."""

    def spoil(w):
        import huggingface_hub

        failing(huggingface_hub, "snapshot_download", error() if callable(error) else error)(w)
        w.patch(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)

    return spoil


def hub_error(name):
    def make():
        from huggingface_hub import errors

        kind = getattr(errors, name)
        return kind.__new__(kind)

    return make


def arrived(w, said):
    """The download works: it gives a folder."""
    import huggingface_hub

    w.undo()
    w.patch(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(w.model))
    w.patch(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


arrived.says = "the download works again"


def from_hub(w):
    return hub.resolve("acme/tiny")


def hubbed(what, says, error, act=arrived, offline=False, **options):
    """An entry of a download that fails."""
    work = spoilt(explained(error, offline), from_hub)
    return Entry(f"checkpoints/hub.py: {what}", work, says, act, simulates="network", **options)


def record_download(w, said):
    (w.model / "offramp_downloads.json").write_bytes(b"[]")


record_download.says = "the folder is put back whole"


def remove_download(w, said):
    (w.model / "offramp_downloads.json").unlink()


remove_download.says = "`rm offramp_downloads.json`"


WHOLE = said_by(lambda w: w.run("divide model another"), "a folder is given")


def poisoned(broken):
    """Classify rows with a model whose head gives infinite numbers, as a training that diverged leaves it."""

    def work(w):
        from offramp.checkpoints.checkpoint import predict
        from offramp.checkpoints.exits import ModelWithExits
        from offramp.tasks import TextEncoder
        from offramp.tasks.rows import encode_rows
        from tests.training.tiny import examples, make_model

        folder = w.copy("encoder")
        model = ModelWithExits(make_model("bert"))
        if broken:
            torch.nn.init.constant_(model.heads[1].exit.bias, float("inf"))
        spec = Texts(15, 24, 2, 0)
        return predict(
            model, encode_rows(examples(5), TextEncoder.from_folder(folder, spec, 16), spec, is_regression=False), 2
        )

    return work


def hidden(w, with_features):
    from offramp.checkpoints.checkpoint import predict_windows
    from offramp.tasks.arrays import Record
    from offramp.tasks.rows import ArrayRows

    class Plain(torch.nn.Module):
        def forward(self, x):
            return SimpleNamespace(logits=x[:, :2])

    class Hiding(Plain):
        def forward(self, x, output_hidden_states=False):
            return super().forward(x)

    rows = ArrayRows([Record.of({"x": torch.ones(3)})] * 2, torch.zeros(2, dtype=torch.int64).numpy())
    return list(predict_windows(Hiding(), rows, 2, with_features=with_features))


def with_nan(w, *numbers):
    """Classify rows of one number each."""
    from offramp.checkpoints.checkpoint import predict
    from offramp.tasks.arrays import Record
    from offramp.tasks.rows import ArrayRows

    class Plain(torch.nn.Module):
        def forward(self, x):
            return SimpleNamespace(logits=x.expand(-1, 2))

    records = [Record.of({"x": torch.tensor([number])}) for number in numbers]
    return predict(Plain(), ArrayRows(records, np.zeros(len(records), np.int64)), 2)


def vision(w):
    """A model of images without its image processor."""
    from tests.tiny_vision import write_model

    write_model(w / "vit", "vit")
    (w / "vit/preprocessor_config.json").rename(w / "elsewhere.json")


def copy_processor(w, said):
    (w / "elsewhere.json").rename(w / "vit/preprocessor_config.json")


copy_processor.says = "the file is copied there"


def facts(w):
    from offramp.checkpoints.inputs import facts_of

    return facts_of(w / "vit")


def images_for_texts(w, item):
    from offramp.checkpoints.inputs import Facts, rows_of

    (w / "vision").mkdir(exist_ok=True)
    (w / "vision/preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    return rows_of(
        w / "vision", Facts("single_label_classification", ("a", "b"), 2, 8, 1), [(item(w), 0)], 1, False, print
    )


def picture(w):
    from offramp.tasks.images import images_at

    return images_at(w.copy("images"))[0]


def training(w):
    """Read what a run folder says of its training."""

    return read_training(w.model)


def without_training(w, said):
    (w.model / "train.json").unlink()


without_training.says = "the file is removed"


def without_a_bias(w):
    from safetensors.numpy import load_file, save_file

    path = w.model / "model.safetensors"
    tensors = load_file(path)
    del tensors["classifier.bias"]
    save_file(tensors, path, {"format": "pt"})


def with_header(header):
    return len(header).to_bytes(8, "little") + header


TABLE = [
    Entry(
        "checkpoints/source.py: {}: {}",
        spoilt(lambda w: (w.model / "train.json").write_text('{"max_length": -1}'), training),
        "remove the file",
        without_training,
    ),
    file("checkpoints/config.py: config.json: {}", "config.json", b'{"model_type": ["bert"]}', "get the file again"),
    Entry(
        "checkpoints/weights.py: file of more than",
        spoilt(lambda w: os.truncate(w.model / "config.json", (64 << 20) + 1), DIVIDE),
        "get the file again",
        restore("config.json"),
    ),
    file("checkpoints/weights.py: not JSON", "config.json", b"{", "get the file again"),
    file("checkpoints/weights.py: not a JSON object", "config.json", b"[]", "get the file again"),
    file(
        "checkpoints/weights.py: {} in place of the file",
        "model.safetensors",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "run `git lfs pull` in its folder",
    ),
    file(
        "checkpoints/weights.py: {} in place of the file",
        "model.safetensors",
        b"<!DOCTYPE html><html></html>",
        "download the file itself",
    ),
    file(
        "checkpoints/weights.py: {} in place of the file",
        "model.safetensors",
        b'\n{"error":"Repository not found"}',
        "download the file itself",
    ),
    Entry(
        "checkpoints/weights.py: a file of torch.save",
        spoilt(lambda w: (pickled()(w), moved("pytorch_model.bin", "model.safetensors")(w)), DIVIDE),
        "rename it to pytorch_model.bin",
        renamed("model.safetensors", "pytorch_model.bin"),
    ),
    Entry(
        "checkpoints/pickled.py: a file of safetensors",
        spoilt(moved("model.safetensors", "pytorch_model.bin"), DIVIDE),
        "rename it to model.safetensors",
        renamed("pytorch_model.bin", "model.safetensors"),
    ),
    file(
        "store/safetensors.py: file ends inside its header",
        "model.safetensors",
        b"\0" * 64,
        "download or write the file again",
    ),
    Entry(
        "checkpoints/weights.py: no such file",
        spoilt(
            lambda w: (
                (w.model / "model.safetensors").rename(w.model / "x"),
                (w.model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors"}}'),
            ),
            DIVIDE,
        ),
        "get the whole model again",
        restore("model.safetensors"),
    ),
    Entry(
        "checkpoints/weights.py: index has no weight_map",
        spoilt(
            lambda w: (
                (w.model / "model.safetensors").unlink(),
                (w.model / "model.safetensors.index.json").write_text("{}"),
            ),
            DIVIDE,
        ),
        "get the file again",
        restore("model.safetensors"),
    ),
    Entry(
        "checkpoints/weights.py: index names the file",
        spoilt(
            lambda w: (
                (w.model / "model.safetensors").unlink(),
                (w.model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'),
            ),
            DIVIDE,
        ),
        "it must be a path in this folder that ends in .safetensors",
        restore("model.safetensors"),
    ),
    Entry(
        "checkpoints/weights.py: cannot be read",
        spoilt(
            failing(
                __import__("os"),
                "open",
                os_error("EACCES"),
                lambda path, *rest, **more: str(path).endswith("model.safetensors"),
            ),
            DIVIDE,
        ),
        "put a file there that can be read",
        undo,
        simulates="permission",
    ),
    Entry(
        "tasks/model_files.py: file cannot be read",
        spoilt(in_place_of("vocab.txt"), lambda w: ModelFiles(w.model).read("vocab.txt")),
        "put a file there that can be read",
        put_back("vocab.txt"),
    ),
    closed("experiments/evaluation.py: the store was replaced while it was read", "torn", "run again"),
    Entry(
        "checkpoints/source.py: a pipe, a device or a socket",
        spoilt(in_place_of("merges.txt"), DIVIDE),
        "remove it",
        said_by(removed("merges.txt"), "it is removed"),
    ),
    Entry(
        "checkpoints/source.py: a pipe, a device or a socket",
        spoilt(in_place_of("vocab.txt"), DIVIDE),
        "put the file itself there",
        put_back("vocab.txt"),
    ),
    corrected(
        "errors.py: not a folder | no such {}",
        lambda w: open_source(w / "none"),
        "give a folder with config.json and weights",
        DIVIDE,
    ),
    Entry(
        "checkpoints/source.py: not a model folder: no {}",
        spoilt(
            lambda w: (w.copy("model"), (w / "outer").mkdir(), w.model.rename(w / "outer" / "inner")),
            "divide outer another",
        ),
        "name one of its folders: inner",
        said_by("divide outer/inner another", "that folder is given"),
        again=False,
    ),
    Entry(
        "checkpoints/files.py: not a model folder: no {}, no {}, and no index of either [without_weights 2]",
        spoilt(removed("model.safetensors"), DIVIDE),
        "save the model as safetensors",
        restore("model.safetensors"),
    ),
    Entry(
        "checkpoints/files.py: {}: its weights are for {}",
        spoilt(moved("model.safetensors", "tf_model.h5"), DIVIDE),
        "save the model with PyTorch as safetensors",
        restore("model.safetensors"),
    ),
    Entry(
        "checkpoints/files.py: not a model folder: no {}, no {}, and no index of either [without_weights 1]",
        spoilt(moved("model.safetensors", "inner/model.safetensors", "inner/config.json"), DIVIDE),
        "name one of its folders: inner",
        "divide model/inner another",
        again=False,
    ),
    Entry(
        "checkpoints/files.py: {}, but {}, a part",
        spoilt(moved("model.safetensors", "model-00001-of-00001.safetensors"), DIVIDE),
        "get model.safetensors.index.json of the model, too",
        index_of_one,
    ),
    Entry(
        "checkpoints/files.py: {}, but {}",
        spoilt(moved("model.safetensors", "model.fp16.safetensors"), DIVIDE),
        "if that has the weights, rename it to model.safetensors",
        renamed("model.fp16.safetensors", "model.safetensors"),
    ),
    Entry(
        "checkpoints/files.py: {} is a link to a file that is not there",
        spoilt(
            lambda w: (removed("model.safetensors")(w), (w.model / "model.safetensors").symlink_to("../blobs/none")),
            DIVIDE,
        ),
        "get the whole model again",
        said_by(
            lambda w: (removed("model.safetensors")(w), restore("model.safetensors")(w, "")), "the file is put there"
        ),
    ),
    config(
        "checkpoints/source.py: transformers_weights in {} names",
        "and remove the key",
        {"transformers_weights": "other.safetensors"},
        {"transformers_weights": None},
    ),
    Entry(
        "checkpoints/source.py: exits without",
        spoilt(removed("exits.json"), DIVIDE),
        "get the whole run folder again",
        restore("exits.json"),
    ),
    Entry(
        "checkpoints/source.py: exits without",
        spoilt(removed("exits.json"), DIVIDE),
        "or remove the other",
        said_by(removed("exits.safetensors"), "the other is removed"),
    ),
    config(
        "checkpoints/source.py: the weights are quantised",
        "divide the model that was quantised",
        {"quantization_config": {"quant_method": "gptq"}},
        {"quantization_config": None},
    ),
    corrected(
        "errors.py: not a folder | no such {}",
        "divide model/config.json another",
        "give a folder with config.json and weights",
        DIVIDE,
    ),
    Entry(
        "errors.py: not a folder | no such {}",
        spoilt(explained(RuntimeError), "divide ./none another"),
        "or the id of a model on the hub",
        said_by(lambda w: (arrived(w, ""), w.run("divide acme/tiny another")), "the id of a model on the hub"),
        again=False,
        simulates="network",
    ),
    Entry(
        "errors.py: {} ({})",
        spoilt(explained(os_error("ENOSPC")), from_hub),
        "free some space and run again",
        arrived,
        simulates="disk space",
    ),
    *(
        Entry(
            "checkpoints/downloads.py: not the downloads of a model",
            spoilt(spoil_file("offramp_downloads.json", b"{}"), DIVIDE),
            says,
            act,
        )
        for says, act in (("get the folder again", record_download), ("or remove the file", remove_download))
    ),
    hubbed("neither a folder nor a model", "check the spelling", hub_error("RepositoryNotFoundError")),
    hubbed("the model on the hub has no such revision", "check what follows the @", hub_error("RevisionNotFoundError")),
    hubbed("model is gated", "accept its terms on the hub", hub_error("GatedRepoError")),
    hubbed(
        "no such folder, nor in the cache",
        "run once without --offline",
        hub_error("LocalEntryNotFoundError"),
        offline=True,
    ),
    hubbed("no such folder, and the hub", "check the network, or give", hub_error("LocalEntryNotFoundError")),
    hubbed("no such folder, and the hub", "or give a folder", hub_error("LocalEntryNotFoundError"), WHOLE, again=False),
    hubbed("download failed", "try again, or give a folder", RuntimeError("broken")),
    Entry(
        "checkpoints/pickled.py: not a zip file",
        spoilt(pickled(_use_new_zipfile_serialization=False), DIVIDE),
        "convert it in its folder",
        convert,
    ),
    Entry(
        "checkpoints/pickled.py: pickle cannot be read safely",
        spoilt(pickled(lambda tensors: {"a": print}), DIVIDE),
        "get the file again",
        save_state,
    ),
    Entry(
        "checkpoints/pickled.py: pickle holds a {}",
        spoilt(pickled(lambda tensors: [1]), DIVIDE),
        "save model.state_dict() alone",
        save_state,
    ),
    Entry(
        "checkpoints/pickled.py: pickle holds tensors of {}, most of which share memory",
        spoilt(
            pickled(lambda tensors: {**tensors, **dict.fromkeys(map(str, range(99)), torch.zeros(1 << 20))}), DIVIDE
        ),
        "save each as tensor.clone()",
        save_state,
    ),
    Entry(
        "checkpoints/pickled.py: pickle holds {}, which",
        spoilt(pickled(lambda tensors: {**tensors, "epoch": 3}), DIVIDE),
        "save model.state_dict() alone",
        save_state,
    ),
    config(
        "checkpoints/config.py: {} is {}: {}",
        "number the labels from 0 to 2 in id2label",
        {"id2label": {"1": "a", "2": "b", "3": "c"}},
        {"id2label": {"0": "a", "1": "b", "2": "c"}},
    ),
    config(
        "checkpoints/config.py: {} is {}: {}",
        "number the labels from 0 in id2label",
        {"id2label": {"x": "a"}},
        {"id2label": {"0": "a", "1": "b", "2": "c"}},
    ),
    config(
        "checkpoints/config.py: {} is {}: {}",
        "set problem_type to one of them, or to null",
        {"problem_type": "odd"},
        {"problem_type": None},
    ),
    config(
        "checkpoints/config.py: {} is {}: {}",
        "divide a model of a supported form",
        {"id2label": {}},
        {"id2label": {"0": "a", "1": "b", "2": "c"}},
    ),
    Entry(
        "checkpoints/config.py: {} is {}: {}",
        spoilt(
            lambda w: w.edit_json("plain/config.json", lambda tree: {**tree, "hidden_act": "mish"}),
            "divide plain another --method names",
        ),
        "divide with --method eager, or ",
        said_by("divide plain another --method eager", "`--method eager`"),
        again=False,
    ),
    Entry(
        "checkpoints/checkpoint.py: the exits were never trained",
        spoilt(
            lambda w: w.edit_json("model/exits.json", lambda tree: {**tree, "trained": False}),
            lambda w: load_classifier(w.model),
        ),
        "train them, or remove their two files",
        said_by(removed("exits.json", "exits.safetensors"), "their two files are removed"),
    ),
    Entry(
        "checkpoints/checkpoint.py: exits cannot be read",
        spoilt(spoil_file("exits.safetensors", b"no"), lambda w: load_classifier(w.model)),
        "train the exits again",
        restore("exits.safetensors"),
    ),
    corrected(
        "checkpoints/checkpoint.py: output of exit {} is not finite",
        poisoned(True),
        "lower the learning rate",
        poisoned(False),
    ),
    corrected(
        "checkpoints/checkpoint.py: a {} returns no hidden states",
        lambda w: hidden(w, True),
        "leave out --features",
        lambda w: hidden(w, False),
    ),
    config(
        "checkpoints/config.py: {}, and transformers 5 ignores",
        "use a model of absolute positions",
        {"position_embedding_type": "relative_key"},
        {"position_embedding_type": "absolute"},
        "divide model another --method names",
    ),
    config(
        "checkpoints/families.py: unknown architecture",
        "known are",
        {"model_type": "odd"},
        {"model_type": "bert"},
        "divide model another --method names",
    ),
    corrected(
        "checkpoints/inputs.py: the model takes images",
        lambda w: images_for_texts(w, lambda w: "a text"),
        "give a folder or a zip of images",
        lambda w: images_for_texts(w, picture),
    ),
    closed("checkpoints/inputs.py: a {} reads neither texts nor images", "research", "take another model"),
    closed("checkpoints/exits.py: {} was not called", "research", "exits need a model that always goes the same way"),
    closed("checkpoints/weights.py: file ends inside tensor", "torn", "get the file again"),
    corrected(
        "checkpoints/inputs.py: the stages of this store are no graphs",
        "eval eager --train mine.tsv --split dev --max-length 16",
        "divide with --method export",
        "eval export --train mine.tsv --split dev --max-length 16",
    ),
    corrected(
        "checkpoints/source.py: not a model folder: no {}",
        "divide images another",
        "give a folder with config.json and weights",
        DIVIDE,
    ),
    Entry(
        "checkpoints/checkpoint.py: {} tensors of the model are missing",
        spoilt(without_a_bias, lambda w: load_classifier(w.model)),
        "get the whole model again",
        restore("model.safetensors"),
    ),
    file(
        "checkpoints/checkpoint.py: transformers cannot load the model",
        "model.safetensors",
        with_header(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}') + bytes(4),
        "get the whole model again",
        work=lambda w: load_classifier(w.model),
    ),
    corrected(
        "checkpoints/checkpoint.py: an input has NaN",
        lambda w: with_nan(w, 1.0, float("nan"), 2.0),
        "replace these numbers, or drop the row",
        lambda w: (with_nan(w, 1.0, 0.0, 2.0), with_nan(w, 1.0, 2.0)),
    ),
    Entry(
        "checkpoints/inputs.py: no image processor (looked for",
        spoilt(vision, facts),
        "copy the file there",
        copy_processor,
    ),
    closed(
        "checkpoints/auto_tokenizer.py: the tokenizer of offramp", "unreachable", "save a tokenizer of another class"
    ),
    Entry(
        "checkpoints/auto_tokenizer.py: the tokenizer of offramp",
        spoilt(of_characters, DIVIDE),
        "remove tokenizer.json in a copy of the folder",
        remove_tokenizer,
    ),
    Entry(
        "checkpoints/auto_tokenizer.py: transformers makes a {} without a vocabulary",
        spoilt(tokenizer_files(tokenizer_config_dot_json='{"tokenizer_class": "BertTokenizer"}'), DIVIDE),
        "copy the tokenizer's files there",
        copy_vocabulary,
    ),
    closed("checkpoints/tokenizing.py: {}", "unreachable"),
]

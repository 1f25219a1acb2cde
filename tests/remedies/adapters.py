"""Remedies of adapters of peft: folders that hold changes of the weights of a model."""

import shutil

import pytest

from tests.remedies.entries import Entry, corrected
from tests.remedies.store import spoilt

BESIDE, ALONE = "an adapter lies beside the weights", "an adapter, without the model"
DIVIDE = "divide adapter another"


def saved(w, base, name="adapter", **changes):
    """Train, for no time at all, an adapter of a model, and save it. Returns its folder."""
    pytest.importorskip("peft")
    import transformers

    from tests.division.test_adapters import adapter_of

    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    adapter_of(model, w / name, **changes)
    return w / name


def of_plain(w):
    saved(w, w.copy("plain"))


def beside(w):
    """An adapter in the folder of its model."""
    saved(w, w.copy("plain"), "plain")


def without_peft(write):
    def spoil(w):
        write(w)
        w.without("peft")

    return spoil


def peft_again(w, said):
    w.undo()


peft_again.says = "peft is installed"


def remove_adapter(w, said):
    (w / "plain/adapter_config.json").unlink()


remove_adapter.says = "`rm adapter_config.json`"


def hidden(place, write, says, act, line):
    """An entry of an adapter where peft is not installed."""
    work = spoilt(without_peft(write), line)
    return Entry(f"checkpoints/source.py: {place}", work, says, act, simulates="library")


def describe(w, **changes):
    w.edit_json("adapter/adapter_config.json", lambda tree: {**tree, **changes})


def of_another(w):
    """An adapter whose description names a model of another width."""
    from tests.cli.conftest import write_tiny

    wide = write_tiny(w / "wide", exits=False, hidden_size=64, num_attention_heads=4, intermediate_size=96)
    saved(w, wide)
    describe(w, base_model_name_or_path=str(w.copy("plain")))


def name_the_model(w, said):
    describe(w, base_model_name_or_path=str(w / "wide"))


name_the_model.says = "base_model_name_or_path names its model"


def headless(w, **changes):
    """An adapter of a model without a head."""
    saved(w, w.copy("encoder"), **{"task_type": None, **changes})
    describe(w, task_type="SEQ_CLS")
    w.run(DIVIDE)


def prompts(w, kind):
    """An adapter that adds tokens to the input, or one that changes weights."""
    import transformers

    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(w.copy("plain"))
    if kind == "LoRA":
        of_plain(w)
    else:
        settings = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
        peft.get_peft_model(model, settings).save_pretrained(w / "adapter")
    w.run(DIVIDE)


def of_another_kind(w):
    """An adapter of a kind that peft merges by itself alone."""
    import transformers

    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(w.copy("plain"))
    settings = peft.MissConfig(task_type="SEQ_CLS", r=4, target_modules=["query"])
    peft.get_peft_model(model, settings).save_pretrained(w / "adapter")
    w.run(DIVIDE)


def merge_with_peft(w):
    import peft
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(w / "plain")
    peft.PeftModel.from_pretrained(model, w / "adapter").merge_and_unload().save_pretrained(w / "plain")
    w.run("divide plain another")


def without_weights(w):
    of_plain(w)
    (w / "adapter/adapter_model.safetensors").unlink()


def of_a_rank(w):
    of_plain(w)
    describe(w, r=3_000_000)


def whole(w, said):
    shutil.rmtree(w / "adapter")
    of_plain(w)


whole.says = "the folder is put back whole"


TABLE = [
    hidden(ALONE, of_plain, "divide it where peft is installed", peft_again, DIVIDE),
    hidden(BESIDE, beside, "divide it where peft is installed", peft_again, "divide plain another"),
    hidden(BESIDE, beside, "or remove adapter_config.json", remove_adapter, "divide plain another"),
    Entry(
        "division/adapters.py: the adapter does not fit",
        spoilt(of_another, DIVIDE),
        "check base_model_name_or_path in adapter_config.json",
        name_the_model,
    ),
    corrected(
        "division/adapters.py: {} tensors are neither in the adapter",
        headless,
        "save the adapter with modules_to_save=[...]",
        lambda w: headless(w, modules_to_save=["classifier"]),
    ),
    corrected(
        "division/adapters.py: an adapter of kind {}, which no weights",
        lambda w: prompts(w, "prompts"),
        "train an adapter that changes weights, such as LoRA",
        lambda w: (shutil.rmtree(w / "adapter"), prompts(w, "LoRA")),
    ),
    corrected(
        "division/adapters.py: an adapter of kind {}, which offramp",
        of_another_kind,
        "merge the adapter into the weights: merge_and_unload() of peft, then save_pretrained",
        merge_with_peft,
    ),
    Entry(
        "division/adapters.py: the weights of the adapter",
        spoilt(without_weights, DIVIDE),
        "get the whole folder of the adapter again",
        whole,
    ),
    Entry(
        "division/adapters.py: {} asks for",
        spoilt(of_a_rank, DIVIDE),
        "get the whole folder of the adapter again",
        whole,
    ),
]

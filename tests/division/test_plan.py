import dataclasses
import math
import re

import pytest

from offramp.checkpoints.families import FAMILIES, family_of
from offramp.division.names.build import PlannedTensor, plan_division
from offramp.errors import SourceError
from tests.division.tiny import CLASSES, CONFIGS, config_of, entries_of


def shard_of(division, name):
    return next(shard for shard in division.shards if shard.name == name)


def test_stages_and_shards_of_a_classifier():
    config = config_of()
    division = plan_division(config, entries_of(config))
    stages = [
        (stage.name, stage.role, [(s.kernel, s.shards) for s in stage.steps]) for stage in division.program.stages
    ]
    assert stages == [
        ("embedding", "begin", [("mask", ()), ("embedding", ("embedding",))]),
        *(
            (f"layer.{i}", "layer", [(kernel, (f"layer-0{i}-{kernel}",)) for kernel in ("attention", "up", "down")])
            for i in range(2)
        ),
        ("head", "end", [("head", ("head",))]),
    ]
    needed = [shard for step in division.program.steps() for shard in step.shards]
    assert [shard.name for shard in division.shards] == ["embedding-rows", *needed]
    tables = {lookup.table for lookup in division.program.lookups.values()}
    assert tables == {tensor.canonical_name for tensor in shard_of(division, "embedding-rows").tensors}
    for step in division.program.steps():
        tensors = [tensor for name in step.shards for tensor in shard_of(division, name).tensors]
        assert step.weights == {tensor.role: tensor.canonical_name for tensor in tensors}
    assert [shard.name for shard in division.shards if shard.gathered] == ["embedding-rows"]
    assert (division.architecture, division.model_type) == ("BertForSequenceClassification", "bert")
    assert division.widened_from is None


def test_tensors_keep_their_order_of_use():
    config = config_of()
    shard = shard_of(plan_division(config, entries_of(config)), "layer-01-attention")
    assert [tensor.role for tensor in shard.tensors] == [
        f"{role}.{part}" for role in ("q", "k", "v", "o", "norm") for part in ("weight", "bias")
    ]
    assert shard.tensors[0].source_name == shard.tensors[0].canonical_name
    assert shard.tensors[0].canonical_name == "bert.encoder.layer.1.attention.self.query.weight"
    assert shard.tensors[0].shape == (32, 32)


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_tensors_that_would_misalign_the_next_come_last(dtype):
    config = config_of(hidden_size=36)  # a bias of 144 bytes
    attention = shard_of(plan_division(config, entries_of(config, dtype=dtype)), "layer-00-attention")
    assert [tensor.role for tensor in attention.tensors[:4]] == ["q.weight", "k.weight", "v.weight", "o.weight"]
    assert [4 * math.prod(tensor.shape) % 64 for tensor in attention.tensors] == [0] * 4 + [16] * 6


def test_more_than_a_hundred_layers_have_names_of_their_own():
    config = config_of(num_hidden_layers=101)
    names = [shard.name for shard in plan_division(config, entries_of(config)).shards]
    assert "layer-100-up" in names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("bare", [True, False])
def test_a_bare_model_has_no_head_and_keeps_its_names(model_type, bare):
    config = config_of(model_type, task="Model")
    entries = entries_of(config, bare=bare)
    division = plan_division(config, entries)
    assert {tensor.canonical_name for shard in division.shards for tensor in shard.tensors} == set(entries)
    assert [(stage.role, bool(stage.steps)) for stage in division.program.stages] == [
        ("begin", True), ("layer", True), ("layer", True), ("end", False),
    ]  # fmt: skip
    assert division.program.problem is None and division.labels == ()


@pytest.mark.parametrize(
    ("model_type", "task", "name"),
    [
        ("bert", "ForMaskedLM", "cls.predictions.decoder.weight"),
        ("bert", "ForPreTraining", "cls.seq_relationship.weight"),
        ("bert", "Model", "bert.pooler.dense.weight"),
        ("bert", "ForTokenClassification", "classifier.weight"),
        ("bert", "ForSequenceClassification", "cls.predictions.bias"),
        ("roberta", "ForSequenceClassification", "roberta.pooler.dense.weight"),
        ("roberta", "ForMaskedLM", "lm_head.dense.weight"),
        ("distilbert", "ForMultipleChoice", "pre_classifier.weight"),
        ("distilbert", "ForQuestionAnswering", "qa_outputs.weight"),
        ("electra", "ForPreTraining", "discriminator_predictions.dense.weight"),
    ],
)
def test_heads_of_other_tasks_are_kept_in_a_shard_that_nobody_reads(model_type, task, name):
    config = config_of(model_type, task=task)
    division = plan_division(config, {**entries_of(config), name: ("F32", (7, 32))})
    assert shard_of(division, "other").tensors == (PlannedTensor(name, name, "other", (7, 32)),)
    assert not any("other" in step.shards for step in division.program.steps())


def test_position_buffers_are_dropped():
    config = config_of()
    plain = plan_division(config, entries_of(config))
    assert plan_division(config, {**entries_of(config), "bert.embeddings.position_ids": ("I64", (1, 20))}) == plain


def test_names_from_tensorflow_get_the_names_of_today():
    config = config_of()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): entry
        for name, entry in entries_of(config).items()
    }
    tensors = shard_of(plan_division(config, old), "embedding").tensors
    assert [tensor[:3] for tensor in tensors] == [
        ("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight", "norm.weight"),
        ("bert.embeddings.LayerNorm.beta", "bert.embeddings.LayerNorm.bias", "norm.bias"),
    ]
    with pytest.raises(SourceError, match="same tensor"):
        plan_division(config, {**old, "bert.embeddings.LayerNorm.weight": ("F32", (32,))})


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
def test_a_source_of_another_dtype_is_said(dtype):
    config = config_of()
    assert plan_division(config, entries_of(config, dtype=dtype)).widened_from == dtype
    mixed = {**entries_of(config), "classifier.bias": (dtype, (2,))}
    assert plan_division(config, mixed).widened_from == dtype


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E4M3", "torch.complex64"])
def test_other_dtypes_are_refused_by_name(dtype):
    config = config_of()
    with pytest.raises(SourceError, match=rf"tensor classifier\.bias has dtype {dtype} - the file"):
        plan_division(config, {**entries_of(config), "classifier.bias": (dtype, (2,))}, "the file")


def test_missing_unexpected_and_mis_shaped_tensors_are_named_together():
    config = config_of()
    entries = entries_of(config)
    del entries["classifier.bias"]
    entries["classifier.scale"] = ("F32", (2,))
    entries["bert.pooler.dense.weight"] = ("F32", (32, 31))
    with pytest.raises(SourceError) as caught:
        plan_division(config, entries, "model.safetensors")
    assert str(caught.value) == (
        "tensors do not fit config.json: 1 missing: classifier.bias (2,); 1 unexpected: classifier.scale (2,); "
        "1 mis-shaped: bert.pooler.dense.weight (32, 31) not (32, 32) - model.safetensors - get the whole model again"
    )


def test_tensors_of_nothing_are_left_out_whatever_their_dtype():
    config = config_of()
    plain = plan_division(config, entries_of(config))
    extra = {"loss_fct.weight": ("F32", (2,)), "classifier_old.weight": ("I8", (2, 32)), "cls.ids": ("I64", (3,))}
    division = plan_division(config, {**entries_of(config), **extra, "bert.embeddings.token_type_ids": ("I64", (1, 9))})
    assert division == dataclasses.replace(plain, left_out=("classifier_old.weight", "cls.ids", "loss_fct.weight"))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_names_may_have_the_prefix_of_the_backbone_or_not(model_type):
    config = config_of(model_type)
    whole, base = entries_of(config), FAMILIES[model_type].base
    expected = plan_division(config, whole)
    for step in (1, 2):
        mixed = {
            name.removeprefix(base) if number % step == 0 else name: entry
            for number, (name, entry) in enumerate(whole.items())
        }
        division = plan_division(config, mixed)
        tensors = [tensor for shard in division.shards for tensor in shard.tensors]
        assert sorted(tensor.source_name for tensor in tensors) == sorted(mixed)
        if step == 2:
            assert division.program == expected.program


def test_a_part_of_a_head_without_architectures_is_refused():
    config = {key: value for key, value in config_of().items() if key != "architectures"}
    with pytest.raises(SourceError, match=r'no architectures.*add "architectures": \["BertForToken'):
        plan_division(config, {**entries_of(config), "classifier.weight": ("F32", (2, 32))})


def test_no_more_than_five_of_each_are_listed():
    config = config_of()
    with pytest.raises(SourceError) as caught:
        plan_division(config, {f"tensor{i:02d}\n": ("F32", ()) for i in range(9)})
    message = str(caught.value)
    assert "41 missing: " in message and "9 unexpected: " in message
    assert "embeddings.LayerNorm.bias (32,), ...; " in message and "layer" not in message
    assert r"'tensor04\n' (), ..." in message and "tensor05" not in message
    assert "\n" not in message


def test_layers_beyond_the_config_are_unexpected():
    with pytest.raises(SourceError, match=r"16 unexpected: bert\.encoder\.layer\.2\.attention"):
        plan_division(config_of(), entries_of(config_of(num_hidden_layers=3)))


def test_a_base_checkpoint_called_a_classifier_lacks_its_head():
    with pytest.raises(SourceError, match=r"4 missing: bert\.pooler\.dense\.weight \(32, 32\)"):
        plan_division(config_of(), entries_of(config_of(task="Model")))


def test_a_transposed_table_is_found():
    config = config_of("electra")
    entries = entries_of(config)
    entries["electra.embeddings_project.weight"] = ("F32", (16, 32))
    with pytest.raises(SourceError, match=r"mis-shaped: electra\.embeddings_project\.weight \(16, 32\) not \(32, 16\)"):
        plan_division(config, entries)


WRAPPED = {"module.": "DataParallel", "base_model.model.": "peft", "model.bert.": "another wrapper"}


@pytest.mark.parametrize("model_type", CLASSES)
@pytest.mark.parametrize("prefix", WRAPPED)
def test_a_prefix_of_a_wrapper_is_named_and_can_be_taken_off(model_type, prefix):
    config = config_of(model_type)
    wrapped = {prefix + name: entry for name, entry in entries_of(config).items()}
    with pytest.raises(SourceError) as caught:
        plan_division(config, wrapped)
    assert f"take '{prefix}' off the names of its tensors" in str(caught.value)
    plan_division(config, {name.removeprefix(prefix): entry for name, entry in wrapped.items()})


@pytest.mark.parametrize("model_type", CLASSES)
def test_a_wrapper_of_the_backbone_alone_is_named_too(model_type):
    config, base = config_of(model_type), family_of(config_of(model_type)).base
    wrapped = {f"model.{name}" if name.startswith(base) else name: each for name, each in entries_of(config).items()}
    with pytest.raises(SourceError) as caught:
        plan_division(config, wrapped)
    (prefix,) = re.findall("take '(.*)' off the names", str(caught.value))
    plan_division(config, {name.removeprefix(prefix): entry for name, entry in wrapped.items()})


def test_of_two_tensors_that_differ_in_the_prefix_alone_the_exact_name_counts():
    entries = entries_of(config_of())
    both = {**{name.removeprefix("bert."): each for name, each in entries.items()}, **entries}
    found, alone = plan_division(config_of(), both), plan_division(config_of(), entries)
    assert found.shards == alone.shards
    assert len(found.left_out) == sum(name.startswith("bert.") for name in entries)


def test_missing_layers_are_told_from_other_missing_tensors():
    deeper, key = config_of(num_hidden_layers=4), "num_hidden_layers"
    with pytest.raises(SourceError, match=r"config\.json has more layers than the file, whose last is 1: correct it"):
        plan_division(deeper, entries_of(config_of()))
    plan_division({**deeper, key: 2}, entries_of(config_of()))
    less = {name: entry for name, entry in entries_of(deeper).items() if ".layer.2." not in name}
    with pytest.raises(SourceError, match="get the whole model again"):
        plan_division(deeper, less)


@pytest.mark.parametrize(
    "part", ["lora_A.weight", "ia3_l.default", "base_layer.weight", "modules_to_save.default.weight"]
)
def test_tensors_of_an_adapter_are_called_so(part):
    more = {f"bert.encoder.layer.0.attention.self.query.{part}": ("F32", (4, 32))}
    with pytest.raises(SourceError, match="merge the adapter into the weights"):
        plan_division(config_of(), {**entries_of(config_of()), **more})

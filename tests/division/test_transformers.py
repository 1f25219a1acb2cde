"""Names, shapes and values against what transformers itself saves: every family, every task, whole and bare."""

import pytest

from offramp.checkpoints.source import open_source
from offramp.division.names.build import plan_division
from tests.division.tiny import CLASSES, config_of, entries_of

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

TASKS = (
    "ForSequenceClassification",
    "Model",
    "ForMaskedLM",
    "ForPreTraining",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
)
CASES = [(family, task) for family in CLASSES for task in TASKS if hasattr(transformers, CLASSES[family] + task)]


def save_tiny(folder, model_type, task, **changes):
    config = config_of(model_type, task, **changes)
    theirs = transformers.AutoConfig.for_model(
        **{key: value for key, value in config.items() if key != "architectures"}
    )
    model = getattr(transformers, CLASSES[model_type] + task)(theirs)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("model_type", "task"), CASES)
def test_the_plan_takes_every_tensor_once_with_its_shape(tmp_path, model_type, task):
    save_tiny(tmp_path, model_type, task)
    with open_source(tmp_path) as source:
        division = plan_division(source.config, source.entries)
        planned = [tensor for shard in division.shards for tensor in shard.tensors]
        assert sorted(tensor.source_name for tensor in planned) == sorted(source.entries)
        assert all(tensor.canonical_name == tensor.source_name for tensor in planned)
        assert all(source.entries[tensor.source_name][1] == tensor.shape for tensor in planned)
    assert (division.architecture, division.model_type) == (CLASSES[model_type] + task, model_type)
    assert (division.program.problem is not None) == (task == "ForSequenceClassification")
    has_pooler = model_type in ("bert", "roberta", "xlm-roberta")
    all_is_read = task == "ForSequenceClassification" or (task == "Model" and not has_pooler)
    assert (division.shards[-1].name != "other") == all_is_read


@pytest.mark.parametrize("model_type", CLASSES)
def test_the_tables_hold_all_of_a_classifier_and_nothing_else(tmp_path, model_type):
    model = save_tiny(tmp_path, model_type, "ForSequenceClassification", num_labels=3)
    with open_source(tmp_path) as source:
        assert source.entries == entries_of(source.config)
        assert plan_division(source.config, source.entries).labels == ("LABEL_0", "LABEL_1", "LABEL_2")
        weights = model.state_dict()
        for name in source.entries:
            assert b"".join(source.chunks(name)) == weights[name].numpy().tobytes()


def test_embeddings_as_wide_as_the_layers_are_not_projected(tmp_path):
    save_tiny(tmp_path, "electra", "ForSequenceClassification", embedding_size=32)
    with open_source(tmp_path) as source:
        division = plan_division(source.config, source.entries)
    embedding = next(shard for shard in division.shards if shard.name == "embedding")
    assert [tensor.role for tensor in embedding.tensors] == ["norm.weight", "norm.bias"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_narrow_checkpoint_of_transformers(tmp_path, dtype):
    save_tiny(tmp_path, "bert", "ForSequenceClassification").to(getattr(torch, dtype)).save_pretrained(tmp_path)
    with open_source(tmp_path) as source:
        narrow = plan_division(source.config, source.entries).widened_from
    assert narrow == {"float16": "F16", "bfloat16": "BF16"}[dtype]


def test_a_checkpoint_that_transformers_shards(tmp_path):
    save_tiny(tmp_path / "one", "bert", "ForSequenceClassification").save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    with open_source(tmp_path) as source, open_source(tmp_path / "one") as one:
        assert source.entries == one.entries
        assert plan_division(source.config, source.entries) == plan_division(one.config, one.entries)

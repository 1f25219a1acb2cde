import pytest

from offramp.checkpoints.config import check_config
from offramp.checkpoints.families import family_of
from offramp.errors import SourceError
from offramp.program.encoder import Encoder
from tests.division.tiny import config_of


def encoder_of(model_type="bert", **changes):
    config = config_of(model_type, **changes)
    return family_of(config).encoder(config)


def test_bert_in_full():
    assert encoder_of() == Encoder(
        hidden_size=32,
        embedding_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=64,
        activation="gelu",
        norm_epsilon=1e-12,
        vocab_size=50,
        max_length=20,
        position_offset=0,
        num_token_types=2,
        pad_token=0,
        head_activation="tanh",
        problem="single_label_classification",
        labels=("LABEL_0", "LABEL_1"),
    )


def test_what_the_families_do_differently():
    assert encoder_of("distilbert").num_token_types == 0
    assert encoder_of("distilbert", layer_norm_eps=1e-5).norm_epsilon == 1e-12  # its code has the number
    assert encoder_of("roberta", layer_norm_eps=1e-5).norm_epsilon == 1e-5
    assert encoder_of("electra").embedding_size == 16
    assert encoder_of("bert", embedding_size=16).embedding_size == 32
    heads = {name: encoder_of(name).head_activation for name in ("bert", "distilbert", "roberta", "electra")}
    assert heads == {"bert": "tanh", "distilbert": "relu", "roberta": "tanh", "electra": "gelu"}


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta"])
def test_positions_after_padding_shorten_the_longest_input(model_type):
    encoder = encoder_of(model_type, pad_token_id=1)
    assert (encoder.position_offset, encoder.max_length, encoder.pad_token) == (2, 18, 1)
    assert encoder_of(model_type, pad_token_id=4).position_offset == 5


def test_a_model_without_head_has_no_problem_and_no_labels():
    encoder = encoder_of(task="ForMaskedLM", id2label="nonsense that nobody reads")
    assert (encoder.head_activation, encoder.problem, encoder.labels) == (None, None, ())


def test_distilbert_understands_the_common_keys():
    shape = {"dim": 32, "n_layers": 2, "num_attention_heads": 8}
    config = {"model_type": "distilbert", "vocab_size": 50, **shape}
    assert family_of(config).encoder(config).num_heads == 8
    with pytest.raises(SourceError, match="n_heads is 4: but num_attention_heads is 8"):
        encoder_of("distilbert", num_attention_heads=8)


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    for model_type in ("bert", "distilbert", "roberta", "xlm-roberta", "electra"):
        ours = family_of({"model_type": model_type}).encoder({"model_type": model_type})
        theirs = transformers.AutoConfig.for_model(model_type)
        assert ours.hidden_size == theirs.hidden_size
        assert ours.embedding_size == getattr(theirs, "embedding_size", theirs.hidden_size)
        assert ours.num_layers == theirs.num_hidden_layers
        assert ours.num_heads == theirs.num_attention_heads
        assert ours.intermediate_size == getattr(theirs, "intermediate_size", None) or theirs.hidden_dim
        assert ours.activation == getattr(theirs, "hidden_act", None) or theirs.activation
        assert ours.vocab_size == theirs.vocab_size
        assert ours.max_length + ours.position_offset == theirs.max_position_embeddings
        assert ours.num_token_types == getattr(theirs, "type_vocab_size", 0)
        assert ours.pad_token == theirs.pad_token_id
        assert ours.norm_epsilon == getattr(theirs, "layer_norm_eps", 1e-12)


@pytest.mark.parametrize(
    ("changes", "problem", "labels"),
    [
        ({}, "single_label_classification", ("LABEL_0", "LABEL_1")),
        ({"num_labels": 1}, "regression", ("LABEL_0",)),
        ({"num_labels": 3}, "single_label_classification", ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"id2label": {"1": "no", "0": "yes"}}, "single_label_classification", ("yes", "no")),
        ({"id2label": {"0": 5, "1": 7}}, "single_label_classification", ("5", "7")),
        ({"problem_type": "regression", "num_labels": 2}, "regression", ("LABEL_0", "LABEL_1")),
        (
            {"id2label": {str(i): f"l{i}" for i in range(12)}},
            "single_label_classification",
            tuple(f"l{i}" for i in range(12)),
        ),
        ({"problem_type": "multi_label_classification"}, "multi_label_classification", ("LABEL_0", "LABEL_1")),
    ],
)
def test_problem_and_labels(changes, problem, labels):
    encoder = encoder_of(**changes)
    assert (encoder.problem, encoder.labels) == (problem, labels)


@pytest.mark.parametrize("pad_token_id", [None, 0])
def test_any_padding_will_do_where_positions_do_not_depend_on_it(pad_token_id):
    assert encoder_of(pad_token_id=pad_token_id).pad_token == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act is quick_gelu: known are gelu"),
        ({"hidden_act": ["gelu"]}, "hidden_act"),
        ({"hidden_act": "ge\nlu\x1b[31m"}, r"hidden_act is 'ge\\nlu\\x1b\[31m'"),
        ({"hidden_act": "x" * 10**6}, r"hidden_act is x{100}\.\.\.: known"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is relative_key"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"num_attention_heads": 5}, "hidden_size is 32: not a multiple of the number of heads, 5"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_size": "32"}, "hidden_size is 32: expected an integer"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0: expected an integer"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_labels": 10**12}, "num_labels"),
        ({"num_labels": 0}, "num_labels is 0"),
        ({"layer_norm_eps": -1}, "layer_norm_eps is -1"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"pad_token_id": 50}, "pad_token_id is 50: expected an integer from 0 to 49"),
        ({"pad_token_id": -1}, "pad_token_id is -1"),
        ({"id2label": {}}, "id2label"),
        ({"id2label": {"1": "a", "2": "b"}}, "id2label .*from 0 to 1"),
        ({"id2label": {"0": None}}, "id2label"),
        ({"id2label": ["a"]}, "id2label"),
        ({"problem_type": "ranking"}, "problem_type is ranking"),
        ({"problem_type": ["ranking"]}, "problem_type"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, "at least two labels"),
    ],
)
def test_a_value_that_cannot_be_is_named(changes, named):
    with pytest.raises(SourceError, match=named) as caught:
        encoder_of(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is NaN"),
        ({"rope": {"factors": [1.0, float("nan")]}}, r"rope\.factors\.1 is NaN"),
        ({"x" * 10**6: float("nan")}, r"x{100}\.\.\. is NaN"),
    ],
)
def test_a_number_that_is_none_is_named_for_every_model(changes, named):
    with pytest.raises(SourceError, match=named):
        check_config({"model_type": "bert", **changes}, "here")
    check_config({"model_type": "mamba2", "time_step_limit": [0.0, float("inf")]}, "here")


@pytest.mark.parametrize("changes", [{"pad_token_id": None}, {"max_position_embeddings": 2}])
def test_roberta_without_room_for_positions_is_refused(changes):
    with pytest.raises(SourceError, match=next(iter(changes))):
        encoder_of("roberta", **changes)


@pytest.mark.parametrize(
    "counts",
    [
        {"depths": [1, 10**6]},
        {"inner_group_num": 2000},
        {"vision_config": {"encoder_layers": 2000}},
        {"layers": 1 << 40},
    ],
)
def test_numbers_of_modules_that_no_model_has_are_refused_before_they_are_made(counts):
    with pytest.raises(SourceError, match=r"config\.json: \w+ counts \d+, expected at most 1024"):
        check_config(counts, "here")


def test_lists_of_layers_and_other_keys_are_free():
    deep = {"a": 1}
    for _ in range(900):
        deep = {"a": deep}
    counts = {"depths": [3, 4, 6, 3], "out_layers": ["stage1"], "use_last_layers": True, "groups": None}
    check_config({**counts, "block_size": 1 << 20, "vision_config": {"depth": 24}, "deep": deep}, "here")

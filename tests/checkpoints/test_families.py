import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.checkpoints.families import FAMILIES, family_of
from offramp.errors import SourceError
from offramp.program.encoder import LAYER_KERNELS, encoder_shapes
from tests.division.tiny import CONFIGS, config_of


@given(st.sampled_from(list(FAMILIES)), st.integers(1, 120), st.booleans())
def test_no_two_weights_have_the_same_name(model_type, num_layers, bare):
    family = FAMILIES[model_type]
    base = "" if bare else family.base
    names = []
    for kind in family.tables:
        for layer in range(num_layers) if kind in LAYER_KERNELS else (None,):
            names += family.names(kind, base, layer).values()
    assert len(set(names)) == len(names)


def test_names_of_a_bare_model_have_no_base():
    assert FAMILIES["roberta"].names("up", "", 3)["up.weight"] == "encoder.layer.3.intermediate.dense.weight"
    assert (
        FAMILIES["distilbert"].names("up", "distilbert.", 3)["up.bias"]
        == "distilbert.transformer.layer.3.ffn.lin1.bias"
    )


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_role_that_has_a_shape_has_a_name(model_type):
    family, config = FAMILIES[model_type], config_of(model_type)
    for kind, roles in encoder_shapes(family.encoder(config)).items():
        assert set(roles) <= set(family.tables[kind])


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": ["bert"]}, "bert"),
        ({"model_type": "", "architectures": ["XLNetModel"]}, "XLNetModel"),
        ({}, "no model_type"),
        ({"model_type": "a\nb"}, r"'a\\nb'"),
    ],
)
def test_an_unknown_architecture_is_named_with_the_known_ones(config, named):
    with pytest.raises(SourceError, match=named) as caught:
        family_of(config)
    assert "unknown architecture" in str(caught.value)
    assert all(known in str(caught.value) for known in ("bert", "distilbert", "roberta", "xlm-roberta", "electra"))


@pytest.mark.parametrize(
    "named", [["GPT2Model"], ["JinaBertModel"], ["CustomBertForSequenceClassification"], "BertModel", [5], [None]]
)
def test_a_class_that_the_family_does_not_know_is_refused(named):
    with pytest.raises(SourceError, match=r"architectures is .*BertForSequenceClassification"):
        FAMILIES["bert"].architecture({"architectures": named})


@pytest.mark.parametrize("config", [{}, {"architectures": None}, {"architectures": []}])
def test_without_architectures_it_is_the_bare_model(config):
    assert FAMILIES["xlm-roberta"].architecture(config) == "XLMRobertaModel"


def test_either_class_of_the_roberta_code_will_do():
    config = config_of("xlm-roberta", architectures=["RobertaForSequenceClassification"])
    assert family_of(config).encoder(config).problem == "single_label_classification"

"""Families of text encoders with known tensor names. One table for each family serves reading and writing.

In a template, `{base}` stands for the name of the backbone, which is empty for a bare model, and `{i}` for the layer.
Tables are in order of use. They follow models/*/modeling_*.py of transformers.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from offramp.checkpoints.config import Key, Keys, bad_value, read_encoder, shown
from offramp.errors import SourceError
from offramp.program.encoder import Encoder

_OTHER_TASKS = (
    "MaskedLM PreTraining TokenClassification QuestionAnswering MultipleChoice NextSentencePrediction CausalLM"
)
TASKS = ("Model", "ForSequenceClassification", *(f"For{task}" for task in _OTHER_TASKS.split()), "LMHeadModel")
_PRETRAINED = ("Model", "ForMaskedLM", "ForPreTraining", "LMHeadModel", "ForCausalLM")
"""Tasks of models that classifiers are trained from."""


@dataclass(frozen=True)
class Family:
    """Models that share one naming of tensors. Methods raise SourceError for a config that offramp cannot run."""

    model_type: str
    classes: tuple[str, ...]
    """Prefixes of class names; the first is that of the family's own classes."""
    base: str
    """Prefix of the backbone's names in a whole model."""
    keys: Keys
    tables: Mapping[str, Mapping[str, str]]
    """Kernel -> role -> template of the tensor name."""
    head_activation: str
    other: tuple[str, ...]
    """Prefixes of tensors that belong to other tasks."""

    def architecture(self, config: Mapping[str, Any]) -> str:
        """Return the class that the weights were saved from; the bare model if the config names none."""
        named = config.get("architectures") or [self.classes[0] + "Model"]
        if not isinstance(named, list) or named[0] not in [name + task for name in self.classes for task in TASKS]:
            known = ", ".join(self.classes[0] + task for task in TASKS)
            raise bad_value("architectures", named, f"known for {self.model_type} are {known}")
        return named[0]

    def has_head(self, config: Mapping[str, Any]) -> bool:
        """Return whether the model ends in a classification head."""
        return self.architecture(config).endswith("ForSequenceClassification")

    def holds_head(self, names: Collection[str]) -> bool:
        """Return whether the tensors of these names include those of a whole classification head."""
        return any(set(self.names("head", base).values()) <= set(names) for base in (self.base, ""))

    def may_be_stale(self, named: object, names: Collection[str]) -> bool:
        """Return whether a list of classes names none, or one of the pretraining, whose head these tensors lack."""
        if not named:
            return True
        pretrained = [name + task for name in self.classes for task in _PRETRAINED]
        is_pretrained = isinstance(named, list) and named[0] in pretrained
        own = tuple(prefix for prefix in self.other if not prefix.startswith("{base}"))
        return is_pretrained and not any(name.startswith(own) for name in names)

    def encoder(self, config: Mapping[str, Any]) -> Encoder:
        """Return the sizes and settings of the model."""
        return read_encoder(config, self.keys, self.head_activation if self.has_head(config) else None)

    def names(self, kernel: str, base: str, layer: int | None = None) -> dict[str, str]:
        """Return role -> tensor name of one kernel, in order of use. `base` is `self.base`, or "" for a bare model."""
        return {role: template.format(base=base, i=layer) for role, template in self.tables[kernel].items()}

    def passed_through(self, base: str, has_head: bool) -> tuple[str, ...]:
        """Return the prefixes of tensors that are kept but never read: heads of other tasks."""
        own_head = [template.partition(".")[0] + "." for template in self.tables["head"].values()]
        return tuple(template.format(base=base) for template in (*self.other, *([] if has_head else own_head)))


def _linear(prefix: str, **modules: str) -> dict[str, str]:
    """Return the templates of weight and bias of linear layers and norms, given as role and module."""
    parts = ("weight", "bias")
    return {f"{role}.{part}": f"{prefix}{module}.{part}" for role, module in modules.items() for part in parts}


_EMBEDDINGS, _BERT_LAYER, _DISTILBERT_LAYER = (
    "{base}embeddings.",
    "{base}encoder.layer.{i}.",
    "{base}transformer.layer.{i}.",
)
_BERT_ROWS = {
    "word": _EMBEDDINGS + "word_embeddings.weight",
    "position": _EMBEDDINGS + "position_embeddings.weight",
    "type": _EMBEDDINGS + "token_type_embeddings.weight",
}
_BERT_ENCODER = {
    "embedding-rows": _BERT_ROWS,
    "embedding": _linear(_EMBEDDINGS, norm="LayerNorm"),
    "attention": _linear(_BERT_LAYER + "attention.self.", q="query", k="key", v="value")
    | _linear(_BERT_LAYER + "attention.output.", o="dense", norm="LayerNorm"),
    "up": _linear(_BERT_LAYER, up="intermediate.dense"),
    "down": _linear(_BERT_LAYER + "output.", down="dense", norm="LayerNorm"),
}
_ROBERTA_HEAD = _linear("classifier.", dense="dense", out="out_proj")

BERT = Family(
    model_type="bert",  # and what shares its names: MiniLM and other distillates
    classes=("Bert",),
    base="bert.",
    keys=Keys(),
    tables={**_BERT_ENCODER, "head": _linear("", dense="{base}pooler.dense", out="classifier")},
    head_activation="tanh",
    other=("cls.", "qa_outputs."),
)
DISTILBERT = Family(  # no token types, and a norm epsilon that no config changes
    model_type="distilbert",
    classes=("DistilBert",),
    base="distilbert.",
    keys=Keys(
        hidden_size=Key("dim", 768, alias="hidden_size"),
        num_layers=Key("n_layers", 6, alias="num_hidden_layers"),
        num_heads=Key("n_heads", 12, alias="num_attention_heads"),
        intermediate_size=Key("hidden_dim", 3072),
        activation=Key("activation", "gelu"),
        token_types=None,
        norm_epsilon=None,
    ),
    tables={
        "embedding-rows": {role: _BERT_ROWS[role] for role in ("word", "position")},
        "embedding": _linear(_EMBEDDINGS, norm="LayerNorm"),
        "attention": _linear(_DISTILBERT_LAYER + "attention.", q="q_lin", k="k_lin", v="v_lin", o="out_lin")
        | _linear(_DISTILBERT_LAYER, norm="sa_layer_norm"),
        "up": _linear(_DISTILBERT_LAYER, up="ffn.lin1"),
        "down": _linear(_DISTILBERT_LAYER, down="ffn.lin2", norm="output_layer_norm"),
        "head": _linear("", dense="pre_classifier", out="classifier"),
    },
    head_activation="relu",
    other=("vocab_transform.", "vocab_layer_norm.", "vocab_projector.", "qa_outputs."),
)
ROBERTA = Family(  # positions are counted from the padding token on, and the head has no pooler
    model_type="roberta",
    classes=("Roberta", "XLMRoberta"),
    base="roberta.",
    keys=Keys(vocab_size=Key("vocab_size", 50265), pad_token=Key("pad_token_id", 1), positions_after_padding=True),
    tables={**_BERT_ENCODER, "head": _ROBERTA_HEAD},
    head_activation="tanh",
    other=("lm_head.", "qa_outputs.", "{base}pooler."),
)
XLM_ROBERTA = replace(
    ROBERTA,
    model_type="xlm-roberta",
    classes=("XLMRoberta", "Roberta"),
    keys=replace(ROBERTA.keys, vocab_size=Keys().vocab_size),
)
ELECTRA = Family(  # embeddings may be narrower, then projected; the head has GELU whatever the config says
    model_type="electra",
    classes=("Electra",),
    base="electra.",
    keys=Keys(
        hidden_size=Key("hidden_size", 256),
        num_heads=Key("num_attention_heads", 4),
        intermediate_size=Key("intermediate_size", 1024),
        embedding_size=Key("embedding_size", 128),
    ),
    tables={
        **_BERT_ENCODER,
        "embedding": _linear(_EMBEDDINGS, norm="LayerNorm") | _linear("{base}", project="embeddings_project"),
        "head": _ROBERTA_HEAD,
    },
    head_activation="gelu",
    other=(
        *("discriminator_predictions.", "generator_predictions.", "generator_lm_head."),
        *("qa_outputs.", "sequence_summary."),
    ),
)
FAMILIES = {family.model_type: family for family in (BERT, DISTILBERT, ROBERTA, XLM_ROBERTA, ELECTRA)}


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family that `config["model_type"]` names. Raises SourceError naming the known families."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        named = model_type or config.get("architectures") or "(config.json has no model_type)"
        raise SourceError(f"unknown architecture {shown(named)}", "config.json", f"known are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]

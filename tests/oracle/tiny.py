"""Tiny random models of transformers, ragged batches for them, and a store's logits on any backend, plan and read path.

Shapes: B rows, S tokens of the longest row, C labels.
"""

from dataclasses import dataclass

import numpy as np
import torch
import transformers

from offramp.backends import open_backend
from offramp.backends.torch import TorchBackend
from offramp.program.inputs import Batch as Inputs
from offramp.program.program import ATTENTION_MASK, INPUT_IDS, POSITION_IDS, TOKEN_TYPE_IDS
from offramp.store import Store
from tests.toy import open_engine

BACKENDS = ("ort", "torch", "numpy")

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
FIRST_WORD = 5
"""Token ids from here on are words in every family."""

_SHAPE = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 48,
}
_DISTIL_SHAPE = {
    "vocab_size": 200,
    "dim": 64,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 128,
    "max_position_embeddings": 48,
}


@dataclass(frozen=True)
class Case:
    """A family of models, and what is special about this one."""

    model_type: str
    activation: str = "gelu"
    problem: str = SINGLE
    embedding_size: int = 64

    def __str__(self):
        narrow = "" if self.embedding_size == 64 else "-projected"
        return f"{self.model_type}{narrow}-{self.activation}-{self.problem.partition('_')[0]}"

    def config(self):
        num_labels = 1 if self.problem == REGRESSION else 3
        shape = dict(_DISTIL_SHAPE if self.model_type == "distilbert" else _SHAPE)
        shape["activation" if self.model_type == "distilbert" else "hidden_act"] = self.activation
        if self.model_type == "electra":
            shape["embedding_size"] = self.embedding_size
        if "roberta" in self.model_type:
            shape |= {"type_vocab_size": 1, "pad_token_id": 1}
        return transformers.AutoConfig.for_model(
            self.model_type, num_labels=num_labels, problem_type=self.problem, **shape
        )


CASES = (
    Case("bert"),
    Case("bert", "relu", REGRESSION),
    Case("bert", "gelu_pytorch_tanh", MULTI),
    Case("distilbert"),
    Case("distilbert", "silu", MULTI),
    Case("roberta", "gelu_new", MULTI),
    Case("roberta"),
    Case("xlm-roberta", "silu"),
    Case("electra", embedding_size=32),
    Case("electra", "gelu_new", REGRESSION),
)


def make_model(config, seed=0):
    """A random classifier, every parameter of it, in evaluation."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@dataclass(frozen=True)
class Batch:
    """Token ids and what goes with them, int64 [B, S]."""

    ids_BS: np.ndarray
    mask_BS: np.ndarray
    types_BS: np.ndarray

    def rows(self, rows):
        """Some rows, in the order asked for, at the same padded length."""
        return Batch(self.ids_BS[rows], self.mask_BS[rows], self.types_BS[rows])


def make_batch(config, lengths, pairs=True, seed=0):
    """Rows of these many tokens; with `pairs` the later half of a row is of the second token type, if there is one."""
    rng = np.random.default_rng(seed)
    lengths_B = np.asarray(lengths)
    shape = (len(lengths), lengths_B.max())
    mask_BS = (np.arange(shape[1]) < lengths_B[:, None]).astype(np.int64)
    ids_BS = np.where(mask_BS, rng.integers(FIRST_WORD, config.vocab_size, shape), config.pad_token_id)
    second_BS = np.arange(shape[1]) >= lengths_B[:, None] // 2
    has_types = getattr(config, "type_vocab_size", 0) > 1
    return Batch(ids_BS, mask_BS, (second_BS & (mask_BS > 0) & pairs & has_types).astype(np.int64))


def inputs_of(config, batch):
    """The batch as a model of transformers takes it."""
    inputs = {"input_ids": batch.ids_BS, "attention_mask": batch.mask_BS, "token_type_ids": batch.types_BS}
    if config.model_type == "distilbert":
        del inputs["token_type_ids"]
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


def ask_transformers(model, batch, attention="sdpa"):
    """What the model itself says: logits [B, C]."""
    model.set_attn_implementation(attention)
    with torch.no_grad():
        return model(**inputs_of(model.config, batch)).logits.numpy()


@dataclass(frozen=True)
class Way:
    """A way to run a store; every field is one that must not change its answers."""

    num_slots: int = 2
    residents: frozenset = frozenset()
    reads: str = "buffered"
    verify: str = "first"


def encode(batch, texts):
    """The inputs that a text encoder makes of these tokens; positions as in fairseq where they have an offset."""
    positions_BS = np.tile(np.arange(batch.ids_BS.shape[1]), (len(batch.ids_BS), 1))
    if texts.position_offset:
        is_word_BS = batch.ids_BS != texts.pad_token
        positions_BS = np.cumsum(is_word_BS, axis=1) * is_word_BS + texts.position_offset - 1
    arrays = {
        INPUT_IDS: batch.ids_BS, ATTENTION_MASK: batch.mask_BS, TOKEN_TYPE_IDS: batch.types_BS,
        POSITION_IDS: positions_BS,
    }  # fmt: skip
    return Inputs(arrays, *batch.ids_BS.shape, batch.mask_BS.sum(1))


def run(path, batches, way=Way(), backend="ort", exit="none", num_threads=1, attention="sdpa"):
    """Outcomes of each batch, one after the other through the same engine."""
    with Store(path, way.verify) as store:
        if attention == "sdpa":
            opened = open_backend(backend, store, num_threads)
        else:
            opened = TorchBackend(store, num_threads, attention)
        engine = open_engine(store, exit, way.num_slots, way.residents, backend=opened, reads=way.reads)
        try:
            return [engine.sweep([encode(batch, store.program.texts)], more=True) for batch in batches]
        finally:
            engine.close()


def logits(path, batch, way=Way(), **options):
    """Logits [B, C] of one batch."""
    (outcomes,) = run(path, [batch], way, **options)
    return np.stack([outcome.logits_C for outcome in outcomes])


def streamed_shards(path):
    """Names of the shards that pass through slots or stay, in order of use."""
    with Store(path) as store:
        return list(dict.fromkeys(name for step in store.program.steps() for name in step.shards))

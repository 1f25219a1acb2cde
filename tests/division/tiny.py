"""Tiny models: configs of every family as transformers writes them, and tensors that fit them."""

import json

import numpy as np
from safetensors.numpy import save_file

from offramp.checkpoints.families import family_of
from offramp.program.encoder import LAYER_KERNELS, encoder_shapes

BERT_SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 20,
}
CONFIGS = {
    "bert": {"model_type": "bert", **BERT_SHAPE},
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": 50,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 64,
        "max_position_embeddings": 20,
    },
    "roberta": {"model_type": "roberta", "type_vocab_size": 1, **BERT_SHAPE},
    "xlm-roberta": {"model_type": "xlm-roberta", "type_vocab_size": 1, **BERT_SHAPE},
    "electra": {"model_type": "electra", "embedding_size": 16, **BERT_SHAPE},
}
CLASSES = {
    "bert": "Bert",
    "distilbert": "DistilBert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "electra": "Electra",
}


def config_of(model_type="bert", task="ForSequenceClassification", **changes):
    return {**CONFIGS[model_type], "architectures": [CLASSES[model_type] + task], **changes}


def entries_of(config, bare=False, dtype="F32"):
    """Tensors as the tables name them; that the tables are right is test_transformers' matter."""
    family = family_of(config)
    encoder = family.encoder(config)
    entries = {}
    for kind, roles in encoder_shapes(encoder).items():
        for layer in range(encoder.num_layers) if kind in LAYER_KERNELS else (None,):
            names = family.names(kind, "" if bare else family.base, layer)
            entries |= {names[role]: (dtype, shape) for role, shape in roles.items()}
    return entries


def random_tensors(entries):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, (_, shape) in entries.items()}


def write_model(folder, config=None):
    """A model folder with one safetensors file. Returns its tensors."""
    config = config or config_of()
    tensors = random_tensors(entries_of(config))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def write_sharded(folder, config=None, num_files=3):
    """The same in several files with an index. Returns tensors and weight map."""
    tensors = write_model(folder, config)
    (folder / "model.safetensors").unlink()
    files = [f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" for i in range(num_files)]
    weight_map = {name: files[i % num_files] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    write_index(folder, weight_map)
    return tensors, weight_map


def write_index(folder, weight_map, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

"""What the zoo's tables are written in: a row a model, sizes that all rows share, and tensors to feed them."""

import dataclasses
import importlib.util
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

Size = int | Callable[[int], int]
"""A dimension: a number, or what to make of the length that was asked for."""

VOCABULARY, FIRST_WORD = 100, 20
"""Ids below FIRST_WORD mark padding, ends, and the places of images and sounds; no text has them by chance."""
PAD, BEGIN, END, IMAGE, VIDEO, AUDIO = range(6)


@dataclass(frozen=True)
class Specimen:
    """One tiny model with random weights, and what to feed it."""

    name: str
    family: str
    """`transformers`, `torchvision` or `timm`."""
    kind: str
    build: Callable[[], nn.Module]
    """In eval mode. Weights come from torch's global generator, which the caller seeds; answers do not."""
    inputs: Callable[[int, int], dict[str, Any] | tuple[Any, ...]]
    """(batch, length) to what the model is called with: keywords, or positions. The same each time."""
    skeleton: Callable[[], nn.Module] | None = None
    """Where `build` under `accelerate.init_empty_weights(include_buffers=False)` does not give the skeleton."""
    fixed_length: bool = False
    """A second input may differ in its batch size alone."""


@dataclass(frozen=True)
class Inputs:
    """Makes the keywords of a call; `a | b` makes those of both."""

    make: Callable[[int, int], dict[str, Any]]
    fixed_length: bool = False

    def __or__(self, other: "Inputs") -> "Inputs":
        return Inputs(
            lambda batch, length: self.make(batch, length) | other.make(batch, length),
            self.fixed_length and other.fixed_length,
        )


@dataclass(frozen=True)
class Row:
    """One line of a table: everything but what its table says for all its rows."""

    name: str
    model: str
    """A class of transformers by name, so that a table can be read without it."""
    inputs: Inputs | None
    overrides: dict[str, Any] = field(default_factory=dict)


def row(name: str, model: str, inputs: Inputs | None = None, /, **overrides: Any) -> Row:
    """A model, and where its configuration differs from SMALL."""
    return Row(name, model, inputs, overrides)


def fixed(inputs: Inputs) -> Inputs:
    """For a model that takes one length."""
    return dataclasses.replace(inputs, fixed_length=True)


def _shape(batch: int, length: int, sizes: Iterable[Size]) -> tuple[int, ...]:
    return (batch, *(size if isinstance(size, int) else size(length) for size in sizes))


def _generator(name: str, batch: int, length: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{name} {batch} {length}".encode()))


def floats(name: str, *sizes: Size) -> Inputs:
    """Normally distributed: pixels, samples, features."""

    def make(batch: int, length: int) -> dict[str, Any]:
        return {name: torch.randn(_shape(batch, length, sizes), generator=_generator(name, batch, length))}

    return Inputs(make, all(isinstance(size, int) for size in sizes))


def integers(name: str, below: int, *sizes: Size, start: int = 0) -> Inputs:
    """Evenly distributed from start on: ids, boxes, masks."""

    def make(batch: int, length: int) -> dict[str, Any]:
        shape = _shape(batch, length, sizes)
        return {name: torch.randint(start, below, shape, generator=_generator(name, batch, length))}

    return Inputs(make, all(isinstance(size, int) for size in sizes))


def boxes() -> Inputs:
    """A rectangle for each token."""

    def make(batch: int, length: int) -> dict[str, Any]:
        corner = torch.randint(0, 30, (batch, length, 2), generator=_generator("bbox", batch, length))
        return {"bbox": torch.cat([corner, corner + 30], -1)}

    return Inputs(make)


def filled(name: str, value: Any, *sizes: Size, dtype: torch.dtype | None = None) -> Inputs:
    """One value throughout, such as a mask of ones."""

    def make(batch: int, length: int) -> dict[str, Any]:
        return {name: torch.full(_shape(batch, length, sizes), value, dtype=dtype)}

    return Inputs(make, all(isinstance(size, int) for size in sizes))


def constant(**keywords: Any) -> Inputs:
    """The same keywords whatever the batch."""
    return Inputs(lambda batch, length: dict(keywords), True)


def same(length: int) -> int:
    """The length itself, as a dimension."""
    return length


def text(prefix: tuple[int, ...] = (), mask: bool = True, name: str = "input_ids") -> Inputs:
    """Batch x length ids after the same prefix; the last row ends in a quarter of padding."""

    def make(batch: int, length: int) -> dict[str, Any]:
        ids = torch.randint(FIRST_WORD, VOCABULARY, (batch, length), generator=_generator(name, batch, length))
        ids = torch.cat([torch.tensor(prefix, dtype=torch.long).expand(batch, -1), ids], 1)
        attention = torch.ones_like(ids)
        attention[-1, ids.shape[1] - length // 4 :] = 0
        ids[attention == 0] = PAD
        return {name: ids, name.replace("input_ids", "attention_mask"): attention} if mask else {name: ids}

    return Inputs(make)


def decoder_text() -> Inputs:
    """What an encoder-decoder has written so far: half as long as what it reads."""
    return integers("decoder_input_ids", VOCABULARY, lambda length: length // 2 + 1, start=FIRST_WORD)


def picture(side: int = 32, name: str = "pixel_values") -> Inputs:
    """Images of one size."""
    return floats(name, 3, side, side)


def any_picture() -> Inputs:
    """Images of 64 pixels for 16 tokens, 32 for fewer: for models that take any size."""
    return floats("pixel_values", 3, *[lambda length: 32 * max(1, length // 8)] * 2)


SIZES: list[tuple[int, str]] = [
    (32, "hidden_size d_model n_embd dim emb_dim embed_dim hidden_dim image_size"),
    (64, "intermediate_size n_inner d_ff d_inner ffn_dim encoder_ffn_dim decoder_ffn_dim"),
    (64, "max_position_embeddings max_encoder_position_embeddings max_source_positions max_target_positions"),
    (64, "n_positions n_ctx"),
    (3, "num_hidden_layers num_layers n_layer n_layers depth"),
    (2, "encoder_layers decoder_layers num_encoder_layers num_decoder_layers"),
    (4, "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads"),
    (4, "linear_num_key_heads linear_num_value_heads index_topk"),
    (2, "num_key_value_heads num_kv_heads n_kv_heads index_n_heads"),
    (8, "head_dim d_kv d_head qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim"),
    (8, "state_size mamba_d_state patch_size"),
    (16, "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank index_head_dim"),
    (16, "embedding_size projection_dim num_mel_bins feature_size"),
    (4, "num_local_experts num_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_k moe_topk"),
    (1, "n_group topk_group"),
    (VOCABULARY, "vocab_size"),
    (PAD, "pad_token_id"),
    (BEGIN, "bos_token_id decoder_start_token_id"),
    (END, "eos_token_id"),
    (IMAGE, "image_token_id image_token_index"),
    (VIDEO, "video_token_id video_token_index"),
    (AUDIO, "audio_token_id audio_token_index"),
    (6, "vision_start_token_id"),
    (7, "vision_end_token_id"),
    (8, "sep_token_id"),
    (9, "mask_token_id"),
    (False, "use_cache"),
]
SMALL = {name: size for size, names in SIZES for name in names.split()}
"""Sizes by the names that configurations have for them; each takes those it declares."""


def shrunk(config_class: Any, overrides: dict[str, Any]) -> Any:
    """A configuration of SMALL's sizes, those within it as well, but for the overrides."""
    from transformers import CONFIG_MAPPING, AutoConfig

    aliases = {alias for alias, name in config_class.attribute_map.items() if alias != name}
    declared = {item.name for item in dataclasses.fields(config_class)} - aliases
    keywords = {name: value for name, value in SMALL.items() if name in declared}
    for name, part_class in config_class.sub_configs.items():
        part = overrides.get(name, {})
        if part is None:
            continue
        part = dict(part)
        if "model_type" in part:
            part_class = CONFIG_MAPPING[part.pop("model_type")]
        elif part_class is AutoConfig:
            part_class = type(getattr(config_class(), name))
        if dataclasses.is_dataclass(part_class):
            keywords[name] = shrunk(part_class, part)
    keywords |= {name: value for name, value in overrides.items() if name not in config_class.sub_configs}
    keywords |= {name: None for name in config_class.sub_configs if overrides.get(name, {}) is None}
    return config_class(**keywords)


def build(line: Row) -> nn.Module:
    """The model of a row, small."""
    import transformers

    model_class = getattr(transformers, line.model)
    return model_class(shrunk(model_class.config_class, line.overrides)).eval()


def resolve(kind: str, inputs: Inputs, table: Iterable[Row]) -> tuple[list[Specimen], dict[str, str]]:
    """Specimens of what this version of transformers has, and the reason for each that it has not."""
    table = list(table)
    if importlib.util.find_spec("transformers") is None:
        return [], {line.name: "transformers is not installed" for line in table}
    import transformers

    # Asked of `dir`: `hasattr` would import the code of every architecture.
    known = set(dir(transformers))
    found, missing = [], {}
    for line in table:
        if line.model not in known:
            missing[line.name] = f"transformers {transformers.__version__} has no {line.model}"
            continue
        what = line.inputs or inputs
        found.append(
            Specimen(line.name, "transformers", kind, partial(build, line), what.make, fixed_length=what.fixed_length)
        )
    return found, missing

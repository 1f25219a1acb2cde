"""The manifest of a store, `offramp.json`: what is where, in which order it is used, and what it must hash to.

These are plain data, written here and read by `store.parsing`, which checks them once for the whole house. The page for
other implementers is docs/store-format.md.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Dict, Optional, Tuple, Union

from offramp.errors import StoreError
from offramp.program.program import PROBLEMS as PROBLEMS
from offramp.program.program import Program
from offramp.store.safetensors import num_bytes

FILE_NAME = "offramp.json"
FORMAT, MODULE_FORMAT = 1, 2
"""Of an encoder, whose computation the house knows, and of any other module, which brings its own."""
MAX_MANIFEST_BYTES = 2 << 20
"""A model of 400 layers fits; while it is parsed, a hostile manifest can take 25 times its size in memory."""
MAX_GRAPH_BYTES = 1 << 20
"""Weights are inputs of a graph, so nothing in it is large."""
BLOCK_BYTES = 64 << 10
"""Gathered tables are hashed in blocks of this size, so that a row can be checked without reading its table."""

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a shard. `role` is what the computation calls it; `offset` counts from the first data byte."""

    name: str
    role: str
    dtype: str
    shape: Tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return num_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class File:
    """A file of the store, and what it must hash to."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """Tensors that are loaded and evicted together: a safetensors file. Data begin at `data_start`, on a page."""

    name: str
    file: str
    bytes: int
    sha256: str
    data_start: int
    tensors: Tuple[Tensor, ...]
    blocks: Optional[File] = None
    """Set when rows are gathered from the tables of this shard: the file of its block digests."""

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.bytes - self.data_start

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole file; the last may be short."""
        return -(-self.bytes // BLOCK_BYTES)


@dataclass(frozen=True)
class Step:
    """One computation of a stage: its kind, and the shards that it needs."""

    kind: str
    shards: Tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """One layer, or what comes before and after the layers."""

    name: str
    role: str
    """`embedding`, `layer` or `head`."""
    steps: Tuple[Step, ...]


@dataclass(frozen=True)
class Source:
    """Where the store came from. `widened_from` is the narrow dtype of the source, if there was one."""

    fingerprint: str
    architecture: str
    model_type: str
    method: str
    widened_from: Optional[str] = None


@dataclass(frozen=True)
class Encoder:
    """What a post-norm transformer encoder computes with, in words common to BERT, DistilBERT and their kin."""

    hidden_size: int
    embedding_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    activation: str
    norm_epsilon: float
    vocab_size: int
    max_length: int
    """Longest input in tokens."""
    position_offset: int
    """Row of the position table that the first token takes (RoBERTa: 2)."""
    num_token_types: int
    """0 where there are no token types (DistilBERT)."""
    pad_token: int
    head_activation: Optional[str]
    """Between the two layers of the classification head; None: no head, and nothing to run."""
    problem: Optional[str]
    labels: Tuple[str, ...]
    """`id2label` in order of id."""


@dataclass(frozen=True)
class Graph:
    """An ONNX graph of one kind, with its weights as inputs."""

    file: str
    bytes: int
    sha256: str
    opset: int
    ir: int


@dataclass(frozen=True)
class Exits:
    """The exit heads: their weights, and what they are (form, exits, trained or not)."""

    heads: File
    description: File


@dataclass(frozen=True)
class Manifest:
    """The whole. `shards` and `graphs` are keyed by name and kind; `files` are the companions (config, tokenizer)."""

    source: Source
    encoder: Encoder
    stages: Tuple[Stage, ...]
    shards: Dict[str, Shard]
    graphs: Dict[str, Graph]
    files: Tuple[File, ...]
    exits: Optional[Exits] = None
    proof: Optional[Dict[str, Any]] = None

    @property
    def layers(self) -> Tuple[Stage, ...]:
        """The stages after which an exit can stand."""
        return tuple(stage for stage in self.stages if stage.role == "layer")


@dataclass(frozen=True)
class ModuleManifest:
    """The same of a module that was divided by a run of it. All its stages have the role `layer`."""

    source: Source
    program: Program
    stages: Tuple[Stage, ...]
    shards: Dict[str, Shard]
    graphs: Dict[str, Graph]
    files: Tuple[File, ...]
    exits: Optional[Exits] = None
    proof: Optional[Dict[str, Any]] = None


def dumps(manifest: Union[Manifest, ModuleManifest]) -> bytes:
    """The manifest as bytes; equal manifests give equal bytes. Raises StoreError where it is longer than is read."""
    version = FORMAT if isinstance(manifest, Manifest) else MODULE_FORMAT
    tree = {"format": version, **asdict(manifest)}
    tree["shards"] = list(tree["shards"].values())
    data = seal(tree)
    if len(data) > MAX_MANIFEST_BYTES:
        what = f"manifest of {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are read"
        raise StoreError(what, FILE_NAME, "the model has too many tensors or labels for this version")
    return data


def seal(tree: Dict[str, Any]) -> bytes:
    """A tree as the bytes of a manifest: JSON whose last key is the sha256 of all bytes before that key."""
    body = json.dumps(tree, indent=1, ensure_ascii=True, allow_nan=False).encode()[: -len("\n}")] + b",\n "
    return body + _last_line(body)


def is_sealed(data: bytes) -> bool:
    """Whether `data` ends as `seal` ends it."""
    body = data[: -len(_last_line(b""))]
    return data == body + _last_line(body)


def _last_line(body: bytes) -> bytes:
    return b'"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def all_files(manifest: Union[Manifest, ModuleManifest]) -> Tuple[File, ...]:
    """Every file that the manifest speaks of, in a fixed order."""
    exits = manifest.exits
    found = [File(shard.file, shard.bytes, shard.sha256) for shard in manifest.shards.values()]
    found += [shard.blocks for shard in manifest.shards.values() if shard.blocks is not None]
    found += [File(graph.file, graph.bytes, graph.sha256) for graph in manifest.graphs.values()]
    found += list(manifest.files)
    return tuple(found + ([exits.heads, exits.description] if exits is not None else []))


def require_head(manifest: Union[Manifest, ModuleManifest], where: object) -> None:
    """Raise StoreError unless the model ends in a classification head."""
    problem = manifest.encoder.problem if isinstance(manifest, Manifest) else manifest.program.problem
    if problem is None:
        raise StoreError(
            f"{manifest.source.architecture} has no classification head",
            where,
            "divide a model ...ForSequenceClassification or ...ForImageClassification, or run it with offramp.stream",
        )

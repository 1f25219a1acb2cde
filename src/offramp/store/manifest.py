"""The manifest of a store, `offramp.json`: what the store computes, where its tensors lie, and the digest of each file.

The classes are plain data, written here as format 3 and read by `store.parsing`, which checks them for every caller.
docs/store-format.md describes the format for other implementations.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Dict, FrozenSet, List, Optional, Sequence, Tuple

from offramp.errors import StoreError
from offramp.program.blocks import whole_name
from offramp.program.checks import MAX_RANK, NAMED, POSITIVE, require_distinct
from offramp.program.dtypes import ALIGNMENT_BYTES, DTYPES, FLOAT, HALF
from offramp.program.encoder import PRODUCTS, TEMPLATES
from offramp.program.narrow import has_integers, rounding_of
from offramp.program.program import Program, plain
from offramp.store.repeats import compress
from offramp.store.safetensors import num_bytes

FILE_NAME = "offramp.json"
LABELS_FILE = "labels.json"
ENCODER_FORMAT, MODULE_FORMAT, FORMAT = FORMATS = 1, 2, 3
"""Formats that are read; only the last one is written. The first describes a text encoder, the second a module that was
divided by a run."""
MAX_MANIFEST_BYTES = 2 << 20
"""Largest manifest that is read. Parsing a hostile manifest takes up to 25 times its size in memory."""
MAX_GRAPH_BYTES = 1 << 20
"""Largest graph that is read. Weights are inputs of a graph, so it holds no large tensors."""
MAX_EXITS_BYTES = 1 << 20
"""Largest `exits.json` that is read: 100 bytes for each of the exits of 4,096 layers, and room."""
MAX_LABELS_BYTES = 16 << 20
"""Largest `labels.json` that is read: 70,000 labels take 1 to 4 MiB."""
BLOCK_BYTES = 64 << 10
"""Block size of the digests of gathered tables, so that one row can be verified without reading its table."""
NAMES = "names"
"""Method of a division by the names of tensors."""
FP32, FP16, INT8 = STORED = "fp32", "fp16", "int8"
"""Precisions that the matrices of the layers of a text encoder are stored in."""
_FILE = re.compile(r"(graphs/)?[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HALF = 32
"""Digits of the half of a fingerprint."""
_SHA256 = {"pattern": re.compile(r"[0-9a-f]{64}")}
_DTYPE, _SHAPE = {"choices": tuple(DTYPES)}, {"most": MAX_RANK}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a shard. `role` is its name in the computation; `offset` counts from the first data byte."""

    name: str
    role: str
    dtype: str = field(metadata=_DTYPE)
    shape: Tuple[int, ...] = field(metadata=_SHAPE)
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return num_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class File:
    """A file of the store with its size and digest."""

    file: str = field(metadata={"pattern": _FILE})
    bytes: int
    sha256: str = field(metadata=_SHA256)


@dataclass(frozen=True)
class Shard:
    """Tensors that are loaded and evicted together: a safetensors file. Data begin at `data_start`, on a page."""

    name: str = field(metadata=NAMED)
    file: str = field(metadata={"pattern": _FILE})
    bytes: int
    sha256: str = field(metadata=_SHA256)
    data_start: int
    tensors: Tuple[Tensor, ...]
    blocks: Optional[File] = None
    """File of the block digests; set where rows are gathered from the tables of this shard."""

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.bytes - self.data_start

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the whole file; the last may be short."""
        return -(-self.bytes // BLOCK_BYTES)


@dataclass(frozen=True)
class Layout:
    """A shard in memory: its size, and its tensors by name, whose offsets count from `start`.

    It is the file itself, unless tensors of it are upcast: then it is the tensors alone, aligned. Rows of tables are
    upcast when they are gathered.
    """

    num_bytes: int
    start: int
    tensors: Dict[str, Tensor]
    is_file: bool = True


@dataclass(frozen=True)
class Source:
    """Origin of the store. `widened_from` is the narrow dtype of the source, if it was converted to F32."""

    fingerprint: str = field(metadata=_SHA256)
    architecture: str
    model_type: str
    method: str
    widened_from: Optional[str] = field(default=None, metadata=_DTYPE)


@dataclass(frozen=True)
class Graph(File):
    """ONNX graph of one kernel, with its weights as inputs."""

    opset: int = field(metadata=POSITIVE)
    ir: int = field(metadata=POSITIVE)


@dataclass(frozen=True)
class Exits:
    """The exit heads: their weights, and their description (form, exits, trained or not)."""

    heads: File
    description: File


@dataclass(frozen=True)
class ProvenInput:
    """One input of an example: NumPy's or PyTorch's name of its dtype, and its shape."""

    dtype: str
    shape: Tuple[int, ...] = field(metadata=_SHAPE)


@dataclass(frozen=True)
class ProvenExample:
    """One example that was run from the store under the smallest weight budget and compared with the whole module."""

    inputs: Dict[str, ProvenInput]
    inputs_sha256: str = field(metadata=_SHA256)
    equal: bool
    """All outputs were equal bit for bit."""
    unplanned_loads: int
    """Loads per pass of weights that the module used outside their stage."""
    disorders: int
    """Times per pass that the module called its stages in another order."""
    peak_weight_bytes: int
    weight_budget_bytes: int


@dataclass(frozen=True)
class Proof:
    """Result of the check that a division by a run makes of itself."""

    examples: Tuple[ProvenExample, ...] = ()
    is_paged: bool = False
    """True if weights are used outside their stages; a strict stream refuses such a store."""
    unsaved_buffers_sha256: Optional[str] = field(default=None, metadata=_SHA256)
    """Digest of the buffers that no checkpoint holds: a module built anew from its class must have the same."""


@dataclass(frozen=True)
class Manifest:
    """Content of `offramp.json`. `shards` are keyed by name and `graphs` by kernel."""

    source: Source
    program: Program
    shards: Dict[str, Shard]
    graphs: Dict[str, Graph]
    files: Tuple[File, ...]
    """Companions: config, tokenizer, captured graphs."""
    exits: Optional[Exits] = None
    proof: Optional[Proof] = None
    labels: Optional[File] = None
    """File of the labels in the order of their ids; None where the output has no labels."""
    inline_labels: Tuple[str, ...] = ()
    """Labels of formats 1 and 2, whose manifests contain them."""

    def tensors(self) -> Dict[str, Tuple[Shard, Tensor]]:
        """Return every tensor of the store with its shard, by name."""
        return self._tensors

    @cached_property
    def _tensors(self) -> Dict[str, Tuple[Shard, Tensor]]:
        return {tensor.name: (shard, tensor) for shard in self.shards.values() for tensor in shard.tensors}

    @property
    def precision(self) -> str:
        """`int8` or `fp16` if the matrices of layers are stored so; else the dtype of most bytes, such as `fp32`."""
        if any(map(has_integers, self.program.kernels.values())):
            return INT8
        sizes = Counter({FLOAT: 0})
        for _, tensor in self._tensors.values():
            sizes[tensor.dtype] += tensor.num_bytes
        most = max(sizes, key=lambda dtype: sizes[dtype])
        return FP16 if self.upcast else most.lower().replace("f", "fp", most.startswith("F"))

    @property
    def is_checkpoint(self) -> bool:
        """True if transformers can load the store as a model folder: a text encoder of whole matrices of floats."""
        has_blocks = any(kernel.template in PRODUCTS for kernel in self.program.kernels.values())
        return self.program.module is None and self.precision != INT8 and not has_blocks

    @cached_property
    def answering(self) -> str:
        """Fingerprint of the model that answers: of the source, its precision, and how its kernels round.

        It is the fingerprint of the source where nothing is rounded. Otherwise its first half is of the source and the
        precision alone, so that `precision_of` recognises the same model that is rounded otherwise.
        """
        whole, rounding = self._rounded(self.precision), self._rounding()
        if not rounding:
            return whole
        return whole[:_HALF] + hashlib.sha256(f"{whole} {json.dumps(rounding)}".encode()).hexdigest()[:_HALF]

    def precision_of(self, model_sha256: str) -> Optional[str]:
        """Return the precision of a store of the same source, from its fingerprint `answering`; None: another model."""
        if model_sha256 == self.source.fingerprint:
            return self.precision if self.answering == model_sha256 else FP32
        rounded = {self._rounded(precision)[:_HALF]: precision for precision in (INT8, FP16)}
        rounded.pop(self.source.fingerprint[:_HALF], None)  # of a precision that rounds nothing
        return rounded.get(model_sha256[:_HALF])

    def _rounded(self, precision: str) -> str:
        is_rounded = precision == INT8 or (precision == FP16 and self.source.method == NAMES)
        whole = f"{self.source.fingerprint} {precision}".encode()
        return hashlib.sha256(whole).hexdigest() if is_rounded else self.source.fingerprint

    def _rounding(self) -> List[Tuple[str, ...]]:
        """Return the tensors of integers with the rounding of their kernels, unless it is the default. Blocks of one
        tensor are one: they give the answers of the whole.
        """
        kernels = {name: rounding_of(kernel) for name, kernel in self.program.kernels.items() if has_integers(kernel)}
        found = {
            (whole_name(step.weights[port]), *map(str, rounding))
            for step in self.program.steps()
            for port, rounding in kernels.get(step.kernel, {}).items()
            if port in step.weights
        }
        return sorted(found)

    @cached_property
    def upcast(self) -> FrozenSet[str]:
        """Tensors that are stored as F16 and computed with as F32: weights of templates, and tables of look-ups."""
        halves = {name for name, (_, tensor) in self._tensors.items() if tensor.dtype == HALF}
        if not halves:
            return frozenset()
        templates = {name for name, kernel in self.program.kernels.items() if kernel.template in TEMPLATES}
        steps = [step for step in self.program.steps() if step.kernel in templates]
        taken = {name for step in steps for name in step.weights.values()}
        return frozenset(halves & taken.union(lookup.table for lookup in self.program.lookups.values()))

    @cached_property
    def taken(self) -> Dict[str, Tuple[Shard, Tensor]]:
        """Every tensor with its shard as kernels take it, by name: upcast tensors have the dtype F32."""
        wide = {name: replace(self._tensors[name][1], dtype=FLOAT) for name in self.upcast}
        return {name: (shard, wide.get(name, tensor)) for name, (shard, tensor) in self._tensors.items()}

    @cached_property
    def layouts(self) -> Dict[str, Layout]:
        """Each shard as a whole in memory, by its name."""
        return {name: self._layout(shard) for name, shard in self.shards.items()}

    def _layout(self, shard: Shard) -> Layout:
        if shard.blocks is not None or self.upcast.isdisjoint(tensor.name for tensor in shard.tensors):
            return Layout(shard.bytes, shard.data_start, {tensor.name: tensor for tensor in shard.tensors})
        end, places = 0, {}
        for tensor in shard.tensors:
            _, placed = self.taken[tensor.name]
            places[tensor.name] = placed = replace(placed, offset=-(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
            end = placed.offset + placed.num_bytes
        return Layout(end, 0, places, is_file=False)


@dataclass(frozen=True)
class Common:
    """Keys of the manifests of all formats, `format` excepted."""

    source: Source
    shards: Tuple[Shard, ...]
    graphs: Dict[str, Graph] = field(metadata=NAMED)
    files: Tuple[File, ...]
    exits: Optional[Exits]
    sha256: Any

    def shards_by_name(self) -> Dict[str, Shard]:
        """Return the shards by name. Raises WrongError where two have one name."""
        require_distinct((shard.name for shard in self.shards), "shard")
        return {shard.name: shard for shard in self.shards}

    def manifest(self, program: Program, *others: Any, **more: Any) -> Manifest:
        """Return the manifest of a program. `others` and `more` are its fields from `proof` on."""
        return Manifest(
            self.source, program, self.shards_by_name(), self.graphs, self.files, self.exits, *others, **more
        )


def dumps(manifest: Manifest) -> bytes:
    """Return the manifest as bytes of format 3; equal manifests give equal bytes.

    Raises ValueError for labels that are not in a file, StoreError for a manifest that is longer than is read.
    """
    if manifest.inline_labels:
        raise ValueError("format 3 keeps labels in a file: write labels_bytes() and set Manifest.labels")
    tree = {"format": FORMAT, **plain(manifest)}
    del tree["inline_labels"]
    tree["program"] = compress(tree["program"])
    tree["shards"] = list(tree["shards"].values())
    data = seal(tree)
    if len(data) > MAX_MANIFEST_BYTES:
        what = f"manifest of {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are read"
        raise StoreError(what, FILE_NAME, "the model has too many tensors or stages for this version")
    return data


def labels_bytes(labels: Sequence[str]) -> bytes:
    """Return the content of `labels.json`: a JSON list of strings in the order of their ids."""
    return json.dumps(list(labels), indent=0).encode() + b"\n"


def seal(tree: Dict[str, Any]) -> bytes:
    """Return a tree as the bytes of a manifest: JSON whose last key is the sha256 of all bytes before that key."""
    body = json.dumps(tree, indent=1, ensure_ascii=True, allow_nan=False).encode()[: -len("\n}")] + b",\n "
    return body + _last_line(body)


def is_sealed(data: bytes) -> bool:
    """Return whether `data` ends as `seal` ends it."""
    body = data[: -len(_last_line(b""))]
    return data == body + _last_line(body)


def _last_line(body: bytes) -> bytes:
    return b'"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def all_files(manifest: Manifest) -> Tuple[File, ...]:
    """Return every file that the manifest names, in a fixed order."""
    shards, exits = manifest.shards.values(), manifest.exits
    found = [File(shard.file, shard.bytes, shard.sha256) for shard in shards]
    found += [shard.blocks for shard in shards if shard.blocks is not None]
    found += [*manifest.graphs.values(), *manifest.files]
    found += [] if manifest.labels is None else [manifest.labels]
    found += [] if exits is None else [exits.heads, exits.description]
    return tuple(found)


def captured_file(kernel: str) -> str:
    """Return the name of the file with a captured kernel's graph for PyTorch: operations as JSON."""
    return f"graphs/{kernel}.json"


def require_head(manifest: Manifest, where: object) -> None:
    """Raise StoreError unless the model ends in a classification head."""
    if manifest.program.problem is None:
        what = f"{manifest.source.architecture} has no classification head"
        models = "...ForSequenceClassification or ...ForImageClassification"
        streamed = "run it with offramp.stream"
        if manifest.program.module is None:
            streamed = f"divide with --method eager and {streamed}"
        raise StoreError(what, where, f"divide a model {models}, or {streamed}")

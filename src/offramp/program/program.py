"""The description of one computation, the same for every model: inputs, stages of steps, values and exits.

A program is plain data and needs the standard library only. Places of weights on disk belong to `offramp.store`, and
computing belongs to `offramp.backends`.
"""

from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple, Union

from offramp.program.checks import MAX_RANK, NAMED, POSITIVE

BATCH, TOKENS, BATCH_TOKENS = "batch", "tokens", "batch*tokens"
Axis = Union[str, int]
"""`batch`, `tokens`, `batch*tokens` (rows of equal length, one after another), or a size."""
AXES = (BATCH, TOKENS, BATCH_TOKENS)
INPUT_IDS, ATTENTION_MASK = "input_ids", "attention_mask"
TOKEN_TYPE_IDS, POSITION_IDS = "token_type_ids", "position_ids"
TEXT_INPUTS = (INPUT_IDS, ATTENTION_MASK, TOKEN_TYPE_IDS)
"""The inputs that a module for texts may be called with; int64 [B, S] each."""
SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEMS = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
EXIT_KERNEL = "exit"
"""The kernel that computes the logits of an exit head."""
CAPTURED = "captured"
"""Template of kernels that are graphs in the store; every other template is written by a backend."""
POOLED_LINEAR = "pooled-linear"
"""Template of exit heads of captured programs: the mean over tokens or places, then one linear layer."""
BEGIN, LAYER, END = "begin", "layer", "end"
"""Roles of stages: before the first layer, a layer (after which rows may leave), after the last layer."""
_SIZED = {"choices": AXES, "most": MAX_RANK}


@dataclass(frozen=True)
class Value:
    """A tensor that flows between steps: NumPy's name of its dtype, and its axes.

    A size among the axes of a captured value is the one it had in the example, not a promise.
    """

    dtype: str
    axes: Tuple[Axis, ...] = field(metadata=_SIZED)

    @property
    def row_axis(self) -> Optional[int]:
        """Index of the axis along which rows can be taken out, or None."""
        return next((i for i, axis in enumerate(self.axes) if axis in (BATCH, BATCH_TOKENS)), None)

    @property
    def width_axis(self) -> int:
        """Index of the axis that an exit head reads."""
        return 2 if len(self.axes) == 3 else 1

    @property
    def width(self) -> int:
        """Size of the axis that an exit head reads: [B*S, H], [B, S, H], [B, H] or a feature map [B, H, ...]."""
        width = self.axes[self.width_axis]
        assert isinstance(width, int), "checked by the parser where an exit stands"
        return width

    def shape(self, num_rows: int, length: int) -> Tuple[int, ...]:
        """Return the shape for B rows of S tokens."""
        sizes = {BATCH: num_rows, TOKENS: length, BATCH_TOKENS: num_rows * length}
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.axes)


@dataclass(frozen=True)
class Input:
    """An input of the program: its dtype and axes, and the sizes that the division was proven for."""

    dtype: str
    axes: Tuple[Axis, ...] = field(metadata=_SIZED)
    largest: Tuple[Optional[int], ...] = field(default=(), metadata=POSITIVE)
    """Largest size of each axis among the examples, where they differ; None where the size is fixed: by `axes`, or for
    `tokens` by `Program.example`. Empty: only the model's own limits apply."""


@dataclass(frozen=True)
class LookUp:
    """A value made of rows of a table: only the rows named by an input are read from the store."""

    table: str
    """A tensor of a shard whose rows are gathered."""
    input: str
    value: Value


@dataclass(frozen=True)
class Kernel:
    """One small graph whose weights are inputs; steps that differ only in weights share it."""

    template: str
    attributes: Mapping[str, Union[int, float, str, None]] = field(default_factory=dict)
    """Settings that the template needs in addition to the shapes of its inputs, such as `num_heads`."""
    keeps_intermediates: bool = False
    """The result is larger than the values between layers, so the next step must run before another batch does."""


@dataclass(frozen=True)
class Step:
    """One call of a kernel."""

    kernel: str = field(metadata=NAMED)
    reads: Mapping[str, str] = field(default_factory=dict)
    """Input of the kernel -> value (an input, a look-up, or what an earlier step wrote)."""
    writes: Mapping[str, Value] = field(default_factory=dict)
    """Value -> what it is, in the order of the kernel's results. Every value is written once."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """Input of the kernel -> tensor of the shards of this step."""
    constants: Mapping[str, str] = field(default_factory=dict)
    """Input of the kernel -> tensor that stays in memory."""
    shards: Tuple[str, ...] = field(default=(), metadata=NAMED)
    """Shards that must be in memory while the kernel runs, in the order in which they are read."""


@dataclass(frozen=True)
class Stage:
    """The steps up to the next place where rows may leave."""

    name: str = field(metadata=NAMED)
    role: str = field(metadata={"choices": (BEGIN, LAYER, END)})
    steps: Tuple[Step, ...] = ()
    exit: Optional[str] = None
    """The value that an exit head after this stage reads, where an exit can stand."""


@dataclass(frozen=True)
class Output:
    """Result of a program: a value and its meaning."""

    value: str
    """Empty where only the module's own code computes it."""
    problem: Optional[str] = field(default=None, metadata={"choices": PROBLEMS})
    """One of PROBLEMS; None where the value is no answer of a classification or regression head."""
    num_labels: int = 0


@dataclass(frozen=True)
class Texts:
    """Requirements of a model on the tokens of texts."""

    vocab_size: int = field(metadata=POSITIVE)
    max_length: int = field(metadata=POSITIVE)
    """Longest input in tokens."""
    num_token_types: int
    """0 where the model has no token types."""
    pad_token: Optional[int]
    """None where the model has no token for padding, so that only texts of one length make a batch."""
    position_offset: int = 0
    """Row of the position table that the first token takes (RoBERTa: 2)."""


@dataclass(frozen=True)
class Call:
    """A call of a module within a pass: its full name, and which of its calls, from 1."""

    module: str
    number: int = field(metadata=POSITIVE)


@dataclass(frozen=True)
class Part:
    """One part of a module's own code: what `offramp.stream` needs in memory from one module call to the next."""

    shards: Tuple[str, ...] = field(metadata=NAMED)
    start: Optional[Call]
    """The module call that it begins with; None for the first part."""
    flows: Tuple[Value, ...]
    """Values made earlier that it or a later part reads; weights, buffers and inputs are not among them."""
    hidden: Optional[int]
    """Index in `flows` of the hidden state, where that is the first argument of the call and all that changes on the
    way: an exit can stand before such a part."""


@dataclass(frozen=True)
class Module:
    """Description of a module that was divided by a run, for `offramp.stream`."""

    name: str
    """Importable name of the class."""
    weights_sha256: str
    """Digest of names, dtypes and shapes of all parameters and saved buffers, and of which share memory."""
    versions: Mapping[str, str]
    """Versions of the libraries that it was divided with."""
    parts: Tuple[Part, ...]
    aliases: Mapping[str, Tuple[str, ...]]
    """Tensor of the store -> further names of the same memory."""
    buffers: Tuple[str, ...]
    """Tensors that are buffers of the module: they always stay in memory."""
    pinned: Tuple[str, ...]
    """Shards that stay in memory: the code keeps references to them from one part to another."""
    sliced: Tuple[str, ...]
    """Large tensors, each alone in its shard, that only linear layers and look-ups use: where memory is short they are
    read a few rows at a time."""
    unused: Tuple[str, ...]
    """Tensors that the example never touched."""


@dataclass(frozen=True)
class Program:
    """Computation of a store. `stages` is empty where only the module's own code can run it (`offramp.stream`)."""

    inputs: Mapping[str, Input]
    lookups: Mapping[str, LookUp] = field(default_factory=dict)
    kernels: Mapping[str, Kernel] = field(default_factory=dict, metadata=NAMED)
    stages: Tuple[Stage, ...] = ()
    """One of role `begin`, the layers, one of role `end`."""
    output: Optional[Output] = None
    texts: Optional[Texts] = None
    """Set where the inputs are made from texts by the tokenizer in the store."""
    module: Optional[Module] = None
    """Set where the program was captured from a run."""
    activation_bytes: int = 0
    """Most bytes of values that lived at once in the example of a captured program."""
    example: Tuple[int, int] = field(default=(1, 1), metadata=POSITIVE)
    """Rows and tokens of that example."""

    @property
    def layers(self) -> Tuple[Stage, ...]:
        """Stages after which rows may leave; the last is followed by the model's own head."""
        return tuple(stage for stage in self.stages if stage.role == LAYER)

    @property
    def problem(self) -> Optional[str]:
        """Kind of answer that the output is, or None."""
        return None if self.output is None else self.output.problem

    def steps(self) -> Iterator[Step]:
        """Yield all steps in order."""
        for stage in self.stages:
            yield from stage.steps

    def values(self) -> Dict[str, Value]:
        """Return every value by name: inputs, look-ups, and what steps write."""
        found: Dict[str, Value] = {name: Value(each.dtype, each.axes) for name, each in self.inputs.items()}
        found.update((name, lookup.value) for name, lookup in self.lookups.items())
        for step in self.steps():
            found.update(step.writes)
        return found


def can_carry_exit(value: Value, tokens: Optional[int] = None, of_texts: bool = False) -> bool:
    """Return whether an exit head can read a value: float32 with rows and a width; for texts one place for each token.

    `tokens`: length of the example, where sizes are those of an example.
    """
    if value.dtype != "float32" or len(value.axes) < 2 or not isinstance(value.axes[value.width_axis], int):
        return False
    return not of_texts or (len(value.axes) == 3 and (tokens is None or value.axes[1] in (TOKENS, tokens)))


def fits_output(value: Value, output: Output) -> bool:
    """Return whether a value can be an output: where that is an answer, one number for each row and label."""
    return output.problem is None or value.axes == (BATCH, output.num_labels)


def plain(tree: Any) -> Any:
    """Return dataclasses, mappings and tuples as the dicts and lists of JSON, in the order of their fields."""
    if hasattr(tree, "__dataclass_fields__"):
        return {name: plain(getattr(tree, name)) for name in tree.__dataclass_fields__}
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [plain(value) for value in tree]
    return tree

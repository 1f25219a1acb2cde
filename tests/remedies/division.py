"""Remedies of the rooms division, streaming and backends: modules that cannot be divided, stores that do not run so."""

import copy
import json
import pickle
import re

import numpy as np
import torch
from torch import nn

import offramp
from offramp.division.checkpoints import example_of, load_inputs
from offramp.division.names.build import cut_division, plan_division
from offramp.store import Store
from offramp.streaming.weightless import class_of_folder, weightless
from offramp.units import parse_size
from tests.backends.narrow import write_rewritten
from tests.division.modules import WIDTH, Chain, Counting, Routed, Tied, ids, made, on_meta, vectors
from tests.division.tiny import config_of, entries_of
from tests.remedies.entries import Entry, closed, corrected, options, said_by
from tests.remedies.store import failing, named_file, spoilt, undo

EXPORTED = ("graphs are of the store of a module", "export")


def divide(w, module, inputs=None, name="made", **options):
    return offramp.divide(module, vectors() if inputs is None else inputs, w / name, **options)


def modules(place, says, wrong, right, inputs=vectors, **options):
    """An entry of a module that cannot be divided, and of the module that the remedy describes."""
    return corrected(
        place,
        lambda w: divide(w, wrong(), inputs(), **options),
        says,
        lambda w: divide(w, right(), inputs(), **options),
    )


def weight(says, wrong, right):
    """An entry of a tensor that a store cannot hold."""
    return modules(
        "division/proof.py: the module has no weights", says, lambda: holding(wrong()), lambda: holding(right())
    )


def holding(tensor, *, is_saved=True):
    module = made(Chain)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter("held", tensor)
    else:
        module.register_buffer("held", tensor, persistent=is_saved)
    return module


def many_blocks(w, block_bytes=100):
    """A model of 24 layers, none of whose products fits a block."""
    settings = config_of(hidden_size=64, num_hidden_layers=24)
    return cut_division(plan_division(settings, entries_of(settings)), block_bytes, print)


def larger_blocks(w, said):
    many_blocks(w, parse_size(re.search(r"--block (\S+)", said)[1]))


larger_blocks.says = "the division with blocks of the size that the message names"


class Own(nn.Parameter):
    """As libraries that quantise have them."""

    def scaled(self):
        return self * 2


def of_kind(kind):
    module = made(Chain)
    module.first.weight = kind(module.first.weight.detach())
    return module


def lazy(has_run=False):
    module = nn.Sequential(nn.LazyLinear(3)).eval()
    if has_run:
        module(vectors())
    return module


class Listed(nn.Module):
    """Reads a weight from a list of its own, or from its module."""

    def __init__(self, is_own=True):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.kept = [self.inner.weight] if is_own else None

    def forward(self, hidden):
        return self.inner(hidden) @ (self.kept[0] if self.kept else self.inner.weight)


class Clock(nn.Linear):
    """Answers differently each time, unless it stands still."""

    times, stands = 0, False

    def forward(self, hidden):
        Clock.times += not self.stands
        return super().forward(hidden) + Clock.times


class Looking(nn.Linear):
    """Computes otherwise on weights that are in memory."""

    def forward(self, hidden):
        return super().forward(hidden) + (type(self.weight) is nn.Parameter)


class Keyed(nn.Linear):
    """Finds a number by a weight, or computes it from the weight."""

    def __init__(self, finds):
        super().__init__(WIDTH, WIDTH)
        self.numbers = {self.weight: 2.0} if finds else None

    def forward(self, hidden):
        return super().forward(hidden) * (self.numbers[self.weight] if self.numbers else self.weight[0, 0])


def clock(stands):
    module = nn.Sequential(made(nn.Linear, WIDTH, WIDTH), made(Clock, WIDTH, WIDTH)).eval()
    module[1].stands = stands
    return module


class Writing(nn.Module):
    """Writes to its weight, or computes a new tensor."""

    def __init__(self, writes):
        super().__init__()
        self.inner, self.writes = nn.Linear(WIDTH, WIDTH), writes

    def forward(self, hidden):
        if self.writes:
            self.inner.weight.data.mul_(1.0)
        return self.inner(hidden)


class NoPlace(Chain):
    def forward(self, hidden):
        return float(super().forward(hidden).sum())


def offloaded():
    import accelerate

    return accelerate.cpu_offload(made(Chain), "cpu")


def meta_buffer(is_meta):
    module = made(Tied)
    if is_meta:
        module.shift = module.shift.to("meta")
    return module


def stream(w, module, **options):
    """Divide a chain and stream a module from its store."""
    store = w / "made"
    if not store.exists():
        divide(w, made(Chain))
    with offramp.stream(module, store, **options) as model:
        return model(vectors())


def streams(place, says, wrong, right, **options):
    return corrected(place, lambda w: stream(w, **wrong()), says, lambda w: stream(w, **right()), **options)


def changed():
    module = made(Chain)
    module.blocks[2].up.bias.data[1] += 1
    return module


def training():
    return made(Chain).train()


def eager(says, module, inputs=vectors, **more):
    """An entry of a module that has no graph, and is divided with the method that the message names."""
    method = {"method": "export", **more}
    return corrected(
        "division/messages.py: {}",
        lambda w: divide(w, module(), inputs(), **method),
        says,
        lambda w: divide(w, module(), inputs(), **{**method, "method": "eager"}),
    )


def strictly(w, module, store, inputs):
    with offramp.stream(module, store, strict=True) as model:
        return model(inputs)


def routed(w, more=()):
    return divide(w, made(Routed), vectors().abs(), f"routed{len(more)}", more_inputs=list(more))


def negative():
    return -vectors().abs()


class Halved(Chain):
    """A chain that halves its answers, unless it is built with another number."""

    def __init__(self, factor=0.5):
        super().__init__()
        self.factor = factor


def built(w, build):
    """Stream a chain that is built again from the store of one that does not halve."""
    if not (w / "halved").exists():
        divide(w, made(Halved, 1.0), name="halved")
    with offramp.stream(build, w / "halved") as model:
        return model(vectors())


class Functional(Chain):
    """Calls a block with halved weights through PyTorch where there are three rows, or computes with them."""

    def __init__(self, computes):
        super().__init__()
        self.computes = computes

    def forward(self, hidden):
        if len(hidden) == 3 and self.computes:
            hidden = hidden @ (self.first.weight * 0.5)
        elif len(hidden) == 3:
            halved = {name: weight * 0.5 for name, weight in self.blocks.named_parameters()}
            hidden = torch.func.functional_call(nn.Sequential(*self.blocks), halved, (hidden,))
        return super().forward(hidden)


def functional(w, computes):
    store = w / f"functional{computes}"
    if not store.exists():
        offramp.divide(made(Functional, computes), vectors(), store)
    with offramp.stream(made(Functional, computes), store, weight_budget="6KiB") as model:
        return model(vectors(3))


def closed_stream(w, again=False):
    w.once(divide_chain)
    module = made(Chain)
    model = offramp.stream(module, w / "made")
    with model:
        model(vectors())
    if not again:
        return module(vectors())
    with offramp.stream(module, w / "made") as model:
        return model(vectors())


def copied_while_streamed(w, copied):
    w.once(divide_chain)
    module = made(Chain)
    with offramp.stream(module, w / "made") as model:
        model(vectors())
    with offramp.stream(module, w / "made", weight_budget=70_000):
        return copied(module)


def replaced_weight(w, in_stream):
    """Replace a weight in the stream of a module, or before it is divided."""
    module, store = made(Chain), w / ("made" if in_stream else "new")
    weight = torch.nn.Parameter(torch.zeros_like(module.first.weight))
    if not in_stream:
        module.first.weight = weight
        offramp.divide(module, vectors(), store)
    with offramp.stream(module, store) as model:
        model.module.first.weight = weight if in_stream else model.module.first.weight
        return model(vectors())


def divide_chain(w):
    divide(w, made(Chain))


def twice(w, closes):
    w.once(divide_chain)
    module = made(Chain)
    one = offramp.stream(module, w / "made").open()
    if closes:
        one.close()
    try:
        with offramp.stream(module, w / "made") as model:
            return model(vectors())
    finally:
        one.close()


def buffers_of_another(w, given):
    module = made(Tied)
    module.positions += 1
    store = w / "tied"
    if not store.exists():
        divide(w, module, ids(), "tied")
    with offramp.stream(module if given else Tied, store) as model:
        return model(ids())


def stream_tied(w, module):
    if not (w / "plainly").exists():
        divide(w, made(Tied), ids(), "plainly")
    with offramp.stream(module, w / "plainly") as model:
        return model(ids())


def named_weight_budget(w, said):
    stream(w, made(Chain), weight_budget=said.rpartition("works is ")[2])


named_weight_budget.says = "the weight budget that the message names"


def named_budget(w, said):
    stream(w, made(Chain), budget=said.rpartition("works is ")[2].split()[0])


named_budget.says = "the budget that the message names"


class Normed(nn.Module):
    """Layers whose weight a hook computes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(torch.nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH)) for _ in range(3))

    def forward(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def stream_normed(w, weight_budget):
    if not (w / "made").exists():
        divide(w, made(Normed))
    with offramp.stream(made(Normed), w / "made", weight_budget=weight_budget) as model:
        return model(vectors())


def named_bytes(w, said):
    stream_normed(w, said.rpartition("works is ")[2])


named_bytes.says = "the weight budget that the message names"


def pickled_stream(w):
    divide(w, made(Chain))
    with offramp.stream(made(Chain), w / "made") as model:
        pickle.dumps(model)


def stream_there(w, said):
    """Stream in another process."""
    from tests.remedies.runtime import in_another_process

    code = f"""import offramp, torch
from offramp.store import Store
from tests.backends.narrow import write_rewritten
from tests.division.modules import Chain, made, vectors
with offramp.stream(made(Chain), {str(w / "made")!r}) as model:
    print(torch.equal(model(vectors()), made(Chain)(vectors())))"""
    assert in_another_process(code).strip() == "True"


stream_there.says = "`offramp.stream` in the other process"


def without_graphs(w):
    """The store of a module that was divided without onnxscript."""
    w.edit(lambda tree: {**tree, "graphs": {}}, "export")


def load(w, name, **options):
    with offramp.load(w.copy(name), threads=1, **options) as classifier:
        return classifier.predict(["the bank fell"])


def config(change, act=None):
    def spoil(w):
        w.edit_json("model/config.json", lambda tree: {**tree, **change})

    return spoil


def tensors_of_model(change, name="model"):
    """Change the tensors of a model."""

    def spoil(w):
        from safetensors.numpy import load_file, save_file

        path = w.copy(name) / "model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    return spoil


def whole(w, said):
    """Put the whole models back."""
    import shutil

    for name in ("config.json", "model.safetensors"):
        shutil.copy(w.made.model / name, w.model)
        shutil.copy(w.made.plain / name, w.copy("plain"))


whole.says = "the whole model is put back"
MAKE = "divide model another"


def tensors(place, says, change, act=whole, work=MAKE, **more):
    name = "plain" if " plain " in work else "model"
    return Entry(place, spoilt(tensors_of_model(change, name), work), says, act, **more)


def without_prefix(w, said):
    tensors_of_model(lambda all: {name.removeprefix("wrapped."): array for name, array in all.items()})(w)


without_prefix.says = "the prefix that the message names is taken off"


def two_layers(w, said):
    w.edit_json("model/config.json", lambda tree: {**tree, "num_hidden_layers": 2})
    for name in ("exits.json", "exits.safetensors"):
        (w.model / name).unlink()


two_layers.says = "config.json is corrected"


def low(tensors):
    return {name: array for name, array in tensors.items() if ".layer.2." not in name and ".layer.3." not in name}


EXPORT = "divide plain export --force --method export"


def of_export(place, spoil, backend="torch"):
    """An entry of a store of graphs, which is divided again."""
    return Entry(place, spoilt(spoil, lambda w: load(w, "export", backend=backend)), "divide the model again", EXPORT)


def captured_graphs(change):
    """Change all captured graphs for PyTorch."""

    def spoil(w):
        for path in w.copy("export").glob("graphs/*.json"):
            named_file(f"graphs/{path.name}", change, "export")(w)

    return spoil


EVAL_EXPORT = "eval export --train mine.tsv --split dev --max-length 16"
FOUR_TEXTS = "run export --backend torch --threads 1 --text a --text b --text c --text d"


def with_operations(change):
    """Add operations to a captured graph."""

    def added(data):
        tree = json.loads(data)
        change(tree)
        return json.dumps(tree).encode()

    return added


@with_operations
def without_rows(tree):
    for i, name in enumerate(tree["outputs"]):
        tree["nodes"].append([f"z{i}", "aten.slice.Tensor", [{"v": name}, 0, 0, 0], {}])
        tree["outputs"][i] = f"z{i}"


@with_operations
def with_unlisted(tree):
    tree["nodes"].append(["z", "aten.nonzero.default", [{"v": tree["outputs"][0]}], {}])


@with_operations
def with_squares(tree):
    """A value of 4 MiB for each pair of rows."""
    rows, pairs = ["z0", "aten.sym_size.int", [{"v": "r0"}, 0], {}], ["z1", "mul", [{"v": "z0"}, {"v": "z0"}], {}]
    tree["nodes"] += [rows, pairs, ["z2", "aten.zeros.default", [[{"v": "z1"}, 1 << 20]], {}]]


def with_operation(operator):
    """Add an operation of the first input, whose result nothing uses."""
    return lambda graph: graph.node.add(op_type=operator, input=[graph.input[0].name], output=["odd"])


def without_operators(w):
    """A table of operators that has none."""
    from offramp.backends import onnx_checks

    w.patch(onnx_checks, "OPERATORS", {})


def narrow_store(w):
    """A store with integer weights."""
    if not (w / "int8").exists():
        with Store(w.store) as source:
            write_rewritten(source, w / "int8", narrow=True)
    return w / "int8"


def load_narrow(w, **options):
    with offramp.load(narrow_store(w), threads=1, **options) as classifier:
        return classifier.predict(["the bank fell"])


def without_integer_product(w):
    """ONNX Runtime has no operator that multiplies integers."""
    from offramp.backends import onnx_templates

    w.patch(onnx_templates, "INTEGER_PRODUCT", "Absent")


def full_arena(w):
    """ONNX Runtime's arena has no more memory."""
    import onnxruntime

    w.copy("export")  # divided while there was memory
    full = RuntimeError("Available memory of 0 is smaller")
    failing(onnxruntime.InferenceSession, "run", full, lambda session, names, feeds, *_: set(feeds) != {"n"})(w)


def without_captured(tree):
    tree["files"] = [each for each in tree["files"] if not each["file"].startswith("graphs/")]


def another_graph(w):
    """Add a graph of a kernel that the program does not have."""

    def add(tree):
        graph = next(iter(tree["graphs"].values()))
        (w / "export/graphs/mixer.onnx").write_bytes((w / "export" / graph["file"]).read_bytes())
        tree["graphs"]["mixer"] = {**graph, "file": "graphs/mixer.onnx"}

    w.edit(add, "export")


def onnx_bytes(change):
    """Change the bytes of all captured graphs for ONNX Runtime."""

    def spoil(w):
        for path in w.copy("export").glob("graphs/*.onnx"):
            named_file(f"graphs/{path.name}", change, "export")(w)

    return spoil


def onnx_graphs(change):
    """Change all captured graphs for ONNX Runtime."""

    def changed(data):
        import onnx

        model = onnx.load_from_string(data)
        change(model.graph)
        return model.SerializeToString()

    return onnx_bytes(changed)


def twice_out(graph):
    graph.output.append(graph.output[0].__class__())
    graph.output[-1].CopyFrom(graph.output[0])
    graph.node.add(op_type="Identity", input=[graph.output[0].name], output=["again"], name="again")
    graph.output[-1].name = "again"


def beyond_the_end(graph):
    """Gather a row that the last value does not have, which only a run tells."""
    from onnx import numpy_helper

    graph.initializer.append(numpy_helper.from_array(np.array([2**20]), "row"))
    graph.node.add(op_type="Gather", input=[graph.output[0].name, "row"], output=["odd"], name="odd")
    graph.output[0].name = "odd"


def without_exporter(w):
    """An exporter of graphs that fails."""
    failing(torch.onnx, "export", RuntimeError("no such operation"))(w)


def on_ort(w, backend="ort"):
    if not (w / "another").exists():
        w.run("divide plain another --method export")
    with offramp.load(w / "another", threads=1, backend=backend) as classifier:
        return classifier.predict(["the bank fell"])


def other_difference(w):
    from offramp.division import export

    w.patch(export, "TOLERANCE", -1.0)


EXPORT_AGAIN = "divide plain another --method export"
NARROW_EXPORT = f"{EXPORT_AGAIN} --dtype int8"


def narrow_export(w):
    if not (w / "another").exists():
        w.run(NARROW_EXPORT)
    return w / "another"


def no_tolerance(w):
    from offramp.division import narrowing

    w.patch(narrowing, "TOLERANCE", -1.0)


def lora(all):
    return {**all, "bert.encoder.layer.0.attention.self.query.lora_A.weight": np.zeros((2, 32), np.float32)}


def integers(all):
    name = "bert.encoder.layer.0.output.dense.weight"
    return {**all, name: all[name].astype(np.int8)}


def narrow(all):
    name = "bert.encoder.layer.0.output.dense.weight"
    return {**all, name: all[name][:, :-1].copy()}


def exits_of_another(w):
    from safetensors.numpy import load_file, save_file

    path = w.model / "exits.safetensors"
    save_file({name: array[..., :-1].copy() for name, array in load_file(path).items()}, path)


def whole_exits(w, said):
    import shutil

    shutil.copy(w.made.model / "exits.safetensors", w.model)


whole_exits.says = "the exits of a training are put there"


def of_class(w, cls, name):
    from offramp.streaming.weightless import of_class

    w.copy("encoder" if name == "encoder" else "model")
    return of_class(cls(), w / name)


def wrong_class():
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel


def right_class():
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification


def class_named(change):
    return spoilt(lambda w: w.edit_json("model/config.json", change), lambda w: class_of_folder(w.model))


def without(*keys):
    return lambda tree: {name: value for name, value in tree.items() if name not in keys}


def restore_config(w, said):
    import shutil

    shutil.copy(w.made.model / "config.json", w.model)


restore_config.says = "config.json of the whole model"


def head_of_tokens(w):
    """A model without a pooler, whose config does not name its class."""
    tensors_of_model(lambda all: {name: array for name, array in all.items() if "pooler" not in name}, "plain")(w)
    w.edit_json("plain/config.json", without("architectures"))


def add_class(w, said):
    (found,) = re.findall(r'"architectures": (\[.*?\])', said)
    w.edit_json("plain/config.json", lambda tree: {**tree, "architectures": json.loads(found)})


add_class.says = "the key that the message names is added"


class Strange(nn.Module):
    """Takes an input of a name that offramp cannot make up."""

    main_input_name, config = "waves", None

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, waves):
        return self.inner(waves)


class Buffered(nn.Module):
    """Has a buffer that no checkpoint holds."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.ones_like(self.inner.weight), persistent=False)


class NoBuffer(nn.Module):
    """The module itself, built with data."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        return self.inner(hidden)


def layouts(w):
    """A module whose layouts somebody changed."""
    changed_file(w, transposed_module(), "layouts.json")


def attributes(w):
    """A module whose attributes somebody changed."""
    changed_file(w, made(Chain), "attributes.json")


def changed_file(w, module, name):
    """Change a file of the store of a module."""
    divide(w, module)
    w.store.rename(w / "aside") if (w / "store").exists() else None
    (w / "made").rename(w / "store")
    named_file(name, lambda data: b"[]")(w)
    (w / "store").rename(w / "made")


def divide_chain_again(w, said):
    divide(w, made(Chain), force=True)


divide_chain_again.says = "`offramp.divide(..., force=True)`"


def transposed_module():
    module = made(Chain)
    module.first.weight.data = module.first.weight.data.t().contiguous().t()
    return module


def stream_transposed(w):
    with offramp.stream(transposed_module(), w / "made") as model:
        return model(vectors())


def divide_transposed(w, said):
    divide(w, transposed_module(), force=True)


divide_transposed.says = "`offramp.divide(..., force=True)`"


def odd_inputs(w):
    np.savez("x.npz", odd=np.zeros(3))
    w.run("divide plain another --method eager --inputs x.npz")


def given_inputs(w):
    np.savez("x.npz", input_ids=np.ones((2, 5), np.int64), attention_mask=np.ones((2, 5), np.int64))
    w.run("divide plain another --method eager --inputs x.npz")


TABLE = [
    closed("backends/base.py: {} | stage", "unreachable", "divide the model again"),
    closed("backends/base.py: kernel {} is of the template", "unreachable", "divide the model again"),
    Entry(
        "backends/onnx_captured.py: graph {} is refused: {}",
        spoilt(onnx_graphs(with_operation("RandomNormalLike")), lambda w: load(w, "export")),
        "run it with --backend torch",
        said_by(lambda w: load(w, "export", backend="torch"), "`--backend torch`"),
        again=False,
    ),
    of_export("backends/onnx_captured.py: graph {} is refused: {}", onnx_bytes(lambda data: b"not a graph"), "ort"),
    of_export("backends/onnx_session.py: graph {} does not load", onnx_graphs(with_operation("Not")), "ort"),
    Entry(
        "backends/onnx_session.py: the values of a kernel take",
        spoilt(full_arena, lambda w: load(w, "export")),
        "use smaller batches or shorter inputs, or a larger --budget",
        undo,
        simulates="memory",
    ),
    Entry(
        "backends/onnx.py: ONNX Runtime",
        spoilt(without_integer_product, load_narrow),
        "run it with --backend numpy",
        said_by(lambda w: load_narrow(w, backend="numpy"), "`--backend numpy`"),
        again=False,
    ),
    of_export("backends/onnx.py: graphs of unknown kernels", another_graph, "ort"),
    of_export(
        "store/reader.py: graph refers to data in another file", onnx_bytes(lambda data: data + b"location"), "ort"
    ),
    of_export("backends/base.py: kernel {} gives {} values", onnx_graphs(twice_out), "ort"),
    closed("backends/base.py: kernel {} gives {}, not {}", "unreachable", "divide the model again"),
    closed("backends/base.py: the exit reads {}", "unreachable", "divide the model again"),
    closed("backends/base.py: graph {} does not take", "unreachable", "divide the model again"),
    of_export("backends/torch.py: the store has no {}", lambda w: w.edit(without_captured, "export")),
    of_export("backends/torch_graphs.py: not a captured graph", captured_graphs(lambda data: b"{}")),
    of_export("backends/base.py: kernel {} gives {} for {} rows", captured_graphs(without_rows)),
    corrected(
        "backends/torch_graphs.py: operation {} is none of those",
        spoilt(captured_graphs(with_unlisted), lambda w: load(w, "export", backend="torch")),
        "run it with offramp.stream, or with --trust-kernels if you trust its author",
        lambda w: load(w, "export", backend="torch", trust_kernels=True),
    ),
    corrected(
        "backends/torch_graphs.py: operation {} is none of those",
        spoilt(captured_graphs(with_unlisted), EVAL_EXPORT),
        "with --trust-kernels if you trust its author",
        f"{EVAL_EXPORT} --trust-kernels",
    ),
    corrected(
        "backends/torch.py: graph {} takes {}",
        spoilt(captured_graphs(with_squares), f"{FOUR_TEXTS} --batch 4"),
        "give fewer or shorter inputs at a time: --batch 1, --max-length 128",
        f"{FOUR_TEXTS} --batch 1",
    ),
    Entry(
        "backends/onnx.py: the store has no graph",
        spoilt(without_graphs, lambda w: load(w, "export")),
        "divide it with onnxscript installed",
        EXPORT,
    ),
    modules(
        "division/modules.py: the module is in training mode", "call eval() on it", training, lambda: training().eval()
    ),
    modules(
        "division/modules.py: a {} is no torch.nn.Module",
        "give the module that it was made of",
        lambda: torch.export.export(made(Chain), (vectors(),)),
        lambda: made(Chain),
    ),
    modules(
        "division/proof.py: the module has no weights",
        "divide the module that it was compiled from",
        lambda: torch.compile(made(Chain)),
        lambda: made(Chain),
    ),
    modules(
        "division/proof.py: the module has no weights",
        "build the module with its buffers",
        lambda: meta_buffer(True),
        lambda: meta_buffer(False),
        ids,
    ),
    modules(
        "division/proof.py: the module has no weights",
        "run the module once before it is divided",
        lazy,
        lambda: lazy(True),
    ),
    weight(
        "divide the module before it is quantised",
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        lambda: torch.ones(2),
    ),
    closed("division/proof.py: the module has no weights", "unreachable", "put weight.full_tensor() in its place"),
    modules(
        "division/proof.py: the module has no weights",
        "replace it with an nn.Parameter",
        lambda: of_kind(Own),
        lambda: of_kind(nn.Parameter),
    ),
    weight(
        "keep it in another dtype, complex numbers as complex64",
        lambda: torch.ones(2, dtype=torch.complex128),
        lambda: torch.ones(2, dtype=torch.complex64),
    ),
    weight(
        "replace it with its contiguous()",
        lambda: torch.randn(40).as_strided((WIDTH, WIDTH), (1, 1)),
        lambda: torch.randn(40).as_strided((WIDTH, WIDTH), (1, 1)).contiguous(),
    ),
    weight("keep its to_dense()", lambda: torch.eye(3).to_sparse(), lambda: torch.eye(3).to_sparse().to_dense()),
    weight(
        "replace it with its resolve_neg()",
        lambda: torch.randn(2, 2, dtype=torch.complex64).conj().imag,
        torch.randn(2, 2, dtype=torch.complex64).conj().imag.resolve_neg,
    ),
    modules(
        "division/modules.py: weight {} has no data",
        "give a module with its weights",
        lambda: made(Chain).to("meta"),
        lambda: made(Chain),
    ),
    modules(
        "division/modules.py: weight {} has no data",
        "load the model without device_map",
        offloaded,
        lambda: made(Chain),
    ),
    modules(
        "division/proof.py: weight {} is used through a reference",
        "have the code take it from its module",
        lambda: Listed().eval(),
        lambda: Listed(False).eval(),
    ),
    modules(
        "division/proof.py: two runs of the module", "make it deterministic", lambda: clock(False), lambda: clock(True)
    ),
    modules(
        "division/proof.py: {} for {}",
        "compute that from inputs and weights alone",
        lambda: nn.Sequential(made(Looking, WIDTH, WIDTH), nn.ReLU()).eval(),
        lambda: nn.Sequential(made(nn.Linear, WIDTH, WIDTH), nn.ReLU()).eval(),
    ),
    modules(
        "division/proof.py: the module fails where placeholders",
        "compute that from inputs and weights alone",
        lambda: Keyed(True).eval(),
        lambda: Keyed(False).eval(),
    ),
    modules(
        "division/proof.py: {} for {}",
        "keep no state between runs",
        lambda: made(Counting, adds=True),
        lambda: made(Chain),
    ),
    modules(
        "streaming/placeholders.py: a divided module keeps",
        "compute a new tensor instead",
        lambda: Writing(True).eval(),
        lambda: Writing(False).eval(),
    ),
    corrected(
        "streaming/capture.py: the example inputs are a {}",
        lambda w: divide(w, made(Chain), 3),
        "give a tuple of the arguments of the module",
        lambda w: divide(w, made(Chain), (vectors(),)),
    ),
    corrected(
        "division/proof.py: the example inputs do not suit",
        odd_inputs,
        "give --inputs FILE.safetensors with what it takes",
        given_inputs,
    ),
    streams(
        "streaming/streamed.py: the module is in training mode",
        "call eval() on it",
        lambda: {"module": training()},
        lambda: {"module": training().eval()},
    ),
    streams(
        "streaming/matching.py: {} is {} in the module, {} in the store",
        "or divide again",
        lambda: {"module": made(Chain, num_blocks=5)},
        lambda: {"module": made(Chain)},
    ),
    corrected(
        "streaming/attributes.py: the class builds another module",
        lambda w: built(w, Halved),
        "give a function that builds it as it was",
        lambda w: built(w, lambda: Halved(1.0)),
    ),
    corrected(
        "streaming/weightless.py: buffer {} has no data",
        lambda w: stream_tied(w, on_meta(Tied)),
        "give its class",
        lambda w: stream_tied(w, Tied),
    ),
    corrected(
        "streaming/weightless.py: a {} is no module",
        lambda w: stream(w, 3),
        "give the torch.nn.Module that was divided",
        lambda w: stream(w, made(Chain)),
    ),
    corrected(
        "streaming/weightless.py: it builds a {}",
        lambda w: stream(w, lambda: 3),
        "or its class",
        lambda w: stream(w, Chain),
    ),
    corrected(
        "streaming/streamed.py: the module puts another tensor",
        lambda w: functional(w, False),
        "compute with the tensor itself",
        lambda w: functional(w, True),
    ),
    streams(
        "streaming/matching.py: {} has other values",
        "or give its class",
        lambda: {"module": changed()},
        lambda: {"module": Chain},
    ),
    corrected(
        "streaming/matching.py: buffers that are in no checkpoint",
        lambda w: buffers_of_another(w, False),
        "give the tests.division.modules.Tied that was divided",
        lambda w: buffers_of_another(w, True),
    ),
    corrected(
        "streaming/streamed.py: {} is streamed already",
        lambda w: twice(w, False),
        "close the other stream first",
        lambda w: twice(w, True),
    ),
    corrected(
        "streaming/streamed.py: the stream is not open",
        lambda w: (divide(w, made(Chain)), offramp.stream(made(Chain), w / "made")(vectors())),
        "use it in a `with` block, or call open()",
        lambda w: (stream(w, made(Chain)), offramp.stream(made(Chain), w / "made").open()(vectors())),
    ),
    corrected(
        "streaming/placeholders.py: the weight {} is in a store",
        lambda w: copied_while_streamed(w, copy.deepcopy),
        "take its state_dict() in the stream",
        lambda w: copied_while_streamed(w, lambda module: copy.deepcopy(dict(module.state_dict()))),
    ),
    corrected(
        "streaming/streamed.py: the weight {} of a streamed module",
        lambda w: (w.once(divide_chain), replaced_weight(w, True)),
        "divide a module that has the new weights",
        lambda w: replaced_weight(w, False),
    ),
    corrected(
        "streaming/streamed.py: {} needs {}, and its stream is closed",
        closed_stream,
        "open the store again",
        lambda w: closed_stream(w, again=True),
    ),
    streams(
        "streaming/streamed.py: give budget, for the whole process",
        "or weight_budget, for weights alone",
        lambda: {"module": made(Chain), "budget": "8GiB", "weight_budget": "1GiB"},
        lambda: {"module": made(Chain), "budget": "8GiB"},
    ),
    Entry(
        "runtime/weight_plan.py: ",
        lambda w: stream(w, made(Chain), weight_budget=1),
        "the smallest weight budget that works",
        named_weight_budget,
        again=False,
    ),
    Entry(
        "runtime/planner.py: {} of {} is too small",
        lambda w: stream(w, made(Chain), budget="1MiB"),
        "the smallest budget that works is",
        named_budget,
        again=False,
    ),
    corrected(
        "streaming/streamed.py: {} is still referred",
        lambda w: strictly(w, made(Routed), routed(w), negative()),
        "divide with this input as an example",
        lambda w: strictly(w, made(Routed), divide(w, made(Routed), negative()), negative()),
    ),
    corrected(
        "streaming/streamed.py: {} is still referred",
        lambda w: strictly(w, made(Routed), routed(w), negative()),
        "or run without strict",
        lambda w: offramp.stream(made(Routed), w / "routed0").open()(negative()),
    ),
    corrected(
        "streaming/streamed.py: weights of this store are read",
        lambda w: strictly(w, made(Routed), routed(w, [negative()]), negative()),
        "or run without strict",
        lambda w: offramp.stream(made(Routed), w / "routed1").open()(negative()),
    ),
    corrected(
        "streaming/placement.py: this is the store of a {}",
        lambda w: offramp.stream(made(Chain), w.store).open(),
        "run it with offramp.load, or divide with --method eager",
        lambda w: (load(w, "store"), w.copy("eager")),
    ),
    corrected(
        "streaming/placement.py: the weights of this store are integers",
        lambda w: offramp.stream(made(Chain), narrow_export(w)).open(),
        "run it with offramp.load, or divide with --dtype fp32",
        lambda w: (
            offramp.load(w / "another", threads=1).close(),
            w.run("divide plain full --method export --dtype fp32"),
        ),
    ),
    eager("use --method eager", lambda: made(Counting)),
    corrected(
        "backends/base.py: the stages of this store are not graphs",
        lambda w: load(w, "eager"),
        "divide with --method export, or run it with offramp.stream",
        lambda w: load(w, "export"),
    ),
    Entry(
        "backends/onnx.py: the store has no graph",
        spoilt(without_graphs, lambda w: load(w, "export")),
        "run it with --backend torch",
        said_by(lambda w: load(w, "export", backend="torch"), "`--backend torch`"),
        again=False,
    ),
    corrected(
        "backends/base.py: kernel {} is of the template",
        lambda w: load(w, "export", backend="numpy"),
        "run it with --backend ort or torch",
        lambda w: [load(w, "export", backend=each) for each in ("ort", "torch")],
    ),
    tensors(
        "division/names/build.py: tensors do not fit",
        "get the whole model again",
        lambda all: dict(list(all.items())[3:]),
        work="divide model another --method names",
    ),
    tensors(
        "division/names/build.py: tensors do not fit",
        "take 'wrapped.' off",
        lambda all: {f"wrapped.{name}": array for name, array in all.items()},
        without_prefix,
        "divide model another --method names",
    ),
    tensors(
        "division/names/build.py: tensors do not fit",
        "config.json has more layers than the file",
        low,
        two_layers,
        "divide model another --method names",
    ),
    tensors(
        "division/names/build.py: {} and {} are the same tensor",
        "get the model again",
        lambda all: {**all, "bert.embeddings.LayerNorm.gamma": all["bert.embeddings.LayerNorm.weight"]},
        work="divide model another --method names",
    ),
    corrected(
        "division/build.py: model and store are the same folder",
        "divide store store --force",
        "choose another name for the store",
        MAKE,
    ),
    corrected(
        "division/build.py: a checkpoint folder has its exits",
        lambda w: offramp.divide(w.model, w / "other", exits=w.model),
        "divide that folder",
        lambda w: offramp.divide(w.model, w / "other"),
    ),
    Entry(
        "division/names/build.py: blocks of {} make {} steps",
        many_blocks,
        "cut it into larger blocks: --block",
        larger_blocks,
        again=False,
    ),
    options(
        "division/build.py: stage sizes and example inputs",
        "divide plain another --stage-bytes 64KiB",
        "give --method eager",
        "--method eager",
    ),
    options(
        "division/build.py: stores of {} are of text encoders",
        "divide plain another --method eager --dtype fp16",
        "divide it with --dtype fp32",
        "--dtype fp32",
    ),
    options(
        "division/build.py: stores of {} have graphs",
        "divide plain another --method eager --dtype int8",
        "give --method export",
        "--method export",
    ),
    Entry(
        "division/narrowing.py: {} float32 weight",
        lambda w: divide(w, made(Chain), vectors(), dtype="int8"),
        "divide it with --dtype fp32",
        said_by(lambda w: divide(w, made(Chain), vectors(), dtype="fp32"), "`dtype='fp32'`"),
        again=False,
    ),
    corrected(
        "division/modules.py: integer weights need graphs",
        lambda w: divide(w, made(Counting), dtype="int8"),
        "divide it with --dtype fp32 --method eager",
        lambda w: divide(w, made(Counting), dtype="fp32", method="eager"),
    ),
    Entry(
        "division/narrowing.py: integer weights need ONNX graphs",
        spoilt(without_exporter, lambda w: w.run(NARROW_EXPORT)),
        "divide it with --dtype fp32",
        f"{EXPORT_AGAIN} --dtype fp32",
        again=False,
    ),
    Entry(
        "division/narrowing.py: with integer weights, {}",
        spoilt(no_tolerance, lambda w: w.run(NARROW_EXPORT)),
        "divide it with --dtype fp32",
        f"{EXPORT_AGAIN} --dtype fp32",
        again=False,
    ),
    corrected(
        "checkpoints/source.py: a store that is no checkpoint",
        lambda w: offramp.divide(offramp.divide(w.copy("plain"), w / "narrow", dtype="int8"), w / "other"),
        "give the model folder, or the fp32 store, that it was divided from",
        lambda w: [offramp.divide(folder, w / f"of-{folder.name}") for folder in (w.copy("plain"), w.copy("bare"))],
    ),
    tensors(
        "division/names/narrow.py: tensor {} has the value",
        "store it with --dtype fp32",
        lambda all: {name: array * 1e9 for name, array in all.items()},
        "divide plain another --dtype fp32",
        work="divide plain another --dtype fp16",
        again=False,
    ),
    tensors(
        "division/names/narrow.py: tensor {} has values up to {}, whose sums",
        "store it with --dtype fp32",
        lambda all: {name: np.full_like(array, 3e38 if ".key." in name else 0) for name, array in all.items()},
        "divide plain another --dtype fp32",
        work="divide plain another --dtype int8",
        again=False,
    ),
    tensors(
        "division/names/narrow.py: tensor {} has NaN",
        "get the model again",
        lambda all: {name: array * np.float32("nan") for name, array in all.items()},
        work="divide plain another --dtype int8",
    ),
    corrected(
        "division/build.py: divide(folder, store)",
        lambda w: offramp.divide(w.model),
        "divide(folder, store)",
        lambda w: offramp.divide(w.model, w / "other"),
    ),
    Entry(
        "cli/divide.py: this is the store of a {}",
        "divide --graphs eager",
        "divide --method export",
        said_by("divide plain another --method export", "`offramp divide plain another --method export`"),
        again=False,
    ),
    Entry(
        "division/checkpoints.py: cannot be read as example inputs",
        spoilt(lambda w: (w / "x.npz").write_text("no"), lambda w: load_inputs(w / "x.npz")),
        "save them with numpy.savez",
        said_by(lambda w: np.savez("x.npz", x=np.zeros(3)), "`numpy.savez`"),
    ),
    Entry(
        "division/export.py: as ONNX, {}",
        spoilt(without_operators, on_ort),
        "run it with --backend torch",
        said_by(lambda w: on_ort(w, "torch"), "`backend='torch'`"),
        again=False,
    ),
    Entry(
        "division/exporter.py: a stage cannot be written as ONNX",
        spoilt(without_exporter, on_ort),
        "run it with --backend torch",
        said_by(lambda w: on_ort(w, "torch"), "`backend='torch'`"),
        again=False,
    ),
    Entry(
        "division/export.py: ONNX Runtime differs",
        spoilt(other_difference, on_ort),
        "run it with --backend torch",
        said_by(lambda w: on_ort(w, "torch"), "`backend='torch'`"),
        again=False,
    ),
    closed("division/export.py: a stage does not load as ONNX", "unreachable", "run it with --backend torch"),
    closed("division/export.py: a stage does not run as ONNX", "unreachable", "run it with --backend torch"),
    closed("division/export.py: ONNX Runtime gives {} {} for {}", "unreachable", "run it with --backend torch"),
    Entry(
        "backends/base.py: graph {} does not take",
        spoilt(onnx_graphs(beyond_the_end), lambda w: load(w, "export")),
        "divide the model with such an input as its example",
        EXPORT,
    ),
    closed("backends/base.py: tensor {} is {}, which kernels", "unreachable", "run it with offramp.stream"),
    closed("backends/base.py: value {} is {}, which NumPy", "unreachable", "run it with offramp.stream"),
    tensors(
        "division/names/build.py: tensors do not fit",
        "merge the adapter into the weights",
        lora,
        work="divide model another --method names",
    ),
    tensors(
        "division/names/build.py: tensor {} has dtype",
        "not a quantised one",
        integers,
        work="divide model another --method names",
    ),
    tensors(
        "division/checkpoints.py: {} tensors {}: {}",
        "get the whole model again",
        narrow,
        work="divide plain another --method eager",
    ),
    tensors(
        "division/checkpoints.py: {} tensors unexpected",
        "merge the adapter into the weights",
        lora,
        work="divide plain another --method eager",
    ),
    tensors(
        "division/checkpoints.py: tensor {} has dtype",
        "divide a model of",
        integers,
        work="divide plain another --method eager",
    ),
    *(
        closed("division/checkpoints.py: {} tensors {}: {}", "shared", says)
        for says in (
            "merge the adapter into the weights",
            "off the names of its tensors",
            "config.json has more layers than the file",
        )
    ),
    *(
        closed("division/checkpoints.py: {} tensors missing", "shared", says)
        for says in (
            "merge the adapter into the weights",
            "off the names of its tensors",
            "config.json has more layers than the file",
        )
    ),
    tensors(
        "division/checkpoints.py: {} tensors missing",
        "get the whole model again",
        lambda all: dict(list(all.items())[3:]),
        work="divide plain another --method eager",
    ),
    corrected(
        "division/checkpoints.py: no example can be made up",
        lambda w: example_of(Strange(), w.model),
        "give --inputs FILE.safetensors",
        lambda w: divide(w, Strange().eval(), {"waves": vectors()}),
    ),
    Entry(
        "division/names/build.py: config.json names no architectures",
        spoilt(head_of_tokens, "divide plain another"),
        'add "architectures": ["BertForTokenClassification"]',
        add_class,
    ),
    closed("division/modules.py: {} exits were trained, and", "unreachable", "train the exits again"),
    Entry(
        "division/modules.py: the exits belong to the layers",
        "divide model another --method export",
        "divide with --method names",
        said_by("divide model another --method names", "`--method names`"),
        again=False,
    ),
    Entry(
        "division/names/build.py: exits do not fit",
        spoilt(exits_of_another, MAKE),
        "train the exits again",
        whole_exits,
    ),
    corrected(
        "division/exported.py: examples that differ",
        lambda w: divide(w, made(Chain), vectors(), method="export", more_inputs=[{"hidden": vectors()}]),
        "use --method eager, or give examples that are alike",
        lambda w: (
            divide(w, made(Chain), vectors(), method="eager", more_inputs=[{"hidden": vectors()}]),
            divide(w, made(Chain), vectors(), "alike", method="export", more_inputs=[vectors(3)]),
        ),
    ),
    closed("division/proof.py: the module has no weights", "unreachable", "divide module.cpu()"),
    closed("streaming/matching.py: {} is on {}", "unreachable", "give module.cpu()"),
    corrected(
        "streaming/weightless.py: config.json makes no",
        lambda w: of_class(w, wrong_class, "model"),
        "give a folder or a store of this class",
        lambda w: of_class(w, right_class, "model"),
    ),
    Entry(
        "streaming/weightless.py: config.json makes no",
        spoilt(
            lambda w: w.edit_json("model/config.json", lambda tree: {**tree, "num_attention_heads": 3}),
            lambda w: of_class(w, right_class, "model"),
        ),
        "correct its keys, or get the model again",
        restore_config,
    ),
    Entry(
        "streaming/weightless.py: config.json names no architecture",
        class_named(without("architectures")),
        'add "architectures": [CLASS] to it',
        restore_config,
    ),
    Entry(
        "streaming/weightless.py: config.json is of a {}",
        class_named(lambda tree: {**tree, "model_type": "gpt2"}),
        "get the model again",
        restore_config,
    ),
    Entry(
        "streaming/weightless.py: transformers has no",
        class_named(lambda tree: {**tree, "architectures": ["Odd"]}),
        "build the module yourself and call offramp.divide(module, example_inputs, store)",
        said_by(lambda w: divide(w, made(Chain)), "`offramp.divide(module, example_inputs, store)`"),
        again=False,
    ),
    Entry(
        "streaming/weightless.py: config.json cannot be read",
        class_named(lambda tree: {**tree, "hidden_size": "x"}),
        "use another model",
        restore_config,
    ),
    corrected(
        "streaming/weightless.py: buffer {} has no data",
        lambda w: weightless(Buffered),
        "give a module that is built already",
        lambda w: divide(w, NoBuffer().eval()),
    ),
    Entry(
        "streaming/attributes.py: no attributes of a module",
        spoilt(attributes, lambda w: stream(w, Chain)),
        "divide again",
        divide_chain_again,
    ),
    Entry(
        "streaming/layouts.py: layouts of tensors",
        spoilt(layouts, stream_transposed),
        "divide again",
        divide_transposed,
    ),
    Entry(
        "streaming/outside.py: a weight budget of",
        lambda w: stream_normed(w, 1),
        "the smallest weight budget that works is",
        named_bytes,
        again=False,
    ),
    Entry(
        "streaming/streamed.py: a stream cannot be pickled",
        pickled_stream,
        "call offramp.stream(module, store) in the other process",
        stream_there,
        again=False,
        slow=True,
    ),
]

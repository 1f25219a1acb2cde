"""Any module becomes a store: the same bytes each time, with a proof, and the module stays as it was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch import nn  # noqa: E402

import offramp  # noqa: E402
from offramp.cli import main  # noqa: E402
from offramp.division.proof import variations  # noqa: E402
from offramp.errors import DamagedError, StageError, UsageError  # noqa: E402
from offramp.program.program import Input  # noqa: E402
from offramp.store import Store, StoreWriter  # noqa: E402
from offramp.store.manifest import ProvenInput  # noqa: E402
from offramp.streaming.capture import Arguments, are_equal  # noqa: E402
from offramp.streaming.placement import DTYPES, read_tensor  # noqa: E402
from tests.division.modules import (  # noqa: E402
    CASES,
    WIDTH,
    Block,
    Chain,
    Counting,
    Failing,
    Keeping,
    Routed,
    Tied,
    Wide,
    ids,
    made,
    vectors,
)
from tests.store.small import problems  # noqa: E402
from tests.store.test_writer import tree_bytes  # noqa: E402


def state(module):
    """What a module must have again after it was divided: the very tensors, what is in them, its own forward."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    held = [(name, id(tensor), tensor.requires_grad, tensor.detach().clone()) for name, tensor in tensors]
    hooks = [
        (dict(part._forward_hooks), dict(part._forward_pre_hooks), "forward" in vars(part)) for part in module.modules()
    ]
    return held, hooks


def unchanged(before, module):
    held, hooks = state(module)
    assert hooks == before[1] and len(held) == len(before[0])
    for (*facts, data), (*facts_before, data_before) in zip(held, before[0], strict=True):
        assert facts == facts_before and torch.equal(data, data_before)
    return True


def program_of(store):
    with Store(store) as opened:
        return opened.program


def proof_of(store):
    with Store(store) as opened:
        return opened.manifest.proof


@pytest.mark.parametrize("name", CASES)
def test_a_module_is_as_it_was_and_its_store_is_sound(tmp_path, name):
    make, inputs = CASES[name]
    module, example = made(make), inputs.clone()
    before = state(module)
    store = offramp.divide(module, example, tmp_path / "store")
    assert unchanged(before, module) and torch.equal(example, inputs)
    assert problems(store) == {}
    examples = proof_of(store).examples
    assert all(each.equal and each.peak_weight_bytes <= each.weight_budget_bytes for each in examples)
    assert not proof_of(store).is_paged


@pytest.mark.parametrize("name", CASES)
def test_dividing_twice_gives_equal_bytes(tmp_path, name):
    make, inputs = CASES[name]
    module = made(make)
    first, second = (offramp.divide(module, inputs, tmp_path / folder) for folder in "ab")
    third = offramp.divide(made(make), inputs, tmp_path / "c")
    assert tree_bytes(first) == tree_bytes(second) == tree_bytes(third)


def test_another_process_gives_equal_bytes(tmp_path):
    """However Python shuffles its sets, and wherever memory lies."""
    script = """
import sys, offramp
from tests.division.modules import CASES, made
for name in ("recurrent", "tied"):
    make, inputs = CASES[name]
    offramp.divide(made(make), inputs, sys.argv[1] + "-" + name)
"""
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, tmp_path / "other"], check=True, env=env)
    for name in ("recurrent", "tied"):
        make, inputs = CASES[name]
        store = offramp.divide(made(make), inputs, tmp_path / name)
        assert tree_bytes(store) == tree_bytes(tmp_path / f"other-{name}")


def test_what_the_manifest_says(tmp_path):
    store = offramp.divide(made(Tied), ids(), tmp_path / "store")
    with Store(store) as opened:
        manifest, module = opened.manifest, opened.program.module
    assert (manifest.source.architecture, manifest.source.model_type, manifest.source.method) == (
        "Tied",
        "module",
        "eager",
    )
    assert module.name == "tests.division.modules.Tied"
    assert module.aliases == {"words.weight": ("head.weight",)}
    assert (module.buffers, module.pinned, module.unused) == (("shift",), (), ())
    assert manifest.program.inputs == {"0": Input("int64", ("batch", 6), (2, 6))}
    assert manifest.program.example == (2, 1) and not manifest.program.stages and manifest.program.output is None
    assert set(module.versions) >= {"torch"}
    assert [part.start and part.start.module for part in module.parts] == [
        None,
        "blocks.0",
        "blocks.1",
        "blocks.2",
        "head",
    ]
    assert [part.hidden for part in module.parts] == [None, 0, 0, 0, 0]
    names = [tensor.name for shard in manifest.shards.values() for tensor in shard.tensors]
    assert sorted(names) == sorted(set(made(Tied).state_dict()) - {"head.weight"})


def test_weights_that_several_stages_need_are_stored_once(tmp_path):
    with Store(offramp.divide(made(Tied), ids(), tmp_path / "store")) as opened:
        homes = [list(part.shards) for part in opened.program.module.parts]
        shards = opened.manifest.shards
    (words,) = (name for name, shard in shards.items() if any(t.name == "words.weight" for t in shard.tensors))
    assert [words in needs for needs in homes] == [True, False, False, False, True]


def test_the_proof_is_made_with_another_batch_size_and_length(tmp_path):
    first, second = proof_of(offramp.divide(made(Tied), ids(2, 6), tmp_path / "a")).examples
    assert (first.inputs, second.inputs) == ({"0": ProvenInput("int64", (2, 6))}, {"0": ProvenInput("int64", (1, 4))})
    assert first.inputs_sha256 != second.inputs_sha256
    vectors_only = proof_of(offramp.divide(made(Chain), vectors(), tmp_path / "b")).examples
    assert [each.inputs["0"].shape for each in vectors_only] == [(2, WIDTH), (1, WIDTH)]


class Fussy(Chain):
    """Takes two rows and no others."""

    def forward(self, hidden):
        if len(hidden) != 2:
            raise ValueError("two rows")
        return super().forward(hidden)


def test_a_module_that_takes_no_other_input_is_proven_with_one(tmp_path):
    said = []
    store = offramp.divide(made(Fussy), vectors(), tmp_path / "store", say=said.append)
    assert len(proof_of(store).examples) == 1
    assert "no proof with another batch size: ValueError" in said


def test_more_inputs_are_what_the_proof_is_made_with(tmp_path):
    more = [vectors(5), (vectors(1),), {"hidden": vectors(7)}]
    store = offramp.divide(made(Chain), vectors(), tmp_path / "store", more_inputs=more)
    shapes = [next(iter(each.inputs.values())).shape for each in proof_of(store).examples]
    assert shapes == [(count, WIDTH) for count in (2, 5, 1, 7)]


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ({"a": ids(2, 6), "b": torch.ones(2, 6, 3)}, [{"a": (1, 4), "b": (1, 4, 3)}, {"a": (1, 6), "b": (1, 6, 3)}]),
        ({"a": ids(2, 2)}, [{"a": (1, 2)}]),
        ({"a": vectors(4)}, [{"a": (3, WIDTH)}]),
        ({"a": vectors(1)}, [{"a": (2, WIDTH)}]),
        ({"a": vectors(2), "b": vectors(3)}, []),
        ({"a": ids(2, 6), "b": ids(2, 5)}, [{"a": (1, 6), "b": (1, 5)}]),
        ({"a": vectors(2), "flag": True, "scale": torch.tensor(1.0)}, [{"a": (1, WIDTH), "scale": ()}]),
        ({"flag": True}, []),
    ],
)
def test_other_inputs_have_other_rows_and_another_length_where_all_agree(example, expected):
    found = [{name: tuple(t.shape) for name, t in made.tensors().items()} for _, made in variations(Arguments(example))]
    assert found == expected


def test_weights_that_begin_anywhere_are_proven_with_one_row(tmp_path):
    """As those of a mapped checkpoint do; a product with one row then ends in other bits."""
    module = made(Chain)
    for parameter in module.parameters():
        data = torch.empty(parameter.numel() + 1)[1:].view(parameter.shape)
        parameter.data = data.copy_(parameter.data)
    inputs = vectors(1)
    store = offramp.divide(module, inputs, tmp_path / "store")
    with torch.no_grad(), offramp.stream(Chain, store, weight_budget="1MiB") as stream:
        assert torch.equal(stream(inputs), aligned(module)(inputs))


def aligned(module):
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module


class Clock(nn.Linear):
    """Answers differently each time."""

    times = 0

    def forward(self, hidden):
        Clock.times += 1
        return super().forward(hidden) + Clock.times


def test_a_module_that_answers_otherwise_each_time_is_refused_by_the_part_that_does(tmp_path):
    module = nn.Sequential(made(nn.Linear, WIDTH, WIDTH), made(Clock, WIDTH, WIDTH), nn.ReLU()).eval()
    before = state(module)
    with pytest.raises(StageError) as caught:
        offramp.divide(module, vectors(), tmp_path / "store")
    what, where, remedy = str(caught.value).split(" - ")
    assert what == (
        "two runs of the module with equal inputs and random generators give different answers: "
        "they first differ in 1 (call 1), a Clock"
    )
    assert (where, remedy) == ("Sequential", "make it deterministic")
    assert unchanged(before, module) and not (tmp_path / "store").exists()


class Looking(nn.Linear):
    """Computes otherwise on weights that are in memory."""

    def forward(self, hidden):
        return super().forward(hidden) + (type(self.weight) is nn.Parameter)


@pytest.mark.parametrize("inner", [Looking, None])
def test_a_step_whose_value_differs_in_the_store_is_named(tmp_path, inner):
    module = made(Chain)
    if inner is not None:
        module.blocks[2].up = made(inner, WIDTH, 2 * WIDTH)
        says = "they first differ in blocks.2.up (call 1), a Looking"
    else:
        own = module.forward
        module.forward = lambda hidden: own(hidden) + (type(module.head.weight) is nn.Parameter)
        says = "they first differ in no part of the module, but in its own code, a Chain"
    with pytest.raises(StageError) as caught:
        offramp.divide(module, vectors(), tmp_path / "store")
    what, where, remedy = str(caught.value).split(" - ")
    assert what == f"the divided module gives other answers than the whole one for 0 (2, 16): {says}"
    assert (where, remedy) == ("Chain", "compute that from inputs and weights alone")


def test_buffers_that_a_run_writes_to_are_as_they_were(tmp_path):
    module = made(Counting)
    before = state(module)
    offramp.divide(module, vectors(), tmp_path / "store")
    assert unchanged(before, module)


def test_a_module_whose_answer_hangs_on_its_calls_before_is_refused(tmp_path):
    says = (
        r"a second run gives another answer than the first for 0 \(2, 16\): .* its own code, a Counting - .* no state"
    )
    with pytest.raises(StageError, match=says):
        offramp.divide(made(Counting, adds=True), vectors(), tmp_path / "store")


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(WIDTH).to_sparse())

    def forward(self, hidden):
        return hidden @ self.weight.to_dense()


class Quantised(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))

    def forward(self, hidden):
        return self.inner(hidden)


class Scalar(Chain):
    def forward(self, hidden):
        return float(super().forward(hidden).sum())


class Listed(nn.Module):
    """Reads a weight from a list of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.kept = [self.inner.weight]

    def forward(self, hidden):
        return self.inner(hidden) @ self.kept[0]


def meta_buffer():
    module = made(Tied)
    module.shift = module.shift.to("meta")
    return module


def streamed():
    module = made(Chain)
    folder = tempfile.mkdtemp()
    with offramp.stream(module, offramp.divide(module, vectors(), f"{folder}/store")):
        pass
    shutil.rmtree(folder)
    return module


class Bare(nn.Parameter):
    """A class that only marks."""


class Own(nn.Parameter):
    """As libraries that quantise have them."""

    def scaled(self):
        return self * 2


def of_kind(kind):
    module = made(Chain)
    module.first.weight = kind(module.first.weight.detach())
    return module


def holding(tensor, *, is_saved=True):
    """A chain with a tensor that it does not use."""
    module = made(Chain)
    module.register_buffer("held", tensor, persistent=is_saved)
    return module


def unfolded():
    module = made(Chain)
    module.first.weight = nn.Parameter(torch.randn(40).as_strided((WIDTH, WIDTH), (1, 1)))
    return module


def offloaded():
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(made(Chain), "cpu")


def learning():
    return made(Chain).train()


REFUSED = {
    "training mode": (learning, UsageError, "the module is in training mode - call eval() on it"),
    "no weights": (
        lambda: made(nn.ReLU),
        StageError,
        "the module has no weights, so there is nothing to divide - ReLU",
    ),
    "a buffer without data": (meta_buffer, StageError, "buffer shift has no data - Tied - build the module with its"),
    "weights without data": (lambda: made(Chain).to("meta"), StageError, "weight first.weight has no data - Chain"),
    "weights that are in a store": (streamed, StageError, "weight first.weight has no data - Chain - give a module"),
    "weights of a kind of their own": (
        lambda: of_kind(Own),
        StageError,
        "weight first.weight is a Own, a tensor with code of its own - Chain - replace it with an nn.Parameter",
    ),
    "weights that are not there yet": (
        lambda: made(lambda: nn.Sequential(nn.LazyLinear(3))),
        StageError,
        "weight 0.weight is a UninitializedParameter, which has no data - Sequential - run the module once before",
    ),
    "a sparse weight": (
        lambda: made(Sparse),
        StageError,
        "weight weight is not dense but sparse_coo - Sparse - keep its to_dense(), or register a buffer with",
    ),
    "a sparse buffer": (
        lambda: holding(torch.eye(3).to_sparse_csr()),
        StageError,
        "weight held is not dense but sparse_csr - Chain - keep",
    ),
    "a quantised buffer": (
        lambda: made(Quantised),
        StageError,
        "weight table is quantised (torch.qint8) - Quantised - divide the module before",
    ),
    "double complex numbers": (
        lambda: holding(torch.ones(2, dtype=torch.complex128)),
        StageError,
        "weight held is torch.complex128, which a store cannot hold - Chain - keep it in another dtype",
    ),
    "elements that overlap": (
        unfolded,
        StageError,
        "weight first.weight is a view with strides (1, 1) of other memory - Chain - replace it with its contiguous()",
    ),
    "a lazily negated weight": (
        lambda: holding(torch.randn(2, 2, dtype=torch.complex64).conj().imag),
        StageError,
        "weight held is a view that negates other memory - Chain - replace it with its resolve_neg()",
    ),
    "what is no module": (
        lambda: torch.export.export(made(Chain), (vectors(),)),
        UsageError,
        "a ExportedProgram is no torch.nn.Module - give the module that it was made of",
    ),
    "the module of an exported program": (
        lambda: torch.export.export(made(Chain), (vectors(),)).module(),
        StageError,
        "the module is compiled by torch.export, so its weights cannot be taken out - ",
    ),
    "a module for a compiler": (
        lambda: torch.compile(made(Chain)),
        StageError,
        "the module is compiled by torch.compile, so its weights cannot be taken out - OptimizedModule - divide the ",
    ),
    "a module that accelerate has offloaded": (
        offloaded,
        StageError,
        "weight first.weight has no data: accelerate has offloaded it - Chain - load the model without device_map",
    ),
    "an answer without tensors": (lambda: made(Scalar), StageError, "the module gives no tensor, so nothing can be"),
    "a weight that is read from a list": (
        lambda: made(Listed),
        StageError,
        "weight inner.weight is used through a reference outside its module",
    ),
    "compiled code": (
        lambda: torch.jit.trace(made(Chain), vectors()),
        StageError,
        "the module is compiled by torch.jit, so its weights cannot be taken out",
    ),
}


COMPARED = {"an answer without tensors", "a weight that is read from a list", "weights of a kind of their own"}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*(torch.jit|quantize_per_tensor|Sparse CSR).*", "ignore:Lazy modules")
def test_a_module_that_cannot_be_divided_is_refused_in_one_line_and_stays_as_it_is(tmp_path, name):
    make, kind, says = REFUSED[name]
    module = make()
    before = state(module) if name in COMPARED else None
    with pytest.raises(kind) as caught:
        offramp.divide(module, ids() if isinstance(module, Tied) else vectors(), tmp_path / "store")
    assert str(caught.value).startswith(says) and str(caught.value).isprintable()
    assert not (tmp_path / "store").exists()
    assert before is None or unchanged(before, module)


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_what_forward_raises_comes_out_and_the_module_is_as_it_was(tmp_path, error):
    module = made(Failing)
    module.error, before = error, state(module)
    with pytest.raises(type(error)):
        offramp.divide(module, vectors(), tmp_path / "store")
    assert unchanged(before, module)
    module.error = None
    offramp.divide(module, vectors(), tmp_path / "store")


def test_an_existing_store_is_replaced_by_force_alone(tmp_path):
    store = offramp.divide(made(Chain), vectors(), tmp_path / "store")
    before = tree_bytes(store)
    with pytest.raises(UsageError, match="target exists"):
        offramp.divide(made(Wide), vectors(), store)
    assert tree_bytes(store) == before
    offramp.divide(made(Wide), vectors(), store, force=True)
    assert program_of(store).module.name.endswith("Wide")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


@pytest.mark.parametrize("stopped_at", ["shard", "proof", "end"])
def test_an_interrupted_division_goes_on_where_it_was(tmp_path, monkeypatch, stopped_at):
    expected = tree_bytes(offramp.divide(made(Tied), ids(), tmp_path / "expected"))
    module, store, added = made(Tied), tmp_path / "store", []
    add_shard = StoreWriter.add_shard

    def interrupted(self, name, *args, **options):
        if stopped_at == "shard" and len(added) == 3:
            raise KeyboardInterrupt
        added.append(name)
        return add_shard(self, name, *args, **options)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(StoreWriter, "add_shard", interrupted)
    if stopped_at == "proof":
        monkeypatch.setattr("offramp.division.proof._prove", stop)
    if stopped_at == "end":
        monkeypatch.setattr(StoreWriter, "finish", stop)
    before = state(module)
    with pytest.raises(KeyboardInterrupt):
        offramp.divide(module, ids(), store)
    monkeypatch.undo()
    assert unchanged(before, module) and not store.exists() and len(added) >= 3
    written = {path.name: path.stat().st_ino for path in (tmp_path / "store.partial").glob("*.safetensors")}
    offramp.divide(module, ids(), store)
    assert tree_bytes(store) == expected
    assert len(written) >= 3 and all((store / name).stat().st_ino == inode for name, inode in written.items())


def test_other_weights_are_not_taken_for_those_of_an_interrupted_division(tmp_path, monkeypatch):
    monkeypatch.setattr(StoreWriter, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        offramp.divide(made(Tied, seed=1), ids(), tmp_path / "store")
    monkeypatch.undo()
    store = offramp.divide(made(Tied), ids(), tmp_path / "store")
    assert tree_bytes(store) == tree_bytes(offramp.divide(made(Tied), ids(), tmp_path / "other"))


def test_a_second_input_that_takes_another_path_marks_the_store(tmp_path):
    said = []
    positive = vectors().abs()
    store = offramp.divide(made(Routed), positive, tmp_path / "store", more_inputs=[-positive], say=said.append)
    first, second = proof_of(store).examples
    assert proof_of(store).is_paged and any("marked as paged" in line for line in said)
    assert (first.disorders, first.unplanned_loads) == (0, 0)
    assert second.disorders > 0 and second.equal
    with Store(store) as opened:  # what only the second touched stays in memory, for no stage has it
        kept = {tensor.name for tensor in opened.manifest.shards["kept"].tensors}
    assert kept >= {"other.weight", "other.bias"}


def test_weights_that_one_of_the_examples_keeps_stay_in_memory(tmp_path):
    positive, said = vectors().abs(), []
    module = made(Keeping, only_negative=True)
    store = offramp.divide(module, positive, tmp_path / "store", more_inputs=[-positive], say=said.append)
    with Store(store) as opened:
        assert opened.program.module.pinned == ("kept",)
        assert [tensor.name for tensor in opened.manifest.shards["kept"].tensors] == ["blocks.0.up.weight"]
    assert not proof_of(store).is_paged
    assert any(line.startswith("1 weights stay in memory") for line in said)


def test_a_size_of_stages_that_is_asked_for_holds(tmp_path):
    store = offramp.divide(made(Chain), vectors(), tmp_path / "store", stage_bytes=3000)
    with Store(store) as opened:
        for part in opened.program.module.parts:
            shards = [opened.manifest.shards[name] for name in part.shards]
            assert sum(shard.data_bytes for shard in shards) <= 3000
        assert len(opened.program.module.parts) > 6
    with pytest.raises(ValueError, match="stage_bytes must be more than nothing"):
        offramp.divide(made(Chain), vectors(), tmp_path / "other", stage_bytes=0)


def test_aligned_weights_come_first_in_a_shard(tmp_path):
    with Store(offramp.divide(made(Chain, width=13), vectors(width=13), tmp_path / "store")) as opened:
        for shard in opened.manifest.shards.values():
            whole = [tensor.num_bytes % 64 == 0 for tensor in shard.tensors]
            assert whole == sorted(whole, reverse=True)


def test_the_command_line_names_what_is_wrong_with_a_store_of_a_module(tmp_path, capsys):
    store = offramp.divide(made(Chain), vectors(), tmp_path / "store")
    assert main(["verify", str(store)]) == 0
    path = store / "weights-001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["verify", str(store)]) == 4
    assert "weights-001.safetensors: " in capsys.readouterr().out


def test_answers_are_compared_bit_for_bit():
    one = torch.tensor([0.0, float("nan"), 1.0])
    assert are_equal([one], [one.clone()])
    assert not are_equal([torch.tensor([0.0])], [torch.tensor([-0.0])])
    assert not are_equal([one], [one.double()])
    assert not are_equal([one], [one[None]])
    assert not are_equal([one], [])
    assert are_equal([one[::2]], [one[::2].contiguous()])


def test_a_module_with_hooks_and_forwards_of_the_user_keeps_them(tmp_path):
    module, called, file = made(Chain), [], tmp_path / "called"

    def call(name):
        called.append(name)
        with open(file, "a") as lines:
            lines.write(f"{name}\n")

    module.blocks[1].register_forward_hook(lambda *_: call("hook"))
    own = module.blocks[2].forward
    module.blocks[2].forward = lambda hidden: (call("forward"), own(hidden))[1]
    before = state(module)
    store = offramp.divide(module, vectors(), tmp_path / "store")
    assert unchanged(before, module) and set(file.read_text().split()) == {"hook", "forward"}
    assert called == [], "what a run of the division leaves in a closure is taken back"
    with offramp.stream(module, store, weight_budget="1MiB") as model:
        model(vectors())
    assert called == ["hook", "forward"]


def test_weights_in_a_block_that_was_never_called_are_in_no_stage_and_still_found(tmp_path):
    class Spare(Chain):
        def __init__(self):
            super().__init__()
            self.spare = Block()

        def forward(self, hidden, use=False):
            hidden = super().forward(hidden)
            return hidden @ self.spare.norm.weight[None, :3].t() if use else hidden

    store = offramp.divide(made(Spare), vectors(), tmp_path / "store")
    assert set(program_of(store).module.unused) == {f"spare.{name}" for name in dict(Block().named_parameters())}
    with torch.no_grad():
        expected = made(Spare)(vectors(), use=True)
    with offramp.stream(made(Spare), store, weight_budget=16 << 10) as model:
        assert torch.equal(model(vectors(), use=True), expected)
        assert model.counts.unplanned == {"spare.norm.weight"}


def transposed(shape, order):
    """Random numbers that lie in another order of axes than their shape says."""
    data = torch.randn([shape[axis] for axis in order], generator=torch.Generator().manual_seed(1))
    return data.permute([order.index(axis) for axis in range(len(shape))])


class Laid(nn.Module):
    """Layers with given weights."""

    def __init__(self, weight, **buffers):
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3) if weight.dim() == 4 else nn.Linear(64, 64, dtype=weight.dtype)
        self.layer.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
        self.last = nn.Linear(64, 64)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, inputs):
        answer = self.layer(inputs)
        answer = answer if answer.dim() == 4 else self.last(answer.real if answer.is_complex() else answer)
        return [answer, *(buffer.conj() @ buffer.t() for buffer in self.buffers())]


LAID = {
    "transposed": lambda: Laid(transposed((64, 64), (1, 0))),
    "channels last": lambda: Laid(transposed((8, 3, 3, 3), (0, 2, 3, 1))),
    "repeated": lambda: Laid(torch.randn(1, 64).expand(64, 64)),
    "some columns": lambda: Laid(torch.randn(64, 100)[:, :64]),
    "conjugated": lambda: Laid(torch.randn(64, 64, dtype=torch.complex64).t().conj()),
    "a transposed buffer": lambda: Laid(torch.randn(64, 64), held=transposed((5, 64), (1, 0))),
    "a conjugated buffer": lambda: Laid(torch.randn(64, 64), held=torch.randn(5, 5, dtype=torch.complex64).conj()),
}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", LAID)
def test_a_weight_in_another_layout_streams_the_same_bits(tmp_path, name, rows):
    """As a transposed view a weight takes part in other products than as a copy, which end in other last bits."""
    torch.manual_seed(0)
    module = LAID[name]().eval()
    kind = module.layer.weight.dtype
    inputs = torch.randn(rows, 3, 9, 9) if module.layer.weight.dim() == 4 else torch.randn(rows, 64, dtype=kind)
    with torch.no_grad():
        expected = module(inputs)
    store = offramp.divide(module, inputs, tmp_path / "store", more_inputs=[inputs])
    layout = module.layer.weight.stride(), module.layer.weight.is_conj()
    limit = sum(shard.bytes for shard in Store(store).manifest.shards.values()) * 4
    with offramp.stream(module, store, weight_budget=limit) as stream:
        found = []
        module.layer.register_forward_pre_hook(lambda layer, _: found.append(layer.weight))
        assert are_equal(stream(inputs), expected)
        assert (found[0].stride(), found[0].is_conj()) == layout


def test_layouts_that_a_division_cannot_write_are_refused(tmp_path):
    module = Laid(transposed((64, 64), (1, 0))).eval()
    store = offramp.divide(module, torch.randn(2, 64), tmp_path / "store")
    for damage in (b"{}x", b"[]", b'{"layer.weight": [[1, 1], false]}', b'{"other": [[1, 64], false]}'):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(DamagedError):
            patch.setattr(Store, "read_file", lambda self, file, damage=damage: damage)
            offramp.stream(module, store, weight_budget="1MiB").open()


def test_a_class_of_parameters_without_code_of_its_own_stays_what_it_is(tmp_path):
    module, seen = of_kind(Bare), []
    expected = module(vectors()).detach()
    store = offramp.divide(module, vectors(), tmp_path / "store")
    with offramp.stream(module, store, weight_budget="1MiB") as stream:
        module.first.register_forward_pre_hook(lambda layer, _: seen.append(type(layer.weight)))
        assert torch.equal(stream(vectors()), expected) and seen == [Bare]


class Spread(nn.Module):
    """Multiplies with a matrix that is an unsaved buffer, made on the way, or an argument, and returns it."""

    def __init__(self, matrix, is_built=False):
        super().__init__()
        self.inner, self.is_built = nn.Linear(WIDTH, WIDTH), is_built
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, hidden, matrix=None):
        if self.is_built:
            matrix = (torch.eye(len(hidden)) * 2).to_sparse() if matrix is None else matrix
        matrix = self.matrix if matrix is None else matrix
        return matrix @ self.inner(hidden), matrix


@pytest.mark.parametrize("to_sparse", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
@pytest.mark.parametrize("place", ["buffer", "built", "given"])
@pytest.mark.filterwarnings("ignore:Sparse CS")
def test_sparse_tensors_on_the_way_are_like_all_others(tmp_path, place, to_sparse):
    matrix = getattr(torch.eye(5) * 3, to_sparse)()
    module = made(Spread, matrix if place == "buffer" else None, is_built=place == "built")
    inputs = (vectors(5), matrix) if place == "given" else (vectors(5),)
    with torch.no_grad():
        expected = module(*inputs)
    store = offramp.divide(module, inputs, tmp_path / "store", more_inputs=[inputs])
    with offramp.stream(module, store, weight_budget="1MiB") as stream:
        assert are_equal(stream(*inputs), expected)


@pytest.mark.parametrize("example", [3, "hello", None, {1, 2}, {1: vectors()}, np.array(["a"]), made(Chain)])
def test_an_example_that_is_no_arguments_is_refused_in_one_line(tmp_path, example):
    with pytest.raises(
        UsageError, match=r"the example inputs are a \w+, not a tensor, a tuple or a dictionary of names"
    ):
        offramp.divide(made(Chain), example, tmp_path / "store")


def test_an_array_is_an_example_like_a_tensor(tmp_path):
    first, second = (
        offramp.divide(made(Chain), each, tmp_path / str(i)) for i, each in enumerate((vectors(), vectors().numpy()))
    )
    assert tree_bytes(first) == tree_bytes(second)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.turn = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH, dtype=torch.complex128))

    def forward(self, hidden):
        return self.inner(hidden) * self.turn.abs().float()


def plainly_weighted():
    module = of_kind(Own)
    module.first.weight = nn.Parameter(module.first.weight.detach().as_subclass(torch.Tensor))
    return module


def densely_weighted():
    module = made(Sparse)
    module.weight = nn.Parameter(module.weight.detach().to_dense())
    return module


def run_once():
    module = made(lambda: nn.Sequential(nn.LazyLinear(3)))
    module(vectors())
    return module


def narrower():
    module = made(Complex)
    module.turn = nn.Parameter(module.turn.detach().to(torch.complex64))
    return module


@pytest.mark.parametrize("make", [plainly_weighted, densely_weighted, run_once, narrower])
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_module_that_was_refused_divides_after_its_remedy(tmp_path, make):
    module = make()
    with torch.no_grad():
        expected = module(vectors())
    with offramp.stream(module, offramp.divide(module, vectors(), tmp_path / "store")) as stream:
        assert torch.equal(stream(vectors()), expected)


class OddForSequenceClassification(Chain):
    """Named as a classifier of transformers, with an output of another shape than its labels."""

    def __init__(self, num_labels):
        super().__init__()
        self.config = transformers.PretrainedConfig(num_labels=num_labels)


@pytest.mark.parametrize(("num_labels", "problem"), [(3, "single_label_classification"), (2, None), (1, None)])
def test_a_classifier_answers_a_number_for_each_label(tmp_path, num_labels, problem):
    said = []
    store = offramp.divide(
        made(lambda: OddForSequenceClassification(num_labels)), vectors(), tmp_path / "s", say=said.append
    )
    with Store(store) as opened:
        assert opened.program.problem == problem
    told = any("the first output has shape [2, 3], expected logits [2, " in line for line in said)
    assert told == (problem is None)


@pytest.mark.parametrize("name", [name for name in DTYPES if name.startswith("F8_")])
def test_weights_of_small_dtypes_are_kept_bit_for_bit(tmp_path, name):
    held = torch.arange(1, 9).float().to(DTYPES[name])
    store = offramp.divide(holding(held), vectors(), tmp_path / "store")
    with Store(store) as opened:
        assert opened.manifest.tensors()["held"][1].dtype == name
        found = read_tensor(opened, "held", {})
    assert found.dtype == held.dtype and torch.equal(found.view(torch.uint8), held.view(torch.uint8))
    with offramp.stream(holding(held), store, budget="8GiB") as model:
        assert torch.equal(model.held.view(torch.uint8), held.view(torch.uint8))


class Scaled(Chain):
    """Reads more of a weight than its data: an attribute of it, or what a dictionary holds for it."""

    def __init__(self, how):
        super().__init__()
        self.how, self.scales = how, {self.head.weight: 2.0}
        self.head.weight.scale = 3.0

    def forward(self, hidden):
        weight, answer = self.head.weight, super().forward(hidden)
        if self.how == "attribute":
            return answer * weight.scale
        return answer * (self.scales[weight] if self.how == "key" else self.scales.get(weight, 1.0))


def test_attributes_that_code_gave_a_weight_are_those_of_the_streamed_one(tmp_path):
    module, inputs = made(Scaled, "attribute"), vectors()
    expected = module(inputs)
    store = offramp.divide(module, inputs, tmp_path / "store")
    assert module.head.weight.scale == 3.0
    for budget in ("6KiB", "1GiB"):
        with offramp.stream(made(Scaled, "attribute"), store, weight_budget=budget) as stream:
            assert torch.equal(stream(inputs), expected) and torch.equal(stream(inputs), expected)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("key", r"the module fails where placeholders stand for its weights \(KeyError: .*\)"),
        ("key or not", r"the divided module gives other answers than the whole one for .* in its own code, a Scaled"),
    ],
)
def test_a_module_that_looks_at_more_of_a_weight_than_its_data_is_refused(tmp_path, how, says):
    module = made(Scaled, how)
    before, scale = state(module), module.head.weight.scale
    with pytest.raises(StageError, match=rf"{says} - Scaled - compute that from inputs and weights alone"):
        offramp.divide(module, vectors(), tmp_path / "store")
    assert unchanged(before, module) and module.head.weight.scale == scale


class Moved(Chain):
    """Moves and casts its parts to where and what they are, as code does that knows several devices."""

    def forward(self, hidden):
        self.blocks[0].to(hidden.device)
        self.blocks[1].float()
        self.head.to("cpu", torch.float32)
        return super().forward(hidden)


def test_parts_may_be_moved_to_where_they_are(tmp_path):
    module, inputs = made(Moved), vectors()
    expected = module(inputs)
    with offramp.stream(module, offramp.divide(module, inputs, tmp_path / "store"), weight_budget="6KiB") as stream:
        assert torch.equal(stream(inputs), expected) and torch.equal(stream(inputs), expected)
        stream.module.to("cpu")
        assert torch.equal(stream(inputs), expected)


@dataclass
class Rows:
    """An argument that is no container of PyTorch."""

    hidden: torch.Tensor


class OfObjects(Chain):
    def forward(self, rows):
        return super().forward(rows.hidden if isinstance(rows, Rows) else torch.ones(rows, WIDTH))


@pytest.mark.parametrize("inputs", [(Rows(vectors()),), (2,)])
def test_a_module_may_take_no_tensors_of_its_own(tmp_path, inputs):
    module = made(OfObjects)
    expected = module(*inputs)
    with offramp.stream(module, offramp.divide(module, inputs, tmp_path / "store"), weight_budget="6KiB") as stream:
        assert torch.equal(stream(*inputs), expected)


class Compiled(Chain):
    """Calls a function that PyTorch compiles as a whole or not at all, and one of its operators that take functions."""

    def __init__(self):
        super().__init__()
        self.compiled = torch.compile(lambda hidden, weight: hidden @ weight, backend="eager", fullgraph=True)

    def forward(self, hidden):
        hidden = self.compiled(hidden, self.first.weight)
        return torch.cond(hidden.sum() > 1e9, lambda rows: rows * 2, lambda rows: rows + 1, (super().forward(hidden),))


def test_a_module_with_compiled_functions_divides_and_compiles_on_afterwards(tmp_path):
    torch.compiler.reset()
    module, inputs = made(Compiled), vectors()
    store = offramp.divide(module, inputs, tmp_path / "store")
    with torch.no_grad():
        expected = module(inputs)
    with offramp.stream(module, store, weight_budget="7KiB") as stream:
        assert torch.equal(stream(inputs), expected)

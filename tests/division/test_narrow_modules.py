"""Stores of int8 of models that are divided by a run: which weights become integers, answers, and what is refused.

Shapes: B rows, K inputs and N outputs of a product.
"""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

import offramp
from offramp.backends import open_backend
from offramp.checkpoints.checkpoint import StoredWithExits
from offramp.cli import main
from offramp.division import divide
from offramp.errors import DamagedError, SourceError, StageError, StoreError, UsageError
from offramp.program.inputs import Batch
from offramp.program.narrow import LARGEST_PAIR
from offramp.runtime.inputs import InputReader
from offramp.store import Store
from offramp.store.reader import tensor_view
from tests.division.tiny import write_model as write_encoder
from tests.store.small import problems, refused, reprogrammed
from tests.tiny_vision import SIDE, pixels, png, write_model

pytestmark = pytest.mark.usefixtures("one_thread")
PREFIX = "offramp-int8."
WIDTH = 64


class Mixed(nn.Module):
    """Square weights of both orders, one of them used twice, a weight used in both orders, one that is also added, a
    row of places, and a product of two axes."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.again.weight = self.first.weight
        self.plain, self.both, self.added = (nn.Parameter(torch.randn(WIDTH, WIDTH) / 8) for _ in range(3))
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.small, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = x + self.again(functional.relu(self.first(x))) @ self.plain
        x = x + functional.linear(x @ self.both, self.both) + (x @ self.added) * self.added[0]
        x = x + self.narrow(functional.gelu(self.wide(x)))
        return self.head(self.small(x).mean(1))


class Addmm(nn.Module):
    """Layers of two axes, as GPT-2 writes them, and the answer of a layer that is large."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.randn(WIDTH, WIDTH) / 8) for _ in range(2))
        self.bias, self.head = nn.Parameter(torch.randn(WIDTH)), nn.Linear(WIDTH, 40)

    def forward(self, x):
        return self.head(torch.addmm(self.bias, torch.addmm(self.bias, x, self.one).relu(), self.two))


class Words(nn.Module):
    """A table whose rows are looked up, and that is a head as well."""

    def __init__(self):
        super().__init__()
        self.words, self.layer = nn.Embedding(100, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids):
        return functional.linear(self.layer(self.words(ids)), self.words.weight).softmax(-1)


MODULES = {
    "mixed": (Mixed, {"first.weight", "plain", "wide.weight", "narrow.weight"}, (5, WIDTH)),
    "layers": (Addmm, {"one", "two"}, (WIDTH,)),
    "words": (Words, {"layer.weight"}, (3,)),
}
"""Class, weights that become integers, and the shape of a row."""


def made(cls):
    torch.manual_seed(0)
    module = cls().eval()
    with torch.no_grad():  # an output, and an input, without weights
        for name, each in module.named_parameters():
            if name in ("plain", "one"):
                each[:, 3] = each[5] = 0
    return module


class Branching(nn.Linear):
    """What torch.export does not take."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH)

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def answers(path, arrays, backend="ort"):
    """The output of a store for a batch, [B, ...]."""
    with Store(path, "never") as store:
        opened, program = open_backend(backend, store, 1), store.program
        num_rows = len(next(iter(arrays.values())))
        batch = Batch(arrays, num_rows, 1, np.ones(num_rows, np.int64))
        state = opened.begin(InputReader(store).read(batch)[0], None, (num_rows, 1))
        for step in program.steps():
            opened.run(state, step, {port: array_of(store, name) for port, name in step.weights.items()})
        return np.array(opened.unwrap(state.values[program.output.value]))


def array_of(store, name):
    shard, tensor = store.manifest.tensors()[name]
    return tensor_view(replace(tensor, offset=0), np.frombuffer(store.read_tensor(shard.name, tensor), np.uint8))


def integers(store):
    return {tensor.name.removeprefix(PREFIX) for _, tensor in store.manifest.tensors().values() if tensor.dtype == "I8"}


def difference(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    model = write_model(folder / "model", "vit")
    said = []
    store = divide(folder / "model", folder / "store", dtype="int8", say=said.append)
    return folder / "model", model, store, said


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    module, folder = made(Mixed), tmp_path_factory.mktemp("mixed")
    return module, divide(module, torch.randn(2, 5, WIDTH), folder / "store", dtype="int8", method="export")


def test_a_classifier_of_images_answers_nearly_as_before(vit):
    _, model, store, said = vit
    images = pixels(6, seed=3)
    with torch.no_grad():
        wanted = model(pixel_values=torch.from_numpy(images)).logits.numpy()
    found = answers(store, {"pixel_values": images})
    assert difference(found, wanted) < 0.1 and np.array_equal(found.argmax(1), wanted.argmax(1))
    assert difference(answers(store, {"pixel_values": images}, "torch"), wanted) < 0.1
    alone = np.concatenate([answers(store, {"pixel_values": images[i : i + 1]}) for i in range(6)])
    assert difference(alone, found) < 1e-5, "an answer does not depend on the rows beside it"
    assert any("matrices are stored as integers" in line for line in said)


def test_shards_have_a_quarter_of_the_bytes_and_names_of_no_model(vit, tmp_path):
    _, model, store, _ = vit
    with Store(store) as opened:
        tensors = [tensor for _, tensor in opened.manifest.tensors().values()]
        assert opened.manifest.precision == "int8" and not opened.manifest.is_checkpoint
        assert opened.manifest.answering != opened.manifest.source.fingerprint
        assert integers(opened) == {
            name for name, each in model.named_parameters() if each.ndim == 2 and name != "classifier.weight"
        }
        for shard in opened.manifest.shards.values():
            for tensor in shard.tensors:
                if tensor.dtype == "I8":
                    pairs = np.abs(array_of(opened, tensor.name).astype(int)).reshape(-1, 2, tensor.shape[1])
                    assert LARGEST_PAIR - 2 <= pairs.sum(1).max() <= LARGEST_PAIR
    assert all(tensor.name.startswith(PREFIX) for tensor in tensors)
    matrices = sum(tensor.num_bytes for tensor in tensors if tensor.dtype == "I8")
    full = sum(each.numel() for each in model.parameters()) * 4
    assert sum(tensor.num_bytes for tensor in tensors) < full - 4 * matrices + 1.2 * matrices, "of scales, too"
    assert problems(store) == {}
    with pytest.raises(ValueError, match="quant"):
        transformers.AutoModelForImageClassification.from_pretrained(store)
    with pytest.raises(SourceError):
        divide(store, tmp_path / "other")


def test_it_is_evaluated_as_it_runs(vit):
    _, _, store, _ = vit
    images = pixels(4)
    with Store(store) as opened:
        logits, _ = StoredWithExits(opened).with_hidden(pixel_values=torch.from_numpy(images))
    assert np.array_equal(logits[-1].numpy(), answers(store, {"pixel_values": images}))


def test_the_modules_own_code_cannot_be_streamed(vit):
    _, model, store, _ = vit
    with pytest.raises(StoreError, match="integers"):
        offramp.stream(model, store)


@pytest.mark.parametrize("name", MODULES)
def test_modules_answer_nearly_as_before(name, mixed, tmp_path):
    cls, expected, shape = MODULES[name]
    if name == "mixed":
        module, store = mixed
    else:
        module = made(cls)
        example = torch.randn(2, *shape) if shape[-1] == WIDTH else torch.arange(6).view(2, 3)
        store = divide(module, example, tmp_path / "store", dtype="int8", method="export")
    with Store(store) as opened:
        assert integers(opened) == expected
        attributes = [kernel.attributes for kernel in opened.program.kernels.values() if kernel.attributes]
        orders = {value for each in attributes for end, value in each.items() if end.endswith("transposed")}
        assert name != "mixed" or orders == {0, 1}
    x = torch.randn(7, *shape) if shape[-1] == WIDTH else torch.arange(15).view(5, 3)
    with torch.no_grad():
        wanted = module(x).numpy()
    for backend in ("ort", "torch"):
        assert difference(answers(store, {"0": x.numpy()}, backend), wanted) < 0.05


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_have_no_integer_are_refused(tmp_path, value):
    module = made(Addmm)
    with torch.no_grad():
        module.two[3, 4] = value
    with pytest.raises(SourceError, match="tensor two has NaN or infinite numbers"):
        divide(module, torch.randn(3, WIDTH), tmp_path / "store", dtype="int8", method="export")


def test_a_text_encoder_as_graphs(tmp_path):
    write_encoder(tmp_path / "model")
    store = divide(tmp_path / "model", tmp_path / "store", dtype="int8", method="export")
    full = divide(tmp_path / "model", tmp_path / "full", method="export")
    with Store(store) as opened:
        assert len(integers(opened)) >= 12
        assert not any("embeddings" in name or "pooler" in name for name in integers(opened)), "heads stay floats"
    ids = np.array([[2, 7, 9, 3], [2, 8, 5, 3]])
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    with Store(full) as opened:
        given = {name: given[name] for name in opened.program.inputs if name in given}
    assert difference(answers(store, given), answers(full, given)) < 0.1


def convolutions():
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.Flatten(), nn.Linear(32 * 36, 3)).eval()


def test_what_torch_export_does_not_take_is_refused(tmp_path):
    with pytest.raises(StageError, match=r"integer weights need graphs: torch.export .* --dtype fp32 --method eager"):
        divide(Branching().eval(), torch.randn(2, WIDTH), tmp_path / "store", dtype="int8")


def test_what_has_no_product_for_integers_is_refused(tmp_path):
    with pytest.raises(StageError, match=r"no matrix product .* --dtype fp32"):
        divide(convolutions(), torch.zeros(2, 3, 8, 8), tmp_path / "store", dtype="int8", method="export")
    assert not (tmp_path / "store").exists()
    with pytest.raises(UsageError, match=r"stores of int8 have graphs.* --method export"):
        divide(convolutions(), torch.zeros(2, 3, 8, 8), tmp_path / "store", dtype="int8", method="eager")
    with pytest.raises(UsageError, match="stores of fp16 are of text encoders"):
        divide(convolutions(), torch.zeros(2, 3, 8, 8), tmp_path / "store", dtype="fp16", method="export")


def kernels(tree):
    return [kernel for kernel in tree["program"]["kernels"].values() if kernel["attributes"]]


def set_to(end, value):
    def change(tree):
        for kernel in kernels(tree):
            for name in kernel["attributes"]:
                if name.endswith(end):
                    kernel["attributes"][name] = value

    return change


def steps(tree):
    return [step for stage in tree["program"]["stages"] for step in stage["steps"] if "w0.scale" in step["weights"]]


def swap_ports(tree):
    for step in steps(tree):
        taken = step["weights"]
        taken["w0"], taken["w0.scale"] = taken["w0.scale"], taken["w0"]


def without_scale(tree):
    for step in steps(tree):
        del step["weights"]["w0.scale"]


def without_attributes(tree):
    for kernel in kernels(tree):
        kernel["attributes"] = {}


def unknown(tree):
    for kernel in kernels(tree):
        kernel["attributes"]["gain"] = 1


@pytest.mark.parametrize(
    ("change", "mentions"),
    [
        (set_to("rotation", 3), "rotation is 3"),
        (set_to("rotation", 128), "rotation is 128"),
        (set_to("rotation", True), ""),
        (set_to("transposed", 2), "transposed is 2"),
        (swap_ports, "the kernel takes I8 [inputs, outputs]"),
        (without_scale, "w0.scale is None"),
        (unknown, "captured takes the attributes"),
    ],
)
def test_a_store_whose_parts_do_not_fit_is_refused(mixed, tmp_path, change, mentions):
    folder = reprogrammed(mixed[1], tmp_path / "copy", change)
    refused(DamagedError, lambda: Store(folder), mentions)


def test_integers_that_torch_takes_for_floats_are_refused(mixed, tmp_path):
    folder = reprogrammed(mixed[1], tmp_path / "copy", without_attributes)
    x = np.zeros((1, 5, WIDTH), np.float32)
    for backend in ("torch",):
        with pytest.raises(StoreError):
            answers(folder, {"0": x}, backend)


def test_graphs_are_small_and_quantise_shared_rows_once(vit):
    for path in (vit[2] / "graphs").glob("*.onnx"):
        graph = onnx.load(path).graph
        made = [node.op_type for node in graph.node]
        if "MatMulIntegerToFloat" not in made:
            continue
        assert made.count("MatMulIntegerToFloat") > made.count("QuantizeLinear") > 0
        assert path.stat().st_size < 64 << 10
        return
    raise AssertionError("no graph has integers")


def test_the_config_says_so(vit):
    config = json.loads((vit[2] / "config.json").read_text())
    assert config["quantization_config"] == {"offramp": "int8"} and config["image_size"] == SIDE


def test_verbs_take_it(vit, capsys):
    _, _, store, _ = vit
    for words in (["verify"], ["plan", "--threads", "1"], ["ls"]):
        assert main([words[0], str(store), *words[1:]]) == 0
    assert "stored as int8" in capsys.readouterr().out
    images = [png(seed) for seed in range(5)]
    found = []
    for options in ({}, {"batch": 4}, {"backend": "torch"}):
        with offramp.load(store, threads=1, **options) as classifier:
            found.append(classifier.predict(images))
    for other, most in zip(found[1:], (1e-3, 0.02), strict=True):
        for one, two in zip(found[0], other, strict=True):
            assert one.label == two.label and abs(one.score - two.score) < most

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from offramp.errors import StageError  # noqa: E402
from offramp.streaming.placeholders import (  # noqa: E402
    Placeholder,
    SlicedPlaceholder,
    fingerprint,
    unsaved_buffers,
    weights_of,
)
from tests.division.modules import Chain, Recurrent, Tied, made  # noqa: E402


class TouchedError(Exception):
    """What a placeholder's owner raises."""


def absent(*shape, dtype=torch.float32, learns=False, kind=Placeholder):
    def fetch(name, operation):
        raise TouchedError(name, str(operation))

    return kind("w", nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=learns), fetch)


def x(*shape):
    return torch.ones(shape)


OPERATIONS = {
    "linear": lambda w: functional.linear(x(2, 4), w),
    "linear with a bias": lambda w: functional.linear(x(2, 4), w, x(4)),
    "bias of linear": lambda w: functional.linear(x(2, 4), x(4, 4), w[0]),
    "linear of three extents": lambda w: functional.linear(x(2, 3, 4), w, x(4)),
    "bilinear": lambda w: functional.bilinear(x(2, 4), x(2, 4), w[None]),
    "conv1d": lambda w: functional.conv1d(x(1, 4, 5), w[:, :, None]),
    "conv1d of a view": lambda w: functional.conv1d(x(1, 4, 5), w.unsqueeze(-1)),
    "conv2d": lambda w: functional.conv2d(x(1, 4, 5, 5), w.view(4, 4, 1, 1)),
    "transposed conv": lambda w: functional.conv_transpose1d(x(1, 4, 5), w.unsqueeze(-1)),
    "matmul": lambda w: x(2, 4) @ w,
    "matmul, on the left": lambda w: w @ x(4, 2),
    "mv": lambda w: torch.mv(w, x(4)),
    "addmm": lambda w: torch.addmm(x(4), x(2, 4), w),
    "baddbmm": lambda w: torch.baddbmm(x(1, 4, 4), x(1, 4, 4), w[None]),
    "bmm": lambda w: torch.bmm(x(1, 2, 4), w.unsqueeze(0)),
    "einsum": lambda w: torch.einsum("bi,oi->bo", x(2, 4), w),
    "embedding": lambda w: functional.embedding(torch.tensor([1, 2]), w),
    "embedding bag": lambda w: functional.embedding_bag(torch.tensor([[1, 2]]), w),
    "attention": lambda w: functional.scaled_dot_product_attention(x(1, 1, 4, 4), w[None, None], x(1, 1, 4, 4)),
    "layer norm": lambda w: functional.layer_norm(x(2, 4), (4,), w[0]),
    "batch norm": lambda w: functional.batch_norm(x(2, 4), x(4), x(4), w[0]),
    "indexing": lambda w: w[0],
    "indexing by a tensor": lambda w: w[torch.tensor([0, 2])],
    "gather": lambda w: torch.gather(w, 0, torch.zeros(1, 4, dtype=torch.long)),
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "transpose": lambda w: w.transpose(0, 1),
    "view": lambda w: w.view(16),
    "reshape": lambda w: w.reshape(2, 8),
    "flatten": lambda w: w.flatten(),
    "chunk": lambda w: w.chunk(2),
    "unbind": lambda w: w.unbind(),
    "iterating": list,
    "expand": lambda w: w.expand(3, 4, 4),
    "data": lambda w: w.data + 0,
    "detach": lambda w: w.detach() + 0,
    "clone": lambda w: w.clone(),
    "contiguous": lambda w: w.contiguous() + 0,
    "half": lambda w: w.half(),
    "to a dtype": lambda w: w.to(torch.float64),
    "float": lambda w: w.float() + 0,
    "add": lambda w: x(4, 4) + w,
    "multiply": lambda w: 2 * w,
    "negate": lambda w: -w,
    "compare": lambda w: w > 0,
    "where": lambda w: torch.where(x(4, 4) > 0, w, x(4, 4)),
    "cat": lambda w: torch.cat([x(1, 4), w]),
    "stack": lambda w: torch.stack([w, w]),
    "sum": lambda w: w.sum(),
    "norm": torch.linalg.vector_norm,
    "softmax": lambda w: w.softmax(-1),
    "item": lambda w: w[0, 0].item(),
    "tolist": lambda w: w.tolist(),
    "numpy": lambda w: w.numpy(),
    "bool": lambda w: bool(w[0, 0]),
    "equal": lambda w: torch.equal(w, x(4, 4)),
    "zero_": lambda w: w.zero_(),
    "add_": lambda w: w.add_(1),
    "copy_ to it": lambda w: w.copy_(x(4, 4)),
    "copy_ from it": lambda w: x(4, 4).copy_(w),
    "setting an item": lambda w: w.__setitem__(0, 0.0),
    "out=": lambda w: torch.mm(x(4, 4), x(4, 4), out=w),
    "random like it": lambda w: w.normal_(),
    "data_ptr": lambda w: w.data_ptr(),
    "deep copy": copy.deepcopy,
    "the fast way of a layer": lambda w: torch._transformer_encoder_layer_fwd(
        x(1, 2, 4), 4, 2, x(12, 4), x(12), w, x(4), False, False, 1e-5, x(4), x(4), x(4), x(4), w, x(4), w, x(4)
    ),
    "lstm": lambda w: torch._VF.lstm(x(1, 2, 1), (x(1, 1, 1), x(1, 1, 1)), [w[:, :1], w[:, :1]], False, 1, 0.0, False,
                                     False, True),
}  # fmt: skip


WRITING = {"zero_", "add_", "copy_ to it", "out=", "random like it"}
REFUSED = {*WRITING, "deep copy"}


@pytest.mark.parametrize("kind", [Placeholder, SlicedPlaceholder])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("learns", [False, True])
def test_whatever_touches_it_asks_for_the_weight(mode, kind, learns):
    for name, operation in OPERATIONS.items():
        is_refused = mode is torch.enable_grad and learns and name in WRITING  # by PyTorch, before anything is touched
        expected = RuntimeError if is_refused else StageError if name in REFUSED else TouchedError
        with mode(), pytest.raises(expected):
            operation(absent(4, 4, learns=learns, kind=kind))


@pytest.mark.parametrize("kind", [Placeholder, SlicedPlaceholder])
def test_operations_get_the_weight_where_the_owner_has_it(kind):
    data, asked = torch.randn(4, 4), []

    def fetch(name, operation):
        asked.append(name)
        return data

    plain = nn.Parameter(data.clone())
    weight = kind("name", plain, fetch)
    with torch.no_grad():
        for name, operation in OPERATIONS.items():
            if name not in ("lstm", "numpy", "data_ptr", "setting an item", *REFUSED):
                assert str(operation(weight)) == str(operation(plain)), name
    assert set(asked) == {"name"} and torch.equal(data, plain)
    assert weight.data_ptr() == data.data_ptr() and (weight.numpy() == data.numpy()).all()


def test_what_it_is_can_be_asked_without_touching_it():
    weight = absent(3, 4, dtype=torch.bfloat16)
    assert (weight.shape, weight.dtype, weight.device.type) == ((3, 4), torch.bfloat16, "cpu")
    assert (weight.size(0), weight.dim(), weight.numel(), weight.element_size(), len(weight)) == (3, 2, 12, 2, 3)
    assert weight.is_floating_point() and weight.is_contiguous() and not weight.is_meta and weight.is_leaf
    assert weight.stride() == (4, 1) and weight.layout is torch.strided and not weight.is_sparse
    assert repr(weight) == "Placeholder(w, (3, 4), torch.bfloat16)"


@pytest.mark.parametrize("learns", [True, False])
def test_it_is_a_parameter_of_the_kind_that_it_stands_for(learns):
    """PyTorch folds matrices otherwise for weights that require gradients, even where none are computed."""
    weight = absent(3, 4, learns=learns)
    assert isinstance(weight, nn.Parameter)
    assert weight.requires_grad == learns
    buffer = Placeholder("w", torch.empty(3), lambda name, operation: torch.zeros(3))
    assert not isinstance(buffer, nn.Parameter)


def test_to_code_that_asks_it_has_no_functions_of_its_own():
    """Or layers would not take the way that they take with a plain weight."""
    assert not torch.overrides.has_torch_function((absent(2, 2),))


def rows_of(data):
    """A substitute that knows linear layers and look-ups, and what it was asked."""
    asked = []

    def substitute(weight, function, args, kwargs):
        asked.append(str(getattr(function, "__name__", function)))
        return data

    return substitute, asked


def test_an_owner_can_look_up_rows_instead():
    substitute, asked = rows_of(x(1))
    weight = Placeholder("w", x(4, 4), None, substitute)
    with torch.no_grad():
        assert functional.embedding(torch.tensor([1]), weight) is not None
    assert asked == ["embedding.default"]


def test_an_owner_can_do_with_slices_of_a_linear_layer():
    substitute, asked = rows_of("sliced")
    weight = SlicedPlaceholder("w", x(4, 4), None, substitute)
    assert functional.linear(x(2, 4), weight) == "sliced"
    assert functional.linear(input=x(2, 4), weight=weight, bias=None) == "sliced"
    assert asked == ["linear"] * 2


def test_an_owner_that_cannot_is_asked_for_the_weight():
    weight = SlicedPlaceholder("w", x(4, 4), lambda name, operation: x(4, 4), lambda *_: NotImplemented)
    with torch.no_grad():
        assert torch.equal(functional.linear(x(2, 4), weight), 4 * x(2, 4))
        assert torch.equal(functional.embedding(torch.tensor([1]), weight), x(1, 4))


def test_tied_weights_are_one_under_the_first_of_their_names():
    weights = weights_of(made(Tied))
    words = weights["words.weight"]
    assert "head.weight" not in weights
    assert words.aliases == ("head.weight",)
    assert words.owners == {"words", "head"}
    assert len(words.places) == 2
    assert words.num_bytes == 50 * 16 * 4


def test_saved_buffers_are_weights_and_others_are_not():
    weights = weights_of(made(Tied))
    assert weights["shift"].is_buffer and not weights["scale"].is_buffer
    assert "positions" not in weights
    assert set(weights) | {"head.weight"} == set(made(Tied).state_dict())


def test_a_weight_is_set_in_every_place():
    module = made(Tied)
    new = nn.Parameter(torch.zeros(50, 16))
    weights_of(module)["words.weight"].put(new)
    assert module.words.weight is new and module.head.weight is new


def test_a_parameter_that_is_also_a_buffer_stays_both():
    module = nn.Module()
    module.register_buffer("first", nn.Parameter(torch.ones(2)))
    module.register_buffer("unsaved", module.first, persistent=False)
    module.inner = nn.Module()
    module.inner.weight = nn.Parameter(module.first)
    module.inner._parameters["weight"] = module.first
    (weight,) = weights_of(module).values()
    assert (weight.name, weight.aliases, weight.is_buffer) == ("first", ("unsaved", "inner.weight"), False)
    new = nn.Parameter(torch.zeros(2))
    weight.put(new)
    assert module.first is new and module.unsaved is new and module.inner.weight is new
    assert [set(each._parameters) for each in (module, module.inner)] == [set(), {"weight"}]


def test_a_module_that_stands_in_two_places_gives_its_weights_two_names():
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    module.append(module[0])
    assert {name: weight.aliases for name, weight in weights_of(module).items()} == {
        "0.weight": ("2.weight",),
        "0.bias": ("2.bias",),
    }


def test_recurrent_layers_compute_with_the_weights_that_were_set():
    one, other = made(Recurrent), made(Recurrent, seed=1)
    with torch.no_grad():
        expected = other(torch.ones(1, 3, 16))
        assert not torch.equal(one(torch.ones(1, 3, 16)), expected)
        for name, weight in weights_of(one).items():
            weight.put(weights_of(other)[name].tensor)
        assert all(w is p for w, p in zip(one.lstm._flat_weights, other.lstm.parameters(), strict=True))
        assert torch.equal(one(torch.ones(1, 3, 16)), expected)


def changed(change):
    module = made(Tied)
    change(module)
    return fingerprint(weights_of(module))


def test_a_fingerprint_tells_names_shapes_dtypes_and_ties():
    changes = [
        lambda module: None,
        lambda module: module.register_parameter("more", nn.Parameter(torch.ones(1))),
        lambda module: setattr(module.head, "weight", nn.Parameter(module.words.weight.clone())),
        lambda module: module.half(),
        lambda module: module.register_buffer("shift", torch.ones(17)),
        lambda module: module.register_parameter("scale", nn.Parameter(torch.ones(1))),
        lambda module: module.register_buffer("shift", module.shift, persistent=False),
        lambda module: (delattr(module, "shift"), module.register_parameter("shift", nn.Parameter(torch.ones(16)))),
    ]
    assert len({changed(change) for change in changes}) == len(changes)


def test_a_fingerprint_is_that_of_any_module_with_such_weights():
    assert fingerprint(weights_of(made(Tied))) == fingerprint(weights_of(made(Tied, seed=1)))
    assert fingerprint(weights_of(made(Chain))) != fingerprint(weights_of(made(Chain, num_blocks=3)))


def test_buffers_that_no_checkpoint_holds_are_known_by_what_is_in_them():
    module = made(Tied)
    before = unsaved_buffers(module)
    module.shift.zero_()
    assert unsaved_buffers(module) == before == unsaved_buffers(made(Tied, seed=1))
    module.positions[0] = 2
    assert unsaved_buffers(module) != before
    assert unsaved_buffers(made(Tied).half()) != before

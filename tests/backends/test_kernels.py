"""Graphs of encoder kernels are those that the package onnx makes, small, and old enough for every runtime."""

import dataclasses
import itertools
import zipfile
from pathlib import Path

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from offramp.backends import onnx_templates
from offramp.backends.onnx_templates import INTEGER_PRODUCT, graph_of
from offramp.backends.onnx_writer import CONTRIB, Graph
from offramp.division.names.build import plan_division
from offramp.program.encoder import ACTIVATIONS, MAX_SIZE, weight_shapes
from offramp.program.heads import FORMS
from offramp.program.narrow import SUFFIX
from offramp.program.program import EXIT_KERNEL, Kernel
from offramp.store import Store
from offramp.store.exits import read_exits
from tests.backends.narrow import narrow_program
from tests.backends.oracle import OracleGraph
from tests.division.tiny import config_of, entries_of
from tests.golden.common import STORES
from tests.selection import examples

CONFIGS = [
    *(config_of(model_type) for model_type in ("bert", "distilbert", "roberta", "xlm-roberta", "electra")),
    *(config_of(hidden_act=name) for name in ("gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")),
    config_of(hidden_size=1024, num_attention_heads=16, intermediate_size=4096),
]
NAMES = [f"{config['model_type']}-{config.get('hidden_act', 'gelu')}-{config.get('hidden_size')}" for config in CONFIGS]
SIZES = st.one_of(st.sampled_from([1, 127, 128, 16383, 16384, (1 << 31) - 1, MAX_SIZE]), st.integers(1, 1 << 12))
VERSIONS = {"": 13, CONTRIB: 1}
"""Domain -> version of its operators that ONNX Runtime 1.10 reads."""
OF_MODULES = ("-export", "-eager")
EARLIER = [path for path in sorted(STORES.glob("*.zip")) if not path.stem.endswith(OF_MODULES)]
EARLIER.append(Path(__file__).parents[1] / "store" / "format3" / "encoder.zip")


@pytest.fixture(params=[*CONFIGS, "int8"], ids=[*NAMES, "int8"])
def program(request):
    config = config_of() if request.param == "int8" else request.param
    program = plan_division(config, entries_of(config)).program
    return narrow_program(program) if request.param == "int8" else program


def graphs_of(program):
    graphs = {
        name: graph_of(kernel, FORMS["mean-linear"]) for name, kernel in program.kernels.items() if name != "mask"
    }
    assert sorted(graphs) == ["attention", "down", "embedding", "exit", "head", "up"]
    return {kernel: (data, onnx.load_model_from_string(data)) for kernel, data in graphs.items()}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_they_are_valid_and_have_the_bytes_of_the_package_onnx(program, form, monkeypatch):
    found = {name: graph_of(kernel, form) for name, kernel in program.kernels.items() if name != "mask"}
    monkeypatch.setattr(onnx_templates, "Graph", OracleGraph)
    assert found == {name: graph_of(program.kernels[name], form) for name in found}
    for data in found.values():
        onnx.checker.check_model(data, full_check=True)


@settings(deadline=None)
@given(
    hidden=SIZES, width=SIZES, types=st.integers(0, 2), labels=SIZES, epsilon=st.floats(0, 1, exclude_max=True),
    activation=st.sampled_from(ACTIVATIONS), form=st.sampled_from([*FORMS.values()]),
)  # fmt: skip
def test_all_attributes_give_the_bytes_of_the_package_onnx(hidden, width, types, labels, epsilon, activation, form):
    norm, two = {"hidden_size": hidden, "norm_epsilon": epsilon}, {"hidden_size": hidden, "activation": activation}
    kernels = [
        Kernel("embedding", {**norm, "embedding_size": width, "num_token_types": types}),
        Kernel("attention", {**norm, "num_heads": 1}),
        Kernel("up", {**two, "intermediate_size": width}),
        Kernel("down", {**norm, "intermediate_size": width}),
        Kernel("head", {**two, "num_labels": labels}),
        Kernel(EXIT_KERNEL, {**two, "num_labels": labels}),
        Kernel("heads", {"hidden_size": hidden, "head_size": width, "most_outputs": width}),
        Kernel("product", {"rows": "batch", "num_inputs": hidden, "most_outputs": width, "activation": activation}),
        Kernel("product", {"rows": "batch", "num_inputs": hidden, "most_outputs": width, "activation": None}),
        Kernel("join-norm", norm),
    ]
    kernels += [dataclasses.replace(each, template=each.template + SUFFIX) for each in kernels[1:4]]
    found = [graph_of(kernel, form) for kernel in kernels]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_templates, "Graph", OracleGraph)
        assert found == [graph_of(kernel, form) for kernel in kernels]


NUMBERS = st.one_of(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(-2, 300))
AXES = st.lists(st.one_of(st.integers(0, 1 << 40), st.text(max_size=3)), max_size=4)
CONSTANTS = st.one_of(st.floats(width=32, allow_nan=False), st.lists(st.floats(width=32), max_size=3))
NODE = st.tuples(
    st.text(max_size=200),
    st.lists(st.text(max_size=3), max_size=3),
    st.dictionaries(st.sampled_from("abcd"), st.one_of(NUMBERS, st.lists(NUMBERS, min_size=1, max_size=3)), max_size=3),
)


@settings(max_examples=examples(50))
@given(st.text(), st.dictionaries(st.text(), AXES, max_size=3), st.lists(CONSTANTS, max_size=3), st.lists(NODE), AXES)
def test_any_graph_has_the_bytes_of_the_package_onnx(name, inputs, constants, nodes, shape):
    found = []
    for graph in (Graph(name), OracleGraph(name)):
        names = [graph.input(each, *axes) for each, axes in inputs.items()]
        names += [graph.constant(value) for value in constants]
        names += [graph.op(kind, *reads, **attributes) for kind, reads, attributes in nodes]
        found.append((names, graph.finish("x", *shape)))
    assert found[0] == found[1]


@pytest.mark.parametrize("archive", EARLIER, ids=lambda path: path.stem)
def test_stores_of_earlier_versions_hold_the_same_graphs(archive, tmp_path):
    """So their answers stay what they were, bit for bit, although these files are not read any more."""
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "store")
    with Store(tmp_path / "store") as store:
        exits = read_exits(store)
        assert len(store.manifest.graphs) >= 4
        for name, graph in store.manifest.graphs.items():
            derived = graph_of(store.program.kernels[name], None if exits is None else exits.form)
            assert store.read_file(graph) == derived, name


def test_they_are_small_and_old(program):
    for data, model in graphs_of(program).values():
        assert len(data) < 8 << 10
        domains = dict.fromkeys(node.domain for node in model.graph.node)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [
            (name, VERSIONS[name]) for name in domains
        ]
        assert model.ir_version == 7
        assert not model.functions
        assert {node.op_type for node in model.graph.node if node.domain == CONTRIB} <= {INTEGER_PRODUCT}


def test_they_hold_no_weights(program):
    for _, model in graphs_of(program).values():
        constants = [node for node in model.graph.node if node.op_type == "Constant"]
        attributes = [attribute.t for node in constants for attribute in node.attribute]
        for tensor in itertools.chain(model.graph.initializer, attributes):
            assert numpy_helper.to_array(tensor).nbytes <= 1 << 10
            assert tensor.data_location == onnx.TensorProto.DEFAULT and not tensor.external_data
        assert not model.graph.sparse_initializer


def test_their_inputs_of_fixed_size_are_the_weights_by_role(program):
    exit_shapes = FORMS["mean-linear"].shapes(program.kernels["exit"].attributes["hidden_size"], 2)
    promised = {name: weight_shapes(kernel) for name, kernel in program.kernels.items()} | {"exit": exit_shapes}
    for name, (_, model) in graphs_of(program).items():
        extents = {
            value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in model.graph.input
            if value.type.tensor_type.elem_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT8)
        }
        fixed = {name: tuple(shape) for name, shape in extents.items() if all(shape)}
        assert fixed == promised[name]

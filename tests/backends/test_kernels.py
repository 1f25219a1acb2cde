"""ONNX graphs of encoder kernels are small and old enough for every runtime that offramp supports."""

import itertools

import onnx
import pytest
from onnx import numpy_helper

from offramp.division.names.build import plan_division
from offramp.division.names.kernels import build_graphs
from offramp.program.encoder import weight_shapes
from offramp.program.heads import FORMS
from offramp.store import Store
from tests.division.tiny import config_of, entries_of

CONFIGS = [
    *(config_of(model_type) for model_type in ("bert", "distilbert", "roberta", "xlm-roberta", "electra")),
    *(config_of(hidden_act=name) for name in ("gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")),
    config_of(hidden_size=1024, num_attention_heads=16, intermediate_size=4096),
]
NAMES = [f"{config['model_type']}-{config.get('hidden_act', 'gelu')}-{config.get('hidden_size')}" for config in CONFIGS]


@pytest.fixture(params=CONFIGS, ids=NAMES)
def program(request):
    return plan_division(request.param, entries_of(request.param)).program


def graphs_of(program):
    graphs = build_graphs(program, FORMS["mean-linear"])
    assert sorted(graphs) == ["attention", "down", "embedding", "exit", "head", "up"]
    return {kernel: (data, onnx.load_model_from_string(data)) for kernel, data in graphs.items()}


def test_they_are_small_and_old(program):
    for data, model in graphs_of(program).values():
        assert len(data) < 1 << 20
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 13)]
        assert model.ir_version == 7
        assert not model.functions
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}


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
            if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        }
        fixed = {name: tuple(shape) for name, shape in extents.items() if all(shape)}
        assert fixed == promised[name]


def test_a_store_says_what_its_graphs_need(store):
    with Store(store) as opened:
        for kind, graph in opened.manifest.graphs.items():
            model = onnx.load_model_from_string(opened.read_file(graph))
            assert (graph.opset, graph.ir) == (model.opset_import[0].version, model.ir_version), kind

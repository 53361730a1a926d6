"""The passes that make a graph smaller: the same results from fewer nodes and buffers."""

from dataclasses import replace

import networks
import numpy as np
import pytest

import tte.ops  # noqa: F401
from tte.ir import Builder, Graph, Origin, TensorType, Value, evaluate, verify
from tte.passes.autodiff import differentiate
from tte.passes.fuse import fuse_elementwise, fuse_updates
from tte.passes.optimizer import attach_sgd
from tte.passes.simplify import drop_identity, eliminate_common_subexpressions, eliminate_dead_code, fold_constants


def training(graph: Graph) -> Graph:
    return attach_sgd(differentiate(networks.with_loss(graph)), 0.1)


@pytest.mark.parametrize(
    "apply", [eliminate_common_subexpressions, eliminate_dead_code, fuse_updates, fuse_elementwise, fold_constants]
)
@pytest.mark.parametrize("graph", [training(networks.residual(networks.RESIDUAL_WEIGHTS)), training(networks.split())])
def test_meaning_is_kept(apply, graph: Graph) -> None:
    before, after = (evaluate(g, networks.sample(graph)) for g in (graph, verify(apply(graph))))
    np.testing.assert_array_equal(before.outputs[0], after.outputs[0])
    for name, value in before.params.items():
        np.testing.assert_array_equal(after.params[name], value, err_msg=name)


def test_gradient_and_update_become_one_region() -> None:
    graph = fuse_updates(training(networks.residual(networks.RESIDUAL_WEIGHTS)))
    assert not any(n.op == "nn.sgd" for n in graph.nodes)
    bodies = [[m.op for m in n.body.nodes] for n in graph.nodes if n.body]
    assert bodies.count(["nn.conv2d_weight_grad", "nn.sgd"]) == 5
    assert bodies.count(["matmul", "nn.sgd"]) == 1
    assert bodies.count(["sum", "nn.sgd"]) == 6


def test_convolution_residual_and_activation_become_one_region() -> None:
    graph = fuse_elementwise(networks.residual())
    bodies = [[m.op for m in n.body.nodes] for n in graph.nodes if n.body]
    assert bodies == [
        ["nn.conv2d", "nn.relu"],
        ["nn.conv2d", "nn.relu"],
        ["nn.conv2d", "add", "nn.relu"],
        ["nn.conv2d", "nn.hard_swish"],
        ["nn.conv2d", "clip"],
    ]
    assert [n.layer for n in graph.nodes if n.body] == ["stem", "a", "b", "depthwise", "narrow"]


def test_a_value_that_is_read_twice_keeps_its_buffer() -> None:
    net = networks.Network()
    x = Value("x", TensorType((1, 4, 4, 2)))
    h = net.conv("c", x, 2)
    y = net.call("add", net.call("nn.relu", h), h)
    graph = fuse_elementwise(net.graph(x, y))
    assert [n.op for n in graph.nodes] == ["nn.conv2d", "region"]
    assert [m.op for m in graph.nodes[1].body.nodes] == ["nn.relu", "add"]


def test_a_broadcast_operand_of_larger_shape_is_not_fused() -> None:
    net = networks.Network()
    x = Value("x", TensorType((1, 3)))
    y = net.call("add", net.dense("d", x, 4), net.weight("table", 5, 4))
    assert [n.op for n in fuse_elementwise(net.graph(x, y)).nodes] == ["nn.dense", "add"]


def test_split_weights_are_read_in_parts() -> None:
    """The whole weight never gets a buffer, neither forward nor for the gradient of the layer before it."""
    net_training = fuse_elementwise(fuse_updates(training(networks.split(("wide.weight", "first.bias")))))
    assert not any(n.op == "concatenate" for n in net_training.nodes)
    bodies = [[m.op for m in n.body.nodes] for n in net_training.nodes if n.body]
    assert ["concatenate", "nn.conv2d"] in bodies
    assert ["concatenate", "nn.conv2d_transpose", "nn.apply_mask"] in bodies


def test_equal_calls_are_computed_once() -> None:
    builder = Builder()
    x = Value("x", TensorType((3,)))
    y = builder.call("add", builder.call("exp", x), builder.call("exp", x))
    graph = Graph("main", (x,), nodes=tuple(builder.nodes), outputs=(y,)).renumbered()
    assert [n.op for n in eliminate_common_subexpressions(graph).nodes] == ["exp", "add"]


def test_dead_code_goes() -> None:
    builder = Builder()
    x = Value("x", TensorType((3,)))
    builder.call("log", builder.call("exp", x))
    y = builder.call("negative", x)
    unread = builder.const(1.5)
    graph = Graph("main", (x,), consts=(unread,), nodes=tuple(builder.nodes), outputs=(y,)).renumbered()
    small = eliminate_dead_code(graph)
    assert [n.op for n in small.nodes] == ["negative"]
    assert small.consts == ()


def test_folding_moves_a_weights_origin_along() -> None:
    builder = Builder()
    data = np.arange(6, dtype=np.float32).reshape(2, 3)
    origin = Origin("fc.weight", (2, 3), np.arange(6).reshape(2, 3), data.astype(np.float64))
    w = builder.const(data, "fc.weight", origin)
    x = Value("x", TensorType((2,)))
    y = builder.call("nn.dense", x, builder.call("transpose", w, axes=(1, 0)))
    graph = Graph("main", (x,), consts=(w,), nodes=tuple(builder.nodes), outputs=(y,)).renumbered()
    folded = verify(fold_constants(graph))
    assert [n.op for n in folded.nodes] == ["nn.dense"]
    (moved,) = folded.consts
    assert moved.name == "fc.weight"
    np.testing.assert_array_equal(moved.data, data.T)
    np.testing.assert_array_equal(moved.origin.index, data.T)
    np.testing.assert_array_equal(moved.origin.scale, data.T)


def test_a_graph_of_constants_folds_to_its_value() -> None:
    builder = Builder()
    y = builder.call("add", builder.const(1.0), builder.const(2.0))
    graph = Graph("main", consts=tuple(builder.consts.values()), nodes=tuple(builder.nodes), outputs=(y,))
    folded = verify(fold_constants(graph.renumbered()))
    assert folded.nodes == ()
    assert float(evaluate(folded, []).outputs[0]) == 3.0
    assert replace(folded, name="x") != folded


@pytest.mark.parametrize(
    ("dtype", "mean", "scale", "attrs", "gone"),
    [
        ("int8", 0.0, 1 / 127.5, {}, True),
        ("int8", 7.0, 0.031, {"zero_point": 7}, True),
        ("int8", 0.0, 1 / 127.5, {"low": -127}, False),  # of one value
        ("int8", 0.0, 1 / 127.5, {"zero_point": 1}, False),
        ("uint8", 128.0, 1 / 127.5, {}, False),  # other bits
        ("int8", [0.0, 0.0, 0.0], 1 / 127.5, {}, False),  # per channel
    ],
)
def test_what_gives_an_input_its_own_integers_is_dropped(
    dtype: str, mean: object, scale: float, attrs: dict, gone: bool
):
    builder, x = Builder(), Value("x", TensorType((1, 86, 3), dtype))
    real = builder.call(
        "subtract", builder.call("cast", x, dtype="float32"), builder.const(np.asarray(mean, np.float32))
    )
    real = builder.call("multiply", real, builder.const(np.float32(scale)))
    y = builder.call("qnn.dequantize", builder.call("qnn.quantize", real, scale=scale, **attrs), scale=scale)
    graph = Graph("main", (x,), (), tuple(builder.consts.values()), tuple(builder.nodes), (y,)).renumbered()
    small = verify(drop_identity(verify(graph)))
    assert [n.op for n in small.nodes] == (["qnn.dequantize"] if gone else [n.op for n in graph.nodes])
    every = np.resize(np.arange(256).astype(dtype), x.type.shape)
    np.testing.assert_array_equal(*(evaluate(g, [every]).outputs[0] for g in (graph, small)))

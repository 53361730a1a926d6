"""What learns becomes params; a weight in part, a param and a constant; a new head takes the old one's place."""

import networks
import numpy as np
import pytest

from tte.errors import TTEError
from tte.ir import Const, Graph, Origin, Param, TensorType, Value, evaluate, rewrite, verify
from tte.passes.autodiff import differentiate
from tte.passes.channels import select_channels
from tte.passes.head import replace_head
from tte.passes.select_updates import select_updates
from tte.passes.simplify import eliminate_dead_code
from tte.scheme import UpdateScheme, resolve

X = np.random.default_rng(5).standard_normal((1, 8, 8, 2)).astype(np.float32)


def select(graph: Graph, train: object) -> Graph:
    resolved = resolve(UpdateScheme.load({"train": train}), graph)
    moved, _ = select_channels(graph, resolved)
    return verify(select_updates(moved, resolved))


def params(graph: Graph) -> dict[str, tuple[int, ...]]:
    return {p.name: p.type.shape for p in graph.params}


def test_full() -> None:
    graph = networks.residual()
    result = select(graph, "full")
    assert params(result) == {c.name: c.type.shape for c in graph.consts}
    assert not result.consts
    assert np.array_equal(evaluate(result, [X]).outputs[0], evaluate(graph, [X]).outputs[0])


def test_parts_text() -> None:
    result = select(networks.residual(), [{"layer": "narrow", "weight": {"in_channels": 0.5}, "bias": True}])
    assert [line for line in str(result).splitlines() if "narrow" in line] == [
        "  param @narrow.weight: Tensor[(6, 1, 1, 4), float32];",
        "  param @narrow.bias: Tensor[(6,), float32];",
        "  const @narrow.weight.frozen: Tensor[(6, 1, 1, 4), float32];",
        '  %9 = concatenate(@narrow.weight, @narrow.weight.frozen, axis=3, layer="narrow")'
        " /* ty=Tensor[(6, 1, 1, 8), float32] */;",
        '  %10 = nn.conv2d(%8, %9, @narrow.bias, layer="narrow") /* ty=Tensor[(1, 4, 4, 6), float32] */;',
        '  %11 = clip(%10, min=0.0, max=6.0, layer="narrow") /* ty=Tensor[(1, 4, 4, 6), float32] */;',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "shape"),
    [("a", (8, 3, 3, 3)), ("depthwise", (3, 3, 3, 1)), ("narrow", (6, 1, 1, 3)), ("head", (5, 3))],
)
@pytest.mark.parametrize("select_", ["first", [4, 0, 2]])
def test_gradient_of_a_part_is_the_part_of_the_gradient(layer: str, shape: tuple[int, ...], select_: object) -> None:
    graph = networks.residual()
    result = select(graph, [{"layer": layer, "weight": {"in_channels": 3, "select": select_}}])
    assert params(result) == {f"{layer}.weight": shape}
    assert np.allclose(evaluate(result, [X]).outputs[0], evaluate(graph, [X]).outputs[0], atol=1e-5)

    def gradient(g: Graph) -> np.ndarray:
        backward = verify(eliminate_dead_code(differentiate(networks.with_loss(g))))
        return evaluate(backward, [X, np.asarray([1], np.int32)]).outputs[1]

    whole = gradient(select(graph, [{"layer": layer, "weight": "all"}]))
    axis = {"depthwise": 0, "head": 1}.get(layer, 3)
    channels = [0, 1, 2] if select_ == "first" else [0, 2, 4]
    np.testing.assert_allclose(gradient(result), np.take(whole, channels, axis), rtol=1e-4, atol=1e-6)


def test_transposed_convolution_in_part() -> None:
    net = networks.Network()
    x = Value("x", TensorType((1, 4, 4, 6)))
    y = net.call("nn.conv2d_transpose", x, net.weight("up.weight", 6, 2, 2, 3), layer="up", strides=(2, 2))
    assert params(select(net.graph(x, y), [{"layer": "up", "weight": {"in_channels": 2}}])) == {
        "up.weight": (2, 2, 2, 3)
    }


def test_depthwise_with_two_filters_per_channel() -> None:
    net = networks.Network()
    x = Value("x", TensorType((1, 4, 4, 6)))
    y = net.call("nn.conv2d", x, net.weight("dw.weight", 12, 3, 3, 1), layer="dw", groups=6)
    assert params(select(net.graph(x, y), [{"layer": "dw", "weight": {"in_channels": 2}}])) == {
        "dw.weight": (4, 3, 3, 1)
    }


def test_grouped_convolution_in_part_is_refused() -> None:
    net = networks.Network()
    x = Value("x", TensorType((1, 4, 4, 6)))
    with pytest.raises(TTEError, match="grouped"):
        select(net.graph(x, net.conv("g", x, 4, groups=2)), [{"layer": "g", "weight": {"in_channels": 0.5}}])


def test_weight_read_twice_is_split_once() -> None:
    net = networks.Network()
    x = Value("x", TensorType((1, 4)))
    w = net.weight("w", 4, 4)
    y = net.call("nn.dense", net.call("nn.dense", x, w, layer="a"), w, layer="b")
    result = select(net.graph(x, y), [{"layer": "a", "weight": {"in_channels": 2}}])
    assert [n.op for n in result.nodes] == ["concatenate", "nn.dense", "nn.dense"]


def test_origin_is_split_with_the_weight() -> None:
    net = networks.Network()
    x = Value("x", TensorType((1, 4)))
    rng = np.random.default_rng(0)
    index, scale = rng.permutation(12).reshape(3, 4), rng.uniform(1, 2, (3, 4))
    w = net.builder.const(rng.standard_normal((3, 4)).astype(np.float32), "w", Origin("user.w", (4, 3), index, scale))
    graph = net.graph(x, net.call("nn.dense", x, w, layer="a"))
    result = select(graph, [{"layer": "a", "weight": {"select": [3, 1]}}])
    (param,), (frozen,) = result.params, (c for c in result.consts if c.name == "w.frozen")
    for stored, columns in ((param, [1, 3]), (frozen, [0, 2])):
        assert stored.origin and stored.origin.shape == (4, 3) and stored.origin.scale is not None
        assert np.array_equal(stored.data, w.data[:, columns])  # type: ignore[attr-defined]
        assert np.array_equal(stored.origin.index, index[:, columns])
        assert np.array_equal(stored.origin.scale, scale[:, columns])


# A new head.


def with_softmax(graph: Graph) -> Graph:
    from tte.ir import Builder

    builder = Builder()
    builder.nodes.extend(graph.nodes)
    y = builder.call("nn.softmax", graph.outputs[0], layer="softmax")
    return verify(rewrite(graph, builder.nodes, outputs=(y,)))


def test_new_head() -> None:
    result = verify(replace_head(with_softmax(networks.residual()), "head", 7))
    assert result.outputs[0].type.shape == (1, 7)
    np.testing.assert_allclose(evaluate(result, [X]).outputs[0], 1 / 7, rtol=1e-6)
    assert {c.name: c.type.shape for c in result.consts if "head" in c.name} == {
        "head.weight": (7, 6),
        "head.bias": (7,),
    }


def test_convolution_as_head() -> None:
    net = networks.Network()
    x = Value("x", TensorType((1, 4, 4, 3)))
    h = net.call("nn.avg_pool2d", net.conv("head", x, 6, kernel=1), pool_size=(4, 4))
    result = verify(replace_head(net.graph(x, net.call("reshape", h, newshape=(1, 6))), "head", 1))
    assert result.outputs[0].type.shape == (1, 1)
    assert verify(replace_head(result, "head", 4)).outputs[0].type.shape == (1, 4)


@pytest.mark.parametrize("transposed", [False, True])
def test_new_head_in_the_users_layout(transposed: bool) -> None:
    """Columns behind a flattened picture are in another order than the user's; so are the new ones."""
    net = networks.Network()
    x = Value("x", TensorType((1, 4)))
    columns = np.array([2, 0, 3, 1])
    old = np.arange(12).reshape(3, 4)[:, columns]  # user (3, 4)
    shape = (3, 4)
    if transposed:  # ONNX: user (4, 3)
        old, shape = np.arange(12).reshape(4, 3).T[:, columns], (4, 3)
    w = net.builder.const(np.ones((3, 4), np.float32), "w", Origin("w", shape, old))
    graph = net.graph(x, net.call("nn.dense", x, w, layer="head"))
    (new,) = replace_head(graph, "head", 5).consts
    assert new.origin is not None and new.origin.shape == ((4, 5) if transposed else (5, 4))
    user = np.arange(20).reshape(new.origin.shape)
    assert np.array_equal(new.origin.index, (user.T if transposed else user)[:, columns])


def test_head_that_is_none() -> None:
    with pytest.raises(TTEError) as caught:
        replace_head(networks.residual(), "haed", 3)
    assert caught.value.code == "TTE-E036" and "did you mean head?" in caught.value.fix
    with pytest.raises(TTEError, match="depends on its outputs"):
        replace_head(networks.residual(), "narrow", 3)
    net = networks.Network()
    x = Value("x", TensorType((1, 4)))
    h = net.dense("head", x, 4)
    with pytest.raises(TTEError, match="cannot be replaced"):
        replace_head(net.graph(x, net.call("add", h, x)), "head", 3)
    net = networks.Network()
    w = net.weight("w", 4, 4)
    tied = net.graph(x, net.call("nn.dense", net.call("nn.dense", x, w, layer="a"), w, layer="head"))
    with pytest.raises(TTEError, match="also another layer's"):
        replace_head(tied, "head", 3)


def test_new_head_learns() -> None:
    graph = replace_head(networks.residual(), "head", 3)
    result = select(graph, "last-layer")
    assert params(result) == {"head.weight": (3, 6), "head.bias": (3,)}
    assert all(isinstance(v, Param) for v in result.nodes[-1].inputs[1:]) and isinstance(result.consts[0], Const)

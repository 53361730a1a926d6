"""Small forward graphs, written down by hand, for tests of passes and code generation."""

import numpy as np

import tte.ops  # noqa: F401  fills the table of operators
from tte.ir import Builder, Graph, Param, TensorType, Value, verify


class Network:
    """A pen for forward graphs: weights are drawn from a seeded generator; ``trained`` ones become params."""

    def __init__(self, trained: tuple[str, ...] = (), seed: int = 0) -> None:
        self.builder = Builder()
        self.trained = trained
        self.params: list[Param] = []
        self.rng = np.random.default_rng(seed)

    def weight(self, name: str, *shape: int) -> Value:
        data = (self.rng.standard_normal(shape) * 0.4).astype(np.float32)
        if name not in self.trained:
            return self.builder.const(data, name)
        self.params.append(Param(name, TensorType(shape), data))
        return self.params[-1]

    def call(self, op: str, *inputs: Value, layer: str = "", **attrs) -> Value:
        return self.builder.call(op, *inputs, layer=layer, **attrs)

    def conv(self, layer: str, x: Value, channels: int, kernel: int = 3, **attrs) -> Value:
        """Convolution with bias and, for kernel 3, the padding that keeps the size."""
        w = self.weight(f"{layer}.weight", channels, kernel, kernel, x.type.shape[3] // attrs.get("groups", 1))
        b = self.weight(f"{layer}.bias", channels)
        attrs.setdefault("padding", (kernel // 2,) * 4)
        return self.call("nn.conv2d", x, w, b, layer=layer, **attrs)

    def dense(self, layer: str, x: Value, features: int) -> Value:
        w = self.weight(f"{layer}.weight", features, x.type.shape[-1])
        return self.call("nn.dense", x, w, self.weight(f"{layer}.bias", features), layer=layer)

    def graph(self, x: Value, y: Value) -> Graph:
        consts = tuple(self.builder.consts.values())
        graph = Graph("main", (x,), tuple(self.params), consts, tuple(self.builder.nodes), (y,))
        return verify(graph.renumbered())


def residual(trained: tuple[str, ...] = ()) -> Graph:
    """(1, 8, 8, 2) -> 5 classes: stem, a residual block with a strided sibling, depthwise, global pooling, dense."""
    net = Network(trained)
    x = Value("x", TensorType((1, 8, 8, 2)))
    stem = net.call("nn.relu", net.conv("stem", x, 8), layer="stem")
    a = net.call("nn.relu", net.conv("a", stem, 8), layer="a")
    b = net.call("nn.relu", net.call("add", net.conv("b", a, 8), stem, layer="b"), layer="b")
    depthwise = net.call("nn.hard_swish", net.conv("depthwise", b, 8, groups=8, strides=(2, 2)), layer="depthwise")
    narrow = net.call("clip", net.conv("narrow", depthwise, 6, kernel=1), min=0.0, max=6.0, layer="narrow")
    pooled = net.call("mean", narrow, axis=(1, 2), layer="pool")
    return net.graph(x, net.dense("head", pooled, 5))


RESIDUAL_WEIGHTS = tuple(
    f"{layer}.{kind}" for layer in ("stem", "a", "b", "depthwise", "narrow", "head") for kind in ("weight", "bias")
)


def split(trained: tuple[str, ...] = ("wide.weight", "wide.bias")) -> Graph:
    """(1, 6, 6, 4) -> 3 classes; the first 3 of 8 input channels of ``wide`` learn, the rest is frozen."""
    net = Network(trained)
    x = Value("x", TensorType((1, 6, 6, 4)))
    h = net.call("nn.relu", net.conv("first", x, 8), layer="first")
    parts = (net.weight("wide.weight", 4, 3, 3, 3), net.weight("wide.weight.frozen", 4, 3, 3, 5))
    w = net.call("concatenate", *parts, axis=3, layer="wide")
    h = net.call("nn.conv2d", h, w, net.weight("wide.bias", 4), padding=(1, 1, 1, 1), layer="wide")
    return net.graph(x, net.dense("head", net.call("mean", h, axis=(1, 2), layer="pool"), 3))


def with_loss(graph: Graph) -> Graph:
    """Cross entropy behind a graph whose output are logits; the label is a second input."""
    from dataclasses import replace

    from tte.ir import rewrite

    builder = Builder()
    builder.nodes.extend(graph.nodes)
    target = Value("target", TensorType(graph.outputs[0].type.shape[:-1], "int32"))
    loss = builder.call("nn.cross_entropy", graph.outputs[0], target, layer="loss")
    return verify(rewrite(replace(graph, inputs=(*graph.inputs, target), outputs=(loss,)), builder.nodes))


def sample(graph: Graph, seed: int = 0) -> list[np.ndarray]:
    """One input and, where the graph has a label, a label."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(graph.inputs[0].type.shape).astype(np.float32)
    return [x, *(np.asarray([seed % 3], np.int32) for _ in graph.inputs[1:])]

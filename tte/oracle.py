"""The independent judge: trains the user's own model in PyTorch, with torch.autograd and torch.optim, in float64.

It shares nothing with tte's gradients, passes, kernels and memory plan. A torch model is run as it is. An ONNX model
or a text is run by interpreting the graph as it was imported, before any pass, with PyTorch's own operators.

A quantised model is run as the integers that the device computes, with the derivatives of the real numbers that they
stand for: rounding passes a gradient on unchanged, a clamp where it let its operand through.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tte.ir import Const, Graph, Node, TensorType, Value, evaluate
from tte.scheme import InputFormat, Loss

Forward = Callable[[Mapping[str, Any], Any], Any]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What training did, by the user's names and in the user's layouts.

    losses: before each step; gradients: of each step; values: after the last
    """

    losses: list[float]
    gradients: list[dict[str, np.ndarray]]
    values: dict[str, np.ndarray]


def follow(
    forward: Forward,
    tensors: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
    loss: Loss,
    *,
    rate: float,
    clip: float | None,
    samples: Sequence[tuple[np.ndarray, np.ndarray | None]],
    ends_in_softmax: bool,
) -> Trajectory:
    """Plain SGD, one sample a step.

    forward(tensors, x) -> output; tensors: all of the model's by name; masks: which elements of which tensors learn.
    ends_in_softmax: the output holds probabilities; cross entropy takes their logarithm, as tte does by absorbing it.
    """
    import torch

    values = {name: torch.from_numpy(array.astype(np.float64)) for name, array in tensors.items()}
    optimizer = torch.optim.SGD([values[name].requires_grad_() for name in masks], lr=rate)
    losses: list[float] = []
    gradients: list[dict[str, np.ndarray]] = []
    for x, y in samples:
        optimizer.zero_grad()
        losses.append(backpropagate(forward, values, masks, loss, x, y, clip, ends_in_softmax))
        gradients.append({name: values[name].grad.numpy().copy() for name in masks})
        optimizer.step()
    return Trajectory(losses, gradients, {name: values[name].detach().numpy() for name in masks})


def backpropagate(
    forward: Forward,
    values: Mapping[str, Any],
    masks: Mapping[str, np.ndarray],
    loss: Loss,
    x: np.ndarray,
    y: np.ndarray | None,
    clip: float | None,
    ends_in_softmax: bool,
) -> float:
    """The loss of one sample; leaves the gradients, of the elements that learn, in ``values``."""
    import torch

    output = forward(values, torch.from_numpy(x.astype(np.float64)))
    if ends_in_softmax and loss.name == "cross_entropy":
        output = torch.log(output)
    if clip is not None:
        output.register_hook(lambda g: g.clamp(-clip, clip))
    value = measure_loss(output, torch.from_numpy(x if y is None else y), loss)
    value.backward()
    for name, mask in masks.items():
        values[name].grad *= torch.from_numpy(mask)
    return float(value.detach())


def measure_loss(output: Any, target: Any, loss: Loss) -> Any:
    """The loss as torch.nn.functional computes it."""
    import torch
    import torch.nn.functional as F

    reduction: dict[str, Any] = {"reduction": loss.reduction}
    if loss.name == "cross_entropy":
        weight = None if loss.class_weights is None else torch.tensor(loss.class_weights, dtype=output.dtype)
        labels = target.long().reshape(() if output.ndim == 1 else (output.shape[0], *output.shape[2:]))
        return F.cross_entropy(output, labels, weight, label_smoothing=loss.label_smoothing, **reduction)
    target = target.to(output.dtype).reshape(output.shape)
    if loss.name == "huber":
        return F.huber_loss(output, target, delta=loss.delta, **reduction)
    functions: dict[str, Any] = {
        "mse": F.mse_loss,
        "l1": F.l1_loss,
        "bce_with_logits": F.binary_cross_entropy_with_logits,
    }
    return functions[loss.name](output, target, **reduction)


def run_module(module: Any) -> tuple[Forward, dict[str, np.ndarray]]:
    """A torch.nn.Module (or the module of an ExportedProgram) and its tensors; the module itself is not touched."""
    import copy

    import torch

    module = copy.deepcopy(module)
    names: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    module = module.double()
    tensors = {name: t.detach().numpy().copy() for name, t in module.state_dict().items() if t.dtype.is_floating_point}

    def forward(values: Mapping[str, Any], x: Any) -> Any:
        bound = dict(values)
        for tied in names.values():
            learns = next((name for name in tied if name in values and values[name].requires_grad), None)
            if learns is not None:
                bound |= dict.fromkeys(tied, values[learns])
        return torch.func.functional_call(module, bound, (x,), tie_weights=False)

    return forward, tensors


def run_graph(graph: Graph, originals: Mapping[str, np.ndarray]) -> tuple[Forward, dict[str, np.ndarray]]:
    """A forward graph; each weight follows the user's tensors, which begin as ``originals``, by its origin."""
    tensors = {name: np.array(array) for name, array in originals.items()}

    def forward(values: Mapping[str, Any], x: Any) -> Any:
        env = {c.name: _gather(c, values, tensors) for c in graph.consts} | {graph.inputs[0].name: x}
        for node in graph.nodes:
            env[node.output.name] = _OPERATORS[node.op](node, *(env[v.name] for v in node.inputs))
        return env[graph.outputs[0].name]

    return forward, tensors


def run_integers(graph: Graph, originals: Mapping[str, np.ndarray], fraction: bool) -> Forward:
    """A forward graph with integer operators; tensors count as the user's do: integers in units of their scales.

    fraction: integers that learn keep a fraction, and are rounded down when they are read; else to nearest.
    What forward makes of its integers, and where a clamp let them through, is taken from the interpreter, whose
    arithmetic is the device's; every derivative is torch's.
    """
    import torch

    producer = graph.producer()

    def read(const: Const, value: Any) -> Any:
        """The stored integer; the gradient passes where it fits."""
        rounded = torch.floor(value.detach()) if fraction and const.type.dtype == "int8" else value.detach().round()
        limits = np.iinfo(const.data.dtype)
        inside = (rounded >= limits.min) & (rounded <= limits.max)
        return rounded.clamp(limits.min, limits.max) + (value - value.detach()) * inside

    def forward(values: Mapping[str, Any], x: Any) -> Any:
        env = {c.name: _gather(c, values, originals).double() for c in graph.consts}
        env |= {c.name: read(c, env[c.name]) for c in graph.consts if c.data.dtype.kind == "i"}
        now = [replace(c, data=env[c.name].detach().numpy().astype(c.data.dtype)) for c in graph.consts]
        decided = _decide(replace(graph, consts=tuple(now)), x.numpy())
        env[graph.inputs[0].name] = x
        for node in graph.nodes:
            operands = [env[v.name] for v in node.inputs]
            if node.op == "qnn.requantize":
                y = operands[0] * torch.from_numpy(_worth(producer[node.inputs[0].name]) / node.attrs["scale"])
            else:
                y = _OPERATORS[node.op](node, *operands)
            if node.output.name in decided:
                integers, inside = (torch.tensor(a) for a in decided[node.output.name])
                y = integers + (y - y.detach()) * inside
            env[node.output.name] = y
        return env[graph.outputs[0].name]

    return forward


def _decide(graph: Graph, x: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of every value that is rounded and clamped: its integers, and where nothing was clamped."""
    nodes: list[Node] = []
    outputs: list[Value] = []
    for node in graph.nodes:
        if "mask" in node.attrs:
            inside = Value(f"{node.output.name}.inside", TensorType(node.output.type.shape, "bit"))
            node = replace(node, attrs=node.attrs | {"mask": True}, outputs=(node.output, inside))
            outputs += node.outputs
        nodes.append(node)
    results = evaluate(replace(graph, nodes=tuple(nodes), outputs=tuple(outputs)), [x]).outputs
    return {v.name: (results[i].astype(np.float64), results[i + 1]) for i, v in enumerate(outputs) if not i % 2}


def _worth(node: Node) -> np.ndarray:
    """The real number that one unit of an integer sum stands for, for averages divided by how many they are."""
    quant = node.inputs[0].type.quant
    assert quant is not None
    scale = np.asarray(quant.scale)
    if node.op == "qnn.sum_pool2d":
        return scale / np.prod(_ints(node, "pool_size"))
    if node.op == "qnn.sum":
        return scale * (node.output.type.size / node.inputs[0].type.size)
    weight = node.inputs[1].type.quant
    assert weight is not None
    product: np.ndarray = scale * np.asarray(weight.scale)
    return product


def prepare_input(x: np.ndarray, format: InputFormat) -> np.ndarray:
    """From the caller's format to the model's own: layout, then normalisation per channel (axis 1)."""
    axes = {"nhwc": (0, 3, 1, 2), "nlc": (0, 2, 1)}.get(format.layout)
    x = x.transpose(axes) if axes else x
    if format.mean is None and format.std is None:
        return x
    rest = (1,) * max(x.ndim - 2, 0)
    mean = np.asarray(format.mean or [0.0], np.float32).reshape(-1, *rest)
    std = np.asarray(format.std or [1.0], np.float32).reshape(-1, *rest)
    return (x.astype(np.float64) - mean) / std


def _gather(const: Const, values: Mapping[str, Any], initial: Mapping[str, np.ndarray]) -> Any:
    """The constant plus scale times what the user's tensor has learned since the beginning."""
    import torch

    data = const.data.astype(np.float64) if const.data.dtype == np.float32 else const.data
    start = torch.from_numpy(np.array(data))
    origin = const.origin
    if origin is None or not values[origin.name].requires_grad:
        return start
    index = torch.from_numpy(np.array(origin.index))
    learned = (values[origin.name] - torch.tensor(initial[origin.name])).reshape(-1)[index]
    return start + (learned if origin.scale is None else learned * torch.from_numpy(np.array(origin.scale)))


def _conv2d(node: Node, x: Any, w: Any, b: Any = None) -> Any:
    import torch.nn.functional as F

    top, left, bottom, right = _ints(node, "padding")
    padded = F.pad(x.permute(0, 3, 1, 2), (left, right, top, bottom))
    kernel = w.permute(0, 3, 1, 2)
    y = F.conv2d(padded, kernel, b, _ints(node, "strides"), 0, _ints(node, "dilation"), node.attrs["groups"])
    return y.permute(0, 2, 3, 1)


def _conv2d_transpose(node: Node, x: Any, w: Any, b: Any = None) -> Any:
    import torch.nn.functional as F

    top, left, bottom, right = _ints(node, "padding")
    more = _ints(node, "output_padding")
    geometry = (_ints(node, "strides"), 0, 0, node.attrs["groups"], _ints(node, "dilation"))
    y = F.conv_transpose2d(x.permute(0, 3, 1, 2), w.permute(0, 3, 1, 2), None, *geometry)
    y = F.pad(y, (0, max(0, more[1] - right), 0, max(0, more[0] - bottom)))
    h, v = node.output.type.shape[1:3]
    y = y[:, :, top : top + h, left : left + v].permute(0, 2, 3, 1)
    return y if b is None else y + b


def _pool(node: Node, x: Any) -> Any:
    import torch
    import torch.nn.functional as F

    top, left, bottom, right = _ints(node, "padding")
    pads = (left, right, top, bottom)
    window = (_ints(node, "pool_size"), _ints(node, "strides"))
    x = x.permute(0, 3, 1, 2)
    if node.op == "qnn.sum_pool2d":
        y = F.avg_pool2d(F.pad(x, pads), *window)
    elif node.op == "nn.max_pool2d":
        y = F.max_pool2d(F.pad(x, pads, value=-float("inf")), *window)
    else:
        y = F.avg_pool2d(F.pad(x, pads), *window)
        if not node.attrs["count_include_pad"]:
            y = y / F.avg_pool2d(F.pad(torch.ones_like(x), pads), *window)
    return y.permute(0, 2, 3, 1)


def _resize(node: Node, x: Any) -> Any:
    import torch.nn.functional as F

    coordinate = node.attrs["coordinate"]
    options: dict[str, Any] = {"mode": "nearest"}
    if node.attrs["method"] == "linear":
        options = {"mode": "bilinear", "align_corners": coordinate == "align_corners"}
    y = F.interpolate(x.permute(0, 3, 1, 2), _ints(node, "size"), **options)
    return y.permute(0, 2, 3, 1)


def _pad(node: Node, x: Any) -> Any:
    import torch.nn.functional as F

    widths: list[int] = []
    attrs: dict[str, Any] = node.attrs
    for before, after, _ in reversed(attrs["pad_width"]):
        widths += [before, after]
    return F.pad(x, widths, value=attrs["value"])


def _slice(node: Node, x: Any) -> Any:
    parts = zip(_ints(node, "begin"), _ints(node, "end"), _ints(node, "strides"), strict=True)
    return x[tuple(slice(b, e, s) for b, e, s in parts)]


def _batch_norm(node: Node, x: Any, gamma: Any, beta: Any, mean: Any, var: Any) -> Any:
    return (x - mean) / (var + node.attrs["epsilon"]).sqrt() * gamma + beta


def _ints(node: Node, name: str) -> tuple[int, ...]:
    value = node.attrs[name]
    assert isinstance(value, tuple)
    return value


def _call(name: str, *attrs: str) -> Callable[..., Any]:
    """torch.<name> or torch.nn.functional.<name>, with the node's attributes of these names."""

    def run(node: Node, *operands: Any) -> Any:
        import torch

        function = getattr(torch, name, None) or getattr(torch.nn.functional, name)
        return function(*operands, *(node.attrs[a] for a in attrs))

    return run


_OPERATORS: dict[str, Callable[..., Any]] = {
    "nn.conv2d": _conv2d,
    "nn.conv2d_transpose": _conv2d_transpose,
    "nn.dense": lambda node, x, w, b=None: x @ w.mT if b is None else x @ w.mT + b,
    "matmul": lambda node, a, b: (
        (a.mT if node.attrs["transpose_a"] else a) @ (b.mT if node.attrs["transpose_b"] else b)
    ),
    "nn.max_pool2d": _pool,
    "nn.avg_pool2d": _pool,
    "nn.adaptive_avg_pool2d": lambda node, x: _call("adaptive_avg_pool2d", "output_size")(
        node, x.permute(0, 3, 1, 2)
    ).permute(0, 2, 3, 1),
    "nn.resize2d": _resize,
    "nn.relu": _call("relu"),
    "clip": lambda node, x: _call("clamp" if node.attrs["inclusive"] else "hardtanh", "min", "max")(node, x),
    "nn.leaky_relu": _call("leaky_relu", "alpha"),
    "nn.hard_sigmoid": _call("hardsigmoid"),
    "nn.hard_swish": _call("hardswish"),
    "sigmoid": _call("sigmoid"),
    "tanh": _call("tanh"),
    "nn.silu": _call("silu"),
    "nn.gelu": lambda node, x: (
        _call("gelu")(node, x)
        if node.attrs["approximate"] == "none"
        else 0.5 * x * (1 + (0.7978845608028654 * (x + 0.044715 * x**3)).tanh())
    ),
    "nn.softplus": _call("softplus", "beta", "threshold"),
    "negative": _call("neg"),
    "exp": _call("exp"),
    "log": _call("log"),
    "sqrt": _call("sqrt"),
    "rsqrt": _call("rsqrt"),
    "abs": _call("abs"),
    "sign": _call("sign"),
    "add": lambda node, a, b: a + b,
    "subtract": lambda node, a, b: a - b,
    "multiply": lambda node, a, b: a * b,
    "divide": lambda node, a, b: a / b,
    "cast": lambda node, x: x.double() if node.attrs["dtype"] == "float32" else x,
    "reshape": lambda node, x: x.reshape(node.output.type.shape),
    "transpose": lambda node, x: x.permute(_ints(node, "axes")),
    "concatenate": lambda node, *xs: _call("cat", "axis")(node, xs),
    "slice": _slice,
    "pad": _pad,
    "broadcast_to": lambda node, x: x.expand(_ints(node, "shape")),
    "take": lambda node, x: x.index_select(node.attrs["axis"], _call("tensor", "indices")(node)),
    "sum": _call("sum", "axis", "keepdims"),
    "mean": _call("mean", "axis", "keepdims"),
    "qnn.quantize": lambda node, x: x / node.attrs["scale"],
    "qnn.affine": lambda node, x, m, b: (
        ((x * m + b) / 2 ** node.attrs["bits"] + 0.5).floor() + node.attrs["zero_point"]
    ).clamp(node.attrs["low"], node.attrs["high"]),
    "qnn.dequantize": lambda node, q: (q - node.attrs["zero_point"]) * node.attrs["scale"],
    "qnn.conv2d": lambda node, x, w, b=None: _conv2d(node, x - node.attrs["zero_point"], w, b),
    "qnn.dense": lambda node, x, w, b=None: (x - node.attrs["zero_point"]) @ w.mT + (0.0 if b is None else b),
    "qnn.add": lambda node, a, b: (a * node.attrs["a_scale"] + b * node.attrs["b_scale"]) / node.attrs["scale"],
    "qnn.sum": lambda node, x: (
        _call("sum", "axis", "keepdims")(node, x - node.attrs["zero_point"])
        if node.attrs["axis"]
        else x - node.attrs["zero_point"]
    ),
    "qnn.sum_pool2d": lambda node, x: _pool(node, x - node.attrs["zero_point"]) * np.prod(_ints(node, "pool_size")),
    "nn.softmax": lambda node, x: x.softmax(-1),
    "nn.log_softmax": lambda node, x: x.log_softmax(-1),
    "nn.batch_norm": _batch_norm,
}

"""Turns gradients into updates."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from tte.ir import Builder, Const, Graph, Node, Param, TensorType, Value, rewrite

LEARNING_RATE = "learning_rate"
DEAD = 1e-6  # a weight's scale below this: the channel is zero whatever its integers are, and 1 / scale overflows


def attach_sgd(graph: Graph, learning_rate: float, qas: bool = True, rounding: str = "stochastic") -> Graph:
    """Plain stochastic gradient descent on the *user's* tensors: outputs (loss, gradients...) -> (loss) and updates.

    Our weight is w = s * u of the user's u (s: folded batch norm). With dL/du = s * dL/dw, the user's own step
    u - lr * dL/du moves w by lr * s^2 * dL/dw; so folding changes nothing of the training.

    A weight of integers q stands for s * q, and its gradient is that of the reals. With quantization-aware scaling
    (qas, arXiv:2206.15472) the reals take the step, q - lr * g / s; without, the integers do, q - lr * g * s.
    """
    builder = Builder()
    builder.nodes.extend(graph.nodes)
    layers = {v.name: node.layer for node in graph.nodes for v in node.inputs}
    producer = graph.producer()
    rate = Param(LEARNING_RATE, TensorType(()), np.asarray(learning_rate, np.float32))
    updates = []
    for param, gradient in zip(graph.params, graph.outputs[1:], strict=True):
        layer = layers.get(param.name, "")
        if param.type.dtype != "float32":
            factor, gradient = _fold_factor(_integer_factor(param, qas), gradient, producer)
            step = (param, gradient, rate, builder.const(factor.astype(np.float32)))
            updates.append((param, builder.call("qnn.sgd", *step, layer=layer, rounding=rounding)))
            continue
        if param.origin is not None and param.origin.scale is not None:
            square = _squeeze_uniform(param.origin.scale) ** 2
            factor = builder.const(square.astype(np.float32))
            gradient = builder.call("multiply", gradient, factor, layer=layer)
        updates.append((param, builder.call("nn.sgd", param, gradient, rate, layer=layer)))
    return rewrite(
        replace(
            graph,
            params=(*graph.params, rate),
            consts=(*graph.consts, *builder.consts.values()),
            outputs=graph.outputs[:1],
            updates=tuple(updates),
        ),
        builder.nodes,
    )


def _integer_factor(param: Param, qas: bool) -> np.ndarray:
    """What turns a gradient of reals into a step of integers, per output channel; 0 for dead channels."""
    assert param.type.quant is not None
    scale = np.asarray(param.type.quant.scale).reshape(-1, *[1] * (param.type.rank - 1))
    if not qas:
        return scale
    return np.where(scale < DEAD, 0.0, 1.0 / np.maximum(scale, DEAD))


def _fold_factor(factor: np.ndarray, gradient: Value, producer: Mapping[str, Node]) -> tuple[np.ndarray, Value]:
    """One factor in place of two: the constant that the gradient is multiplied by last goes into the step's."""
    node = producer.get(gradient.name)
    if node is None or node.op != "multiply" or not isinstance(node.inputs[1], Const):
        return factor, gradient
    if node.inputs[0].type.shape != gradient.type.shape:
        return factor, gradient
    return factor * node.inputs[1].data, node.inputs[0]


def _squeeze_uniform(scale: np.ndarray) -> np.ndarray:
    """Length 1 along every axis on which the scale does not vary: a factor per channel, not per weight."""
    for axis in range(scale.ndim):
        first = np.take(scale, [0], axis)
        if np.array_equal(np.broadcast_to(first, scale.shape), scale):
            scale = first
    return scale

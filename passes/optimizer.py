"""Turns gradients into updates."""

from dataclasses import replace

import numpy as np

from tte.ir import Builder, Graph, Param, TensorType, rewrite

LEARNING_RATE = "learning_rate"


def attach_sgd(graph: Graph, learning_rate: float) -> Graph:
    """Plain stochastic gradient descent on the *user's* tensors: outputs (loss, gradients...) -> (loss) and updates.

    Our weight is w = s * u of the user's u (s: folded batch norm). With dL/du = s * dL/dw, the user's own step
    u - lr * dL/du moves w by lr * s^2 * dL/dw; so folding changes nothing of the training.
    """
    builder = Builder()
    builder.nodes.extend(graph.nodes)
    layers = {v.name: node.layer for node in graph.nodes for v in node.inputs}
    rate = Param(LEARNING_RATE, TensorType(()), np.asarray(learning_rate, np.float32))
    updates = []
    for param, gradient in zip(graph.params, graph.outputs[1:], strict=True):
        layer = layers.get(param.name, "")
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


def _squeeze_uniform(scale: np.ndarray) -> np.ndarray:
    """Length 1 along every axis on which the scale does not vary: a factor per channel, not per weight."""
    for axis in range(scale.ndim):
        first = np.take(scale, [0], axis)
        if np.array_equal(np.broadcast_to(first, scale.shape), scale):
            scale = first
    return scale

"""Turns gradients into updates."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tte.ir import Builder, Const, Graph, Node, Param, TensorType, Value, rewrite
from tte.ops.gradients import integer_multiplier
from tte.ops.quantized import DEAD, scale_rate, weight_scales
from tte.passes.quantized import bias_limit

LEARNING_RATE = "learning_rate"


def attach_sgd(graph: Graph, learning_rate: float, qas: bool = True, rounding: str = "stochastic") -> Graph:
    """Plain stochastic gradient descent on the *user's* tensors: outputs (loss, gradients...) -> (loss) and updates.

    Our weight is w = s * u of the user's u (s: folded batch norm). With dL/du = s * dL/dw, the user's own step
    u - lr * dL/du moves w by lr * s^2 * dL/dw; so folding changes nothing of the training.

    A weight of integers q stands for s * q, and its gradient is that of the reals. With quantization-aware scaling
    (qas, arXiv:2206.15472) the reals take the step, q - lr * g / s; without, the integers do, q - lr * g * s. So it is
    for floats that count in units of s, and for reals that the user stores as integers.
    """
    builder = Builder()
    builder.nodes.extend(graph.nodes)
    readers = {v.name: node for node in reversed(graph.nodes) for v in node.inputs}
    producer = graph.producer()
    rate = Param(LEARNING_RATE, TensorType(()), np.asarray(learning_rate, np.float32))
    kept = {param.name for param, _ in graph.updates}
    learned = [param for param in graph.params if param.name not in kept]
    updates = []
    for param, gradient in zip(learned, graph.outputs[1:], strict=True):
        reader = readers[param.name]
        attrs: dict[str, Any] = {"layer": reader.layer}
        if param.type.quant is not None:
            factor, gradient = _fold_factor(_integer_factor(param, reader, qas), gradient, producer)
            if param.type.dtype != "float32":
                attrs["rounding"] = rounding
                if param.type.dtype == "int32":
                    attrs["limit"] = bias_limit(reader.inputs[1], producer)
                scale = weight_scales(_weight(param, reader).type, param.type.rank)
                updates.append((param, _step(builder, param, gradient, rate, factor, scale, producer, attrs)))
                continue
            gradient = builder.call("multiply", gradient, builder.const(factor.astype(np.float32)), **attrs)
        elif (folded := _user_scale(param, qas)) is not None:
            square = _squeeze_uniform(folded) ** 2
            gradient = builder.call("multiply", gradient, builder.const(square.astype(np.float32)), **attrs)
        updates.append((param, builder.call("nn.sgd", param, gradient, rate, **attrs)))
    return rewrite(
        replace(
            graph,
            params=(*graph.params, rate),
            consts=(*graph.consts, *builder.consts.values()),
            outputs=graph.outputs[:1],
            updates=(*updates, *graph.updates),
        ),
        builder.nodes,
    )


def _step(
    builder: Builder,
    param: Param,
    gradient: Value,
    rate: Param,
    factor: np.ndarray,
    scale: np.ndarray,
    producer: Mapping[str, Node],
    attrs: dict[str, Any],
) -> Value:
    """A step of stored integers: without floats where their gradient is integers."""
    made = producer.get(gradient.name)
    if made is None or made.op != "qnn.dequantize_gradient":
        unit, power = _find_power(factor, scale)
        constants = (builder.const(v) for v in (scale.astype(np.float32), unit))
        return builder.call("qnn.sgd", param, gradient, rate, *constants, power=power, **attrs)
    value, unit_of, *factors = made.inputs
    for const in factors:
        assert isinstance(const, Const)
        factor = factor * const.data
    multiplier, bits = integer_multiplier(factor * (256 if param.type.dtype == "int16" else 1))
    steps = builder.call("qnn.gradient_scale", *producer[unit_of.name].inputs, rate, layer=attrs["layer"])
    attrs |= {"room": made.attrs["room"], "bits": bits}
    return builder.call("qnn.integer_sgd", param, value, steps, builder.const(multiplier), **attrs)


def step_size(step: Node, rate: np.float32) -> np.ndarray:
    """What the gradient of an ``nn.sgd`` or ``qnn.sgd`` is multiplied by."""
    if step.op == "nn.sgd":
        return np.asarray(rate)
    scale, unit = (v.data for v in step.inputs[3:] if isinstance(v, Const))
    power = step.attrs["power"]
    assert isinstance(power, int)
    return scale_rate(np.asarray(rate), scale, unit, power)


def _find_power(factor: np.ndarray, scale: np.ndarray) -> tuple[float, int]:
    """(unit, power) of factor = unit * scale^power, but for dead channels."""
    alive = scale >= DEAD
    if not alive.any():
        return 0.0, 0
    for power in (0, -1, -2, 1):
        units = factor[alive] / scale[alive] ** power
        if np.ptp(units) <= 1e-6 * units.max():
            return float(np.median(units)), power
    raise AssertionError("the factor of a step is no power of the scale")


def _user_scale(param: Param, qas: bool) -> np.ndarray | None:
    """s of a float weight that is s times the user's, if it is the user's that take the step."""
    origin = param.origin
    if origin is None or (qas and origin.quantized is not None):
        return None
    return origin.scale


def _integer_factor(param: Param, reader: Node, qas: bool) -> np.ndarray:
    """What turns a gradient of reals into a step of integers, per output channel; 0 for dead channels.

    A bias is dead with its channel's weights: its own scale, s_x * s_w, may be that small in a channel that lives.
    """
    assert param.type.quant is not None
    scale = np.asarray(param.type.quant.scale)
    factor = (1.0 / scale if qas else scale).reshape(-1, *[1] * (param.type.rank - 1))
    return np.where(weight_scales(_weight(param, reader).type, param.type.rank) >= DEAD, factor, 0.0)


def _weight(param: Param, reader: Node) -> Value:
    """The weight that a bias belongs to, or itself."""
    return reader.inputs[1] if param in reader.inputs[2:] else param


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

"""Normalisations: softmax over the last axis, and batch norm in its inference form."""

import numpy as np

from tte.ir import Op, TensorType, register
from tte.ops.rules import require, require_float


def _last_axis(x: TensorType) -> TensorType:
    """Row by row over the last axis."""
    require_float(x=x)
    require(x.rank >= 1, "needs at least one dimension")
    return x


def _shifted(x):  # type: ignore[no-untyped-def]
    return x - x.max(-1, keepdims=True)


def _softmax_ref(x):  # type: ignore[no-untyped-def]
    e = np.exp(_shifted(x))
    return e / e.sum(-1, keepdims=True)


def _softmax_grad_rule(backward, dy, x):  # type: ignore[no-untyped-def]
    return backward.call("nn.softmax_grad", dy, backward.output)


def _log_softmax_ref(x):  # type: ignore[no-untyped-def]
    z = _shifted(x)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def _log_softmax_grad_rule(backward, dy, x):  # type: ignore[no-untyped-def]
    return backward.call("nn.log_softmax_grad", dy, backward.output)


register(Op("nn.softmax", _last_axis, _softmax_ref, _softmax_grad_rule))
register(Op("nn.log_softmax", _last_axis, _log_softmax_ref, _log_softmax_grad_rule))


def _of_output(g: TensorType, y: TensorType) -> TensorType:
    """dx from dy = g and the operator's output y."""
    require_float(g=g, y=y)
    require(g.shape == y.shape and g.rank >= 1, f"g {g.shape} and y {y.shape} must have the same shape")
    return g


def _softmax_grad_ref(g, y):  # type: ignore[no-untyped-def]
    return y * (g - (g * y).sum(-1, keepdims=True))


def _log_softmax_grad_ref(g, y):  # type: ignore[no-untyped-def]
    return g - np.exp(y) * g.sum(-1, keepdims=True)


register(Op("nn.softmax_grad", _of_output, _softmax_grad_ref))
register(Op("nn.log_softmax_grad", _of_output, _log_softmax_grad_ref))


def _batch_norm(
    x: TensorType,
    gamma: TensorType,
    beta: TensorType,
    mean: TensorType,
    var: TensorType,
    *,
    epsilon: float = 1e-5,
) -> TensorType:
    """y = (x - mean) / sqrt(var + epsilon) * gamma + beta along the last axis, with frozen statistics.

    Always lowered before differentiation: into the weights of the layer before it, or to a multiply and an add.
    """
    require_float(x=x, gamma=gamma, beta=beta, mean=mean, var=var)
    require(x.rank >= 1, "needs at least one dimension")
    for name, type in (("gamma", gamma), ("beta", beta), ("mean", mean), ("var", var)):
        require(type.shape == x.shape[-1:], f"{name} must have shape {x.shape[-1:]}, not {type.shape}")
    return x


def _batch_norm_ref(x, gamma, beta, mean, var, *, epsilon):  # type: ignore[no-untyped-def]
    return (x - mean) / np.sqrt(var + x.dtype.type(epsilon)) * gamma + beta


register(Op("nn.batch_norm", _batch_norm, _batch_norm_ref))

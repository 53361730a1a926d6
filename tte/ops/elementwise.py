"""Operators whose result at an index depends on their operands at that index only."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tte.ir import Op, TensorType, register
from tte.ir.types import DTYPES
from tte.ops.rules import require, require_float


def _one(x: np.ndarray, value: float) -> Any:
    """A scalar in the precision of x: the references compute in float64 when they are given float64."""
    return x.dtype.type(value)


def _unary(x: TensorType) -> TensorType:
    require_float(x=x)
    return x


def _register_unary(name: str, ref: Callable[..., Any], grad: Callable[..., Any], infer: Any = _unary) -> None:
    register(Op(name, infer, ref, grad, kind="elementwise", inplace=(0,)))


# --- arithmetic with broadcasting ------------------------------------------------------------------------------------


def _binary(a: TensorType, b: TensorType) -> TensorType:
    """Element by element; shapes broadcast as in numpy."""
    require_float(a=a, b=b)
    try:
        shape = np.broadcast_shapes(a.shape, b.shape)
    except ValueError:
        require(False, f"shapes {a.shape} and {b.shape} do not broadcast")
    return a.with_shape(shape)


def sum_to(backward: Any, g: Any, target: TensorType) -> Any:
    """The gradient of a broadcast: g summed over every axis along which the operand was repeated."""
    if g.type.shape == target.shape:
        return g
    missing = g.type.rank - target.rank
    repeated = [d for d in range(g.type.rank) if d < missing or target.shape[d - missing] != g.type.shape[d]]
    if repeated:
        g = backward.call("sum", g, axis=tuple(repeated))
    return g if g.type.shape == target.shape else backward.call("reshape", g, newshape=target.shape)


def _add_grad(backward, dy, a, b):  # type: ignore[no-untyped-def]
    return (
        sum_to(backward, dy, a.type) if backward.wants(0) else None,
        sum_to(backward, dy, b.type) if backward.wants(1) else None,
    )


def _subtract_grad(backward, dy, a, b):  # type: ignore[no-untyped-def]
    da = sum_to(backward, dy, a.type) if backward.wants(0) else None
    db = backward.call("negative", sum_to(backward, dy, b.type)) if backward.wants(1) else None
    return da, db


def _multiply_grad(backward, dy, a, b):  # type: ignore[no-untyped-def]
    da = sum_to(backward, backward.call("multiply", dy, b), a.type) if backward.wants(0) else None
    db = sum_to(backward, backward.call("multiply", dy, a), b.type) if backward.wants(1) else None
    return da, db


def _divide_grad(backward, dy, a, b):  # type: ignore[no-untyped-def]
    share = backward.call("divide", dy, b)
    da = sum_to(backward, share, a.type) if backward.wants(0) else None
    db = None
    if backward.wants(1):  # d(a / b)/db = -(a / b) / b
        moved = backward.call("multiply", share, backward.output)
        db = backward.call("negative", sum_to(backward, moved, b.type))
    return da, db


register(Op("add", _binary, lambda a, b: a + b, _add_grad, kind="elementwise", inplace=(0, 1)))
register(Op("subtract", _binary, lambda a, b: a - b, _subtract_grad, kind="elementwise", inplace=(0, 1)))
register(Op("multiply", _binary, lambda a, b: a * b, _multiply_grad, kind="elementwise", inplace=(0, 1)))
register(Op("divide", _binary, lambda a, b: a / b, _divide_grad, kind="elementwise", inplace=(0, 1)))


def _negative_grad(backward, dy, x):  # type: ignore[no-untyped-def]
    return backward.call("negative", dy)


def _exp_grad(backward, dy, x):  # type: ignore[no-untyped-def]
    return backward.call("multiply", dy, backward.output)


def _log_grad(backward, dy, x):  # type: ignore[no-untyped-def]
    return backward.call("divide", dy, x)


def _sqrt_grad(backward, dy, x):  # type: ignore[no-untyped-def]
    half = backward.call("multiply", dy, backward.const(0.5))
    return backward.call("divide", half, backward.output)


def _rsqrt_grad(backward, dy, x):  # type: ignore[no-untyped-def]
    # d x^(-1/2) = -1/2 x^(-1/2) / x
    moved = backward.call("multiply", dy, backward.call("multiply", backward.output, backward.const(-0.5)))
    return backward.call("divide", moved, x)


def _abs_grad(backward, dy, x):  # type: ignore[no-untyped-def]
    return backward.call("multiply", dy, backward.call("sign", x))


def _sign_grad(backward, dy, x):  # type: ignore[no-untyped-def]
    return backward.call("multiply", dy, backward.const(0.0))


_register_unary("negative", lambda x: -x, _negative_grad)
_register_unary("exp", np.exp, _exp_grad)
_register_unary("log", np.log, _log_grad)
_register_unary("sqrt", np.sqrt, _sqrt_grad)
_register_unary("rsqrt", lambda x: _one(x, 1) / np.sqrt(x), _rsqrt_grad)
_register_unary("abs", np.abs, _abs_grad)
_register_unary("sign", np.sign, _sign_grad)


def _cast(x: TensorType, *, dtype: str) -> TensorType:
    """The same numbers in another element type; towards integers they are rounded towards zero, as in C."""
    require(dtype in DTYPES and dtype != "bit" and x.dtype != "bit", f"cannot cast {x.dtype} to {dtype}")
    return TensorType(x.shape, dtype)


register(Op("cast", _cast, lambda x, *, dtype: x.astype(DTYPES[dtype]), kind="elementwise"))


# --- masks: what the gradient of a piecewise linear function remembers, one bit per element --------------------------


def _mask(x: TensorType, *, lower: float = -math.inf, upper: float = math.inf) -> TensorType:
    """bit i = lower < x[i] < upper"""
    require_float(x=x)
    require(lower < upper, f"no number lies between {lower} and {upper}")
    return TensorType(x.shape, "bit")


register(Op("nn.mask", _mask, lambda x, *, lower, upper: (x > lower) & (x < upper), kind="elementwise"))


INTEGERS = ("int8", "int16", "int32")


def _apply_mask(g: TensorType, m: TensorType, *, alpha: float = 0.0) -> TensorType:
    """y[i] = g[i] where bit i of m is set, else alpha * g[i]; integers have alpha 0"""
    require(
        g.dtype == "float32" or (g.dtype in INTEGERS and alpha == 0), f"g must be float32 or integers, not {g.dtype}"
    )
    require(m.dtype == "bit" and m.shape == g.shape, f"the mask must be bits of shape {g.shape}, not {m}")
    return g


def _apply_mask_ref(g, m, *, alpha):  # type: ignore[no-untyped-def]
    return np.where(m, g, g * _one(g, alpha) if alpha else _one(g, 0))


register(Op("nn.apply_mask", _apply_mask, _apply_mask_ref, kind="elementwise", inplace=(0,)))


def _masked(backward: Any, dy: Any, value: Any, lower: float, upper: float = math.inf, alpha: float = 0.0) -> Any:
    return backward.call("nn.apply_mask", dy, backward.call("nn.mask", value, lower=lower, upper=upper), alpha=alpha)


# --- activations -----------------------------------------------------------------------------------------------------


def _relu_grad(backward, dy, x):  # type: ignore[no-untyped-def]
    return _masked(backward, dy, backward.output, 0.0)


_register_unary("nn.relu", lambda x: np.maximum(x, _one(x, 0)), _relu_grad)


def _clip(x: TensorType, *, min: float = -math.inf, max: float = math.inf, inclusive: bool = False) -> TensorType:
    """y = x limited to [min, max]; relu6 is clip(0, 6).

    The gradient passes where min < x < max, as in torch.nn.functional.hardtanh and relu6; inclusive: where
    min <= x <= max, as in torch.clamp. ONNX's Clip does not say which, and is read as hardtanh.
    """
    require_float(x=x)
    require(min < max, f"min {min} must be less than max {max}")
    return x


def _clip_grad(backward, dy, x, *, min, max, inclusive):  # type: ignore[no-untyped-def]
    if not inclusive:
        return _masked(backward, dy, backward.output, min, max)
    # At the bounds the output does not tell; between the next smaller and the next larger number lie the bounds, too.
    lower, upper = (float(np.nextafter(np.float32(v), np.float32(d))) for v, d in ((min, -math.inf), (max, math.inf)))
    return _masked(backward, dy, x, lower, upper)


def _clip_ref(x, *, min, max, inclusive):  # type: ignore[no-untyped-def]
    return np.clip(x, _one(x, min), _one(x, max))


_register_unary("clip", _clip_ref, _clip_grad, _clip)


def _leaky_relu(x: TensorType, *, alpha: float = 0.01) -> TensorType:
    """y = x where x > 0, else alpha * x, alpha >= 0"""
    require_float(x=x)
    require(alpha >= 0, f"alpha must not be negative, it is {alpha}")
    return x


def _leaky_relu_grad(backward, dy, x, *, alpha):  # type: ignore[no-untyped-def]
    return _masked(backward, dy, backward.output, 0.0, alpha=alpha)


_register_unary(
    "nn.leaky_relu", lambda x, *, alpha: np.where(x > 0, x, x * _one(x, alpha)), _leaky_relu_grad, _leaky_relu
)


def _hard_sigmoid_ref(x):  # type: ignore[no-untyped-def]
    return np.clip(x / _one(x, 6) + _one(x, 0.5), _one(x, 0), _one(x, 1))


def _hard_sigmoid_grad(backward, dy, x):  # type: ignore[no-untyped-def]
    sixth = backward.call("multiply", dy, backward.const(1.0 / 6.0))
    return _masked(backward, sixth, backward.output, 0.0, 1.0)


_register_unary("nn.hard_sigmoid", _hard_sigmoid_ref, _hard_sigmoid_grad)


def _sigmoid_ref(x):  # type: ignore[no-untyped-def]
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, _one(x, 1)) / (_one(x, 1) + e)


def _softplus(x: TensorType, *, beta: float = 1.0, threshold: float = 20.0) -> TensorType:
    """y = log(1 + exp(beta x)) / beta, and x itself where beta x > threshold (torch.nn.functional.softplus)"""
    require_float(x=x)
    require(beta > 0, f"beta must be positive, it is {beta}")
    return x


def _softplus_ref(x, *, beta, threshold):  # type: ignore[no-untyped-def]
    bx = x * _one(x, beta)
    soft = (np.maximum(bx, _one(x, 0)) + np.log1p(np.exp(-np.abs(bx)))) / _one(x, beta)
    return np.where(bx > threshold, x, soft)


def _gelu(x: TensorType, *, approximate: str = "none") -> TensorType:
    """y = x Phi(x); approximate="tanh": x / 2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (arXiv:1606.08415)"""
    require_float(x=x)
    require(approximate in ("none", "tanh"), f'approximate must be "none" or "tanh", not {approximate!r}')
    return x


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _phi(x: np.ndarray) -> np.ndarray:
    """The normal distribution function."""
    result: np.ndarray = 0.5 * (1.0 + _erf(x.astype(np.float64) * math.sqrt(0.5)))
    return result.astype(x.dtype)


def _tanh_argument(x):  # type: ignore[no-untyped-def]
    return _one(x, math.sqrt(2 / math.pi)) * (x + _one(x, 0.044715) * x * x * x)


def _gelu_ref(x, *, approximate):  # type: ignore[no-untyped-def]
    if approximate == "none":
        return x * _phi(x)
    return _one(x, 0.5) * x * (_one(x, 1) + np.tanh(_tanh_argument(x)))


def _from_output(name: str) -> Callable[..., Any]:
    """A gradient rule that calls ``name``(dy, y)."""
    return lambda backward, dy, x, **attrs: backward.call(name, dy, backward.output, **attrs)


def _from_input(name: str) -> Callable[..., Any]:
    """A gradient rule that calls ``name``(dy, x)."""
    return lambda backward, dy, x, **attrs: backward.call(name, dy, x, **attrs)


_register_unary("sigmoid", _sigmoid_ref, _from_output("nn.sigmoid_grad"))
_register_unary("tanh", np.tanh, _from_output("tanh_grad"))
_register_unary("nn.hard_swish", lambda x: x * _hard_sigmoid_ref(x), _from_input("nn.hard_swish_grad"))
_register_unary("nn.silu", lambda x: x * _sigmoid_ref(x), _from_input("nn.silu_grad"))
_register_unary("nn.softplus", _softplus_ref, _from_input("nn.softplus_grad"), _softplus)
_register_unary("nn.gelu", _gelu_ref, _from_input("nn.gelu_grad"), _gelu)


# --- derivatives: dx = g * f'(x), of x or of y = f(x) ----------------------------------------------------------------


def _derivative(g: TensorType, x: TensorType) -> TensorType:
    """g times the derivative of the activation at x (or, for sigmoid and tanh, expressed by its value y)."""
    require_float(g=g, x=x)
    require(g.shape == x.shape, f"g {g.shape} and x {x.shape} differ in shape")
    return g


def _softplus_derivative(g: TensorType, x: TensorType, *, beta: float = 1.0, threshold: float = 20.0) -> TensorType:
    return _derivative(g, x)


def _gelu_derivative(g: TensorType, x: TensorType, *, approximate: str = "none") -> TensorType:
    return _derivative(g, x)


def _hard_swish_grad_ref(g, x):  # type: ignore[no-untyped-def]
    slope = x / _one(x, 3) + _one(x, 0.5)
    return g * np.where(x <= -3, _one(x, 0), np.where(x >= 3, _one(x, 1), slope))


def _silu_grad_ref(g, x):  # type: ignore[no-untyped-def]
    s = _sigmoid_ref(x)
    return g * (s * (_one(x, 1) + x * (_one(x, 1) - s)))


def _softplus_grad_ref(g, x, *, beta, threshold):  # type: ignore[no-untyped-def]
    bx = x * _one(x, beta)
    return g * np.where(bx > threshold, _one(x, 1), _sigmoid_ref(bx))


def _gelu_grad_ref(g, x, *, approximate):  # type: ignore[no-untyped-def]
    if approximate == "none":
        density = np.exp(_one(x, -0.5) * x * x) * _one(x, 1 / math.sqrt(2 * math.pi))
        return g * (_phi(x) + x * density)
    t = np.tanh(_tanh_argument(x))
    inner = _one(x, math.sqrt(2 / math.pi)) * (_one(x, 1) + _one(x, 3 * 0.044715) * x * x)
    return g * (_one(x, 0.5) * (_one(x, 1) + t) + _one(x, 0.5) * x * (_one(x, 1) - t * t) * inner)


def _register_derivative(name: str, ref: Callable[..., Any], infer: Any = _derivative) -> None:
    register(Op(name, infer, ref, kind="elementwise", inplace=(0, 1)))


_register_derivative("nn.sigmoid_grad", lambda g, y: g * (y * (_one(y, 1) - y)))
_register_derivative("tanh_grad", lambda g, y: g * (_one(y, 1) - y * y))
_register_derivative("nn.hard_swish_grad", _hard_swish_grad_ref)
_register_derivative("nn.silu_grad", _silu_grad_ref)
_register_derivative("nn.softplus_grad", _softplus_grad_ref, _softplus_derivative)
_register_derivative("nn.gelu_grad", _gelu_grad_ref, _gelu_derivative)

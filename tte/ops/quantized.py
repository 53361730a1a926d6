"""Integer operators: an int8 value q stands for the real number scale * (q - zero_point).

Values carry their scales in their type (``TensorType.quant``). Gradients are taken with respect to the real numbers and
are float32: rounding passes them on unchanged (straight-through, arXiv:1308.3432), a clamp passes them where the value
before it was inside its limits, both included. Integer arithmetic of layers: Jacob et al. (arXiv:1712.05877).
"""

from typing import Any

import numpy as np

from tte.ir import Op, TensorType, register
from tte.ir.types import Quant
from tte.ops.conv import Padding, Pair, conv2d_axes, conv2d_gradients, conv2d_macs, conv2d_ref, conv2d_rows, conv2d_type
from tte.ops.dense import dense_gradients, dense_macs, dense_ref, dense_type
from tte.ops.pool import pool_rows, pooled_type, windows
from tte.ops.reduce import reduced_shape, spread
from tte.ops.rules import read_numbers, require

LOW, HIGH = -128, 127
INT32 = np.dtype(np.int32)


def _limits(low: int, high: int, zero_point: int, scale: float) -> None:
    require(LOW <= low <= high <= HIGH, f"limits {low} and {high} are not inside of int8")
    require(LOW <= zero_point <= HIGH, f"the zero point {zero_point} is outside of int8")
    require(0 < scale < float("inf"), f"the scale must be positive and finite, not {scale}")


def _int8(shape: tuple[int, ...], scale: float, zero_point: int) -> TensorType:
    return TensorType(shape, "int8", Quant((scale,), zero_point))


def _with_mask(type: TensorType, mask: bool) -> Any:
    return (type, TensorType(type.shape, "bit")) if mask else type


def _round_to_int(v: np.ndarray) -> np.ndarray:
    """Halves to even; beyond 2^20, which is beyond every limit of int8, it stays at 2^20; NaN is -2^20, as in C."""
    limit = v.dtype.type(2.0**20)
    integers: np.ndarray = np.rint(np.where(v > -limit, np.minimum(v, limit), -limit)).astype(np.int64)
    return integers


def _clamp(v: np.ndarray, low: int, high: int, mask: bool) -> Any:
    """int8 from integers of any size; with ``mask`` also which of them were inside the limits."""
    y = np.clip(v, low, high).astype(np.int8)
    return (y, (v >= low) & (v <= high)) if mask else y


def _through_mask(backward: Any, dy: Any, mask: bool) -> Any:
    """The gradient where the clamp let its operand through."""
    assert mask, "keep_saturation_masks comes before differentiation"
    return backward.call("nn.apply_mask", dy, backward.outputs[1])


# --- in and out ------------------------------------------------------------------------------------------------------


def _quantize(
    x: TensorType,
    *,
    scale: float,
    zero_point: int = 0,
    low: int = LOW,
    high: int = HIGH,
    mask: bool = False,
    unsigned: bool = False,
    zero_first: bool = False,
) -> Any:
    """q = clamp(round(x / scale) + zero_point), halves to even; mask: also where nothing was clamped.

    unsigned: the model's own integers are uint8, 128 more than ours; zero_first: round(x / scale + its zero point).
    """
    require(x.dtype == "float32", f"x must be float32, not {x.dtype}")
    _limits(low, high, zero_point, scale)
    return _with_mask(_int8(x.shape, scale, zero_point), mask)


def _quantize_ref(x, *, scale, zero_point, low, high, mask, unsigned, zero_first):  # type: ignore[no-untyped-def]
    first = zero_point + 128 * unsigned if zero_first else 0
    v = _round_to_int(x / x.dtype.type(scale) + x.dtype.type(first))
    return _clamp(v - first + zero_point, low, high, mask)


def _quantize_grad(backward, dy, x, *, mask, **attrs):  # type: ignore[no-untyped-def]
    return _through_mask(backward, dy, mask)


register(Op("qnn.quantize", _quantize, _quantize_ref, _quantize_grad, kind="elementwise"))


def _dequantize(q: TensorType, *, scale: float, zero_point: int = 0) -> TensorType:
    """x = scale * (q - zero_point)"""
    require(q.dtype == "int8", f"q must be int8, not {q.dtype}")
    _limits(LOW, HIGH, zero_point, scale)
    return TensorType(q.shape)


def _dequantize_ref(q, *, scale, zero_point):  # type: ignore[no-untyped-def]
    return (q.astype(np.int32) - zero_point).astype(np.float32) * np.float32(scale)


def _dequantize_grad(backward, dy, q, **attrs):  # type: ignore[no-untyped-def]
    return dy


register(Op("qnn.dequantize", _dequantize, _dequantize_ref, _dequantize_grad, kind="elementwise"))


def _affine(
    x: TensorType,
    multiplier: TensorType,
    offset: TensorType,
    *,
    bits: int,
    scale: float,
    zero_point: int = 0,
    low: int = LOW,
    high: int = HIGH,
) -> TensorType:
    """q = clamp(round((x * multiplier + offset) / 2^bits) + zero_point), halves up: bytes of a sensor, normalised.

    x: uint8 or int8, plain numbers; multiplier, offset: int32, broadcast to x, so that all sums are below 2^31.
    """
    require(x.dtype in ("uint8", "int8"), f"x must be uint8 or int8, not {x.dtype}")
    require(0 < bits < 31, f"bits must be 1 to 30, not {bits}")
    for name, type in (("multiplier", multiplier), ("offset", offset)):
        fits = type.dtype == "int32" and np.broadcast_shapes(x.shape, type.shape) == x.shape
        require(fits, f"the {name}, {type}, does not fit {x}")
    _limits(low, high, zero_point, scale)
    return _int8(x.shape, scale, zero_point)


def _affine_ref(x, multiplier, offset, *, bits, scale, zero_point, low, high):  # type: ignore[no-untyped-def]
    v = (x.astype(np.int64) * multiplier + offset + (1 << bits >> 1)) >> bits
    return _clamp(v + zero_point, low, high, False)


register(Op("qnn.affine", _affine, _affine_ref, kind="elementwise"))


# --- layers: int8 in, 32-bit accumulators out ------------------------------------------------------------------------


def _require_integers(x: TensorType, w: TensorType, b: TensorType | None) -> None:
    require(x.dtype == "int8", f"x must be int8, not {x.dtype}")
    require(w.dtype in ("int8", "int16"), f"w must be int8, or int16 with eight bits of fraction, not {w.dtype}")
    require(b is None or b.dtype == "int32", f"b must be int32, not {b.dtype if b else ''}")


def _conv2d(
    x: TensorType,
    w: TensorType,
    b: TensorType | None = None,
    *,
    zero_point: int = 0,
    strides: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> TensorType:
    """nn.conv2d of x - zero_point, in integers; padding is the real number 0. x, w: int8, b: int32 -> int32

    w may be int16 with eight bits of fraction, of which this operator reads the integer part.
    """
    _require_integers(x, w, b)
    y = conv2d_type(x, w, b, strides=strides, padding=padding, dilation=dilation, groups=groups)
    return TensorType(y.shape, "int32")


def _conv2d_ref(x, w, b=None, *, zero_point, **geometry):  # type: ignore[no-untyped-def]
    return conv2d_ref(read_numbers(x, INT32, zero_point), read_numbers(w, INT32), b, **geometry)


def _scales(type: TensorType) -> np.ndarray:
    """The scale of every output channel of a weight, or the one of an activation."""
    assert type.quant is not None, type
    return np.asarray(type.quant.scale, np.float64)


def weight_scales(w: TensorType, rank: int) -> np.ndarray:
    """Along the output channels, which are a weight's first axis, for tensors of ``rank``; not so small that a
    quotient is infinite: the step of such a channel is 0 times this gradient."""
    return np.broadcast_to(_scales(w), (w.shape[0],)).reshape(-1, *[1] * (rank - 1)).clip(1e-30)


def _layer_grad(backward, dy, x, w, b, gradients, **attrs):  # type: ignore[no-untyped-def]
    """The rule of a float layer on the stored integers, and the scales that make its answers gradients of reals.

    With acc = sum (q_x - z) q_w, standing for s_x s_w acc: dx = sum (dy s_w) q_w, and the same product dy s_w serves
    the weights: dw = s_x / s_w sum (q_x - z) (dy s_w). So one gradient tensor is kept, not two.
    """
    scale = weight_scales(w.type, 1).reshape(-1).astype(np.float32)
    scaled = backward.wants(0)
    if scaled:
        dy = backward.call("multiply", dy, backward.const(scale))
    dx, dw, db = gradients(backward, dy, x, w, b, **attrs)
    if dw is not None:
        part = backward.wanted(1)
        factor = float(_scales(x.type)[0]) / (
            weight_scales(w.type, w.type.rank) if scaled else np.ones([1] * w.type.rank)
        )
        if dw.type.shape[0] < factor.shape[0]:  # only the trained filters' gradients were computed
            factor = factor[part.start : part.stop]
        dw = backward.call("multiply", dw, backward.const(factor.astype(np.float32)))
    if db is not None and scaled:
        db = backward.call("multiply", db, backward.const((1.0 / weight_scales(w.type, 1)).astype(np.float32)))
    return (dx, dw) if b is None else (dx, dw, db)


def _conv2d_grad(backward, dy, x, w, b=None, **attrs):  # type: ignore[no-untyped-def]
    return _layer_grad(backward, dy, x, w, b, conv2d_gradients, **attrs)


def _conv2d_macs(x, w, b=None, *, zero_point, **geometry):  # type: ignore[no-untyped-def]
    return conv2d_macs(x, w, b, **geometry)


register(
    Op(
        "qnn.conv2d",
        _conv2d,
        _conv2d_ref,
        _conv2d_grad,
        kind="anchor",
        macs=_conv2d_macs,
        rows=conv2d_rows,
        axes=conv2d_axes,
    )
)


def _dense(x: TensorType, w: TensorType, b: TensorType | None = None, *, zero_point: int = 0) -> TensorType:
    """nn.dense of x - zero_point, in integers. x (..., I), w (O, I): int8, b (O,): int32 -> int32 (..., O)"""
    _require_integers(x, w, b)
    return TensorType(dense_type(x, w, b).shape, "int32")


def _dense_ref(x, w, b=None, *, zero_point):  # type: ignore[no-untyped-def]
    return dense_ref(read_numbers(x, INT32, zero_point), read_numbers(w, INT32), b)


def _dense_grad(backward, dy, x, w, b=None, *, zero_point):  # type: ignore[no-untyped-def]
    return _layer_grad(backward, dy, x, w, b, dense_gradients, zero_point=zero_point)


def _dense_macs(x, w, b=None, *, zero_point):  # type: ignore[no-untyped-def]
    return dense_macs(x, w, b)


register(Op("qnn.dense", _dense, _dense_ref, _dense_grad, kind="anchor", macs=_dense_macs))


# --- from accumulators back to int8 ----------------------------------------------------------------------------------


def scale_to_int8(
    acc: np.ndarray, multiplier: np.ndarray, exponent: np.ndarray | None = None, shift: int = 0, average: bool = False
) -> np.ndarray:
    """round(acc * multiplier) as int64, by the arithmetic that the operands stand for.

    float32: float(acc) * multiplier, halves to even: what onnxruntime computes.
    int32:   acc * multiplier / 2^(32 - shift), halves up, exact: multiplier = round(real * 2^(32 - shift)).
             average: halves away from zero, multiplier rounded up.
    with an exponent: the real is multiplier / 2^31 * 2^exponent, rounded twice, as CMSIS-NN does; see ``tflite_scale``.
    """
    if multiplier.dtype == np.float32:
        return _round_to_int(acc.astype(np.float32) * multiplier)
    left = np.maximum(np.int64(shift) if exponent is None else exponent.astype(np.int64), 0)
    limit = (2**31 - 1) >> left  # what the shift would push out of range is far beyond the limits of int8
    wide = np.clip(acc.astype(np.int64), -limit, limit) << left
    product = wide * multiplier.astype(np.int64)
    if exponent is None:
        bits = 32 - min(shift, 0)
        single: np.ndarray = (product + (1 << (bits - 1)) - (average & (wide < 0))) >> bits
        return single
    high = (product + (1 << 30)) >> 31
    right = np.maximum(-exponent.astype(np.int64), 0)
    mask = (np.int64(1) << right) - 1
    double: np.ndarray = (high >> right) + ((high & mask) > (mask >> 1) + (high < 0))
    return double


def tflite_scale(real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(multiplier, exponent), both int32: real = multiplier / 2^31 * 2^exponent, multiplier in [2^30, 2^31)."""
    fraction, exponent = np.frexp(np.asarray(real, np.float64))
    multiplier = np.floor(fraction * 2.0**31 + 0.5).astype(np.int64)
    exponent = exponent + (multiplier == 2**31)
    multiplier = np.where(multiplier == 2**31, 2**30, multiplier)
    tiny = exponent < -31
    return np.where(tiny, 0, multiplier).astype(np.int32), np.where(tiny, 0, exponent).astype(np.int32)


def _requantize(
    acc: TensorType,
    multiplier: TensorType,
    exponent: TensorType | None = None,
    *,
    scale: float,
    zero_point: int = 0,
    low: int = LOW,
    high: int = HIGH,
    shift: int = 0,
    ratio: float = 1.0,
    average: bool = False,
    mask: bool = False,
) -> Any:
    """q = clamp(round(acc * multiplier) + zero_point): the accumulators of a layer as int8 of the given scale.

    acc: int32 (..., O); multiplier (O,) or (1,): float32, or int32 with 32 - shift bits of fraction, or int32 with an
    exponent, see ``scale_to_int8``. The real number that comes out is ``ratio`` times the one that went in (1, but for
    averages). average: acc is a sum of integers as they are, so that the zero point is in it already.
    """
    require(acc.dtype == "int32", f"acc must be int32, not {acc.dtype}")
    require(multiplier.dtype in ("float32", "int32"), f"multiplier must be float32 or int32, not {multiplier.dtype}")
    require(multiplier.shape in ((1,), acc.shape[-1:]), f"multiplier {multiplier.shape} does not fit acc {acc.shape}")
    exact = exponent is None or (exponent.dtype == multiplier.dtype == "int32" and exponent.shape == multiplier.shape)
    require(exact, f"exponent {exponent} does not fit multiplier {multiplier}")
    require(-16 <= shift <= 8, f"shift must be -16 to 8, not {shift}")
    _limits(low, high, zero_point, scale)
    return _with_mask(_int8(acc.shape, scale, zero_point), mask)


def _requantize_ref(  # type: ignore[no-untyped-def]
    acc, multiplier, exponent=None, *, scale, zero_point, low, high, shift, ratio, average, mask
):
    v = scale_to_int8(acc, multiplier, exponent, shift, average)
    return _clamp(v if average else v + zero_point, low, high, mask)


def _requantize_grad(backward, dy, acc, multiplier, exponent=None, *, ratio, mask, **attrs):  # type: ignore[no-untyped-def]
    dacc = _through_mask(backward, dy, mask)
    dacc = dacc if ratio == 1.0 else backward.call("multiply", dacc, backward.const(ratio))
    return (dacc, None) if exponent is None else (dacc, None, None)


register(Op("qnn.requantize", _requantize, _requantize_ref, _requantize_grad, kind="elementwise"))


# --- arithmetic of int8 values ---------------------------------------------------------------------------------------


def _add(
    a: TensorType,
    b: TensorType,
    *,
    a_scale: float,
    a_zero: int,
    b_scale: float,
    b_zero: int,
    scale: float,
    zero_point: int = 0,
    low: int = LOW,
    high: int = HIGH,
    bits: int = 0,
    unsigned: bool = False,
    tflite: bool = False,
    mask: bool = False,
) -> Any:
    """q = clamp(round((a_scale (a - a_zero) + b_scale (b - b_zero)) / scale) + zero_point)

    bits: 0 computes in float32 as onnxruntime does on x86 (see ``add_terms``), halves to even, where unsigned says that
    the model's own integers are uint8, 128 more than ours; else in integers with that many bits of fraction, halves up.
    tflite: as CMSIS-NN does, see ``tflite_terms``.
    """
    for name, type in (("a", a), ("b", b)):
        require(type.dtype == "int8", f"{name} must be int8, not {type.dtype}")
    require(a.shape == b.shape, f"shapes {a.shape} and {b.shape} differ")
    require(0 <= bits <= 24, f"bits must be 0 to 24, not {bits}")
    _limits(low, high, zero_point, scale)
    for real in (a_scale / scale, b_scale / scale):
        require(abs(real) * 2**bits < 2**21, f"the ratio {real} of scales is too large for {bits} bits of fraction")
    return _with_mask(_int8(a.shape, scale, zero_point), mask)


def add_terms(
    a_scale: float, a_zero: int, b_scale: float, b_zero: int, scale: float, zero_point: int, unsigned: bool
) -> tuple[float, float, float, int]:
    """(ra, rb, c, offset): round(fma(a + offset, ra, fma(b + offset, rb, c))) - offset is the sum before its limits.

    These are the roundings of onnxruntime's QLinearAdd on x86: the zero points are one constant, c.
    """
    offset = 128 * unsigned
    za, zb, zc = (np.float32(zero + offset) for zero in (a_zero, b_zero, zero_point))
    ra, rb = (np.float32(real) / np.float32(scale) for real in (a_scale, b_scale))
    return float(ra), float(rb), float(zc - fused_multiply_add(za, ra, zb * rb)), offset


def tflite_terms(a_scale: float, b_scale: float, scale: float) -> tuple[tuple[int, int], ...]:
    """(multiplier, exponent) of a, of b and of their sum, which is counted in 2^20ths of twice the larger scale."""
    twice = 2.0 * max(a_scale, b_scale)
    reals = (a_scale / twice, b_scale / twice, twice / (2**20 * scale))
    return tuple((int(m), int(e)) for m, e in map(tflite_scale, map(np.asarray, reals)))


def fixed_terms(a_scale: float, b_scale: float, scale: float, bits: int) -> tuple[int, int]:
    """What a and b count in the sum, as integers with ``bits`` bits of fraction."""
    return round(a_scale / scale * 2**bits), round(b_scale / scale * 2**bits)


def fused_multiply_add(x: Any, y: Any, z: Any) -> Any:
    """x * y + z rounded once, of float32 (where x has few bits: the product of doubles is exact)."""
    return (np.float64(x) * np.float64(y) + np.float64(z)).astype(np.float32)


def _add_ref(a, b, *, a_scale, a_zero, b_scale, b_zero, scale, zero_point, low, high, bits, unsigned, tflite, mask):  # type: ignore[no-untyped-def]
    if tflite:
        of_a, of_b, of_sum = ([np.asarray(n) for n in term] for term in tflite_terms(a_scale, b_scale, scale))
        wide_a, wide_b = (x.astype(np.int64) - z << 20 for x, z in ((a, a_zero), (b, b_zero)))
        total = scale_to_int8(wide_a, of_a[0], of_a[1]) + scale_to_int8(wide_b, of_b[0], of_b[1])
        v = scale_to_int8(total, of_sum[0], of_sum[1]) + zero_point
    elif bits == 0:
        ra, rb, c, offset = add_terms(a_scale, a_zero, b_scale, b_zero, scale, zero_point, unsigned)
        wa, wb = (v.astype(np.float64) + offset for v in (a, b))
        v = np.rint(fused_multiply_add(wa, ra, fused_multiply_add(wb, rb, c))).astype(np.int64) - offset
    else:
        da, db = a.astype(np.int64) - a_zero, b.astype(np.int64) - b_zero
        ma, mb = fixed_terms(a_scale, b_scale, scale, bits)
        v = ((da * ma + db * mb + (1 << bits >> 1)) >> bits) + zero_point
    return _clamp(v, low, high, mask)


def _add_grad(backward, dy, a, b, *, mask, **attrs):  # type: ignore[no-untyped-def]
    g = _through_mask(backward, dy, mask)
    return g, g


register(Op("qnn.add", _add, _add_ref, _add_grad, kind="elementwise", inplace=(0, 1)))


def _sum(x: TensorType, *, axis: tuple[int, ...], keepdims: bool = False, zero_point: int = 0) -> TensorType:
    """Sum of x - zero_point over the given axes (none: of each element alone), in integers: int8 -> int32."""
    require(x.dtype == "int8", f"x must be int8, not {x.dtype}")
    return TensorType(reduced_shape(x, axis, keepdims) if axis else x.shape, "int32")


def _sum_ref(x, *, axis, keepdims, zero_point):  # type: ignore[no-untyped-def]
    return read_numbers(x, INT32, zero_point).sum(axis, keepdims=keepdims, dtype=np.int32)


def _sum_grad(backward, dy, x, *, axis, keepdims, zero_point):  # type: ignore[no-untyped-def]
    return spread(backward, dy, x, axis) if axis else dy


register(Op("qnn.sum", _sum, _sum_ref, _sum_grad, kind="anchor"))


def _sum_pool2d(
    x: TensorType,
    *,
    pool_size: Pair,
    strides: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    zero_point: int = 0,
) -> TensorType:
    """Sum of x - zero_point over each window, in integers: int8 (N,H,W,C) -> int32 (N,OH,OW,C)"""
    require(x.dtype == "int8", f"x must be int8, not {x.dtype}")
    return TensorType(pooled_type(x, pool_size, strides, padding).shape, "int32")


def _sum_pool2d_ref(x, *, pool_size, strides, padding, zero_point):  # type: ignore[no-untyped-def]
    return np.add.reduce(windows(read_numbers(x, INT32, zero_point), pool_size, strides, padding, 0), dtype=np.int32)


def _sum_pool2d_grad(backward, dy, x, *, pool_size, strides, padding, zero_point):  # type: ignore[no-untyped-def]
    window = {"pool_size": pool_size, "strides": strides, "padding": padding, "count_include_pad": True}
    mean = backward.call("nn.avg_pool2d_grad", dy, **window, input_size=x.type.shape[1:3])
    return backward.call("multiply", mean, backward.const(float(pool_size[0] * pool_size[1])))


register(Op("qnn.sum_pool2d", _sum_pool2d, _sum_pool2d_ref, _sum_pool2d_grad, kind="anchor", rows=pool_rows))


# --- storage of what learns ------------------------------------------------------------------------------------------


def _round(w: TensorType, *, low: int = LOW, high: int = HIGH, zero_point: int = 0, mask: bool = False) -> Any:
    """clamp(round(w)), halves to even: the integers of a weight that is stored as a float in units of its scale."""
    require(w.dtype == "float32", f"w must be float32, not {w.dtype}")
    _limits(low, high, zero_point, 1.0)
    return _with_mask(TensorType(w.shape, "int8", w.quant), mask)


def _round_ref(w, *, low, high, zero_point, mask):  # type: ignore[no-untyped-def]
    return _clamp(_round_to_int(w) + zero_point, low, high, mask)


def _round_grad(backward, dy, w, *, mask, **attrs):  # type: ignore[no-untyped-def]
    return _through_mask(backward, dy, mask)


register(Op("qnn.round", _round, _round_ref, _round_grad, kind="elementwise"))

ROUNDINGS = ("stochastic", "nearest")
DEAD = 1e-6  # a weight's scale below this: the channel is zero whatever its integers are, and 1 / scale^2 is huge


def _hash_fraction(d: np.ndarray) -> np.ndarray:
    """A number in [0, 1) from the bits of each float32: the generator of stochastic rounding has no state."""
    h = d.view(np.uint32) * np.uint32(0x9E3779B9)
    h = (h ^ (h.view(np.int32) >> 15).view(np.uint32)) * np.uint32(0x85EBCA6B)
    return ((h >> np.uint32(8)).astype(np.float32)) * np.float32(2.0**-24)


def scale_rate(rate: np.ndarray, scale: np.ndarray, unit: np.ndarray, power: int) -> np.ndarray:
    """rate * unit * scale^power in float32, from the left; 0 where a channel is dead."""
    rate = rate * unit
    with np.errstate(divide="ignore", over="ignore"):
        scaled = {
            -2: lambda: rate / (scale * scale),
            -1: lambda: rate / scale,
            0: lambda: rate,
            1: lambda: rate * scale,
        }
        result: np.ndarray = np.where(scale >= np.float32(DEAD), scaled[power](), np.float32(0.0))
    return result


def _sgd(
    w: TensorType,
    g: TensorType,
    rate: TensorType,
    scale: TensorType,
    unit: TensorType,
    *,
    power: int = -1,
    rounding: str = "stochastic",
    limit: int = 2**31 - 1,
) -> TensorType:
    """w - rate * unit * scale^power * g on stored integers, saturating: a gradient of reals in steps of integers.

    scale: of the weights, per channel, broadcast to w: the backward pass reads the same, so that flash holds one vector
    per layer; channels whose scale is below ``DEAD`` stay. unit: a number, in memory and not in the code, which layers
    of one shape share.
    w: int8, or int32 (biases), or int16 with eight bits of fraction that keep what rounding would lose; g: float32.
    rounding: "stochastic" rounds up with the probability of the fraction, by a hash of the step's own bits: the same on
    every machine, and without bias; "nearest" loses every step below a half. int16 rounds its last bit to nearest.
    limit: where int32 saturates, so that sums of products still have room in 32 bits.
    """
    require(w.dtype in ("int8", "int16", "int32"), f"w must be an integer, not {w.dtype}")
    floats = all(type.dtype == "float32" for type in (g, rate, scale, unit))
    require(floats, "g, rate, scale, unit must be float32")
    require(w.shape == g.shape, f"w {w.shape} and g {g.shape} must agree")
    require(rate.shape == unit.shape == (), f"rate {rate.shape} and unit {unit.shape} must be scalars")
    require(np.broadcast_shapes(w.shape, scale.shape) == w.shape, f"scale {scale.shape} does not fit w {w.shape}")
    require(-2 <= power <= 1, f"power must be -2 to 1, not {power}")
    require(rounding in ROUNDINGS, f"rounding must be one of {', '.join(ROUNDINGS)}, not {rounding!r}")
    require(0 < limit < 2**31, f"limit must be 1 to 2^31 - 1, not {limit}")
    return w


def _sgd_ref(w, g, rate, scale, unit, *, power, rounding, limit):  # type: ignore[no-untyped-def]
    # Each product is rounded to float32, as in C: the hash sees its bits.
    rate, scale, unit = (np.asarray(v, np.float32) for v in (rate, scale, unit))
    d = -(scale_rate(rate, scale, unit, power) * g.astype(np.float32)).astype(np.float32)
    if w.dtype == np.int16:
        d = d * np.float32(256.0)
    stochastic = rounding == "stochastic" and w.dtype != np.int16
    most = np.float32(2.0**30)
    step = np.floor(np.clip(d + (_hash_fraction(d) if stochastic else np.float32(0.5)), -most, most))
    info = np.iinfo(w.dtype)
    low, high = (-limit, limit) if w.dtype == np.int32 else (info.min, info.max)
    return np.clip(w.astype(np.int64) + step.astype(np.int64), low, high).astype(w.dtype)


register(Op("qnn.sgd", _sgd, _sgd_ref, kind="elementwise", inplace=(0,)))

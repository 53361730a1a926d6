"""Gradients as integers: int8 q with one exponent per tensor stands for the real number unit * 2^exponent * q.

The unit, a float, is that of the gradient with which the integer part of the backward begins: its own largest element,
so that it does not matter how large the loss is. The exponents of what follows are decided in hindsight
(arXiv:2105.04246): each tensor has a range, int32 of two elements, that outlives the step. range[0] is the logarithm to
base 2 of its largest element in units, in 256ths, as far as the steps before tell; range[1] counts what was saturated.
From a loss of integers on nothing needs floating-point instructions: the floats that say what a unit is, and how large
a step, are taken apart and made by their bits.
"""

import numpy as np

from tte.ir import Op, TensorType, register
from tte.ops.conv import (
    conv2d_transpose_axes,
    conv2d_transpose_macs,
    conv2d_transpose_ref,
    conv2d_transpose_type,
    conv2d_weight_grad_axes,
    conv2d_weight_grad_macs,
    conv2d_weight_grad_ref,
    conv2d_weight_grad_type,
)
from tte.ops.dense import matmul_macs, matmul_ref, matmul_type
from tte.ops.quantized import ROUNDINGS
from tte.ops.rules import read_numbers, require

INT32 = np.dtype(np.int32)
MARGIN = 64  # 256ths of an octave between the largest element seen and the limit
DECAY = 7  # so much a range falls in a step that does not fill it: a factor of 0.98
FARTHEST = 60 << 8  # where ranges end


# --- products: int8 times int8, summed in 32 bits --------------------------------------------------------------------


def _require_int8(**types: TensorType) -> None:
    for name, type in types.items():
        require(type.dtype == "int8", f"{name} must be int8, not {type.dtype}")


def _require_weight(w: TensorType) -> None:
    require(w.dtype in ("int8", "int16"), f"w must be int8, or int16 with eight bits of fraction, not {w.dtype}")


def _conv2d_transpose(
    x: TensorType,
    w: TensorType,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    output_padding: tuple[int, int] = (0, 0),
) -> TensorType:
    """nn.conv2d_transpose in integers: the input gradient of qnn.conv2d. x: int8, w: int8 or int16 -> int32"""
    _require_int8(x=x)
    _require_weight(w)
    y = conv2d_transpose_type(
        x, w, None, strides=strides, padding=padding, dilation=dilation, groups=groups, output_padding=output_padding
    )
    return TensorType(y.shape, "int32")


register(
    Op(
        "qnn.conv2d_transpose",
        _conv2d_transpose,
        lambda x, w, **attrs: conv2d_transpose_ref(x.astype(INT32), read_numbers(w, INT32), **attrs),
        kind="anchor",
        axes=conv2d_transpose_axes,
        macs=conv2d_transpose_macs,
    )
)


def _conv2d_weight_grad(
    x: TensorType,
    g: TensorType,
    *,
    kernel_size: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    zero_point: int = 0,
    out_channels: int = 0,
) -> TensorType:
    """nn.conv2d_weight_grad in integers: the weight gradient of qnn.conv2d. x, g: int8 -> int32"""
    _require_int8(x=x, g=g)
    y = conv2d_weight_grad_type(
        x,
        g,
        kernel_size=kernel_size,
        strides=strides,
        padding=padding,
        dilation=dilation,
        groups=groups,
        zero_point=zero_point,
        out_channels=out_channels,
    )
    return TensorType(y.shape, "int32")


register(
    Op(
        "qnn.conv2d_weight_grad",
        _conv2d_weight_grad,
        lambda x, g, **attrs: conv2d_weight_grad_ref(x, g.astype(INT32), **attrs),
        kind="anchor",
        axes=conv2d_weight_grad_axes,
        macs=conv2d_weight_grad_macs,
    )
)


def _matmul(
    a: TensorType, b: TensorType, *, transpose_a: bool = False, transpose_b: bool = False, zero_point: int = 0
) -> TensorType:
    """matmul in integers, b less its zero point. a: int8, b: int8 or int16 -> int32"""
    _require_int8(a=a)
    _require_weight(b)
    y = matmul_type(a, b, transpose_a=transpose_a, transpose_b=transpose_b, zero_point=zero_point)
    return TensorType(y.shape, "int32")


register(
    Op(
        "qnn.matmul",
        _matmul,
        lambda a, b, **attrs: matmul_ref(a.astype(INT32), b, **attrs),
        kind="anchor",
        macs=matmul_macs,
    )
)


# --- where integers begin --------------------------------------------------------------------------------------------


BELOW = 1e-30  # a gradient whose largest element is less is none


def _require_fixed(g: TensorType, multiplier: TensorType | None) -> None:
    """float32 alone, or int32 with a multiplier."""
    require(
        g.dtype == ("int32" if multiplier else "float32"), f"g must be float32, or int32 with factors, not {g.dtype}"
    )
    if multiplier is not None:
        _require_multiplier(g, multiplier)


def _upper(v: np.ndarray, multiplier: np.ndarray) -> np.ndarray:
    """The upper half of a product of 32 bits each, as processors give it."""
    return (v.astype(np.int64) * multiplier.astype(np.int64)) >> 32


def _unit(g: TensorType, multiplier: TensorType | None = None, *, bits: int = 0) -> TensorType:
    """What the largest |g| is 127 of, or 0 where there is nothing to learn from: a scalar. NaN is passed over.

    int32 g stand for g * multiplier / 2^bits; then it is a whole number of 2^(32 - bits).
    """
    _require_fixed(g, multiplier)
    return TensorType(())


def _unit_ref(g, multiplier=None, *, bits):  # type: ignore[no-untyped-def]
    if multiplier is not None:
        largest = int(np.abs(_upper(g, multiplier)).max(initial=0))
        return np.asarray(np.ldexp(np.float32((largest + 126) // 127), 32 - bits), np.float32)
    largest = np.fmax.reduce(np.abs(g), axis=None, initial=np.float32(0))
    return np.asarray(largest / np.float32(127) if largest >= np.float32(BELOW) else 0, np.float32)


register(Op("qnn.gradient_unit", _unit, _unit_ref))


def _quantize(g: TensorType, unit: TensorType, multiplier: TensorType | None = None, *, bits: int = 0) -> TensorType:
    """q = round(g / unit), from -127 to 127; 0 where the unit is. Halves to even; from zero of int32. NaN is -127."""
    _require_fixed(g, multiplier)
    require(unit == TensorType(()), "unit must be a float32 scalar")
    return TensorType(g.shape, "int8")


def _quantize_ref(g, unit, multiplier=None, *, bits):  # type: ignore[no-untyped-def]
    if multiplier is not None:
        v, whole = _upper(g, multiplier), int(np.ldexp(np.float64(unit), bits - 32))
        q = np.sign(v) * ((np.abs(v) + whole // 2) // max(whole, 1))
        return np.clip(q, -127, 127).astype(np.int8)
    q = g / unit if unit > 0 else np.zeros_like(g)
    return np.rint(np.where(q > -127, np.minimum(q, 127), -127)).astype(np.int8)


register(Op("qnn.quantize_gradient", _quantize, _quantize_ref, kind="elementwise"))


# --- exponents -------------------------------------------------------------------------------------------------------


def _require_ranges(*ranges: TensorType) -> None:
    for range in ranges:
        require(range == TensorType((2,), "int32"), f"a range is int32 (2,), not {range}")


def _require_exponents(*exponents: TensorType) -> None:
    for exponent in exponents:
        require(exponent == TensorType((), "int32"), f"an exponent is an int32 scalar, not {exponent}")


def _exponent(range: TensorType, *given: TensorType, least: tuple[int, ...] = ()) -> TensorType:
    """The exponent at which numbers of this range, and a margin, fit 127; but by ``least`` above each that is given."""
    _require_ranges(range)
    _require_exponents(*given)
    require(len(given) == len(least), f"{len(least)} distances from {len(given)} exponents")
    return TensorType((), "int32")


def _exponent_ref(range, *given, least):  # type: ignore[no-untyped-def]
    fitting = ((int(range[0]) + (MARGIN + 255)) >> 8) - 7
    return np.asarray(max([fitting, *(int(e) + n for e, n in zip(given, least, strict=True))]), np.int32)


register(Op("qnn.gradient_exponent", _exponent, _exponent_ref))


def _scale(unit: TensorType, exponent: TensorType, rate: TensorType | None = None) -> TensorType:
    """unit * 2^exponent, what a gradient of this exponent counts in; times a learning rate where one is given"""
    require(unit == TensorType(()) and rate in (None, unit), "unit and rate must be float32 scalars")
    _require_exponents(exponent)
    return TensorType(())


def _scale_ref(unit, exponent, rate=None):  # type: ignore[no-untyped-def]
    factor = np.float64(1.0 if rate is None else rate)
    return np.asarray(np.ldexp(np.float64(unit) * factor, exponent), np.float32)


register(Op("qnn.gradient_scale", _scale, _scale_ref))


def _observe(range: TensorType, q: TensorType, exponent: TensorType, unit: TensorType) -> TensorType:
    """The range after a step that made q of this exponent.

    It becomes what was seen now, or falls by DECAY if that is more; by an octave where nothing but 0 and -1 is left.
    An element at an end of int8 counts as saturated: the tensor is then taken to be an octave larger than it can hold,
    two where more than an eighth of it are. A step whose unit is 0, or no number, changes nothing.
    """
    _require_ranges(range)
    _require_int8(q=q)
    _require_exponents(exponent)
    require(unit == TensorType(()), "unit must be a float32 scalar")
    return range


def _observe_ref(range, q, exponent, unit):  # type: ignore[no-untyped-def]
    if not unit > 0:
        return range
    wide = np.where(q < 0, ~q, q)  # -128 is as large as 127
    peak, saturated = int(wide.max(initial=0)), int((wide == 127).sum())
    following = int(range[0]) - (DECAY if peak else 256)
    if peak:
        whole = peak.bit_length() - 1
        octaves = int(exponent) + whole + (saturated > 0) + (saturated > q.size // 8)
        following = max(following, octaves * 256 + (peak * 256 >> whole) - 256)
    return np.asarray([np.clip(following, -FARTHEST, FARTHEST), min(int(range[1]) + saturated, 2**31 - 1)], np.int32)


register(Op("qnn.observe_gradient", _observe, _observe_ref, inplace=(0,)))


# --- from sums to int8 -----------------------------------------------------------------------------------------------

WIDER = {"int8": 16, "int16": 16, "int32": 0}  # bits by which an operand is shifted to the left first
FINER = 3  # bits of fraction that the terms of a sum have


def shift_product(v: np.ndarray, multiplier: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """round(v * multiplier / 2^shift), halves up, shift from 32, |multiplier| <= 2^30.

    What is more than 32 of the shift is first taken from the multiplier, so that the result is the upper half of a
    product, as processors give it.
    """
    more = np.clip(shift.astype(np.int64) - 32, 0, 30)
    multiplier = (multiplier.astype(np.int64) + ((np.int64(1) << more) >> 1)) >> more
    result: np.ndarray = (v.astype(np.int64) * multiplier + (1 << 31)) >> 32
    return result


def integer_multiplier(factor: np.ndarray) -> tuple[np.ndarray, int]:
    """(multiplier, bits): factor = multiplier / 2^bits, with 30 bits for the largest."""
    bits = 30 - int(np.frexp(np.abs(factor).max())[1])
    return np.rint(factor * 2.0**bits).astype(np.int32), bits


def least_distance(dtype: str, bits: int, finer: int = 0) -> int:
    """How far an exponent has to be above that of an operand, so that its shift is 32 or more."""
    return 32 + finer - bits - WIDER[dtype]


def _require_multiplier(v: TensorType, multiplier: TensorType) -> None:
    fits = multiplier.dtype == "int32" and multiplier.shape in ((1,), v.shape[-1:])
    require(fits, f"a multiplier is int32, one or one per channel, not {multiplier}")


def _require_gradient(v: TensorType) -> None:
    require(v.dtype in WIDER, f"a gradient is int8, int16 or int32, not {v.dtype}")


def _require_scaled(v: TensorType, multiplier: TensorType, exponent: TensorType) -> None:
    _require_gradient(v)
    _require_multiplier(v, multiplier)
    _require_exponents(exponent)


def _scaled(v, multiplier, exponent, to, bits):  # type: ignore[no-untyped-def]
    wider = WIDER[v.dtype.name]
    return shift_product(v.astype(np.int64) << wider, multiplier, to - exponent + (bits + wider))


def _rescale(v: TensorType, multiplier: TensorType, exponent: TensorType, to: TensorType, *, bits: int) -> TensorType:
    """q = round(v * multiplier / 2^(bits + to - exponent)), halves up, saturated: int8, int16 or int32 -> int8

    v counts in 2^exponent, times a factor that is multiplier / 2^bits; q in 2^to.
    """
    _require_scaled(v, multiplier, exponent)
    _require_exponents(to)
    return TensorType(v.shape, "int8")


def _rescale_ref(v, multiplier, exponent, to, *, bits):  # type: ignore[no-untyped-def]
    return np.clip(_scaled(v, multiplier, exponent, to, bits), -128, 127).astype(np.int8)


register(Op("qnn.rescale_gradient", _rescale, _rescale_ref, kind="elementwise"))


def _add(
    a: TensorType,
    a_multiplier: TensorType,
    a_exponent: TensorType,
    b: TensorType,
    b_multiplier: TensorType,
    b_exponent: TensorType,
    to: TensorType,
    *,
    a_bits: int,
    b_bits: int,
) -> TensorType:
    """The sum of two gradients, each first rescaled to FINER bits of fraction: int8, int16 or int32 -> int8

    Halves to even: with so few bits they are frequent, and up would be a bias in all sums over elements.
    """
    _require_scaled(a, a_multiplier, a_exponent)
    _require_scaled(b, b_multiplier, b_exponent)
    _require_exponents(to)
    require(a.shape == b.shape, f"shapes {a.shape} and {b.shape} differ")
    return TensorType(a.shape, "int8")


def _add_ref(a, a_multiplier, a_exponent, b, b_multiplier, b_exponent, to, *, a_bits, b_bits):  # type: ignore[no-untyped-def]
    terms = (
        _scaled(a, a_multiplier, a_exponent, to, a_bits - FINER),
        _scaled(b, b_multiplier, b_exponent, to, b_bits - FINER),
    )
    return np.clip(np.rint(sum(terms) / 2**FINER), -128, 127).astype(np.int8)


register(Op("qnn.add_gradients", _add, _add_ref, kind="elementwise"))


# --- from integers to what learns ------------------------------------------------------------------------------------


def _dequantize(v: TensorType, scale: TensorType, factor: TensorType | None = None, *, room: int = 0) -> TensorType:
    """The real numbers v * scale * factor; room: v may be shifted so far to the left."""
    _require_gradient(v)
    require(scale == TensorType(()), "scale must be a float32 scalar")
    require(0 <= room < 31, f"room must be 0 to 30, not {room}")
    require(factor is None or np.broadcast_shapes(v.shape, factor.shape) == v.shape, f"{factor} does not fit {v}")
    return TensorType(v.shape)


def _dequantize_ref(v, scale, factor=None, *, room):  # type: ignore[no-untyped-def]
    real = v.astype(np.float32) * scale
    return real if factor is None else real * factor


register(Op("qnn.dequantize_gradient", _dequantize, _dequantize_ref, kind="elementwise"))

FINEST = 30  # bits of fraction that a step has at the most


def take_apart(scale: np.ndarray, bits: int) -> tuple[int, int]:
    """(mantissa, fraction): scale = mantissa * 2^(bits - fraction), |mantissa| < 2^31.

    fraction is 0 to FINEST: a scale that is too large for it, or infinite, becomes the largest, one that is too small
    loses bits.
    """
    if np.isinf(scale):
        return (2**31 - 1) * int(np.sign(scale)), 0
    real, exponent = np.frexp(np.float64(scale))
    mantissa, fraction = int(real * 2.0**31), 31 - int(exponent) + bits
    if fraction < 0:
        return (2**31 - 1) * int(np.sign(real)), 0
    return mantissa >> min(max(fraction - FINEST, 0), 31), min(fraction, FINEST)


def _hash_step(product: np.ndarray, w: np.ndarray) -> np.ndarray:
    """32 bits that look random, of the bits of a step and of what takes it."""
    h = (product ^ (product >> 32) ^ w.astype(np.int64)).astype(np.uint32) * np.uint32(0x9E3779B9)
    result: np.ndarray = (h ^ (h.view(np.int32) >> 15).view(np.uint32)) * np.uint32(0x85EBCA6B)
    return result


def _sgd(
    w: TensorType,
    v: TensorType,
    scale: TensorType,
    multiplier: TensorType,
    *,
    room: int,
    bits: int,
    rounding: str = "stochastic",
    limit: int = 2**31 - 1,
) -> TensorType:
    """w - v * scale * multiplier / 2^bits on stored integers, saturating: qnn.sgd without a float instruction.

    scale: a gradient's, times the learning rate; multiplier: int32, |multiplier| <= 2^30, broadcast to w; room: v may
    be shifted so far to the left. A step is the upper half of a product, with as many bits of fraction as the scale
    leaves, 30 at the most; it is 2^28 at the most. rounding, limit: as in qnn.sgd; the hash is of the product and w.
    """
    require(w.dtype in ("int8", "int16", "int32"), f"w must be an integer, not {w.dtype}")
    _require_gradient(v)
    require(
        w.shape == v.shape and scale == TensorType(()), f"w {w.shape} and v {v.shape} must agree, scale be a scalar"
    )
    require(multiplier.dtype == "int32", f"a multiplier is int32, not {multiplier.dtype}")
    require(np.broadcast_shapes(w.shape, multiplier.shape) == w.shape, f"{multiplier} does not fit {w}")
    require(rounding in ROUNDINGS, f"rounding must be one of {', '.join(ROUNDINGS)}, not {rounding!r}")
    require(0 < limit < 2**31 and 0 <= room < 31, f"limit {limit} or room {room} is out of range")
    return w


def _sgd_ref(w, v, scale, multiplier, *, room, bits, rounding, limit):  # type: ignore[no-untyped-def]
    mantissa, fraction = take_apart(scale, bits + room - 64)
    rate = (mantissa * multiplier.astype(np.int64)) >> 32
    product = (v.astype(np.int64) << room) * rate
    u = np.asarray((1 << fraction) >> 1, np.int64)
    if rounding == "stochastic" and w.dtype != np.int16:
        u = (_hash_step(product, w) >> np.uint32(2 + FINEST - fraction)).astype(np.int64)
    step = (u - (product >> 32)) >> fraction
    info = np.iinfo(w.dtype)
    low, high = (-limit, limit) if w.dtype == np.int32 else (info.min, info.max)
    return np.clip(w.astype(np.int64) + step, low, high).astype(w.dtype)


register(Op("qnn.integer_sgd", _sgd, _sgd_ref, kind="elementwise", inplace=(0,)))

"""Resizing of an NHWC picture by interpolation that separates into rows and columns."""

from fractions import Fraction

import numpy as np

from tte.ir import Op, TensorType, register
from tte.ops.rules import require, require_float, require_pair, require_rank

Pair = tuple[int, int]
Tap = tuple[int, int, float]

METHODS = ("nearest", "linear")
COORDINATES = ("half_pixel", "align_corners", "asymmetric")


def resize_taps(size: int, parts: int, method: str, coordinate: str) -> list[Tap]:
    """For each of ``parts`` outputs: (low, high, weight of high). Computed exactly, rounded once.

    half_pixel: s = (i + 1/2) * size / parts - 1/2, clamped to the picture; align_corners: s = i * (size-1) / (parts-1);
    asymmetric: s = i * size / parts. nearest takes floor(s) with asymmetric, and round-half-down of s for the other
    two, as ONNX's default does.

    nearest asymmetric is torch's mode "nearest" to the pixel, which rounds size / parts and s to float32: from 14 to 46
    floor(23 * 14 / 46) is 7, and torch takes 6. (onnxruntime divides by parts / size instead: from 14 to 2 it takes
    pixel 6 where torch takes 7.)
    """
    if method == "nearest" and coordinate == "asymmetric":
        steps = np.arange(parts, dtype=np.float32) * (np.float32(size) / np.float32(parts))
        return [(int(i), int(i), 0.0) for i in np.minimum(np.floor(steps), size - 1)]
    taps = []
    for i in range(parts):
        if coordinate == "half_pixel":
            s = (Fraction(2 * i + 1, 2)) * Fraction(size, parts) - Fraction(1, 2)
        elif coordinate == "align_corners":
            s = Fraction(i * (size - 1), parts - 1) if parts > 1 else Fraction(0)
        else:
            s = Fraction(i * size, parts)
        s = min(max(s, Fraction(0)), Fraction(size - 1))
        low = s.numerator // s.denominator
        if method == "nearest":
            nearest = low if s - low <= Fraction(1, 2) else low + 1
            taps.append((nearest, nearest, 0.0))
        else:
            taps.append((low, min(low + 1, size - 1), float(s - low)))
    return taps


def _matrix(size: int, parts: int, method: str, coordinate: str) -> np.ndarray:
    matrix = np.zeros((parts, size))
    for i, (low, high, weight) in enumerate(resize_taps(size, parts, method, coordinate)):
        matrix[i, low] += 1.0 - weight
        matrix[i, high] += weight
    return matrix


def _require_kind(method: str, coordinate: str) -> None:
    require(method in METHODS, f"method must be one of {METHODS}, not {method!r}")
    require(coordinate in COORDINATES, f"coordinate must be one of {COORDINATES}, not {coordinate!r}")


def _resize2d(x: TensorType, *, size: Pair, method: str = "nearest", coordinate: str = "asymmetric") -> TensorType:
    """Interpolation to ``size``; see resize_taps for the positions. (N,H,W,C) -> (N,OH,OW,C)"""
    require_rank("x", x, 4)
    require_float(x=x)
    require_pair("size", size, 1)
    _require_kind(method, coordinate)
    return x.with_shape((x.shape[0], *size, x.shape[3]))


def _resize2d_ref(x, *, size, method, coordinate):  # type: ignore[no-untyped-def]
    rows, columns = (_matrix(x.shape[1 + d], size[d], method, coordinate).astype(x.dtype) for d in (0, 1))
    return np.einsum("ih,nhwc,jw->nijc", rows, x, columns, optimize=True)


def _resize2d_grad_rule(backward, dy, x, *, size, method, coordinate):  # type: ignore[no-untyped-def]
    return backward.call("nn.resize2d_grad", dy, input_size=x.type.shape[1:3], method=method, coordinate=coordinate)


register(Op("nn.resize2d", _resize2d, _resize2d_ref, _resize2d_grad_rule))


def _resize2d_grad(
    g: TensorType, *, input_size: Pair, method: str = "nearest", coordinate: str = "asymmetric"
) -> TensorType:
    """The adjoint of nn.resize2d: (N,OH,OW,C) -> (N,H,W,C)"""
    require_rank("g", g, 4)
    require_float(g=g)
    require_pair("input_size", input_size, 1)
    _require_kind(method, coordinate)
    return g.with_shape((g.shape[0], *input_size, g.shape[3]))


def _resize2d_grad_ref(g, *, input_size, method, coordinate):  # type: ignore[no-untyped-def]
    rows, columns = (_matrix(input_size[d], g.shape[1 + d], method, coordinate).astype(g.dtype) for d in (0, 1))
    return np.einsum("ih,nijc,jw->nhwc", rows, g, columns, optimize=True)


register(Op("nn.resize2d_grad", _resize2d_grad, _resize2d_grad_ref))

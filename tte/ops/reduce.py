"""Sums and means over axes."""

import math

from tte.ir import Op, TensorType, Window, register
from tte.ops.rules import require, require_axis, require_float


def _reduced(x: TensorType, axis: tuple[int, ...], keepdims: bool) -> TensorType:
    require_float(x=x)
    return x.with_shape(reduced_shape(x, axis, keepdims))


def reduced_shape(x: TensorType, axis: tuple[int, ...], keepdims: bool) -> tuple[int, ...]:
    for a in axis:
        require_axis(a, x.rank)
    require(len(set(axis)) == len(axis) and len(axis) > 0, f"axis must name distinct axes, not {axis}")
    return tuple(1 if d in axis else n for d, n in enumerate(x.shape) if keepdims or d not in axis)


def _sum(x: TensorType, *, axis: tuple[int, ...], keepdims: bool = False) -> TensorType:
    """Sum over the given axes; they stay with length 1 if keepdims."""
    return _reduced(x, axis, keepdims)


def _mean(x: TensorType, *, axis: tuple[int, ...], keepdims: bool = False) -> TensorType:
    """Mean over the given axes; over the rows and columns of a picture it is global average pooling."""
    return _reduced(x, axis, keepdims)


def spread(backward, dy, x, axis):  # type: ignore[no-untyped-def]
    shape = tuple(1 if d in axis else n for d, n in enumerate(x.type.shape))
    kept = dy if dy.type.shape == shape else backward.call("reshape", dy, newshape=shape)
    return backward.call("broadcast_to", kept, shape=x.type.shape)


def _sum_grad(backward, dy, x, *, axis, keepdims):  # type: ignore[no-untyped-def]
    return spread(backward, dy, x, axis)


def _mean_grad(backward, dy, x, *, axis, keepdims):  # type: ignore[no-untyped-def]
    count = math.prod(x.type.shape[a] for a in axis)
    return spread(backward, backward.call("multiply", dy, backward.const(1.0 / count)), x, axis)


def _sum_ref(x, *, axis, keepdims):  # type: ignore[no-untyped-def]
    return x.sum(axis, keepdims=keepdims)


def _mean_ref(x, *, axis, keepdims):  # type: ignore[no-untyped-def]
    return x.mean(axis, keepdims=keepdims)


def _sum_rows(x, *, axis, keepdims):  # type: ignore[no-untyped-def]
    return (Window(1, 1, 0),) if x.rank == 4 and axis == (0, 1, 2) else None


def _sum_axes(x, *, axis, keepdims):  # type: ignore[no-untyped-def]
    letters = "".join("." if d in axis else chr(ord("a") + d) for d in range(x.rank))
    return letters, letters if keepdims else letters.replace(".", "")


register(Op("sum", _sum, _sum_ref, _sum_grad, kind="anchor", rows=_sum_rows, columns=True, along=0, axes=_sum_axes))
register(Op("mean", _mean, _mean_ref, _mean_grad, kind="anchor"))

"""Operators that move elements and compute nothing."""

import math
from dataclasses import replace

import numpy as np

from tte.ir import Op, TensorType, Window, register
from tte.ops.rules import require, require_axis, require_float, require_rank


def _source(x: TensorType) -> TensorType:
    """The picture x as its rows come in: each is asked for once, in ascending order"""
    require_rank("x", x, 4)
    return x


register(Op("source", _source, lambda x: x, rows=lambda x: (Window(1, 1, 0),)))


def _reshape(x: TensorType, *, newshape: tuple[int, ...]) -> TensorType:
    """The same elements in row-major order under another shape; costs nothing."""
    require(all(d >= 0 for d in newshape), f"every dimension must be known, not {newshape}")
    require(math.prod(newshape) == x.size, f"{x.shape} has {x.size} elements, {newshape} has {math.prod(newshape)}")
    return x.with_shape(newshape)


def _reshape_grad(backward, dy, x, *, newshape):  # type: ignore[no-untyped-def]
    return backward.call("reshape", dy, newshape=x.type.shape)


register(Op("reshape", _reshape, lambda x, *, newshape: x.reshape(newshape), _reshape_grad, kind="view"))


def _transpose(x: TensorType, *, axes: tuple[int, ...]) -> TensorType:
    """y's axis k is x's axis axes[k]"""
    require(sorted(axes) == list(range(x.rank)), f"{axes} is not an order of {x.rank} axes")
    return x.with_shape(tuple(x.shape[a] for a in axes))


def _transpose_ref(x, *, axes):  # type: ignore[no-untyped-def]
    return np.asarray(x.transpose(axes), order="C")


def _transpose_grad(backward, dy, x, *, axes):  # type: ignore[no-untyped-def]
    return backward.call("transpose", dy, axes=tuple(int(a) for a in np.argsort(axes)))


def _transpose_rows(x, *, axes):  # type: ignore[no-untyped-def]
    return (None,)


register(Op("transpose", _transpose, _transpose_ref, _transpose_grad, kind="anchor", rows=_transpose_rows))


def _concatenate(*xs: TensorType, axis: int) -> TensorType:
    """The operands one after the other along ``axis``."""
    require(len(xs) >= 1, "needs at least one operand")
    require_axis(axis, xs[0].rank)
    for x in xs:
        same = x.dtype == xs[0].dtype and x.rank == xs[0].rank
        same = same and all(x.shape[d] == xs[0].shape[d] for d in range(x.rank) if d != axis)
        require(same, f"{x} does not fit {xs[0]} along axis {axis}")
    shape = list(xs[0].shape)
    shape[axis] = sum(x.shape[axis] for x in xs)
    quant = xs[0].quant
    if quant and quant.axis == axis:
        quant = replace(quant, scale=tuple(s for x in xs if x.quant for s in x.quant.scale))
    else:
        require(all(x.quant == quant for x in xs), "integers of different scales")
    return TensorType(tuple(shape), xs[0].dtype, quant)


def _concatenate_grad(backward, dy, *xs, axis):  # type: ignore[no-untyped-def]
    gradients, start = [], 0
    for i, x in enumerate(xs):
        stop = start + x.type.shape[axis]
        gradients.append(_section(backward, dy, axis, start, stop) if backward.wants(i) else None)
        start = stop
    return tuple(gradients)


def _section(backward, x, axis, start, stop):  # type: ignore[no-untyped-def]
    begin, end = [0] * x.type.rank, list(x.type.shape)
    begin[axis], end[axis] = start, stop
    return backward.call("slice", x, begin=tuple(begin), end=tuple(end), strides=(1,) * x.type.rank)


register(Op("concatenate", _concatenate, lambda *xs, axis: np.concatenate(xs, axis), _concatenate_grad))


def _slice(x: TensorType, *, begin: tuple[int, ...], end: tuple[int, ...], strides: tuple[int, ...]) -> TensorType:
    """y = x[begin:end:strides], one triple per axis; 0 <= begin < end <= size, strides >= 1"""
    require(len(begin) == len(end) == len(strides) == x.rank, f"needs one begin, end and stride per axis of {x.shape}")
    for d, size in enumerate(x.shape):
        inside = 0 <= begin[d] < end[d] <= size and strides[d] >= 1
        require(inside, f"[{begin[d]}:{end[d]}:{strides[d]}] is not inside axis {d} of {x.shape}")
    return x.with_shape(tuple(-((e - b) // -s) for b, e, s in zip(begin, end, strides, strict=True)))


def _slice_ref(x, *, begin, end, strides):  # type: ignore[no-untyped-def]
    index = tuple(slice(b, e, s) for b, e, s in zip(begin, end, strides, strict=True))
    return np.asarray(x[index], order="C")


def _slice_grad(backward, dy, x, *, begin, end, strides):  # type: ignore[no-untyped-def]
    width = tuple(
        (b, size - b - ((n - 1) * s + 1), s - 1)
        for b, s, n, size in zip(begin, strides, dy.type.shape, x.type.shape, strict=True)
    )
    return backward.call("pad", dy, pad_width=width)


register(Op("slice", _slice, _slice_ref, _slice_grad))


def _pad(x: TensorType, *, pad_width: tuple[tuple[int, int, int], ...], value: float = 0.0) -> TensorType:
    """(before, after, interior) values added per axis: in front, behind, and between neighbouring elements."""
    require(len(pad_width) == x.rank, f"needs one (before, after, interior) per axis of {x.shape}")
    for triple in pad_width:
        fits = len(triple) == 3 and all(p >= 0 for p in triple)
        require(fits, f"(before, after, interior) must be three numbers of at least 0, not {triple}")
    sizes = (n + b + a + i * max(n - 1, 0) for n, (b, a, i) in zip(x.shape, pad_width, strict=True))
    return x.with_shape(tuple(sizes))


def _pad_ref(x, *, pad_width, value):  # type: ignore[no-untyped-def]
    shape = [n + b + a + i * max(n - 1, 0) for n, (b, a, i) in zip(x.shape, pad_width, strict=True)]
    y = np.full(shape, value, x.dtype)
    y[tuple(slice(b, s - a, i + 1) for s, (b, a, i) in zip(shape, pad_width, strict=True))] = x
    return y


def _pad_grad(backward, dy, x, *, pad_width, value):  # type: ignore[no-untyped-def]
    begin = tuple(b for b, _, _ in pad_width)
    end = tuple(size - a for size, (_, a, _) in zip(dy.type.shape, pad_width, strict=True))
    return backward.call("slice", dy, begin=begin, end=end, strides=tuple(i + 1 for _, _, i in pad_width))


register(Op("pad", _pad, _pad_ref, _pad_grad))


def _broadcast_to(x: TensorType, *, shape: tuple[int, ...]) -> TensorType:
    """x repeated along its axes of length 1 and along new leading axes, as numpy.broadcast_to"""
    padded = (1,) * (len(shape) - x.rank) + x.shape
    fits = len(padded) == len(shape) and all(a in (1, b) for a, b in zip(padded, shape, strict=True))
    require(fits, f"{x.shape} does not broadcast to {shape}")
    return x.with_shape(shape)


def _broadcast_to_ref(x, *, shape):  # type: ignore[no-untyped-def]
    return np.asarray(np.broadcast_to(x, shape), order="C")


def _broadcast_to_grad(backward, dy, x, *, shape):  # type: ignore[no-untyped-def]
    from tte.ops.elementwise import sum_to

    return sum_to(backward, dy, x.type)


register(Op("broadcast_to", _broadcast_to, _broadcast_to_ref, _broadcast_to_grad, kind="elementwise"))


def _take(x: TensorType, *, axis: int, indices: tuple[int, ...]) -> TensorType:
    """y's element j along ``axis`` is x's element indices[j]"""
    require_axis(axis, x.rank)
    require(len(indices) >= 1, "needs at least one index")
    inside = all(0 <= i < x.shape[axis] for i in indices)
    require(inside, f"an index is outside of axis {axis} of {x.shape}")
    return x.with_shape((*x.shape[:axis], len(indices), *x.shape[axis + 1 :]))


def _take_rule(backward, dy, x, *, axis, indices):  # type: ignore[no-untyped-def]
    size = x.type.shape[axis]
    if sorted(indices) == list(range(size)):
        return backward.call("permute", dy, axis=axis, order=tuple(int(i) for i in np.argsort(indices)))
    return backward.call("take_grad", dy, axis=axis, indices=indices, size=size)


def _take_ref(x, *, axis, indices):  # type: ignore[no-untyped-def]
    return np.take(x, indices, axis)


register(Op("take", _take, _take_ref, _take_rule))


def _permute(x: TensorType, *, axis: int, order: tuple[int, ...]) -> TensorType:
    """y's element j along ``axis`` is x's element order[j], each of them once: a take that can be done in place"""
    require_axis(axis, x.rank)
    require(
        sorted(order) == list(range(x.shape[axis])), f"{order} is no order of the elements of axis {axis} of {x.shape}"
    )
    return x


def _permute_ref(x, *, axis, order):  # type: ignore[no-untyped-def]
    return np.take(x, order, axis)


register(Op("permute", _permute, _permute_ref, inplace=(0,)))


def _take_grad(g: TensorType, *, axis: int, indices: tuple[int, ...], size: int) -> TensorType:
    """The adjoint of take: zeros, ``size`` of them along ``axis``, with g's element j added to element indices[j]"""
    require_float(g=g)
    require_axis(axis, g.rank)
    require(len(indices) == g.shape[axis], f"axis {axis} of {g.shape} does not fit {len(indices)} indices")
    require(all(0 <= i < size for i in indices), f"an index is outside of {size} elements")
    return g.with_shape((*g.shape[:axis], size, *g.shape[axis + 1 :]))


def _take_grad_ref(g, *, axis, indices, size):  # type: ignore[no-untyped-def]
    y = np.zeros((*g.shape[:axis], size, *g.shape[axis + 1 :]), g.dtype)
    np.add.at(y, (slice(None),) * axis + (list(indices),), g)
    return y


register(Op("take_grad", _take_grad, _take_grad_ref))

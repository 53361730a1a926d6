"""Pooling over windows of an NHWC picture."""

import numpy as np

from tte.ir import Op, TensorType, Window, register, tensor_type
from tte.ops.rules import require, require_float, require_padding, require_pair, require_rank

Pair = tuple[int, int]
Padding = tuple[int, int, int, int]


def pooled_type(x: TensorType, pool_size: Pair, strides: Pair, padding: Padding) -> TensorType:
    """The result's type, whatever the elements are."""
    require_rank("x", x, 4)
    require_pair("pool_size", pool_size, 1)
    require_pair("strides", strides, 1)
    require_padding(padding)
    shape = []
    for d in (0, 1):
        # A window that saw only padding would have no maximum and no mean.
        require(padding[d] < pool_size[d], f"padding {padding} is not smaller than the window {pool_size}")
        size = x.shape[1 + d] + padding[d] + padding[d + 2]
        require(size >= pool_size[d], f"the window {pool_size} is larger than the padded input {x.shape[1:3]}")
        shape.append((size - pool_size[d]) // strides[d] + 1)
        last = (shape[-1] - 1) * strides[d] - padding[d]
        require(last < x.shape[1 + d], f"with padding {padding} the last window sees only padding")
    return x.with_shape((x.shape[0], *shape, x.shape[3]))


def windows(x: np.ndarray, pool_size: Pair, strides: Pair, padding: Padding, fill: float) -> list[np.ndarray]:
    """For every position in the window, in row-major order, the elements of x it meets: (N, OH, OW, C) each."""
    top, left, bottom, right = padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=fill)
    h = (padded.shape[1] - pool_size[0]) // strides[0] + 1
    w = (padded.shape[2] - pool_size[1]) // strides[1] + 1
    return [
        padded[:, i : i + (h - 1) * strides[0] + 1 : strides[0], j : j + (w - 1) * strides[1] + 1 : strides[1]]
        for i in range(pool_size[0])
        for j in range(pool_size[1])
    ]


def _scatter(parts: list[np.ndarray], size: Pair, pool_size: Pair, strides: Pair, padding: Padding) -> np.ndarray:
    """The adjoint of ``_windows``: adds every part to where it was taken from, and drops the padding."""
    top, left, bottom, right = padding
    n, h, w, c = parts[0].shape
    full = np.zeros((n, size[0] + top + bottom, size[1] + left + right, c), parts[0].dtype)
    for k, part in enumerate(parts):
        i, j = divmod(k, pool_size[1])
        rows = slice(i, i + (h - 1) * strides[0] + 1, strides[0])
        columns = slice(j, j + (w - 1) * strides[1] + 1, strides[1])
        full[:, rows, columns] += part
    return np.ascontiguousarray(full[:, top : top + size[0], left : left + size[1]])


def spreads_over(pool_size: Pair, strides: Pair) -> int:
    """How many windows an element lies in, at the most."""
    return -(-pool_size[0] // strides[0]) * -(-pool_size[1] // strides[1])


def _integers_of(g: TensorType, pool_size: Pair, strides: Pair) -> str:
    """int8 gradients add up to int16 where windows overlap."""
    windows = spreads_over(pool_size, strides) if g.dtype == "int8" else 1
    require(windows < 256, f"16 bits do not hold the sum of {windows} gradients")
    return "int16" if windows > 1 else g.dtype


def _gradient_of(g: TensorType, pooled: TensorType, input_size: Pair) -> TensorType:
    require(pooled.shape == g.shape, f"g {g.shape} is not the gradient of a pooling of {input_size}")
    return g.with_shape((g.shape[0], *input_size, g.shape[3]))


def _picture(g: TensorType, input_size: Pair) -> TensorType:
    require_rank("g", g, 4)
    require_pair("input_size", input_size, 1)
    return TensorType((g.shape[0], *input_size, g.shape[3]))


def _max_pool2d(
    x: TensorType, *, pool_size: Pair, strides: Pair = (1, 1), padding: Padding = (0, 0, 0, 0)
) -> TensorType:
    """y[n,i,j,c] = max of x over the window at (i*sh - top, j*sw - left); padding never wins. -> (N,OH,OW,C)"""
    _require_ordered(x)
    return pooled_type(x, pool_size, strides, padding)


def _require_ordered(x: TensorType) -> None:
    require(x.dtype in ("float32", "int8"), f"x must be float32 or int8, not {x.dtype}")


def _least(x: np.ndarray) -> float:
    """What padding holds, so that it never wins."""
    return -np.inf if x.dtype.kind == "f" else int(np.iinfo(x.dtype).min)


def _max_pool2d_ref(x, *, pool_size, strides, padding):  # type: ignore[no-untyped-def]
    return np.maximum.reduce(windows(x, pool_size, strides, padding, _least(x)))


def _max_pool2d_grad_rule(backward, dy, x, *, pool_size, strides, padding):  # type: ignore[no-untyped-def]
    window = {"pool_size": pool_size, "strides": strides, "padding": padding}
    index = backward.call("nn.max_pool2d_argmax", x, **window)
    return backward.call("nn.max_pool2d_grad", dy, index, **window, input_size=x.type.shape[1:3])


def pool_rows(x, *, pool_size, strides, padding, **_):  # type: ignore[no-untyped-def]
    return (Window(pool_size[0], strides[0], padding[0]),)


register(Op("nn.max_pool2d", _max_pool2d, _max_pool2d_ref, _max_pool2d_grad_rule, kind="anchor", rows=pool_rows))


def _max_pool2d_argmax(
    x: TensorType, *, pool_size: Pair, strides: Pair = (1, 1), padding: Padding = (0, 0, 0, 0)
) -> TensorType:
    """kh * KW + kw of the first maximum in each window: all that the gradient has to remember, in one byte mostly."""
    _require_ordered(x)
    pooled = pooled_type(x, pool_size, strides, padding)
    return TensorType(pooled.shape, _index_dtype(pool_size))


def _index_dtype(pool_size: Pair) -> str:
    return "uint8" if pool_size[0] * pool_size[1] <= 256 else "int16"


def _max_pool2d_argmax_ref(x, *, pool_size, strides, padding):  # type: ignore[no-untyped-def]
    wide = x if x.dtype.kind == "f" else x.astype(np.float32)  # padding must be less than every element
    index = np.argmax(np.stack(windows(wide, pool_size, strides, padding, -np.inf)), axis=0)
    return index.astype(_index_dtype(pool_size))


register(Op("nn.max_pool2d_argmax", _max_pool2d_argmax, _max_pool2d_argmax_ref))


def _max_pool2d_grad(
    g: TensorType,
    index: TensorType,
    *,
    pool_size: Pair,
    strides: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    input_size: Pair,
) -> TensorType:
    """Sends each g to the element that was the maximum: (N,OH,OW,C), index of nn.max_pool2d_argmax -> (N,H,W,C)

    g: float32, or int8, whose sums are int16 where windows overlap.
    """
    require(g.dtype in ("float32", "int8"), f"g must be float32 or int8, not {g.dtype}")
    pooled = pooled_type(_picture(g, input_size), pool_size, strides, padding)
    require(index.shape == g.shape and index.dtype == _index_dtype(pool_size), "index must come from max_pool2d_argmax")
    return TensorType(_gradient_of(g, pooled, input_size).shape, _integers_of(g, pool_size, strides))


def _max_pool2d_grad_ref(g, index, *, pool_size, strides, padding, input_size):  # type: ignore[no-untyped-def]
    wide = g.astype(_integers_of(tensor_type(g), pool_size, strides))
    parts = [np.where(index == k, wide, wide.dtype.type(0)) for k in range(pool_size[0] * pool_size[1])]
    return _scatter(parts, input_size, pool_size, strides, padding)


register(Op("nn.max_pool2d_grad", _max_pool2d_grad, _max_pool2d_grad_ref))


def _avg_pool2d(
    x: TensorType,
    *,
    pool_size: Pair,
    strides: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    count_include_pad: bool = False,
) -> TensorType:
    """Mean over each window, over all of it (count_include_pad) or over what lies inside. (N,H,W,C) -> (N,OH,OW,C)"""
    require_float(x=x)
    return pooled_type(x, pool_size, strides, padding)


def _counts(size: Pair, pool_size: Pair, strides: Pair, padding: Padding, count_include_pad: bool) -> np.ndarray:
    """How many elements each window averages: (1, OH, OW, 1)"""
    ones = np.ones((1, *size, 1))
    inside = np.add.reduce(windows(ones, pool_size, strides, padding, 0.0))
    return np.full_like(inside, pool_size[0] * pool_size[1]) if count_include_pad else inside


def _avg_pool2d_ref(x, *, pool_size, strides, padding, count_include_pad):  # type: ignore[no-untyped-def]
    counts = _counts(x.shape[1:3], pool_size, strides, padding, count_include_pad)
    return np.add.reduce(windows(x, pool_size, strides, padding, 0.0)) / counts.astype(x.dtype)


def _avg_pool2d_grad_rule(backward, dy, x, **attrs):  # type: ignore[no-untyped-def]
    return backward.call("nn.avg_pool2d_grad", dy, **attrs, input_size=x.type.shape[1:3])


register(Op("nn.avg_pool2d", _avg_pool2d, _avg_pool2d_ref, _avg_pool2d_grad_rule, kind="anchor", rows=pool_rows))


def _avg_pool2d_grad(
    g: TensorType,
    *,
    pool_size: Pair,
    strides: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    count_include_pad: bool = False,
    input_size: Pair,
) -> TensorType:
    """Spreads each g over its window: (N,OH,OW,C) -> (N,H,W,C)"""
    require_float(g=g)
    return _gradient_of(g, pooled_type(_picture(g, input_size), pool_size, strides, padding), input_size)


def _avg_pool2d_grad_ref(g, *, pool_size, strides, padding, count_include_pad, input_size):  # type: ignore[no-untyped-def]
    counts = _counts(input_size, pool_size, strides, padding, count_include_pad)
    share = g / counts.astype(g.dtype)
    return _scatter([share] * (pool_size[0] * pool_size[1]), input_size, pool_size, strides, padding)


register(Op("nn.avg_pool2d_grad", _avg_pool2d_grad, _avg_pool2d_grad_ref))


def _sum_pool2d_grad(
    g: TensorType, *, pool_size: Pair, strides: Pair = (1, 1), padding: Padding = (0, 0, 0, 0), input_size: Pair
) -> TensorType:
    """Sends each g to all of its window: int8 (N,OH,OW,C) -> (N,H,W,C), int8, or int16 where windows overlap"""
    require(g.dtype == "int8", f"g must be int8, not {g.dtype}")
    picture = _gradient_of(g, pooled_type(_picture(g, input_size), pool_size, strides, padding), input_size)
    return TensorType(picture.shape, _integers_of(g, pool_size, strides))


def _sum_pool2d_grad_ref(g, *, pool_size, strides, padding, input_size):  # type: ignore[no-untyped-def]
    wide = g.astype(_integers_of(tensor_type(g), pool_size, strides))
    return _scatter([wide] * (pool_size[0] * pool_size[1]), input_size, pool_size, strides, padding)


register(Op("qnn.sum_pool2d_grad", _sum_pool2d_grad, _sum_pool2d_grad_ref))


def _adaptive_avg_pool2d(x: TensorType, *, output_size: Pair) -> TensorType:
    """Mean over rows floor(i*H/OH) .. ceil((i+1)*H/OH) and columns alike. As torch's. (N,H,W,C) -> (N,OH,OW,C)"""
    require_rank("x", x, 4)
    require_float(x=x)
    require_pair("output_size", output_size, 1)
    return x.with_shape((x.shape[0], *output_size, x.shape[3]))


def _shares(size: int, parts: int) -> np.ndarray:
    """(parts, size): row i averages the elements of part i."""
    matrix = np.zeros((parts, size))
    for i in range(parts):
        start, stop = i * size // parts, -((i + 1) * size // -parts)
        matrix[i, start:stop] = 1.0 / (stop - start)
    return matrix


def _adaptive_avg_pool2d_ref(x, *, output_size):  # type: ignore[no-untyped-def]
    rows, columns = (_shares(x.shape[1 + d], output_size[d]).astype(x.dtype) for d in (0, 1))
    return np.einsum("ih,nhwc,jw->nijc", rows, x, columns, optimize=True)


def _adaptive_avg_pool2d_grad_rule(backward, dy, x, *, output_size):  # type: ignore[no-untyped-def]
    return backward.call("nn.adaptive_avg_pool2d_grad", dy, input_size=x.type.shape[1:3])


register(
    Op(
        "nn.adaptive_avg_pool2d",
        _adaptive_avg_pool2d,
        _adaptive_avg_pool2d_ref,
        _adaptive_avg_pool2d_grad_rule,
        kind="anchor",
    )
)


def _adaptive_avg_pool2d_grad(g: TensorType, *, input_size: Pair) -> TensorType:
    """Spreads each g over the part of the picture it averaged: (N,OH,OW,C) -> (N,H,W,C)"""
    require_float(g=g)
    return _picture(g, input_size)


def _adaptive_avg_pool2d_grad_ref(g, *, input_size):  # type: ignore[no-untyped-def]
    rows, columns = (_shares(input_size[d], g.shape[1 + d]).astype(g.dtype) for d in (0, 1))
    return np.einsum("ih,nijc,jw->nhwc", rows, g, columns, optimize=True)


register(Op("nn.adaptive_avg_pool2d_grad", _adaptive_avg_pool2d_grad, _adaptive_avg_pool2d_grad_ref))

"""Convolution, its transpose and its weight gradient: three operators that are closed under differentiation.

Activations are NHWC, weights OHWI (output channels, height, width, input channels of a group); padding is
(top, left, bottom, right). Formulas: Dumoulin and Visin, "A guide to convolution arithmetic" (arXiv:1603.07285).
"""

import numpy as np

from tte.ir import Op, TensorType, Window, register
from tte.ops.rules import (
    read_numbers,
    require,
    require_float,
    require_numbers,
    require_padding,
    require_pair,
    require_rank,
)

Pair = tuple[int, int]
Padding = tuple[int, int, int, int]


def _span(size: int, kernel: int, stride: int, before: int, after: int, dilation: int) -> int:
    """Output positions along one dimension."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def _require_geometry(strides: Pair, padding: Padding, dilation: Pair, groups: int) -> None:
    require_pair("strides", strides, 1)
    require_pair("dilation", dilation, 1)
    require_padding(padding)
    require(groups >= 1, f"groups must be at least 1, not {groups}")


def _conv2d(
    x: TensorType,
    w: TensorType,
    b: TensorType | None = None,
    *,
    strides: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> TensorType:
    """y[n,i,j,o] = b[o] + sum over kh, kw, c of x[n, i*sh + kh*dh - top, j*sw + kw*dw - left, c] * w[o,kh,kw,c].

    x: (N, H, W, C), w: (O, KH, KW, C / groups), b: (O,) -> (N, OH, OW, O). Depthwise: groups == C.
    As torch.nn.functional.conv2d, with padding on each side of its own.
    """
    require_float(x=x, w=w, b=b)
    return conv2d_type(x, w, b, strides=strides, padding=padding, dilation=dilation, groups=groups)


def conv2d_type(
    x: TensorType,
    w: TensorType,
    b: TensorType | None,
    *,
    strides: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
) -> TensorType:
    """The result's type, whatever the elements are."""
    require_rank("x", x, 4)
    require_rank("w", w, 4)
    _require_geometry(strides, padding, dilation, groups)
    o, kh, kw, c = w.shape
    require(x.shape[3] == c * groups, f"x has {x.shape[3]} channels, w expects {c} x {groups} groups")
    require(o % groups == 0, f"{o} output channels do not divide into {groups} groups")
    require(b is None or b.shape == (o,), f"the bias must have shape ({o},), not {b.shape if b else ()}")
    h = _span(x.shape[1], kh, strides[0], padding[0], padding[2], dilation[0])
    v = _span(x.shape[2], kw, strides[1], padding[1], padding[3], dilation[1])
    require(h >= 1 and v >= 1, f"the kernel {kh} x {kw} is larger than the padded input {x.shape[1]} x {x.shape[2]}")
    return x.with_shape((x.shape[0], h, v, o))


def _pad(x: np.ndarray, padding: Padding) -> np.ndarray:
    top, left, bottom, right = padding
    return np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))


def _tap(kh: int, kw: int, h: int, w: int, strides: Pair, dilation: Pair) -> tuple[slice, slice, slice]:
    """The elements of a padded input that tap (kh, kw) meets at the h x w output positions."""
    rows = slice(kh * dilation[0], kh * dilation[0] + (h - 1) * strides[0] + 1, strides[0])
    columns = slice(kw * dilation[1], kw * dilation[1] + (w - 1) * strides[1] + 1, strides[1])
    return slice(None), rows, columns


def conv2d_ref(x, w, b=None, *, strides, padding, dilation, groups):  # type: ignore[no-untyped-def]
    o, kh, kw, c = w.shape
    h = _span(x.shape[1], kh, strides[0], padding[0], padding[2], dilation[0])
    v = _span(x.shape[2], kw, strides[1], padding[1], padding[3], dilation[1])
    padded = _pad(x, padding)
    y = np.zeros((x.shape[0], h, v, groups, o // groups), x.dtype)
    for i in range(kh):
        for j in range(kw):
            taps = padded[_tap(i, j, h, v, strides, dilation)].reshape(x.shape[0], h, v, groups, c)
            y += np.einsum("nhvgc,goc->nhvgo", taps, w[:, i, j].reshape(groups, o // groups, c), optimize=True)
    y = y.reshape(x.shape[0], h, v, o)
    return y if b is None else y + b


def _conv2d_grad(backward, dy, x, w, b=None, **geometry):  # type: ignore[no-untyped-def]
    dx, dw, db = conv2d_gradients(backward, dy, x, w, b, **geometry)
    return (dx, dw) if b is None else (dx, dw, db)


def conv2d_gradients(backward, dy, x, w, b, *, strides, padding, dilation, groups, zero_point=0):  # type: ignore[no-untyped-def]
    """Of x, w and b, each None unless it is wanted; zero_point: what stands for 0 in an integer x."""
    geometry = {"strides": strides, "padding": padding, "dilation": dilation, "groups": groups}
    dx = dw = None
    if backward.wants(0):
        extra = tuple(
            x.type.shape[1 + d]
            - _transposed_span(dy.type.shape[1 + d], w.type.shape[1 + d], strides[d], padding[d::2], dilation[d])
            for d in (0, 1)
        )
        dx = backward.call("nn.conv2d_transpose", dy, w, **geometry, output_padding=extra)
    if backward.wants(1):
        dw = _weight_gradient(backward, x, dy, w, geometry | {"zero_point": zero_point})
    db = backward.call("sum", dy, axis=(0, 1, 2)) if b is not None and backward.wants(2) else None
    return dx, dw, db


def _weight_gradient(backward, x, dy, w, geometry):  # type: ignore[no-untyped-def]
    """dL/dw, or only the part of it that is wanted: input channels (axis 3), or the filters of a depthwise (axis 0)."""
    part = backward.wanted(1)
    groups = geometry["groups"]
    axis = getattr(part, "axis", None)
    if axis == 3 and groups == 1:
        x = _channels(backward, x, part.start, part.stop)
    elif axis == 0 and groups == x.type.shape[3] and w.type.shape[0] == groups:
        x = _channels(backward, x, part.start, part.stop)
        if part.start:
            dy = _channels(backward, dy, part.start, part.stop)
        geometry = geometry | {"groups": part.stop - part.start, "out_channels": part.stop - part.start}
    return backward.call("nn.conv2d_weight_grad", x, dy, kernel_size=w.type.shape[1:3], **geometry)


def _channels(backward, x, start, stop):  # type: ignore[no-untyped-def]
    n, h, w, _ = x.type.shape
    return backward.call("slice", x, begin=(0, 0, 0, start), end=(n, h, w, stop), strides=(1, 1, 1, 1))


def conv2d_macs(x, w, b=None, *, strides, padding, dilation, groups):  # type: ignore[no-untyped-def]
    y = conv2d_type(x, w, None, strides=strides, padding=padding, dilation=dilation, groups=groups)
    return y.size * w.size // w.shape[0]


def conv2d_rows(x, w, *b, strides, padding, dilation, **_):  # type: ignore[no-untyped-def]
    return Window((w.shape[1] - 1) * dilation[0] + 1, strides[0], padding[0]), None, *(None for _ in b)


def conv2d_axes(x, w, *b, groups, **_):  # type: ignore[no-untyped-def]
    if groups == 1:
        return "...i", "o..i", *("o" for _ in b), "...o"
    if groups == x.shape[3] == w.shape[0]:
        return "...c", "c...", *("c" for _ in b), "...c"
    return "....", "....", *("." for _ in b), "...."


register(
    Op(
        "nn.conv2d",
        _conv2d,
        conv2d_ref,
        _conv2d_grad,
        kind="anchor",
        macs=conv2d_macs,
        rows=conv2d_rows,
        axes=conv2d_axes,
    )
)


def _transposed_span(size: int, kernel: int, stride: int, padding: tuple[int, ...], dilation: int) -> int:
    """Output positions of a transposed convolution along one dimension, without output padding."""
    return (size - 1) * stride - sum(padding) + dilation * (kernel - 1) + 1


def _conv2d_transpose(
    x: TensorType,
    w: TensorType,
    b: TensorType | None = None,
    *,
    strides: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    output_padding: Pair = (0, 0),
) -> TensorType:
    """The input gradient of nn.conv2d with the same w: y[n, i*sh + kh*dh - top, ..., c] += x[n,i,j,o] * w[o,kh,kw,c].

    x: (N, H, W, C), w: (C, KH, KW, O / groups), b: (O,) -> (N, OH, OW, O), OH = (H-1)*sh - top - bottom + dh*(KH-1) + 1
    + output_padding. As torch.nn.functional.conv_transpose2d; output_padding may exceed the stride here, because
    a convolution may leave any number of input rows unread. w may be stored integers (see ``read_numbers``). Sums begin
    with b, which may also have the shape of the result.
    """
    require_float(x=x, b=b)
    require_numbers(w=w)
    return conv2d_transpose_type(
        x, w, b, strides=strides, padding=padding, dilation=dilation, groups=groups, output_padding=output_padding
    )


def conv2d_transpose_type(
    x: TensorType,
    w: TensorType,
    b: TensorType | None,
    *,
    strides: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    output_padding: Pair,
) -> TensorType:
    """The result's type, whatever the elements are."""
    require_rank("x", x, 4)
    require_rank("w", w, 4)
    _require_geometry(strides, padding, dilation, groups)
    require_pair("output_padding", output_padding, 0)
    c, kh, kw, o = w.shape
    require(x.shape[3] == c, f"x has {x.shape[3]} channels, w expects {c}")
    require(c % groups == 0, f"{c} channels do not divide into {groups} groups")
    h = _transposed_span(x.shape[1], kh, strides[0], padding[0::2], dilation[0]) + output_padding[0]
    v = _transposed_span(x.shape[2], kw, strides[1], padding[1::2], dilation[1]) + output_padding[1]
    require(h >= 1 and v >= 1, f"the padding {padding} leaves nothing of the output")
    y = x.with_shape((x.shape[0], h, v, o * groups))
    require(b is None or b.shape in (y.shape[3:], y.shape), f"the bias must have shape {y.shape[3:]} or {y.shape}")
    return y


def conv2d_transpose_ref(x, w, b=None, *, strides, padding, dilation, groups, output_padding):  # type: ignore[no-untyped-def]
    w = read_numbers(w, x.dtype)
    c, kh, kw, o = w.shape
    n, h, v, _ = x.shape
    top, left, bottom, right = padding
    height = _transposed_span(h, kh, strides[0], (0, 0), dilation[0])
    width = _transposed_span(v, kw, strides[1], (0, 0), dilation[1])
    rows = height - top - bottom + output_padding[0]
    columns = width - left - right + output_padding[1]
    full = np.zeros((n, max(height, top + rows), max(width, left + columns), o * groups), x.dtype)
    grouped = x.reshape(n, h, v, groups, c // groups)
    for i in range(kh):
        for j in range(kw):
            part = np.einsum("nhvgc,gco->nhvgo", grouped, w[:, i, j].reshape(groups, c // groups, o), optimize=True)
            full[_tap(i, j, h, v, strides, dilation)] += part.reshape(n, h, v, o * groups)
    y = np.ascontiguousarray(full[:, top : top + rows, left : left + columns])
    return y if b is None else y + b


def _conv2d_transpose_grad(backward, dy, x, w, b=None, *, strides, padding, dilation, groups, output_padding):  # type: ignore[no-untyped-def]
    geometry = {"strides": strides, "padding": padding, "dilation": dilation, "groups": groups}
    dx = dw = None
    if backward.wants(0) or backward.wants(1):
        seen = _crop(backward, dy, x, w, geometry)
        if backward.wants(0):
            dx = backward.call("nn.conv2d", seen, w, **geometry)
        if backward.wants(1):
            kernel = w.type.shape[1:3]
            dw = backward.call("nn.conv2d_weight_grad", seen, x, kernel_size=kernel, **geometry)
    db = None
    if b is not None and backward.wants(2):
        db = dy if b.type == dy.type else backward.call("sum", dy, axis=(0, 1, 2))
    return (dx, dw) if b is None else (dx, dw, db)


def _crop(backward, dy, x, w, geometry):  # type: ignore[no-untyped-def]
    """dy without the rows and columns that only output_padding made: a convolution of the rest gives x's shape."""
    n, h, v, c = dy.type.shape
    ends = []
    for d, size in ((0, h), (1, v)):
        stride, dilation = geometry["strides"][d], geometry["dilation"][d]
        exact = _transposed_span(x.type.shape[1 + d], w.type.shape[1 + d], stride, geometry["padding"][d::2], dilation)
        # Up to stride - 1 more rows make no further output position.
        ends.append(size if size - exact < stride else exact)
    if ends == [h, v]:
        return dy
    return backward.call("slice", dy, begin=(0, 0, 0, 0), end=(n, *ends, c), strides=(1, 1, 1, 1))


def conv2d_transpose_macs(x, w, b=None, **attrs):  # type: ignore[no-untyped-def]
    return x.size * w.size // w.shape[0]


def conv2d_transpose_rows(x, w, *b, strides, padding, dilation, **_):  # type: ignore[no-untyped-def]
    size = (w.shape[1] - 1) * dilation[0] + 1
    starts = (Window(1, 1, 0) if v.rank == 4 else None for v in b)
    return Window(size, 1, size - 1 - padding[0], strides[0]), None, *starts


def conv2d_transpose_axes(x, w, *b, groups, **_):  # type: ignore[no-untyped-def]
    if groups == 1:
        letters = ["...i", "i..o", "...o"]
    elif groups == w.shape[0] and w.shape[3] == 1:
        letters = ["...c", "c...", "...c"]
    else:
        letters = ["....", "....", "...."]
    starts = (letters[2][-v.rank :] for v in b)
    return *letters[:2], *starts, letters[2]


register(
    Op(
        "nn.conv2d_transpose",
        _conv2d_transpose,
        conv2d_transpose_ref,
        _conv2d_transpose_grad,
        kind="anchor",
        inplace=(2,),
        rows=conv2d_transpose_rows,
        columns=True,
        axes=conv2d_transpose_axes,
        start=2,
        macs=conv2d_transpose_macs,
    )
)


def _conv2d_weight_grad(
    x: TensorType,
    g: TensorType,
    *,
    kernel_size: Pair,
    strides: Pair = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    zero_point: int = 0,
    out_channels: int = 0,
) -> TensorType:
    """The weight gradient of nn.conv2d: y[o,kh,kw,c] = sum over i, j of x[i*sh + kh*dh - top, ..., c] * g[i,j,o].

    x: (N, H, W, C), g: (N, OH, OW, O) -> (O, KH, KW, C / groups). An int8 x counts from zero_point. With out_channels,
    only the first so many channels of g are read: O is that.
    """
    require_float(g=g)
    require_numbers(x=x)
    return conv2d_weight_grad_type(
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


def conv2d_weight_grad_type(
    x: TensorType,
    g: TensorType,
    *,
    kernel_size: Pair,
    strides: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
    zero_point: int,
    out_channels: int,
) -> TensorType:
    """The result's type, whatever the elements are."""
    require_rank("x", x, 4)
    require_rank("g", g, 4)
    require(zero_point == 0 or x.dtype == "int8", "a zero point belongs to integers")
    require_pair("kernel_size", kernel_size, 1)
    _require_geometry(strides, padding, dilation, groups)
    for d in (0, 1):
        span = _span(x.shape[1 + d], kernel_size[d], strides[d], padding[d], padding[d + 2], dilation[d])
        require(span == g.shape[1 + d], f"g {g.shape} is not the gradient of this convolution of x {x.shape}")
    require(0 <= out_channels <= g.shape[3], f"out_channels={out_channels} of {g.shape[3]} channels")
    o = out_channels or g.shape[3]
    fits = x.shape[3] % groups == 0 and o % groups == 0
    require(fits, f"{x.shape[3]} or {o} channels do not divide into {groups} groups")
    return g.with_shape((o, *kernel_size, x.shape[3] // groups))


def conv2d_weight_grad_ref(x, g, *, kernel_size, strides, padding, dilation, groups, zero_point, out_channels):  # type: ignore[no-untyped-def]
    x = read_numbers(x, g.dtype, zero_point)
    g = g[..., : out_channels or g.shape[3]]
    n, h, v, o = g.shape
    c = x.shape[3] // groups
    padded = _pad(x, padding)
    y = np.empty((o, *kernel_size, c), x.dtype)
    grouped = g.reshape(n, h, v, groups, o // groups)
    for i in range(kernel_size[0]):
        for j in range(kernel_size[1]):
            taps = padded[_tap(i, j, h, v, strides, dilation)].reshape(n, h, v, groups, c)
            y[:, i, j] = np.einsum("nhvgc,nhvgo->goc", taps, grouped, optimize=True).reshape(o, c)
    return y


def conv2d_weight_grad_macs(x, g, *, kernel_size, groups, out_channels, **attrs):  # type: ignore[no-untyped-def]
    _, h, w, o = g.shape
    return h * w * (out_channels or o) * kernel_size[0] * kernel_size[1] * x.shape[3] // groups


def conv2d_weight_grad_rows(x, g, *, kernel_size, strides, padding, dilation, **_):  # type: ignore[no-untyped-def]
    return Window((kernel_size[0] - 1) * dilation[0] + 1, strides[0], padding[0]), Window(1, 1, 0)


def conv2d_weight_grad_axes(x, g, *, groups, out_channels, **_):  # type: ignore[no-untyped-def]
    if groups == 1:
        return "...i", "...o", "o..i"
    if groups == x.shape[3] == (out_channels or g.shape[3]):
        return "...c", "...c", "c..."
    return "....", "....", "...."


register(
    Op(
        "nn.conv2d_weight_grad",
        _conv2d_weight_grad,
        conv2d_weight_grad_ref,
        kind="anchor",
        macs=conv2d_weight_grad_macs,
        rows=conv2d_weight_grad_rows,
        columns=True,
        along=1,
        axes=conv2d_weight_grad_axes,
    )
)

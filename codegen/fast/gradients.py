"""Gradients of convolutions with respect to their input as products of matrices of floats."""

import math
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from tte.codegen.fast.form import assembly, lay_out, make_form
from tte.codegen.kernel import Kernel

WIDTH = 8  # channels at a time


def convolve_back(kernel: Kernel, context: dict[str, Any], room: int) -> Kernel | None:
    """Two pixels times eight channels at a time: (OH, OW, O) float32 by (O, KH, KW, C) of any type."""
    out, (x, w, *_) = context["out"], context["ins"]
    attrs, tail = context["attrs"], context["tail"]
    _, oh, ow, depth = x["shape"]
    _, height, width, channels = out["shape"]
    if attrs["groups"] > 1 or x["dtype"] != "float32" or context["acc"] != "float" or _reads_result(tail):
        return None
    taps = w["shape"][1] * w["shape"][2]
    flat = taps == 1 and not any(attrs["padding"]) and attrs["strides"] == [1, 1] and (oh, ow) == (height, width)
    row = 4 * min(WIDTH, channels)

    def place(chunk: Sequence[int]) -> dict[str, int]:
        made = oh * ow * chunk[1] * 4 if x["steps"] else 0
        return lay_out({"panel": chunk[0] * chunk[1] * row, "lines": 0 if flat else taps * 8, "made": made})

    chunks = [(t, depth) for t in range(taps, 0, -1)]
    chunks += [(1, -(-depth // (4 * n)) * 4) for n in range(2, depth // 8 + 1)]
    chunk = next((c for c in chunks if place(c)["end"] <= room), None)
    if chunk is None:
        return None
    at = place(chunk)
    mask, scale = find_finish(tail, channels)
    columns = [(0, 1, 1)] if flat else _find_columns(width, ow, w["shape"][2], attrs)
    more = {"chunk": chunk, "at": at, "flat": flat, "columns": columns, "mask": mask, "scale": scale}
    parts = [assembly("fpu/widen", {}, WIDEN)]
    parts += [dot(n) for n in (WIDTH if channels >= WIDTH else 0, channels % WIDTH) if n]
    return make_form(kernel, context | more, "fpu/conv2d_transpose", at["end"], *parts)


def convolve_depthwise_back(kernel: Kernel, context: dict[str, Any], room: int) -> Kernel | None:
    """Some channels of a pixel at a time: (OH, OW, C) float32 by (C, KH, KW) of any type."""
    out, (x, w, *_) = context["out"], context["ins"]
    attrs, tail = context["attrs"], context["tail"]
    channels, *kernel_size, multiplier = w["shape"]
    sums = context["tile"] and context["tile"]["sum"]
    if (
        multiplier > 1
        or x["steps"]
        or x["dtype"] != "float32"
        or context["acc"] != "float"
        or _reads_result(tail)
        or sums
    ):
        return None
    blocks = _find_blocks(channels)
    row = kernel_size[1] * max(n for _, _, n in blocks) * 4  # of the kernel, as floats
    height = next((h for n in range(1, kernel_size[0] + 1) if (h := -(-kernel_size[0] // n)) * row <= room), None)
    if height is None:
        return None
    at = lay_out({"panel": height * row})
    mask, scale = find_finish(tail, channels)
    spread = attrs["strides"][1] // math.gcd(attrs["strides"][1], attrs["dilation"][1])  # from tap to tap that reaches
    columns = _find_columns(out["shape"][2], x["shape"][2], kernel_size[1], attrs)
    more = {"at": at, "columns": columns, "mask": mask, "scale": scale, "blocks": blocks, "spread": spread}
    more["height"] = height
    parts = [assembly("fpu/depthwise", {"n": n, "spread": spread > 1}, ROWS) for _, _, n in blocks]
    return make_form(kernel, context | more, "fpu/depthwise_conv2d_transpose", at["end"], *parts)


def differentiate_weights(kernel: Kernel, context: dict[str, Any], room: int) -> Kernel | None:
    """Two input channels times eight output channels at a time: (H, W, C) of any type by (OH, OW, O) float32."""
    x, g = context["ins"]
    outputs, *_, inputs = context["out"]["shape"]
    if (
        context["attrs"]["groups"] > 1
        or g["steps"]
        or x["steps"]
        or context["acc"] != "float"
        or context["tile"]
        and context["tile"]["sum"]
    ):
        return None
    _, oh, ow, _ = g["shape"]
    pair = min(inputs, 2)

    def place(height: int) -> dict[str, int]:
        panel = height * ow * pair * 4 if x["dtype"] != "float32" else 0
        return lay_out({"sums": outputs * pair * 4, "lines": height * 8, "panel": panel})

    height = next((h for h in (-(-oh // n) for n in range(1, oh + 1)) if place(h)["end"] <= room), None)
    if height is None:
        return None
    parts = [
        assembly("fpu/outer", {"n": n, "rows": pair}, ROWS)
        for n in (WIDTH if outputs >= WIDTH else 0, outputs % WIDTH)
        if n
    ]
    at = place(height)
    return make_form(kernel, context | {"height": height, "at": at}, "fpu/conv2d_weight_grad", at["end"], *parts)


def sum_channels(kernel: Kernel, context: dict[str, Any], room: int) -> Kernel | None:
    """Sums over all pixels of (H, W, C) float32, some channels at a time."""
    (x,) = context["ins"]
    if context["attrs"]["axis"] != [0, 1, 2] or len(x["shape"]) != 4 or context["attrs"]["keepdims"]:
        return None
    if x["steps"] or x["dtype"] != "float32" or context["tile"] and context["tile"]["sum"]:
        return None
    blocks = _find_blocks(x["shape"][3])
    parts = [assembly("fpu/columns", {"n": n}, COLUMNS) for _, _, n in blocks]
    return make_form(kernel, context | {"blocks": blocks}, "fpu/sum", 0, *parts)


def _find_blocks(channels: int) -> list[tuple[int, int, int]]:
    """Channels in blocks of some at a time: the first, the end, how many at a time."""
    wide = 16 if channels % 16 == 0 else WIDTH
    whole = channels // wide * wide
    return [(first, end, n) for first, end, n in ((0, whole, wide), (whole, channels, channels % wide)) if first < end]


COLUMNS = (("const float *", "from"), ("float *", "to"), ("int ", "rows"), ("int ", "distance"))
ROWS = (("void *", "rows"),)
WIDEN = (("const int8_t *", "from"), ("float *", "to"), ("int ", "rows"), ("int ", "distance"))


def dot(columns: int) -> Kernel:
    return assembly("fpu/dot", {"n": columns}, ROWS)


def find_finish(tail: Sequence[dict[str, Any]], channels: int) -> tuple[int | None, int | None]:
    """Which steps of the tail are a mask, of whole bytes, and a factor for each channel, if they are all there is."""
    ops = [step["op"] for step in tail]
    if ops not in (["nn_apply_mask"], ["multiply"], ["nn_apply_mask", "multiply"]):
        return None, None
    mask, scale = None, None
    previous = "acc"
    for k, step in enumerate(tail):
        first, second = step["operands"]
        if first.get("c") != previous or first["kind"] != "register" or second["kind"] not in ("flat", "strided"):
            return None, None
        previous = step["name"]
        if step["op"] == "multiply":
            if second["dtype"] != "float32" or second.get("strides", [])[-1:] not in ([1], [0]):
                return None, None
            if second["kind"] == "flat" or second["strides"] != [0, 0, 0, 1]:
                return None, None
            scale = k
        else:
            numbers = [int(n) for n in re.findall(r"- (\d+)", second["from"])]
            places = [*numbers, *second["strides"][1:3], channels]
            if step["attrs"]["alpha"] != 0 or second["dtype"] != "bit" or any(n % 8 for n in places):
                return None, None
            if second["strides"][1] % second["strides"][2] or second["strides"][3] != 1:
                return None, None
            mask = k
    return mask, scale


def _reads_result(tail: Sequence[dict[str, Any]]) -> bool:
    return any(o.get("c", "").strip("(").split(" ")[0] == "y0" for step in tail for o in step["operands"])


def _find_columns(width: int, reach: int, size: int, attrs: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Columns of the result that the same taps reach: the first, and the distance and number of them."""
    stride, dilation, left = attrs["strides"][1], attrs["dilation"][1], attrs["padding"][1]

    def reached(column: int) -> tuple[int, ...]:
        at = [(t, column + left - t * dilation) for t in range(size)]
        return tuple(t for t, position in at if position % stride == 0 and 0 <= position < reach * stride)

    result = []
    for phase in range(min(stride, width)):
        for _, group in groupby(range(phase, width, stride), reached):
            columns = list(group)
            result.append((columns[0], stride, len(columns)))
    return result

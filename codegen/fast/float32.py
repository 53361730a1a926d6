"""Convolutions of floats and their gradients as products of matrices."""

import math
import re
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

from tte.codegen.fast.form import assembly, form, lay_out, make_form
from tte.codegen.kernel import Kernel

WIDTH = 8  # channels at a time
UNROLL = (4, 16)  # a knob: products of a sum in a loop
WIDE = (16,)  # a knob: channels at a time at the most


@form(unroll=UNROLL)
def convolve_floats(kernel: Kernel, context: dict[str, Any], room: int, unroll: int) -> Kernel | None:
    """Two pixels times eight channels at a time: (H, W, I) float32 by (O, KH, KW, I) of any type.

    Knob: see ``UNROLL``.
    """
    out, (x, w, *_) = context["out"], context["ins"]
    attrs, tail = context["attrs"], context["tail"]
    channels, *kernel_size, depth = w["shape"]
    if attrs["groups"] > 1 or x["steps"] or not _is_float(context) or (len(w["segments"]) > 1 and w["axis"] != 3):
        return None
    aside = _reads_result(tail)  # then the sums cannot wait in the result
    flat = _is_flat(context) and not aside
    chunks = _find_chunks(kernel_size[0] * kernel_size[1], depth)[: 1 if aside else None]
    place = partial(_place, min(WIDTH, channels), aside=out["shape"][2] if aside else 0)
    if not (chunk := next((c for c in chunks if place(c)["end"] <= room), None)):
        return None
    mask, scale = _find_finish(context, channels)
    more: dict[str, Any] = {
        "chunk": chunk,
        "at": place(chunk),
        "flat": flat,
        "aside": aside,
        "mask": mask,
        "scale": scale,
    }
    more["merged"] = attrs["dilation"][1] == 1 and chunk[1] == depth and chunk[0] % kernel_size[1] == 0
    more["spans"] = _find_columns(out["shape"][2], x["shape"][2], kernel_size[1], attrs)
    return make_form(kernel, context | more, "fpu/conv2d", more["at"]["end"], *_dots(channels, unroll))


@form(small={"wide": 8}, wide=WIDE)
def convolve_depthwise_floats(kernel: Kernel, context: dict[str, Any], room: int, wide: int) -> Kernel | None:
    """Some channels of a pixel at a time: (H, W, C) float32 by (C, KH, KW) of any type.

    Knob: see ``WIDE``.
    """
    out, (x, w, *_) = context["out"], context["ins"]
    attrs, tail = context["attrs"], context["tail"]
    channels, *kernel_size, _ = w["shape"]
    if channels == 1 or channels != x["shape"][3] or x["steps"] or not _is_float(context) or _reads_result(tail):
        return None
    blocks = _find_blocks(channels, wide)
    at = lay_out({"panel": kernel_size[0] * kernel_size[1] * max(n for _, _, n in blocks) * 4})
    if at["end"] > room:
        return None
    mask, scale = _find_finish(context, channels)
    more: dict[str, Any] = {"at": at, "mask": mask, "scale": scale, "blocks": blocks}
    more["spans"] = _find_columns(out["shape"][2], x["shape"][2], kernel_size[1], attrs)
    parts = [assembly("fpu/depthwise", {"n": n, "spread": False, "apart": 0}, ROWS) for _, _, n in blocks]
    return make_form(kernel, context | more, "fpu/depthwise_conv2d", at["end"], *parts)


def _is_float(context: dict[str, Any]) -> bool:
    """Whether sums, what they begin with and the result are floats; weights may be anything. Rows have to be whole."""
    x, _, *begin = context["ins"]
    return (
        context["columns"] is None
        and context["acc"] == "float"
        and context["out"]["dtype"] == "float32"
        and all(operand["dtype"] == "float32" for operand in (x, *begin))
    )


def _is_flat(context: dict[str, Any]) -> bool:
    """Whether each pixel is made of the one at its place: a window of one."""
    x, w, *_ = context["ins"]
    same = x["shape"][:3] == context["out"]["shape"][:3] and not any(context["attrs"]["padding"])
    return same and w["shape"][1:3] == [1, 1]


def _find_chunks(taps: int, depth: int) -> list[tuple[int, int]]:
    """How many taps, and products for each, may be in a panel: all, some taps, or a part of one."""
    return [(t, depth) for t in range(taps, 0, -1)] + [
        (1, -(-depth // (4 * n)) * 4) for n in range(2, -(-depth // 8) + 1)
    ]


def _place(columns: int, chunk: tuple[int, int], made: int = 0, aside: int = 0) -> dict[str, int]:
    """made: how many rows are made to be read; aside: of how many rows the sums are kept apart."""
    taps, depth = chunk
    sizes = {"panel": taps * depth * columns, "lines": taps * 2, "made": made * depth, "sums": aside * columns}
    return lay_out({name: 4 * size for name, size in sizes.items()})


def _dots(channels: int, unroll: int) -> list[Kernel]:
    return [assembly("fpu/dot", {"n": n, "unroll": unroll}, ROWS) for n in _find_widths(channels)]


def _find_widths(channels: int, width: int = WIDTH) -> list[int]:
    """How many channels at a time, and how many are left."""
    return [n for n in (width if channels >= width else 0, channels % width) if n]


@form(unroll=UNROLL)
def convolve_back(kernel: Kernel, context: dict[str, Any], room: int, unroll: int) -> Kernel | None:
    """Two pixels times eight channels at a time: (OH, OW, O) float32 by (O, KH, KW, C) of any type.

    Knob: see ``UNROLL``.
    """
    out, (x, w, *_) = context["out"], context["ins"]
    attrs, tail = context["attrs"], context["tail"]
    _, oh, ow, depth = x["shape"]
    *_, width, channels = out["shape"]
    if attrs["groups"] > 1 or not _is_float(context) or _reads_result(tail):
        return None
    taps = w["shape"][1] * w["shape"][2]
    if context["rows"] is not None:
        return None
    if taps * depth == 1 and not (context["tile"] and context["tile"]["sum"]):
        return None  # a product alone is no sum
    flat = _is_flat(context)
    place = partial(_place, min(WIDTH, channels), made=oh * ow if x["steps"] else 0)
    if not (chunk := next((c for c in _find_chunks(taps, depth) if place(c)["end"] <= room), None)):
        return None
    at = place(chunk)
    mask, scale = _find_finish(context, channels)
    spans = [span[:3] for span in _find_spans_back(width, ow, w["shape"][2], attrs, 1)]
    more = {"chunk": chunk, "at": at, "flat": flat, "spans": spans, "mask": mask, "scale": scale}
    parts = [WIDEN, *_dots(channels, unroll)]
    more["made"] = _find_source(x, chunk[1]) if x["steps"] else None
    if more["made"]:
        parts += _dots(WIDTH, unroll)
    return make_form(kernel, context | more, "fpu/conv2d_transpose", at["end"], *parts)


FEW = 4  # products of a sum, whose weights stay in registers


@form()
def update_pixels(kernel: Kernel, context: dict[str, Any], room: int) -> Kernel | None:
    """Sums of a tile that go on where they are: (H, W, O) float32 by (O, 1, 1, C) of any type, O <= 4."""
    attrs, (x, w, *_) = context["attrs"], context["ins"]
    depth, *_, channels = w["shape"]
    sums = context["tile"] and context["tile"]["sum"]
    if not sums or attrs["groups"] > 1 or depth > FEW or x["steps"] or x["strides"][2] != depth:
        return None
    if context["rows"] is not None or not _is_float(context) or _reads_result(context["tail"]):
        return None
    if not _is_flat(context):
        return None
    blocks = _find_blocks(channels, 8 if depth <= 2 else 4)
    parts = [assembly("fpu/rank_update", {"k": depth, "n": n}, UPDATE) for _, _, n in blocks]
    return make_form(kernel, context | {"blocks": blocks}, "fpu/narrow_transpose", 0, *parts)


@form(small={"wide": 8}, wide=WIDE)
def convolve_depthwise_back(kernel: Kernel, context: dict[str, Any], room: int, wide: int) -> Kernel | None:
    """Some channels of a pixel at a time: (OH, OW, C) float32 by (C, KH, KW) of any type.

    Knob: see ``WIDE``.
    """
    channels, *kernel_size, _ = context["ins"][1]["shape"]
    if channels == 1 or not _is_depthwise_back(context):
        return None
    blocks = _find_blocks(channels, wide)
    row = kernel_size[1] * max(n for _, _, n in blocks) * 4  # of the kernel, as floats
    height = next((h for n in range(1, kernel_size[0] + 1) if (h := -(-kernel_size[0] // n)) * row <= room), None)
    if height is None:
        return None
    at = lay_out({"panel": height * row})
    mask, scale = _find_finish(context, channels)
    more = {"at": at, "mask": mask, "scale": scale, "blocks": blocks, "height": height} | _follow_back(context)
    parts = [assembly("fpu/depthwise", {"n": n, "spread": more["spread"][1] > 1, "apart": 0}, ROWS) for *_, n in blocks]
    return make_form(kernel, context | more, "fpu/depthwise_conv2d_transpose", at["end"], *parts)


@form()
def convolve_columns_back(kernel: Kernel, context: dict[str, Any], room: int) -> Kernel | None:
    """Few channels of some columns at a time: (OH, OW, C) float32 by (C, KH, KW) of any type, C <= 4."""
    out, (x, w, *begin) = context["out"], context["ins"]
    channels, apart = w["shape"][0], context["attrs"]["strides"][1]
    if channels > 4 or begin or len(w["segments"]) > 1 or not _is_depthwise_back(context):
        return None
    if (channels > 1 and apart > 1) or not x["strides"][2] == out["strides"][2] == channels:
        return None  # there are too few columns of a kind
    at = lay_out({"panel": math.prod(w["shape"]) * 4})
    if at["end"] > room:
        return None
    most = min(16 // channels, 1 + 255 // apart)  # registers, and words that a store reaches
    more = _follow_back(context)
    pieces = [
        (first + i * apart, apart, min(most, count - i), tap, taps, at + i)
        for first, _, count, tap, taps, at in more["spans"]
        for i in range(0, count, most)
    ]
    more["spans"] = pieces
    widths = sorted({count for _, _, count, *_ in pieces})
    own = {"spread": more["spread"][1] > 1, "apart": apart, "channels": channels}
    parts = [assembly("fpu/depthwise", own | {"n": n * channels}, ROWS) for n in widths]
    more |= {"at": at, "widths": widths}
    return make_form(kernel, context | more, "fpu/columns_transpose", at["end"], *parts)


def _is_depthwise_back(context: dict[str, Any]) -> bool:
    """Whether it is a depthwise convolution's whole input gradient of floats."""
    x, w, *_ = context["ins"]
    sums = context["tile"] and context["tile"]["sum"]
    if context["rows"] is not None or w["shape"][3] > 1 or x["steps"] or sums:
        return False
    return _is_float(context) and not _reads_result(context["tail"])


def _follow_back(context: dict[str, Any]) -> dict[str, Any]:
    """Which columns the same taps reach, and rows; how far it is from tap to tap that reaches a row, and a column."""
    attrs, (x, w, *_) = context["attrs"], context["ins"]
    _, height, width, _ = context["out"]["shape"]
    (_, oh, ow, _), (_, *size, _) = x["shape"], w["shape"]
    return {
        "spans": _find_spans_back(width, ow, size[1], attrs, 1),
        "row_spans": _find_spans_back(height, oh, size[0], attrs, 0),
        "spread": [s // math.gcd(s, d) for s, d in zip(attrs["strides"], attrs["dilation"], strict=True)],
    }


@form(tall=(2, 4), unroll=UNROLL)
def differentiate_weights(kernel: Kernel, context: dict[str, Any], room: int, tall: int, unroll: int) -> Kernel | None:
    """Some input channels times some output channels at a time: (H, W, C) of any type by (OH, OW, O) float32.

    tall    input channels at a time at the most, by 16 / tall output channels
    unroll  see ``UNROLL``
    """
    attrs, tile, (x, g) = context["attrs"], context["tile"], context["ins"]
    outputs, *_, inputs = context["out"]["shape"]
    if attrs["groups"] > 1 or x["steps"] or g["steps"] or context["acc"] != "float" or (tile and tile["sum"]):
        return None
    if context["rows"] is not None or context["columns"] is not None:
        return None
    few = outputs <= 4 and x["dtype"] == "int8" and inputs >= 4  # then integers are made floats as they are read
    if outputs == 1 and not few:
        return None  # no two products of an input
    _, oh, ow, _ = g["shape"]
    group = (8 if outputs <= 2 and inputs >= 8 else 4) if few else min(inputs, tall)
    packed, width = x["dtype"] != "float32" and not few, WIDTH if group <= 2 else 4

    def place(height: int) -> dict[str, int]:
        panel = height * ow * group * 4 if packed else 0
        return lay_out({"sums": outputs * group * 4, "lines": height * 8, "panel": panel})

    height = next((h for h in (-(-oh // n) for n in range(1, oh + 1)) if place(h)["end"] <= room), None)
    if height is None:
        return None
    if few:
        parts = [assembly("fpu/outer8", {"n": outputs, "rows": group, "zero": attrs["zero_point"]}, ROWS)]
    else:
        own = {"rows": group, "width": width, "unroll": unroll}
        parts = [assembly("fpu/outer", own | {"n": n}, ROWS) for n in _find_widths(outputs, width)]
    more = {"height": height, "at": place(height), "group": group, "packed": packed, "few": few, "width": width}
    return make_form(kernel, context | more, "fpu/conv2d_weight_grad", more["at"]["end"], *parts)


@form(small={"wide": 8}, wide=WIDE)
def sum_channels(kernel: Kernel, context: dict[str, Any], room: int, wide: int) -> Kernel | None:
    """Sums over all pixels of (H, W, C) float32, some channels at a time. Knob: see ``WIDE``."""
    (x,) = context["ins"]
    if context["rows"] is not None or context["columns"] is not None:
        return None
    if context["attrs"]["axis"] != [0, 1, 2] or len(x["shape"]) != 4 or context["attrs"]["keepdims"]:
        return None
    if x["shape"][0] > 1 or x["steps"] or x["dtype"] != "float32" or context["tile"] and context["tile"]["sum"]:
        return None
    blocks = _find_blocks(x["shape"][3], wide)
    parts = [assembly("fpu/columns", {"n": n}, COLUMNS) for _, _, n in blocks]
    return make_form(kernel, context | {"blocks": blocks}, "fpu/sum", 0, *parts)


def _find_blocks(channels: int, wide: int) -> list[tuple[int, int, int]]:
    """Channels in blocks of some at a time: the first, the end, how many at a time."""
    whole = channels // wide * wide
    return [(first, end, n) for first, end, n in ((0, whole, wide), (whole, channels, channels % wide)) if first < end]


COLUMNS = ("const float *from", "float *to", "int rows", "int distance")
ROWS = ("void *rows",)
UPDATE = ("const float *a", "float *y", "const float *panel", "int rows", "int distance")
WIDEN = assembly("fpu/widen", {}, ("const int8_t *from", "float *to", "int rows", "int distance"))


Finish = tuple[int | None, int | None]


def _find_finish(context: dict[str, Any], channels: int) -> Finish:
    """Which steps of the tail are a mask, of whole bytes and all its rows, and a factor for each channel, if they are
    all there is."""
    return _find_factors(context["tail"], "acc", channels, context["rows"] or {}) or (None, None)


def _find_source(x: dict[str, Any], depth: int) -> dict[str, Any] | None:
    """What an operand that is made as it is read is made of, if that is a mask and factors, ``depth`` channels at a
    time: the operand that they are of, and the two."""
    begin, *rest = x["steps"]
    if begin["op"] != "broadcast_to":
        rest = x["steps"]
    source = begin["operands"][0]
    found = _find_factors(rest, begin["name"] if rest != x["steps"] else None, depth, {})
    if found is None or source["kind"] == "register" or source["dtype"] != "float32" or depth % 8 or x["shape"][3] % 8:
        return None
    mask, scale = (rest[k]["operands"][1] if k is not None else None for k in found)
    for operand in (source, mask) if mask else (source,):
        if operand.get("strides", [])[3:] != [1] or operand["strides"][1] != x["shape"][2] * operand["strides"][2]:
            return None
    return {"source": source, "mask": mask, "scale": scale}


def _find_factors(
    steps: Sequence[dict[str, Any]], previous: str | None, channels: int, rings: dict[str, int]
) -> Finish | None:
    """previous: what the first of the steps is of, or None for an operand of its own"""
    ops = [step["op"] for step in steps]
    if ops not in (["nn_apply_mask"], ["multiply"], ["nn_apply_mask", "multiply"]):
        return None
    mask, scale = None, None
    for k, step in enumerate(steps):
        first, second = step["operands"]
        if previous is not None and (first.get("c") != previous or first["kind"] != "register"):
            return None
        if second["kind"] not in ("flat", "strided"):
            return None
        previous = step["name"]
        if step["op"] == "multiply":
            if second["dtype"] != "float32" or second.get("strides", [])[-1:] not in ([1], [0]):
                return None
            if second["kind"] == "flat" or second["strides"] != [0, 0, 0, 1]:
                return None
            scale = k
        else:
            numbers = [int(n) for n in re.findall(r"- (\d+)", second["from"])]
            places = [*numbers, *second["strides"][1:3], channels]
            if (
                step["attrs"]["alpha"] != 0
                or second["dtype"] != "bit"
                or any(n % 8 for n in places)
                or second["c"] in rings
            ):
                return None
            if second["strides"][1] % second["strides"][2] or second["strides"][3] != 1:
                return None
            mask = k
    return mask, scale


def _reads_result(tail: Sequence[dict[str, Any]]) -> bool:
    return any(o.get("c", "").strip("(").split(" ")[0] == "y0" for step in tail for o in step["operands"])


def _find_columns(width: int, reach: int, size: int, attrs: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Columns that the same taps reach, of a convolution to ``width`` from ``reach``: the first, distance, how many."""
    stride, dilation, left = attrs["strides"][1], attrs["dilation"][1], attrs["padding"][1]

    def reached(column: int) -> tuple[int, ...]:
        return tuple(t for t in range(size) if 0 <= column * stride + t * dilation - left < reach)

    groups = [list(group) for _, group in groupby(range(width), reached)]
    return [(columns[0], 1, len(columns)) for columns in groups]


Span = tuple[int, int, int, int, int, int]


def _find_spans_back(width: int, reach: int, size: int, attrs: dict[str, Any], axis: int) -> list[Span]:
    """Rows or columns that the same taps reach, of a transposed convolution to ``width`` of them from ``reach``: the
    first, distance, how many; the first of the taps, how many, and what that reaches of the first."""
    stride, dilation, before = (attrs[name][axis] for name in ("strides", "dilation", "padding"))

    def reached(place: int) -> tuple[int, ...]:
        at = [(t, place + before - t * dilation) for t in range(size)]
        return tuple(t for t, position in at if position % stride == 0 and 0 <= position < reach * stride)

    result = []
    for phase in range(min(stride, width)):
        for taps, group in groupby(range(phase, width, stride), reached):
            first, *more = group
            tap = taps[0] if taps else 0
            at = (first + before - tap * dilation) // stride if taps else 0
            result.append((first, stride, 1 + len(more), tap, len(taps), at))
    return result

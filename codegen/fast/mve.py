"""int8 kernels on vectors of 16 bytes, for cores with MVE (Cortex-M55)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from tte.codegen.fast import conv2d_transpose, conv2d_weight_grad
from tte.codegen.fast.conv2d import SIZES, End, find_end, find_gradient_end, list_shares
from tte.codegen.fast.depthwise import turn_windows
from tte.codegen.fast.form import LIMIT, assembly, form, lay_out, make_form
from tte.codegen.kernel import Kernel
from tte.ops.quantized import add_terms, fixed_terms, tflite_terms

DOT = ("const int8_t *a", "const uint8_t *stream", "void *y", "int pairs")
PACK = ("int8_t *to", "const int8_t *from", "int32_t *bias", "int less")
MOST = 8192  # bytes of scratch, where sums of more than one row are kept
COLUMN = assembly("mve/column", {}, ("int8_t *to", "const int8_t *from", "int stride", "int n"))
FARTHEST = 8191  # bytes from an element to the next of a column
HEADS = {"none": 16, "tflite": 48}  # bytes of biases, multipliers, exponents
UNROLL = 8  # groups of 16 products in a loop at the most


@form(block=(128, 512, 256, 64, 32, 16))
def convolve(kernel: Kernel, context: dict[str, Any], room: int, block: int) -> Kernel | None:
    """Two pixels times four channels at a time: (H, W, C) int8 by (O, KH, KW, C) int8 or int16, 4 <= O.

    block   pixels of a block at the most, where it takes scratch: each block packs all weights
    """
    out, (x, w, *_), attrs = context["out"], context["ins"], context["attrs"]
    if context["tile"] or x["steps"] or x["dtype"] != "int8" or context["acc"] != "int32_t":
        return None
    channels, *kernel_size, depth = w["shape"]
    single_row = context["rows"] is not None
    pixels = out["shape"][2] * (1 if single_row else out["shape"][1])
    if attrs["groups"] > 1 or channels < 4 or pixels < 2:
        return None
    taps = kernel_size[0] * kernel_size[1] * depth
    end = find_vector_end(context, channels)
    added = add_result(context, end)
    end = added[0] if added else end
    plain = kernel_size == [1, 1] and not any(attrs["padding"]) and (single_row or attrs["strides"] == [1, 1])
    gathered = w["dtype"] != "int8" or (len(w["segments"]) > 1 and w["axis"] != 0)

    def place(block: int) -> dict[str, int]:
        return lay_out(
            {
                "stream": HEADS.get(end.scale, 32) + -(-taps // 16) * 64,
                "row": taps * gathered,
                "windows": 0 if plain else block * taps,
                "sums": 0 if direct else block * channels * SIZES[end.result],
            }
        )

    direct = end.result == "int8" and added is None
    free = plain and direct
    shares = [pixels] if free else list_shares(pixels, block)
    share = next((share for share in shares if place(share)["end"] <= room), 0)
    if not share:
        return None
    at, step = place(share), depth * attrs["strides"][1] if plain else taps
    dot = asdict(end) | {"depth": taps, "step": step, "stride": channels, "zero": find_zero(context, end)}
    parts = [
        assembly("mve/dot4x2", dot | {"unroll": UNROLL}, DOT),
        assembly("mve/pack", {"depth": taps}, PACK),
        *([LIMIT] if end.bits else []),
        *([added[1]] if added else []),
    ]
    more = asdict(end) | {"block": share, "at": at, "plain": plain, "step": step, "gathered": gathered}
    more |= {"direct": direct}
    return make_form(kernel, context | more, "mve/conv2d", at["end"], *parts)


def find_vector_end(context: Mapping[str, Any], channels: int) -> End:
    """What of the tail can be done at once; scale: "tflite", too."""
    tail = context["tail"]
    if not tail or tail[0]["op"] != "qnn_requantize" or len(tail[0]["operands"]) != 3:
        return find_end(context, channels)
    first = tail[0] | {"operands": tail[0]["operands"][:2]}
    end = find_end({**context, "tail": [first, *tail[1:]]}, channels)
    return end if end.scale == "none" else replace(end, scale="tflite")


def add_result(context: Mapping[str, Any], end: End) -> tuple[End, Kernel] | None:
    """How sums leave, and what adds, where all that follows is the addition of an int8 of the result's shape."""
    if end.scale == "none" or len(context["tail"]) != 2:
        return None
    first, last = context["tail"]
    if (first["attrs"]["low"], first["attrs"]["high"]) != (-128, 127):
        return None
    kinds = sorted(operand["kind"] for operand in last["operands"])
    part = add_vectors(last) if kinds == ["flat", "register"] and not first["attrs"]["mask"] else None
    return (replace(end, result="int8", bits=False), part) if part else None


def find_zero(context: dict[str, Any], end: End) -> int:
    """The zero point of scaled sums."""
    return 0 if end.scale == "none" else int(context["tail"][0]["attrs"].get("zero_point", 0))


@form(block=(128, 64, 32))
def multiply_columns(kernel: Kernel, context: dict[str, Any], room: int, block: int) -> Kernel | None:
    """Input gradients of 1 x 1 convolutions, as above: (H, W, O) int8 by (O, 1, 1, C) int8, stride 1, 4 <= C."""
    out, (_, w, *_) = context["out"], context["ins"]
    depth, pixels, channels = w["shape"][0], out["shape"][1] * out["shape"][2], out["shape"][3]
    if not conv2d_transpose.is_pointwise(context) or pixels < 2 or not 4 <= channels <= FARTHEST:
        return None
    end = find_gradient_end(context)

    def place(block: int) -> dict[str, int]:
        return lay_out(
            {
                "stream": HEADS.get(end.scale, 32) + -(-depth // 16) * 64,
                "row": depth,
                "sums": 0 if end.result == "int8" else block * channels * SIZES[end.result],
            }
        )

    shares = [pixels] if end.result == "int8" else list_shares(pixels, block)
    share = next((share for share in shares if place(share)["end"] <= room), 0)
    if not share:
        return None
    at = place(share)
    dot = asdict(end) | {"depth": depth, "step": depth, "stride": channels, "zero": 0, "unroll": UNROLL}
    parts = assembly("mve/dot4x2", dot, DOT), assembly("mve/pack", {"depth": depth}, PACK), COLUMN
    return make_form(
        kernel, context | asdict(end) | {"block": share, "at": at}, "mve/conv2d_transpose", at["end"], *parts
    )


@form()
def correlate(kernel: Kernel, context: dict[str, Any], room: int) -> Kernel | None:
    """Weight gradients of 1 x 1 convolutions: (H, W, C) int8 by (H, W, O) int8, stride 1, 4 <= O."""
    (x, g), (outputs, _, _, channels) = context["ins"], context["out"]["shape"]
    if (
        not conv2d_weight_grad.is_pointwise(context)
        or outputs < 4
        or channels < 2
        or max(channels, g["shape"][3]) > FARTHEST
    ):
        return None
    pixels = x["shape"][1] * x["shape"][2]

    def place(block: int) -> dict[str, int]:
        head = HEADS["none"] + -(-pixels // 16) * 64
        return lay_out({"stream": head, "row": pixels, "panel": block * pixels, "sums": block * 16})

    blocks = (channels - channels % 2, *(n for n in (128, 64, 32, 16, 8, 4, 2) if n < channels))
    block = next((n for n in blocks if place(n)["end"] <= room), 0)
    if not block:
        return None
    at = place(block)
    dot = asdict(End()) | {"depth": pixels, "step": pixels, "stride": 4, "zero": 0, "unroll": UNROLL}
    parts = assembly("mve/dot4x2", dot, DOT), assembly("mve/pack", {"depth": pixels}, PACK), COLUMN
    return make_form(kernel, context | {"block": block, "at": at}, "mve/conv2d_weight_grad", at["end"], *parts)


@form()
def multiply_rows(kernel: Kernel, context: dict[str, Any], room: int) -> Kernel | None:
    """Four outputs at a time without scratch: (N, I) int8 by (O, I) int8 in one piece, or filters of 1 x 1."""
    x, w, *_ = context["ins"]
    channels, *kernel_size, depth = w["shape"]
    if context["tile"] or x["steps"] or (x["dtype"], w["dtype"], context["acc"]) != ("int8", "int8", "int32_t"):
        return None
    attrs = context["attrs"]
    if kernel_size and (kernel_size != [1, 1] or any(attrs["padding"]) or attrs["groups"] > 1):
        return None
    if len(w["segments"]) > 1 or channels < 4:
        return None
    end = replace(find_vector_end(context, channels), bits=False)
    less = attrs.get("zero_point", 0)
    dot = asdict(end) | {"depth": depth, "less": less, "zero": find_zero(context, end)}
    part = assembly("mve/dot1x4", dot, ("const int8_t *x", "const int32_t *stream", "void *y", "const int8_t *w"))
    return make_form(kernel, context | asdict(end), "mve/direct", 0, part)


@form()
def convolve_channels(kernel: Kernel, context: dict[str, Any], room: int) -> Kernel | None:
    """(H, W, C) int8 by (C, KH, KW, 1) int8 or int16, where a window has no more than 64 elements, holes among them."""
    end = find_vector_end(context, context["ins"][0]["shape"][3])
    return _convolve_channels(kernel, context | {"turned": False, "spread": [1, 1]}, end, room)


@form()
def convolve_channels_back(kernel: Kernel, context: dict[str, Any], room: int) -> Kernel | None:
    """The input gradient: the same with windows from their ends."""
    turned = turn_windows(context)
    return _convolve_channels(kernel, turned, find_gradient_end(context), room) if turned else None


def _convolve_channels(kernel: Kernel, context: dict[str, Any], end: End, room: int) -> Kernel | None:
    out, (x, w, *_), attrs, tile = context["out"], context["ins"], context["attrs"], context["tile"]
    (_, _, width, channels), window = x["shape"], w["shape"][1:3]
    if x["steps"] or x["dtype"] != "int8" or context["acc"] != "int32_t" or w["shape"][0] != channels:
        return None
    if tile and (tile["sum"] or len(context["outs"]) > 1):
        return None
    high, wide = ((k - 1) * d + 1 for k, d in zip(window, attrs["dilation"], strict=True))
    (sh, sw), (_, left, _, right), count = attrs["strides"], attrs["padding"], out["shape"][2]
    vectors = -(-high * wide // 16)
    if vectors > 4 or 3 * sw * high + 16 * (vectors - 1) > 127 or x["strides"][2] > FARTHEST:
        return None
    lanes = 1 if end.result == "int8" else 8 if end.bits else min(4, channels)
    pixel = out["strides"][2] if end.result == "int8" else lanes
    size = max(
        (left + (width - 1) * context["spread"][1] + 1 + right) * high,
        ((count + 3) // 4 * 4 - 1) * sw * high + 16 * vectors,
    )

    def place(band: int) -> dict[str, int]:
        return lay_out(
            {
                "lines": 4 * ((band - 1) * sh + high),
                "plane": size,
                "weights": window[0] * window[1] + 1,
                "vectors": 16 * vectors,
                "sums": 0 if end.result == "int8" else band * count * lanes * SIZES[end.result],
            }
        )

    height = 1 if context["rows"] is not None else out["shape"][1]
    bands = [height, *(n for n in (64, 32, 16, 8, 4, 2, 1) if n < height)]
    most = MOST if end.result != "int8" else room
    band = next((n for n in bands if place(n)["end"] <= (room if n == 1 else min(room, most))), 0)
    if not band:
        return None
    new = min(sh, high)  # rows of the plane per row of the result
    first, turn = spread_weights(window, attrs["dilation"], new, 16 * vectors)
    plane = asdict(end) | {
        "window": (high, wide),
        "strides": (sh, sw),
        "vectors": vectors,
        "width": width,
        "count": count,
        "step": x["strides"][2],
        "pixel": pixel,
        "line": out["strides"][1] if end.result == "int8" else count * pixel,
        "padding": left,
        "spread": context["spread"][1],
        "less": attrs.get("zero_point", 0),
        "zero": find_zero(context, end),
        "turning": new < high,
        "first": first,
        "turn": turn,
    }
    parameters = ("const int8_t *const *lines", "uint32_t *stream", "void *y")
    parts = [assembly("mve/plane", plane, parameters), *([LIMIT] if end.bits else [])]
    more = asdict(end) | {"band": band, "lanes": lanes, "pixel": pixel, "high": high, "size": size}
    at = place(band)
    return make_form(kernel, context | more | {"inner": left * high, "at": at}, "mve/depthwise", at["end"], *parts)


def spread_weights(
    window: Sequence[int], dilation: Sequence[int], new: int, size: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Which weight each of ``size`` lanes begins with (where there is none, what is behind the last), and from which
    lane it takes that for the next row of the result, once before the first. new: rows that take the place of others"""
    high, wide = ((k - 1) * d + 1 for k, d in zip(window, dilation, strict=True))
    first, turn = [], []
    for lane in range(size):
        column, slot = divmod(lane, high)
        row = (slot + new) % high  # turned once before the first row
        known = column < wide and column % dilation[1] == 0 == row % dilation[0]
        first.append(row // dilation[0] * window[1] + column // dilation[1] if known else window[0] * window[1])
        turn.append(column * high + (slot - new) % high if column < wide else lane)
    return [first[i : i + 16] for i in range(0, size, 16)], [turn[i : i + 16] for i in range(0, size, 16)]


@form()
def add(kernel: Kernel, context: dict[str, Any], room: int) -> Kernel | None:
    """Sums of two int8 of the same shape."""
    part = add_vectors(context["tail"][0]) if len(context["tail"]) == 1 else None
    if part is None or context["tile"] or any(operand["kind"] != "flat" for operand in context["tail"][0]["operands"]):
        return None
    return make_form(kernel, context, "mve/elementwise", 0, part)


ADD = ("const int8_t *a", "const int8_t *b", "int8_t *y", "int n")
NORMAL = 2.0**-40  # floats from there on make no sum that is too small to be normal


def add_vectors(step: Mapping[str, Any]) -> Kernel | None:
    """What computes an elementwise step, if that is a sum of int8 that is limited to int8."""
    attrs = step["attrs"]
    if step["op"] != "qnn_add" or attrs["mask"] or (attrs["low"], attrs["high"]) != (-128, 127):
        return None
    a_zero, b_zero, zero = (attrs[name] for name in ("a_zero", "b_zero", "zero_point"))
    scales = {name: attrs[name] for name in ("a_scale", "b_scale", "scale")}
    if attrs["tflite"]:
        (a, a_exponent), (b, b_exponent), (both, exponent) = tflite_terms(**scales)
        exponents = (a_exponent, b_exponent, exponent)
        if max(exponents) > 0 or min(exponents) < -31:
            return None
        own: dict[str, Any] = {"words": (a, b, -a_zero, -b_zero, both, zero), "exponents": exponents}
        return assembly("mve/add", own | {"kind": "tflite"}, ADD)
    if bits := attrs["bits"]:
        a, b = fixed_terms(**scales, bits=bits)
        words = (a, b, 2**bits // 2 - a_zero * a - b_zero * b, 0, 0, zero)
        return assembly("mve/add", {"words": words, "bits": bits, "kind": "fixed"}, ADD)
    ra, rb, c, offset = add_terms(a_zero=a_zero, b_zero=b_zero, zero_point=zero, unsigned=attrs["unsigned"], **scales)
    if min(ra, rb) < NORMAL or 0 < abs(c) < NORMAL:
        return None
    ra, rb, c = (int(np.float32(real).view(np.int32)) for real in (ra, rb, c))
    return assembly("mve/add", {"words": (ra, rb, offset, c, 0, -offset), "kind": "float"}, ADD)

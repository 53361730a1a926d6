"""Input gradients of int8 convolutions as products of matrices of 16 bits."""

import math
from dataclasses import asdict
from typing import Any

from tte.codegen.fast.conv2d import SIZES, End, find_gradient_end, find_pairs, list_parts, list_shares, multiply
from tte.codegen.fast.form import COLUMNS, WIDEN, form, lay_out, make_form
from tte.codegen.kernel import Kernel


@form(small={"unroll": 0}, block=(128, 256, 512), unroll=(24, 64), thin=(8, 64), load=(4, 1))
def multiply_columns(
    kernel: Kernel, context: dict[str, Any], room: int, block: int, unroll: int, thin: int, load: int
) -> Kernel | None:
    """Two pixels times two channels at a time: (OH, OW, O) int8 by (O, KH, KW, C) int8 or int16.

    Knobs: see ``convolve``.
    """
    out, (_, w, *_), strides = context["out"], context["ins"], context["attrs"]["strides"]
    depth, channels, strided = w["shape"][0], out["shape"][3], strides != [1, 1]
    if not is_product(context):
        return None
    reach = find_reach(context)
    pixels = math.prod(-(-n // s) for n, s in zip(out["shape"][1:3], strides, strict=True))
    beside = w["axis"] == 3 and len(w["segments"]) > 1
    widths = [part["stop"] - part["start"] for part in w["segments"]] if beside else [channels]
    if min(widths) < 2 or (pixels < 2 and not strided):
        return None
    groups = -(-depth // 4) * math.prod(max(count for _, count in axis) for axis in reach)
    end = End() if context["tile"] else find_gradient_end(context)
    if not groups or (2 * channels * SIZES[end.result] + SIZES[end.result] > 4095 and not strided):
        return None
    plain = is_pointwise(context)

    def place(block: int) -> dict[str, int]:
        parts = list_parts(block, groups, channels, end) | {"zeros": 0 if plain else depth}
        if strided:
            parts["sums"] = -(-block // 2) * 2 * channels * SIZES[end.result]
        return lay_out(parts)

    block = next((share for share in list_shares(pixels, block) if place(share)["end"] <= room), 0)
    if not block:
        return None
    at = place(block)
    if strided:  # more taps reach some pixels than others
        dot, _ = multiply(groups, channels, end, 0)
        passed = f", groups, {channels * SIZES[end.result]}, {end.shift}"
    else:
        pairs = find_pairs(block, groups, channels, end, thin)
        dot, passed = multiply(groups, channels, end, unroll, pairs, load)
    parted = w["axis"] == 0 and any(part["start"] % 4 for part in w["segments"])
    more = asdict(end) | {"block": block, "at": at, "passed": passed, "reach": reach, "plain": plain}
    more |= {"gathered": w["dtype"] != "int8" or parted, "hops": find_hops(context)}
    return make_form(kernel, context | more, "dsp/conv2d_transpose", at["end"], dot, WIDEN, COLUMNS)


def find_reach(context: dict[str, Any]) -> list[list[tuple[int, int]]]:
    """By axis, for each residue of a place by the stride: the last tap that reaches it, and how many do."""
    attrs, sizes = context["attrs"], context["ins"][1]["shape"][1:3]
    result = []
    for size, stride, dilation, padding in zip(
        sizes, attrs["strides"], attrs["dilation"], attrs["padding"], strict=False
    ):
        taps = [[t for t in range(size) if (place + padding - t * dilation) % stride == 0] for place in range(stride)]
        result.append([(max(those, default=0), len(those)) for those in taps])
    return result


def find_hops(context: dict[str, Any]) -> list[tuple[int, int]]:
    """By axis, how far it is from a tap to the next that reaches the same place, and between what they read."""
    pairs = zip(context["attrs"]["strides"], context["attrs"]["dilation"], strict=True)
    return [
        (stride // math.gcd(stride, dilation), dilation // math.gcd(stride, dilation)) for stride, dilation in pairs
    ]


def is_product(context: dict[str, Any]) -> bool:
    """Whether it is the input gradient of a convolution of int8 by integers, whole or some of its channels."""
    attrs, (x, _, *start) = context["attrs"], context["ins"]
    if (context["tile"] or {}).get("sum") or context["rows"] is not None or x["steps"] or start or attrs["groups"] > 1:
        return False
    return bool(x["dtype"] == "int8" and context["acc"] == "int32_t")


def is_pointwise(context: dict[str, Any]) -> bool:
    """Whether it is the whole of that of a 1 x 1 convolution, stride 1, of int8 by int8."""
    out, attrs, (x, w, *_) = context["out"], context["attrs"], context["ins"]
    if not is_product(context) or context["tile"] or w["dtype"] != "int8" or any(attrs["padding"]):
        return False
    return bool(w["shape"][1:3] == [1, 1] == attrs["strides"] and x["shape"][1:3] == out["shape"][1:3])

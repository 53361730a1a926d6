"""Input gradients of pointwise int8 convolutions as products of matrices of 16 bits."""

from dataclasses import asdict
from typing import Any

from tte.codegen.fast.conv2d import SIZES, find_gradient_end, find_pairs, list_parts, list_shares, multiply
from tte.codegen.fast.form import COLUMNS, WIDEN, form, lay_out, make_form
from tte.codegen.kernel import Kernel


@form(small={"unroll": 0}, block=(128, 256, 512), unroll=(24, 64), thin=(8, 64))
def multiply_columns(
    kernel: Kernel, context: dict[str, Any], room: int, block: int, unroll: int, thin: int
) -> Kernel | None:
    """Two pixels times two channels at a time: (H, W, O) int8 by (O, 1, 1, C) int8, stride 1.

    Knobs: see ``convolve``.
    """
    out, (_, w, *_) = context["out"], context["ins"]
    depth, pixels, channels = w["shape"][0], out["shape"][1] * out["shape"][2], out["shape"][3]
    if not is_pointwise(context) or pixels < 2:
        return None
    by_columns = w["axis"] == 3 or len(w["segments"]) == 1
    widths = [part["stop"] - part["start"] for part in w["segments"]] if w["axis"] == 3 else [channels]
    if min(widths) < 2 or not (by_columns or all(part["start"] % 4 == 0 for part in w["segments"])):
        return None
    groups = -(-depth // 4)
    end = find_gradient_end(context)
    if 2 * channels * SIZES[end.result] + SIZES[end.result] > 4095:
        return None

    def place(block: int) -> dict[str, int]:
        return lay_out(list_parts(block, groups, channels, end))

    block = next((share for share in list_shares(pixels, block) if place(share)["end"] <= room), 0)
    if not block:
        return None
    at = place(block)
    pairs = find_pairs(block, groups, channels, end, thin)
    dot, passed = multiply(groups, channels, end, unroll, pairs)
    more = asdict(end) | {"block": block, "at": at, "passed": passed}
    return make_form(kernel, context | more, "dsp/conv2d_transpose", at["end"], dot, WIDEN, COLUMNS)


def is_pointwise(context: dict[str, Any]) -> bool:
    """Whether it is the whole input gradient of a 1 x 1 convolution, stride 1, of int8 by int8."""
    out, attrs, (x, w, *start) = context["out"], context["attrs"], context["ins"]
    if context["tile"] or context["rows"] is not None or x["steps"] or start or attrs["groups"] > 1:
        return False
    if (x["dtype"], w["dtype"], context["acc"]) != ("int8", "int8", "int32_t") or any(attrs["padding"]):
        return False
    return bool(w["shape"][1:3] == [1, 1] == attrs["strides"] and x["shape"][1:3] == out["shape"][1:3])

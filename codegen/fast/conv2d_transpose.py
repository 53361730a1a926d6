"""Input gradients of pointwise int8 convolutions as products of matrices of 16 bits."""

from dataclasses import asdict
from typing import Any

from tte.codegen.fast.conv2d import SIZES, find_gradient_end, find_pairs, list_parts, multiply
from tte.codegen.fast.form import COLUMNS, WIDEN, form, lay_out, make_form
from tte.codegen.kernel import Kernel


@form(small={"unroll": 0}, block=(128, 64, 32), unroll=(24, 48, 12))
def multiply_columns(kernel: Kernel, context: dict[str, Any], room: int, block: int, unroll: int) -> Kernel | None:
    """Two pixels times two channels at a time: (H, W, O) int8 by (O, 1, 1, C) int8, stride 1."""
    out, attrs, (x, w, *start) = context["out"], context["attrs"], context["ins"]
    if context["tile"] or context["rows"] is not None or x["steps"] or start:
        return None
    if (x["dtype"], w["dtype"], context["acc"]) != ("int8", "int8", "int32_t"):
        return None
    depth, *kernel_size, _ = w["shape"]
    pixels, channels = out["shape"][1] * out["shape"][2], out["shape"][3]
    if kernel_size != [1, 1] or attrs["groups"] > 1 or x["shape"][1:3] != out["shape"][1:3] or pixels < 2:
        return None
    if any(attrs["padding"]) or attrs["strides"] != [1, 1]:
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

    blocks = [b for b in (pixels, 128, 64, 32, 16, 8, 4, 2) if b <= min(pixels, block) and place(b)["end"] <= room]
    if not blocks:
        return None
    at = place(blocks[0])
    pairs = find_pairs(blocks[0], groups, channels, end, thin=8)
    dot, passed = multiply(groups, channels, end, unroll, pairs)
    more = asdict(end) | {"block": blocks[0], "at": at, "passed": passed}
    return make_form(kernel, context | more, "dsp/conv2d_transpose", at["end"], dot, WIDEN, COLUMNS)

"""Weight gradients of pointwise int8 convolutions as products of matrices of 16 bits."""

from typing import Any

from tte.codegen.fast.conv2d import End, list_parts, multiply
from tte.codegen.fast.form import COLUMNS, form, lay_out, make_form
from tte.codegen.kernel import Kernel

BLOCKS = (128, 64, 32, 16, 8, 4, 2)  # output channels of a block


@form(small={"unroll": 0}, unroll=(24, 48, 12))
def correlate(kernel: Kernel, context: dict[str, Any], room: int, unroll: int) -> Kernel | None:
    """Two output times two input channels at a time: (H, W, C) int8 by (H, W, O) int8, a window of one, stride 1."""
    attrs, (x, g), out = context["attrs"], context["ins"], context["out"]
    if context["tile"] or context["rows"] is not None or g["steps"]:
        return None
    if (x["dtype"], g["dtype"], context["acc"]) != ("int8", "int8", "int32_t"):
        return None
    outputs, *window, channels = out["shape"]
    if window != [1, 1] or attrs["groups"] > 1 or any(attrs["padding"]) or attrs["strides"] != [1, 1]:
        return None
    if outputs < 2 or channels < 2 or 8 * channels + 4 > 4095:
        return None
    end = End()
    groups = -(-x["shape"][1] * x["shape"][2] // 4)

    def place(block: int) -> dict[str, int]:
        return lay_out(list_parts(block, groups, channels, end))

    block = next((b for b in BLOCKS if b <= outputs and place(b)["end"] <= room), None)
    if block is None:
        return None
    at = place(block)
    dot, passed = multiply(groups, channels, end, unroll)
    more = {"block": block, "at": at, "passed": passed}
    return make_form(kernel, context | more, "dsp/conv2d_weight_grad", at["end"], dot, COLUMNS)

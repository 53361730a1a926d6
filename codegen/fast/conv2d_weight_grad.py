"""Weight gradients of pointwise int8 convolutions as products of matrices of 16 bits."""

from typing import Any

from tte.codegen.fast.conv2d import End, list_parts, multiply
from tte.codegen.fast.form import COLUMNS, form, lay_out, make_form
from tte.codegen.kernel import Kernel

BLOCKS = (128, 64, 32, 16, 8, 4, 2)  # output channels of a block


@form(small={"unroll": 0}, unroll=(24, 64))
def correlate(kernel: Kernel, context: dict[str, Any], room: int, unroll: int) -> Kernel | None:
    """Two output times two input channels at a time: (H, W, C) int8 by (H, W, O) int8, a window of one, stride 1."""
    (x, _), (outputs, _, _, channels) = context["ins"], context["out"]["shape"]
    if not is_pointwise(context) or outputs < 2 or channels < 2 or 8 * channels + 4 > 4095:
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


def is_pointwise(context: dict[str, Any]) -> bool:
    """Whether it is the whole weight gradient of a 1 x 1 convolution, stride 1, of int8 by int8."""
    attrs, (x, g) = context["attrs"], context["ins"]
    if context["tile"] or context["rows"] is not None or g["steps"] or attrs["groups"] > 1:
        return False
    if (x["dtype"], g["dtype"], context["acc"]) != ("int8", "int8", "int32_t") or any(attrs["padding"]):
        return False
    return bool(context["out"]["shape"][1:3] == [1, 1] == attrs["strides"])

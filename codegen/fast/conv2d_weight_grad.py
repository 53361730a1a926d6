"""Weight gradients of int8 convolutions as products of matrices of 16 bits."""

from typing import Any

from tte.codegen.fast.conv2d import End, multiply
from tte.codegen.fast.conv2d_transpose import find_hops
from tte.codegen.fast.form import COLUMNS, form, lay_out, make_form
from tte.codegen.kernel import Kernel


@form(small={"unroll": 0}, unroll=(24, 64))
def correlate(kernel: Kernel, context: dict[str, Any], room: int, unroll: int) -> Kernel | None:
    """Two output channels times two places of a window's row at a time: (H, W, C) int8 by (OH, OW, O) int8."""
    (_, g), (outputs, high, wide, channels) = context["ins"], context["out"]["shape"]
    if not is_product(context) or outputs < 2 or wide * channels < 2:
        return None
    (_, height, width, _), (hop, skip) = g["shape"], find_hops(context)[0]
    plain = is_pointwise(context)
    if width % 4:  # the rows that one tap reads do not begin with a group of four
        hop = high
    rows = height + (high - 1) // hop * skip
    groups = -(-height * width // 4)

    def place(block: int) -> dict[str, int]:
        return lay_out(
            {
                "panel": block // 2 * groups * 16,
                "stream": 8 + -(-rows * width // 4) * 16,
                "sums": block * 8,
                "window": 0 if plain else rows * width * 2,
            }
        )

    shares = sorted({-(-outputs // n) // 2 * 2 for n in range(1, outputs // 2 + 1)}, reverse=True)
    block = next((share for share in shares if place(share)["end"] <= room), None)
    if block is None:
        return None
    at = place(block)
    dot, passed = multiply(groups, 2, End(), unroll)
    more = {"block": block, "at": at, "passed": passed, "plain": plain, "hop": hop, "skip": skip}
    return make_form(kernel, context | more, "dsp/conv2d_weight_grad", at["end"], dot, COLUMNS)


def is_product(context: dict[str, Any]) -> bool:
    """Whether it is the whole weight gradient of a convolution of int8 by int8."""
    x, g = context["ins"]
    if context["tile"] or context["rows"] is not None or g["steps"] or context["attrs"]["groups"] > 1:
        return False
    return (x["dtype"], g["dtype"], context["acc"]) == ("int8", "int8", "int32_t")


def is_pointwise(context: dict[str, Any]) -> bool:
    """Whether it is that of a 1 x 1 convolution, stride 1."""
    attrs = context["attrs"]
    if not is_product(context) or any(attrs["padding"]):
        return False
    return bool(context["out"]["shape"][1:3] == [1, 1] == attrs["strides"])

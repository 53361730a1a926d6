"""Weight gradients of int8 convolutions as products of matrices of 16 bits."""

from itertools import product
from typing import Any

from tte.codegen.fast.conv2d import End, multiply
from tte.codegen.fast.conv2d_transpose import find_hops
from tte.codegen.fast.form import COLUMNS, form, lay_out, make_form
from tte.codegen.kernel import Kernel


@form(small={"unroll": 0}, unroll=(24, 64), load=(4, 1))
def correlate(kernel: Kernel, context: dict[str, Any], room: int, unroll: int, load: int) -> Kernel | None:
    """Two output channels times two places of a window's row at a time: (H, W, C) int8 by (OH, OW, O) int8.

    Knobs: see ``convolve``.
    """
    (x, g), (outputs, high, wide, channels) = context["ins"], context["out"]["shape"]
    groups = context["attrs"]["groups"]
    if not is_product(context) or outputs < 2 or (groups == 1 and wide * channels < 2):
        return None
    if groups > 1 and not groups == outputs == x["shape"][3]:
        return None
    (_, height, width, _), (hop, skip) = g["shape"], find_hops(context)[0]
    plain = is_pointwise(context)
    if width % 4:  # the rows that one tap reads do not begin with a group of four
        hop = high
    taps = -(-high // hop)  # of which one copy serves all

    def place(rows: int, block: int) -> dict[str, int]:
        above = rows + (taps - 1) * skip
        return lay_out(
            {
                "panel": block // 2 * -(-rows * width // 4) * 16,
                "stream": 8 + -(-above * width // 4) * 16,
                "sums": taps * block * 8,
                "more": 0 if rows == height else block * 8,
                "window": 0 if plain else above * width * 2,
            }
        )

    def estimate(rows: int, block: int) -> float:
        """About how many instructions a pixel takes."""
        copies = (4 if plain else 7) * (rows + (taps - 1) * skip) / rows
        again = 0.0 if rows == height else 2 * block + taps * (9 * block + 50) / (rows * width)
        return float((copies + again + 1.4 * taps * block) * -(-outputs // block))

    blocks = {-(-outputs // n) // 2 * 2 for n in range(1, outputs // 2 + 1)} if groups == 1 else {2}
    choices = product([rows for rows in range(1, height + 1) if height % rows == 0], sorted(blocks))
    fitting = [choice for choice in choices if place(*choice)["end"] <= room]
    if not fitting:
        return None
    rows, block = min(fitting, key=lambda choice: estimate(*choice))
    at = place(rows, block)
    dot, passed = multiply(-(-rows * width // 4), 2, End(), unroll, load=load)
    more = {"height": rows, "block": block, "at": at, "passed": passed, "plain": plain, "hop": hop, "skip": skip}
    return make_form(kernel, context | more, "dsp/conv2d_weight_grad", at["end"], dot, COLUMNS)


def is_product(context: dict[str, Any]) -> bool:
    """Whether it is the whole weight gradient of a convolution of int8 by int8."""
    x, g = context["ins"]
    if context["tile"] or context["rows"] is not None or g["steps"]:
        return False
    return (x["dtype"], g["dtype"], context["acc"]) == ("int8", "int8", "int32_t")


def is_pointwise(context: dict[str, Any]) -> bool:
    """Whether it is that of a 1 x 1 convolution, stride 1, of one group."""
    attrs = context["attrs"]
    if not is_product(context) or any(attrs["padding"]) or attrs["groups"] > 1:
        return False
    return bool(context["out"]["shape"][1:3] == [1, 1] == attrs["strides"])

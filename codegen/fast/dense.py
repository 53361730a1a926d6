"""int8 matrix times vector."""

from typing import Any

from tte.codegen.fast.form import assembly, form, make_form
from tte.codegen.kernel import Kernel


@form(unroll=(4, 16, 8, 2))
def dense(kernel: Kernel, context: dict[str, Any], room: int, unroll: int) -> Kernel | None:
    """Four outputs at a time: (N, I) int8 by (O, I) int8 in one piece, 4 <= O, 4 <= I.

    unroll  groups of four elements of four rows in a loop at the most
    """
    x, w, *_ = context["ins"]
    channels, depth = w["shape"]
    if context["tile"] or x["steps"] or (x["dtype"], w["dtype"], context["acc"]) != ("int8", "int8", "int32_t"):
        return None
    scratch = depth // 4 * 8 + 16
    if len(w["segments"]) > 1 or channels < 4 or not 4 <= depth <= 4095 // 3 or scratch > room:
        return None
    groups = depth // 4
    unroll = min(groups, unroll)
    dot = {"groups": groups, "unroll": unroll, "depth": depth}
    parameters = ("const int16_t *a", "const int8_t *b", "int32_t *y")
    return make_form(kernel, context, "dsp/dense", scratch, assembly("dsp/dot1x4", dot, parameters))

"""int8 matrix times vector."""

from dataclasses import asdict
from typing import Any

from tte.codegen.fast.conv2d import SIZES, find_end
from tte.codegen.fast.form import SPREAD, assembly, form, lay_out, make_form
from tte.codegen.kernel import Kernel

DOT = ("const int16_t *a", "const int8_t *b", "void *y", "const uint32_t *ends")


@form(small={"unroll": 1}, unroll=(8, 16, 4, 2))
def dense(kernel: Kernel, context: dict[str, Any], room: int, unroll: int) -> Kernel | None:
    """Four outputs at a time: (N, I) int8 by (O, I) int8 in one piece, 4 <= O, 4 <= I.

    unroll  groups of eight elements of four rows in a loop at the most
    """
    x, w, *_ = context["ins"]
    channels, depth = w["shape"]
    if context["tile"] or x["steps"] or (x["dtype"], w["dtype"], context["acc"]) != ("int8", "int8", "int32_t"):
        return None
    end = find_end(context, channels)
    at = lay_out({"panel": depth * 2, "sums": 0 if end.result == "int8" else channels * SIZES[end.result]})
    if len(w["segments"]) > 1 or channels < 4 or depth < 4 or at["end"] > room:
        return None
    dot = {"depth": depth, "unroll": max(1, min(depth // 8, unroll))}
    parts = assembly("dsp/dot1x4", asdict(end) | dot, DOT), SPREAD
    return make_form(kernel, context | asdict(end) | {"at": at}, "dsp/dense", at["end"], *parts)

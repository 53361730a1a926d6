"""int8 kernels on vectors of 16 bytes, for cores with MVE (Cortex-M55)."""

from dataclasses import asdict, replace
from typing import Any

from tte.codegen.fast.conv2d import SIZES, End, find_end, share_out
from tte.codegen.fast.form import assembly, form, lay_out, limit, make_form
from tte.codegen.kernel import Kernel

DOT = ("const int8_t *a", "const uint8_t *stream", "void *y", "int pairs")
PACK = ("int8_t *to", "const int8_t *from", "int32_t *bias", "int less")
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
    end = find_end(context, channels)
    plain = kernel_size == [1, 1] and not any(attrs["padding"]) and (single_row or attrs["strides"] == [1, 1])
    gathered = w["dtype"] != "int8" or (len(w["segments"]) > 1 and w["axis"] != 0)

    def place(block: int) -> dict[str, int]:
        return lay_out(
            {
                "stream": (16 if end.scale == "none" else 32) + -(-taps // 16) * 64,
                "row": taps * gathered,
                "windows": 0 if plain else block * taps,
                "sums": 0 if end.result == "int8" else block * channels * SIZES[end.result],
            }
        )

    free = plain and end.result == "int8"
    shares = [pixels] if free else [share_out(pixels, n) for n in (512, 256, 128, 64, 32, 16, 8, 4) if n <= block]
    share = next((share for share in shares if place(share)["end"] <= room), 0)
    if not share:
        return None
    at, step = place(share), depth * attrs["strides"][1] if plain else taps
    dot = asdict(end) | {"depth": taps, "step": step, "stride": channels, "zero": find_zero(context, end)}
    parts = [
        assembly("mve/dot4x2", dot | {"unroll": UNROLL}, DOT),
        assembly("mve/pack", {"depth": taps}, PACK),
        *([limit(8)] if end.bits else []),
    ]
    more = asdict(end) | {"block": share, "at": at, "plain": plain, "step": step, "gathered": gathered}
    return make_form(kernel, context | more, "mve/conv2d", at["end"], *parts)


def find_zero(context: dict[str, Any], end: End) -> int:
    """The zero point of scaled sums."""
    return 0 if end.scale == "none" else int(context["tail"][0]["attrs"]["zero_point"])


@form()
def multiply_rows(kernel: Kernel, context: dict[str, Any], room: int) -> Kernel | None:
    """Four outputs at a time without scratch: (N, I) int8 by (O, I) int8 in one piece, or pixels by filters of 1 x 1."""
    x, w, *_ = context["ins"]
    channels, *kernel_size, depth = w["shape"]
    if context["tile"] or x["steps"] or (x["dtype"], w["dtype"], context["acc"]) != ("int8", "int8", "int32_t"):
        return None
    attrs = context["attrs"]
    if kernel_size and (kernel_size != [1, 1] or any(attrs["padding"]) or attrs["groups"] > 1):
        return None
    if len(w["segments"]) > 1 or channels < 4:
        return None
    end = replace(find_end(context, channels), bits=False)
    less = attrs.get("zero_point", 0)
    dot = asdict(end) | {"depth": depth, "less": less, "zero": find_zero(context, end)}
    part = assembly("mve/dot1x4", dot, ("const int8_t *x", "const int32_t *stream", "void *y", "const int8_t *w"))
    return make_form(kernel, context | asdict(end), "mve/direct", 0, part)

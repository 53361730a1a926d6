"""int8 depthwise convolutions on planes: four or two channels at a time are taken apart, each is then read by words."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tte.codegen.fast.conv2d import SIZES, find_end
from tte.codegen.fast.form import assembly, lay_out, make_form
from tte.codegen.kernel import Kernel

UNROLL = 4  # pairs of outputs in a loop at the most
BLOCKS = 16  # words of a row that are packed in a loop at the most
BANDS = (64, 32, 16, 8, 4, 2, 1)  # rows of the result that are made of planes of their own, at the most

Columns = tuple[int | None, int | None]  # what a word of a plane holds


@dataclass(frozen=True)
class Planes:
    """How a plane is read: its words in a row, by phases of the stride; ``template`` and what it has to know."""

    form: str
    row: Sequence[Columns]
    phases: int
    template: str
    more: Mapping[str, Any]
    table: int = 0  # words of weights that are made per channel


def convolve_channels(kernel: Kernel, context: dict[str, Any], room: int) -> Kernel | None:
    """(H, W, C) int8 by (C, KH, KW, 1) int8 or int16; windows without holes."""
    out, (x, w, *_), attrs, tile = context["out"], context["ins"], context["attrs"], context["tile"]
    channels, height, width = x["shape"][3], x["shape"][1], out["shape"][2]
    window = w["shape"][1:3]
    if x["steps"] or x["dtype"] != "int8" or context["acc"] != "int32_t" or w["shape"][0] != channels:
        return None
    if any(k > 1 and d > 1 for k, d in zip(window, attrs["dilation"], strict=True)):
        return None
    end = find_end(context, channels)
    if tile and (tile["sum"] or len(context["outs"]) > 1):
        return None
    planes = read_pairs(context)
    if planes is None:
        return None
    stride = attrs["strides"][0]
    pitch = len(planes.row)
    whole = 1 if context["rows"] is not None else out["shape"][1]

    def place(lanes: int, band: int) -> dict[str, int]:
        lines = (band - 1) * stride + window[0]
        sums = 0 if end.result == "int8" else band * width * (8 if end.bits else lanes) * SIZES[end.result]
        return lay_out({"planes": 4 * lanes * lines * pitch, "stream": 4 * (4 + planes.table), "sums": sums})

    choices = [
        (((band - 1) * stride + window[0]) / band * (7 if lanes == 4 else 10) + 12 / band, -band, lanes)
        for lanes in (4, 2)
        for band in {min(b, whole) for b in (whole, *BANDS)}
        if lanes <= channels and place(lanes, band)["end"] <= room
    ]
    if not choices:
        return None
    _, band, lanes = min(choices)
    band = -band
    at = place(lanes, band)
    lines = (band - 1) * stride + window[0]
    pack = {
        "form": planes.form,
        "phases": planes.phases,
        "row": planes.row,
        "lanes": lanes,
        "pitch": pitch,
        "plane": lines * pitch,
        "pixel": x["strides"][2],
        "line": x["strides"][1],
        "zero": attrs.get("zero_point", 0),
    } | _loop(planes, x["strides"][2])
    pixel = out["strides"][2] if end.result == "int8" else 8 if end.bits else lanes
    tall = 2 if band > 1 and planes.more["tall"] == 2 else 1
    read = {
        "window": window,
        "strides": attrs["strides"],
        "pitch": pitch,
        "width": width,
        "pixel": pixel,
        "line": out["strides"][1] if end.result == "int8" else width * pixel,
        "step": SIZES[w["dtype"]],
    } | asdict(end) | planes.more | {"tall": tall}
    more = {
        "band": band,
        "lanes": lanes,
        "at": at,
        "lines": lines,
        "pitch": pitch,
        "tall": tall,
        "pixel": pixel,
    } | asdict(end)
    parts = assembly("dsp/pack", pack), assembly(planes.template, read)
    return make_form(kernel, context | more, "dsp/depthwise", at["end"], *parts)


def read_pairs(context: Mapping[str, Any]) -> Planes | None:
    """Windows of at most 3 x 3: two columns to a word, the padding among them."""
    window, (_, stride) = context["ins"][1]["shape"][1:3], context["attrs"]["strides"]
    if max(window) > 3 or stride > 2:
        return None
    width, left = context["out"]["shape"][2], context["attrs"]["padding"][1]
    words = -(-width // 2) + 1 if stride == 1 else width + 1 + width % 2
    columns = context["ins"][0]["shape"][2]

    def column(i: int) -> int | None:
        return i - left if 0 <= i - left < columns else None

    row = [(column(2 * i), column(2 * i + 1)) for i in range(words)]
    tiles = width // 2
    unroll = -(-tiles // max(1, -(-tiles // UNROLL)))
    passes = tiles // max(1, unroll)
    more = {"tall": 2 if stride == 1 else 1, "unroll": unroll, "passes": passes if passes > 1 else 0}
    return Planes("pairs", row, 1, "dsp/window3", more)


def _loop(planes: Planes, pixel: int) -> dict[str, int]:
    """Which blocks of a row are packed in a loop: from "begin" on, "unroll" of them in each of its "passes"."""
    phases = planes.phases
    blocks = len(planes.row) // phases
    full = [i for i in range(blocks) if all(None not in planes.row[f * blocks + i] for f in range(phases))]
    unroll = max(1, min(BLOCKS // phases, 4095 // (2 * phases * pixel)))
    if len(full) * phases <= BLOCKS and full and 2 * phases * len(full) * pixel < 4096 or len(full) < 2 * unroll:
        return {"begin": 0, "unroll": 0, "passes": 0}
    passes = -(-len(full) // unroll)
    unroll = len(full) // passes
    return {"begin": full[0], "unroll": unroll, "passes": passes}

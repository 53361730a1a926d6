"""int8 depthwise convolutions on planes: a few channels at a time are taken apart, each is then read by words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tte.codegen.fast.conv2d import SIZES, End, find_end, find_gradient_end
from tte.codegen.fast.form import LIMIT, assembly, form, lay_out, make_form, pass_on
from tte.codegen.kernel import Kernel

BLOCKS = 8  # words of a row that are packed in a loop at the most
WIDEST = 128  # outputs of a row each of which has code of its own, at the most
SHORT = 4  # rows of a result each of which has code of its own, at the most
BANDS = (64, 32, 16, 8, 4, 2, 1)
PACKING = {4: 1.5, 2: 1.8, 1: 3.0}  # channels at a time: instructions per element
PACK = ("const int8_t *x", "uint32_t *y", "int rows")
READ = ("const uint32_t *x", "uint32_t *stream", "void *y", "int times")
ANY_PACK = (*PACK, "int columns", "int before", "int behind", "int pixel", "int rest", "int plane", "uint32_t add")
ANY_READ = (*READ, "int pitch", "int pixel", "int width", "int line", "int shift")

ANY = ("window", "strides", "step", "scale", "result")  # what functions for all shapes are made for

Columns = tuple[int | None, int | None]  # what a word holds


@dataclass(frozen=True)
class Planes:
    """What a plane holds and what reads it.

    form      of a word, see dsp/pack
    row       the words of a row, by ``phases`` of the stride
    template  of the function that reads a plane, and ``more`` that it has to know
    tall      rows of the result that it makes at once, where there are so many
    table     words of weights that it makes for each channel
    """

    form: str
    row: Sequence[Columns]
    phases: int
    template: str
    more: Mapping[str, Any]
    tall: int = 1
    table: int = 0


@dataclass(frozen=True)
class Band:
    """``rows`` of the result that are made of planes of their own, of ``lanes`` channels at a time."""

    context: Mapping[str, Any]
    planes: Planes
    end: End
    lanes: int
    rows: int

    @property
    def within(self) -> bool:
        """Rows beside the picture are left out; else they are zero."""
        whole = self.context["rows"] is None and self.rows == self.context["out"]["shape"][1]
        return whole and self.rows <= SHORT and self.planes.form == "terms"

    @property
    def lines(self) -> int:
        """Rows of the planes."""
        (height, _), (_, window, _, _) = find_extent(self.context), self.context["ins"][1]["shape"]
        stride: int = self.context["attrs"]["strides"][0]
        return height if self.within else (self.rows - 1) * stride + int(window)

    @property
    def at(self) -> dict[str, int]:
        """Where things lie in the scratch."""
        width, planes = self.context["out"]["shape"][2], self.planes
        sums = self.rows * width * (8 if self.end.bits else self.lanes) * SIZES[self.end.result]
        sizes = {
            "planes": 4 * self.lanes * self.lines * len(planes.row),
            "stream": 4 * (4 + planes.table),
            "sums": 0 if self.end.result == "int8" else sums,
        }
        return lay_out(sizes)

    @property
    def cost(self) -> float:
        """Instructions per row of all channels, about: packing, reading, and what is done once per band."""
        (_, _, width, channels), (_, height, length, _) = (tensor["shape"] for tensor in self.context["ins"][:2])
        packing = (self.lines * width * PACKING[self.lanes] + 50) / self.rows
        reading = self.context["out"]["shape"][2] * (height * length / 2 + 5)
        times = -(-channels // self.lanes)  # the last ones begin earlier: some channels are made twice
        return float((packing + reading) * self.lanes * times)


KNOBS = {
    "most": (16384, 8192, 32768, 65536),  # bytes of scratch, where more than one row is made at once
    "lanes": (4, 2, 1),  # channels at a time, at the most
    "unroll": (4,),  # pairs of outputs in a loop at the most; 0: functions for all shapes
}


@form(small={"unroll": 0}, **KNOBS)
def convolve_channels(
    kernel: Kernel, context: dict[str, Any], room: int, most: int, lanes: int, unroll: int
) -> Kernel | None:
    """(H, W, C) int8 by (C, KH, KW, 1) int8 or int16; windows without holes. Knobs: see ``KNOBS``."""
    end = find_end(context, context["ins"][0]["shape"][3])
    return _convolve(kernel, context | {"turned": False, "spread": [1, 1]}, end, room, most, lanes, unroll)


@form(small={"unroll": 0}, **KNOBS)
def convolve_channels_back(
    kernel: Kernel, context: dict[str, Any], room: int, most: int, lanes: int, unroll: int
) -> Kernel | None:
    """The input gradient: the same with windows from their ends."""
    turned = turn_windows(context)
    return _convolve(kernel, turned, find_gradient_end(context), room, most, lanes, unroll) if turned else None


def turn_windows(context: dict[str, Any]) -> dict[str, Any] | None:
    """An input gradient as the convolution by windows from their ends that it is.

    spread: how far what it reads is apart, down and across, with zeros in between
    """
    channels, window = context["ins"][0]["shape"][3], context["ins"][1]["shape"][1:3]
    attrs, out = context["attrs"], context["out"]["shape"]
    if len(context["ins"]) > 2 or out[3] != channels or context["rows"] is not None or context["tile"]:
        return None
    reach = [(k - 1) * d for k, d in zip(window, attrs["dilation"], strict=True)]
    before = [n - pad for n, pad in zip(reach, attrs["padding"][:2], strict=True)]
    turned = context | {"turned": True, "spread": attrs["strides"]}
    after = [n - span - p + r for n, span, p, r in zip(out[1:3], find_extent(turned), before, reach, strict=True)]
    if min(*before, *after) < 0:
        return None
    return turned | {"attrs": attrs | {"padding": [*before, *after], "strides": [1, 1]}}


def find_extent(context: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of what is read, spread."""
    down, across = (
        (n - 1) * apart + 1 for n, apart in zip(context["ins"][0]["shape"][1:3], context["spread"], strict=True)
    )
    return down, across


def find_column(context: Mapping[str, Any], i: int) -> int | None:
    """The column that stands at place ``i`` when all are spread; None where none does."""
    column, left = divmod(i, context["spread"][1])
    return column if left == 0 and 0 <= column < context["ins"][0]["shape"][2] else None


def _convolve(
    kernel: Kernel, context: dict[str, Any], end: End, room: int, most: int, widest: int, unroll: int
) -> Kernel | None:
    out, (x, w, *_), attrs, tile = context["out"], context["ins"], context["attrs"], context["tile"]
    channels, window = x["shape"][3], w["shape"][1:3]
    if x["steps"] or x["dtype"] != "int8" or context["acc"] != "int32_t" or w["shape"][0] != channels:
        return None
    if any(k > 1 and d > 1 for k, d in zip(window, attrs["dilation"], strict=True)):
        return None
    if tile and (tile["sum"] or len(context["outs"]) > 1):
        return None
    planes = (read_pairs(context, unroll) if unroll else read_columns(context)) or read_terms(context)
    if planes is None or len(planes.row) > 1000:  # 4095 bytes are what an offset reaches
        return None
    height = 1 if context["rows"] is not None else out["shape"][1]
    heights = {min(rows, height) for rows in (height, *BANDS)}
    bands = [
        Band(context, planes, end, lanes, rows)
        for lanes in PACKING
        if lanes <= min(channels, widest)
        for rows in heights
    ]
    fitting = [b for b in bands if b.at["end"] <= (room if b.rows == 1 else min(room, most))]
    if not fitting:
        return None
    band = min(fitting, key=lambda b: (b.cost, b.lanes, b.rows))
    pixel = out["strides"][2] if end.result == "int8" else 8 if end.bits else band.lanes
    own: dict[str, Any] = {"pitch": len(planes.row), "tall": min(planes.tall, band.rows), "pixel": pixel}
    own |= {"scale": end.scale, "shift": end.shift, "result": end.result}
    pack = {
        "form": planes.form,
        "row": planes.row,
        "phases": planes.phases,
        "lanes": band.lanes,
        "pitch": len(planes.row),
        "plane": band.lines * len(planes.row),
        "pixel": x["strides"][2],
        "line": x["strides"][1],
        "zero": attrs.get("zero_point", 0),
        "apart": context["spread"][0],
    }
    read = own | {
        "window": window,
        "strides": attrs["strides"],
        "width": out["shape"][2],
        "line": out["strides"][1] if end.result == "int8" else out["shape"][2] * pixel,
        "step": SIZES[w["dtype"]],
    }
    if planes.form == "terms":
        read["runs"] = _rows(band.lines, window[0], attrs["strides"][0], attrs["padding"][0] * band.within, band.rows)
    packed = passed = ""
    if planes.form == "columns":
        parts = [
            assembly("dsp/pack_any", {"lanes": band.lanes}, ANY_PACK),
            assembly(
                planes.template, {k: read[k] for k in ANY} | dict(planes.more) | {"shift": end.shift > 0}, ANY_READ
            ),
        ]
        packed, passed = _describe_row(pack, planes), _describe_result(read)
    else:
        parts = [
            assembly("dsp/pack", pack | _loop(planes, x["strides"][2], context["spread"][1]), PACK),
            assembly(planes.template, read | dict(planes.more), READ),
        ]
    parts += [LIMIT] if end.bits else []
    more = own | {"lanes": band.lanes, "bits": end.bits, "band": band.rows, "lines": band.lines, "within": band.within}
    more |= {"packed": packed, "passed": passed}
    return make_form(kernel, context | more | {"at": band.at}, "dsp/depthwise", band.at["end"], *parts)


def read_columns(context: Mapping[str, Any]) -> Planes | None:
    """Windows of at most 7 x 7: two columns to a word, the padding among them, for functions that serve all shapes."""
    window, (_, stride) = context["ins"][1]["shape"][1:3], context["attrs"]["strides"]
    width, left = context["out"]["shape"][2], context["attrs"]["padding"][1]
    if max(window) > 7 or max(context["attrs"]["strides"]) > 2 or context["spread"] != [1, 1]:
        return None
    words = -(-width // 2) + window[1] // 2 if stride == 1 else width + width % 2 + (window[1] + 1) // 2 - 1
    places = [find_column(context, i - left) for i in range(2 * words)]
    row = list(zip(places[::2], places[1::2], strict=True))
    table = window[0] * ((window[1] + 1) // 2 + (window[1] // 2 + 1 if stride == 1 else 0))
    return Planes("columns", row, 1, "dsp/window_any", {"odd": width % 2}, table=table)


def _describe_row(pack: Mapping[str, Any], planes: Planes) -> str:
    """What pack_any has to know."""
    inside = [c is not None for word in planes.row for c in word]
    columns, before = sum(inside), inside.index(True) if any(inside) else len(inside)
    rest = pack["line"] - columns * pack["pixel"]
    numbers = (columns, before, len(inside) - columns - before, pack["pixel"], rest, 4 * pack["plane"])
    return f"{pass_on(*numbers)}, {-pack['zero'] % 65536 * 65537}u"


def _describe_result(read: Mapping[str, Any]) -> str:
    """What window_any has to know."""
    size = SIZES[read["result"]]
    width = read["width"] * read["pixel"]
    return pass_on(4 * read["pitch"], size * read["pixel"], size * width, size * read["line"], read["shift"])


def read_pairs(context: Mapping[str, Any], most: int) -> Planes | None:
    """Windows of at most 3 x 3: two columns to a word, the padding among them; ``most`` pairs of outputs in a loop."""
    window, (_, stride) = context["ins"][1]["shape"][1:3], context["attrs"]["strides"]
    width, left = context["out"]["shape"][2], context["attrs"]["padding"][1]
    if max(window) > 3 or stride > 2 or (stride == 1 and width < 4):
        return None
    words = -(-width // 2) + 1 if stride == 1 else width + 1 + width % 2
    row = [(find_column(context, 2 * i - left), find_column(context, 2 * i + 1 - left)) for i in range(words)]
    tiles = width // 2
    unroll = -(-tiles // max(1, -(-tiles // most)))
    passes = tiles // max(1, unroll)
    more = {"unroll": unroll, "passes": passes if passes > 1 else 0}
    return Planes("pairs", row, 1, "dsp/window3", more, tall=2)


def read_terms(context: Mapping[str, Any]) -> Planes | None:
    """Windows of at most 64 elements as products of polynomials of two columns: X = u + v z by V = w0 + w1 z, z = 2^21.

    A sum of products has three lanes, of z^0, z^1 and z^2: the second is an output, the third and the first of the next
    sum are two parts of the one between. 255 * 128 * 64 < 2^21, so that no lane runs into the next.
    """
    (height, length), (_, stride) = context["ins"][1]["shape"][1:3], context["attrs"]["strides"]
    width, left, (_, columns) = context["out"]["shape"][2], context["attrs"]["padding"][1], find_extent(context)
    if height * length > 64 or width > WIDEST:
        return None
    blocks = -(-columns // (2 * stride))
    best = min((_multiply(width, columns, length, left, stride, blocks, odd) for odd in (0, 1)), key=lambda p: p[0])
    _, taps, groups = best

    places = [(stride * 2 * i + f, stride * (2 * i + 1) + f) for f in range(stride) for i in range(blocks)]
    row = [(find_column(context, a), find_column(context, b)) for a, b in places]
    more = {"taps": taps, "groups": groups, "zero": context["attrs"].get("zero_point", 0)}
    return Planes("terms", row, stride, "dsp/terms", more, table=len(taps) * height)


def _multiply(
    width: int, columns: int, length: int, left: int, stride: int, blocks: int, odd: int
) -> tuple[int, list[Columns], list[dict[str, Any]]]:
    """How many products a row takes, the taps of each word of weights, and what groups of three sums add and give.

    The outputs in the middle of a sum are the ``odd`` ones where odd is 0.
    """
    outputs = {}  # output -> the sum it is in the middle of, or the first of two
    for j in range(width):
        outputs[j] = ("middle", (j - odd - 1) // 2) if (j - odd) % 2 else ("between", (j - odd) // 2 - 1)
    sums = sorted({c + d for kind, c in outputs.values() for d in ((0,) if kind == "middle" else (0, 1))})
    taps: list[Columns] = []
    products: dict[int, list[tuple[int, int]]] = {c: [] for c in sums}  # sum -> (word of the row, word of weights)
    for f in range(stride):
        at = {(f + left - i) // stride: i for i in range(length) if (f + left - i) % stride == 0}
        words = -(-len(range(f, columns, stride)) // 2)
        for b in sorted({(t - odd) // 2 for t in at}):
            for a in range(words):
                if a + b in products:
                    products[a + b].append((f * blocks + a, len(taps)))
            taps.append((at.get(2 * b + odd), at.get(2 * b + odd + 1)))
    groups = []
    for i in range(0, len(sums), 3):
        part = sums[i : i + 3]
        steps = []
        for first in range(0, len(taps), 4):
            chunk = range(first, min(first + 4, len(taps)))
            words_used = sorted({x for c in part for x, v in products[c] if v in chunk})
            steps.append(
                {
                    "first": first,
                    "count": len(chunk),
                    "words": words_used,
                    "products": [[k, x, v - first] for k, c in enumerate(part) for x, v in products[c] if v in chunk],
                }
            )
        ends = []
        for j, (kind, c) in outputs.items():
            if kind == "middle" and c in part:
                ends.append([j, kind, part.index(c)])
            elif kind == "between" and c + 1 in part:
                ends.append([j, kind if c in part else "carried", part.index(c + 1)])
        ends.sort(key=lambda e: (e[2], e[1] == "middle"))
        carries = bool(i + 3 < len(sums)) and ("between", part[-1]) in outputs.values()
        groups.append({"sums": len(part), "steps": steps, "ends": ends, "carries": carries})
    return sum(map(len, products.values())), taps, groups


def _rows(height: int, window: int, stride: int, above: int, result: int) -> list[dict[str, Any]]:
    """Rows of the result in order: the rows of the window that lie inside, and how often in sequence."""
    runs: list[dict[str, Any]] = []
    for r in range(result):
        inside = [k for k in range(window) if 0 <= r * stride + k - above < height]
        start = max(0, r * stride - above)
        if runs and runs[-1]["inside"] == inside and start == runs[-1]["start"] + runs[-1]["count"] * stride:
            runs[-1]["count"] += 1
        else:
            runs.append({"inside": inside, "start": start, "count": 1})
    return runs


def _loop(planes: Planes, pixel: int, apart: int) -> dict[str, int]:
    """Which blocks of a row are packed in a loop: from "begin" on, "unroll" of them in each of its "passes"."""
    none = {"begin": 0, "unroll": 0, "passes": 0}
    if apart > 1:
        return none
    phases = planes.phases
    blocks = len(planes.row) // phases
    full = [i for i in range(blocks) if all(None not in planes.row[f * blocks + i] for f in range(phases))]
    unroll = max(1, min(BLOCKS // phases, 4095 // (2 * phases * pixel)))
    if len(full) * phases <= BLOCKS and full and 2 * phases * len(full) * pixel < 4096 or len(full) < 2 * unroll:
        return none
    passes = -(-len(full) // unroll)
    unroll = len(full) // passes
    if planes.form == "pairs":  # two at a time: as few as can be are left for one
        unroll = min(range(2, unroll + 3, 2), key=lambda n: (len(full) % n, -n))
        passes = len(full) // unroll
    return {"begin": full[0], "unroll": unroll, "passes": passes}

"""int8 convolutions as products of matrices of 16 bits."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tte.codegen.fast.form import LIMIT, SPREAD, WIDEN, WIDEN_PAIRS, assembly, form, lay_out, make_form, pass_on
from tte.codegen.kernel import Kernel
from tte.ops.quantized import fixed_terms

DOT = ("const uint32_t *a", "const uint32_t *b", "void *y", "int pairs")
RAW_DOT = ("const int8_t *a", *DOT[1:], "uint32_t add")
ANY_DOT = (*DOT, "int groups", "int next", "int shift")
GATHER = ("uint32_t *y", "const int8_t *a", "const int8_t *b", "const int *at", "uint32_t add")
DIRECT = ("const int8_t *a", "const int8_t *b", "int32_t *y", "int n", "uint32_t add")
SIZES = {"int8": 1, "int16": 2, "int32": 4}


@form(small={"unroll": 0}, block=(128, 256, 512), unroll=(16, 32, 64), thin=(8, 64), load=(4, 1))
def convolve(
    kernel: Kernel, context: dict[str, Any], room: int, block: int, unroll: int, thin: int, load: int
) -> Kernel | None:
    """Two pixels times two channels at a time: (H, W, C) int8 by (O, KH, KW, C) int8 or int16.

    block   pixels of a block at the most: each block widens all weights
    unroll  groups of four products in a loop at the most: code against four instructions per round; 0: see ``multiply``
    thin    groups of an output up to which a loop makes several pairs of pixels
    load    words of a load: 4, or 1 between the products, more instructions that some cores execute two at a time
    """
    if (size := find_size(context)) is None:
        return None
    (pixels, channels, depth), w = size, context["ins"][1]
    groups, plain = -(-depth // 4), is_plain(context)
    end, added = find_end(context, channels), find_sum(context) if unroll else None
    quads = plain and all(part["start"] % 4 == 0 == part["stop"] % 4 for part in w["segments"])
    joined = w["dtype"] == "int16" or (is_split(w) and not quads)
    runs, n = ([], 0) if plain else list_runs(context)

    def place(block: int) -> dict[str, int]:
        last = add_sum(end, added, pixels, channels, block)
        window = 2 * depth if runs or joined else 0
        return lay_out(list_parts(block, groups, last.sums, last) | {"window": window})

    block = next((share for share in list_shares(pixels, block) if place(share)["end"] <= room), 0)
    if not block:
        return None
    at, end = place(block), add_sum(end, added, pixels, channels, block)
    stride = end.sums or channels
    if 2 * stride > 4094:  # what a store reaches
        return None
    pairs = find_pairs(block, groups, stride, end, thin)
    dot, passed = multiply(groups, stride, end, unroll, pairs, load)
    even = plain and (context["rows"] is not None or context["attrs"]["strides"] == [1, 1])  # pixels are evenly apart
    more = asdict(end) | {"block": block, "at": at, "runs": runs, "joined": joined, "passed": passed, "added": added}
    more |= {"even": even, "stride": stride}
    widen = assembly("dsp/gather", {"runs": len(runs), "n": n}, GATHER) if runs else WIDEN
    parts = dot, widen, *([WIDEN_PAIRS] if even else []), *([LIMIT] if end.bits else [])
    return make_form(kernel, context | more, "dsp/conv2d", at["end"], *parts)


@form(small={"unroll": 0}, unroll=(16, 32, 64), thin=(8, 64), load=(4, 1))
def convolve_raw(
    kernel: Kernel, context: dict[str, Any], room: int, unroll: int, thin: int, load: int
) -> Kernel | None:
    """The same by less scratch: only the weights of two filters of 1 x 1 are widened, or parts of them, one after the
    other, to which sums go on; pixels as they are read. Knobs: see ``convolve``; without ``unroll`` there is none."""
    if (size := find_size(context)) is None or not is_plain(context) or not unroll:
        return None
    (x, w, *_), (pixels, channels, depth) = context["ins"], size
    apart = x["strides"][2] * context["attrs"]["strides"][1]
    if (context["rows"] is None and context["attrs"]["strides"] != [1, 1]) or apart + depth > 4095:
        return None
    if w["dtype"] == "int16" or is_split(w):
        return None
    end, added = find_end(context, channels), find_sum(context)

    def place(block: int, part: int) -> dict[str, int]:
        last = add_sum(end, added, pixels, channels, block)
        going_on = {"going_on": 8 * block if part < depth else 0}
        return lay_out(list_parts(block, -(-part // 4), last.sums, last) | {"panel": 0} | going_on)

    parts = [depth, *(-(-depth // n // 4) * 4 for n in (2, 3, 4, 6, 8) if depth >= 16 * n)]
    ways = [(share, part) for part in parts for share in list_shares(pixels, 512) if part == depth or share % 2 == 0]
    way = next((way for way in ways if place(*way)["end"] <= room), None)
    if way is None:
        return None
    (block, part), at = way, place(*way)
    end = add_sum(end, added, pixels, channels, block)
    stride, rest = end.sums or channels, depth - (-(-depth // part) - 1) * part
    if 2 * stride > 4094:  # what a store reaches
        return None
    pairs = find_pairs(block, -(-rest // 4), stride, end, thin)
    whole = part == depth
    dots = [multiply_raw(rest, apart, stride, end, unroll, pairs, load, not whole)]
    if not whole:
        dots.append(multiply_raw(part, apart, 2, End(), unroll, 1, load, True))
    more = asdict(end) | {"block": block, "at": at, "added": added, "part": part, "rest": rest, "stride": stride}
    return make_form(kernel, context | more, "dsp/conv2d_raw", at["end"], WIDEN, *dots, *([LIMIT] if end.bits else []))


def find_size(context: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Pixels, channels, and products of a sum, of a convolution of int8 that is in one piece; None of others."""
    out, (x, w, *_) = context["out"], context["ins"]
    pixels = out["shape"][2] * (1 if context["rows"] is not None else out["shape"][1])
    channels, height, width, depth = w["shape"]
    whole = not context["tile"] and not x["steps"] and context["attrs"]["groups"] == 1
    integers = x["dtype"] == "int8" and context["acc"] == "int32_t"
    return (pixels, channels, height * width * depth) if whole and integers and min(pixels, channels) > 1 else None


def is_plain(context: Mapping[str, Any]) -> bool:
    """Filters of 1 x 1 without padding."""
    return bool(context["ins"][1]["shape"][1:3] == [1, 1] and not any(context["attrs"]["padding"]))


def is_split(w: Mapping[str, Any]) -> bool:
    """A filter lies in several pieces."""
    return len(w["segments"]) > 1 and w["axis"] == 3


def add_sum(end: "End", added: Mapping[str, Any] | None, pixels: int, channels: int, block: int) -> "End":
    """The end with a sum with another tensor, if it can be done: what is written over must be read once."""
    once = pixels % block == block % 2 == channels % 2 == 0
    if not added or end.scale == "none" or (added["c"] == "y0" and not once):
        return end
    return replace(end, result="int8", adds=added["bits"])


def list_runs(context: Mapping[str, Any]) -> tuple[list[tuple[int, int]], int]:
    """Where the runs of elements under a window begin, in a filter and in the picture, and how long they are."""
    (x, w, *_), (down, across) = context["ins"], context["attrs"]["dilation"]
    _, height, width, depth = w["shape"]
    places = range(width if across > 1 else 1)  # a run to itself in a row
    n = width // len(places) * depth
    rows, columns = x["strides"][1] * down, x["strides"][2] * across
    return [((kh * len(places) + kw) * n, kh * rows + kw * columns) for kh in range(height) for kw in places], n


def list_parts(block: int, groups: int, channels: int, end: "End") -> dict[str, int]:
    """Bytes of the scratch of a product by dot2x2: ``block`` rows of so many groups of four, by ``channels``."""
    return {
        "panel": -(-block // 2) * groups * 16,
        "stream": (2 + groups * 4 + (0 if end.scale == "none" else 7 if end.adds else 3)) * 4,
        "sums": 0 if end.result == "int8" else block * channels * SIZES[end.result],
    }


def find_pairs(block: int, groups: int, channels: int, end: "End", thin: int) -> int:
    """Pairs of rows that a loop makes: more where sums are short, so that the loop itself counts, and stores reach."""
    most = 4 if groups <= 4 else 2 if groups <= thin else 1
    return next(
        (n for n in (4, 2) if n <= most and not block % (2 * n) and 2 * n * channels * SIZES[end.result] < 4096), 1
    )


def multiply(groups: int, channels: int, end: "End", unroll: int, pairs: int = 1, load: int = 4) -> tuple[Kernel, str]:
    """dot2x2, and what is passed to it, too.

    unroll: groups in a loop at the most, of which all loops have about as many; 0: a function for all shapes
    """
    if not unroll:
        own = asdict(end) | {"shift": end.shift > 0, "bits": False}
        return assembly("dsp/dot2x2_any", own, ANY_DOT), pass_on(groups, channels * SIZES[end.result], end.shift)
    even = -(-groups // -(-groups // unroll))
    own = {"groups": groups, "unroll": even, "stride": channels, "pairs": pairs, "load": load}
    own |= {"raw": None, "going_on": False}
    return assembly("dsp/dot2x2", asdict(end) | own, DOT), ""


def multiply_raw(
    n: int, apart: int, channels: int, end: "End", unroll: int, pairs: int, load: int, going_on: bool
) -> Kernel:
    """dot2x2 of n bytes of pixels that are so many bytes apart; going_on: from sums that are there."""
    groups = -(-n // 4)
    own = {"groups": groups, "unroll": unroll, "stride": channels, "pairs": pairs, "load": load, "raw": (n, apart)}
    parameters = (*RAW_DOT, "const int32_t *sums") if going_on else RAW_DOT
    return assembly("dsp/dot2x2", asdict(end) | own | {"going_on": going_on}, parameters)


def list_shares(pixels: int, most: int) -> list[int]:
    """How many pixels a block may have, where all have about as many: the last begins earlier, and makes some again."""
    limits = [limit for limit in (512, 256, 128, 64, 32, 16, 8, 4) if limit <= most]
    even = [-(-pixels // -(-pixels // limit)) for limit in limits]
    return [min(pixels, -(-share // 4) * 4) for share in even]


@form(small={"unroll": 0}, block=(512, 256, 128), unroll=(16, 8, 4))
def convolve_thin(kernel: Kernel, context: dict[str, Any], room: int, block: int, unroll: int) -> Kernel | None:
    """One filter at a time by pixels of 4 or 8 channels: filters of 1 x 1 and stride 1, int8, fixed-point scales.

    block   pixels of a block at the most
    unroll  pixels in a loop at the most; 0: none, there is code for all shapes
    """
    if (size := find_size(context)) is None or not is_plain(context) or not unroll:
        return None
    (pixels, channels, depth), w = size, context["ins"][1]
    end = find_end(context, channels)
    if context["attrs"]["strides"] != [1, 1] or w["dtype"] == "int16" or is_split(w):
        return None
    if depth not in (4, 8) or end.scale == "float":
        return None
    sums = min(end.sums, 8 if end.bits else 1)
    stride = sums or channels

    def place(block: int) -> dict[str, int]:
        sizes = {"panel": 2 * block * depth, "stream": 2 * depth + 12, "sums": block * sums * SIZES[end.result]}
        return lay_out(sizes)

    block = next((share for share in list_shares(pixels, block) if place(share)["end"] <= room), 0)
    unroll = next((n for n in range(unroll, 3, -1) if block and block % n == 0), 0)
    if not unroll or stride * SIZES[end.result] * (unroll - 1) > 4095:
        return None
    dot = {"words": depth // 2, "pixels": block, "unroll": unroll, "stride": stride}
    more = asdict(end) | {"words": depth // 2, "block": block, "at": place(block)}
    parts = assembly("dsp/thin", asdict(end) | dot, DOT), SPREAD, *([LIMIT] if end.bits else [])
    return make_form(kernel, context | more, "dsp/conv2d_thin", more["at"]["end"], *parts)


@form()
def convolve_directly(kernel: Kernel, context: dict[str, Any], room: int) -> Kernel | None:
    """The same without scratch: filters of 1 x 1 and stride 1, int8, whole or split by the channels that they read."""
    if (size := find_size(context)) is None or not is_plain(context):
        return None
    (_, _, depth), w = size, context["ins"][1]
    whole = len(w["segments"]) == 1 or w["axis"] == 3
    if w["dtype"] != "int8" or context["attrs"]["strides"] != [1, 1] or not whole or depth > 4095:
        return None
    ends = [depth] if len(w["segments"]) == 1 else [part["stop"] - part["start"] for part in w["segments"]]
    parts = [assembly("dsp/direct2x2", {"pixel": depth, "filter": n}, DIRECT) for n in ends]
    return make_form(kernel, context, "dsp/conv2d_direct", 0, *parts)


@dataclass(frozen=True)
class End:
    """How sums leave the assembly.

    scale   "fixed", "float", or "none"; shift: of the multiplier, beyond 32 bits of fraction
    result  "int8": finished, "int16": scaled, to be limited, "int32": sums
    bits    eight at a time become int8 and bits
    adds    bits of a sum with another tensor that are shifted out; 0: there is none
    sums    channels of which sums are kept until they are finished; 0: they are
    """

    scale: str = "none"
    shift: int = 0
    result: str = "int32"
    bits: bool = False
    adds: int = 0

    @property
    def sums(self) -> int:
        return 0 if self.result == "int8" else 8 if self.bits else 2


def find_end(context: Mapping[str, Any], channels: int) -> End:
    """What of the tail can be done at once."""
    tail = context["tail"]
    if not tail or tail[0]["op"] != "qnn_requantize" or len(tail[0]["operands"]) != 2:
        return End()
    attrs, multiplier = tail[0]["attrs"], tail[0]["operands"][1]
    per_channel = multiplier["kind"] == "literal" or not any(multiplier.get("strides", [1])[:-1])
    scale = "float" if attrs["types"][1] == "float32" else "fixed"
    if attrs["average"] or not per_channel or attrs["shift"] > 0:
        return End()
    full, single = (attrs["low"], attrs["high"]) == (-128, 127), len(tail) == 1
    if full and single and not attrs["mask"]:
        return End(scale, -attrs["shift"], "int8")
    return End(scale, -attrs["shift"], "int16", full and single and channels % 8 == 0)


def find_sum(context: Mapping[str, Any]) -> dict[str, Any] | None:
    """A sum with another tensor behind the rescaling, in integers: result * of + other * by + start, less its bits."""
    first, *rest = context["tail"] or [None]
    if len(rest) != 1 or rest[0]["op"] != "qnn_add" or first["op"] != "qnn_requantize":
        return None
    limits = [
        (step["attrs"]["low"], step["attrs"]["high"], step["attrs"].get("mask", False)) for step in (first, *rest)
    ]
    attrs, operands, bits = rest[0]["attrs"], rest[0]["operands"], rest[0]["attrs"]["bits"]
    others = [o for o in operands if o["kind"] == "flat" and o["dtype"] == "int8"]
    if limits != [(-128, 127, False)] * 2 or attrs["tflite"] or not 0 < bits < 32 or len(others) != 1:
        return None
    a, b = fixed_terms(attrs["a_scale"], attrs["b_scale"], attrs["scale"], bits)
    start = (attrs["zero_point"] << bits) + (1 << bits >> 1) - a * attrs["a_zero"] - b * attrs["b_zero"]
    reach = 128 * (abs(a) + abs(b)) + abs(start)
    of, by = (b, a) if operands[0] in others else (a, b)
    return {"c": others[0]["c"], "of": of, "by": by, "start": start, "bits": bits} if reach < 2**31 else None


def find_gradient_end(context: Mapping[str, Any]) -> End:
    """Sums leave as int8 where they are only rescaled, and masks applied."""
    tail = context["tail"]
    if not tail or tail[0]["op"] != "qnn_rescale_gradient" or tail[0]["operands"][0]["kind"] != "register":
        return End()
    masks = all(step["op"] == "nn_apply_mask" and step["operands"][1]["kind"] == "flat" for step in tail[1:])
    return End("fixed", 0, "int8") if masks else End()

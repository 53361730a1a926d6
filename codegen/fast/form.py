"""What all faster forms of kernels are made with."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from types import MappingProxyType
from typing import Any

from tte.codegen.kernel import SCRATCH, Kernel

Knobs = Mapping[str, int]
Choice = tuple[str, Knobs]  # the name of a form, and its knobs


@dataclass(frozen=True)
class Form:
    """A faster way to compute what a kernel computes.

    make   (kernel, context, room, one argument per knob) -> a kernel, or None for what it does not serve or has no room
           for
    knobs  the values that may be chosen of each, the default first. They are limits: any serves any shape.
    small  what is chosen where code is to be small
    """

    make: Callable[..., Kernel | None]
    knobs: Mapping[str, tuple[int, ...]]
    small: Knobs

    @property
    def name(self) -> str:
        return self.make.__name__

    @property
    def default(self) -> Knobs:
        return {name: values[0] for name, values in self.knobs.items()}

    def __call__(self, kernel: Kernel, room: int, chosen: Knobs) -> Kernel | None:
        """Defaults for what is not chosen."""
        return self.make(kernel, kernel.arguments(), room, **{**self.default, **chosen})

    def takes(self, chosen: Knobs) -> bool:
        return all(value in self.knobs.get(name, ()) for name, value in chosen.items())

    def list_knobs(self) -> list[Knobs]:
        """Of all values each with each, the default first."""
        return [dict(zip(self.knobs, values, strict=True)) for values in product(*self.knobs.values())]


def form(
    small: Knobs = MappingProxyType({}), **knobs: tuple[int, ...]
) -> Callable[[Callable[..., Kernel | None]], Form]:
    """Declares a form by what makes it."""
    return lambda make: Form(make, knobs, small)


def lay_out(sizes: Mapping[str, int]) -> dict[str, int]:
    """Offsets of the parts of a scratch, each aligned to 4, and its "end"."""
    ends = accumulate((-(-size // 4) * 4 for size in sizes.values()), initial=0)
    return dict(zip([*sizes, "end"], ends, strict=True))


def make_form(kernel: Kernel, context: Mapping[str, Any], template: str, scratch: int, *parts: Kernel) -> Kernel:
    """``kernel`` by another template; ``parts`` are what it calls."""
    arguments = [*context["args"], SCRATCH] if scratch else context["args"]
    text = json.dumps(dict(context) | {"args": arguments}, sort_keys=True)
    return Kernel(template, text, parts, scratch, kernel)


def use_stack(kernel: Kernel) -> Kernel:
    """The same with its scratch on the stack."""
    context = kernel.arguments()
    context |= {"args": [a for a in context["args"] if a != SCRATCH], "stack": kernel.scratch}
    return replace(kernel, context=json.dumps(context, sort_keys=True), scratch=0)


def assembly(template: str, context: Mapping[str, Any], parameters: Sequence[str]) -> Kernel:
    """A function in assembly, that C calls with these parameters."""
    own = {"args": [], "rows": None, "columns": None, "tile": None, "tail": [], "assembly": [*parameters]}
    return Kernel(template, json.dumps(own | dict(context), sort_keys=True))


def pass_on(*numbers: int) -> str:
    """How C passes what a function in assembly for all shapes has to know of one."""
    return "".join(f", {n}" for n in numbers)


COLUMNS = assembly("dsp/columns", {}, ("uint32_t *y", "const int8_t *a", "int stride", "int n", "uint32_t add"))
SPREAD = assembly("dsp/spread", {}, ("int16_t *y", "const int8_t *a", "int n", "uint32_t add"))
WIDEN = assembly(
    "dsp/widen", {"pairs": False}, ("uint32_t *y", "const int8_t *a", "const int8_t *b", "int n", "uint32_t add")
)
WIDEN_PAIRS = assembly(
    "dsp/widen", {"pairs": True}, ("uint32_t *y", "const int8_t *a", "int next", "int n", "uint32_t add", "int pairs")
)

# Makes int8 and bits of eight elements of 16 bits, then of the next, whose results lie ``step`` further.
LIMIT = assembly("dsp/limit", {}, ("const int16_t *x", "int8_t *y", "uint8_t *bits", "int times", "int step"))

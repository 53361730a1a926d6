"""What a C function is made from: a template and all that it may know."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

CTYPES = {
    "float32": "float",
    "int8": "int8_t",
    "uint8": "uint8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "bit": "uint8_t",
}
SCRATCH = {"c": "scratch", "ctype": "uint8_t", "const": False}  # the last pointer of a kernel that needs some


@dataclass(frozen=True)
class Kernel:
    """A C function to be: equal (template, context) are one function.

    context: all the template may know (JSON-like):
      ins     one record per operand of the anchor: a tensor, and its pieces along axis: [{c, strides, start, stop}]
      out     the tensor that is stored
      attrs   of the anchor
      acc     C type of the anchor's result
      tail    elementwise steps behind the anchor: {op, attrs, operands}; see ``_operand``
      args    pointers in the order of the call: {c, ctype, const}
      rows    of a kernel that makes one row: pointer -> how many rows there are, where it is a ring
      columns of one that makes some columns of it, from "col" on: {count, inside: pointers to no more than these}
      tile    of a kernel that makes one tile, from "from" on: {sum, first, last}; see ``_Tile``
    parts: kernels that it calls
    scratch: bytes of memory, aligned to 4, that it works in, by a last pointer
    portable: of a kernel for some cores, what computes the same bits anywhere
    """

    template: str
    context: str
    parts: tuple["Kernel", ...] = ()
    scratch: int = 0
    portable: "Kernel | None" = None

    def arguments(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self.context)
        return result

    def family(self) -> Iterator["Kernel"]:
        """What has to be there for it, in the order of definition."""
        for part in self.parts:
            yield from part.family()
        yield self

"""What a range sees of an int8 gradient."""

from typing import Any

from tte.codegen.fast.form import assembly, form, make_form
from tte.codegen.kernel import Kernel

PEAKS = assembly("dsp/peaks", {}, ("uint32_t *y", "const int8_t *a", "int words"))


@form()
def observe(kernel: Kernel, context: dict[str, Any], room: int) -> Kernel | None:
    """Four elements at a time; the count of what is saturated has room in 32 bits."""
    return make_form(kernel, context, "dsp/observe_gradient", 0, PEAKS) if context["ins"][1]["size"] < 2**24 else None

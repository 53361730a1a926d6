"""Faster forms of kernels, with the bits of the portable ones: for cores with the DSP extension (Cortex-M4, M7, M33),
and for those with vectors (M55).

A form says by None what it does not serve, or for what there is no room.
"""

from collections.abc import Mapping, Sequence

from tte.codegen.fast import mve
from tte.codegen.fast.conv2d import convolve, convolve_directly, convolve_raw, convolve_thin
from tte.codegen.fast.conv2d_transpose import multiply_columns
from tte.codegen.fast.conv2d_weight_grad import correlate
from tte.codegen.fast.dense import dense
from tte.codegen.fast.depthwise import convolve_channels, convolve_channels_back
from tte.codegen.fast.float32 import (
    convolve_back,
    convolve_columns_back,
    convolve_depthwise_back,
    convolve_depthwise_floats,
    convolve_floats,
    differentiate_weights,
    sum_channels,
    update_pixels,
)
from tte.codegen.fast.form import Choice, Form, Knobs, use_stack
from tte.codegen.fast.observe_gradient import observe
from tte.codegen.kernel import Kernel
from tte.codegen.measured import Measured, identify, name_shape

Forms = Mapping[str, tuple[Form, ...]]  # those of each template, the best first
DSP: Forms = {
    "conv2d": (convolve_thin, convolve, convolve_raw, convolve_directly, convolve_floats),
    "dense": (dense,),
    "depthwise_conv2d": (convolve_channels, convolve_depthwise_floats),
    "conv2d_transpose": (multiply_columns, update_pixels, convolve_back),
    "depthwise_conv2d_transpose": (convolve_channels_back, convolve_columns_back, convolve_depthwise_back),
    "conv2d_weight_grad": (correlate, differentiate_weights),
    "sum": (sum_channels,),
    "observe_gradient": (observe,),
}
VECTORS: Forms = {
    "conv2d": (mve.convolve, mve.multiply_rows),
    "dense": (mve.multiply_rows,),
    "depthwise_conv2d": (mve.convolve_channels,),
    "depthwise_conv2d_transpose": (mve.convolve_channels_back,),
    "conv2d_transpose": (mve.multiply_columns,),
    "conv2d_weight_grad": (mve.correlate,),
    "elementwise_loop": (mve.add,),
}
MVE: Forms = {template: (*VECTORS.get(template, ()), *DSP.get(template, ())) for template in {**DSP, **VECTORS}}
NOTHING: Measured = {}
STACK = 1024  # bytes of scratch that lie on the stack where there is no other room


def quicken(
    kernel: Kernel, room: int, measured: Measured = NOTHING, optimize: str = "speed", forms: Forms = DSP
) -> Kernel:
    """What computes the same faster with at most ``room`` bytes of scratch; ``kernel`` itself where nothing does.

    measured: which forms and knobs are better than the default, the first form that serves by its default knobs; that
              has to be among it, so that nothing slower is chosen
    optimize: "speed", or "size" for forms whose code serves many shapes
    """
    found = _list_forms(kernel, forms)
    chosen = [(form, form.small if optimize == "size" else form.default) for form in found]
    default = next(filter(None, (_make(form, kernel, room, knobs) for form, knobs in chosen)), None)
    if default is None:
        return kernel
    known = measured.get(name_shape(kernel), {}) if measured else {}
    base = known.get(identify(default)) if known else None
    if base is None:
        return default
    better = [(sum(m.as_of(base).values()), m.scratch, name, m) for name, m in known.items() if m.improves(base)]
    for _, _, name, one in sorted(better, key=lambda entry: entry[:3]):
        for form in found:
            if form.name == one.form and form.takes(one.knobs):
                made = _make(form, kernel, room, one.knobs)
                if made and identify(made) == name:
                    return made
    return default


def list_forms(kernel: Kernel, room: int) -> dict[Kernel, Choice]:
    """All that a kernel may become, each once, and by what; the default first."""
    ways = [(form, knobs) for form in _list_forms(kernel, DSP) for knobs in form.list_knobs()]
    result: dict[Kernel, Choice] = {}
    for form, knobs in sorted(ways, key=lambda way: way[1] != way[0].default):
        if made := _make(form, kernel, room, knobs):
            result.setdefault(made, (form.name, knobs))
    return result


def _list_forms(kernel: Kernel, forms: Forms) -> Sequence[Form]:
    few = kernel.arguments()["columns"]  # a few pixels are not worth the call
    return () if few else forms.get(kernel.template, ())


def _make(form: Form, kernel: Kernel, room: int, knobs: Knobs) -> Kernel | None:
    made = form(kernel, max(room, STACK), knobs)
    return use_stack(made) if made and made.scratch > room else made

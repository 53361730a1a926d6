"""Faster forms of kernels, for cores with the DSP extension (Cortex-M4, M7, M33): the bits of the portable ones.

A form says by None what it does not serve, or for what there is no room.
"""

from collections.abc import Callable
from typing import Any

from tte.codegen.fast.conv2d import convolve, convolve_directly
from tte.codegen.fast.conv2d_transpose import multiply_columns
from tte.codegen.fast.conv2d_weight_grad import correlate
from tte.codegen.fast.dense import dense
from tte.codegen.fast.depthwise import convolve_channels, convolve_channels_back
from tte.codegen.fast.float32 import (
    convolve_back,
    convolve_depthwise_back,
    convolve_depthwise_floats,
    convolve_floats,
    differentiate_weights,
    sum_channels,
)
from tte.codegen.fast.form import use_stack
from tte.codegen.fast.observe_gradient import observe
from tte.codegen.kernel import Kernel

Form = Callable[[Kernel, dict[str, Any], int], Kernel | None]
FORMS: dict[str, tuple[Form, ...]] = {
    "conv2d": (convolve, convolve_directly, convolve_floats),
    "dense": (dense,),
    "depthwise_conv2d": (convolve_channels, convolve_depthwise_floats),
    "conv2d_transpose": (multiply_columns, convolve_back),
    "depthwise_conv2d_transpose": (convolve_channels_back, convolve_depthwise_back),
    "conv2d_weight_grad": (correlate, differentiate_weights),
    "sum": (sum_channels,),
    "observe_gradient": (observe,),
}


STACK = 256  # bytes of scratch that lie on the stack where there is no other room


def quicken(kernel: Kernel, room: int) -> Kernel:
    """What computes the same faster with at most ``room`` bytes of scratch; ``kernel`` itself where nothing does."""
    context = kernel.arguments()
    if context["columns"]:  # a few pixels are not worth the call
        return kernel
    forms = (form(kernel, context, max(room, STACK)) for form in FORMS.get(kernel.template, ()))
    faster = next((made for made in forms if made), None)
    if faster is None:
        return kernel
    return faster if faster.scratch <= room else use_stack(faster)

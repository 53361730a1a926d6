"""Faster forms of kernels, for cores with the DSP extension (Cortex-M4, M7, M33): the bits of the portable ones.

A form says by None what it does not serve, or for what there is no room.
"""

from collections.abc import Callable
from typing import Any

from tte.codegen.fast.conv2d import convolve
from tte.codegen.fast.conv2d_transpose import convolve_back
from tte.codegen.fast.conv2d_weight_grad import correlate
from tte.codegen.fast.dense import dense
from tte.codegen.fast.depthwise import convolve_channels, convolve_channels_back
from tte.codegen.fast.observe_gradient import observe
from tte.codegen.kernel import Kernel

FORMS: dict[str, Callable[[Kernel, dict[str, Any], int], Kernel | None]] = {
    "conv2d": convolve,
    "conv2d_transpose": convolve_back,
    "conv2d_weight_grad": correlate,
    "dense": dense,
    "depthwise_conv2d": convolve_channels,
    "depthwise_conv2d_transpose": convolve_channels_back,
    "observe_gradient": observe,
}


def quicken(kernel: Kernel, room: int) -> Kernel:
    """What computes the same faster with at most ``room`` bytes of scratch; ``kernel`` itself where nothing does."""
    form, context = FORMS.get(kernel.template), kernel.arguments()
    if form is None or context["columns"]:  # a few pixels are not worth the call
        return kernel
    return form(kernel, context, room) or kernel

"""Faster forms of kernels, for cores with the DSP extension (Cortex-M4, M7, M33): the bits of the portable ones.

A form says by None what it does not serve, or for what there is no room.
"""

from collections.abc import Callable
from typing import Any

from tte.codegen.fast.conv2d import convolve
from tte.codegen.fast.form import use_stack
from tte.codegen.fast.gradients import convolve_back, convolve_depthwise_back, differentiate_weights, sum_channels
from tte.codegen.kernel import Kernel

FORMS: dict[str, Callable[[Kernel, dict[str, Any], int], Kernel | None]] = {
    "conv2d": convolve,
    "conv2d_transpose": convolve_back,
    "depthwise_conv2d_transpose": convolve_depthwise_back,
    "conv2d_weight_grad": differentiate_weights,
    "sum": sum_channels,
}


STACK = 256  # bytes of scratch that lie on the stack where there is no other room


def quicken(kernel: Kernel, room: int) -> Kernel:
    """What computes the same faster with at most ``room`` bytes of scratch; ``kernel`` itself where nothing does."""
    form = FORMS.get(kernel.template)
    faster = form(kernel, kernel.arguments(), max(room, STACK)) if form else None
    if faster is None:
        return kernel
    return faster if faster.scratch <= room else use_stack(faster)

"""The operators: importing this package fills the table ``tte.ir.OPS``."""

import sys
from types import ModuleType

from tte.ir import OPS, Op
from tte.ops import conv, dense, elementwise, gradients, loss, pool, quantized, reduce, resize, shape, softmax, update

__all__ = [
    "conv",
    "dense",
    "elementwise",
    "gradients",
    "loss",
    "pool",
    "quantized",
    "reduce",
    "resize",
    "shape",
    "softmax",
    "update",
]


class _Table(ModuleType):
    """The package can be called: ``tte.ops()`` lists the operators."""

    def __call__(self) -> list[Op]:
        """All operators, by name."""
        return [op for _, op in sorted(OPS.items())]


sys.modules[__name__].__class__ = _Table

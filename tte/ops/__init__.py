"""The operators: importing this package fills the table ``tte.ir.OPS``."""

from tte.ops import conv, dense, elementwise, loss, pool, reduce, resize, shape, softmax, update

__all__ = ["conv", "dense", "elementwise", "loss", "pool", "reduce", "resize", "shape", "softmax", "update"]

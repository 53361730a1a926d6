"""Questions that many type rules ask of their operands."""

from collections.abc import Sequence

import numpy as np

from tte.ir import InvalidType, Node, TensorType


def require(condition: bool, what: str) -> None:
    """Refuse the operands of a call."""
    if not condition:
        raise InvalidType(what)


def require_rank(name: str, type: TensorType, *ranks: int) -> None:
    require(type.rank in ranks, f"{name} must have rank {' or '.join(map(str, ranks))}, not shape {type.shape}")


def require_float(**types: TensorType | None) -> None:
    for name, type in types.items():
        require(type is None or type.dtype == "float32", f"{name} must be float32, not {type.dtype if type else ''}")


def require_numbers(**types: TensorType) -> None:
    """float32, or the integers that ``read_numbers`` reads."""
    for name, type in types.items():
        require(type.dtype in ("float32", "int8", "int16"), f"{name} must be float32, int8 or int16, not {type.dtype}")


def read_numbers(x: np.ndarray, dtype: np.dtype, zero_point: int = 0) -> np.ndarray:
    """An operand as the numbers that a float operator reads: int8 counts from zero_point; int16 is a weight with eight
    bits of fraction (see qnn.sgd), of which the integer part is read."""
    if x.dtype == np.int16:
        x = x >> 8
    return x if x.dtype == dtype else (x.astype(np.int32) - zero_point).astype(dtype)


def require_pair(name: str, value: Sequence[int], least: int) -> None:
    fits = len(value) == 2 and all(v >= least for v in value)
    require(fits, f"{name} must be two integers of at least {least}, not {value}")


def require_padding(value: Sequence[int]) -> None:
    require(len(value) == 4 and all(v >= 0 for v in value), f"padding must be (top, left, bottom, right), not {value}")


def require_axis(axis: int, rank: int) -> None:
    require(0 <= axis < rank, f"axis {axis} is not an axis of a tensor of rank {rank}")


MOVES = frozenset("source reshape transpose concatenate slice pad broadcast_to take permute".split())


# Floats that these read and write are taken apart and made by integer instructions.
BY_BITS = frozenset(
    f"qnn.{name}" for name in "dequantize gradient_scale observe_gradient integer_cross_entropy integer_sgd".split()
)


def computes_floats(node: Node) -> bool:
    """Whether a node needs instructions for floats, rather than move them or compute integers."""
    if node.body is not None:
        return any(map(computes_floats, node.body.nodes))
    if node.op == "qnn.add":  # of int8, but without bits of fraction in float32
        return not node.attrs.get("bits") and not node.attrs.get("tflite")
    if node.op in ("qnn.gradient_unit", "qnn.quantize_gradient") and node.inputs[0].type.dtype == "int32":
        return False
    return node.op not in MOVES | BY_BITS and any(v.type.dtype == "float32" for v in (*node.inputs, *node.outputs))

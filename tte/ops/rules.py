"""Questions that many type rules ask of their operands."""

from collections.abc import Sequence

from tte.ir import InvalidType, TensorType


def require(condition: bool, what: str) -> None:
    """Refuse the operands of a call."""
    if not condition:
        raise InvalidType(what)


def require_rank(name: str, type: TensorType, *ranks: int) -> None:
    require(type.rank in ranks, f"{name} must have rank {' or '.join(map(str, ranks))}, not shape {type.shape}")


def require_float(**types: TensorType | None) -> None:
    for name, type in types.items():
        require(type is None or type.dtype == "float32", f"{name} must be float32, not {type.dtype if type else ''}")


def require_pair(name: str, value: Sequence[int], least: int) -> None:
    fits = len(value) == 2 and all(v >= least for v in value)
    require(fits, f"{name} must be two integers of at least {least}, not {value}")


def require_padding(value: Sequence[int]) -> None:
    require(len(value) == 4 and all(v >= 0 for v in value), f"padding must be (top, left, bottom, right), not {value}")


def require_axis(axis: int, rank: int) -> None:
    require(0 <= axis < rank, f"axis {axis} is not an axis of a tensor of rank {rank}")

"""Types of tensors: a static shape, an element type and, for integers that stand for reals, their quantisation."""

import math
from dataclasses import dataclass

import numpy as np

# bit: a packed 1-bit mask; numpy holds it as bool, C as (size + 7) / 8 bytes, element i in bit i % 8 of byte i / 8.
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "bit": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Quant:
    """real = scale * (integer - zero_point); per tensor, or per slice of ``axis`` (then zero points are 0)."""

    scale: tuple[float, ...]
    zero_point: int = 0
    axis: int | None = None


@dataclass(frozen=True)
class TensorType:
    """Shape (all dimensions known), element type, optional quantisation."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    quant: Quant | None = None

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES, self.dtype
        assert all(type(d) is int and d >= 0 for d in self.shape), self.shape

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory on the device."""
        return (self.size + 7) // 8 if self.dtype == "bit" else self.size * self.numpy.itemsize

    @property
    def numpy(self) -> np.dtype:
        return DTYPES[self.dtype]

    def with_shape(self, shape: tuple[int, ...]) -> "TensorType":
        return TensorType(tuple(int(d) for d in shape), self.dtype, self.quant)

    def __str__(self) -> str:
        quant = ""
        if self.quant:
            axis = "" if self.quant.axis is None else f", axis={self.quant.axis}"
            quant = f", quant(scale={self.quant.scale}, zero_point={self.quant.zero_point}{axis})"
        shape = ", ".join(map(str, self.shape)) + ("," if self.rank == 1 else "")
        return f"Tensor[({shape}), {self.dtype}{quant}]"


def tensor_type(array: np.ndarray) -> TensorType:
    """The type of a numpy array."""
    for name, dtype in DTYPES.items():
        if array.dtype == dtype:
            return TensorType(tuple(int(d) for d in array.shape), name)
    raise AssertionError(f"no tensor type for {array.dtype}")

"""What all places that run a project have in common."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from tte.errors import TTEError
from tte.runner.build import Build, Tensor

# The names of <name>_status_t, in order.
STATUS = ("OK BUSY NOT_INIT LABEL NONFINITE SOURCE STATE_CRC STATE_MODEL STATE_VERSION STATE_SIZE IO SELFTEST").split()
STATE_HEADER = 28
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Step:
    """Result of a training step or an evaluation. instructions: 0 where they are not counted."""

    status: int
    loss: float
    predicted: int
    confidence: float
    instructions: int = 0


class Board(Protocol):
    """The C API, somewhere. Arrays have the shapes and dtypes of ``build``, see ``check_sample``."""

    build: Build

    def init(self) -> int: ...
    def set_learning_rate(self, rate: float) -> None: ...
    def train_step(self, x: np.ndarray, target: np.ndarray | None) -> Step: ...
    def evaluate(self, x: np.ndarray, target: np.ndarray | None) -> Step: ...
    def infer(self, x: np.ndarray) -> np.ndarray: ...
    def save_state(self) -> bytes: ...
    def load_state(self, blob: bytes) -> int: ...
    def reset_state(self) -> int: ...
    def selftest(self) -> int: ...
    def high_water(self) -> tuple[int, int] | None: ...  # bytes of stack and of arena ever used
    def close(self) -> None: ...


def require_ok(status: int, what: str, where: str = "") -> None:
    """Raises TTEError (E055) for a status that is not OK."""
    if status:
        name = STATUS[status] if 0 <= status < len(STATUS) else str(status)
        fix = {
            "LABEL": "labels must be class numbers that the model has",
            "NONFINITE": "look for NaN in the data, or lower the learning rate",
            "STATE_MODEL": "this state was saved by another model or scheme",
        }.get(name, "see docs/c-api.md")
        raise TTEError("TTE-E055", f"{what} returned {name}", where=where, fix=fix)


def require_rate(rate: float) -> None:
    """Raises TTEError (E059) for a rate with which a step would fail, or go uphill."""
    if not 0 <= rate <= LARGEST:
        what, fix = f"the learning rate is {rate:g}", "a number that is not negative, and finite as float32"
        raise TTEError("TTE-E059", what, where="set_learning_rate", fix=fix)


def require_open(is_open: bool) -> None:
    """Raises TTEError (E055) after ``close``."""
    if not is_open:
        raise TTEError("TTE-E055", "the board was closed", fix="open another: it begins with the initial parameters")


def unpack_state(blob: bytes, build: Build, source: Path | None = None) -> dict[str, np.ndarray]:
    """The trained tensors in a saved state, which came from the file ``source``.

    Raises TTEError (E060) for something else than a state of this project.
    """
    where = str(source or build.folder)
    payload = blob[STATE_HEADER:-4]
    if blob[:4] != b"TTES" or len(payload) != build.state_bytes:
        raise TTEError(
            "TTE-E060",
            f"{len(blob)} bytes are not a state of {build.name}, which has {STATE_HEADER + build.state_bytes + 4}",
            where=where,
            fix="give what <name>_state_save wrote for this very project",
        )
    import zlib

    if struct.unpack("<I", blob[-4:])[0] != zlib.crc32(blob[:-4]):
        what = "the saved state is damaged: its checksum does not fit"
        raise TTEError("TTE-E060", what, where=where, fix="save it again")
    if blob[8:24] != build.model_hash:
        what = f"the state belongs to another model or scheme than {build.name}"
        raise TTEError("TTE-E060", what, where=where, fix="give the project whose firmware saved it")
    return {
        slot.name: np.frombuffer(payload, slot.dtype, int(np.prod(slot.shape, dtype=np.int64)), slot.offset).reshape(
            slot.shape
        )
        for slot in build.state
    }


def check_sample(name: str, given: object, tensor: Tensor) -> np.ndarray:
    """What the caller gives for a buffer of the C API, in its dtype and as one block.

    given: of the tensor's own shape, or without its batch dimension; integers where the buffer holds such.
    Raises TTEError (E057), saying what does not fit.
    """
    array = np.asarray(given)
    if array.dtype.kind not in ("iub" if tensor.dtype.kind in "iu" else "fiub"):
        what = "nothing" if given is None else str(array.dtype)
        raise TTEError("TTE-E057", f"{name} is {what}, the model wants {tensor.dtype}", fix=f"give {tensor.dtype}")
    if array.shape not in (tensor.shape, tensor.sample):
        what = f"{name} is {array.shape}, the model wants {tensor.shape}, with or without its batch dimension"
        raise TTEError("TTE-E057", what, fix="look for another layout, or for more than one sample")
    if tensor.dtype.kind in "iu":
        limits = np.iinfo(tensor.dtype)
        if array.min() < limits.min or array.max() > limits.max:
            what = f"{name} has {array.min()} to {array.max()}, the model wants {tensor.dtype}"
            raise TTEError("TTE-E057", what, fix=f"give {tensor.dtype}")
    return np.ascontiguousarray(array, tensor.dtype)

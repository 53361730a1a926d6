"""A board at the other end of a stream: the commands of runtime_c/emu_harness.c."""

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np

from tte.runner.board import STATE_HEADER, Step, check_sample, require_ok, require_open, require_rate
from tte.runner.build import Build


class StreamBoard:
    """Speaks the harness's protocol over ``_exchange``, which a subclass provides."""

    build: Build
    state_file: Path
    is_open = True
    instructions_per_tick = Fraction(1)

    def exchange(self, command: bytes, size: int) -> bytes:
        """Send a command and return the ``size`` bytes of its result."""
        require_open(self.is_open)
        return self._exchange(command, size)

    def _exchange(self, command: bytes, size: int) -> bytes:
        raise NotImplementedError

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self._close()

    def _close(self) -> None:
        raise NotImplementedError

    def _status(self, command: bytes) -> int:
        return int(struct.unpack("<I", self.exchange(command, 4))[0])

    def init(self) -> int:
        return self._status(b"I")

    def set_learning_rate(self, rate: float) -> None:
        require_rate(rate)
        self.exchange(b"L" + struct.pack("<f", rate), 0)

    def train_step(self, x: np.ndarray, target: np.ndarray | None) -> Step:
        return self._step(b"T", x, target)

    def evaluate(self, x: np.ndarray, target: np.ndarray | None) -> Step:
        return self._step(b"E", x, target)

    def _step(self, command: bytes, x: np.ndarray, target: np.ndarray | None) -> Step:
        given = check_sample("the input", x, self.build.input).tobytes()
        if self.build.target is not None:
            given = check_sample("the target", target, self.build.target).tobytes() + given
        status, loss, predicted, confidence, ticks = struct.unpack("<IfifI", self.exchange(command + given, 20))
        return Step(status, loss, predicted, confidence, self._instructions(ticks))

    def _instructions(self, ticks: int) -> int:
        return round(ticks * self.instructions_per_tick)

    def infer(self, x: np.ndarray) -> np.ndarray:
        return self.infer_counted(x)[0]

    def infer_counted(self, x: np.ndarray) -> tuple[np.ndarray, int]:
        """The output and the executed instructions."""
        output = self.build.output
        size = output.size * output.dtype.itemsize
        result = self.exchange(b"F" + check_sample("the input", x, self.build.input).tobytes(), 8 + size)
        status, ticks = struct.unpack("<II", result[:8])
        require_ok(status, "infer")
        return np.frombuffer(result[8:], output.dtype).reshape(output.shape).copy(), self._instructions(ticks)

    def save_state(self) -> bytes:
        size = STATE_HEADER + self.build.state_bytes + 4
        result = self.exchange(b"S", 4 + size + 4)
        require_ok(struct.unpack("<I", result[-4:])[0], "state_save")
        return result[4:-4]

    def load_state(self, blob: bytes) -> int:
        require_open(self.is_open)
        self.state_file.write_bytes(blob)
        return self._status(b"D" + struct.pack("<I", len(blob)))

    def reset_state(self) -> int:
        return self._status(b"R")

    def selftest(self) -> int:
        return self._status(b"X")

    def high_water(self) -> tuple[int, int] | None:
        stack, arena = struct.unpack("<II", self.exchange(b"W", 8))
        return stack, -(-arena // 4) * 4  # tensors take whole words

"""Runs a project on this computer: the same C as on the board, called directly."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from tte.errors import TTEError
from tte.runner.board import Step, check_sample, require_ok, require_open, require_rate
from tte.runner.build import Build
from tte.runner.toolchain import build_host

_WRITE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_READ = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t)


class _Result(ctypes.Structure):
    _fields_ = (("loss", ctypes.c_float), ("predicted", ctypes.c_int32), ("confidence", ctypes.c_float))


def open_host(build: Build, sanitize: bool = False, selftest: bool = False) -> "HostBoard":
    """Build the project for this computer and load it. Raises TTEError (E051) without compiler or sanitizers.

    selftest: with the self-test, which takes a compiler as long again
    """
    if sanitize and not hasattr(ctypes.CDLL(None), "__asan_init"):
        raise TTEError(
            "TTE-E051",
            "the sanitizers are not part of this process",
            fix="start Python with ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD=$(gcc -print-file-name=libasan.so)",
        )
    return HostBoard(build, build_host(build, sanitize, selftest))


class HostBoard:
    """A loaded shared library. The model's state lives in the library: one library, one model."""

    def __init__(self, build: Build, library: Path) -> None:
        self.build = build
        # A private copy: loading the same file twice would share the model's state.
        self._library = _load_privately(library)
        self._target = np.empty(0)
        self._open = True

    def _call(self, name: str, *arguments: Any) -> Any:
        require_open(self._open)
        return self._library[f"{self.build.name}_{name}"](*arguments)

    def init(self) -> int:
        if self.build.arena == "static":
            return int(self._call("init"))
        self._arena = np.empty(self.build.arena_bytes, np.uint8)  # aligned to 16 bytes, as all that malloc gives
        return int(self._call("init", self._arena.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(self._arena.nbytes)))

    def set_learning_rate(self, rate: float) -> None:
        require_rate(rate)
        self._call("set_learning_rate", ctypes.c_float(rate))

    def train_step(self, x: np.ndarray, target: np.ndarray | None) -> Step:
        return self._step("train_step", x, target)

    def evaluate(self, x: np.ndarray, target: np.ndarray | None) -> Step:
        return self._step("evaluate", x, target)

    def _step(self, name: str, x: np.ndarray, target: np.ndarray | None) -> Step:
        result = _Result(0.0, -1, 0.0)
        x = check_sample("the input", x, self.build.input)
        pointer = None
        if self.build.target is not None:
            self._target = check_sample("the target", target, self.build.target)
            pointer = self._target.ctypes.data_as(ctypes.c_void_p)
        status = self._call(name, x.ctypes.data_as(ctypes.c_void_p), pointer, ctypes.byref(result))
        return Step(status, result.loss, result.predicted, result.confidence)

    def infer(self, x: np.ndarray) -> np.ndarray:
        x = check_sample("the input", x, self.build.input)
        y = np.empty(self.build.output.shape, self.build.output.dtype)
        require_ok(self._call("infer", x.ctypes.data_as(ctypes.c_void_p), y.ctypes.data_as(ctypes.c_void_p)), "infer")
        return y

    def save_state(self) -> bytes:
        parts: list[bytes] = []

        def write(_: Any, data: int, n: int) -> int:
            parts.append(ctypes.string_at(data, n))
            return 0

        require_ok(self._call("state_save", _WRITE(write), None), "state_save")
        return b"".join(parts)

    def load_state(self, blob: bytes) -> int:
        def read(_: Any, offset: int, data: int, n: int) -> int:
            if offset + n > len(blob):
                return 1
            ctypes.memmove(data, blob[offset : offset + n], n)
            return 0

        return int(self._call("state_load", _READ(read), None, ctypes.c_size_t(len(blob))))

    def reset_state(self) -> int:
        return int(self._call("state_reset"))

    def selftest(self) -> int:
        if not hasattr(self._library, f"{self.build.name}_selftest"):
            raise TTEError("TTE-E055", "this board has no self-test", fix="open it with selftest=True")
        return int(self._call("selftest"))

    def high_water(self) -> tuple[int, int] | None:
        return None

    def close(self) -> None:
        self._open = False


def _load_privately(library: Path) -> ctypes.CDLL:
    import os
    import shutil
    import tempfile

    handle, path = tempfile.mkstemp(suffix=library.suffix)
    os.close(handle)
    shutil.copyfile(library, path)
    try:
        return ctypes.CDLL(path)
    finally:
        try:
            os.unlink(path)
        except PermissionError:  # Windows keeps a loaded library open
            pass

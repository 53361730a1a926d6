"""Calls C functions one by one on a core in QEMU: what Unicorn does not know, with counts and guards around memory."""

import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tte.errors import TTEError
from tte.runner.bare import fence, unfence
from tte.runner.qemu import command_qemu, instructions_per_tick
from tte.runner.toolchain import build_calls
from tte.target import Target

FROM = 0x8000_0000  # what is a place in the memory of a call, see calls.c
MOST = 28  # arguments
Request = tuple[str, Sequence[int], Sequence[np.ndarray]]  # a function, its numbers, its buffers


class CalledCore:
    """A program that calls functions as files say.

    sources: see ``build_bare``; names: of the functions
    """

    def __init__(
        self, folder: Path, sources: Mapping[str, str], names: Sequence[str], target: Target, *options: str
    ) -> None:
        self.names, self.target = list(names), target
        self.elf = build_calls(folder, sources, names, target, *options)

    def call(self, requests: Sequence[Request]) -> list[tuple[list[bytes], int]]:
        """Of each call what its buffers hold behind it, and the instructions. Fails on a byte written beside them, or a
        register not restored. Raises TTEError (E056) where the program ends early."""
        fenced = [fence(buffers) for _, _, buffers in requests]
        machine = self.target.machine
        assert machine
        with tempfile.TemporaryDirectory() as folder:
            with (Path(folder) / "commands").open("wb") as file:
                for (name, numbers, _), (before, places) in zip(requests, fenced, strict=True):
                    words = [*numbers, *(FROM + place for place in places)]
                    words = [self.names.index(name), *words, *[0] * (MOST - len(words)), len(before)]
                    file.write(struct.pack(f"<{MOST + 2}I", *words) + before)
            command = command_qemu(machine, self.elf)
            ended = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False)
            if ended.returncode:
                text = (ended.stdout + ended.stderr).decode(errors="replace").strip()
                raise TTEError("TTE-E056", f"the program ended with {ended.returncode}: {text}", where=str(self.elf))
            data = (Path(folder) / "results").read_bytes()
        result, at = [], 0
        for (name, _, buffers), (before, places) in zip(requests, fenced, strict=True):
            lost, ticks = struct.unpack_from("<2I", data, at)
            assert not lost, f"{name}: registers that a callee restores"
            at += 8 + len(before)
            made = unfence(before, data[at - len(before) : at], places, buffers)
            result.append((made, round(ticks * instructions_per_tick(machine))))
        return result

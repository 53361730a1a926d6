"""Runs firmware on QEMU's Cortex-M boards: a second opinion, with instruction counts from -icount."""

import os
import shutil
import subprocess
import tempfile
from fractions import Fraction
from pathlib import Path

from tte.errors import TTEError
from tte.runner.build import Build
from tte.runner.stream import StreamBoard
from tte.runner.toolchain import Firmware
from tte.target import Machine

# A tick of the boards' counters, 40 to 62.5 ns, is less than half of an instruction: rounding finds the exact count.
SHIFT = 7


def find_qemu() -> str | None:
    return shutil.which("qemu-system-arm")


def open_qemu(build: Build, firmware: Firmware) -> "QemuBoard":
    """Start the firmware. Raises TTEError (E051) where QEMU is not installed."""
    if find_qemu() is None:
        raise TTEError("TTE-E051", "qemu-system-arm is not installed", fix="install it, or use --emulator unicorn")
    return QemuBoard(build, firmware)


def command_qemu(machine: Machine, elf: Path) -> list[str]:
    """Runs a program with semihosting. An instruction takes 2**SHIFT nanoseconds."""
    command = f"{find_qemu()} -M {machine.name} -display none -monitor none -serial none -icount shift={SHIFT}".split()
    command += [word for option in machine.options for word in option.split()]
    return [*command, "-semihosting-config", "enable=on,target=native", "-kernel", str(elf.resolve())]


def instructions_per_tick(machine: Machine) -> Fraction:
    return Fraction(1_000_000_000, 2**SHIFT * machine.counter_hz)


class QemuBoard(StreamBoard):
    """QEMU as a child process; commands and results go through named pipes."""

    def __init__(self, build: Build, firmware: Firmware) -> None:
        self.build, self.firmware = build, firmware
        machine = firmware.board.machine
        assert machine is not None, firmware.board
        self.instructions_per_tick = instructions_per_tick(machine)
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self.state_file = folder / "state"
        for name in ("commands", "results"):
            os.mkfifo(folder / name)
        self._log = (folder / "log").open("w+b")
        self._process = subprocess.Popen(
            command_qemu(machine, firmware.elf),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        # Opened for both directions: opening a pipe must not wait for a QEMU that may have failed to start.
        self._commands = os.open(folder / "commands", os.O_RDWR)
        self._results = os.open(folder / "results", os.O_RDWR)

    def _exchange(self, command: bytes, size: int) -> bytes:
        import select

        while command:
            _, ready, _ = select.select([], [self._commands], [], 1.0)
            if ready:
                command = command[os.write(self._commands, command[:4096]) :]
            else:
                self._require_alive()
        result = b""
        while len(result) < size:
            readable, _, _ = select.select([self._results], [], [], 1.0)
            if readable:
                result += os.read(self._results, size - len(result))
            else:
                self._require_alive()
        return result

    def _require_alive(self) -> None:
        if self._process.poll() is None:
            return
        self._log.seek(0)
        text = self._log.read().decode(errors="replace").strip()
        raise TTEError(
            "TTE-E056",
            f"the firmware ended with {self._process.returncode}: {text or 'no message'}",
            where=str(self.firmware.elf),
        )

    def _close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._results)
        self._log.close()
        self._folder.cleanup()

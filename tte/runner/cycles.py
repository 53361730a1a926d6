"""Estimates cycles: what llvm-mca says of each block of a program; memories, caches and branches cost nothing there."""

import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tte.errors import TTEError
from tte.runner.counter import Block
from tte.target import Target

UNIT = 100  # estimates are in hundredths of a cycle: so often a block is executed one after the other
CONDITION = re.compile(r"(?<=\w)(eq|ne|cs|hs|cc|lo|mi|pl|vs|vc|hi|ls|ge|lt|gt|le)(?=$|\.)")


@dataclass(frozen=True)
class Estimator:
    """llvm-mca and the disassembler beside it, for a core. version: "llvm-mca 14.0.6" """

    mca: Path
    disassembler: Path
    version: str
    cpu: str

    def estimate(self, code: Mapping[Block, bytes]) -> dict[Block, int]:
        """Of each block, in units of 1 / UNIT cycles, as often as it would be executed one after the other.

        Raises TTEError (E058) where LLVM has no model of the core.
        """
        blocks = [block for block, data in code.items() if data]
        lines = self._disassemble([code[block] for block in blocks])
        regions = "".join(
            f"# LLVM-MCA-BEGIN {i}\n{text}\n# LLVM-MCA-END\n" for i, text in enumerate(map("\n".join, lines)) if text
        )
        answer = self._run(
            [str(self.mca), "-mtriple=thumb", "-json", f"-iterations={UNIT}"], f".syntax unified\n{regions}"
        )
        found = {int(r["Name"]): r["SummaryView"]["TotalCycles"] for r in json.loads(answer)["CodeRegions"]}
        return {block: found.get(i, 0) for i, block in enumerate(blocks)}

    def _disassemble(self, blocks: Sequence[bytes]) -> list[list[str]]:
        """The instructions of each block that cost something by themselves, without conditions.

        What is executed under a condition has its time there whether it is met or not; IT itself is folded.
        """
        hexadecimal = "\n".join(" ".join(f"{byte:#04x}" for byte in data) for data in blocks)
        text = self._run([str(self.disassembler), "-triple=thumb", "--disassemble"], hexadecimal)
        instructions = iter([line.strip() for line in text.splitlines() if line.startswith("\t") and line[1] != "."])
        result = []
        for data in blocks:
            lines, conditional = [], 0
            for _ in range(_count(data)):
                mnemonic, *operands = next(instructions).split("\t")
                if re.fullmatch("it[te]*", mnemonic):
                    conditional = len(mnemonic) - 1
                    continue
                if conditional:
                    mnemonic, conditional = CONDITION.sub("", mnemonic), conditional - 1
                lines.append("\t".join([mnemonic, *operands]))
            result.append(lines)
        assert next(instructions, None) is None
        return result

    def _run(self, command: Sequence[str], text: str) -> str:
        result = subprocess.run(
            [*command, f"-mcpu={self.cpu}"], input=text, capture_output=True, text=True, check=False
        )
        if "unable to find instruction-level scheduling information" in result.stderr:
            what = f"{self.version} has no model of the {self.cpu}"
            raise TTEError("TTE-E058", what, where="--metric cycles", fix="--metric instructions")
        assert result.returncode == 0, result.stderr
        return result.stdout


def find_estimator(target: Target) -> Estimator:
    """Raises TTEError (E051) where LLVM's tools are not installed."""
    for suffix in ("", *(f"-{n}" for n in range(30, 12, -1))):  # before 13 no cores that execute in order
        tools = [shutil.which(f"{tool}{suffix}") for tool in ("llvm-mca", "llvm-mc")]
        if tools[0] and tools[1]:
            answer = subprocess.run([tools[0], "--version"], capture_output=True, text=True, check=True).stdout
            if (number := re.search(r"version (\d+)\.\S+", answer)) and int(number[1]) >= 13:
                return Estimator(Path(tools[0]), Path(tools[1]), f"llvm-mca {number[0].split()[1]}", target.cpu)
    what = "cycles are estimated by llvm-mca 13 or later, which is not installed"
    raise TTEError("TTE-E051", what, where="--metric cycles", fix="install LLVM (Debian: apt install llvm)")


def _count(code: bytes) -> int:
    """Instructions of Thumb code: those whose first halfword begins with 11101, 11110 or 11111 have 4 bytes, else 2."""
    n = at = 0
    while at < len(code):
        at += 4 if code[at + 1] >> 3 >= 0x1D else 2
        n += 1
    return n

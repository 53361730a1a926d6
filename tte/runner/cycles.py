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
NOP = b"\x00\xbf"
CALLS = {"bl": "b", "blx": "bx"}
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

        An instruction that LLVM's model of the core leaves out takes one cycle.
        Raises TTEError (E058) where LLVM has no model of the core.
        """
        blocks = self._disassemble(list(code.values()))
        left_out: set[str] = set()
        while True:
            known = [[line for line in lines if line.split()[0] not in left_out] for lines in blocks]
            found, unknown = self._analyse(["\n".join(lines) for lines in known])
            if unknown is None:
                break
            left_out.add(unknown)
        return {block: found.get(i, 0) + UNIT * (len(blocks[i]) - len(known[i])) for i, block in enumerate(code)}

    def _analyse(self, texts: Sequence[str]) -> tuple[dict[int, int], str | None]:
        """Cycles of each text, UNIT times one after the other; or an instruction that the model leaves out."""
        regions = [f"# LLVM-MCA-BEGIN {i}\n{text}\n# LLVM-MCA-END\n" for i, text in enumerate(texts) if text]
        if not regions:
            return {}, None
        command = [str(self.mca), "-mtriple=thumb", f"-mcpu={self.cpu}", "-json", f"-iterations={UNIT}"]
        result = _run(command, "".join([".syntax unified\n", *regions]))
        if result.returncode == 0:
            answer = json.loads(result.stdout)
            return {int(r["Name"]): r["SummaryView"]["TotalCycles"] for r in answer["CodeRegions"]}, None
        if "unable to find instruction-level scheduling information" in result.stderr:
            what = f"{self.version} has no model of the {self.cpu}"
            raise TTEError("TTE-E058", what, where="--metric cycles", fix="--metric instructions")
        unknown = re.search(r"unsupported instruction.*\nnote: instruction:\s*(\S+)", result.stderr)
        assert unknown, result.stderr
        return {}, unknown[1]

    def _disassemble(self, blocks: Sequence[bytes]) -> list[list[str]]:
        """The instructions of each block, as llvm-mca is to see them.

        What is executed under a condition has its time whether it is met or not; IT itself is folded. Calls are jumps:
        what is called has blocks of its own.
        """
        # A condition reaches over no more than four instructions: not into the next block.
        text = "\n".join(" ".join(f"{byte:#04x}" for byte in data + 4 * NOP) for data in blocks)
        result = _run([str(self.disassembler), "-triple=thumb", f"-mcpu={self.cpu}", "--disassemble"], text)
        assert result.returncode == 0, result.stderr
        listed = iter([line[1:] for line in result.stdout.splitlines() if line.startswith("\t") and line[1] != "."])
        found = []
        for data in blocks:
            lines, conditional = [], 0
            for line in [next(listed) for _ in range(_count(data) + 4)][:-4]:
                mnemonic, _, operands = line.partition("\t")
                if re.fullmatch("it[te]*", mnemonic):
                    conditional = len(mnemonic) - 1
                    continue
                if conditional:
                    mnemonic, conditional = CONDITION.sub("", mnemonic), conditional - 1
                lines.append(f"{CALLS.get(mnemonic, mnemonic)}\t{operands}")
            found.append(lines)
        assert next(listed, None) is None
        return found


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


def _run(command: Sequence[str], text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)

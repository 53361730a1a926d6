"""Builds generated projects and runs them: on this computer, or on an emulated microcontroller."""

from tte.runner.board import Board, Step
from tte.runner.build import Build
from tte.runner.host import HostBoard, open_host
from tte.runner.qemu import open_qemu
from tte.runner.train import RunResult, train
from tte.runner.unicorn_board import open_unicorn

__all__ = ["Board", "Build", "HostBoard", "RunResult", "Step", "open_host", "open_qemu", "open_unicorn", "train"]

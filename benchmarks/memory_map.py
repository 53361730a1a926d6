"""Draws where everything lies in the arena while a step runs, with and without what saves memory.

For docs/memory.md: python benchmarks/memory_map.py --plot docs/images/memory.png. The model is made up: a stem,
two residual blocks as in the page's example, a head; in int8, of which all biases learn.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn

import tte
from tte.codegen.emit import Program
from tte.report import list_tensors

COLOURS = {"forward": "#a9cbee", "backward": "#f7c48f", "update": "#a5d9a4"}


class Block(nn.Module):
    """Expand, depthwise, project, add."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv2d(channels, wide, 1), nn.Conv2d(wide, channels, 1)
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(nn.functional.relu6(self.depthwise(nn.functional.relu6(self.expand(x)))))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 16, 3, 2, 1), nn.Linear(16, 10)
        self.a, self.b = Block(16, 48), Block(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(nn.functional.relu6(self.stem(x)))).mean((2, 3)))


def draw(axes: Any, program: Program, title: str) -> None:
    """Time to the right, addresses upwards; names where they fit."""
    plan, end = program.plan, len(program.graph.nodes)
    for tensor in list_tensors(program):
        left, width = tensor["start"] - 0.5, tensor["end"] - tensor["start"] + 1
        low, height = tensor["offset"] / 1024, tensor["bytes"] / 1024
        box = matplotlib.patches.Rectangle(
            (left, low), width, height, facecolor=COLOURS[tensor["phase"]], edgecolor="#444444", linewidth=0.6
        )
        axes.add_patch(box)
        if tensor["bytes"] > plan.arena_bytes / 40:
            text = axes.text(left + 0.15, low + height / 2, tensor["layer"], va="center", fontsize=6, clip_on=True)
            text.set_clip_path(box)
    axes.axvline(plan.peak_node, color="#c02020", linewidth=1, linestyle=":")
    axes.axhline(plan.arena_bytes / 1024, color="#c02020", linewidth=1)
    axes.set_xlim(-0.7, end - 0.3)
    axes.set_title(f"{title}: {plan.arena_bytes:,} bytes", fontsize=9)
    axes.set_xlabel("node", fontsize=8)
    axes.tick_params(labelsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, default=Path("build/memory.png"))
    path = parser.parse_args().plot
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(10, 4.2), dpi=80, sharey=True)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "int8.onnx"
        tte.quantize(Network().eval(), {"x": torch.randn(8, 3, 64, 64).numpy()}, model)
        artifacts = {p: tte.compile(model, None, "bias-only", "host", memory_plan=p) for p in ("fastest", "smallest")}
    for axes, (plan, artifact) in zip(both, artifacts.items(), strict=True):
        draw(axes, artifact.compiled.train, f"--memory-plan {plan}")
    both[0].set_ylabel("address, KB", fontsize=8)
    both[0].autoscale(axis="y")
    both[0].set_ylim(bottom=0)
    both[0].legend(
        handles=[matplotlib.patches.Patch(facecolor=c, edgecolor="#444444", label=p) for p, c in COLOURS.items()],
        fontsize=7,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()

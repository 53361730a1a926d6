"""Pretrains a small residual network on the digits 0 to 4, then teaches it 5 to 9 on an emulated Cortex-M7.

Leaves the C project with report.json, run.json, the data and the picture training.png in the output folder.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits
from torch import Tensor, nn

import tte

HERE = Path(__file__).parent


class Block(nn.Module):
    """Two convolutions around a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class Digits(nn.Module):
    """8 x 8 grey pictures -> 5 classes."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.pool = nn.MaxPool2d(2)
        self.block = Block(channels)
        self.fc = nn.Linear(channels * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn(self.stem(x))))
        return self.fc(F.avg_pool2d(self.block(x), 2).flatten(1))


def load(first: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Training and held-back pictures of the five digits from ``first`` on: every fourth one is held back."""
    data = load_digits()
    chosen = (data.target >= first) & (data.target < first + 5)
    x = (data.images[chosen, None] / 8.0 - 1.0).astype(np.float32)
    y = (data.target[chosen] - first).astype(np.int32)
    held_back = np.arange(len(x)) % 4 == 3
    return {"x": x[~held_back], "y": y[~held_back]}, {"x": x[held_back], "y": y[held_back]}


def pretrain(epochs: int = 12) -> Digits:
    """An ordinary PyTorch training on the digits 0 to 4; returns the network in eval mode."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = Digits()
    train, held_back = load(0)
    x, y = torch.from_numpy(train["x"]), torch.from_numpy(train["y"]).long()
    optimizer = torch.optim.Adam(network.parameters(), 0.003)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        right = network(torch.from_numpy(held_back["x"])).argmax(1).numpy() == held_back["y"]
    print(f"pretrained on digits 0-4 in PyTorch: {right.mean():.1%} on held-back pictures")
    return network


def draw(losses: list[float], before: float, after: float, path: Path) -> None:
    """Loss of every step, its moving average, accuracy before and after: a picture, and lines in the terminal."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    window = max(1, len(losses) // 40)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), width_ratios=(3, 1))
    left.plot(losses, color="0.8", linewidth=0.5, label="loss of a step")
    left.plot(np.arange(len(smooth)) + window - 1, smooth, label=f"mean of {window} steps")
    left.set(xlabel="training step on the emulated Cortex-M7", ylabel="cross entropy", ylim=(0, None))
    left.legend()
    bars = right.bar(["before", "after"], [100 * before, 100 * after])
    right.bar_label(bars, fmt="%.1f %%")
    right.set(ylabel="accuracy on held-back digits 5-9, %", ylim=(0, 105))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

    columns, rows = 72, 10
    means = [float(np.mean(part)) for part in np.array_split(losses, columns)]
    top = max(means)
    print(f"\nloss (top {top:.2f}, bottom 0), {len(losses)} steps")
    for row in range(rows, 0, -1):
        print("  |" + "".join("█" if m / top * rows >= row - 0.5 else " " for m in means))
    print("  +" + "-" * columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--emulator", choices=("auto", "unicorn", "qemu", "host"), default="auto")
    arguments = parser.parse_args()
    network = pretrain()
    train, held_back = load(5)
    artifact = tte.compile(
        network,
        example_inputs=(torch.zeros(1, 1, 8, 8),),
        update_scheme=HERE / "sparse.yaml",
        target="stm32f746",
        name="digits",
    )
    artifact.export(arguments.out)
    memory = artifact.report["memory"]
    print(f"compiled for the STM32F746: {memory['static_ram_bytes']:,} bytes of RAM, "
          f"{artifact.report['flash_bytes']:,} bytes of flash")  # fmt: skip
    np.savez(arguments.out / "train.npz", **train)
    np.savez(arguments.out / "eval.npz", **held_back)
    columns = (TextColumn("training on the board"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}")) as bar:
        task = bar.add_task("", loss=float("nan"), total=arguments.epochs * len(train["x"]))
        result = artifact.run(
            train,
            evaluation=held_back,
            runner=arguments.emulator,
            epochs=arguments.epochs,
            progress=lambda step, total, loss: bar.update(task, completed=step, total=total, loss=loss),
        )
    (arguments.out / "run.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    assert result.accuracy_before is not None and result.accuracy_after is not None
    draw(result.loss, result.accuracy_before, result.accuracy_after, arguments.out / "training.png")
    print(f"\naccuracy on held-back digits 5-9: {result.accuracy_before:.1%} before, {result.accuracy_after:.1%} after")
    if result.instructions_per_step:
        print(f"{result.instructions_per_step:,} instructions per training step, {result.stack_bytes} bytes of stack")
    print(f"see {arguments.out / 'training.png'} and {arguments.out / 'report.html'}")


if __name__ == "__main__":
    main()

"""What `tte tune` gains on networks that nobody tuned for: a table for docs/tune.md."""

import argparse
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import mlperf
import torch
from torch import Tensor, nn

import tte


class Odd(nn.Module):
    """Shapes that nobody would choose: 3 x 37 x 29, seven classes."""

    def __init__(self) -> None:
        super().__init__()
        layers = [mlperf.conv(3, 13, 3, 2), mlperf.conv(13, 13, 5, 1, 13), mlperf.conv(13, 27, 1)]
        layers += [mlperf.conv(27, 19, 3, 2), mlperf.conv(19, 19, 3, 1, 19), mlperf.conv(19, 45, 1)]
        self.layers, self.fc = nn.Sequential(*layers), nn.Linear(45, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean((2, 3)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dscnn": (lambda: mlperf.make("dscnn"), (1, 1, 49, 10)),
    "resnet8": (lambda: mlperf.make("resnet8"), (1, 3, 32, 32)),
    "odd": (lambda: Odd().eval(), (1, 3, 37, 29)),
}
SCHEMES: dict[str, Any] = {"biases": "bias-only", "int8": {"train": "full", "quantized": {"gradients": "int8"}}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    options = parser.parse_args()
    torch.manual_seed(0)
    print("| network | learns | plan | measured | inference, default | tuned | | step, default | tuned | | flash |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name in options.only:
        make, shape = NETWORKS[name]
        with tempfile.TemporaryDirectory() as folder:
            model, schedules = Path(folder) / "model.onnx", Path(folder) / "schedules.json"
            mlperf.quantize(make(), shape, model)
            for (learns, scheme), plan in product(SCHEMES.items(), ("fastest", "smallest")):
                given = {"update_scheme": scheme, "memory_plan": plan}
                found = tte.tune(model, schedules=schedules, trials=options.trials, jobs=options.jobs, **given)
                reports = [tte.compile(model, schedules=s, **given).report for s in (None, schedules)]
                cells: list[str] = []
                for call in ("infer", "train_step"):
                    before, after = (report[call]["instructions"] for report in reports)
                    cells += [f"{before:,}", f"{after:,}", f"{after / before - 1:.1%}"]
                before, after = (report["flash_bytes"] for report in reports)
                cells.append(f"{after - before:+,}")
                print(f"| {name} | {learns} | {plan} | {found.measured} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

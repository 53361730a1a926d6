"""What `tte tune` gains on networks that nobody tuned for: a table for docs/tune.md."""

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import mlperf
import torch
from torch import Tensor, nn

import tte
from tte.tuning import Tuned


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
SCHEMES: dict[str, Any] = {
    "biases": "bias-only",
    "int8": {"train": "full", "quantized": {"gradients": "int8"}},
    "float32": "full",  # of the network as it is, not quantised
}
COLUMNS = {"instructions": ("inference", "step"), "cycles": ("estimated cycles", "inference")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--learns", nargs="*", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--plans", nargs="*", choices=("fastest", "smallest"), default=["fastest", "smallest"])
    parser.add_argument("--metric", choices=COLUMNS, default="instructions")
    options = parser.parse_args()
    columns = [f"{name}, default | tuned | " for name in COLUMNS[options.metric]]
    print(f"| network | learns | plan | measured | {' | '.join(columns)} | flash |")
    print(f"|---|---|---|---:|{'---:|' * (3 * len(columns) + 1)}")
    for name in options.only:
        shape = NETWORKS[name][1]
        with tempfile.TemporaryDirectory() as folder:
            quantized, schedules = Path(folder) / "model.onnx", Path(folder) / "schedules.json"
            mlperf.quantize(make(name), shape, quantized)
            for learns, plan in product(options.learns, options.plans):
                model = (make(name), (torch.zeros(shape),)) if learns == "float32" else (quantized, None)
                given = {"update_scheme": SCHEMES[learns], "memory_plan": plan}
                searched = {"trials": options.trials, "jobs": options.jobs, "metric": options.metric}
                found = tte.tune(*model, schedules=schedules, **searched, **given)
                reports = [tte.compile(*model, schedules=s, **given).report for s in (None, schedules)]
                cells: list[str] = []
                for before, after in list_costs(options.metric, found, reports):
                    cells += [f"{before:,}", f"{after:,}", f"{after / before - 1:.1%}"]
                before, after = (report["flash_bytes"] for report in reports)
                cells.append(f"{after - before:+,}")
                print(f"| {name} | {learns} | {plan} | {found.measured} | {' | '.join(cells)} |", flush=True)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name][0]()


def list_costs(metric: str, found: Tuned, reports: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Before and after: instructions of an inference and of a step; or cycles of kernels that may become others, and
    instructions of an inference."""
    infer, step = [tuple(report[call]["instructions"] for report in reports) for call in ("infer", "train_step")]
    kernels = (sum(row.default for row in found.rows), sum(row.tuned for row in found.rows))
    return [infer, step] if metric == "instructions" else [kernels, infer]


if __name__ == "__main__":
    main()

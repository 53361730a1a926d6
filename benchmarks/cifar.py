"""ResNet-20 learns JPEG-compressed CIFAR-10: one epoch of batch 1, the generated C on this computer."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from data import load_pictures
from models import CIFAR_MEAN, CIFAR_STD, resnet20
from rich.progress import track

import tte


def load(split: int) -> dict[str, np.ndarray]:
    x, y = load_pictures("cifar10-jpeg", split)
    x = (x.astype(np.float32) / 255 - CIFAR_MEAN) / CIFAR_STD
    return {"x": np.ascontiguousarray(x.transpose(0, 3, 1, 2)), "y": y}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", default="full")
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/cifar.json"))
    arguments = parser.parse_args()
    scheme = {"train": arguments.scheme, "optimizer": {"lr": arguments.lr}}
    artifact = tte.compile(resnet20(), (torch.zeros(1, 3, 32, 32),), scheme, name="resnet20")
    steps = iter(track(range(10_000), description="training"))
    result = artifact.run(
        load(0), evaluation=load(1), runner="host", epochs=1, seed=arguments.seed, progress=lambda *_: next(steps, None)
    )
    record = {"scheme": scheme, "seed": arguments.seed, "steps": result.steps} | result.metric
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"| scheme | rate | steps | before | after |\n|---|---|---|---|---|\n| {arguments.scheme} | {arguments.lr} | "
          f"{result.steps} | {result.accuracy_before:.2%} | {result.accuracy_after:.2%} |")  # fmt: skip


if __name__ == "__main__":
    main()

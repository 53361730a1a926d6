"""A small CNN pretrained on MNIST's digits 0 to 4 learns 5 to 9: batch 1, the generated C on this computer."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import load_mnist
from torch import nn

import tte


def make_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(), nn.Flatten(), nn.Linear(512, 5),
    )  # fmt: skip


def load(split: int, first: int) -> dict[str, np.ndarray]:
    x, y = load_mnist(split)
    chosen = (y >= first) & (y < first + 5)
    return {"x": (x[chosen, None] / 127.5 - 1).astype(np.float32), "y": y[chosen] - first}


def pretrain() -> nn.Sequential:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = make_network()
    data = load(0, 0)
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"]).long()
    optimizer = torch.optim.Adam(network.parameters(), 0.002)
    for _ in range(2):
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/mnist.json"))
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    network = pretrain()
    train, test = load(0, 5), load(1, 5)
    rows = []
    for scheme in ("full", "bias-only", "last-layer"):
        settings = {"train": scheme, "optimizer": {"lr": arguments.lr}, "head": {"layer": "7", "classes": 5}}
        artifact = tte.compile(network, (torch.zeros(1, 1, 28, 28),), settings, name="mnist")
        result = artifact.run(train, evaluation=test, runner="host", epochs=arguments.epochs)
        rows.append({"scheme": scheme, "steps": result.steps} | result.metric)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(rows, indent=2) + "\n")
    print("| scheme | steps | before | after |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['scheme']} | {row['steps']} | {row['before']:.2%} | {row['after']:.2%} |")


if __name__ == "__main__":
    main()

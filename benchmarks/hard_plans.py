"""How well the memory planner does on instances that are hard on purpose, and how long it takes on long graphs.

For docs/measurements.md: python benchmarks/hard_plans.py

An instance is a full rectangle, time x bytes, cut into pieces: across time, across bytes, or into a pinwheel of five,
which no straight cut takes apart. So a placement without a gap exists, and its height is the lower bound; the planner
sees the pieces without their places, in another order.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

import tte.ops  # noqa: F401  fills the table of operators
from tte.codegen.plan import Buffer, place, plan_memory
from tte.ir import Builder, Graph, TensorType, Value

WORDS = 2**18  # 1 MB
SIZES = (50, 100, 200, 400)
KINDS = {"cuts": 0.0, "pinwheels": 0.6}  # the share of pieces that are cut into five
SEEDS = 2
JITTER = (0.0, 0.2)
NODES = 1000


def cut(count: int, pinwheels: float, rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """About ``count`` pieces (first time, last time + 1, first word, last word + 1) that fill the rectangle."""
    pieces = [(0, 2 * count, 0, WORDS)]
    while len(pieces) < count:
        areas = np.array([(b - a) * (d - c) for a, b, c, d in pieces], float)
        a, b, c, d = pieces.pop(int(rng.choice(len(pieces), p=areas / areas.sum())))
        width, height = b - a, d - c
        if width > 3 and height > 3 and rng.random() < pinwheels:
            t0, t1 = sorted(rng.choice(np.arange(a + 1, b), 2, replace=False).tolist())
            y0, y1 = sorted(rng.choice(np.arange(c + 1, d), 2, replace=False).tolist())
            pieces += [(a, t1, c, y0), (t1, b, c, y1), (t0, b, y1, d), (a, t0, y0, d), (t0, t1, y0, y1)]
        elif width > 1 and (height < 2 or rng.random() < 0.5):
            t = int(rng.integers(a + 1, b))
            pieces += [(a, t, c, d), (t, b, c, d)]
        elif height > 1:
            y = int(rng.integers(c + 1, d))
            pieces += [(a, b, c, y), (a, b, y, d)]
        else:
            pieces.append((a, b, c, d))
    return pieces


def draw(count: int, pinwheels: float, jitter: float, seed: int) -> tuple[tuple[Buffer, ...], int]:
    """Buffers in no order, and the least height. A share ``jitter`` of the pieces is a little smaller than its place,
    but for those that are alive in the middle: there no byte is free."""
    rng = np.random.default_rng((count, int(10 * pinwheels), int(10 * jitter), seed))
    buffers = []
    for a, b, c, d in cut(count, pinwheels, rng):
        if not a <= count < b and rng.random() < jitter:
            b -= int(rng.integers(0, max(1, (b - a) // 4)))
            d -= int(rng.integers(0, max(1, (d - c) // 8)))
        buffers.append((4 * (d - c), a, b - 1))
    order = rng.permutation(len(buffers))
    return tuple(Buffer(str(i), "", *buffers[k]) for i, k in enumerate(order)), 4 * WORDS


def measure(count: int, kind: str, jitter: float, seeds: Sequence[int]) -> dict[str, Any]:
    gaps, seconds, proofs = [], [], []
    for seed in seeds:
        buffers, bound = draw(count, KINDS[kind], jitter, seed)
        start = time.process_time()
        placed, proof = place(buffers, bound)
        seconds.append(time.process_time() - start)
        gaps.append((max(b.end for b in placed) - bound) / bound)
        proofs.append(proof)
    return {"gaps": gaps, "seconds": seconds, "proofs": proofs}


def long_graph(nodes: int, reach: int, seed: int) -> Graph:
    """Elementwise operators, each on the result before it and on one of the ``reach`` results before that."""
    rng = np.random.default_rng(seed)
    builder, values = Builder(), [Value("x", TensorType((int(rng.integers(64, 4096)),)))]
    while len(builder.nodes) < nodes:
        size = int(rng.integers(64, 4096))
        other = values[-1 - int(rng.integers(0, min(reach, len(values))))]
        both = [builder.call("sum", v, axis=(0,), keepdims=True) for v in (values[-1], other)]
        zeros = builder.const(np.zeros(size, np.float32))
        values.append(builder.call("add", builder.call("add", *both), zeros))
    read = {v.name for node in builder.nodes for v in node.inputs}
    rest = tuple(n.output for n in builder.nodes if n.output.name not in read)
    consts = tuple(builder.consts.values())
    return Graph("main", (values[0],), (), consts, tuple(builder.nodes), rest).renumbered()


def render(rows: dict[tuple[int, str, float], dict[str, Any]]) -> str:
    lines = [
        "| buffers | pieces | made smaller | bound reached | mean gap | largest gap | seconds, mean | most |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (count, kind, jitter), row in rows.items():
        gaps, seconds = row["gaps"], row["seconds"]
        reached = f"{sum(g == 0 for g in gaps)} of {len(gaps)}"
        numbers = f"{np.mean(gaps):.2%} | {max(gaps):.2%} | {np.mean(seconds):.1f} | {max(seconds):.1f}"
        lines.append(f"| {count} | {kind} | {jitter:.0%} | {reached} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=Path("build/hard_plans.md"))
    given = parser.parse_args()
    cases = [(count, kind, jitter) for count in given.sizes for kind in KINDS for jitter in JITTER]
    rows = {case: measure(*case, range(given.seeds)) for case in track(cases)}
    lines = [render(rows), "", "| nodes | reach | seconds | gap | proof |", "|---:|---:|---:|---:|---|"]
    for reach in (2, 20, 200):
        graph = long_graph(NODES, reach, 0)
        start = time.process_time()
        plan = plan_memory(graph)
        seconds = time.process_time() - start
        gap = plan.gap / plan.lower_bound
        lines.append(f"| {len(graph.nodes)} | {reach} | {seconds:.1f} | {gap:.2%} | {plan.proof or 'none'} |")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

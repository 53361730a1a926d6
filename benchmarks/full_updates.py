"""Full updates of MIT's int8 models in less and less memory: bytes, and what is computed twice for that.

For docs/memory.md: python benchmarks/full_updates.py
"""

import argparse
import time

from data import import_published

import tte

TRAIN = {"train": "full", "io": {"input": {"dtype": "int8", "layout": "nhwc", "std": [127.5]}}}
TOTALS = {"mcunet-5fps": (900_000, 750_000, 690_000), "mbv2-w0.35": (700_000, 500_000, 410_000)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    print("| | arena | trained | together | more multiply-accumulates | seconds |\n|---|---:|---:|---:|---:|---:|")
    for stem, totals in TOTALS.items():
        model, trained, least = import_published(stem, 10), 0, 0
        for total in (None, *totals):
            start = time.perf_counter()
            plan = "smallest" if total is None else total - trained
            artifact = tte.compile(model, update_scheme=TRAIN, target="host", input="arena", memory_plan=plan)
            memory = artifact.report["memory"]
            arena, trained = memory["arena_bytes"], memory["trained_bytes"]
            macs = sum(node.macs for node in artifact.graph.nodes)
            least = least or macs
            more = f"{(macs - least) / 1e6:.2f} M ({(macs - least) / least:.1%})"
            seconds = time.perf_counter() - start
            print(f"| {stem} | {arena:,} | {trained:,} | {arena + trained:,} | {more} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()

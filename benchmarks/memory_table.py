"""What training ResNet-8 costs on a Cortex-M7, by what learns, and what each pass of the compiler buys."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models import Network, load_networks
from rich.progress import track

import tte
from tte.compiler import OPTIONAL

SCHEMES = ("full", "last-k:6", "last-k:3", "sparse", "bias-only", "last-layer")
COLUMNS = ("trained_bytes", "arena_bytes", "static_ram_bytes", "flash_bytes", "instructions")


def measure(network: Network, scheme: str, disabled: Sequence[str] = ()) -> dict[str, Any]:
    """Sizes of the linked firmware; instructions of one training step, counted by the emulator."""
    artifact = tte.compile(
        network.model, network.example, network.scheme(scheme), "cortex-m7", network.name, disable_passes=disabled
    )
    report = artifact.report
    return {
        "toolchain": report["toolchain"],
        "trained_bytes": report["memory"]["trained_bytes"],
        "arena_bytes": artifact.plan.arena_bytes,
        "lower_bound_bytes": artifact.plan.lower_bound,
        "static_ram_bytes": report["memory"]["static_ram_bytes"],
        "flash_bytes": report["flash_bytes"],
        "instructions": report["train_step"]["instructions"],
    }


def render(first: str, rows: dict[str, dict[str, Any]], columns: Sequence[str]) -> str:
    lines = [f"| {first} | {' | '.join(c.replace('_', ' ') for c in columns)} |", "|---" + "|---:" * len(columns) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[c]:,}' for c in columns)} |" for name, row in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/memory_table.json"))
    arguments = parser.parse_args()
    network = next(n for n in load_networks() if n.name == "resnet8")
    schemes = {scheme: measure(network, scheme) for scheme in track(SCHEMES, description="schemes")}
    left_out = {}
    for name in track(("none", *OPTIONAL), description="passes"):
        off = () if name == "none" else (name,)
        full, last = (measure(network, scheme, off) for scheme in ("full", "last-k:3"))
        left_out[name] = {
            "arena, full": full["arena_bytes"],
            "instructions, full": full["instructions"],
            "arena, last-k:3": last["arena_bytes"],
            "instructions, last-k:3": last["instructions"],
        }
        assert all(m["arena_bytes"] == m["lower_bound_bytes"] for m in (full, last)), name
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"schemes": schemes, "left_out": left_out}, indent=2) + "\n")
    print(render("what learns", schemes, COLUMNS), "\n")
    print(render("left out", left_out, tuple(left_out["none"])))


if __name__ == "__main__":
    main()

"""How many bytes training takes, and what each way of saving memory buys: MIT's published models and schemes.

For docs/memory.md: python benchmarks/memory_techniques.py. Arena and trained parameters, as planned; the picture comes
row by row, unless it is said to lie in the arena.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from data import import_published, load_scheme
from rich.progress import track

import tte

SCHEMES = ("mcunet-5fps-49kb", "mcunet-5fps-99kb", "mcunet-5fps-148kb", "mbv2-w0.35-49kb", "mbv2-w0.35-99kb")
# What is left out -> passes, and where the picture lies.
ROWS: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "rows"),
    "the row source: the picture lies in the arena": ((), "arena"),
    "tiles of channels": (("tile_backward",), "rows"),
    "forward by rows": (("stream_forward",), "rows"),
    "forward by rows, tiles of channels": (("stream_forward", "tile_backward"), "rows"),
    "results in place": (("work_in_place",), "rows"),
}


def measure(scheme: str, model: Any, disabled: tuple[str, ...], place: str) -> dict[str, Any]:
    rules = load_scheme(scheme)
    artifact = tte.compile(model, update_scheme=rules, target="host", input=place, disable_passes=disabled)
    memory = artifact.report["memory"]
    return {
        "arena_bytes": memory["arena_bytes"],
        "total_bytes": memory["arena_bytes"] + memory["trained_bytes"],
        "proved": memory["proved_optimal"],
        "macs": sum(node.macs for node in artifact.graph.nodes),
    }


def render(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = [f"| left out | {' | '.join(SCHEMES)} |", "|---" + "|---:" * len(SCHEMES) + "|"]
    for name, row in rows.items():
        cells = [f"{row[s]['total_bytes']:,}{'' if row[s]['proved'] else ' (not proved)'}" for s in SCHEMES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/memory_techniques.json"))
    out = parser.parse_args().out
    rows: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in ROWS}
    for scheme in track(SCHEMES, description="schemes"):
        model = import_published(scheme.rpartition("-")[0], classes=10, int8_head=True)
        for name, (disabled, place) in ROWS.items():
            rows[name][scheme] = measure(scheme, model, disabled, place)
            assert rows[name][scheme]["macs"] == rows["nothing"][scheme]["macs"], (name, scheme)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=2) + "\n")
    print(render(rows))


if __name__ == "__main__":
    main()

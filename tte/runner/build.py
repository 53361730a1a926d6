"""A folder that tte has written, as the runner sees it: the description in build.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tte.document import read_json
from tte.errors import TTEError
from tte.target import FLAG

DTYPES = {t.__name__: t for t in (np.float32, np.int32, np.int16, np.int8, np.uint8)}


@dataclass(frozen=True)
class Tensor:
    """A buffer of the C API."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def sample(self) -> tuple[int, ...]:
        """The shape without the batch dimension of 1."""
        return self.shape[1:] if self.shape[:1] == (1,) else self.shape


@dataclass(frozen=True)
class Slot:
    """A trained parameter in the saved state: ``name`` in the graph, its bytes at ``offset`` of the payload."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Call:
    """A call of a kernel, and what it computes; parts: the calls of a kernel that makes several layers in pieces."""

    layer: str
    op: str
    macs: int
    kernel: str
    parts: tuple["Call", ...] = ()


@dataclass(frozen=True)
class Build:
    """What build.json says of the project in ``folder``.

    target: None when the input is its own target; classes: None when there are no labels
    calls: of each program ("infer", "evaluate", "train"), in the order of execution
    """

    folder: Path
    name: str
    target_name: str
    model_hash: bytes
    input: Tensor
    input_layout: str
    output: Tensor
    target: Tensor | None
    classes: int | None
    loss: str
    learning_rate: float
    arena: str
    optimize: str
    arena_bytes: int
    state_bytes: int
    state: tuple[Slot, ...]
    calls: dict[str, tuple[Call, ...]]

    @staticmethod
    def open(folder: Path | str) -> "Build":
        """Read build.json. Raises TTEError (E050) where ``folder`` is not a project of tte."""
        folder = Path(folder)
        path = folder / "build.json"
        data = read_json(path, "TTE-E050", "no project of tte", "give the folder that `tte compile -o` wrote")
        try:
            return Build(
                folder,
                data["name"],
                data["target"],
                bytes.fromhex(data["model_hash"]),
                _tensor(data["input"]),
                data["input"]["layout"],
                _tensor(data["output"]),
                _tensor(data["label"]) if data["label"] else None,
                data["classes"],
                data["loss"],
                data["learning_rate"],
                data["arena"],
                data["optimize"],
                data["arena_bytes"],
                data["state_bytes"],
                tuple(
                    Slot(s["name"], s["offset"], tuple(s["shape"]), np.dtype(DTYPES[s["dtype"]])) for s in data["state"]
                ),
                {role: tuple(map(_call, calls)) for role, calls in data["calls"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            what = "no project of this version of tte, or build.json was changed"
            raise TTEError("TTE-E050", what, where=str(path), fix="compile the model again") from problem

    def list_sources(self, selftest: bool = False) -> list[Path]:
        """The C of the program, with or without its self-test."""
        found = sorted((self.folder / "Core" / "Src").glob(f"{self.name}*.c"))
        return [path for path in found if selftest or path.name != f"{self.name}_selftest.c"]

    @property
    def flag(self) -> str:
        """The compiler's option that the project is made for."""
        return FLAG[self.optimize]

    @property
    def include(self) -> Path:
        return self.folder / "Core" / "Inc"


def _call(data: dict[str, Any]) -> Call:
    parts = tuple(map(_call, data.get("parts", ())))
    return Call(data["layer"], data["op"], data["macs"], data["kernel"], parts)


def _tensor(data: dict[str, Any]) -> Tensor:
    return Tensor(tuple(data["shape"]), np.dtype(DTYPES[data["dtype"]]))

"""What was measured of faster kernels: a file that `tte tune` fills, and that a schedule is chosen by."""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta

from tte.codegen.kernel import Kernel
from tte.document import read_json, show
from tte.errors import TTEError

HERE = Path(__file__).parent
SHIPPED = HERE / "measured.json"


@dataclass(frozen=True)
class Measurement:
    """Of a kernel: by which form and knobs it is made, the bytes of its scratch, by compiler the instructions that it
    executes, and by compiler and model of the core the cycles that they are estimated to take."""

    form: str
    knobs: Mapping[str, int]
    scratch: int
    instructions: Mapping[str, int]
    cycles: Mapping[str, int] = field(default_factory=dict)

    def as_of(self, other: "Measurement") -> Mapping[str, int]:
        """What it costs, as far as it is known in what the other is: in cycles, if those are."""
        return self.cycles if other.cycles else self.instructions

    def improves(self, other: "Measurement") -> bool:
        """Costs less by some compiler, and by none more."""
        own = self.as_of(other)
        common = [(own.get(c), n) for c, n in other.as_of(other).items()]
        return all(mine is not None and mine <= n for mine, n in common) and any(mine != n for mine, n in common)


Measured = Mapping[str, Mapping[str, Measurement]]  # shape, see ``name_shape`` -> kernel, see ``identify``


@dataclass
class Database:
    """Measurements by core, shape and kernel."""

    cores: dict[str, dict[str, dict[str, Measurement]]] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> "Database":
        """Raises TTEError (E090) for a file that is none, or damaged."""
        what, fix = (
            "no database of schedules",
            "give a file that `tte tune` wrote; it makes one under a new name",
        )
        reason = "it holds something else, or was changed"
        content = read_json(path, "TTE-E090", what, fix)
        result = Database()
        try:
            if content["schema_version"] != 1:
                reason = f"schema_version is {show(content['schema_version'])}, not 1"
                raise ValueError(reason)
            for core, shapes in content["cores"].items():
                for shape, kernels in shapes.items():
                    for name, record in kernels.items():
                        result.add(core, shape, name, _read(record))
            return result
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise TTEError("TTE-E090", f"{what}: {reason}", where=str(path), fix=fix) from problem

    def write(self, path: Path) -> None:
        """The same content gives the same bytes. The file is always whole. Raises TTEError (E045)."""
        cores = {
            core: {
                shape: {name: _record(m) for name, m in sorted(kernels.items())}
                for shape, kernels in sorted(shapes.items())
            }
            for core, shapes in sorted(self.cores.items())
        }
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            draft.write_text(json.dumps({"schema_version": 1, "cores": cores}, indent=1, sort_keys=True) + "\n")
            draft.replace(path)
        except OSError as problem:
            draft.unlink(missing_ok=True)
            what = f"cannot write: {problem.strerror}"
            raise TTEError("TTE-E045", what, where=str(path), fix="choose another place") from problem

    def add(self, core: str, shape: str, name: str, measurement: Measurement) -> None:
        """To what is known; of two counts by the same compiler the later is right."""
        known = self.cores.setdefault(core, {}).setdefault(shape, {})
        before = known.get(name, measurement)
        counts = [{**getattr(before, key), **getattr(measurement, key)} for key in ("instructions", "cycles")]
        known[name] = replace(measurement, instructions=counts[0], cycles=counts[1])

    def of(self, core: str) -> dict[str, dict[str, Measurement]]:
        return self.cores.get(core, {})


def _record(measurement: Measurement) -> dict[str, Any]:
    return {key: value for key, value in vars(measurement).items() if key != "cycles" or value}


def _read(record: Mapping[str, Any]) -> Measurement:
    counts = (dict(record["instructions"]), dict(record.get("cycles", {})))
    result = Measurement(record["form"], dict(record["knobs"]), record["scratch"], *counts)
    numbers = [*result.knobs.values(), result.scratch, *result.instructions.values(), *result.cycles.values()]
    if (
        type(result.form) is not str
        or not result.instructions
        or any(type(number) is not int or number < 0 for number in numbers)
    ):
        raise ValueError(f"{record} is no measurement")
    return result


def merge(databases: Iterable[Database]) -> Database:
    """All that any of them knows; where two disagree, the later is right."""
    result = Database()
    for database in databases:
        for core, shapes in database.cores.items():
            for shape, kernels in shapes.items():
                for name, measurement in kernels.items():
                    result.add(core, shape, name, measurement)
    return result


@functools.cache
def read_shipped() -> Database:
    """What comes with tte."""
    return Database.read(SHIPPED)


@functools.cache
def name_shape(kernel: Kernel) -> str:
    """The operator and its tensors, to be read; and a digest of all that its speed depends on."""
    context = kernel.arguments()
    tensors = [*context.get("ins", []), *([context["out"]] if "out" in context else [])]
    sizes = ["x".join(map(str, t["shape"])) + f" {t['dtype']}" for t in tensors]
    pieces = "a row" if context["rows"] is not None else "a tile" if context["tile"] else "all"
    return f"{kernel.template} {', '.join(sizes)}: {pieces}, {_digest(_without_scales(context))}"


@functools.cache
def identify(kernel: Kernel) -> str:
    """A digest of how a kernel is made."""
    family = [(k, _source(f"{k.template}.c.j2")) for k in kernel.family()]
    return _digest([(source, _without_scales(k.arguments()), k.scratch) for k, source in family])


@functools.cache
def _source(template: str) -> str:
    """A digest of a template and of those that it is made with."""
    text = (HERE / "kernels" / template).read_text()
    used = [name for name in meta.find_referenced_templates(jinja2.Environment().parse(text)) if name]
    return _digest([text, *map(_source, sorted(used))])


def _without_scales(value: Any, key: str = "") -> Any:
    """What layers of the same shape have in common: of scales and zero points only whether there are any."""
    if isinstance(value, dict):
        return {k: _without_scales(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_scales(v) for v in value]
    constant = key.rpartition("_")[2] in ("scale", "zero", "point", "value") and not isinstance(value, str)
    return bool(value) if constant else value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]

"""tte: an ahead-of-time training compiler for microcontrollers."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tte.analysis import analyze
    from tte.artifact import Artifact, compile
    from tte.errors import TTEError
    from tte.explain import explain_memory
    from tte.ptq import quantize
    from tte.scheme import UpdateScheme
    from tte.target import targets
    from tte.tuning import tune
    from tte.weights import load_weights

# Where each public name lives. It is imported when it is first asked for: ``import tte`` waits for nothing.
_HOMES = {
    "Artifact": "tte.artifact",
    "TTEError": "tte.errors",
    "UpdateScheme": "tte.scheme",
    "analyze": "tte.analysis",
    "compile": "tte.artifact",
    "explain_memory": "tte.explain",
    "load_weights": "tte.weights",
    "quantize": "tte.ptq",
    "targets": "tte.target",
    "tune": "tte.tuning",
}

__all__ = [
    "Artifact", "TTEError", "UpdateScheme", "analyze", "compile", "explain_memory", "load_weights", "ops", "quantize",
    "targets", "tune",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    import importlib

    if name == "ops":  # a package that can be called
        return importlib.import_module("tte.ops")
    if name not in _HOMES:
        raise AttributeError(f"module 'tte' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

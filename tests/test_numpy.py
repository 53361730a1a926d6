"""Numbers on their way into C: Python's, inside of their C types, and the same whichever numpy computed them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import qdq

import tte
from tte.codegen.emit import _array
from tte.codegen.schedule import schedule
from tte.ir import Builder, Const, Graph, TensorType, Value

SCHEMES: tuple[Any, ...] = (
    {"train": [{"layer": "blocks.4.*", "weight": {"in_channels": 0.5, "select": "l2"}, "bias": True}]},
    {"train": "last-k:3", "quantized": {"weight_storage": "int16_ef", "requantize": "float"}},
    {"train": "last-layer", "quantized": {"weight_storage": "fp32"}},
)
PRINT = f"""
import hashlib, sys, numpy, tte
files = [tte.compile(sys.argv[1], update_scheme=s)._files for s in {SCHEMES!r}]
text = [(k, v) for f in files for k, v in sorted(f.items()) if k.endswith((".c", ".h", "build.json"))]
assert len(text) > 30, len(text)
print(numpy.__version__, hashlib.sha256(repr(text).encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def mcunet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qdq.quantize(qdq.RECIPES["mcunet"], tmp_path_factory.mktemp("mcunet"))


@pytest.mark.skipif("TTE_NUMPY" not in os.environ, reason="TTE_NUMPY names no folder with another major of numpy")
def test_two_majors_of_numpy_give_the_same_c(mcunet: Path) -> None:
    """pip install --no-deps --target build/numpy1 numpy==1.26.4; TTE_NUMPY=$PWD/build/numpy1 pytest tests"""
    path = os.environ.get("PYTHONPATH", "")
    answers = []
    for folder in ("", os.environ["TTE_NUMPY"]):
        environment = os.environ | {"PYTHONPATH": f"{folder}:{path}".strip(":")}
        run = subprocess.run([sys.executable, "-c", PRINT, mcunet], env=environment, capture_output=True, check=True)
        answers.append(run.stdout.decode().split())
    (one, first), (other, second) = answers
    assert one.split(".")[0] != other.split(".")[0]
    assert first == second


def test_templates_see_no_numbers_of_numpy(mcunet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy 2 prints np.float32(0.1) where numpy 1 prints 0.1."""
    seen = []

    def search(value: Any, where: str) -> None:
        seen.append(where)
        assert not isinstance(value, np.generic), f"{where} is {value!r}"
        if isinstance(value, dict):
            for key, item in value.items():
                search(item, f"{where}.{key}")
        elif isinstance(value, list | tuple | set):
            for item in value:
                search(item, f"{where}[]")
        elif hasattr(value, "__dataclass_fields__") and not isinstance(value, Value):
            search(vars(value), where)

    render = jinja2.Template.render

    def checked(template: jinja2.Template, *args: Any, **kwargs: Any) -> str:
        search([*args, kwargs], str(template.name))
        return render(template, *args, **kwargs)

    monkeypatch.setattr(jinja2.Template, "render", checked)
    for scheme in SCHEMES:
        assert tte.compile(mcunet, update_scheme=scheme)._files
        # The rest needs no compiler: what the self-test must find was seen.
        monkeypatch.setattr("tte.artifact.Artifact._golden", lambda *_: (3, {"output": 1, "state": 2}))
    assert len(seen) > 10_000


@pytest.mark.parametrize(("dtype", "value"), [("int8", 128), ("int8", -129), ("int16", 40000), ("int32", 2**31)])
def test_a_number_that_does_not_fit_names_its_tensor(dtype: str, value: int) -> None:
    const = Const("layer.weight", TensorType((2,), dtype), np.asarray([0, value], np.int64))
    with pytest.raises(AssertionError, match=r"layer\.weight: .* does not fit"):
        _array("w", const)


@pytest.mark.parametrize("value", [np.float32(0.1), np.float64(0.1), np.int64(3), 2**31])
def test_attributes_are_numbers_of_python(value: Any) -> None:
    builder = Builder()
    x = Value("x", TensorType((3,)))
    y = builder.call("nn.leaky_relu", x, alpha=value)
    graph = Graph("main", (x,), nodes=tuple(builder.nodes), outputs=(y,)).renumbered()
    with pytest.raises(AssertionError, match="attribute"):
        schedule(graph)

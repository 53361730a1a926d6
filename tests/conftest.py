"""What tests share: the data pack, imported modules, and the option that rewrites golden files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
from data import VARIABLE, find_pack

IMPORTED: WeakKeyDictionary[Any, dict[tuple[Any, ...], Any]] = WeakKeyDictionary()  # module -> its graphs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite golden files from what the compiler does now"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--update-golden") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--update-golden writes files that tests share: run it without -n")


@pytest.fixture(scope="session")
def update_golden(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--update-golden"))


@pytest.fixture(scope="session")
def pack() -> Path:
    """The folder of real models and data; without it the test is skipped."""
    folder = find_pack()
    if folder is None:
        pytest.skip(f"no data pack: neither ../shared/data nor the variable {VARIABLE} names one")
    return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all test processes, for what one of them builds; lock what you write."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def import_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that compile one module in several ways: torch.export takes as long as all the rest."""
    import torch

    from tte.frontends import import_model

    def import_again(model: Any, example: Sequence[Any] | None = None, *rest: Any) -> Any:
        if not isinstance(model, torch.nn.Module) or not isinstance(example, tuple):
            return import_model(model, example, *rest)
        weights = ((name, t.data_ptr(), t._version) for name, t in model.state_dict(keep_vars=True).items())
        key = (model.training, *((x.shape, x.dtype) for x in example), *rest, *weights)
        found = IMPORTED.setdefault(model, {})
        if key not in found:
            found[key] = import_model(model, example, *rest)
        return found[key]

    monkeypatch.setattr("tte.compiler.import_model", import_again)

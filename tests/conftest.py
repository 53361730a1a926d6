"""What tests share: the data pack, and the option that rewrites golden files."""

from pathlib import Path

import pytest
from data import VARIABLE, find_pack


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

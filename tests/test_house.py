"""The house itself: what is shipped, what is declared, what is documented."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from tte.document import tally
from tte.runner.board import STATUS
from tte.scheme import UpdateScheme

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = ("frontends", "passes", "codegen", "runtime_c")
HEAVY = ("torch", "tvm", "onnx", "onnxruntime", "ortools", "unicorn", "ziglang", "matplotlib", "sklearn")


def tracked() -> list[Path]:
    """Files under version control that exist, relative to the root."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [Path(name) for name in listed.stdout.decode().split("\0") if name]
    return [path for path in files if (ROOT / path).is_file()]


def sources() -> list[Path]:
    """The Python files of the packages."""
    return [path for room in ("tte", *ROOMS) for path in sorted((ROOT / room).rglob("*.py")) if not _is_link(path)]


def _is_link(path: Path) -> bool:
    return any(parent.is_symlink() for parent in path.parents if parent != ROOT and ROOT in parent.parents)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tracked files: nothing that lies around can slip in."""
    folder = tmp_path_factory.mktemp("wheel")
    for path in tracked():
        (folder / "src" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / "src" / path)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, "."]
    subprocess.run(build, cwd=folder / "src", check=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_exactly_the_tracked_files_of_the_packages(wheel: Path) -> None:
    names = [path.as_posix() for path in tracked()]
    expected = {n for n in names if n.startswith("tte/")}
    expected |= {f"tte/{n}" for n in names if n.startswith(tuple(f"{room}/" for room in ROOMS))}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenses = {Path(name).name for name in archive.namelist() if ".dist-info/licenses/" in name}
    assert found == expected
    assert licenses == {"LICENSE", "LICENSE-OUTPUT"}


def test_wheel_works_outside_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True)
    program = f"""
import importlib, tte.cli
for room in {("tte", *(f"tte.{room}" for room in ROOMS))}:
    print(importlib.import_module(room).__file__)
tte.cli.app(["ops", "--json"])
"""
    environment = {"PYTHONPATH": str(site), "PATH": "", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    files = result.stdout.splitlines()[: 1 + len(ROOMS)]
    assert all(Path(file).is_relative_to(site) for file in files), files
    assert '"nn.conv2d"' in result.stdout


def test_every_package_folder_is_declared() -> None:
    folders = {path.parent for path in sources()}
    declared = set(PROJECT["tool"]["setuptools"]["packages"])
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert {name if name.startswith("tte") else f"tte.{name}" for name in names} == declared


def test_imports_and_dependencies_agree() -> None:
    distributions = packages_distributions()
    imported: set[str] = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    imported -= sys.stdlib_module_names | {"tte"}
    used = {_canonical(distributions.get(module, [module])[0]) for module in imported}
    extras = PROJECT["project"]["optional-dependencies"]
    declared = {
        _canonical(name) for name in PROJECT["project"]["dependencies"] + extras["emulate"] + extras["quantize"]
    }
    # ziglang is a program, not a module; apache-tvm-ffi is named only for its version; protobuf comes with onnx.
    assert (used | {"apache-tvm-ffi", "ziglang"}) - {"protobuf"} == declared


def _canonical(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match
    return re.sub(r"[._]", "-", match[0]).lower()


def test_constraints_pin_everything_once() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), lines
    pinned = [_canonical(line) for line in lines]
    assert len(pinned) == len(set(pinned))
    extras = sum(PROJECT["project"]["optional-dependencies"].values(), [])
    wanted = {_canonical(name) for name in PROJECT["project"]["dependencies"] + extras} - {"tte"}
    assert wanted <= set(pinned)


def test_importing_tte_is_light() -> None:
    modules = ["tte" if p == Path("tte/__init__.py") else ".".join(p.with_suffix("").parts) for p in _relative()]
    names = [m if m.startswith("tte") else f"tte.{m}" for m in modules if not m.endswith("__init__")]
    program = f"import importlib, sys\nfor n in {names}: importlib.import_module(n)\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not set(result.stdout.split()) & set(HEAVY)


def _relative() -> list[Path]:
    return [path.relative_to(ROOT) for path in sources()]


def test_every_error_code_is_documented_and_no_other() -> None:
    files = [path for path in sources() if path.name != "errors.py"]  # which explains their form
    raised = set(re.findall(r"TTE-E\d{3}", "".join(path.read_text() for path in files)))
    documented = re.findall(r"^\| `(TTE-E\d{3})` \|", (ROOT / "docs" / "errors.md").read_text(), re.M)
    assert documented == sorted(raised)


def test_one_is_not_many() -> None:
    assert [tally(n, "layer") for n in (0, 1, 2048)] == ["0 layers", "1 layer", "2,048 layers"]
    assert tally(2, "class") == "2 classes"


def test_the_numbers_of_status_codes_are_documented() -> None:
    documented = re.findall(r"^\| `M_ERR_(\w+)` \| (\d+) \|", (ROOT / "docs" / "c-api.md").read_text(), re.M)
    header = (ROOT / "codegen" / "templates" / "model.h.j2").read_text()
    enumerated = (
        header.partition("typedef enum {")[2].partition("}} {{ p }}_status_t;")[0].partition("typedef struct")[0]
    )
    generated = re.findall(r"\{\{ P \}\}_(?:ERR_)?(\w+)", enumerated)
    assert [(name, str(i)) for i, name in enumerate(STATUS) if i] == documented
    assert generated == STATUS


def test_links_in_documents_lead_somewhere() -> None:
    for document in (ROOT / path for path in tracked() if path.suffix == ".md"):
        targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
        assert not [t for t in targets if not (document.parent / t).exists()], document


@pytest.mark.parametrize("document", ["README.md", "docs/scheme.md"])
def test_schemes_in_documents_are_valid(document: str) -> None:
    schemes = re.findall(r"```yaml\n(version.*?)```", (ROOT / document).read_text(), re.S)
    assert schemes
    for text in schemes:
        UpdateScheme.load(yaml.safe_load(text))


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    place = re.compile(r"(?<![\w.~{}$])/(home|root|Users|work|tmp)/\w")
    text = {path: (ROOT / path).read_bytes() for path in tracked()}
    found = [path for path, content in text.items() if b"\0" not in content and place.search(content.decode())]
    assert not found


def test_nothing_names_a_package_index() -> None:
    for name in ("constraints.txt", "Makefile", "pyproject.toml", ".ci/run"):
        assert not re.search(r"https?://|index-url|find-links", (ROOT / name).read_text()), name

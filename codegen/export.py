"""Writes the files of a generated project: all of them or none, and never over a file that is not ours."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from tte.errors import TTEError

MANIFEST = "manifest.json"


def write_tree(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make ``folder`` hold ``files`` (relative path with "/" -> content) and a manifest of them.

    A file that an earlier export wrote, and nobody touched since, is replaced, or deleted when it is no longer
    part of the project. Everything else in the folder stays. Raises TTEError (E045 to E047) before the first change.
    """
    assert MANIFEST not in files
    assert all(map(_is_inside, files)), sorted(files)
    hashes = {path: hashlib.sha256(files[path]).hexdigest() for path in sorted(files)}
    manifest = json.dumps({"manifest_version": 1, "files": hashes}, indent=2) + "\n"
    complete = {**files, MANIFEST: manifest.encode()}  # last: while files are replaced, the old one is still true
    file = next((parent for parent in folder.parents if parent.exists() and not parent.is_dir()), None)
    if file is not None:
        raise TTEError("TTE-E045", f"{file} is a file, not a folder", where=str(folder), fix="choose another place")
    try:
        if not folder.exists() and not folder.is_symlink():
            _write_new(folder, complete)
        elif not folder.is_dir():
            raise TTEError("TTE-E045", "the output is not a folder", where=str(folder), fix="choose another place")
        else:
            _replace(folder, complete, hashes)
    except OSError as problem:
        raise TTEError(
            "TTE-E045",
            f"cannot write the project: {problem.strerror}",
            where=str(folder),
            fix="choose a folder that you may write to, with space left",
        ) from problem


def _write_new(folder: Path, files: Mapping[str, bytes]) -> None:
    """Everything into a sibling first: the folder appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.tte-{os.getpid()}"
    try:
        _write_all(temporary, files)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(folder: Path, files: Mapping[str, bytes], hashes: Mapping[str, str]) -> None:
    old = read_manifest(folder)
    for path in hashes:
        _require_ours(folder, path, old.get(path), hashes[path])
    stale = [path for path, digest in old.items() if path not in files and _digest(folder, path) == digest]
    # Inside the folder: the same file system, even when the folder is a mount point.
    temporary = folder / f".tte-{os.getpid()}"
    moved: list[str] = []
    placed: list[str] = []
    try:
        _write_all(temporary / "new", files)
        for path in [*files, *stale]:
            if (folder / path).exists():
                _move(folder / path, temporary / "old" / path)
                moved.append(path)
            if path in files:
                _move(temporary / "new" / path, folder / path)
                placed.append(path)
    except BaseException:
        for path in placed:
            (folder / path).unlink()
        for path in moved:
            _move(temporary / "old" / path, folder / path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for path in [*files, *stale]:
            _remove_empty(folder, path)


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def _write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def read_manifest(folder: Path) -> dict[str, str]:
    """Path -> sha256 of what the previous export wrote; empty without one."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        files = json.loads(path.read_bytes())["files"]
        valid = all(_is_inside(name) and isinstance(digest, str) for name, digest in files.items())
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise TTEError(
            "TTE-E047",
            "manifest.json was not written by tte, or was changed",
            where=str(path),
            fix="choose an empty folder, or move this file and the project beside it away",
        )
    return dict(files)


def _is_inside(path: str) -> bool:
    """A plain relative path, the same on every system."""
    parts = PurePosixPath(path).parts
    return bool(parts) and path == "/".join(parts) and ".." not in parts and parts[0] != "/" and "\\" not in path


def _require_ours(folder: Path, path: str, written: str | None, wanted: str) -> None:
    """Whatever is at ``path`` was written by an earlier export, or has the wanted content already."""
    target = folder / path
    found = _digest(folder, path)
    if found == wanted or (found is not None and found == written):
        return
    if found is not None and written is not None:
        raise _foreign(target, "was changed since tte wrote it")
    for place in [target, *target.parents[: len(PurePosixPath(path).parts) - 1]]:
        if place.is_symlink() or (place.exists() and (place == target or not place.is_dir())):
            raise _foreign(place, "is in the way and was not written by tte")


def _foreign(path: Path, what: str) -> TTEError:
    fix = "move it away (tte does not overwrite what others wrote), or choose another folder"
    return TTEError("TTE-E046", f"{path.name} {what}", where=str(path), fix=fix)


def _digest(folder: Path, path: str) -> str | None:
    """sha256 of a plain file that is really inside the folder; None for anything else."""
    target = folder / path
    inside = [target, *target.parents[: len(PurePosixPath(path).parts) - 1]]
    if any(place.is_symlink() for place in inside) or not target.is_file():
        return None
    return hashlib.sha256(target.read_bytes()).hexdigest()


def _remove_empty(folder: Path, path: str) -> None:
    """Remove the folders on the way to ``path`` that nothing is in any more."""
    parent = (folder / path).parent
    while parent != folder and parent.is_dir() and not any(parent.iterdir()):
        parent.rmdir()
        parent = parent.parent

"""The output folder: complete or untouched, and nothing of the user's is ever lost."""

import json
import os
from pathlib import Path

import pytest

from tte.codegen.export import write_tree
from tte.errors import TTEError

FIRST = {"Core/Inc/m.h": b"h1", "Core/Src/m.c": b"c1", "report.json": b"{}"}
SECOND = {"Core/Src/m.c": b"c2", "report.json": b"{}", "zephyr/module.yml": b"z"}


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refuse(code: str, folder: Path, files: dict[str, bytes]) -> TTEError:
    """The export fails with ``code`` and changes nothing beside and in the folder."""
    parent = next(p for p in folder.parents if p.is_dir())
    before, beside = tree(folder) if folder.is_dir() else None, sorted(parent.iterdir())
    with pytest.raises(TTEError) as caught:
        write_tree(folder, files)
    assert caught.value.code == code
    assert caught.value.fix
    assert (tree(folder) if folder.is_dir() else None) == before
    assert sorted(parent.iterdir()) == beside
    return caught.value


def test_new_folder_holds_the_files_and_their_manifest(tmp_path: Path) -> None:
    write_tree(tmp_path / "a" / "b", FIRST)
    found = tree(tmp_path / "a" / "b")
    assert list(json.loads(found.pop("manifest.json"))["files"]) == sorted(FIRST)
    assert found == FIRST
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


def test_second_export_replaces_ours_and_keeps_what_is_not(tmp_path: Path) -> None:
    write_tree(tmp_path, FIRST)
    (tmp_path / "Core/Src/main.c").write_bytes(b"mine")
    write_tree(tmp_path, SECOND)
    found = tree(tmp_path)
    assert list(json.loads(found.pop("manifest.json"))["files"]) == sorted(SECOND)
    assert found == SECOND | {"Core/Src/main.c": b"mine"}
    assert not (tmp_path / "Core/Inc").exists()


def test_same_export_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    write_tree(tmp_path / "one", FIRST)
    write_tree(tmp_path / "two", dict(reversed(FIRST.items())))
    write_tree(tmp_path / "two", FIRST)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_changed_file_is_not_overwritten(tmp_path: Path) -> None:
    write_tree(tmp_path, FIRST)
    (tmp_path / "Core/Src/m.c").write_bytes(b"tuned by hand")
    assert "changed" in refuse("TTE-E046", tmp_path, SECOND).what


def test_changed_file_that_is_no_longer_ours_stays(tmp_path: Path) -> None:
    write_tree(tmp_path, FIRST)
    (tmp_path / "Core/Inc/m.h").write_bytes(b"tuned by hand")
    write_tree(tmp_path, SECOND)
    assert (tmp_path / "Core/Inc/m.h").read_bytes() == b"tuned by hand"


def test_foreign_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(b"other")
    assert "not written by tte" in refuse("TTE-E046", tmp_path, FIRST).what


@pytest.mark.parametrize("place", ["Core", "Core/Src/m.c"])
def test_folder_and_file_in_each_others_place(tmp_path: Path, place: str) -> None:
    if place == "Core":
        (tmp_path / place).write_bytes(b"a file")
    else:
        (tmp_path / place).mkdir(parents=True)
    refuse("TTE-E046", tmp_path, FIRST)


def test_links_are_not_followed_out_of_the_folder(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "build"
    outside.mkdir(), folder.mkdir()
    (folder / "Core").symlink_to(outside)
    refuse("TTE-E046", folder, FIRST)
    assert not list(outside.iterdir())


def test_a_folder_that_became_a_link_is_not_ours_any_more(tmp_path: Path) -> None:
    folder = tmp_path / "build"
    write_tree(folder, FIRST)
    (folder / "Core").rename(tmp_path / "elsewhere")
    (folder / "Core").symlink_to(tmp_path / "elsewhere")
    refuse("TTE-E046", folder, SECOND)


def test_output_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"")
    refuse("TTE-E045", tmp_path / "out", FIRST)
    refuse("TTE-E045", tmp_path / "out" / "deeper", FIRST)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "build").mkdir(mode=0o500)
    refuse("TTE-E045", tmp_path / "build", FIRST)
    refuse("TTE-E045", tmp_path / "build" / "new", FIRST)


def test_place_where_nobody_can_write() -> None:
    with pytest.raises(TTEError, match="cannot write the project") as caught:
        write_tree(Path("/proc/tte-build"), FIRST)
    assert caught.value.code == "TTE-E045"


def test_failure_half_way_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "build"
    write_tree(folder, FIRST)
    rename = Path.rename

    def full(source: Path, target: Path) -> Path:
        if target.name == "module.yml":
            raise OSError(28, "No space left on device", str(target))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", full)
    assert "No space left" in refuse("TTE-E045", folder, SECOND).what
    assert not (folder / "zephyr").exists()


def test_failure_in_a_new_folder_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    refuse("TTE-E045", tmp_path / "build", FIRST)


@pytest.mark.parametrize("content", ["\xff", "{", "[]", "3", '{"a": 1}', '{"../a": ""}', '{"/a": ""}'])
def test_manifest_of_somebody_else(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_bytes(f'{{"files": {content}}}'.encode("latin-1"))
    refuse("TTE-E047", tmp_path, FIRST)

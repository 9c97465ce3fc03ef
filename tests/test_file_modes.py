"""What lorakit writes can be read by whom the umask lets read it, whichever library wrote the file."""

import os

import pytest

from lorakit.atomic_io import atomic_dir


@pytest.fixture
def umask():
    before = os.umask(0)
    yield os.umask
    os.umask(before)


def wrong_modes(folder, mask):
    """The files and folders whose modes are not those of ones that are simply created."""
    found = {path: path.stat().st_mode & 0o777 for path in folder.rglob("*") if not path.is_symlink()}
    assert len(found) > 3
    return {str(path): oct(mode) for path, mode in found.items() if mode != (0o777 if path.is_dir() else 0o666) & ~mask}


@pytest.mark.parametrize("mask", [0o022, 0o027], ids=oct)
def test_every_file_of_run_merge_combination_evaluation_and_cache_follows_the_umask(
    recipe_file, lorakit, tmp_path, monkeypatch, umask, mask
):
    umask(mask)
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    path = recipe_file(train={"epochs": ..., "steps": 2, "save_every": 1}, evaluate={"max_new_tokens": 2})
    run, both = tmp_path / "runs" / "a", tmp_path / "runs" / "both"
    for command in (
        ("train", path, "--output", run),
        ("merge", run),
        ("combine", run, run, "--method", "cat", "--weights", "0.5,0.5", "--output", both),
        ("eval", run),
    ):
        code, _, err = lorakit(*command)
        assert code == 0, err
    assert not wrong_modes(tmp_path / "runs", mask)
    assert not wrong_modes(tmp_path / "cache", mask)


def test_a_folder_that_hands_its_group_on_still_does(tmp_path, umask):
    umask(0o002)
    tmp_path.chmod(0o2775)
    with atomic_dir(tmp_path / "done") as draft:
        (draft / "inner").mkdir()
    for folder in (tmp_path / "done", tmp_path / "done" / "inner"):
        assert folder.stat().st_mode & 0o7777 == 0o2775

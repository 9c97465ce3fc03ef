"""Folders and files are complete or absent at every moment."""

import subprocess
import sys

import pytest

from lorakit.folders import remove_drafts, sha256_of, whole_folder, write_whole


def test_a_folder_appears_whole_and_a_failed_writing_leaves_nothing(tmp_path):
    final = tmp_path / "final"
    with whole_folder(final) as draft:
        (draft / "a").write_text("1")
        assert not final.exists()
    assert (final / "a").read_text() == "1"
    with pytest.raises(ValueError, match="halfway"), whole_folder(final) as draft:
        (draft / "b").write_text("2")
        raise ValueError("halfway")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert [path.name for path in final.iterdir()] == ["a"]


def test_a_finished_folder_replaces_the_old_one_or_yields_to_it(tmp_path):
    final = tmp_path / "final"
    for text in ("old", "new"):
        with whole_folder(final) as draft:
            (draft / "a").write_text(text)
    assert (final / "a").read_text() == "new"
    with whole_folder(final, first_wins=True) as draft:
        (draft / "a").write_text("too late")
    assert (final / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_killed_writer_leaves_only_a_draft_that_is_removed(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from lorakit.folders import whole_folder\n"
        "with whole_folder(Path(sys.argv[1])) as draft:\n"
        "    (draft / 'a').write_text('1'); os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "final")], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".") and not (tmp_path / "final").exists()
    (tmp_path / ".git").mkdir()
    remove_drafts(tmp_path, "other")
    assert left.exists()
    remove_drafts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".git"]


def test_write_whole_replaces_a_file_at_once(tmp_path):
    path = tmp_path / "manifest.json"
    write_whole(path, "old")
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert [found.name for found in tmp_path.iterdir()] == ["manifest.json"]


def test_sha256_takes_the_hubs_cache_at_its_word_and_reads_everything_else(tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    name = "f" * 64
    (blobs / name).write_text("x")
    (tmp_path / "model.safetensors").symlink_to(blobs / name)
    assert sha256_of(tmp_path / "model.safetensors") == name
    assert sha256_of(blobs / name) == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"

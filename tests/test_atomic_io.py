"""Folders and files are complete or absent at every moment."""

import hashlib
import subprocess
import sys

import pytest

from lorakit import atomic_io
from lorakit.atomic_io import atomic_dir, lies_inside, remove_drafts, sha256_of, write_atomic
from lorakit.run_dir import open_run


def test_a_folder_appears_whole_and_a_failed_writing_leaves_nothing(tmp_path):
    final = tmp_path / "final"
    with atomic_dir(final) as draft:
        (draft / "a").write_text("1")
        assert not final.exists()
    assert (final / "a").read_text() == "1"
    with pytest.raises(ValueError, match="halfway"), atomic_dir(final) as draft:
        (draft / "b").write_text("2")
        raise ValueError("halfway")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert [path.name for path in final.iterdir()] == ["a"]


def test_a_finished_folder_replaces_the_old_one_or_yields_to_it(tmp_path):
    final = tmp_path / "final"
    for text in ("old", "new"):
        with atomic_dir(final) as draft:
            (draft / "a").write_text(text)
    assert (final / "a").read_text() == "new"
    with atomic_dir(final, first_wins=True) as draft:
        (draft / "a").write_text("too late")
    assert (final / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_killed_writer_leaves_only_a_draft_that_is_removed(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from lorakit.atomic_io import atomic_dir\n"
        "with atomic_dir(Path(sys.argv[1])) as draft:\n"
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


def test_a_run_killed_while_its_first_file_is_written_can_be_begun_again(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from lorakit.atomic_io import atomic_file\n"
        "with atomic_file(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); os.kill(os.getpid(), 9)\n"
    )
    for name in ("manifest.json", "recipe.yaml"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "run" / name)], check=False)
    assert len(list((tmp_path / "run").iterdir())) == 2
    with open_run(tmp_path / "run", resume=False, overwrite=False) as run:
        assert [path for path in run.folder.iterdir() if not path.name.endswith("lock")] == []


def test_write_whole_replaces_a_file_at_once(tmp_path):
    path = tmp_path / "manifest.json"
    write_atomic(path, "old")
    write_atomic(path, "new")
    assert path.read_text() == "new"
    assert [found.name for found in tmp_path.iterdir()] == ["manifest.json"]


def test_sha256_is_that_of_the_content_whatever_a_file_is_called(tmp_path):
    """Other folders look like the hub's cache, and what lies in the hub's own may have changed."""
    repository = tmp_path / "models--org--tiny"
    snapshot, blob = repository / "snapshots" / "0123" / "model.safetensors", repository / "blobs" / ("f" * 64)
    for folder in (snapshot.parent, blob.parent):
        folder.mkdir(parents=True)
    blob.write_text("x")
    snapshot.symlink_to(f"../../blobs/{blob.name}")
    assert sha256_of(snapshot) == hashlib.sha256(b"x").hexdigest()


def test_sha256_is_read_once_where_a_file_has_not_changed(tmp_path, monkeypatch):
    path, digest, read = tmp_path / "file", hashlib.file_digest, []
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: read.append(path) or digest(*given))
    for content in (b"one", b"two"):
        path.write_bytes(content)
        assert sha256_of(path) == sha256_of(path) == hashlib.sha256(content).hexdigest()
    assert len(read) == 4  # just written: it may change again within one tick of the clock
    monkeypatch.setattr(atomic_io, "_UNSETTLED", 0)
    for content in (b"three", b"longer"):
        path.write_bytes(content)
        assert sha256_of(path) == sha256_of(path) == hashlib.sha256(content).hexdigest()
    assert len(read) == 6


def test_only_the_hubs_own_links_lead_out_of_a_folder(tmp_path):
    repository = tmp_path / "models--org--tiny"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    for folder in (snapshot, blobs, tmp_path / "blobs", tmp_path / "snapshots" / "0123"):
        folder.mkdir(parents=True)
    (blobs / "a").touch()
    (tmp_path / "blobs" / "a").touch()
    for folder, target, inside in (
        (snapshot, "../../blobs/a", True),
        (snapshot, "../../../blobs/a", False),
        (snapshot, "/etc/hostname", False),
        (tmp_path / "snapshots" / "0123", "../../blobs/a", False),
        (blobs, "a", True),
    ):
        link = folder / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert lies_inside(link, folder) is inside, (folder, target)

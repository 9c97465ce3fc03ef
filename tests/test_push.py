"""`lorakit push`: an export's files and no others, in one commit, private unless said otherwise."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from eval_runs import make_run
from hub_double import TOKEN, HubDouble
from huggingface_hub import ModelCard, constants


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_base):
    return make_run(tmp_path_factory.mktemp("push"), tiny_base)


@pytest.fixture(scope="module")
def exported(run):
    """The run's export for the hub."""
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", "export", run.folder, "--to", "huggingface,huggingface:merged", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return run.exports / "huggingface"


@pytest.fixture
def export(exported, tmp_path):
    """A copy of it, to change."""
    return Path(shutil.copytree(exported, tmp_path / "huggingface"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The double, as the hub of this process."""
    double = HubDouble()
    monkeypatch.setattr(constants, "ENDPOINT", double.url)
    template = f"{double.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield double
    double.close()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_run_is_exported_and_pushed_private_in_one_commit(run, exported, lorakit, hub):
    code, out, err = lorakit("push", run.folder, "me/tiny", "--json")
    assert code == 0, err
    facts, repository = json.loads(out), hub.repositories["me/tiny"]
    assert facts["private"] is repository["private"] is True and facts["url"] == f"{hub.url}/me/tiny"
    assert len(hub.commits) == 1
    ours, there = contents(exported), repository["files"]
    assert set(there) - {".gitattributes"} == set(ours) == {one["name"] for one in facts["files"]}
    same = [name for name in ours if ours[name] == there[name]]
    assert set(ours) - set(same) == {"README.md", "export.json"}
    assert 'repository = "me/tiny"' in there["README.md"].decode() and b"ORG/NAME" not in there["README.md"]
    assert ModelCard(there["README.md"].decode()).data.library_name == "peft"


def test_the_pushed_document_has_the_sha256_of_every_pushed_file(export, lorakit, hub):
    import hashlib

    assert lorakit("push", export, "me/tiny")[0] == 0
    files = hub.repositories["me/tiny"]["files"]
    document = json.loads(files["export.json"])
    for name, facts in document["sha256"].items():
        assert hashlib.sha256(files[name]).hexdigest() == facts["sha256"] and len(files[name]) == facts["bytes"]


def test_a_dry_run_needs_neither_token_nor_network_and_sends_nothing(exported, lorakit, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, out, err = lorakit("push", exported, "me/tiny", "--dry-run")
    assert code == 0 and hub.requests == [], err
    assert "would push to me/tiny (private), " in out and "adapter_model.safetensors  " in out
    assert "library_name: peft" in out and 'repository = "me/tiny"' in out


def test_pushing_again_updates_and_removes_what_the_earlier_push_alone_had(run, exported, lorakit, hub):
    assert lorakit("push", run.folder, "me/tiny")[0] == 0
    hub.repositories["me/tiny"]["files"]["curve.png"] = b"of a person"
    code, out, err = lorakit("push", run.folder, "me/tiny", "--merged")
    assert code == 0, err
    files = hub.repositories["me/tiny"]["files"]
    assert "adapter_model.safetensors" not in files and "model.safetensors" in files and "curve.png" in files
    assert "removed there what an earlier push had sent: adapter_config.json, adapter_model.safetensors" in out


def test_a_repository_of_others_is_written_to_only_with_overwrite(export, lorakit, hub):
    hub.add("me/mine", **{"model.bin": "x", "README.md": "# Mine"})
    code, _, err = lorakit("push", export, "me/mine")
    assert code == 2 and "was not made by lorakit push" in err and not hub.commits
    assert lorakit("push", export, "me/mine", "--overwrite", "-m", "by hand")[0] == 0
    assert hub.commits == ["by hand"] and hub.repositories["me/mine"]["files"]["model.bin"] == b"x"


def test_an_empty_repository_is_filled(export, lorakit, hub):
    hub.add("me/new")
    assert lorakit("push", export, "me/new")[0] == 0
    assert not any("repos/create" in request for request in hub.requests)


def test_a_public_repository_is_never_filled_by_accident(export, lorakit, hub):
    hub.add("me/open", private=False)
    code, _, err = lorakit("push", export, "me/open")
    assert code == 2 and "exists and is public. Write --public" in err and not hub.commits
    assert lorakit("push", export, "me/open", "--public")[0] == 0
    hub.add("me/closed", private=True)
    code, _, err = lorakit("push", export, "me/closed", "--public")
    assert code == 2 and "exists and is private" in err
    assert lorakit("push", export, "me/fresh", "--public")[0] == 0 and not hub.repositories["me/fresh"]["private"]


def test_other_files_are_never_pushed(export, lorakit, hub):
    (export / "notes.txt").write_text("mine")
    code, _, err = lorakit("push", export, "me/tiny")
    assert code == 2 and "notes.txt: is not of the export" in err and hub.requests == []


@pytest.mark.parametrize("change", ["changed", "missing"])
def test_a_changed_or_missing_file_is_named(export, lorakit, hub, change):
    file = export / "tokenizer.json"
    file.write_text("{}") if change == "changed" else file.unlink()
    code, _, err = lorakit("push", export, "me/tiny")
    assert code == 2 and "tokenizer.json: " in err and change in err and "--overwrite" in err and hub.requests == []


def test_a_card_may_be_edited_but_holds_no_token(export, lorakit, hub):
    card = export / "README.md"
    card.write_text(card.read_text() + "\nMore of it.\n")
    assert lorakit("push", export, "me/tiny")[0] == 0
    assert hub.repositories["me/tiny"]["files"]["README.md"].endswith(b"More of it.\n")
    card.write_text(card.read_text() + f"\nos.environ['HF_TOKEN'] = '{TOKEN}'\n")
    code, _, err = lorakit("push", export, "me/other")
    assert code == 2 and "holds a token of the hub, in README.md" in err and TOKEN not in err


def test_the_export_of_an_earlier_adapter_is_not_pushed(run, exported, lorakit, hub, tmp_path):
    folder = Path(shutil.copytree(run.adapter, tmp_path / "adapter"))
    shutil.copytree(exported, folder / "export" / "huggingface")
    document = folder / "export" / "huggingface" / "export.json"
    document.write_text(json.dumps({**json.loads(document.read_text()), "adapter_sha256": "0" * 64}))
    code, _, err = lorakit("push", folder, "me/tiny")
    assert code == 2 and "is the export of other weights" in err and hub.requests == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tiny", "names no owner"),
        ("me/a--b", "Cannot have -- or .."),
        ("me/tiny.git", "cannot end by '.git'"),
        ("datasets/me/tiny", "Repo id must be in the form"),
        ("me/", "Repo id must use alphanumeric"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_read(lorakit, hub, tmp_path, name, says):
    code, _, err = lorakit("push", tmp_path / "nothing", name)
    assert code == 2 and says in err and hub.requests == []


def test_without_login_or_offline_nothing_begins(run, lorakit, hub, monkeypatch, tmp_path):
    folder = Path(shutil.copytree(run.adapter, tmp_path / "adapter"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = lorakit("push", folder, "me/tiny")
    assert code == 2 and "HF_HUB_OFFLINE is set" in err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = lorakit("push", folder, "me/tiny")
    assert code == 2 and "Run hf auth login, or set HF_TOKEN" in err
    assert not (folder / "export").exists() and hub.requests == []


def test_a_wrong_token_is_said(export, lorakit, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _, err = lorakit("push", export, "me/tiny")
    assert code == 2 and "does not know the token" in err


def test_a_token_without_the_right_is_said(export, lorakit, hub):
    code, _, err = lorakit("push", export, "others/tiny")
    assert code == 2 and "the token may not write there. Give one with the right to write to others" in err


@pytest.mark.parametrize(("part", "status"), [("/commit/", 500), ("/preupload/", 422), ("/api/models/", 502)])
def test_a_hub_that_fails_is_quoted_in_one_sentence(export, lorakit, hub, part, status):
    hub.fails[part] = status
    code, _, err = lorakit("push", export, "me/tiny")
    assert code == 1 and f"the hub answered {status}" in err and "Traceback" not in err
    assert not hub.commits


def test_a_hub_out_of_reach_is_said(export, lorakit, hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _, err = lorakit("push", export, "me/tiny")
    assert code == 1 and "the hub cannot be reached at http://127.0.0.1:9" in err and "refused" in err


def test_hf_endpoint_and_hf_token_alone_are_what_a_shell_needs(export, hub):
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment["HF_HUB_OFFLINE"] = "0"
    done = subprocess.run(
        [sys.executable, "-m", "lorakit", "push", export, "me/shell"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith(f"pushed to {hub.url}/me/shell (private): ") and TOKEN not in done.stdout + done.stderr
    )


def test_an_export_for_another_program_is_not_pushed(export, lorakit, hub):
    document = export / "export.json"
    document.write_text(json.dumps({**json.loads(document.read_text()), "target": "gguf:q8_0"}))
    code, _, err = lorakit("push", export, "me/tiny")
    assert code == 2 and "is an export for gguf:q8_0, not for the hub" in err


def test_options_that_would_do_nothing_are_refused(export, lorakit, hub):
    code, _, err = lorakit("push", export, "me/tiny", "--merged")
    assert code == 2 and "--merged: does nothing for an export" in err


def test_an_export_is_not_replaced_while_it_is_pushed(run, exported, lorakit, hub):
    from lorakit.atomic_io import shared_lock

    with shared_lock(exported):
        code, _, err = lorakit("export", run.folder, "--to", "huggingface", "--overwrite")
    assert code == 2 and "another process is writing this folder, or reads it" in err

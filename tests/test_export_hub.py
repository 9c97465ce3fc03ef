"""`lorakit export --to huggingface`: what strangers may see of a run, and nothing of this machine."""

import json
import shutil
from pathlib import Path

import pytest
from eval_runs import edit_json, make_run
from huggingface_hub import ModelCard

from lorakit.export.private_text import find_paths, find_secrets, redact

HUB_BASE = "some-org/tiny-llama"
TOKEN = "hf_" + "a1B2" * 8


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_base):
    return make_run(tmp_path_factory.mktemp("hub"), tiny_base, data={"system": "Answer in JSON."})


@pytest.fixture(scope="module")
def hub_run(run, tmp_path_factory, tiny_base):
    """The run, with a base that the hub's cache has, in the form in which the hub's library keeps it."""
    cache = tmp_path_factory.mktemp("cache")
    repository = cache / "models--some-org--tiny-llama"
    commit = "c" * 40
    shutil.copytree(tiny_base, repository / "snapshots" / commit)
    (repository / "snapshots" / commit / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    folder = Path(shutil.copytree(run.folder, tmp_path_factory.mktemp("hub-run") / "run"))
    for name in ("train.jsonl", "eval.jsonl"):
        shutil.copy(run.folder.parent / name, folder.parent)
    return folder, cache


@pytest.fixture
def hub_cache(hub_run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub_run[1]))
    return hub_run[0]


def export(lorakit, folder, *arguments):
    code, out, err = lorakit("export", folder, "--json", *arguments)
    assert code == 0, err
    return {one["target"]: one for one in json.loads(out)["exports"]}, err


def code_of(card: str) -> str:
    return card.partition("```python\n")[2].partition("```")[0]


def test_the_adapter_comes_with_a_card_that_the_hubs_library_reads(hub_cache, lorakit, tmp_path):
    exports, _ = export(lorakit, hub_cache, "--to", "huggingface", "--base", HUB_BASE, "-o", tmp_path)
    folder = tmp_path / "huggingface"
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == HUB_BASE and data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft" and data["license"] == "mit" and data["pipeline_tag"] == "text-generation"
    assert "language" not in data and "datasets" not in data and {"lora", "lorakit"} <= set(data["tags"])
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == HUB_BASE
    assert "| training rows | 22 (" in card.text and "| steps | 6 of 4 rows |" in card.text
    assert all(check["holds"] for check in exports["huggingface"]["checks"])


def test_a_local_base_is_named_nowhere_and_said(run, lorakit, tmp_path):
    _, err = export(lorakit, run.folder, "--to", "huggingface,huggingface:merged", "-o", tmp_path)
    assert "has no id on the hub" in err and "--base ORG/NAME" in err
    for name, library in (("huggingface", "peft"), ("huggingface-merged", "transformers")):
        data = ModelCard.load(tmp_path / name / "README.md").data.to_dict()
        assert "base_model" not in data and "base_model_relation" not in data and data["library_name"] == library
    assert json.loads((tmp_path / "huggingface" / "adapter_config.json").read_text())["base_model_name_or_path"] is None


def test_nothing_of_this_machine_is_in_any_file(run, lorakit, tmp_path, tiny_base):
    lorakit("eval", run.folder, "base", "--quiet")
    export(lorakit, run.folder, "--to", "huggingface,huggingface:merged", "-o", tmp_path / "out")
    for name in ("huggingface", "huggingface-merged"):
        folder = tmp_path / "out" / name
        for file in folder.iterdir():
            content = file.read_bytes()
            for path in (run.folder.parent, tiny_base.parent, tmp_path, Path.home()):
                assert str(path).encode() not in content, (file, path)


def test_the_code_of_the_card_loads_the_model_and_answers_as_the_run(run, lorakit, tmp_path, tiny_base):
    export(lorakit, run.folder, "--to", "huggingface,huggingface:merged", "-o", tmp_path)
    answers = []
    for name in ("huggingface", "huggingface-merged"):
        code = code_of((tmp_path / name / "README.md").read_text())
        assert "Answer in JSON." in code
        scope: dict = {"print": lambda text: answers.append(text)}
        code = code.replace('"ORG/NAME"', repr(str(tmp_path / name))).replace('"BASE"', repr(str(tiny_base)))
        exec(code, scope)
    assert len(answers) == 2 and answers[0] == answers[1] != ""


def test_the_card_has_the_newest_scores_of_the_exported_weights_with_intervals(run, lorakit, tmp_path):
    assert lorakit("eval", run.folder, "base", "--quiet")[0] == 0
    export(lorakit, run.folder, "--to", "huggingface,huggingface:merged", "-o", tmp_path)
    adapter, merged = ((tmp_path / name / "README.md").read_text() for name in ("huggingface", "huggingface-merged"))
    document = json.loads(max(run.evaluations.glob("*.json")).read_text())
    loss = document["models"]["run"]["scores"]["loss"]
    line = f"| loss | {loss['value']:.4f} ({loss['low']:.4f} to {loss['high']:.4f}) |"
    assert line in adapter and line in merged
    assert "Scores of the adapter that was merged" in merged and "Scores of the adapter" not in adapter


def test_scores_of_other_weights_are_not_in_the_card(run, lorakit, tmp_path):
    folder = Path(shutil.copytree(run.folder, run.folder.parent / "rescored"))
    assert lorakit("eval", folder, "--quiet")[0] == 0
    for path in (folder / "eval").glob("*.json"):
        document = json.loads(path.read_text())
        for model in document["models"].values():
            model["identity"]["adapter"] = {"adapter_model.safetensors": "0" * 64}
        path.write_text(json.dumps(document))
    export(lorakit, folder, "--to", "huggingface", "-o", tmp_path)
    assert "## Scores" not in (tmp_path / "huggingface" / "README.md").read_text()


def test_a_full_fine_tuning_is_exported_as_a_model(tiny_base, lorakit, tmp_path):
    full = make_run(tmp_path / "full", tiny_base, adapter={"kind": "none", "rank": ..., "alpha": ...})
    export(lorakit, full.folder, "--to", "huggingface", "-o", tmp_path)
    card = ModelCard.load(tmp_path / "huggingface" / "README.md")
    assert card.data.to_dict()["library_name"] == "transformers" and "weights fine-tuned" in card.text
    assert (tmp_path / "huggingface" / "model.safetensors").is_file()
    code, _, err = lorakit("export", full.folder, "--to", "huggingface:adapter", "-o", tmp_path)
    assert code == 2 and "has no adapter. Write huggingface:merged" in err


def test_an_adapter_alone_and_a_merged_folder_alone_are_exported(run, lorakit, tmp_path, tiny_base):
    adapter = Path(shutil.copytree(run.adapter, tmp_path / "adapter-of-someone"))
    (adapter / "notes.txt").write_text("mine")
    export(lorakit, adapter, "--to", "huggingface", "-o", tmp_path / "one")
    assert not (tmp_path / "one" / "huggingface" / "notes.txt").exists()
    assert "A LoRA adapter" in (tmp_path / "one" / "huggingface" / "README.md").read_text()
    assert lorakit("merge", run.folder, "-o", tmp_path / "merged")[0] == 0
    export(lorakit, tmp_path / "merged", "--to", "huggingface", "-o", tmp_path / "two")
    card = (tmp_path / "two" / "huggingface" / "README.md").read_text()
    assert f"`{tiny_base.name}` with a LoRA adapter merged" in card and "- merge: it predicts what" in card
    assert not (tmp_path / "two" / "huggingface" / "merge.json").exists()


def test_a_token_in_a_file_is_refused_and_never_repeated(run, lorakit, tmp_path):
    adapter = Path(shutil.copytree(run.adapter, tmp_path / "leaky"))
    edit_json(adapter / "adapter_config.json", auto_mapping={"note": TOKEN})
    code, _, err = lorakit("export", adapter, "--to", "huggingface", "-o", tmp_path)
    assert code == 1 and "adapter_config.json: a token of the hub" in err and TOKEN not in err
    assert not (tmp_path / "huggingface").exists()


def test_secrets_and_paths_are_seen_in_texts_and_in_headers_of_weights(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors", metadata={"by": TOKEN})
    (tmp_path / "a.md").write_text("x" * (1 << 22) + f" {TOKEN} {tmp_path}/file")
    (tmp_path / "b.md").write_text("hf_hub_download, sk-learn, hf_short")
    names = ["x.safetensors", "a.md", "b.md"]
    assert find_secrets(tmp_path, names) == ["x.safetensors: a token of the hub", "a.md: a token of the hub"]
    assert find_paths(tmp_path, names, tmp_path) == ["a.md"]
    assert redact(f"{TOKEN} in {tmp_path}/x and {Path.home()}", tmp_path).startswith("(redacted) in (path)/x and ")

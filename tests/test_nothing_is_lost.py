"""What lorakit refuses to touch, to trust, or to go on with."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import TINY_LLAMA, rows_of, write_rows
from runs_of_tests import adapter_weights, run_recipe
from test_cli import lorakit_run as lorakit_run
from test_training import interrupted_after, same

from lorakit.errors import LorakitError, UserError
from lorakit.prepare import reopen_run
from lorakit.progress import Silent


@pytest.fixture
def finished(recipe_file, tmp_path):
    path = recipe_file(train={"steps": 2, "epochs": None, "save_every": 1})
    run, _ = run_recipe(path, tmp_path / "run")
    return path, run


def test_a_merge_replaces_nothing_but_a_merge(finished, lorakit_run, tmp_path):
    _, run = finished
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("mine")
    base = json.loads(run.manifest.read_text())["base"]["name"]
    for target in (precious, tmp_path / "file", run.folder, base, tmp_path / "file" / "below"):
        code, _, err = lorakit_run("merge", run.folder, "-o", target, "--overwrite", "--quiet")
        assert code == 2 and str(target).rsplit("/", 1)[-1] in err
    assert (precious / "thesis.txt").read_text() == "years" and (tmp_path / "file").read_text() == "mine"
    reopen_run(run.folder, Silent())


def test_overwriting_with_bad_data_leaves_the_old_run(finished, lorakit_run, tmp_path):
    path, run = finished
    before = run.manifest.read_bytes()
    write_rows(tmp_path / "train.jsonl", [{"messages": []}])
    assert lorakit_run("train", path, "-o", run.folder, "--overwrite")[0] == 2
    assert run.manifest.read_bytes() == before and run.adapter.is_dir()


def test_overwriting_never_deletes_what_it_trains_from(finished, lorakit_run):
    _, run = finished
    code, _, err = lorakit_run("train", run.recipe, "-o", run.folder, "--overwrite")
    assert code == 2 and "Copy it elsewhere" in err
    assert run.recipe.is_file() and run.adapter.is_dir()


def test_a_folder_of_the_users_is_no_run(recipe_file, tmp_path, lorakit_run):
    path = recipe_file()
    project = tmp_path / "project"
    (project / "adapter").mkdir(parents=True)
    (project / "recipe.yaml").write_text("# mine\n")
    for flags in ([], ["--overwrite"]):
        code, _, err = lorakit_run("train", path, "-o", project, *flags)
        assert code == 2 and "is not empty and not a run folder" in err
    assert (project / "recipe.yaml").read_text() == "# mine\n"


def test_a_run_lies_in_no_other_run(finished, lorakit_run):
    path, run = finished
    code, _, err = lorakit_run("train", path, "-o", run.adapter / "inner")
    assert code == 2 and "lies inside the run" in err


@pytest.mark.parametrize("place", ["file/below", "x" * 300])
def test_an_output_that_cannot_be_written_is_said_at_once(recipe_file, lorakit_run, tmp_path, place):
    path = recipe_file()
    (tmp_path / "file").write_text("mine")
    code, _, err = lorakit_run("train", path, "-o", tmp_path / place)
    assert code == 2 and "Choose another with --output" in err


def test_two_trainings_never_share_a_folder(finished):
    path, run = finished
    with run.exclusive_lock(), pytest.raises(UserError, match="another process is training"):
        run_recipe(path, run.folder, resume=True)


def test_an_adapter_that_was_changed_is_refused(finished):
    from safetensors.torch import load_file, save_file

    _, run = finished
    weights = load_file(run.adapter / "adapter_model.safetensors")
    del weights[min(weights)]
    save_file(weights, run.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="is not what this run trained"):
        reopen_run(run.folder, Silent())


def test_changed_rows_are_said_and_a_changed_template_is_refused(finished, tmp_path):
    _, run = finished
    write_rows(tmp_path / "eval.jsonl", rows_of(33)[30:])
    heard = []
    listener = Silent()
    listener.warn = heard.append  # type: ignore[method-assign]
    assert reopen_run(run.folder, listener)[1].held_out
    assert any("eval.jsonl: not the rows of this run's training" in line for line in heard)
    manifest = json.loads(run.manifest.read_text())
    run.manifest.write_text(json.dumps({**manifest, "tokenizer_sha256": "other"}))
    with pytest.raises(UserError, match="chat template changed"):
        reopen_run(run.folder, Silent())


@pytest.mark.parametrize("content", ["{}", "[]", '{"base": []}', '{"base": {"sha256": null}, "data": {}}', "{"])
def test_a_damaged_manifest_is_one_clear_error(finished, content):
    _, run = finished
    run.manifest.write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        reopen_run(run.folder, Silent())


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
}
FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
FILES += ["trained/weights.safetensors", "trained/adapter_config.json", "trained/driver.safetensors"]


@pytest.mark.parametrize(
    "damage", ["cut", *(pytest.param(damage, marks=pytest.mark.slow) for damage in ("missing", "empty"))]
)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_left_aside_for_the_one_before(recipe_file, tmp_path, monkeypatch, name, damage):
    settings = {"save_every": 1, "keep": 3, "steps": 5, "epochs": None}
    kind = {"adalora": {"every": 1}} if name.endswith("driver.safetensors") else "lora"
    path = recipe_file(adapter={"kind": kind, "rank": 4, "dropout": 0.2}, train=settings, data={"eval": None})
    straight, _ = run_recipe(path, tmp_path / "straight")
    with monkeypatch.context() as patch:
        interrupted_after(3, patch)
        with pytest.raises(LorakitError, match="stopped after step 3"):
            run_recipe(path, tmp_path / "run")
    DAMAGES[damage](tmp_path / "run" / "checkpoints" / "step-000003" / name)
    (tmp_path / "run" / "checkpoints" / "step-foo").mkdir()
    resumed, _ = run_recipe(path, tmp_path / "run", "train.keep=1", resume=True)
    assert same(adapter_weights(straight), adapter_weights(resumed))
    assert [folder.name for folder in resumed.complete_checkpoints()] == ["step-000005"]


def model_folder(tmp_path, tokenizer, config) -> str:
    folder = tmp_path / "model"
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_model_that_sees_ahead_is_refused(recipe_file, tmp_path, tokenizer):
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    base = model_folder(tmp_path, tokenizer, config)
    with pytest.raises(UserError, match="not a causal language model"):
        run_recipe(recipe_file(model={"base": base}), tmp_path / "run")


def test_a_tokenizer_that_knows_more_than_the_weights_is_refused(recipe_file, tmp_path, tokenizer):
    base = model_folder(tmp_path, tokenizer, transformers.LlamaConfig(vocab_size=50, **TINY_LLAMA))
    with pytest.raises(UserError, match="do not belong together"):
        run_recipe(recipe_file(model={"base": base}), tmp_path / "run")


def test_attention_auto_takes_what_the_family_has(recipe_file, tmp_path, tokenizer):
    sizes = {"vocab_size": len(tokenizer), "head_dim": 8, "query_pre_attn_scalar": 8, "pad_token_id": 0}
    base = model_folder(tmp_path, tokenizer, transformers.Gemma2Config(**{**TINY_LLAMA, **sizes}))
    run, _ = run_recipe(recipe_file(model={"base": base}, train={"steps": 2, "epochs": None}), tmp_path / "run")
    (attention,) = [choice for choice in run.read_manifest()["auto"] if choice["path"] == "model.attention"]
    assert attention["value"] in ("eager", "sdpa")


def test_a_warm_up_longer_than_the_run_is_refused(recipe_file, tmp_path):
    with pytest.raises(UserError, match=r"train\.warmup: 1,000 steps of warm-up in a run of 12"):
        run_recipe(recipe_file(train={"warmup": 1000}), tmp_path / "run")


@pytest.mark.parametrize(("content", "reason"), [(b"{% for %}", "not valid Jinja"), (b"\xff\xfe", "Save it as UTF-8")])
def test_a_broken_template_is_the_templates_fault(recipe_file, tmp_path, content, reason):
    (tmp_path / "own.jinja").write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        run_recipe(recipe_file(model={"chat_template": "own.jinja"}), tmp_path / "run")
    assert str(caught.value).startswith("model.chat_template")


def test_dry_run_as_json_is_one_document(recipe_file, lorakit_run, tmp_path):
    code, out, _ = lorakit_run("train", recipe_file(), "-o", tmp_path / "run", "--dry-run", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["steps"] == 12 and facts["train"]["kept"] == 22


def test_figures_that_are_no_numbers_fail_an_evaluation(finished, lorakit_run, tmp_path):
    from safetensors.torch import load_file, save_file

    from lorakit.atomic_io import sha256_of

    _, run = finished
    file = run.adapter / "adapter_model.safetensors"
    weights = {name: tensor * float("nan") for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    manifest = json.loads(run.manifest.read_text())
    run.manifest.write_text(json.dumps({**manifest, "adapter_sha256": sha256_of(file)}))
    code, out, err = lorakit_run("eval", run.folder, "--json", "--quiet")
    assert code == 1 and out == "" and "gives no numbers" in err


def test_a_merge_removes_what_a_killed_one_left(finished, lorakit_run):
    _, run = finished
    left = run.folder / ".lorakit-draft.merged.abc"
    left.mkdir()
    assert lorakit_run("merge", run.folder, "--quiet")[0] == 0
    assert not left.exists()
    shutil.rmtree(run.merged)

"""What `lorakit merge`, `combine` and `extract` say and leave behind when something is wrong, and how to call them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs_of_tests import run_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import lorakit.merge.writer as writing
from lorakit.atomic_io import exclusive_lock, files_in
from lorakit.cli import main

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"


COMMANDS = ("merge", "combine", "extract")


@pytest.fixture
def lorakit_merge(capsys, monkeypatch):
    """Run one of the commands, `lorakit merge` if none is named: exit code, standard output, standard error."""

    def run(*arguments):
        command = () if arguments[0] in COMMANDS else ("merge",)
        monkeypatch.setattr(sys, "argv", ["lorakit", *command, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.fixture
def trained(recipe_file, tmp_path, tiny_base):
    """Train on a base of this test's own; the run's folder."""

    def train(base=None, name="run", dtype=None, shards=False, steps=2, **sections):
        own = tmp_path / "base"
        if base is None and not own.exists():
            model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype or torch.float32)
            model.save_pretrained(own, **({"max_shard_size": "60KB"} if shards else {}))
            AutoTokenizer.from_pretrained(tiny_base).save_pretrained(own)
        sections["model"] = {"base": str(base or own), **sections.get("model", {})}
        run, _ = run_recipe(recipe_file(**sections), tmp_path / name, f"train.steps={steps}", "train.epochs=null")
        return run

    return train


def everything_under(folder: Path) -> dict[str, int]:
    """All that lies in a folder, hidden names included, with the time of its last change."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(lorakit_merge, where: Path, code: int, *arguments, says: str) -> str:
    """A command that fails with one clear message, and leaves all as it was."""
    before = everything_under(where)
    found, out, err = lorakit_merge(*arguments, "--quiet")
    assert (found, out) == (code, ""), err
    assert says in err and "Traceback" not in err and "fault in lorakit" not in err
    assert everything_under(where) == before
    assert not list(where.rglob(".lorakit-draft*"))
    return err


def resave(path: Path, change) -> None:
    """Change the tensors of a safetensors file in place."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def readapt(run, change) -> None:
    """Change the run's adapter as if the training had ended so: the manifest knows of it."""
    resave(run.adapter / ADAPTER, change)
    manifest = json.loads(run.manifest.read_text())
    manifest.pop("adapter_sha256", None)
    run.manifest.write_text(json.dumps(manifest))


def first(tensors: dict) -> str:
    return min(name for name in tensors if ".lora_A." in name)


def test_a_base_with_other_weights_is_refused(trained, lorakit_merge, tmp_path):
    run = trained()
    resave(tmp_path / "base" / WEIGHTS, lambda tensors: tensors["model.norm.weight"].add_(0.01))
    refused(lorakit_merge, tmp_path, 2, run.folder, says="was trained on other weights")


def test_a_missing_shard_is_named(trained, lorakit_merge, tmp_path):
    run = trained(shards=True)
    shards = sorted((tmp_path / "base").glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    refused(lorakit_merge, tmp_path, 2, run.folder, says=f"lacks {shards[1].name}")


def test_a_truncated_weights_file_is_named(trained, lorakit_merge, tmp_path):
    run = trained()
    weights = tmp_path / "base" / WEIGHTS
    whole = weights.read_bytes()
    for end in (4, 100, len(whole) // 2, -1):
        weights.write_bytes(whole[:end])
        refused(lorakit_merge, tmp_path, 2, run.folder, says="this weights file is damaged")


def test_an_adapter_that_is_not_the_runs_own_is_refused(trained, lorakit_merge, tmp_path):
    run = trained()
    resave(run.adapter / ADAPTER, lambda tensors: tensors[first(tensors)].add_(1))
    refused(lorakit_merge, tmp_path, 2, run.folder, says="is not what this run trained")


def test_an_adapter_that_cannot_be_merged_is_one_clear_error(trained, lorakit_merge, tmp_path):
    run = trained()
    whole = (run.adapter / ADAPTER).read_bytes()
    changes = {
        "holds numbers that are not finite": lambda tensors: tensors[first(tensors)][0].fill_(torch.nan),
        "not finite. Merging would spoil": lambda tensors: tensors[first(tensors)][0].fill_(torch.inf),
        "cannot be put on the base model": lambda tensors: tensors.update({first(tensors): torch.zeros(4, 5)}),
        "this adapter lacks": lambda tensors: tensors.pop(first(tensors)),
        "for which the base model has no place": lambda tensors: tensors.update(
            {"base_model.model.odd.lora_A.weight": torch.zeros(4, 5)}
        ),
    }
    for says, change in changes.items():
        (run.adapter / ADAPTER).write_bytes(whole)
        readapt(run, change)
        refused(lorakit_merge, tmp_path, 2, run.folder, says=says)


def test_a_run_that_is_not_finished_is_refused(trained, lorakit_merge, tmp_path):
    run = trained()
    manifest = json.loads(run.manifest.read_text())
    manifest["status"] = "running"
    run.manifest.write_text(json.dumps(manifest))
    refused(lorakit_merge, tmp_path, 2, run.folder, says="lorakit train --resume")


def test_a_full_fine_tuning_has_no_adapter_to_merge(trained, lorakit_merge, tmp_path):
    run = trained(adapter={"kind": "none", "rank": ..., "alpha": ...})
    refused(lorakit_merge, tmp_path, 2, run.folder, says="there is no adapter to merge")


def test_a_base_whose_quantization_cannot_be_undone_is_refused(trained, lorakit_merge, tmp_path):
    run = trained()
    config = tmp_path / "base" / "config.json"
    named = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    refused(lorakit_merge, tmp_path, 2, run.folder, says="gptq")


# Where the result goes.


def test_nothing_but_an_earlier_merge_is_replaced(trained, lorakit_merge, tmp_path):
    run = trained()
    (tmp_path / "a-file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "nowhere-link").symlink_to(tmp_path / "nowhere")
    says = "lorakit did not write it"
    for place in ("a-file", "other", "base", "run", "run/adapter"):
        for overwrite in ([], ["--overwrite"]):
            refused(lorakit_merge, tmp_path, 2, run.folder, "--output", tmp_path / place, *overwrite, says=says)
    link = tmp_path / "nowhere-link"
    refused(lorakit_merge, tmp_path, 2, run.folder, "--output", link, "--overwrite", says="is a link")
    inside = tmp_path / "a-file" / "merged"
    refused(lorakit_merge, tmp_path, 2, run.folder, "--output", inside, says="cannot be written")


def test_a_merge_does_not_replace_what_it_stands_on(trained, lorakit_merge, tmp_path):
    """The base may be an earlier merge, and a run may lie in one."""
    run = trained()
    for folder in (tmp_path / "base", run.folder):
        written = {"format": 2, "versions": {}, "files": [*files_in(folder), "merge.json"]}
        (folder / "merge.json").write_text(json.dumps(written))
        says = "--output would overwrite an input"
        refused(lorakit_merge, tmp_path, 2, run.folder, "--output", folder, "--overwrite", says=says)


def test_two_merges_into_one_folder_do_not_meet(trained, lorakit_merge, tmp_path):
    run = trained()
    with exclusive_lock(run.merged):
        refused(lorakit_merge, tmp_path, 2, run.folder, says="another process is writing this folder")


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of so many bytes; its folder."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk-{size}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"mounting a small disk is not permitted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    assert not [folder for folder in mounted if subprocess.run(["umount", folder], check=False).returncode]


def test_a_disk_without_room_is_found_before_the_work(trained, lorakit_merge, tmp_path, small_disk):
    run, disk = trained(), small_disk(1 << 20)
    refused(lorakit_merge, tmp_path, 1, run.folder, "--output", disk / "merged", says="are free there")
    assert not list(disk.iterdir())


def test_a_disk_that_fills_up_at_any_moment_is_told_and_left_empty(
    trained, lorakit_merge, tmp_path, small_disk, monkeypatch
):
    run = trained(shards=True)
    monkeypatch.setattr(writing, "_OTHER_FILES", -1 << 40)  # as if another program had taken the room meanwhile
    weights = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    fitted = []
    for size in (0, 80_000, weights + 4096, weights + 12_288, weights + 20_480, weights + 32_768, 2 * weights):
        disk = small_disk(max(4096, size))
        code, out, err = lorakit_merge(run.folder, "--output", disk / "merged", "--quiet")
        fitted.append(code == 0)
        if code:
            assert (code, out) == (1, "") and "the disk is full" in err, err
            assert not list(disk.iterdir())
    assert fitted[-1] and not fitted[0] and not fitted[3]


def test_a_full_disk_is_told_by_combination_and_extraction_too(trained, lorakit_merge, tmp_path, small_disk):
    runs, disk = [trained(name=name, steps=steps).folder for name, steps in (("one", 2), ("two", 4))], small_disk(16384)
    assert lorakit_merge(runs[0], "--quiet")[0] == 0
    combination = ["combine", *runs, "--method", "cat", "--weights", "0.5,0.5"]
    extraction = ["extract", runs[0] / "merged", tmp_path / "base", "--rank", "8"]
    for arguments in (combination, extraction):
        refused(lorakit_merge, tmp_path, 1, *arguments, "--output", disk / "out", says="the disk is full")
        assert not list(disk.iterdir())


# What is merged onto what, and proved again.


def facts_of(folder: Path) -> dict:
    return json.loads((folder / "merge.json").read_text())


def test_onto_the_original_weights_the_drift_is_stated_and_which_is_better(trained, lorakit_merge, tmp_path):
    run = trained(model={"quantization": "nf4"}, steps=6)
    code, out, err = lorakit_merge(run.folder, "--onto", "original", "--output", tmp_path / "original", "--quiet")
    assert code == 0, err
    assert "drift against the adapter on the weights that it was trained on (nf4)" in out
    facts = facts_of(tmp_path / "original")
    assert facts["onto"] == "original" and facts["quantization"] == "nf4"
    assert facts["proof"]["max_logit_difference"] <= 1e-4 * facts["proof"]["logit_scale"]
    assert facts["drift"]["max_logit_difference"] > 1e-3 * facts["drift"]["logit_scale"]
    sentences = {
        "merged": "The merged model scores better on these rows.",
        "adapter": "The adapter scores better on these rows.",
        "cannot tell": "Which of the two is better cannot be told from these rows.",
    }
    sentence = sentences[facts["drift"]["better"]]
    assert sentence in out and sentence in (tmp_path / "original" / "README.md").read_text()
    code, out, err = lorakit_merge(run.folder, "--verify", tmp_path / "original", "--json", "--quiet")
    assert code == 0, err
    assert json.loads(out)["drift"]["better"] == facts["drift"]["better"]
    adapter = load_file(run.adapter / ADAPTER)
    stem = first(adapter).removesuffix("lora_A.weight")
    change = adapter[f"{stem}lora_B.weight"] @ adapter[f"{stem}lora_A.weight"] * 2  # alpha over rank
    name = stem.removeprefix("base_model.model.") + "weight"
    before, after = (load_file(tmp_path / folder / WEIGHTS)[name] for folder in ("base", "original"))
    assert torch.allclose(after, before + change, atol=1e-6)


def test_verify_accepts_the_merge_and_no_other(trained, lorakit_merge, tmp_path, tiny_base):
    run = trained(steps=6)
    assert lorakit_merge(run.folder, "--quiet")[0] == 0
    sent = shutil.copytree(run.merged, tmp_path / "sent")
    before = everything_under(tmp_path)
    code, out, err = lorakit_merge(run.folder, "--verify", sent, "--quiet")
    assert (code, err) == (0, "") and "is the merged model of" in out
    assert everything_under(tmp_path) == before

    (sent / "merge.json").write_text("{")
    refused(lorakit_merge, tmp_path, 2, run.folder, "--verify", sent, says="damaged")
    (sent / "merge.json").unlink()
    assert lorakit_merge(run.folder, "--verify", sent, "--quiet")[0] == 0

    name = "model.layers.1.mlp.down_proj.weight"
    resave(sent / WEIGHTS, lambda tensors: tensors[name].mul_(1.5))
    refused(lorakit_merge, tmp_path, 1, run.folder, "--verify", sent, says="does not answer as the adapter does")
    resave(sent / WEIGHTS, lambda tensors: tensors[name].fill_(torch.nan))
    refused(lorakit_merge, tmp_path, 1, run.folder, "--verify", sent, says="not all finite")
    (sent / WEIGHTS).write_bytes((sent / WEIGHTS).read_bytes()[:-1])
    refused(lorakit_merge, tmp_path, 2, run.folder, "--verify", sent, says="this weights file is damaged")
    (sent / WEIGHTS).unlink()
    refused(lorakit_merge, tmp_path, 2, run.folder, "--verify", sent, says="is not a model folder")
    (sent / "config.json").unlink()
    refused(lorakit_merge, tmp_path, 2, run.folder, "--verify", sent, says=str(sent))
    refused(lorakit_merge, tmp_path, 2, run.folder, "--verify", tmp_path / "gone", says="there is no such folder")
    refused(lorakit_merge, tmp_path, 1, run.folder, "--verify", tiny_base, says="does not answer as the adapter does")


def test_verify_refuses_a_model_of_another_shape(trained, lorakit_merge, tmp_path):
    from transformers import AutoConfig

    run = trained()
    for change in ({"intermediate_size": 48}, {"num_hidden_layers": 1}, {"vocab_size": 500}):
        config = AutoConfig.from_pretrained(tmp_path / "base", **change)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
        refused(lorakit_merge, tmp_path, 2, run.folder, "--verify", tmp_path / "other", says="another shape")


def test_a_merged_model_can_be_trained_on_and_merged_again(trained, lorakit_merge, tmp_path):
    one = trained(dtype=torch.bfloat16)
    assert lorakit_merge(one.folder, "--quiet")[0] == 0
    two = trained(base=one.merged, name="second")
    assert lorakit_merge(two.folder, "--quiet")[0] == 0
    facts = facts_of(two.merged)
    assert facts["base"]["name"] == str(one.merged) and facts["dtype"] == "bfloat16"
    assert lorakit_merge("--verify", two.merged, two.folder, "--quiet")[0] == 0
    refused(lorakit_merge, tmp_path, 1, "--verify", one.merged, two.folder, says="does not answer as the adapter does")


def test_a_number_too_large_for_float16_is_told_with_the_remedy(trained, lorakit_merge, tmp_path):
    run = trained(dtype=torch.float16)
    readapt(run, lambda tensors: tensors[first(tensors).replace("lora_A", "lora_B")][0].fill_(1e7))
    refused(lorakit_merge, tmp_path, 1, run.folder, says="not finite in float16. Write --dtype bfloat16")
    code, _, err = lorakit_merge(run.folder, "--dtype", "float32", "--quiet")
    assert code == 0, err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_type_that_is_asked_for_is_written_and_recorded(trained, lorakit_merge, tmp_path, dtype):
    run = trained()
    code, out, err = lorakit_merge(run.folder, "--dtype", dtype, "--json", "--quiet")
    assert code == 0, err
    assert json.loads(out)["dtype"] == facts_of(run.merged)["dtype"] == dtype
    assert json.loads((run.merged / "config.json").read_text())["dtype"] == dtype
    assert {str(value.dtype) for value in load_file(run.merged / WEIGHTS).values()} == {f"torch.{dtype}"}


def test_a_merge_without_proof_says_so_everywhere(trained, lorakit_merge):
    run = trained()
    code, out, _ = lorakit_merge(run.folder, "--no-proof", "--quiet")
    assert code == 0 and "not compared with the adapter model" in out
    assert facts_of(run.merged)["proof"] is None
    assert "Not compared with the adapter model" in (run.merged / "README.md").read_text()


@pytest.mark.parametrize("kind", ["q8", "nf4"])
def test_an_adapter_on_a_quantized_checkpoint_is_merged_into_its_dequantized_weights(
    trained, lorakit_merge, tmp_path, tiny_base, kind
):
    settings = {"q8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}[kind]
    quantized = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, quantization_config=quantized, dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "base")
    run = trained(steps=6)
    refused(lorakit_merge, tmp_path, 2, run.folder, "--onto", "original", says="no full-precision ones to merge into")
    code, _, err = lorakit_merge(run.folder, "--quiet")
    assert code == 0, err
    assert "quantization_config" not in json.loads((run.merged / "config.json").read_text())
    assert facts_of(run.merged)["quantization"] == kind
    assert f"dequantized from {kind}" in (run.merged / "README.md").read_text()
    assert {str(value.dtype) for value in load_file(run.merged / WEIGHTS).values()} == {"torch.float32"}
    assert lorakit_merge(run.folder, "--verify", run.merged, "--quiet")[0] == 0
    refused(lorakit_merge, tmp_path, 2, run.folder, "--verify", tmp_path / "base", says="its weights are quantized")
    assert not list(tmp_path.rglob(".lorakit-draft*"))


# `lorakit combine`, `lorakit extract`, and options.


def test_several_runs_are_combined_into_an_adapter_or_into_the_base(trained, lorakit_merge, tmp_path):
    runs = [trained(name=name, steps=steps).folder for name, steps in (("one", 4), ("two", 6))]
    combination = ["combine", *runs, "--method", "cat", "--weights", "0.5,0.5"]
    code, out, err = lorakit_merge(*combination, "--output", tmp_path / "both", "--json", "--quiet")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["combined"]["rank"] == 8 and [score["rows"] for score in facts["scores"]] == [10, 10]
    assert (tmp_path / "both" / "combine.json").is_file()
    code, out, err = lorakit_merge(*combination, "--into-base", "--output", tmp_path / "model", "--quiet")
    assert code == 0, err
    assert "proved on" in out
    assert len(facts_of(tmp_path / "model")["combined"]["sources"]) == 2
    refused(lorakit_merge, tmp_path, 2, *combination, "--output", tmp_path / "both", says="--overwrite")


def test_a_lora_is_taken_out_of_two_models(trained, lorakit_merge, tmp_path):
    run = trained(steps=4)
    assert lorakit_merge(run.folder, "--quiet")[0] == 0
    arguments = ["extract", run.merged, tmp_path / "base", "--rank", "4", "--output", tmp_path / "out"]
    code, out, err = lorakit_merge(*arguments, "--json", "--quiet")
    assert code == 0, err
    assert json.loads(out)["kept"] > 0.999
    assert json.loads((tmp_path / "out" / "extract.json").read_text())["rank"] == 4
    refused(lorakit_merge, tmp_path, 2, *arguments, says="--overwrite")


def test_options_that_do_not_go_together_are_refused(trained, lorakit_merge, tmp_path):
    places = {"RUN": trained().folder, "BASE": tmp_path / "base"}
    for line, says in {
        "combine RUN RUN --method cat --weights 1;1 --output o": "--weights: '1;1'",
        "combine RUN RUN --method cat --weights 1,1 --output o --onto original": "--onto: requires --into-base",
        "combine RUN RUN --method cats --weights 1,1 --output o": "there is no cats",
        "combine RUN --method cat --weights 1 --output o": "combines two adapters or more",
        "RUN --verify BASE --overwrite": "--overwrite: does nothing with --verify",
        "RUN --verify BASE --no-proof": "--no-proof: does nothing with --verify",
        "extract BASE BASE --rank 4 --output o": "have the same weights",
        "BASE": "is a model, which has no adapter to merge. Give the folder of a run or of an adapter.",
    }.items():
        refused(lorakit_merge, tmp_path, 2, *(places.get(word, word) for word in line.split()), says=says)


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("combine A B --weights 1,1 --output o", "--method"),
        ("combine A B --method cat --output o", "--weights"),
        ("combine A B --method cat --weights 1,1", "--output"),
        ("extract A B --output o", "--rank"),
        ("extract A B --rank 4", "--output"),
    ],
)
def test_a_missing_option_is_named(line, option, lorakit_merge):
    code, _, err = lorakit_merge(*line.split())
    assert code == 2 and f"Missing option '{option}'" in err


@pytest.mark.parametrize(
    ("line", "now"),
    [
        ("A B", "`lorakit merge A B` is now `lorakit combine RUN RUN --method"),
        ("A B --method cat --weights 1,1 --output o", "`lorakit merge --method` is now `lorakit combine"),
        ("A B --into-base", "`lorakit combine RUN RUN --method METHOD --weights 0.5,0.5 --output DIR`"),
        ("--extract TUNED BASE --rank 4 --output o", "is now `lorakit extract TUNED BASE --rank 32 --output DIR`."),
        ("--extract=TUNED BASE", "is now `lorakit extract TUNED BASE"),
        ("BASE --rank 4", "is now `lorakit extract TUNED BASE --rank 32 --output DIR`."),
    ],
)
def test_what_merge_did_before_names_the_command_that_does_it_now(line, now, lorakit_merge, tmp_path):
    refused(lorakit_merge, tmp_path, 2, *line.split(), says=now)


def test_another_configuration_of_the_base_is_refused(trained, lorakit_merge, tmp_path):
    """Both sides of the proof would read the same changed one."""
    run = trained()
    config = Path(json.loads(run.manifest.read_text())["base"]["name"]) / "config.json"
    facts = json.loads(config.read_text())
    config.write_text(json.dumps(facts | {"rms_norm_eps": 0.5}))
    refused(lorakit_merge, tmp_path, 2, run.folder, says="another configuration")


def test_verify_sees_weights_that_no_held_out_row_reaches(trained, lorakit_merge, tmp_path):
    run = trained()
    assert lorakit_merge(run.folder)[0] == 0
    sent = tmp_path / "sent"
    shutil.copytree(run.merged, sent)
    tensors = load_file(sent / "model.safetensors")
    name = next(name for name in tensors if "embed_tokens" in name)
    tensors[name][-1] += 1.0
    save_file(tensors, sent / "model.safetensors", metadata={"format": "pt"})
    refused(lorakit_merge, tmp_path, 1, run.folder, "--verify", sent, says="embed_tokens.weight is not the base's")

"""Promises of `lorakit diff`: each difference is told once and truly, and what cannot be compared says why."""

import json
import math
import shutil

import pytest
import torch
from conftest import rows_of, write_rows
from eval_runs import edit_json, evaluate, make_run, score
from safetensors.torch import load_file, save_file

from lorakit.prepare import reopen_run
from lorakit.progress import Silent
from lorakit.recipe.schema import Source
from lorakit.run_dir import Run
from lorakit.share.adapter_distance import compare_adapters
from lorakit.share.diff import diff
from lorakit.share.diff_side import open_side
from lorakit.share.row_diff import compare_rows

TRAIN = {"steps": 4, "eval_every": 4, "save_every": 4}


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_base):
    """Two runs on the same base and the same held-out rows, with other training rows and ranks, both scored."""
    root = tmp_path_factory.mktemp("pair")
    first = make_run(root / "a", tiny_base, train={**TRAIN, "learning_rate": "auto"})
    (root / "b").mkdir()
    write_rows(root / "b" / "more.jsonl", [*rows_of(24)[1:], rows_of(2)[1]])
    second = make_run(root / "b", tiny_base, train=TRAIN, adapter={"rank": 8}, data={"train": "more.jsonl"})
    for run in (first, second):
        evaluate(*reopen_run(run.folder, Silent()), Silent())
    return first, second


@pytest.fixture
def copies(pair, tmp_path, monkeypatch):
    """The two with their rows at another place, as if they had been trained there."""
    copied = []
    for run in pair:
        there = run.folder.parent
        shutil.copytree(there, tmp_path / there.name)
        copied.append(Run(tmp_path / there.name / "run"))
        manifest = copied[-1].manifest
        manifest.write_text(manifest.read_text().replace(str(there), str(tmp_path / there.name)))
    monkeypatch.chdir(tmp_path)
    return copied


def compare(a, b):
    sides = [open_side(one.folder if isinstance(one, Run) else one) for one in (a, b)]
    return diff(*sides, Silent())


def test_keys_that_differ_are_told_with_what_auto_chose(pair):
    found = {one.key: one for one in compare(*pair).keys}
    assert found.keys() == {"adapter.rank", "train.learning_rate", "data.train", "data.eval"}
    assert (found["adapter.rank"].a, found["adapter.rank"].b) == (4, 8)
    rate = found["train.learning_rate"]
    assert (rate.a, rate.auto_a, rate.b, rate.auto_b) == (0.013, True, 0.05, False)
    assert [one.key for one in compare(pair[0], pair[0]).keys] == []


def test_sources_are_compared_one_by_one_by_what_they_say(tmp_path, tiny_base):
    data = {"a": "{train: a.jsonl, train_on: last}", "b": "{train: [a.jsonl, {path: b.jsonl, take: 5}], eval: 0.1}"}
    for name, text in data.items():
        write_rows(tmp_path / f"{name}.jsonl", rows_of(4))
        (tmp_path / f"{name}.yaml").write_text(f"name: x\nmodel: {{base: {tiny_base}}}\ndata: {text}\n")
    found = {one.key: (one.a, one.b) for one in compare(tmp_path / "a.yaml", tmp_path / "b.yaml").keys}
    assert found == {
        "data.train[1].path": (None, str(tmp_path / "b.jsonl")),
        "data.train[1].take": (None, 5),
        "data.eval": (None, 0.1),
        "data.train_on": ("last", "assistant"),
    }


def test_keys_that_nothing_reads_in_one_of_the_two_do_not_differ(tmp_path, tiny_base):
    texts = {"a": "adapter: {rank: 4}", "b": "adapter: {kind: none}"}
    write_rows(tmp_path / "train.jsonl", rows_of(4))
    for name, text in texts.items():
        recipe = f"model: {{base: {tiny_base}}}\ndata: {{train: train.jsonl}}\n{text}\n"
        (tmp_path / f"{name}.yaml").write_text(recipe)
    found = {one.key for one in compare(tmp_path / "a.yaml", tmp_path / "b.yaml").keys}
    assert found == {"name", "adapter.kind"}


def test_a_run_that_is_reached_by_a_link_at_another_depth_is_the_same(pair, tmp_path):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    link = tmp_path / "deep" / "deeper" / "production"
    link.symlink_to(pair[0].folder)
    found = compare(pair[0], link)
    assert found.keys == () and found.rows["train"].both == 22 and isinstance(found.same_tokens["train"], bool)


def test_a_run_and_the_recipe_that_it_came_from_differ_in_nothing(pair):
    run = pair[0]
    found = compare(run, run.folder.parent / "tiny.yaml")
    assert found.keys == () and found.versions == {} and found.base["same"] is None
    assert found.files.only_a == found.files.only_b == ()
    assert (found.rows["train"].added, found.rows["train"].removed, found.rows["train"].both) == (0, 0, 22)
    assert "is a recipe" in found.adapters and "is a recipe" in found.scores


def test_rows_added_and_removed_are_counted_and_the_first_ones_shown(pair):
    rows = compare(*pair).rows["train"]
    assert (rows.rows_a, rows.rows_b, rows.both, rows.added, rows.removed) == (22, 24, 21, 3, 1)
    assert len(rows.first_added) == 3 and "number 0." in rows.first_removed[0].text
    assert rows.first_removed[0].where.endswith("train.jsonl:1")
    held_out = compare(*pair).rows["eval"]
    assert (held_out.both, held_out.added, held_out.removed) == (10, 0, 0)


def test_the_same_rows_in_another_format_are_the_same(tmp_path):
    one = write_rows(tmp_path / "a.jsonl", rows_of(5))
    flat = [
        {"prompt": row["messages"][0]["content"], "completion": row["messages"][1]["content"]} for row in rows_of(5)
    ]
    flat = [{"question": row["prompt"], "answer": row["completion"]} for row in flat]
    other = write_rows(tmp_path / "b.jsonl", [*flat[::-1], {"question": "what?", "answer": None}])
    (tmp_path / "b.jsonl").open("a").write("{broken\n")
    found = compare_rows([Source(path=str(one))], [Source(path=str(other))], Silent())
    assert (found.both, found.removed, found.added, found.unreadable) == (5, 0, 1, 1)
    assert "what?" in found.first_added[0].text


def test_rows_that_are_gone_or_changed_are_compared_by_sha256(copies):
    a, b = copies
    (a.folder.parent / "train.jsonl").unlink()
    found = compare(a, b)
    assert found.rows["train"] == f"{a.folder}: a/train.jsonl: there is no such file"
    assert [path.rpartition("/")[2] for path in found.files.only_a + found.files.only_b] == [
        "train.jsonl",
        "more.jsonl",
    ]
    assert len(found.files.same) == 1 and found.same_tokens == {"train": False, "eval": True}
    write_rows(a.folder.parent / "train.jsonl", rows_of(3))
    assert "not what the run read" in compare(a, b).rows["train"]


def test_a_moved_run_finds_its_rows_where_they_were(pair, tmp_path):
    shutil.copytree(pair[0].folder, tmp_path / "moved")
    assert compare(Run(tmp_path / "moved"), pair[1]).rows["train"].both == 21


def test_versions_machine_and_base_are_told(copies):
    a, b = copies
    manifest = b.read_manifest()
    assert compare(a, b).versions == {} and compare(a, b).base["same"]
    versions, machine = {**manifest["versions"], "torch": "1.0"}, {**manifest["machine"], "name": "other"}
    base = {**manifest["base"], "sha256": {**manifest["base"]["sha256"], "model.safetensors": "0" * 64}}
    edit_json(b.manifest, versions=versions, machine=machine, base=base)
    found = compare(a, b)
    assert found.versions["torch"] == (manifest["versions"]["torch"], "1.0")
    assert found.versions["machine.name"] == (manifest["machine"]["name"], "other")
    assert found.base["differing"] == ["model.safetensors"] and not found.base["same"] and found.base["same_tokenizer"]
    assert found.adapters == "they are of bases with other weights"


def changes_of(run, alpha):
    """Each module's update, computed as a matrix."""
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    rank = json.loads((run.adapter / "adapter_config.json").read_text())["r"]
    stems = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith("lora_A.weight")]
    return {
        stem: alpha / rank * (tensors[f"{stem}.lora_B.weight"].double() @ tensors[f"{stem}.lora_A.weight"].double())
        for stem in stems
    }


def test_the_distance_of_adapters_is_that_of_the_whole_matrices(pair):
    found = compare(*pair).adapters
    of_a, of_b = (changes_of(run, 8) for run in pair)
    assert len(found.modules) == len(of_a) and not found.only_a and not found.only_b
    for one in found.modules:
        a, b = (side[f"base_model.model.{one.module}"] for side in (of_a, of_b))
        assert math.isclose(one.norm_a, a.norm(), rel_tol=1e-6) and math.isclose(one.norm_b, b.norm(), rel_tol=1e-6)
        assert math.isclose(one.distance, (a - b).norm(), rel_tol=1e-5)
    squares = sum(float((of_a[stem] - of_b[stem]).norm()) ** 2 for stem in of_a)
    assert math.isclose(found.total.distance, math.sqrt(squares), rel_tol=1e-5)
    assert [one.distance for one in found.modules] == sorted((one.distance for one in found.modules), reverse=True)
    same = compare(pair[0], pair[0]).adapters
    assert same.total.relative == 0 and all(one.distance == 0 for one in same.modules)


def test_patterns_rslora_missing_modules_and_whole_ones_are_known(copies, tmp_path):
    a, b = copies
    weights = b.adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    gone = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
    del tensors[gone], tensors[gone.replace("lora_A", "lora_B")]
    key = next(name for name in tensors if name.endswith("v_proj.lora_A.weight"))
    tensors[key] = tensors[key][:2].contiguous()
    tensors[key.replace("lora_A", "lora_B")] = tensors[key.replace("lora_A", "lora_B")][:, :2].contiguous()
    tensors["base_model.model.lm_head.weight"] = torch.ones(3, 3)
    save_file(tensors, weights)
    module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    edit_json(b.adapter / "adapter_config.json", use_rslora=True, rank_pattern={module: 2}, alpha_pattern={module: 3})
    found = compare_adapters(a.adapter, b.adapter, Silent())
    assert found.only_a == (gone.removeprefix("base_model.model.").removesuffix(".lora_A.weight"),)
    assert found.only_b == ("lm_head.weight",)
    product = tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
    (one,) = [one for one in found.modules if one.module == module]
    assert math.isclose(one.norm_b, 3 / math.sqrt(2) * product.norm(), rel_tol=1e-5)
    edit_json(b.adapter / "adapter_config.json", rank_pattern={})
    with pytest.raises(Exception, match="is damaged"):
        compare_adapters(a.adapter, b.adapter, Silent())


def test_scores_on_the_same_rows_have_the_verdicts_of_an_evaluation(pair):
    found = compare(*pair).scores
    together = score(*(run.folder for run in pair), baseline=str(pair[0].folder))
    (expected,) = together.parts[""].comparisons.values()
    assert found.unpaired == {} and found.comparisons.keys() == expected.keys()
    assert {name: one.to_dict() for name, one in found.comparisons.items()} == {
        name: one.to_dict() for name, one in expected.items()
    }


def test_scores_that_cannot_be_paired_are_shown_with_the_reason(copies, command):
    a, b = copies
    lines = next(b.evaluations.glob("*.jsonl"))
    whole = lines.read_text()
    for text, reason in (
        ("\n".join(whole.splitlines()[1:]), "not scored on the same rows"),
        (whole.replace('"sums"', '"other"'), "does not say what each row adds"),
        (whole[:-20], "damaged"),
    ):
        lines.write_text(text)
        found = compare(a, b).scores
        assert not found.comparisons and reason in found.unpaired[""]
    code, out, err = command("diff", a.folder, b.folder)
    assert code == 0 and f"lorakit eval {a.folder} {b.folder} gives a verdict" in out, err
    lines.write_text(whole)
    document = b.list_evaluations()[0]
    edit_json(document, settings={**json.loads(document.read_text())["settings"], "max_new_tokens": 9})
    found = compare(a, b).scores
    assert "loss" in found.comparisons and "up to 8 tokens for one" in found.unpaired["exact-match"]
    shutil.rmtree(b.evaluations)
    assert compare(a, b).scores == f"{b.folder} has no scores of what it trained: lorakit eval {b.folder} makes some"


def test_the_command_prints_all_parts_and_the_same_facts_as_json(pair, command):
    folders = [run.folder for run in pair]
    code, out, err = command("diff", *folders)
    assert code == 0, err
    for text in ("adapter.rank", "0.013 (auto)", "3 added, 1 removed, 21 in both", "versions: the same"):
        assert text in out
    for text in ("base: the same files, by sha256", "of |A|, over 14 modules", "exact-match"):
        assert text in out
    code, out, _ = command("diff", *folders, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["data"]["rows"]["train"]["added"] == 3
    parts = {"a", "b", "recipe", "recipe_not_compared", "data", "versions", "base", "adapters", "scores"}
    assert facts.keys() == parts and not facts["recipe_not_compared"]
    assert facts["adapters"]["total"]["relative"] > 0 and "exact-match" in facts["scores"]["comparisons"]


def test_what_is_neither_a_run_nor_a_recipe_is_refused(pair, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = pair[0].folder.parent / "tiny.yaml"
    assert "there is no such run" in command("diff", "nowhere", recipe)[2]
    assert "nowhere.yaml" in command("diff", "nowhere.yaml", recipe)[2]
    (tmp_path / "empty").mkdir()
    code, _, err = command("diff", "empty", recipe)
    assert code == 2 and "not a run folder" in err
    (tmp_path / "bad.yaml").write_text("modle: {}\n")
    code, _, err = command("diff", "bad.yaml", recipe)
    assert code == 2 and "bad.yaml:1:1" in err

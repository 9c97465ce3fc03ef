"""`lorakit plan`: whether a run fits, how long it takes, and what to change, from the model's config alone."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import rows_of, write_rows
from model_families import FAMILIES

from lorakit.plan.model_info import known_config


@pytest.fixture
def recipe_on(tmp_path, monkeypatch):
    """Write a recipe on a model that is not on this machine, with 600 rows that are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_rows(tmp_path / "train.jsonl", rows_of(600))

    def write(base: str, **sections):
        recipe = {"name": "planned", "model": {"base": base}, "data": {"train": "train.jsonl", "eval": 0.25}}
        for name, values in sections.items():
            recipe[name] = {**recipe.get(name, {}), **values}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write


def test_a_plan_of_seventy_billion_parameters_loads_no_torch(recipe_on):
    path = recipe_on("meta-llama/Llama-3.1-70B", model={"quantization": "nf4"})
    arguments = ["lorakit", "plan", str(path), "--gpu", "80GB", "--price", "2.5", "--json"]
    code = (
        f"import sys; sys.argv = {arguments!r}\n"
        "from lorakit.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parameters"]["total"] == 70_553_706_496 and found["counted"] == "config"
    assert found["fits"] == "yes" and 36e9 < found["memory"]["longest"]["weights"] < 41e9
    rows = found["rows"]
    assert rows["count"] + rows["held_out"] == 600 and 420 < rows["count"] < 480
    assert found["steps"] == 3 * -(-rows["count"] // 16) and not rows["exact"]  # near-duplicates may change sides
    seconds, cost = found["seconds"], found["price"]
    assert seconds["low"] < seconds["likely"] < seconds["high"]
    assert cost["likely"] == pytest.approx(2.5 * seconds["likely"] / 3600)
    full = found["full_fine_tuning"]
    assert full["fits"] == "no" and full["memory"]["longest"]["total"] > 16 * 70e9
    assert found["files"] == {"adapter": 4 * 207_093_760, "model": 2 * 70_553_706_496}
    assert {"total", "moment", "weights", "activations", "logits", "overhead"} <= found["memory"]["average"].keys()
    assert "no tokenizer of meta-llama/Llama-3.1-70B is on this machine" in rows["counted"]


def test_rows_are_planned_with_the_tokenizer_without_datasets_or_the_code_of_models(recipe_file, tiny_base):
    arguments = ["lorakit", "plan", str(recipe_file(model={"base": str(tiny_base)})), "--json"]
    code = (
        f"import sys; sys.argv = {arguments!r}\n"
        "from lorakit.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'datasets', 'pandas', 'trl', 'torch._dynamo', 'transformers.modeling_utils'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]["exact"]


def test_the_text_says_it_in_tables_and_sentences(recipe_on, lorakit_plan):
    path = recipe_on("Qwen/Qwen2.5-7B-Instruct", model={"quantization": "nf4"})
    code, out, _ = lorakit_plan(path, "--gpu", "RTX 4090", "--price", "0.5")
    assert code == 0
    for said in (
        "planned: Qwen/Qwen2.5-7B-Instruct on RTX 4090, 24.0 GiB",
        "full fine-tuning",
        "It fits: ",
        "7,615,616,512, counted from its config",
        "what would use the memory",
        "# train.micro_batch: auto is ",
        " held out; ",
        "about 87 of 16 rows",
    ):
        assert said in out, said


@pytest.mark.parametrize(
    ("base", "card", "sections"),
    [
        ("meta-llama/Llama-3.1-8B", "RTX 3060", {}),
        ("meta-llama/Llama-3.1-8B", "24GB", {"train": {"micro_batch": 16, "gradient_checkpointing": False}}),
        ("mistralai/Mistral-7B-v0.3", "16GB", {"data": {"max_length": 8192, "train": "long.jsonl"}}),
        ("mistralai/Mixtral-8x7B-v0.1", "H200", {}),
        ("Qwen/Qwen2.5-3B", "24GB", {"adapter": {"kind": "none"}}),
        ("Qwen/Qwen2.5-0.5B", "4GB", {"adapter": {"kind": "adalora"}, "model": {"attention": "eager"}}),
        ("meta-llama/Llama-3.1-8B", "80GB", {"model": {"quantization": "nf4", "double_quant": False}}),
    ],
)
def test_each_change_that_is_named_makes_it_fit(recipe_on, lorakit_plan, tmp_path, base, card, sections):
    longest = {"messages": [{"role": "user", "content": "word " * 9000}, {"role": "assistant", "content": "yes"}]}
    write_rows(tmp_path / "long.jsonl", [*rows_of(50), longest])
    path = recipe_on(base, **sections)
    code, out, _ = lorakit_plan(path, "--gpu", card, "--json")
    found = json.loads(out)
    if found["fits"] == "yes":  # the eager case is there for the room that is left
        assert code == 0
    else:
        assert code == (1 if found["fits"] == "no" else 0) and found["changes"]
    for change in found["changes"]:
        code, out, _ = lorakit_plan(path, "--gpu", card, "--json", *shlex.split(change["options"]))
        again = json.loads(out)
        assert code == 0 and again["fits"] == "yes", change["options"]
        assert again["memory"]["longest"]["total"] == pytest.approx(change["takes"], rel=0.03)


@pytest.mark.parametrize(
    ("taken", "verdict", "fits", "certain", "code"),
    [
        (0.5, "It fits: ", "yes", True, 0),
        (0.9, "It fits, if the estimate holds: ", "yes", False, 0),
        (0.97, "It may not fit: ", "tight", False, 0),
        (1.05, "It does not fit, if the estimate holds: ", "no", False, 1),
        (1.5, "It does not fit: ", "no", True, 1),
    ],
)
def test_a_plan_claims_no_more_than_its_estimate_holds(recipe_on, lorakit_plan, taken, verdict, fits, certain, code):
    """`taken`: the share of a card's memory that the estimate takes, which may be off by 15 %."""
    # Cards as small as these are older than what Liger's kernels run on.
    train = {"micro_batch": 2, "gradient_checkpointing": False, "kernels": "off"}
    path = recipe_on("Qwen/Qwen2.5-0.5B", train=train, model={"attention": "sdpa"})
    total = json.loads(lorakit_plan(path, "--gpu", "24GB", "--json")[1])["memory"]["longest"]["total"]
    card = f"{total / taken / 2**30:.6f}GB"
    ended, out, _ = lorakit_plan(path, "--gpu", card)
    assert ended == code and verdict in out
    ended, out, _ = lorakit_plan(path, "--gpu", card, "--json")
    found = json.loads(out)
    assert ended == code and (found["fits"], found["certain"]) == (fits, certain)
    assert found["memory"]["at_most"] == pytest.approx(1.15 * total, rel=1e-3)


def test_a_price_is_never_shown_as_nothing(recipe_on, lorakit_plan):
    out = lorakit_plan(recipe_on("Qwen/Qwen2.5-0.5B"), "--gpu", "H200", "--price", "0.001")[1]
    price = next(line for line in out.splitlines() if line.startswith("price"))
    assert "0.00 " not in price and "0.00)" not in price, price


def options_of(lorakit_plan, path, card) -> list[str]:
    return [change["options"] for change in json.loads(lorakit_plan(path, "--gpu", card, "--json")[1])["changes"]]


def test_a_key_that_a_change_leaves_unread_is_taken_out_with_it(recipe_on, lorakit_plan):
    path = recipe_on("meta-llama/Llama-3.1-8B", model={"quantization": "nf4", "double_quant": False})
    found = json.loads(lorakit_plan(path, "--gpu", "80GB", "--json")[1])["changes"]
    (plain,) = [change for change in found if change["set"].get("model.quantization") == "none"]
    assert plain["options"] == "--set model.quantization=none --set model.double_quant=null"
    assert plain["set"] == {"model.quantization": "none", "model.double_quant": None}


def test_a_pattern_of_the_shell_is_quoted_in_the_text(recipe_on, lorakit_plan):
    sections = {"model": {"quantization": "nf4"}, "adapter": {"train_modules": ["embed_tokens"]}}
    out = lorakit_plan(recipe_on("meta-llama/Llama-3.1-8B", **sections), "--gpu", "8GB")[1]
    assert "  --set 'adapter.train_modules=[]'\n" in out


@pytest.fixture
def with_tokenizer(tiny_base, tmp_path):
    """The folder of a well-known model with a tokenizer and without weights."""

    def write(base: str) -> str:
        shutil.copytree(tiny_base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
        (tmp_path / "base" / "config.json").write_text(json.dumps(known_config(base)))
        return str(tmp_path / "base")

    return write


def test_no_change_takes_the_rows_away(recipe_on, with_tokenizer, lorakit_plan, tmp_path):
    write_rows(tmp_path / "long.jsonl", [{"input_ids": [5] * (1000 + number)} for number in range(300)])
    data = {"train": "long.jsonl", "max_length": 2048}
    path = recipe_on(with_tokenizer("Qwen/Qwen2.5-14B"), model={"quantization": "nf4"}, data=data)
    found = options_of(lorakit_plan, path, "RTX 3060")
    assert found and not any("max_length" in options for options in found)
    memory = json.loads(lorakit_plan(path, "--gpu", "RTX 3060", "--json")[1])["memory"]
    assert memory["average"]["activations"] < memory["longest"]["activations"]


def test_cheaper_changes_are_not_hidden_by_dearer_ones(recipe_on, lorakit_plan):
    assert "--set model.quantization=nf4" in options_of(lorakit_plan, recipe_on("meta-llama/Llama-3.1-8B"), "RTX 3060")
    path = recipe_on("meta-llama/Llama-3.1-8B", adapter={"kind": "none"})
    (found,) = options_of(lorakit_plan, path, "12GB")
    assert found == "--set model.quantization=nf4 --set adapter.kind=lora"
    sections = {"model": {"quantization": "nf4"}, "adapter": {"train_modules": ["embed_tokens"]}}
    assert "--set 'adapter.train_modules=[]'" in options_of(
        lorakit_plan, recipe_on("meta-llama/Llama-3.1-8B", **sections), "8GB"
    )
    data = {"train": "somebody/rows", "eval": None, "max_length": 131072}
    found = options_of(lorakit_plan, recipe_on("meta-llama/Llama-3.1-8B", data=data), "80GB")
    assert "--set data.max_length=98304" in found


@pytest.mark.parametrize(
    ("text", "sections"),
    [("", {}), ("\n\n", {}), ("[1, 2]\n", {}), (None, {"max_length": 8})],
    ids=["empty", "blank", "numbers", "all too long"],
)
def test_data_without_a_row_is_refused_as_training_refuses_it(
    recipe_on, with_tokenizer, lorakit_plan, tmp_path, text, sections
):
    path = recipe_on(with_tokenizer("Qwen/Qwen2.5-0.5B"), data=sections)
    if text is not None:
        (tmp_path / "train.jsonl").write_text(text)
    code, out, err = lorakit_plan(path, "--gpu", "24GB")
    assert code == 2 and not out and ("data.train: " in err or "train.jsonl: " in err)


def test_a_fault_of_the_recipe_is_told_for_all_cards_as_for_one(recipe_on, lorakit_plan):
    code, _, err = lorakit_plan(recipe_on("Qwen/Qwen2.5-0.5B"), "--gpu", "all", "--set", "adapter.targets=[query]")
    assert code == 2 and "'query' matches no linear layer" in err


def test_another_cards_flash_attention_is_not_asked_for_here(recipe_on, lorakit_plan):
    path = recipe_on("Qwen/Qwen2.5-0.5B", model={"attention": "flash_attention_2"})
    assert lorakit_plan(path, "--gpu", "RTX 4090")[0] == 0
    code, _, err = lorakit_plan(path, "--gpu", "T4")
    assert code == 2 and "needs a GPU with bfloat16, which T4 is not" in err


def test_experts_that_stay_unquantized_are_told(recipe_on, lorakit_plan):
    path = recipe_on("mistralai/Mixtral-8x7B-Instruct-v0.1", model={"quantization": "nf4"})
    assert "97% are fused experts, which bitsandbytes does not quantize" in lorakit_plan(path, "--gpu", "B200")[1]
    assert "fused experts" not in lorakit_plan(path, "--gpu", "B200", "--set", "model.quantization=none")[1]


def quantized(folder, **config):
    """A folder with the config of a Llama whose weights are quantized on disk."""
    folder.mkdir()
    config = FAMILIES["llama"].config.to_dict() | {"dtype": "bfloat16", "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_weights_that_stay_quantized_can_neither_be_merged_nor_trained_themselves(tmp_path, recipe_on, lorakit_plan):
    path = recipe_on(quantized(tmp_path / "gptq", quant_method="gptq", bits=4))
    code, out, _ = lorakit_plan(path, "--gpu", "24GB")
    assert code == 0 and "gptq on disk, trained on and counted as stored" in out and "adapter 29.7 kB" in out
    assert "the machine needs optimum and gptqmodel" in out
    assert "full fine-tuning" not in out and "merged model" not in out
    assert "none: no adapter can be added to gptq weights" in out
    assert "training is refused here until optimum and gptqmodel can load it" in lorakit_plan(path)[1]
    found = json.loads(lorakit_plan(path, "--gpu", "24GB", "--json")[1])
    assert found["checkpoint"]["quantization"] == "gptq" and not found["checkpoint"]["mergeable"]
    assert found["memory"]["merge"] is None and found["files"]["model"] is None and not found["full_fine_tuning"]
    code, _, err = lorakit_plan(path, "--set", "output.merged=true")
    assert code == 2 and "to which no adapter can be added" in err


def test_weights_that_are_dequantized_are_counted_and_merged_so(tmp_path, recipe_on, lorakit_plan):
    path = recipe_on(quantized(tmp_path / "mxfp4", quant_method="mxfp4"))
    out = lorakit_plan(path, "--gpu", "24GB")[1]
    assert "mxfp4 on disk, dequantized while it is loaded, and counted so" in out
    assert "full fine-tuning" in out and "merged model" in out and "the whole model dequantized" in out


def test_what_cannot_fit_says_so(recipe_on, lorakit_plan):
    code, out, _ = lorakit_plan(recipe_on("meta-llama/Llama-3.1-70B"), "--gpu", "8GB")
    assert code == 1
    assert "It does not fit" in out and "No change that was tried makes it fit" in out


def test_on_a_terminal_lines_break_between_words_and_remarks_stay_remarks(recipe_on, lorakit_plan, monkeypatch):
    path = recipe_on("meta-llama/Llama-3.1-8B")
    piped = lorakit_plan(path, "--gpu", "12GB")[1].splitlines()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    shown = lorakit_plan(path, "--gpu", "12GB")[1].splitlines()
    for begin, under in (("# ", "#   "), ("- ", "  "), ("      takes ", " " * 8)):
        whole = [line for line in piped if line.startswith(begin)]
        first = next(at for at, line in enumerate(shown) if line.startswith(begin))
        last = next(at for at in range(first + 1, len(shown) + 1) if not "".join(shown[at : at + 1]).startswith(under))
        assert whole and all(len(line) < 80 for line in shown[first:last])
        assert " ".join(line.strip("# ") for line in shown[first:last]) == whole[0].strip("# ")


def test_all_cards_are_listed(recipe_on, lorakit_plan):
    path = recipe_on("meta-llama/Llama-3.1-8B", model={"quantization": "nf4"})
    code, out, _ = lorakit_plan(path, "--gpu", "all")
    assert code == 0 and "RTX 3060" in out and "H200" in out and "known cards can train it, the smallest" in out
    assert "│  22.5 │" in out
    code, out, _ = lorakit_plan(path, "--gpu", "all", "--json")
    cards = {card["name"]: card["fits"] for card in json.loads(out)["cards"]}
    assert cards["RTX 2060"] == "no" and cards["RTX 4090"] == "yes"


def test_another_family_is_built_without_weights_and_that_is_said(tmp_path, recipe_on, lorakit_plan):
    folder = tmp_path / "gpt2"
    FAMILIES["gpt2"].config.save_pretrained(folder)
    code, out, err = lorakit_plan(recipe_on(str(folder), data={"max_length": 64}), "--json")
    found = json.loads(out)
    assert code == 0 and found["counted"] == "meta device"
    assert "a gpt2 is not counted from its config: building it without weights" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "RTX 4900"], "is not a known GPU. Did you mean RTX 4090"),
        (["--gpu", "A100"], "is more than one GPU"),
        (["--gpu", "24"], "Did you mean 24GB?"),
        (["--gpu", "24GB", "--price", "inf"], "--price is not a price"),
        (["--gpu", "24GB", "--probe"], "--probe runs on this machine"),
        (["--set", "model.base=nobody/nothing"], "the sizes of nobody/nothing are not known here"),
        (["--set", "adapter.targets=[query]"], "'query' matches no linear layer"),
        (["--set", "train.ranks=3"], "there is no such key"),
        (["--set", "data.train=nowhere.jsonl"], "does not exist"),
    ],
)
def test_wrong_input_ends_with_exit_code_2(recipe_on, lorakit_plan, arguments, said):
    code, _, err = lorakit_plan(recipe_on("Qwen/Qwen2.5-0.5B"), *arguments)
    assert code == 2 and said in err


def test_rows_that_are_elsewhere_are_taken_to_be_as_long_as_allowed(recipe_on, lorakit_plan):
    path = recipe_on("Qwen/Qwen2.5-0.5B", data={"train": "somebody/rows", "eval": None, "max_length": 700})
    code, out, _ = lorakit_plan(path, "--gpu", "24GB", "--json")
    found = json.loads(out)
    assert code == 0 and found["steps"] is None and found["seconds"] is None
    assert found["rows"]["longest"] == 700 and "not on this machine" in found["rows"]["counted"]


def test_spectrum_is_an_estimate_and_said_to_be(recipe_on, lorakit_plan):
    whole, half = (
        json.loads(lorakit_plan(recipe_on("Qwen/Qwen2.5-0.5B", adapter=adapter), "--gpu", "24GB", "--json")[1])
        for adapter in ({}, {"layers": {"spectrum": 0.5}})
    )
    assert half["parameters"]["estimated"] and not whole["parameters"]["estimated"]
    assert half["parameters"]["trainable"] == pytest.approx(whole["parameters"]["trainable"] / 2, rel=0.01)


def test_the_probe_measures_what_was_predicted(recipe_file, lorakit_plan):
    code, out, _ = lorakit_plan(recipe_file(), "--probe", "--json", "--quiet")
    found = json.loads(out)
    assert code == 0 and found["measured"]["micro_batch"] == found["settings"]["micro_batch"]
    assert found["measured"]["peak"] > found["measured"]["before"] > 0
    code, out, _ = lorakit_plan(recipe_file(), "--probe", "--quiet")
    assert "measured: " in out and "predicted" in out

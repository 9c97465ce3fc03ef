"""What an error says to write: it is right itself, means what was written, and knows the words of other tools."""

import re

import pytest
import yaml
from recipe_files import errors, write

from lorakit.recipe.did_you_mean import nearest, nearest_name
from lorakit.recipe.key_aliases import KEY_ALIASES, NO_COUNTERPART, VALUE_ALIASES, VALUE_REMEDIES
from lorakit.recipe.load import RecipeErrors, load
from lorakit.recipe.problem import Location
from lorakit.recipe.schema import Recipe
from lorakit.recipe.schema_introspection import keys
from lorakit.recipe.yaml_reader import plain, read_text

MODEL, DATA = "model: {base: org/model}", "data: {train: train.jsonl, eval: 0.1}"


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def recipe(line: str) -> str:
    """A recipe with this line, and with the sections that must be there."""
    lines = [line, *(own for own in (MODEL, DATA) if own.partition(":")[0] != line.partition(":")[0])]
    return "\n".join(lines) + "\n"


VALUES = """
train: {learning_rate: '0,0001'}
train: {learning_rate: '1e-4'}
train: {learning_rate: '2,5e-4'}
train: {batch_size: '1,000'}
train: {batch_size: 1_000}
train: {batch_size: 16.0}
train: {batch_size: [4]}
train: {batch_size: auto}
train: {warmup: 10%}
train: {warmup: 3 %}
train: {warmup: 1.5}
train: {eval_every: '2,5 %'}
train: {eval_every: 10 steps}
train: {schedule: constant_with_warmup}
train: {schedule: linear_decay}
train: {optimizer: adamw_bnb_8bit}
train: {optimizer: adam}
train: {optimizer: sgd}
train: {gradient_checkpointing: unsloth}
train: {gradient_checkpointing: 1}
train: {gradient_checkpointing: 'false'}
train: {early_stopping: 3}
train: {early_stopping: true}
train: {micro_batch: atuo}
train: {steps: 1.5}
train: {seed: -1}
train: {max_grad_norm: -1}
train: {keep: null}
evaluate: {metrics: [f1]}
evaluate: {metrics: [accuracy]}
evaluate: {metrics: [rouge]}
evaluate: {metrics: [em]}
evaluate: {metrics: [loss]}
evaluate: {metrics: [meteor]}
evaluate: {metrics: f1}
evaluate: {metrics: exact-match}
evaluate: {rows: 10%}
evaluate: {max_new_tokens: 0}
data: {train: train.jsonl, eval: 10%}
data: {train: train.jsonl, eval: '0,1'}
data: {train: train.jsonl, eval: 1.5}
data: {train: train.jsonl, packing: true}
data: {train: train.jsonl, packing: no}
data: {train: train.jsonl, packing: 'false'}
data: {train: train.jsonl, format: chatml}
data: {train: train.jsonl, format: jsonl}
data: {train: train.jsonl, train_on: completion}
data: {train: train.jsonl, overlong: skip}
data: {train: train.jsonl, broken: skip}
data: {train: train.jsonl, max_length: 2k}
data: {train: train.jsonl, max_length: '2,048'}
data: {train: train.jsonl, clean: {duplicates: remove}}
data: {train: train.jsonl, clean: {duplicates: true}}
data: {train: train.jsonl, clean: {duplicates: exact}}
data: train.jsonl
model: org/model
model: {base: org/model, quantization: 4bit}
model: {base: org/model, quantization: 4}
model: {base: org/model, quantization: true}
model: {base: org/model, quantization: false}
model: {base: org/model, quantization: nf4_double}
model: {base: org/model, dtype: half}
model: {base: org/model, dtype: torch.bfloat16}
model: {base: org/model, attention: fa2}
adapter: lora
adapter: qlora
adapter: {kind: qlora}
adapter: {kind: full}
adapter: {kind: ia3}
adapter: {rank: '8'}
adapter: {dropout: 5%}
adapter: {dropout: '0,05'}
adapter: {targets: all}
adapter: {targets: linear}
adapter: {targets: 'q_proj, v_proj'}
adapter: {layers: 16}
adapter: {layers: last}
output: out
output: {merged: yes}
output: {merged: 'true'}
name: my run
name: 2024
""".strip().splitlines()
# In quotes, a list or a mapping, or up to the end of the sentence.
_WRITTEN = re.compile(
    r"(?:Write(?: for example| it as a list:| a list:| one value,)?|quotes:|quotes around it:|mean) (.+)"
)


def written_in(remedy: str) -> str:
    """The value that a remedy says to write."""
    found = _WRITTEN.search(remedy)
    assert found, remedy
    value = found[1]
    if value[0] in "[{":
        return value[: max(value.rfind("]"), value.rfind("}")) + 1]
    return re.split(r"[.?]?$|, (?=and|or|which)|: (?=YAML)|[.?] ", value, maxsplit=1)[0]


def read(text: str):
    """YAML as recipes are read: `on` is a text."""
    node, problems = read_text(text, Location())
    assert not problems
    return plain(node)


@pytest.mark.parametrize("line", VALUES)
def test_what_a_remedy_says_to_write_passes(tmp_path, line):
    """The value is put where the mistake was, and no mistake is left there."""
    with pytest.raises(RecipeErrors) as caught:
        load(write(tmp_path, recipe(line)))
    (problem,) = caught.value.problems
    values = read(recipe(line))
    at, instead = values, read(written_in(problem.remedy))
    *parents, last = [int(part) if part.isdigit() else part for part in re.findall(r"\w+", problem.path)]
    for part in parents:
        at = at[part]
    at[last] = instead
    assert errors(tmp_path, yaml.safe_dump(values)) == [], problem.remedy


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("train: {learning_rate: '0,0001'}", "0.0001"),
        ("train: {warmup: 10%}", "0.1"),
        ("train: {eval_every: '2,5 %'}", "0.025"),
        ("train: {batch_size: '1,000'}", "1000"),
        ("data: {train: train.jsonl, eval: 10%}", "0.1"),
        ("data: {train: train.jsonl, max_length: 2_048}", "2048"),
        ("data: {train: train.jsonl, packing: true}", "on"),
        ("data: {train: train.jsonl, packing: no}", "off"),
        ("model: {base: org/model, quantization: false}", "none"),
        ("adapter: {targets: 'q_proj, v_proj'}", "[q_proj, v_proj]"),
        ("evaluate: {metrics: f1}", "[token-f1]"),
        ("output: out", "{dir: out}"),
    ],
)
def test_a_remedy_does_not_change_the_value(tmp_path, line, value):
    (found,) = errors(tmp_path, recipe(line))
    assert found.endswith((f"Write {value}.", f"Write a list: {value}.")), found


def test_a_decimal_comma_on_the_command_line_is_a_number(tmp_path):
    (found,) = errors(tmp_path, recipe(MODEL), "train.learning_rate=0,0001")
    assert found.endswith("Write 0.0001.")
    (found,) = errors(tmp_path, recipe(MODEL), "data.eval=10%")
    assert found.endswith("Write 0.1.")


def test_a_decimal_comma_in_braces_is_told_as_one(tmp_path):
    found = errors(tmp_path, recipe("train: {learning_rate: 0,0001}"))
    assert any("of a number write 0.0001" in line for line in found), found


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("sample_packing: true", "Did you mean data.packing?"),
        ("saves_per_epoch: 1", "Did you mean train.save_every?"),
        ("stage: sft", "lorakit has nothing for it: it trains on answers (supervised fine-tuning) and nothing else."),
        ("strict: false", "lorakit has nothing for it: it checks recipe, rows, loss and merge without being asked."),
        ("wandb_project: x", "lorakit has nothing for it: it writes every logged step into log.jsonl"),
        ("deepspeed: x.json", "Did you mean train.sharding: zero-3? zero-2 and zero-3 are DeepSpeed's"),
        ("tokens: [a]", "Did you mean model.add_tokens?"),
        ("iters: 100", "Did you mean train.steps?"),
        ("mask_prompt: true", "Did you mean data.train_on?"),
        ("load_in_8bit: false", "Remove the line: this is off unless model.quantization: q8 is written."),
        ("load_in_8bit: true", "Did you mean model.quantization: q8?"),
        ("adapter: {bias: none}", "lorakit has nothing for it"),
        ("adapter: {type: lora}", "Did you mean adapter.kind?"),
        ("model: {base: org/model, name: x}", "Did you mean model.base?"),
        ("data: {train: train.jsonl, answer: completion}", "Did you mean data.columns: {answer: NAME}?"),
        ("data: {train: [{path: train.jsonl, prompt: question}]}", "Did you mean data.columns: {prompt: NAME}?"),
        ("wandb_projct: x", "lorakit has nothing for it: it writes every logged step into log.jsonl"),
        ("max_sequence_len: 3", "Did you mean data.max_length?"),
        ("something_else_entirely: 3", "The sections of a recipe are name"),
    ],
)
def test_the_words_of_other_tools_lead_to_ours_or_say_that_there_is_nothing(tmp_path, line, remedy):
    (found,) = errors(tmp_path, recipe(line))
    assert remedy in found


def test_the_tables_of_their_words_agree():
    ours = {key.rpartition(".")[2] for key in keys(Recipe)}
    assert not KEY_ALIASES.keys() & NO_COUNTERPART.keys()
    assert not NO_COUNTERPART.keys() & ours - {"special_tokens"}  # which data.clean has, and it is another thing
    assert all(key.partition("[")[0] in keys(Recipe) for key, _ in VALUE_REMEDIES)
    assert all(word == word.lower() for word in VALUE_ALIASES)


@pytest.mark.parametrize(
    ("word", "known", "found"),
    [
        ("fn4", ["nf4", "q4"], "nf4"),
        ("leraning_rate", ["learning_rate", "rate"], "learning_rate"),
        ("batch-size", ["batch_size"], "batch_size"),
        ("strict", ["metrics"], None),
        ("stage", ["targets"], None),
        ("answer", ["base"], None),
        ("tokens", ["broken"], None),
        ("bias", ["base"], None),
        ("on", ["no"], None),
    ],
)
def test_only_a_slip_of_the_fingers_is_near(word, known, found):
    assert nearest(word, known) == found


def test_of_file_names_the_part_before_the_ending_is_compared():
    assert nearest_name("recipe.yaml", ["semi.yaml"]) is None
    assert nearest_name("tran.JSONL.gz", ["eval.jsonl", "train.jsonl"]) == "train.jsonl"
    assert nearest_name("trian.csv", ["train.jsonl", "train.csv"]) == "train.csv"


def test_a_missing_run_is_told_with_the_nearest_one(tmp_path):
    from lorakit.errors import UserError
    from lorakit.evaluate.models import argument_kind
    from lorakit.run_dir import Run

    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "manifest.json").write_text('{"base": {"sha256": {}}, "data": {"files": {}}}')
    (tmp_path / "runs" / "demmos").mkdir()  # no run
    for given in ("runs/demmo", "demmo"):
        with pytest.raises(UserError, match=rf"^{given}: there is no such run. Did you mean runs/demo\?$"):
            argument_kind(given)
        with pytest.raises(UserError, match=r"Did you mean runs/demo\?$"):
            Run(tmp_path.__class__(given)).read_manifest()
    with pytest.raises(UserError, match=r"there is no such run. Give the folder of a run, such as runs/NAME.$"):
        argument_kind("runs/something")
    with pytest.raises(UserError, match=r"not a run folder: it has no manifest.json"):
        Run(tmp_path / "runs" / "demmos").read_manifest()
    (tmp_path / "runs" / "demo" / "checkpoints" / "step-000010").mkdir(parents=True)
    for near in ("runs", "runs/demo/checkpoints", "runs/demo/checkpoints/step-000010"):  # around the run, and inside it
        with pytest.raises(UserError, match=r"Did you mean runs/demo\?$"):
            argument_kind(near)
        with pytest.raises(UserError, match=r"Did you mean runs/demo\?$"):
            Run(tmp_path.__class__(near)).read_manifest()
    assert argument_kind("org/demo") == "model"


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("data: {train: [{path: train.jsonl, type: alpaca}]}", "Did you mean data.train.format?"),
        ("data: {train: {path: train.jsonl, type: chat_template}}", "Did you mean data.train.format?"),
        ("data: {train: train.jsonl, eval: {path: eval.jsonl, type: x}}", "Did you mean data.eval.format?"),
        ("data: {train: [{path: train.jsonl, max_samples: 5}]}", "Did you mean data.train.take?"),
        ("data: {train: train.jsonl, type: alpaca}", "Did you mean data.format?"),
        ("data: {train: train.jsonl, file: x}", "The keys of data are train, eval"),
        ("output: {path: runs/x}", "Did you mean output.dir?"),
        ("evaluate: {limit: 10}", "Did you mean evaluate.rows?"),
        ("evaluate: {tasks: [mmlu]}", "Benchmarks are a command: lorakit benchmark"),
        ("eval: {metrics: [exact-match]}", "Did you mean evaluate?"),
        ("eval: eval.jsonl", "Did you mean data.eval?"),
        ("training: {epochs: 3}", "Did you mean train?"),
        ("peft: {r: 8}", "Did you mean adapter?"),
        ("train: {grad_accum: 4}", "Did you mean train.batch_size?"),
        ("train: {steps: 1,000}", "of a number write 1000."),
        ("output: {dir: ''}", "Write for example runs/my-run."),
    ],
)
def test_a_key_leads_to_its_own_section(tmp_path, line, remedy):
    """`type` of a source is no misspelt `model.dtype`, and `output.path` not the path of a source."""
    assert any(remedy in found for found in errors(tmp_path, recipe(line))), errors(tmp_path, recipe(line))


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("model: {base: https://huggingface.co/org/model}", "Write the hub id: org/model."),
        ("model: {base: huggingface.co/org/model/tree/main}", "Write the hub id: org/model."),
        ("data: {train: hf://datasets/org/rows}", "Write the hub id: org/rows."),
        ("data: {train: https://huggingface.co/datasets/org/rows}", "Write the hub id: org/rows."),
        ("data: {train: s3://bucket/rows.jsonl}", "Download the file and write its path."),
    ],
)
def test_an_address_is_told_with_the_hub_id_in_it(tmp_path, line, remedy):
    (found,) = errors(tmp_path, recipe(line))
    assert found.endswith(f"is an address. {remedy}")


@pytest.mark.parametrize("word", ["none", "off", "auto", "'true'", "No"])
def test_a_word_for_no_held_out_rows_is_not_a_hub_dataset(tmp_path, word):
    (found,) = errors(tmp_path, recipe(f"data: {{train: train.jsonl, eval: {word}}}"))
    assert found.endswith("Write null for no held-out rows, or a fraction such as 0.1.")
    assert errors(tmp_path, recipe("data: {train: train.jsonl, eval: null}")) == []


def test_a_fraction_with_a_stroke_is_told_as_a_number(tmp_path):
    (found,) = errors(tmp_path, recipe("data: {train: train.jsonl, eval: 1/10}"))
    assert found.endswith("Write 0.1.")


@pytest.mark.parametrize(
    ("train", "remedy"),
    [
        ("{steps: 50, warmup: 100}", "Write less than 50"),
        ("{steps: 50, warmup: 50}", "Write less than 50"),
        ("{steps: 1, warmup: 1}", "Write 0."),
    ],
)
def test_a_warm_up_that_outlasts_the_run_is_told_by_check(tmp_path, train, remedy):
    (found,) = errors(tmp_path, recipe(f"train: {train}"))
    assert "train.warmup" in found and remedy in found
    assert errors(tmp_path, recipe("train: {steps: 50, warmup: 49}")) == []

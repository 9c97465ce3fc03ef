"""Rows and answers against a model's positions: what it cannot compute is refused before, what is unwise is told."""

import json
import re

import pytest
from conftest import write_rows
from model_families import FAMILIES

from lorakit.model.config_values import positions_of

LONG = [
    {"prompt": f"Name {word}.", "completion": "apples " * count}
    for word, count in (("one", 1), ("two", 3), ("three", 40), ("four", 60))
]


def saved(folder, config, tokenizer):
    """A random model of a config as a local folder."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, tokenizer):
    """A GPT-2 of 64 positions."""
    from transformers import GPT2Config

    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    stop = tokenizer.eos_token_id
    config = GPT2Config(vocab_size=len(tokenizer), **size, eos_token_id=stop, bos_token_id=None, pad_token_id=0)
    return saved(tmp_path_factory.mktemp("gpt2"), config, tokenizer)


@pytest.fixture(scope="module")
def short_llama(tmp_path_factory, tokenizer):
    """A Llama trained on 64 positions, so its config says."""
    from conftest import TINY_LLAMA
    from transformers import LlamaConfig

    size = {**TINY_LLAMA, "max_position_embeddings": 64}
    stop = tokenizer.eos_token_id
    config = LlamaConfig(vocab_size=len(tokenizer), **size, eos_token_id=stop, bos_token_id=None, pad_token_id=0)
    return saved(tmp_path_factory.mktemp("short-llama"), config, tokenizer)


HARD = "but {} has 64 positions (n_positions in its config.json), each with an embedding of its own, and none for more."


@pytest.mark.parametrize("name", ["check", "plan", "data", "train"])
def test_rows_that_the_model_has_no_positions_for_are_refused_where_the_length_is_written(
    name, recipe_file, gpt2, command
):
    path = recipe_file(model={"base": str(gpt2)}, data={"max_length": 65}, evaluate={"max_new_tokens": 8})
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "max_length" in text)
    code, _, err = command(name, path)
    told = f"tiny.yaml:{line}:15: data.max_length: rows of 65 tokens are allowed, {HARD.format(gpt2)}"
    assert code == 2 and told in err and "Write max_length: 64 or less." in err
    assert not (path.parent / "runs/tiny/manifest.json").exists()


def test_the_default_length_is_compared_too_and_told_where_its_section_is(recipe_file, gpt2, command):
    path = recipe_file(model={"base": str(gpt2)}, data={"max_length": ...})
    code, out, _ = command("check", path, "--json")
    problem = json.loads(out)["problems"][0]
    assert code == 2 and "rows of 1,024 tokens are allowed" in problem["reason"]
    assert problem["path"] == "data.max_length" and problem["file"] == str(path) and problem["line"] > 1


def test_answers_that_the_model_has_no_positions_for_are_refused(recipe_file, gpt2, command):
    path = recipe_file(model={"base": str(gpt2)}, data={"max_length": 64}, evaluate={"max_new_tokens": 65})
    code, _, err = command("check", path)
    assert code == 2 and "evaluate.max_new_tokens: answers of 65 tokens" in err and "Write max_new_tokens: 32" in err
    assert command("check", path, "--set", "evaluate.max_new_tokens=32")[0] == 0


def test_the_remedy_trains_and_evaluates_to_the_last_position(recipe_file, gpt2, command, tmp_path):
    """Rows of up to 64 tokens are trained; answers end at the 64th position, and that is told."""
    write_rows(tmp_path / "train.jsonl", LONG)
    write_rows(tmp_path / "eval.jsonl", [row | {"prompt": row["prompt"] + " Now."} for row in LONG])
    once, data = {"steps": 1, "epochs": ...}, {"max_length": 64}
    path = recipe_file(model={"base": str(gpt2)}, data=data, train=once, evaluate={"max_new_tokens": 60})
    assert command("train", path)[0] == 0
    code, out, err = command("eval", "runs/tiny")
    assert code == 0, err
    assert "there is no room for 60 tokens: the model has 64 positions" in err
    assert "every answer: " in out
    assert command("merge", "runs/tiny", "--quiet")[0] == 0


def test_rows_of_a_file_beyond_the_positions_are_refused_by_name(recipe_file, gpt2, command, tmp_path):
    write_rows(tmp_path / "other.jsonl", LONG)
    path = recipe_file(model={"base": str(gpt2)}, data={"max_length": 64}, train={"steps": 1, "epochs": ...})
    assert command("train", path)[0] == 0
    manifest = (tmp_path / "runs/tiny/recipe.yaml").read_text()
    (tmp_path / "runs/tiny/recipe.yaml").write_text(manifest.replace("max_length: 64", "max_length: 200"))
    code, _, err = command("eval", "runs/tiny", "--data", "other.jsonl")
    assert code == 2 and "1 of 4 rows go beyond the model's 64 positions" in err and "other.jsonl:4" in err
    assert "fault in lorakit" not in err


@pytest.mark.parametrize("name", ["check", "plan", "data", "train"])
def test_rows_beyond_what_a_rotary_model_was_trained_on_are_told(name, recipe_file, short_llama, command, tmp_path):
    write_rows(tmp_path / "train.jsonl", LONG)
    path = recipe_file(model={"base": str(short_llama)}, data={"max_length": 128}, train={"steps": 1, "epochs": ...})
    code, out, err = command(name, path)
    told = " ".join((out + err).replace("#   ", "").split())
    assert code == 0
    assert "the model was trained on 64 positions (max_position_embeddings in its config.json)" in told
    assert "Write max_length: 64" in told


def test_short_rows_on_a_rotary_model_are_no_matter(recipe_file, short_llama, command):
    path = recipe_file(model={"base": str(short_llama)}, data={"max_length": 1024}, evaluate={"max_new_tokens": 2})
    code, out, err = command("data", path)
    assert code == 0 and "positions" not in out + err


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({}, 4096),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}}, 16384),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256}}, 4096),
        ({"rope_scaling": {"rope_type": "longrope"}, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding": {}}}, 8192),
        ({"rope_scaling": None, "sliding_window": 128}, 4096),
        ({"rope_scaling": "broken"}, 4096),
    ],
)
def test_stretched_positions_count_and_windows_are_no_limit(config, limit):
    found = positions_of({"model_type": "llama", "max_position_embeddings": 4096, **config})
    assert (found.limit, found.hard) == (limit, False)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gpt2"}, (1024, True)),
        ({"model_type": "gpt-sw3", "n_positions": 77}, (77, True)),
        ({"model_type": "opt", "max_position_embeddings": 77}, (77, True)),
        ({"model_type": "openai-gpt", "n_positions": 77}, (77, True)),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "max_position_embeddings": 77}},
            (77, False),
        ),
        ({"model_type": "falcon", "alibi": True, "max_position_embeddings": 77}, None),
        ({"model_type": "bloom", "seq_length": 77}, None),
        ({"model_type": "mamba"}, None),
        ({"model_type": "no-such-family", "max_position_embeddings": 77}, None),
        ({"model_type": ["odd"]}, None),
        ({"model_type": "../gpt2", "n_positions": 77}, None),
        ({}, None),
    ],
)
def test_the_limit_is_found_under_the_familys_own_name(config, expected):
    found = positions_of(config)
    assert expected == ((found.limit, found.hard) if found else None)


NAMED = re.compile(r"^pos|_pos|^wpe$")
MOST_SPARE = 2  # rows that a position embedding may have more than positions


def embedded_positions(model):
    """How many positions the modules of a causal language model have a row for; None where it computes any."""
    named = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(named, int):
        return None
    limit = int(named)
    tables = [
        (path, module.num_embeddings, module)
        for path, module in model.named_modules()
        if hasattr(module, "num_embeddings") and hasattr(module, "weight")
    ]
    tables += [(path, len(value), None) for path, value in model.named_buffers() if value.ndim > 1]
    counts = []
    for path, rows, module in tables:
        if NAMED.search(path.rpartition(".")[2]) and limit <= rows <= limit + MOST_SPARE:
            # The first rows may have no position: OPT's offset, RoBERTa's padding token and what stands before.
            padding, offset = getattr(module, "padding_idx", None), getattr(module, "offset", None)
            counts.append(rows - (int(offset) if offset else 0 if padding is None else int(padding) + 1))
    return min(counts, default=None)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_the_source_says_is_what_the_model_has(family):
    """The source that is read as text, against the model that transformers builds of the same config."""
    import torch
    from transformers import AutoModelForCausalLM

    config = FAMILIES[family].config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    said, has = positions_of(config.to_dict()), embedded_positions(model)
    assert has == (said.limit if said and said.hard else None)

"""What the cases stand on: a tiny base model with a real tokenizer, rows, and a recipe."""

import json
from pathlib import Path
from typing import Any

import yaml

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOPICS = ["plums", "kettles", "harbours", "ladders", "comets", "violins", "wells", "orchards"]


def messages(number: int) -> dict[str, Any]:
    """A conversation of one question and one answer."""
    topic = TOPICS[number % 8]
    return {
        "messages": [
            {"role": "user", "content": f"Say something of {topic}{', once more' * (number % 4)}, number {number}."},
            {"role": "assistant", "content": json.dumps({"topic": topic, "number": number % 3})},
        ]
    }


def write_rows(path: Path, numbers: range) -> Path:
    path.write_text("".join(json.dumps(messages(number)) + "\n" for number in numbers), encoding="utf-8")
    return path


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer with ChatML's tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [message["content"] for number in range(60) for message in messages(number)["messages"]]
    raw.train_from_iterator([*texts, "system user assistant"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def make_base(folder: Path) -> Path:
    """A random Llama of two small layers as a local folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(folder: Path, base: Path, **sections: dict[str, Any]) -> Path:
    """A recipe of three steps with its rows; sections are merged over it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", range(8))
    write_rows(folder / "eval.jsonl", range(20, 23))
    recipe: dict[str, Any] = {
        "name": "tiny",
        "model": {"base": str(base)},
        "adapter": {"rank": 2, "alpha": 4, "dropout": 0.1, "targets": ["q_proj", "down_proj"]},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 128},
        "train": {
            "steps": 3,
            "batch_size": 4,
            "micro_batch": 4,
            "learning_rate": 0.01,
            "warmup": 0,
            "eval_every": 2,
            "save_every": 1,
            "keep": 1,
        },
        "evaluate": {"metrics": ["exact-match"], "max_new_tokens": 4},
    }
    for name, values in sections.items():
        recipe[name] = {**recipe.get(name, {}), **values}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path

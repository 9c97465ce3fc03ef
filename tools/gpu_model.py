"""A model with random weights, its tokenizer, rows and recipe: what a GPU is measured on without fetching anything."""

import json
import random
from pathlib import Path
from typing import Any

from bench_rows import BATCH, RATE, SEED, TEXTS

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
}
TINY = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SHAPES = {"1b": LLAMA_1B, "8b": LLAMA_8B}
TINY_SHAPES = {"1b": TINY, "8b": TINY | {"num_hidden_layers": 3, "tie_word_embeddings": False}}
SHARD = 2 << 30  # bytes of a file of weights, more or less


def write_model(folder: Path, shape: str, tiny: bool) -> int:
    """Write a Llama in the shape of Llama 3.2 1B or 3.1 8B, or a tiny one, with a tokenizer. Its number of parameters.
    The weights are made on the device file by file, so that they need not fit into its memory."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = make_tokenizer(2048 if tiny else 8192)
    config = LlamaConfig(
        **(TINY_SHAPES if tiny else SHAPES)[shape], bos_token_id=None, architectures=["LlamaForCausalLM"]
    )
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    gpu = torch.cuda.is_available()
    config.dtype = torch.bfloat16 if gpu else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = dict(model.state_dict())
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    write_weights(folder, weights, "cuda" if gpu else "cpu", config.initializer_range)
    return sum(weight.numel() for weight in weights.values())


def write_weights(folder: Path, weights: dict[str, Any], device: str, scale: float) -> None:
    """Random weights of these names, shapes and types in files of about 2 GiB, with their index; norms are ones."""
    import torch
    from safetensors.torch import save_file

    generator, shards, size = torch.Generator(device).manual_seed(SEED), [{}], 0
    for name, weight in weights.items():
        if size > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.numel() * weight.element_size()
    places = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        made = {}
        for name, weight in shard.items():
            made[name] = torch.ones(weight.shape, dtype=weight.dtype)
            if weight.ndim > 1:
                random_weight = torch.empty(weight.shape, dtype=weight.dtype, device=device)
                made[name] = random_weight.normal_(0, scale, generator=generator).cpu()
        save_file(made, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total = sum(weight.numel() * weight.element_size() for weight in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def make_tokenizer(size: int) -> Any:
    """A byte-level BPE of the repository's free texts, with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(TEXTS.read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def write_rows(folder: Path, name: str, count: int, words: tuple[int, int]) -> None:
    """Write NAME.jsonl: questions and answers of as many random words as the range says."""
    chance = random.Random(f"{SEED} {name}")
    known = [word for word in TEXTS.read_text(encoding="utf-8").split() if word.isalpha()]

    def row() -> str:
        length = chance.randint(*words)
        texts = [" ".join(chance.choices(known, k=length)) for _ in range(2)]
        messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
        return json.dumps({"messages": messages}) + "\n"

    (folder / f"{name}.jsonl").write_text("".join(row() for _ in range(count)), encoding="utf-8")


def write_recipe(folder: Path, max_new_tokens: int) -> None:
    """Write recipe.yaml, without what would take time beside the training; model and rows are set for each run."""
    recipe = {
        "name": "gpu",
        "model": {"base": str(folder / "1b")},
        "adapter": {"rank": 16, "alpha": 32},
        "data": {
            "train": "long.jsonl",
            "eval": "eval.jsonl",
            "max_length": 4096,
            "clean": {"near_duplicates": "off", "contradictions": "off", "style": "off"},
        },
        "train": {
            "epochs": 1,
            "batch_size": BATCH,
            "learning_rate": RATE,
            "seed": SEED,
            "schedule": "constant",
            "warmup": 0,
            "eval_every": 100000,
            "save_every": 100000,
        },
        "evaluate": {"metrics": ["exact-match"], "max_new_tokens": max_new_tokens},
    }
    # JSON is YAML, and needs no library to write.
    (folder / "recipe.yaml").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")

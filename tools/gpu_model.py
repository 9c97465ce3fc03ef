"""A model with random weights, its tokenizer, rows and recipe: what a GPU is measured on without fetching anything."""

import json
import random
from pathlib import Path

from bench import BATCH, RATE, SEED

TEXTS = Path(__file__).resolve().parent.parent / "lorakit/data/general/texts.jsonl"
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
}
TINY = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def write_model(folder: Path, tiny: bool) -> int:
    """Write a Llama in the shape of Llama 3.2 1B, or a tiny one, with a tokenizer. Its number of parameters."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048 if tiny else 8192,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(TEXTS.read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    config = LlamaConfig(**(TINY if tiny else LLAMA_1B), tie_word_embeddings=True, bos_token_id=None)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    torch.manual_seed(SEED)
    gpu = torch.cuda.is_available()
    with torch.device("cuda" if gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if gpu else torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def write_rows(folder: Path, counts: dict[str, int], words: tuple[int, int]) -> None:
    """Write a file of rows for each name: a question and an answer of as many random words as the range says."""
    chance = random.Random(SEED)
    known = [word for word in TEXTS.read_text(encoding="utf-8").split() if word.isalpha()]

    def row() -> str:
        length = chance.randint(*words)
        texts = [" ".join(chance.choices(known, k=length)) for _ in range(2)]
        messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
        return json.dumps({"messages": messages}) + "\n"

    for name, count in counts.items():
        (folder / f"{name}.jsonl").write_text("".join(row() for _ in range(count)), encoding="utf-8")


def write_recipe(folder: Path, max_new_tokens: int) -> None:
    """Write recipe.yaml for the model and the rows, without what would take time beside the training."""
    recipe = {
        "name": "gpu",
        "model": {"base": str(folder / "base")},
        "adapter": {"rank": 16, "alpha": 32},
        "data": {
            "train": "train.jsonl",
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

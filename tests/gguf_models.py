"""Tiny models that llama.cpp can read: a SentencePiece tokenizer, and a width that is a multiple of 256."""

import io
from pathlib import Path

from conftest import CHATML, rows_of

ENDS = ("<|im_start|>", "<|im_end|>")


def spm_base(folder: Path, **config) -> Path:
    """A random Llama in a folder, with a SentencePiece tokenizer of 400 tokens trained on the rows of the tests."""
    import sentencepiece
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    folder.mkdir(parents=True)
    texts = [message["content"] for row in rows_of(200) for message in row["messages"]]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, "system user assistant"]),
        model_writer=written,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        control_symbols=list(ENDS),
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    ends = {"eos_token": ENDS[1], "pad_token": "<unk>", "extra_special_tokens": list(ENDS)}
    tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=False, add_prefix_space=False, **ends)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(7)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": len(tokenizer)}
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": 1, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes | ids | config)).save_pretrained(folder)
    return folder

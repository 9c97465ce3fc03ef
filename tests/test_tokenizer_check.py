"""A tokenizer that transformers builds otherwise than the base's own file describes it is told of."""

import json
import shutil

import pytest
from conftest import CHATML, rows_of
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from lorakit.model.companion_files import compare_with_file

PIPELINES = {
    "prepend": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
    "metaspace": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "metaspace always": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
    "metaspace never": (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False)),
    "bytes": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "bytes in lower case": (normalizers.Lowercase(), pre_tokenizers.ByteLevel(add_prefix_space=False)),
}
TEXTS = [message["content"] for row in rows_of(30) for message in row["messages"]]
ROWS = [f"<|im_start|>{text}<|im_end|>\n{text}" for text in TEXTS]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def write(folder, pipeline, name, family):
    """A base's tokenizer of some pipeline, whose files name a class and a family of models."""
    folder.mkdir(exist_ok=True)
    raw = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    normalizer, pre_tokenizer = PIPELINES[pipeline]
    if normalizer:
        raw.normalizer = normalizer
    if pre_tokenizer:
        raw.pre_tokenizer = pre_tokenizer
    of_bytes = pipeline.startswith("bytes")
    raw.decoder = decoders.ByteLevel() if of_bytes else decoders.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if of_bytes else []
    raw.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    raw.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": name, "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return raw


def told(folder):
    return compare_with_file(folder, AutoTokenizer.from_pretrained(folder), ROWS)


@pytest.mark.parametrize(
    ("pipeline", "name", "family"),
    [
        ("metaspace always", "PreTrainedTokenizerFast", "llama"),
        ("metaspace never", "GemmaTokenizerFast", "gemma"),
        ("bytes", "LlamaTokenizerFast", "llama"),
        ("bytes", "GPT2TokenizerFast", "gpt2"),
    ],
)
def test_nothing_is_told_of_tokens_that_are_the_files(tmp_path, pipeline, name, family):
    write(tmp_path, pipeline, name, family)
    assert told(tmp_path) is None


@pytest.mark.parametrize(
    ("pipeline", "name", "family", "can_be_told"),
    [
        ("prepend", "LlamaTokenizerFast", "llama", True),
        ("metaspace", "LlamaTokenizerFast", "llama", True),
        ("metaspace never", "LlamaTokenizerFast", "llama", True),
        ("metaspace always", "GemmaTokenizerFast", "gemma", True),
        ("bytes in lower case", "GPT2TokenizerFast", "gpt2", True),
        ("metaspace", "PreTrainedTokenizerFast", "qwen2", False),
    ],
)
def test_other_tokens_than_the_files_are_told_with_what_helps(tmp_path, pipeline, name, family, can_be_told):
    raw = write(tmp_path, pipeline, name, family)
    said = told(tmp_path)
    assert f" of {len(ROWS)} rows " in said and "tokenizer.json describes" in said
    remedy = '"tokenizer_class": "PreTrainedTokenizerFast"'
    assert remedy in said
    if can_be_told:
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | json.loads(f"{{{remedy}}}")))
        assert told(tmp_path) is None
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        for text in ROWS:
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == raw.encode(text).ids


def test_data_and_train_warn_of_a_base_whose_rows_are_other_tokens(recipe_file, lorakit, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "base")
    config = (tmp_path / "base" / "config.json").read_text()
    write(tmp_path / "base", "prepend", "LlamaTokenizerFast", "llama")
    (tmp_path / "base" / "config.json").write_text(config)
    path = recipe_file(model={"base": "./base"}, data={"max_length": 256})
    for command in (("data", path), ("train", path, "--dry-run")):
        code, _, err = lorakit(*command)
        assert code == 0, err
        assert "22 of 22 rows" in err and "builds another tokenizer (LlamaTokenizer)" in err

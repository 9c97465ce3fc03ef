"""The tokenizer beside an adapter or a model is the base's own, byte for byte, whoever reads it."""

import json
import shutil

import pytest
from conftest import CHATML, rows_of
from merge_runs import merged_run
from runs_of_tests import run_recipe
from transformers import AutoTokenizer

from lorakit.errors import UserError
from lorakit.merge.combine import Combination, combine
from lorakit.model.companion_files import save_new_tokenizer, write_tokenizer
from lorakit.model.resolve import Base
from lorakit.model.tokenizer import load_tokenizer

OTHER = "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + eos_token }}{% endfor %}"
TEXTS = ["Tell me about rivers.", "  two blanks\n\nand lines\t", "<|im_start|>user\nHäuser & 'x'<|im_end|>", "42 + 1"]


def as_transformers_4(folder, tokenizer, name="PreTrainedTokenizerFast", **values):
    """The files of a tokenizer as the fourth release writes them: more of them, and other keys."""
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    named = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    written = {
        "tokenizer_class": name,
        "additional_special_tokens": ["<|im_start|>"],
        "extra_special_tokens": {},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHATML,
        **named,
        **values,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(written, indent=4))
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    (folder / "added_tokens.json").write_text(json.dumps(tokenizer.get_added_vocab()))


def fast(folder, tokenizer):
    as_transformers_4(folder, tokenizer)
    (folder / "config.json").write_text('{"model_type": "llama"}')


def with_sentencepiece(folder, tokenizer):
    """Metaspace pieces, with the model that other programs convert beside them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    raw.train_from_iterator(
        [message["content"] for row in rows_of(200) for message in row["messages"]],
        trainers.BpeTrainer(vocab_size=500, special_tokens=special),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    as_transformers_4(folder, made, "LlamaTokenizerFast", legacy=False, additional_special_tokens=[])
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02" * 40)
    (folder / "config.json").write_text('{"model_type": "llama"}')


def vocabulary_and_merges(folder, tokenizer):
    """GPT-2's two files; that they are of GPT-2's class is in config.json alone."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def with_named_templates(folder, tokenizer):
    as_transformers_4(folder, tokenizer)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(OTHER)
    (folder / "config.json").write_text('{"model_type": "mistral"}')


KINDS = [fast, with_sentencepiece, vocabulary_and_merges, with_named_templates]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def base(request, tmp_path, tokenizer):
    folder = tmp_path / "base"
    folder.mkdir()
    request.param(folder, tokenizer)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def reads_alike(folder, tokenizer):
    again = AutoTokenizer.from_pretrained(folder)
    assert type(again) is type(tokenizer)
    assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert again.chat_template == tokenizer.chat_template
    assert again.special_tokens_map == tokenizer.special_tokens_map


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "deepseek_v3", "gpt2", "phi3", "unknown", None])
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_the_tokenizer_is_the_one_that_transformers_chooses_by_the_whole_configuration(base, model_type, named):
    (base / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {"vocab_size": 500}))
    own = base / "tokenizer_config.json"
    if own.exists() and not named:
        own.write_text(
            json.dumps({key: value for key, value in json.loads(own.read_text()).items() if "class" not in key})
        )
    try:
        AutoTokenizer.from_pretrained(base)
    except ValueError:
        with pytest.raises(UserError, match=r"tokenizer cannot be loaded|config.json cannot be read"):
            load_tokenizer(Base("base", base, "here"), None)
    else:
        reads_alike(base, load_tokenizer(Base("base", base, "here"), None))


def test_what_is_not_changed_is_copied_byte_for_byte(base, tmp_path):
    tokenizer, out = AutoTokenizer.from_pretrained(base), tmp_path / "out"
    shutil.copytree(base, out, ignore=lambda *_: [path.name for path in base.iterdir() if path.name != "config.json"])
    write_tokenizer(base, tokenizer, out)
    assert contents(out) == contents(base)
    reads_alike(out, tokenizer)


def test_an_adapters_folder_reads_as_the_base_does_without_its_configuration(base, tmp_path):
    tokenizer, out = AutoTokenizer.from_pretrained(base), tmp_path / "out"
    out.mkdir()
    write_tokenizer(base, tokenizer, out)
    reads_alike(out, tokenizer)
    found, expected = contents(out), contents(base)
    config = json.loads(found.pop("tokenizer_config.json"))
    own = json.loads(expected.pop("tokenizer_config.json", b"{}"))
    assert {key: value for key, value in config.items() if key in own} == own and config.keys() - own.keys() <= {
        "tokenizer_class"
    }
    del expected["config.json"]
    assert found == expected


def test_another_chat_template_stands_wherever_a_program_looks_for_one(base, tmp_path):
    tokenizer, out = AutoTokenizer.from_pretrained(base), tmp_path / "out"
    tokenizer.chat_template = OTHER
    shutil.copytree(base, out, ignore=lambda *_: [path.name for path in base.iterdir() if path.name != "config.json"])
    (base / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    (out / "processor_config.json").write_text(json.dumps({"chat_template": CHATML, "x": 1}))
    write_tokenizer(base, tokenizer, out)
    reads_alike(out, tokenizer)
    assert (out / "chat_template.jinja").read_text() == OTHER
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == OTHER
    assert json.loads((out / "processor_config.json").read_text()) == {"chat_template": OTHER, "x": 1}
    assert not (out / "additional_chat_templates").exists() and not (out / "chat_template.json").exists()
    unchanged = contents(base).keys() & contents(out).keys() - {"tokenizer_config.json", "chat_template.jinja"}
    assert all(contents(out)[name] == contents(base)[name] for name in unchanged)


def test_neither_code_nor_links_out_of_the_folder_nor_anything_else_is_copied(tmp_path, tokenizer):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    fast(base, tokenizer)
    (tmp_path / "secret").write_text("{}")
    (base / "vocab.json").symlink_to(tmp_path / "secret")
    (base / "tokenization_own.py").write_text("raise SystemExit")
    (base / "large.model").write_text("not a tokenizer's")
    write_tokenizer(base, AutoTokenizer.from_pretrained(base), out)
    assert not {"vocab.json", "tokenization_own.py", "large.model"} & contents(out).keys()


def test_a_snapshot_of_the_hub_is_copied_through_its_links(tmp_path, tokenizer):
    repository, out = tmp_path / "models--org--tiny", tmp_path / "out"
    snapshot = repository / "snapshots" / "0123"
    for folder in (snapshot, repository / "blobs", out):
        folder.mkdir(parents=True)
    fast(snapshot, tokenizer)
    for file in list(snapshot.iterdir()):
        file.rename(repository / "blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    write_tokenizer(snapshot, AutoTokenizer.from_pretrained(snapshot), out)
    expected = contents(snapshot)
    del expected["config.json"]
    assert contents(out) == expected and not any(path.is_symlink() for path in out.iterdir())


def test_a_tokenizer_without_files_of_its_own_is_written_as_every_release_reads_it(tmp_path, tokenizer):
    made = AutoTokenizer.from_pretrained(_saved(tokenizer, tmp_path / "made"), extra_special_tokens=["<|im_start|>"])
    save_new_tokenizer(made, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in config
    assert config["additional_special_tokens"] == ["<|im_start|>"]
    reads_alike(tmp_path, made)


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def test_adapter_merged_and_combined_folders_have_the_bases_own_tokenizer(recipe_file, tiny_base, tmp_path, tokenizer):
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(tiny_base / name, base / name)
    as_transformers_4(base, tokenizer)
    (base / "tokenizer.model").write_bytes(b"pieces")
    (base / "image_processor_config.json").write_text("{}")
    of_tokenizer = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"}
    expected = {name: content for name, content in contents(base).items() if name in of_tokenizer}
    run, _ = run_recipe(recipe_file(model={"base": str(base)}, train={"epochs": ..., "steps": 2}), tmp_path / "run")
    merged, own = merged_run(run), AutoTokenizer.from_pretrained(base)
    (tmp_path / "combined").mkdir()
    how = Combination("cat", [0.5, 0.5])
    combine([run.adapter] * 2, how, base, tmp_path / "combined", "combined", tokenizer=own)
    for folder in (run.adapter, merged, tmp_path / "combined"):
        assert expected.items() <= contents(folder).items()
        reads_alike(folder, own)
    assert (merged / "image_processor_config.json").is_file()


def test_a_whole_model_has_the_bases_tokenizer_with_the_recipes_template(recipe_file, tiny_base, tmp_path):
    (tmp_path / "own.jinja").write_text(OTHER)
    path = recipe_file(
        model={"base": str(tiny_base), "chat_template": "own.jinja"},
        adapter={"kind": "none", "rank": ..., "alpha": ...},
        train={"epochs": ..., "steps": 1, "learning_rate": 1e-4},
    )
    run, _ = run_recipe(path, tmp_path / "run")
    assert (run.model / "tokenizer.json").read_bytes() == (tiny_base / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(run.model).chat_template == OTHER

"""Nothing that a model's folder brings is run, and no library asks at the terminal whether it should be."""

import ast
import io
import json
import shutil
import sys
from pathlib import Path

import pytest

import lorakit
from lorakit.errors import BaseModelError, UserError
from lorakit.model.resolve import resolve_base
from lorakit.progress import Silent

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
# Of these classes no method takes the option: they load no code.
WITHOUT_CODE = {"PeftConfig", "PeftModel", "AutoHfQuantizer"}


def calls():
    """Every call in lorakit that makes something of a folder of a model, by its place."""
    for file in sorted(Path(lorakit.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                if node.func.attr in ("from_pretrained", "from_config") and owner not in WITHOUT_CODE:
                    yield f"{file.name}:{node.lineno}", node


def test_every_loading_says_that_code_is_not_trusted():
    found = dict(calls())
    assert len(found) > 10
    for place, call in found.items():
        (given,) = [one.value for one in call.keywords if one.arg == "trust_remote_code"] or [None]
        assert isinstance(given, ast.Constant) and given.value is False, place


@pytest.fixture
def folder(tmp_path, tiny_base):
    shutil.copytree(tiny_base, tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text(CODE)
    return tmp_path / "model"


def name_code(folder, file, code):
    path = folder / file
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(values | code))


FORMS = [
    ("config.json", {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}),
    ("config.json", {"text_config": {"auto_map": {"AutoConfig": "own.Config"}}}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Slow", None]}}),
    ("tokenizer_config.json", {"auto_map": ["own.Slow", "own.Fast"]}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "someone/else--own.Fast"]}}),
    ("processor_config.json", {"auto_map": {"AutoProcessor": "own.Processor"}}),
    ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "own.Images"}}),
    ("generation_config.json", {"auto_map": "own.Generation"}),
    ("config.json", {"_attn_implementation": "own.hub/kernel"}),
    ("config.json", {"attn_implementation": {"": "sdpa", "text_config": "own.hub/kernel:flash"}}),
    ("config.json", {"text_config": {"_experts_implementation": "own.hub/kernel"}}),
]


@pytest.mark.parametrize(("file", "code"), FORMS)
def test_code_of_a_model_is_refused_by_name_before_anything_loads(folder, file, code):
    name_code(folder, file, code)
    with pytest.raises(UserError) as refused:
        resolve_base(str(folder), "main", Silent())
    assert isinstance(refused.value, BaseModelError) and "own." in str(refused.value)
    assert file in str(refused.value)


def test_an_attention_of_transformers_own_is_no_code(folder):
    name_code(folder, "config.json", {"_attn_implementation": "flash_attention_2", "auto_map": {}})
    assert resolve_base(str(folder), "main", Silent()).folder == folder


def test_a_yes_at_the_terminal_runs_nothing(recipe_file, folder, lorakit, monkeypatch):
    name_code(folder, "tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": "own.Own"}})
    path = recipe_file(model={"base": str(folder)})
    for command in (["check"], ["train", "--dry-run"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
        code, out, err = lorakit(*command, path)
        assert code == 2 and "own.Own" in err and "[y/N]" not in out + err
    assert not (folder / "ran").exists()


def test_no_library_may_ask_at_the_terminal(folder, monkeypatch):
    """Where a library loads a folder by itself, it does not ask lorakit what it trusts."""
    from transformers import AutoTokenizer

    from lorakit.model.tokenizer import quiet_libraries

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    quiet_libraries()
    name_code(folder, "tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": "own.Own"}})
    with pytest.raises(ValueError, match="custom code"):
        AutoTokenizer.from_pretrained(folder)
    assert not (folder / "ran").exists()


def test_code_of_an_embedding_model_is_refused_too(folder):
    from lorakit.evaluate.metrics.similarity import embeddings

    name_code(folder, "config.json", {"auto_map": {"AutoModel": "own.Model"}})
    with pytest.raises(UserError, match=r"semantic-similarity: .*own\.Model"):
        embeddings(folder, ["a"])


def test_weights_of_an_embedding_model_lie_in_its_folder(folder):
    from lorakit.evaluate.metrics.similarity import embeddings

    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../far.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"semantic-similarity: .*names '\.\./far"):
        embeddings(folder, ["a"])


def test_an_adapter_that_lies_in_the_models_folder_is_refused(folder):
    """transformers puts it into the model, and a merge would not know of it."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match=r"has adapter_config\.json"):
        resolve_base(str(folder), "main", Silent())

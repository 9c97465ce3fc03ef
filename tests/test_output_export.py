"""`output.export`: checked with the recipe, made when training ends, and never the end of a training."""

import json
import shutil
import subprocess
import sys

import pytest
from recipe_files import SMALL, errors, loaded

from lorakit.registry import EXPORTERS


def export_of(*words: str) -> str:
    return f"{SMALL}output:\n  export: [{', '.join(words)}]\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["gguf:q4"], "output.export[0]: 'gguf:q4': 'q4' is not a type that gguf takes. Did you mean gguf:q4_"),
        (["huggingface", "ggfu:q8_0"], "output.export[1]: 'ggfu:q8_0' is not an export target. Did you mean gguf?"),
        (["gguf:q8_0", "GGUF:Q8_0"], "output.export[1]: 'GGUF:Q8_0' is there twice. Remove one."),
        (["3"], "output.export[0]: expected an export target such as gguf:q4_k_m, got 3. Put quotes around it: '3'."),
    ],
)
def test_a_wrong_target_is_told_at_its_place_with_what_to_write(tmp_path, words, says):
    (problem,) = errors(tmp_path, export_of(*words))
    assert "x.yaml:6:" in problem and says in problem


def test_one_word_alone_is_told_to_be_a_list(tmp_path):
    (problem,) = errors(tmp_path, f"{SMALL}output: {{export: gguf:q8_0}}\n")
    assert problem.endswith("Write it as a list: [gguf:q8_0].")


def test_what_is_made_from_an_adapter_needs_one(tmp_path):
    full = "adapter: {kind: none}\n"
    (problem,) = errors(tmp_path, full + export_of("huggingface:adapter"))
    assert "is made from an adapter, and adapter.kind none trains the weights themselves. Remove it." in problem
    assert not errors(tmp_path, full + export_of("huggingface"))


def test_checking_targets_loads_no_torch(recipe_file):
    path = recipe_file(output={"export": ["gguf:q4_k_m", "huggingface"]})
    code = (
        f"import sys; sys.argv = ['lorakit', 'check', {str(path)!r}]\n"
        "from lorakit.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'huggingface_hub', 'cyllama'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "export:" in done.stdout, done.stderr


def test_targets_survive_the_resolved_recipe(tmp_path):
    from lorakit.recipe.load import to_yaml

    recipe = loaded(tmp_path, export_of("gguf:q4_k_m", "huggingface")).recipe
    assert recipe.output.export == ["gguf:q4_k_m", "huggingface"]
    assert "gguf:q4_k_m" in to_yaml(recipe, tmp_path)


def test_a_missing_package_is_told_before_training(recipe_file, lorakit, tmp_path, monkeypatch):
    monkeypatch.setattr("lorakit.recipe.export_target.find_spec", lambda name: None)
    path = recipe_file(output={"export": ["gguf:q8_0"]})
    code, _, err = lorakit("train", path, "-o", tmp_path / "run")
    assert code == 2 and "output.export: gguf:q8_0 needs packages that are not installed" in err
    assert "pip install 'lorakit[export]'" in err and "tiny.yaml:" in err and not (tmp_path / "run").exists()


def test_training_exports_when_it_ends_and_resume_makes_what_is_missing(recipe_file, lorakit, tmp_path):
    path = recipe_file(train={"steps": 2, "epochs": None}, output={"export": ["huggingface"], "merged": True})
    code, out, err = lorakit("train", path, "-o", tmp_path / "run", "--json")
    assert code == 0 and "when training ends it is exported for huggingface" in err, err
    assert [one["target"] for one in json.loads(out)["exports"]] == ["huggingface"]
    adapter = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    merge = (tmp_path / "run" / "merged" / "merge.json").read_bytes()
    shutil.rmtree(tmp_path / "run" / "export")
    code, _, err = lorakit("train", path, "-o", tmp_path / "run", "--resume")
    assert code == 0 and "only this is missing: huggingface" in err, err
    assert (tmp_path / "run" / "export" / "huggingface" / "export.json").is_file()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert (tmp_path / "run" / "merged" / "merge.json").read_bytes() == merge
    code, _, err = lorakit("train", path, "-o", tmp_path / "run", "--resume")
    assert code == 2 and "there is nothing to resume" in err


def test_an_export_that_fails_loses_neither_the_training_nor_the_others(recipe_file, lorakit, tmp_path, monkeypatch):
    from dataclasses import replace

    from lorakit.errors import LorakitError

    def fail(*_):
        raise LorakitError("the converter fell over.")

    specs = EXPORTERS._load()
    monkeypatch.setitem(specs, "gguf", replace(specs["gguf"], function=fail))
    path = recipe_file(train={"steps": 2, "epochs": None}, output={"export": ["gguf:q8_0", "huggingface"]})
    code, out, err = lorakit("train", path, "-o", tmp_path / "run")
    assert code == 1 and "the training is complete, and 1 export failed" in err
    assert "gguf:q8_0 was not exported: the converter fell over." in err and "tries again" in err
    assert "trained 2 steps" in out and (tmp_path / "run" / "adapter").is_dir()
    assert [path.name for path in (tmp_path / "run" / "export").iterdir()] == ["huggingface"]

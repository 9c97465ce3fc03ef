"""`lorakit import` on configs in the shapes in which they are published."""

import json

import pytest
import yaml
from import_corpus import CORPUS, NOT_OF_THE_TOOLS, OTHER
from test_import import at

from lorakit.errors import UserError
from lorakit.recipe.load import load
from lorakit.share.importing import import_config, read_config
from lorakit.share.importing.conversion import leaves


@pytest.mark.parametrize("tool", CORPUS)
def test_a_published_config_is_imported_or_its_keys_are_refused_with_a_remedy(tmp_path, monkeypatch, tool):
    monkeypatch.chdir(tmp_path)
    config, output = tmp_path / "config.yml", tmp_path / "recipe.yaml"
    for name, shape in CORPUS[tool].items():
        config.write_text(shape.text, encoding="utf-8")
        result = import_config(read_config(config), output, **shape.options)
        assert result.tool.lower() == tool, name
        written = [key for key, _ in leaves(yaml.safe_load(shape.text))]
        assert [one.key for one in result.keys] == written, name
        assert all((one.to or one.reason) and (one.remedy or one.verdict != "refused") for one in result.keys), name
        assert "hf_abcdefghijklmnop" not in json.dumps(result.to_dict()), name
        if shape.refused == OTHER:
            assert result.text is None and "supervised fine-tuning" in result.reason, name
            assert {one.reason for one in result.refused} == {result.reason}, name
            continue
        assert sorted(one.key for one in result.refused) == sorted(shape.refused), (name, result.refused)
        partial = import_config(read_config(config), output, partial=True, **shape.options)
        assert partial.text, (name, partial.reason)
        for file, text in {**partial.files, output: partial.text}.items():
            file.write_text(text, encoding="utf-8")
        recipe = load(output, ended=True).recipe.model_dump()
        assert {key: at(recipe, key) for key in shape.says} == shape.says, name


@pytest.mark.parametrize("name", NOT_OF_THE_TOOLS)
def test_a_file_of_another_program_is_told_by_its_keys(tmp_path, name):
    text, what = NOT_OF_THE_TOOLS[name]
    (tmp_path / "config.yml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=what.replace(".", r"\.")):
        import_config(read_config(tmp_path / "config.yml"), tmp_path / "recipe.yaml")


def test_a_config_for_another_task_is_refused_in_one_sentence(tmp_path, monkeypatch, lorakit):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yml").write_text(CORPUS["axolotl"]["preferences"].text, encoding="utf-8")
    code, out, _ = lorakit("import", "config.yml", "--partial")
    lines = " ".join(out.split())
    reason = "for preference optimization (rl: dpo), and lorakit does supervised fine-tuning of text alone"
    assert code == 1 and lines.endswith(f"nothing is written: the config is {reason}")
    assert len(out.splitlines()) < 8 and not (tmp_path / "recipe.yaml").exists()

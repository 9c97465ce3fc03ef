"""What rendering depends on is a run's own: its day, its stop tokens. It is kept, or a change is refused."""

import json
import shutil
from datetime import date

import pytest
from conftest import CHATML
from data_families import FAMILIES, chat
from eval_runs import Remembers
from runs_of_tests import adapter_weights, run_recipe
from test_training import interrupted_after, same

from lorakit.data.chat_template import ChatTemplate, render
from lorakit.data.examples import tokenizer_sha256
from lorakit.data.rows import Conversation
from lorakit.data.template_source import with_fixed_date
from lorakit.errors import LorakitError, UserError
from lorakit.evaluate.models import resolve_models
from lorakit.evaluate.rendering import prompt_template, render_for_models
from lorakit.prepare import reopen_run
from lorakit.progress import Silent
from lorakit.recipe.load import load
from lorakit.run_dir import Run

DATED = "{{ '<|im_start|>system\\nToday is ' + strftime_now('%A, %d %B %Y %H:%M') + '.<|im_end|>\\n' }}" + CHATML
THEN = "2020-02-03"
STEPS = {"epochs": ..., "steps": 4, "eval_every": 4, "save_every": 1}


@pytest.fixture
def dated_base(tiny_base, tmp_path):
    """The tiny model with a template that writes today's date."""
    folder = tmp_path / "dated"
    shutil.copytree(tiny_base, folder)
    (folder / "chat_template.jinja").write_text(DATED, encoding="utf-8")
    return folder


def held_out_text(run, progress=None):
    _, prepared = reopen_run(run.folder, progress or Silent())
    return prepared.tokenizer.decode(prepared.held_out.rows[0]["input_ids"])


def test_a_template_is_told_the_day_that_it_is_to_write():
    tokenizer = FAMILIES["chatml"].tokenizer()
    tokenizer.chat_template = DATED
    (rendered,) = render(Conversation(chat("a", "b")), ChatTemplate(tokenizer, date=THEN))
    assert "Today is Monday, 03 February 2020 00:00." in rendered.text
    (rendered,) = render(Conversation(chat("a", "b")), ChatTemplate(tokenizer))
    assert date.today().strftime("%d %B %Y") in rendered.text


def test_a_run_goes_on_and_is_evaluated_on_the_day_on_which_it_began(recipe_file, dated_base, tmp_path, monkeypatch):
    """Begun on a day of 2020, resumed and opened today by the recipe, which says `auto`."""
    path = recipe_file(model={"base": str(dated_base)}, train=STEPS)
    straight, _ = run_recipe(path, tmp_path / "straight", f"model.template_date={THEN}")
    with monkeypatch.context() as patch:
        interrupted_after(2, patch)
        with pytest.raises(LorakitError, match="stopped after step 2"):
            run_recipe(path, tmp_path / "resumed", f"model.template_date={THEN}")
    resumed, _ = run_recipe(path, tmp_path / "resumed", resume=True)
    assert same(adapter_weights(straight), adapter_weights(resumed))
    assert load(resumed.recipe).recipe.model.template_date == THEN
    assert "Monday, 03 February 2020" in held_out_text(resumed)
    told = Remembers()
    held_out_text(resumed, told)
    assert not told.warned


def test_the_day_of_a_run_is_recorded_and_told(recipe_file, dated_base, lorakit, tmp_path):
    path = recipe_file(model={"base": str(dated_base)}, train={**STEPS, "steps": 1})
    today = date.today().isoformat()
    code, _, err = lorakit("train", path)
    assert code == 0 and f"model.template_date: auto is {today}: the chat template writes today's date" in err
    run = Run(tmp_path / "runs" / "tiny")
    assert load(run.recipe).recipe.model.template_date == today
    assert any(choice["path"] == "model.template_date" for choice in run.read_manifest()["auto"])
    assert run.read_manifest()["template_date"] == today
    assert f"with the date {today}" in (run.adapter / "README.md").read_text()


def test_a_day_is_refused_where_it_is_none_or_the_template_writes_none(recipe_file, dated_base, lorakit):
    for command in ("check", "plan", "data"):
        code, _, err = lorakit(command, recipe_file(model={"template_date": "2026-02-30"}))
        assert code == 2 and "model.template_date" in err and "a day such as 2026-01-31" in err
        path, said = recipe_file(model={"template_date": THEN}), "the chat template writes no date. Leave the key out"
        code, _, err = lorakit(command, path)
        assert code == 2 and said in err
        path = recipe_file(model={"template_date": None, "base": str(dated_base)})
        code, _, err = lorakit(command, path)
        assert code == 2 and "the chat template writes a date. Write auto, or a day" in err


def test_every_model_beside_a_run_is_asked_on_its_day(recipe_file, dated_base, tmp_path):
    run, _ = run_recipe(
        recipe_file(model={"base": str(dated_base)}, train={**STEPS, "steps": 1}),
        tmp_path / "run",
        f"model.template_date={THEN}",
    )
    later, _ = run_recipe(tmp_path / "tiny.yaml", tmp_path / "later", "model.template_date=2021-03-04")
    model_set = resolve_models([str(run.folder), str(dated_base), str(later.folder)], Silent())
    asked, _ = render_for_models(model_set, None, Silent())
    said = [one.tokenizer.decode(one.rows[0]["input_ids"]) for one in asked]
    assert ["03 February 2020" in text for text in said] == [True, True, False] and "04 March 2021" in said[2]
    template = prompt_template(model_set.specs[1], asked[1].tokenizer, model_set)
    pinned = with_fixed_date(template.tokenizer, template.date)
    assert pinned.apply_chat_template(chat("a"), tokenize=False) == template.write(chat("a"))
    assert "03 February 2020" in template.write(chat("a")) and "2020" not in template.tokenizer.chat_template
    told = Remembers()
    alone, _ = render_for_models(resolve_models([str(dated_base)], Silent()), tmp_path / "eval.jsonl", told)
    assert date.today().strftime("%d %B %Y") in alone[0].tokenizer.decode(alone[0].rows[0]["input_ids"])
    assert any(f"its chat template writes a date: {date.today().isoformat()}" in text for text in told.said)


def test_other_ends_of_an_answer_than_those_of_the_training_are_refused(recipe_file, tiny_base, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    path = recipe_file(model={"base": str(base)}, train=STEPS)
    with monkeypatch.context() as patch:
        interrupted_after(2, patch)
        with pytest.raises(LorakitError, match="stopped after step 2"):
            run_recipe(path, tmp_path / "run")
    before = (base / "generation_config.json").read_text()
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    with pytest.raises(UserError, match=r"as the ends of an answer, and .* names \[1, 2\] now"):
        run_recipe(path, tmp_path / "run", resume=True)
    (base / "generation_config.json").write_text(before)
    run, _ = run_recipe(path, tmp_path / "run", resume=True)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "temperature": 0.5}))
    with pytest.raises(UserError, match=r"Put the files back as they were"):
        reopen_run(run.folder, Silent())
    (base / "generation_config.json").write_text(json.dumps({**json.loads(before), "temperature": 0.5}))
    reopen_run(run.folder, Silent())  # what ends no answer may change


def test_rows_that_become_other_tokens_are_refused_on_resuming_and_told_later(recipe_file, tmp_path, monkeypatch):
    """Whatever the reason is: a library's version, the environment, a fault that was mended."""
    path = recipe_file(train=STEPS)
    with monkeypatch.context() as patch:
        interrupted_after(2, patch)
        with pytest.raises(LorakitError, match="stopped after step 2"):
            run_recipe(path, tmp_path / "run")
    run = Run(tmp_path / "run")
    manifest = run.read_manifest()
    other = {**manifest["data"], "tokens_sha256": {**manifest["data"]["tokens_sha256"], "eval": "0" * 64}}
    run.write_manifest({**manifest, "data": other, "versions": {**manifest["versions"], "tokenizers": "0.1"}})
    with pytest.raises(UserError, match=r"the held-out rows become other tokens .*\(tokenizers 0.1 then, .* now\)"):
        run_recipe(path, tmp_path / "run", resume=True)
    run.write_manifest(manifest)
    run_recipe(path, tmp_path / "run", resume=True)
    complete = run.read_manifest()
    run.write_manifest({**complete, "data": other})
    told = Remembers()
    assert reopen_run(run.folder, told)[1].train.rows
    assert any("the held-out rows become other tokens than when the run began" in text for text in told.warned)


def test_how_a_tokenizer_reads_special_tokens_is_part_of_its_fingerprint():
    one, other = FAMILIES["chatml"].tokenizer(), FAMILIES["chatml"].tokenizer()
    assert tokenizer_sha256(one) == tokenizer_sha256(other)
    other.split_special_tokens = True
    assert tokenizer_sha256(one) != tokenizer_sha256(other)

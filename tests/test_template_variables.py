"""`model.template_variables`: known from the template's own source, and the same wherever a row is rendered."""

import json

import pytest
from conftest import CHATML
from data_families import Family, chat

from lorakit.data.chat_template import ChatTemplate, render
from lorakit.data.rows import Conversation
from lorakit.errors import UserError
from lorakit.evaluate.rating.sheet import Question, prompt_tokens

TONED = "{% set tone = tone if tone is defined else 'plain' %}{{ 'tone ' ~ tone ~ '\n' }}" + CHATML


def template_of(source, **variables):
    return ChatTemplate(Family(source, str, "<|im_end|>", None, ("<|im_start|>",)).tokenizer(), variables=variables)


@pytest.mark.parametrize(
    ("source", "read"),
    [
        ("{{ enable_thinking }}", {"enable_thinking"}),
        ("{% set tone = tone if tone is defined else 'plain' %}{{ tone }}", {"tone"}),
        ("{% set tone = tone | default('plain') %}{{ tone }}", {"tone"}),
        ("{% if not date is defined %}{% set date = '1 May' %}{% endif %}{{ date }}", {"date"}),
        ("{% for m in messages %}{% if m.x %}{% set c = m.x %}{% endif %}{{ c }}{% endfor %}", set()),
        ("{% macro f(a) %}{{ a ~ effort }}{% endmacro %}{{ f(bos_token ~ tools) }}", {"effort", "bos_token"}),
        ("{{ strftime_now('%Y') }}{{ raise_exception('x') if false }}{{ eos_token }}", set()),
    ],
)
def test_the_variables_of_a_template_are_those_that_its_source_reads(source, read):
    assert template_of(source).reads.constants.keys() == read


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"enable_thinkin": False}, r"template_variables\.enable_thinkin: .*Did you mean enable_thinking\? It reads"),
        ({"height": 3}, "It reads enable_thinking, tone"),
        ({"messages": []}, "gives the chat template this itself"),
        ({"eos_token": "x"}, "gives the chat template this itself"),
        ({"tone": [1]}, r"\{tone: \[1\]\}: the chat template fails: .* Write other values"),
    ],
)
def test_a_variable_that_cannot_be_is_refused_with_what_can(variables, said):
    source = "{{ tone + ' ' if tone }}{{ enable_thinking }}" + CHATML
    with pytest.raises(UserError, match=said):
        template_of(source, **variables).check_variables()


@pytest.mark.parametrize("value", [False, 3, 0.5, "high", None, ["a", 2]])
def test_a_template_gets_the_value_as_it_is_written(value):
    (one,) = render(
        Conversation(chat("Hello", "Paris.")),
        template_of("{{ tone is defined }}{{ tone | tojson }}" + CHATML, tone=value),
    )
    assert one.text.startswith("True" + json.dumps(value))


@pytest.fixture
def toned(recipe_file, tmp_path):
    """A recipe whose template reads a variable."""
    (tmp_path / "toned.jinja").write_text(TONED)

    def write(**model):
        steps = {"epochs": ..., "steps": 2, "eval_every": 2, "save_every": 2}
        return recipe_file(model={"chat_template": "toned.jinja", **model}, train=steps)

    return write


def test_a_variable_is_one_for_data_training_and_evaluation(toned, lorakit, tmp_path):
    recipe = toned(template_variables={"tone": "formal"})
    code, out, told = lorakit("data", recipe)
    assert code == 0 and "tone formal" in out, told
    assert lorakit("train", recipe, "--output", "run")[0] == 0
    trained = json.loads((tmp_path / "run" / "manifest.json").read_text())["result"]["eval_loss"]
    for command in (["base", "run"], ["run", "--data", "eval.jsonl"]):
        code, out, told = lorakit("eval", *command, "--json")
        assert code == 0, told
        scores = [one["scores"] for name, one in json.loads(out)["models"].items() if name != "base"]
        assert [one["loss"]["value"] for one in scores] == pytest.approx([trained], rel=1e-3)


def test_a_run_is_not_resumed_with_another_value_and_rows_are_made_anew(toned, lorakit, tmp_path):
    recipe = toned(template_variables={"tone": "formal"})
    assert lorakit("train", recipe, "--output", "run", "--set", "train.steps=4")[0] == 0
    (tmp_path / "run" / "manifest.json").write_text(
        json.dumps(json.loads((tmp_path / "run" / "manifest.json").read_text()) | {"status": "interrupted"})
    )
    code, _, told = lorakit(
        "train", toned(template_variables={"tone": "warm"}), "--output", "run", "--set", "train.steps=4", "--resume"
    )
    assert code == 2 and "started with another recipe" in told and "template_variables" in told
    code, out, _ = lorakit("data", toned(template_variables={"tone": "warm"}))
    assert code == 0 and "tone warm" in out and "tone formal" not in out


@pytest.mark.parametrize("command", ["check", "plan", "data", "train"])
def test_a_wrong_name_is_told_by_every_command_with_its_place(command, toned, lorakit):
    code, _, told = lorakit(command, toned(template_variables={"tune": "formal"}))
    assert code == 2 and "Did you mean tone?" in told
    if command in ("check", "plan"):
        assert "tiny.yaml:" in told and "model.template_variables.tune" in told
    assert lorakit("check", toned(template_variables={"tone": "formal"}))[0] == 0


def test_without_a_template_there_is_nothing_to_set():
    template = template_of(CHATML, tone="x")
    template.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template that would read them"):
        template.check_variables()


def test_plan_counts_tokens_with_the_variables(toned, lorakit):
    lengths = []
    for tone in ("a", "a b c d e f g h i j k l"):
        code, out, told = lorakit("plan", toned(template_variables={"tone": tone}), "--json")
        assert code == 0, told
        lengths.append(json.loads(out)["rows"]["longest"])
    assert lengths[0] < lengths[1]


def test_questions_are_asked_with_the_variables():
    question = Question("1", [{"role": "user", "content": "Hello"}])
    template = template_of(TONED, tone="formal")
    assert template.tokenizer.decode(prompt_tokens(question, template)).startswith("tone formal")


def test_a_run_trained_without_thoughts_is_asked_without_them(recipe_file, lorakit, tmp_path):
    """Nemotron 3 and GLM 4.7: a variable closes the thought that the prompt opens."""
    source = CHATML.replace("assistant\n' }}", "assistant\n' ~ ('</think>' if off else '<think>') }}").replace(
        "message['content']", "('</think>' if message.role == 'assistant' else '') ~ message['content']"
    )
    (tmp_path / "own.jinja").write_text(source)
    recipe = recipe_file(
        model={"chat_template": "own.jinja"}, train={"epochs": ..., "steps": 2, "eval_every": 2, "save_every": 2}
    )
    code, out, told = lorakit("data", recipe)
    assert code == 0 and "22 rows: answers without thinking are trained after the prompt" in " ".join(out.split()), out
    code, _, told = lorakit("train", recipe, "--output", "run")
    assert code == 0 and "{off: true}" in told
    assert "{off: true}: ask the model in the same way" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    from lorakit.evaluate.models import resolve_models
    from lorakit.evaluate.rendering import load_tokenizers, prompt_template
    from lorakit.progress import Silent

    model_set = resolve_models(["base", "run"], Silent())
    for spec, tokenizer in zip(model_set.specs, load_tokenizers(model_set, Silent()), strict=True):
        assert prompt_template(spec, tokenizer, model_set).variables == {"off": True}

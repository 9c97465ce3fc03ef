"""Chat templates by name: each writes what its family's own template writes, is trained exactly, and is refused where
the vocabulary lacks its tokens."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import real_templates
from data_families import FAMILIES, TOOLS, answer, call, chat, result
from data_masks import assert_exact, examples, prompt
from eval_runs import make_run
from recipe_files import loaded

from lorakit.data.chat_template import ChatTemplate
from lorakit.data.rows import RowError
from lorakit.data.template_tokens import check_template_tokens, is_single_token, tokens_in
from lorakit.errors import UserError
from lorakit.plan.model_info import check_local_base
from lorakit.recipe.chat_templates import CHAT_TEMPLATES, template_file
from lorakit.recipe.load import RecipeErrors, load, to_yaml

# By name: the family's own template as trl ships it (None: it ships none), and the family of our tests whose tokens,
# and trained turns, the template has.
SAME = {
    "chatml": ("qwen3_instruct_2507", "chatml"),
    "chatml-tools": ("qwen3_instruct_2507", "qwen 2.5"),
    "llama-3": ("llama3", "llama 3"),
    "llama-3-tools": ("llama3", "llama 3.1"),
    "gemma": ("gemma3", "gemma 3"),
    "mistral": (None, "mistral 3"),
    "mistral-tools": (None, "mistral 3"),
    "phi-3": ("phi3", "phi 3"),
    "phi-4": (None, "phi 4"),
    "zephyr": (None, "zephyr"),
}
SYSTEM = "Speak French."
TALKS = {
    "one question": chat("Hello"),
    "system prompt": chat("Hello", system=SYSTEM),
    "answer": chat("  Hello ", " Paris.\n"),
    "several turns": chat("Hello", "Paris.", "And the sea?", "Un été 😀.", "Bye"),
    "several turns, system prompt": chat("Hello", "Paris.", "And the sea?", "Un été 😀.", system=SYSTEM),
}
CALLS = [
    *chat("How is the weather in Rome, and in Oslo?", system=SYSTEM),
    answer(tool_calls=[call(city="Rome à la mer"), call(city="Oslo", days=3)]),
    result('{"t": 20}'),
    result("cold"),
    answer("It is 20 degrees.", tool_calls=[call(city="Paris")]),
    result("mild"),
    answer("And mild."),
]
# What Llama and Mistral write: an answer says something or calls, Llama's one tool at a time.
ONE_CALL = [
    *chat("How is the weather in Rome?", system=SYSTEM),
    answer(tool_calls=[call(city="Rome à la mer", days=3)]),
    result('{"t": 20}'),
    answer("It is 20 degrees."),
    *chat("And in Oslo?"),
    answer(tool_calls=[call(city="Oslo")]),
    result('cold "and" wet'),
    answer("Cold."),
]


def source(name):
    return template_file(name).read_text(encoding="utf-8")


def family_of(name):
    family = FAMILIES[SAME[name][1]]
    special = (*family.special, *CHAT_TEMPLATES[name].tokens)
    return replace(family, template=source(name), special=special, tools=name.endswith("-tools"))


def written(tokenizer, template, talk, ask, tools=None):
    return tokenizer.apply_chat_template(
        talk, chat_template=template, tools=tools, tokenize=False, add_generation_prompt=ask
    )


def test_every_template_is_a_file_that_comes_with_lorakit():
    assert list(SAME) == list(CHAT_TEMPLATES)
    files = {file.stem for file in Path(template_file("chatml")).parent.glob("*.jinja")}
    assert files == set(CHAT_TEMPLATES)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_named_template_writes_what_its_familys_own_writes(name):
    real, family = SAME[name]
    theirs, tokenizer = FAMILIES[family].template, FAMILIES[family].tokenizer()
    if real:
        tokenizer = real_templates.tokenizer_of(real)
        theirs = tokenizer.chat_template
    for case, talk in TALKS.items():
        if name in ("mistral", "mistral-tools") and case == "several turns, system prompt":
            continue  # ours stays in the first question, and with it the conversation one example
        for ask in (True, False) if talk[-1]["role"] == "user" else (False,):
            own = written(tokenizer, theirs, talk, ask)
            if name == "phi-3" and not ask:
                own = own.removesuffix(tokenizer.eos_token)  # a second end, after the last turn alone
            assert written(tokenizer, source(name), talk, ask) == own, case


def test_tools_are_written_as_qwen_and_hermes_write_them():
    tokenizer = real_templates.tokenizer_of("qwen3_instruct_2507")
    older = real_templates.tokenizer_of("qwen2_5").chat_template
    for end in (1, 2, 3, 5, 6, 7, 8):
        ours, theirs = (written(tokenizer, one, CALLS[:end], False, TOOLS) for one in (source("chatml-tools"), None))
        assert ours == theirs
    assert written(tokenizer, source("chatml-tools"), CALLS[:2], True, TOOLS) == written(
        tokenizer, older, CALLS[:2], True, TOOLS
    )


def test_tools_are_written_as_llama_writes_them_without_its_date():
    tokenizer = real_templates.tokenizer_of("llama3_1")
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n"
    for talk in (ONE_CALL, ONE_CALL[1:]):  # with a system prompt and without
        for end in range(len(talk) - 6, len(talk) + 1):
            ask = talk[end - 1]["role"] != "assistant"
            ours, theirs = (written(tokenizer, one, talk[:end], ask, TOOLS) for one in (source("llama-3-tools"), None))
            assert dates in theirs and ours == theirs.replace(dates, "")


def test_tools_are_written_as_mistral_writes_them():
    family = family_of("mistral-tools")
    tokenizer, theirs = family.tokenizer(), FAMILIES["mistral 3"].template
    for talk in (
        [*ONE_CALL[1:3]],
        [*ONE_CALL[1:2], answer(tool_calls=[call(city="Rome à la mer"), call(city="Oslo")])],
    ):
        assert written(tokenizer, source("mistral-tools"), talk, False, TOOLS) == written(
            tokenizer, theirs, talk, False, TOOLS
        )
    text = written(tokenizer, source("mistral-tools"), ONE_CALL, False, TOOLS)
    assert text.startswith("<s>[AVAILABLE_TOOLS] [") and "[/AVAILABLE_TOOLS][INST] Speak French.\n\nHow is" in text
    assert '[TOOL_RESULTS] {"content": {"t": 20}, "call_id": "abcdef123"}[/TOOL_RESULTS] It is' in text
    assert '[TOOL_RESULTS] {"content": "cold \\"and\\" wet", "call_id": "abcdef123"}[/TOOL_RESULTS] Cold' in text
    unnamed = [*ONE_CALL[1:2], answer(tool_calls=[{"type": "function", "function": call(city="Rome")["function"]}])]
    text = written(tokenizer, source("mistral-tools"), unnamed, False, TOOLS)
    assert text.endswith('[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}]</s>')


@pytest.mark.parametrize("name", ["mistral", "mistral-tools"])
def test_a_system_prompt_of_mistral_stays_in_the_first_question(name):
    family = family_of(name)
    talk = TALKS["several turns, system prompt"]
    assert written(family.tokenizer(), source(name), talk, False) == (
        "<s>[INST] Speak French.\n\nHello[/INST] Paris.</s>[INST] And the sea?[/INST] Un été 😀.</s>"
    )


@pytest.mark.parametrize("kind", ["bytes", pytest.param("pieces, space first", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_labels_are_the_answers_with_the_token_that_ends_them(name, kind):
    family = family_of(name)
    tokenizer = family.tokenizer(kind)
    talk = [*TALKS["several turns, system prompt"], *chat("Bye", "Hello there!")]
    for train_on in ("assistant", "last", "all"):
        found = examples(family, tokenizer, talk, train_on)
        assert len(found) == 1
        assert_exact(family, tokenizer, talk, found, train_on)
    end = CHAT_TEMPLATES[name].end_of_turn or tokenizer.eos_token
    ids = found[0].input_ids
    assert all(tokenizer.decode(ids[last - 1 : last]) == end for _, last in found[0].turns)
    assert tokenizer.bos_token is None or ids.count(tokenizer.bos_token_id) <= 1
    assert prompt(family, tokenizer, talk[:2]) == ids[: found[0].turns[0][0]]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_base_that_names_another_end_learns_the_templates(name):
    """As of a base model, whose configuration knows nothing of turns."""
    family = family_of(name)
    special = tuple(word for word in (family.eos, *family.special) if word)
    family = replace(family, eos="<|the end|>", special=special, stops=())
    tokenizer = family.tokenizer()
    (found,) = examples(family, tokenizer, chat("Hello", "Paris.", "And?", "Un été."))
    end = CHAT_TEMPLATES[name].end_of_turn or "<|the end|>"
    assert [tokenizer.decode(found.labels[last - 1 : last]) for _, last in found.turns] == [end, end]


@pytest.mark.parametrize(
    ("name", "talk"), [("chatml-tools", CALLS), ("llama-3-tools", ONE_CALL), ("mistral-tools", ONE_CALL)]
)
def test_calls_are_trained_up_to_the_token_that_ends_them(name, talk):
    family = family_of(name)
    tokenizer = family.tokenizer()
    found = examples(family, tokenizer, talk, "assistant", TOOLS)
    assert_exact(family, tokenizer, talk, found, "assistant", TOOLS)
    assert len(found) == 1


@pytest.mark.parametrize("name", ["llama-3-tools", "mistral-tools"])
def test_what_the_template_does_not_write_of_a_call_is_refused(name):
    family = family_of(name)
    with pytest.raises(RowError):
        examples(
            family, family.tokenizer(), [*ONE_CALL[:2], answer("I look.", tool_calls=[call(city="Rome")])], tools=TOOLS
        )


def test_a_vocabulary_without_the_tokens_is_refused_with_what_it_has(tiny_base, tokenizer):
    has = lambda text: is_single_token(tokenizer, text)  # noqa: E731
    in_folder = tokens_in(tiny_base)
    tokens = {token for one in CHAT_TEMPLATES.values() for token in one.tokens}
    assert {token for token in tokens if has(token)} == {token for token in tokens if in_folder(token)}
    assert {token for token in tokens if has(token)} == {"<|im_start|>", "<|im_end|>"}
    for name in CHAT_TEMPLATES:
        if name in ("chatml", "chatml-tools", "zephyr"):
            check_template_tokens(name, "org/base", has)
            continue
        with pytest.raises(UserError) as caught:
            check_template_tokens(name, "org/base", has)
        said = str(caught.value)
        assert f"model.chat_template: {name} writes" in said and "the vocabulary of org/base" in said
        assert all(token in said for token in CHAT_TEMPLATES[name].tokens if not has(token))
        assert "chatml, chatml-tools, zephyr, whose tokens it has, or a .jinja file" in said
        lacking = [repr(token) for token in CHAT_TEMPLATES[name].tokens if not has(token)]
        assert f"Write model.add_tokens: [{', '.join(lacking)}]" in said
    with pytest.raises(UserError, match=r"zephyr writes an end token \(eos_token\)"):
        check_template_tokens("zephyr", "org/base", has, end_token=False)
    with pytest.raises(UserError, match=r"one token each\. Write a \.jinja file"):
        check_template_tokens("zephyr", "org/base", lambda text: False, end_token=False)


def test_pieces_that_stand_for_unknown_words_are_no_tokens():
    tokenizer = FAMILIES["mistral, plain marks"].tokenizer("pieces, space first")
    assert is_single_token(tokenizer, "</s>")
    assert not is_single_token(tokenizer, "[INST]") and not is_single_token(tokenizer, "<|im_start|>")


def test_check_refuses_a_base_whose_vocabulary_lacks_the_tokens(recipe_file, tiny_base):
    check_local_base(load(recipe_file(model={"chat_template": "chatml"})).recipe)
    recipe = load(recipe_file(model={"chat_template": "llama-3"})).recipe
    with pytest.raises(UserError, match=r"llama-3 writes <\|start_header_id\|>"):
        check_local_base(recipe)


WITH = "model: {{base: org/model, chat_template: {}}}\ndata: {{train: train.jsonl}}\n"


def test_a_word_is_a_name_and_anything_else_a_path(tmp_path):
    def refusal(value):
        with pytest.raises(RecipeErrors) as caught:
            loaded(tmp_path, WITH.format(value))
        return str(caught.value)

    for file in ("chatml", "own", "own.jinja", "other.jinja"):
        (tmp_path / file).write_text("{{ messages }}")
    for value, means in {
        "chatml": "chatml",  # the template, whatever lies in the folder
        "./chatml": str(tmp_path / "chatml"),
        "own.jinja": str(tmp_path / "own.jinja"),
    }.items():
        recipe = loaded(tmp_path, WITH.format(value)).recipe
        assert recipe.model.chat_template == means
        (tmp_path / "again.yaml").write_text(to_yaml(recipe, tmp_path))
        assert load(tmp_path / "again.yaml").recipe.model.chat_template == means
    assert "Did you mean llama-3? lorakit has chatml, chatml-tools, llama-3" in refusal("llama3")
    assert "Did you mean chatml?" in refusal("ChatLM")
    assert "'alpaca' is not a chat template's name. lorakit has chatml" in refusal("alpaca")
    assert "Write ./own for the file." in refusal("own")
    assert "Write ./other.jinja for the file." in refusal("other")
    assert "does not exist. Did you mean" in refusal("./chatlm")


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_ollama_gets_the_same_text(name):
    from lorakit.export.ollama import learn_proved_shape
    from lorakit.export.ollama_template import write_go_template

    family = family_of(name)
    template = ChatTemplate(family.tokenizer(), stop_words=family.stops)
    assert write_go_template(learn_proved_shape(template))  # proved on 160 conversations


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_base):
    """A run on a base without a chat template, with the template by its name."""
    root = tmp_path_factory.mktemp("named")
    folder = shutil.copytree(tiny_base, root / "bare")
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return make_run(root, folder, model={"chat_template": "chatml"})


def test_a_run_keeps_the_name_the_sha256_and_the_text(run):
    from lorakit.atomic_io import sha256_of

    recipe, manifest = load(run.recipe).recipe, run.read_manifest()
    assert recipe.model.chat_template == "chatml"
    assert manifest["inputs"]["chat template chatml"] == sha256_of(template_file("chatml"))
    assert (run.adapter / "chat_template.jinja").read_text() == source("chatml")


def test_a_run_is_what_it_was_when_a_later_lorakit_changes_or_drops_the_template(run, monkeypatch, tmp_path):
    from lorakit.prepare import reopen_run
    from lorakit.progress import Silent
    from lorakit.recipe import chat_templates

    shutil.copytree(Path(chat_templates.__file__).parent, tmp_path / "later")
    monkeypatch.setattr(chat_templates, "__file__", str(tmp_path / "later" / "__init__.py"))
    before = source("chatml")
    (tmp_path / "later" / "chatml.jinja").write_text(before.replace("assistant", "helper"))
    _, prepared = reopen_run(run.folder, Silent())
    assert prepared.tokenizer.chat_template == before
    (tmp_path / "later" / "chatml.jinja").unlink()
    monkeypatch.setattr(chat_templates, "CHAT_TEMPLATES", {})
    _, prepared = reopen_run(run.folder, Silent())
    assert prepared.tokenizer.chat_template == before


def test_the_wheel_has_the_templates(tmp_path):
    from hatchling.builders.wheel import WheelBuilder

    root = Path(__file__).parents[1]
    files = {one.distribution_path for one in WheelBuilder(str(root)).recurse_included_files()}
    assert {f"lorakit/recipe/chat_templates/{name}.jinja" for name in CHAT_TEMPLATES} <= files

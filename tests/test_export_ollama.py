"""`lorakit export --to ollama`: the TEMPLATE writes what the training's chat template writes, or is refused."""

import json
from functools import lru_cache
from pathlib import Path

import pytest
from conftest import CHATML, some_of
from data_families import FAMILIES, chat
from data_family_templates import LLAMA_2, chatml
from eval_runs import make_run
from gguf_models import spm_base
from real_templates import NAMES, stop_words, tokenizer_of
from test_smollm2 import SMOL
from transformers import AutoTokenizer

from lorakit.data.chat_template import ChatTemplate
from lorakit.errors import UserError
from lorakit.export.chat_shape import learn_shape
from lorakit.export.go_expression import GoTemplateError
from lorakit.export.go_template import GoTemplate
from lorakit.export.modelfile import read_modelfile, write_modelfile
from lorakit.export.ollama import learn_proved_shape
from lorakit.export.ollama_checks import as_ollama_hands_it, compare
from lorakit.export.ollama_template import write_go_template
from lorakit.model.gguf_file import read_gguf
from lorakit.model.llama_cpp import GgufModel

# Every other template of the tests is written exactly.
REFUSED = {"smollm 3": "'/think' in a message of role system changes it"}  # modes that the system prompt switches
REAL_REFUSED = {"muse_glimmer": "in a message of role system changes it"}
NO_SYSTEM = {"gemma 2", "gemma"}
# They take thoughts out of earlier answers, which Ollama's language cannot; whoever exports is told.
THOUGHTS = {"qwen 3", "qwen 3.5", "deepseek r1"}
DAY = "2026-01-02"

QUESTIONS = [
    ("What is {{ .System }}?", '{"a": [1]}', "And \\n {% raw %}?", "`no`\n", "  why  \n\n", "\n\tbecause\n", "你好 😀"),
    ("\u00a0 a\u3000", "b \u2028", "\r\nc", "d\r", '\'"""\'', "%s %d %%", "{{- end }}"),
    ("Hi", "Ho", "Hi", "Ho", "Hi", "Ho", "Hi"),
]
SYSTEMS = (None, "Speak French.", "", " \n{{ .Role }}\n\n ")


def talks(with_system=True):
    """Conversations of one to four turns that end with a question."""
    for texts in QUESTIONS:
        for system in SYSTEMS if with_system else (None,):
            yield from (chat(*texts[:count], system=system) for count in (1, 3, 5, 7))


@lru_cache
def exported(name, real=False):
    """A chat template and its template for Ollama."""
    if real:
        template = ChatTemplate(tokenizer_of(name), stop_words=stop_words(name), date=DAY)
    else:
        template = ChatTemplate(FAMILIES[name].tokenizer(), stop_words=FAMILIES[name].stops, date=DAY)
    return template, write_go_template(learn_proved_shape(template))


def write(source, messages):
    return GoTemplate(source).render(as_ollama_hands_it(messages))


def with_template(source):
    tokenizer = FAMILIES["chatml"].tokenizer()
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_a_family_of_templates_is_written_exactly(name):
    template, source = exported(name)
    for talk in talks(name not in NO_SYSTEM):
        expected = template.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert write(source, talk) == expected


@pytest.mark.parametrize("name", some_of([name for name in NAMES if name not in REAL_REFUSED], every=3))
def test_a_published_template_is_written_exactly(name):
    template, source = exported(name, real=True)
    for talk in talks(name not in NO_SYSTEM):
        assert write(source, talk) == template.write(talk, ask=True)


@pytest.mark.parametrize(
    ("name", "says", "real"),
    [(*pair, False) for pair in REFUSED.items()] + [(*pair, True) for pair in REAL_REFUSED.items()],
)
def test_a_template_that_looks_for_words_in_messages_is_refused(name, says, real):
    with pytest.raises(UserError, match="llama-server --jinja") as error:
        exported(name, real)
    assert says in str(error.value)


@pytest.mark.parametrize("name", sorted(THOUGHTS))
def test_thoughts_that_are_taken_out_of_earlier_answers_are_told(name):
    template, source = exported(name)
    compared = compare(template, learn_shape(template), source)
    assert compared.thoughts == "</think>" and not compared.difference


OTHERS = {
    "upper case": chatml().replace("m.content +", "m.content | upper +"),
    "JSON": chatml().replace("m.content +", "m.content | tojson +"),
    "cut": chatml().replace("m.content +", "m.content[:50] +"),
    "replaced": chatml().replace("m.content +", "m.content.replace('  ', ' ') +"),
    "counted": chatml().replace("m.role + '", "m.role + (loop.index | string) + '"),
    "the last two": chatml().replace("in messages %", "in messages[-2:] %"),
    "spaces alone": chatml().replace("m.content +", "m.content.strip(' ') +"),
    "a greeting": chatml().replace("m.content +", "('Hello!' if m.content == 'hello there' else m.content) +"),
    "the date": chatml("{{ m.content + '<|im_end|>' }}", "{{ strftime_now('%d.%m.%Y') }}"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_written_exactly_is_refused(name):
    with pytest.raises(
        UserError, match=r"cannot be written in Ollama's template language: .*gguf.*llama-server --jinja"
    ):
        learn_proved_shape(with_template(OTHERS[name]))


def test_what_the_chat_template_refuses_ollama_refuses_too():
    _, source = exported("gemma 2")
    with pytest.raises(GoTemplateError, match="takes no system message"):
        write(source, chat("Hi", system="S"))
    _, source = exported("llama 2")
    later = [*chat("Hi", "Ho"), {"role": "system", "content": "S"}, *chat("Hi")]
    with pytest.raises(GoTemplateError, match="takes no system message after the first message"):
        write(source, later)
    with pytest.raises(GoTemplateError, match="takes no message of this role here"):
        write(source, [*chat("Hi"), {"role": "tool", "content": "20"}])


def test_an_answer_whose_question_ollama_dropped_is_left_out_where_the_template_takes_none():
    dropped = chat("Hi", "Ho", "Bye", system="S")
    del dropped[1]
    _, source = exported("llama 2")
    assert write(source, dropped) == write(source, chat("Bye", system="S"))
    template, source = exported("chatml")
    assert write(source, dropped) == template.write(dropped, ask=True)


def test_an_answer_at_the_end_is_continued():
    _, source = exported("chatml")
    assert write(source, chat("Hi", "Ho")).endswith("<|im_start|>assistant\nHo")


def test_a_modelfile_is_read_back_and_what_it_cannot_hold_is_refused():
    instructions = [
        ("FROM", "./a b.gguf"),
        ("TEMPLATE", '{{- "\\n" }} {{ .System }}\n  "quoted"\n'),
        ("SYSTEM", '  Say "no".\n\n\tAlways. '),
        ("PARAMETER num_ctx", "4096"),
        ("PARAMETER stop", "<|im_end|>"),
        ("PARAMETER stop", 'a "b'),
    ]
    assert read_modelfile("# a comment\n" + write_modelfile(instructions)) == instructions
    for system in ("zero\u200bwidth", 'one """\ntwo'):
        with pytest.raises(UserError, match="a Modelfile cannot hold"):
            write_modelfile([("SYSTEM", system)])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return spm_base(tmp_path_factory.mktemp("ollama") / "base", max_position_embeddings=8192)


def modelfile_of(folder: Path) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for name, value in read_modelfile((folder / "Modelfile").read_text(encoding="utf-8")):
        values.setdefault(name, []).append(value)
    return values


def export_run(lorakit, folder, base, *more, **sections):
    run = make_run(folder, base, **sections)
    code, out, err = lorakit("export", run.folder, "--to", "ollama", "--json", *more)
    return run, code, json.loads(out)["exports"][0] if not code else None, err


@pytest.mark.slow
def test_an_export_has_all_that_ollama_needs_and_its_prompts_are_the_trainings(base, lorakit, tmp_path):
    run, code, facts, err = export_run(lorakit, tmp_path, base, data={"system": "Answer in JSON."})
    assert code == 0, err
    folder = run.folder / "export" / "ollama-q8_0"
    values = modelfile_of(folder)
    assert values["FROM"] == ["./tiny-Q8_0.gguf"] and (folder / "tiny-Q8_0.gguf").is_file()
    assert values["PARAMETER stop"] == ["<|im_end|>"] and values["PARAMETER num_ctx"] == ["4096"]
    assert values["SYSTEM"] == ["Answer in JSON."] and "PARAMETER temperature" not in values
    assert all(check["holds"] for check in facts["checks"])
    assert {check["name"] for check in facts["checks"]} >= {"template", "prompt tokens", "stop tokens", "types"}
    tokenizer = AutoTokenizer.from_pretrained(base)
    talk = chat("Tell me about apples, number 0.", system=values["SYSTEM"][0])
    prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    # llama.cpp would put <s> before it, which the rows of the training did not have: the file says that it must not.
    with GgufModel(folder / "tiny-Q8_0.gguf") as model:
        assert model.opening == []
        assert model.tokenize_prompt(write(values["TEMPLATE"][0], talk)) == prompt
    assert "ollama create tiny -f Modelfile" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_the_beginning_of_sequence_is_written_once(base, lorakit, tmp_path):
    template = tmp_path / "llama-2.jinja"
    template.write_text(LLAMA_2)
    sections = {"model": {"chat_template": str(template)}, "train": {"steps": 2}}
    run, code, facts, err = export_run(lorakit, tmp_path, base, **sections)
    assert code == 0, err
    folder = run.folder / "export" / "ollama-q8_0"
    values = modelfile_of(folder)
    (source,) = values["TEMPLATE"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = LLAMA_2
    with GgufModel(folder / "tiny-Q8_0.gguf") as model:
        assert [model.piece(token) for token in model.opening] == ["<s>"]
        for talk in (chat("Hi"), chat("Hi", "Ho", "Bye", system="S")):
            prompt = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
            assert "<s>" + write(source, talk) == prompt
            ids = model.tokenize_prompt(write(source, talk))
            assert ids[0] == tokenizer.bos_token_id and ids.count(ids[0]) == prompt.count("<s>")
    assert next(check for check in facts["checks"] if check["name"] == "template")["holds"]


def test_a_template_that_cannot_be_written_is_refused_before_the_work(base, lorakit, tmp_path):
    template = tmp_path / "counted.jinja"
    template.write_text(CHATML.replace("{{ '<", "{{ loop.index if message['role'] == 'user' }}{{ '<", 1))
    sections = {"model": {"chat_template": str(template)}, "train": {"steps": 2}}
    run, code, _, err = export_run(lorakit, tmp_path, base, **sections)
    assert code == 2 and "cannot be written in Ollama's template language" in err and "llama-server --jinja" in err
    assert not run.merged.exists() and not [*(run.folder / "export").glob("*")]


@pytest.mark.slow
def test_variables_of_the_recipe_are_part_of_the_prompts(base, lorakit, tmp_path):
    template = tmp_path / "mode.jinja"
    template.write_text("{% if mode is defined %}{{ mode + '\\n' }}{% endif %}" + CHATML)
    model = {"chat_template": str(template), "template_variables": {"mode": "brief"}}
    run, code, _, err = export_run(lorakit, tmp_path, base, model=model, train={"steps": 2})
    assert code == 0, err
    (source,) = modelfile_of(run.folder / "export" / "ollama-q8_0")["TEMPLATE"]
    assert write(source, chat("Hi")).startswith("brief\n<|im_start|>user\nHi<|im_end|>")


def test_a_base_without_a_chat_template_is_refused(base, lorakit, tmp_path):
    folder = spm_base(tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    code, _, err = lorakit("export", folder, "--to", "ollama", "--output", tmp_path / "out")
    assert code == 2 and "has no chat template" in err and not [*(tmp_path / "out").glob("ollama*")]


@pytest.mark.slow
@pytest.mark.smollm2
def test_smollm2_writes_its_default_system_prompt(users_cache, lorakit, tmp_path):
    code, _, err = lorakit("export", SMOL, "--to", "ollama", "--output", tmp_path)
    assert code == 0, err
    values = modelfile_of(tmp_path / "ollama-q8_0")
    assert "SYSTEM" not in values and values["PARAMETER stop"] == ["<|im_end|>"]
    prompt = write(values["TEMPLATE"][0], chat("Hi"))
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert read_gguf(next((tmp_path / "ollama-q8_0").glob("*.gguf"))).chat_template
    given = write(values["TEMPLATE"][0], chat("Hi", system=""))
    assert given.startswith("<|im_start|>system\n<|im_end|>\n")

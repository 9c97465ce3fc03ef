"""Marks that a row's own text spells: a beginning of sequence is refused, other special tokens are told by name."""

from pathlib import Path

import pytest
from conftest import write_rows
from data_families import FAMILIES, answer, call, chat
from data_masks import example, refusal
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lorakit.data.chat_template import ChatTemplate, render
from lorakit.data.examples import examples_of
from lorakit.data.rows import Conversation, RowError, Text
from lorakit.data.survey import survey
from lorakit.data.tokenize import Encoder
from lorakit.errors import UserError
from lorakit.progress import Silent
from lorakit.recipe.schema import Clean, Data, Train

TEMPLATED = "this row looks templated already, give its texts without the chat template's marks"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "talk"),
    [
        ("mistral", chat("<s>[INST] a [/INST]", "b")),
        ("mistral", chat("a", "b <s> c")),
        ("llama 2", chat("a", "b", system="<s>Be brief.")),
        ("llama 3", chat("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\na", "b", "c", "d")),
        ("gemma 3", chat("<bos><start_of_turn>user\na", "b")),
        ("smollm 2", chat("<|im_start|>user\na", "b")),
        ("mistral 3", [*chat("a"), answer(tool_calls=[call(city="<s>")])]),
        ("deepseek r1", chat("a", "b", "<｜begin▁of▁sentence｜>c", "d")),
    ],
)
def test_a_second_beginning_of_sequence_is_refused_as_templated_already(name, talk):
    assert TEMPLATED in refusal(FAMILIES[name], talk)


def test_a_beginning_of_sequence_in_a_row_of_a_known_shape_is_refused_too():
    family = FAMILIES["mistral"]
    template = ChatTemplate(family.tokenizer())
    render(Conversation(chat("a", "b")), template)
    with pytest.raises(RowError, match="looks templated already"):
        render(Conversation(chat("<s>a", "b")), template)


def test_a_beginning_that_the_tokenizer_does_not_call_one_is_refused_too():
    """The template writes it at the front, and nowhere else: GLM's [gMASK], or a tokenizer without `bos_token`."""
    assert TEMPLATED in refusal(FAMILIES["glm 4"], chat("[gMASK]<sop><|user|>\na", "b"))
    tokenizer = FAMILIES["mistral"].tokenizer()
    tokenizer.bos_token = None
    tokenizer.chat_template = tokenizer.chat_template.replace("bos_token", "'<s>'")
    with pytest.raises(RowError, match="looks templated already"):
        render(Conversation(chat("<s>[INST] a [/INST]", "b")), ChatTemplate(tokenizer))
    fronts = {name: ChatTemplate(family.tokenizer()).controls.front for name, family in FAMILIES.items()}
    assert {fronts[name] for name in ("chatml", "qwen 3", "smollm 2", "phi 3", "zephyr", "harmony")} == {None}


def test_a_tokenizer_that_splits_special_tokens_has_no_second_beginning_to_refuse():
    family = FAMILIES["mistral"]
    tokenizer = family.tokenizer()
    tokenizer.split_special_tokens = True
    assert ChatTemplate(tokenizer).beginning is None and not ChatTemplate(tokenizer).controls.tokens


@pytest.mark.parametrize("text", ["<s>Hello", "Hello<s> there"])
def test_a_text_behind_the_tokenizers_own_beginning_has_no_other(text):
    from tokenizers.processors import TemplateProcessing

    tokenizer = FAMILIES["zephyr"].tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    template = ChatTemplate(tokenizer)
    assert template.opening == (tokenizer.bos_token_id,)
    with pytest.raises(RowError, match="is the beginning of sequence of this model"):
        render(Text(text), template)


def test_a_text_may_bring_the_one_beginning_that_the_tokenizer_does_not_write():
    tokenizer = FAMILIES["zephyr"].tokenizer()
    (encoded,) = Encoder(tokenizer).encode(render(Text("<s>Hello"), ChatTemplate(tokenizer)))
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1
    with pytest.raises(RowError, match="is the beginning of sequence of this model"):
        render(Text("<s>Hello <s>there"), ChatTemplate(tokenizer))


def found_in(rows, family="chatml, another eos", **clean):
    data = Data(train=str(write_rows(Path("a.jsonl").absolute(), rows)), clean=Clean(**clean))
    template = ChatTemplate(FAMILIES[family].tokenizer(), stop_words=FAMILIES[family].stops)
    return data, template


PLAIN = [{"prompt": f"What is {n}?", "completion": f"It is {n} there."} for n in range(6)]


@pytest.mark.parametrize(
    ("family", "row", "said"),
    [
        (
            "chatml",
            {"prompt": "What is <|im_start|>?", "completion": "b"},
            "spells '<|im_start|>', which this tokenizer",
        ),
        ("phi 3", {"prompt": "a", "completion": "<|user|>"}, "'<|user|>', which this tokenizer reads as that token"),
        ("zephyr", {"prompt": "<|user|>\na", "completion": "b"}, "'<|user|>', a mark and not a word"),
        ("mistral, plain marks", {"prompt": "[INST] a [/INST]", "completion": "b"}, "'[INST]', a mark and not a word"),
        ("llama 3", {"text": "<|start_header_id|>user"}, "'<|start_header_id|>', which this tokenizer reads"),
    ],
)
def test_a_special_token_in_a_text_is_told_by_name(family, row, said):
    data, template = found_in([*PLAIN, row] if "prompt" in row else [row], family)
    train, _ = examples_of(data, template, Silent())
    (reason, *_) = train.report.findings.counts
    assert said in reason and reason.startswith("special_tokens: ") and "looks templated already" in reason
    assert train.report.used == (7 if "prompt" in row else 1)


def test_a_special_token_in_a_text_is_an_error_or_leaves_the_row_out_where_the_recipe_says_so():
    rows = [*PLAIN, {"prompt": "What is <|im_start|>?", "completion": "b"}]
    with pytest.raises(UserError, match=r"a\.jsonl:7: message 1 \(user\): a text spells '<\|im_start\|>'.*: fix"):
        examples_of(*found_in(rows, special_tokens="error"), Silent())
    train, _ = examples_of(*found_in(rows, special_tokens="fix"), Silent())
    assert train.report.used == 6 and "left out by data.clean.special_tokens" in str(train.report.dropped)
    train, _ = examples_of(*found_in(rows, special_tokens="off"), Silent())
    assert train.report.used == 7 and not train.report.findings.total
    found = survey(*found_in(rows, special_tokens="error"), Train(batch_size=4), 1e3, Silent())
    assert found.stopping == ["special_tokens"]


def test_ordinary_texts_and_inline_thoughts_are_no_control_texts():
    rows = [
        *PLAIN,
        {"prompt": "Is a < b and c > d? See [1] and <b>.", "completion": "<think>hm</think>Yes, user: and assistant."},
    ]
    for name, family in FAMILIES.items():
        controls = ChatTemplate(family.tokenizer(), stop_words=family.stops).controls
        for row in rows:
            talk = Conversation(chat(row["prompt"], row["completion"]))
            assert not list(controls.spelled(talk)), name


def test_the_recipes_system_prompt_is_looked_into():
    data, template = found_in(PLAIN, "chatml, another eos")
    spelled = data.model_copy(update={"system": "You speak <|im_start|>."})
    train, _ = examples_of(spelled, template, Silent())
    assert train.report.findings.first == {
        "special_tokens: a text spells '<|im_start|>', which this tokenizer reads as that token; the chat template "
        "writes it too: this row looks templated already": ["data.system"]
    }
    with pytest.raises(UserError, match=r"data\.system: it contains the text '<s>', with which"):
        data, template = found_in(PLAIN, "mistral")
        examples_of(data.model_copy(update={"system": "<s>Be brief."}), template, Silent())


def test_tokens_that_begin_twice_are_refused():
    family = FAMILIES["mistral"]
    bos = family.tokenizer().bos_token_id
    data, template = found_in([{"input_ids": [bos, bos, 5, 6], "labels": [-100, -100, 5, 6]}], "mistral")
    with pytest.raises(UserError, match="the tokens begin with '<s>' twice"):
        examples_of(data, template, Silent())


def words_tokenizer(**names):
    special = dict.fromkeys(["<unk>", "<end>", *names.values()])
    inner = Tokenizer(
        models.WordLevel({word: at for at, word in enumerate([*special, "yes", "no"])}, names["unk_token"])
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    template = (
        "{% for m in messages %}{{ m.content + (' ' + eos_token if m.role == 'assistant' else ' ') }}{% endfor %}"
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **names)


def refused(tokenizer, said):
    (found,) = Encoder(tokenizer).encode(render(said, ChatTemplate(tokenizer)))
    return str(found)


def test_an_unknown_character_of_an_answer_is_not_called_by_another_tokens_name():
    """Where the end token is the unknown token too, as GPT-2 has it, and where the answer spells a token."""
    both = words_tokenizer(unk_token="<end>", eos_token="<end>")
    reason = refused(both, Conversation(chat("yes", "no Ω")))
    assert "characters for which the tokenizer has only '<end>', its unknown token: 'Ω'" in reason
    apart = words_tokenizer(unk_token="<unk>", eos_token="<end>")
    assert "its unknown token: 'Ω'" in refused(apart, Conversation(chat("yes", "no Ω")))
    (encoded,) = Encoder(apart).encode(render(Conversation(chat("yes", "no <unk>")), ChatTemplate(apart)))
    assert apart.decode(encoded.input_ids) == "yes no <unk> <end>"


def test_a_text_is_trained_where_the_end_token_is_the_unknown_token_too():
    both = words_tokenizer(unk_token="<end>", eos_token="<end>")
    (encoded,) = Encoder(both).encode(render(Text("yes no"), ChatTemplate(both)))
    assert both.decode(encoded.input_ids) == "yes no<end>".replace("<", " <")
    assert "its unknown token" in refused(both, Text("yes Ω"))


def test_what_evaluation_asks_is_looked_into(recipe_file, lorakit, folder):
    code, _, err = lorakit("train", recipe_file(evaluate={"metrics": []}, train={"epochs": ..., "steps": 2}))
    assert code == 0, err
    write_rows(folder / "more.jsonl", [{"prompt": "What is <|im_start|>?", "completion": "b"}])
    code, _, err = lorakit("eval", "runs/tiny", "--data", "more.jsonl")
    assert code == 0 and "special_tokens: a text spells '<|im_start|>'" in err


def test_example_keeps_the_one_beginning_that_the_template_writes():
    family = FAMILIES["mistral"]
    tokenizer = family.tokenizer()
    assert example(family, tokenizer, chat("a", "b")).input_ids.count(tokenizer.bos_token_id) == 1


def test_thousands_of_added_tokens_are_looked_for_at_once():
    """Gemma has more than 6,000. Of words that begin alike the longest is found, as a tokenizer finds it."""
    import re

    from lorakit.data.chat_template.template_probe import compile_alternation

    words = [*(f"<unused{n}>" for n in range(300)), "<unused", "[INST]", "[I", "<", "a.b", "a.b+", "|"]
    slow = re.compile("|".join(re.escape(word) for word in sorted(words, key=lambda word: (-len(word), word))))
    text = "x <unused12> <unused [INST] [INS a.b+ a.b a,b <unused999> || <unused1>><"
    assert compile_alternation(words).findall(text) == slow.findall(text)
    assert compile_alternation([]).findall(text) == compile_alternation([""]).findall(text) == []
